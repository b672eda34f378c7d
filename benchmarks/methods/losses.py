"""The losses that relation matching is compared with, and the outputs of a model that they are taken of.

Every one adds the cross-entropy of each view to its own term, so that the methods differ in nothing but that term.
Logits are ``[B, C]``, labels ``[B]`` class indices.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm_distill.engine import hinton_divergence, loss_of_logits
from vrm_kernels import VRMLoss


class Outputs(NamedTuple):
    """What a model makes of one view."""

    logits: Tensor  # [B, C]
    embedding: Tensor  # [B, width], what the classifier sees
    attention: Tensor  # [B, H * W], see attention_of


# term(student, teacher, labels) of one view.
Term = Callable[[Outputs, Outputs, Tensor], Tensor]
# loss(student, teacher, labels): one Outputs a view, the real view first.
Loss = Callable[[Sequence[Outputs], Sequence[Outputs], Tensor], Tensor]


def outputs(model: nn.Module, images: Tensor) -> Outputs:
    """Of a model with ``features``, images to maps ``[B, width, H, W]``, and ``classifier``, embeddings to logits."""
    maps = model.features(images)
    embedding = maps.mean((2, 3))
    return Outputs(model.classifier(embedding), embedding, attention_of(maps))


def attention_of(maps: Tensor) -> Tensor:
    """Where a model looks (Zagoruyko and Komodakis, arXiv 1612.03928): mean square over the channels, unit length."""
    return F.normalize(maps.square().mean(1).flatten(1))


def cross_entropy(student: Sequence[Outputs], _: Sequence[Outputs], labels: Tensor) -> Tensor:
    """``CE(S, y) + CE(S', y) + ...`` over the views."""
    return sum(F.cross_entropy(view.logits, labels) for view in student)


def per_view(term: Term) -> Loss:
    """``sum over the views of CE(S, y) + term(S, T, y)``."""

    def loss(student: Sequence[Outputs], teacher: Sequence[Outputs], labels: Tensor) -> Tensor:
        terms = (term(*view, labels) for view in zip(student, teacher, strict=True))
        return cross_entropy(student, teacher, labels) + sum(terms)

    return loss


def relation_matching(kd_weight: float = 0.0, **settings) -> Loss:
    """``vrm-distill``'s loss: ``VRMLoss`` of the real view with a virtual one, the mean over the virtual ones.

    Of one view alone the relations are those of that view with itself.

    Args:
        kd_weight: of KD's term, temperature 4, added for each view.
        settings: as for :class:`vrm_kernels.VRMLoss`.
    """
    vrm = VRMLoss(**settings)

    def logits(views: Sequence[Outputs]) -> tuple[Tensor, Tensor]:
        return views[0].logits, torch.cat([view.logits for view in views[1:] or views])

    return lambda student, teacher, labels: loss_of_logits(logits(student), logits(teacher), labels, vrm, kd_weight)[0]


def kd(weight: float = 1.0, temperature: float = 4.0) -> Term:
    """Knowledge distillation (Hinton et al., arXiv 1503.02531): ``T^2 KL(softmax(t / T) || softmax(s / T))``."""
    return lambda student, teacher, _: weight * hinton_divergence(student.logits, teacher.logits, temperature)


def lskd(weight: float = 9.0, temperature: float = 2.0) -> Term:
    """Logit standardisation (Sun et al., arXiv 2403.01803): KD of logits of mean 0 and deviation 1 in each sample."""

    def standardised(logits: Tensor) -> Tensor:
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)

    return lambda student, teacher, _: (
        weight * hinton_divergence(standardised(student.logits), standardised(teacher.logits), temperature)
    )


def dkd(alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> Term:
    """Decoupled KD (Zhao et al., arXiv 2203.08679): ``T^2 (alpha TCKD + beta NCKD)``.

    TCKD is the divergence of (target, not target), NCKD that of the other classes among themselves: the term raises a
    ``ValueError`` for fewer than three classes, where there is nothing among them to compare.
    """

    def term(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        classes = student.logits.shape[1]
        if classes < 3:
            raise ValueError(f"DKD compares the classes that are not the target, {classes} are too few: use kd")
        target = F.one_hot(labels, classes).bool()
        log_p, log_q = ((x.logits / temperature).log_softmax(1) for x in (student, teacher))

        def binary(x: Tensor) -> Tensor:
            others = x.masked_fill(target, -math.inf).logsumexp(1)
            return torch.stack((x[target], others), 1)

        tckd = F.kl_div(binary(log_p), binary(log_q), reduction="batchmean", log_target=True)
        rest = (x.logits[~target].view(len(labels), -1) for x in (student, teacher))
        return alpha * temperature**2 * tckd + beta * hinton_divergence(*rest, temperature)

    return term


def dist(beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0) -> Term:
    """DIST (Huang et al., arXiv 2205.10536): ``T^2 (beta (1 - r(rows)) + gamma (1 - r(columns)))``, r Pearson's."""

    def term(student: Outputs, teacher: Outputs, _: Tensor) -> Tensor:
        p, q = ((x.logits / temperature).softmax(1) for x in (student, teacher))
        inter, intra = 1 - _pearson(p, q).mean(), 1 - _pearson(p.T, q.T).mean()
        return (beta * inter + gamma * intra) * temperature**2

    return term


def rkd(distance: float = 25.0, angle: float = 50.0) -> Term:
    """Relational KD (Park et al., arXiv 1904.05068): Huber of distances over their mean, and of angles.

    Of embeddings: logits would have to say what the teacher's say up to a rotation, which is not what they are for.
    """

    def term(student: Outputs, teacher: Outputs, _: Tensor) -> Tensor:
        s, t = student.embedding, teacher.embedding
        apart = distance * F.smooth_l1_loss(_distances(s), _distances(t))
        return apart + angle * F.smooth_l1_loss(_angles(s), _angles(t))

    return term


def cc(weight: float = 100.0, gamma: float = 0.4) -> Term:
    """Correlation congruence (Peng et al., arXiv 1904.01802): mean square difference of the embeddings' kernels.

    The kernel is the paper's Gaussian ``exp(-gamma ||x - y||^2)`` of unit-length embeddings, itself and not its Taylor
    series; its weight there is of another scale.
    """

    def kernel(x: Tensor) -> Tensor:
        x = F.normalize(x)
        return (2 * gamma * (x @ x.T - 1)).exp()

    return lambda student, teacher, _: weight * F.mse_loss(kernel(student.embedding), kernel(teacher.embedding))


def at(weight: float = 1000.0) -> Term:
    """Attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928) of the last maps: mean square difference."""
    return lambda student, teacher, _: weight * F.mse_loss(student.attention, teacher.attention)


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), dim=1)


def _distances(x: Tensor) -> Tensor:
    """Pairwise distances ``[B, B]`` over the mean of those of different samples."""
    square = (x.square().sum(1, keepdim=True) + x.square().sum(1) - 2 * x @ x.T).clamp(min=1e-12)
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = torch.where(apart, square, 1.0).sqrt() * apart
    return distances / distances[apart].mean()


def _angles(x: Tensor) -> Tensor:
    """Cosines of the angle at ``j`` between ``i`` and ``k``, ``[B, B, B]``."""
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
