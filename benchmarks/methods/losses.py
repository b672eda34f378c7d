"""The losses that relation matching is compared with; those of logits with the signature of
:class:`vrm_kernels.VRMLoss`.

Every one adds ``CE(S, y) + CE(S', y)`` to its own term, taken for each view and added up, so that the methods differ in
nothing but that term. Logits are ``[B, C]``, labels ``[B]`` class indices.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# term(student, teacher, labels) of one view.
Term = Callable[[Tensor, Tensor, Tensor], Tensor]


class PerView(nn.Module):
    """``CE(S, y) + CE(S', y) + weight (term(S, T, y) + term(S', T', y))``."""

    def __init__(self, term: Term, weight: float = 1.0, ce_weight: float = 1.0) -> None:
        super().__init__()
        self.term, self.weight, self.ce_weight = term, weight, ce_weight

    def forward(
        self,
        student_real: Tensor,
        student_virtual: Tensor,
        teacher_real: Tensor,
        teacher_virtual: Tensor,
        labels: Tensor,
    ) -> Tensor:
        views = ((student_real, teacher_real), (student_virtual, teacher_virtual))
        return sum(
            self.ce_weight * F.cross_entropy(student, labels) + self.weight * self.term(student, teacher, labels)
            for student, teacher in views
        )


class OnEmbeddings(nn.Module):
    """``CE(S, y) + CE(S', y) + term(E, F, y) + term(E', F', y)``, of what the classifiers of both models see.

    The models must have ``embed``, images to embeddings ``[B, width]``, and ``classifier``, embeddings to logits; the
    widths may differ.
    """

    def __init__(self, term: Term) -> None:
        super().__init__()
        self.term = term

    def forward(self, teacher: nn.Module, student: nn.Module, real: Tensor, virtual: Tensor, labels: Tensor) -> Tensor:
        images = torch.cat((real, virtual))
        with torch.no_grad():
            wanted = teacher.embed(images).chunk(2)
        views = zip(student.embed(images).chunk(2), wanted, strict=True)
        return sum(F.cross_entropy(student.classifier(e), labels) + self.term(e, f, labels) for e, f in views)


def kd(student: Tensor, teacher: Tensor, _: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation (Hinton et al., arXiv 1503.02531): ``T^2 KL(softmax(t / T) || softmax(s / T))``."""
    return _kl(student / temperature, teacher / temperature) * temperature**2


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Decoupled KD (Zhao et al., arXiv 2203.08679): ``T^2 (alpha TCKD + beta NCKD)``.

    TCKD is the divergence of (target, not target), NCKD that of the other classes among themselves.
    """
    target = F.one_hot(labels, student.shape[1]).bool()
    log_p, log_q = ((x / temperature).log_softmax(1) for x in (student, teacher))

    def binary(x: Tensor) -> Tensor:
        others = x.masked_fill(target, -math.inf).logsumexp(1)
        return torch.stack((x[target], others), 1)

    tckd = F.kl_div(binary(log_p), binary(log_q), reduction="batchmean", log_target=True)
    rest = (x[~target].view(len(x), -1) / temperature for x in (student, teacher))
    return (alpha * tckd + beta * _kl(*rest)) * temperature**2


def dist(
    student: Tensor, teacher: Tensor, _: Tensor, beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0
) -> Tensor:
    """DIST (Huang et al., arXiv 2205.10536): ``T^2 (beta (1 - r(rows)) + gamma (1 - r(columns)))``, r Pearson's."""
    p, q = ((x / temperature).softmax(1) for x in (student, teacher))
    inter = 1 - _pearson(p, q).mean()
    intra = 1 - _pearson(p.T, q.T).mean()
    return (beta * inter + gamma * intra) * temperature**2


def rkd(student: Tensor, teacher: Tensor, _: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Relational KD (Park et al., arXiv 1904.05068): Huber of distances over their mean, and of angles.

    Of embeddings: logits would have to say what the teacher's say up to a rotation, which is not what they are for.
    """
    with torch.no_grad():
        teacher_distance, teacher_angle = _distances(teacher), _angles(teacher)
    return distance * F.smooth_l1_loss(_distances(student), teacher_distance) + angle * F.smooth_l1_loss(
        _angles(student), teacher_angle
    )


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


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
