"""The formulas of Virtual Relation Matching (arXiv 2502.20760), literally: the oracle.

Plain differentiable PyTorch, any dtype, twice differentiable, one or two dozen ``[M, N, D]`` tensors alive at once.
This is also the eager class that the benchmarks compare with: there is no second copy of these formulas.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm_kernels.backends.contract import (
    Backend,
    GraphResult,
    GraphSettings,
    Probs,
    ShareSettings,
    Sides,
    all_sound,
    compute_dtype,
)
from vrm_kernels.graph import pruning
from vrm_kernels.graph.constants import COUNT_EPS


def relations(a: Tensor, b: Tensor, eps: float, exclude_self: bool = False) -> Tensor:
    """``e_ij = (a_i - b_j) / (||a_i - b_j|| + eps)`` of ``[M, D]`` and ``[N, D]``: ``[M, N, D]``."""
    difference = a[:, None] - b[None]
    if exclude_self:  # edges that do not exist: any constant, whose derivatives are zero as those at d = 0 are not
        self_edges = torch.eye(len(a), len(b), dtype=torch.bool, device=a.device)
        difference = difference.masked_fill(self_edges[..., None], 1.0)
    return difference / (difference.norm(dim=-1, keepdim=True) + eps)


def kept_edges(
    probs: tuple[Tensor, Tensor] | None, m: int, n: int, percentile: float, exclude_self: bool, device=None
) -> Tensor:
    """The pruning mask ``[M, N]``: the edges whose joint entropy is at or below the percentile's quantile, or without
    ``probs`` all of them, on ``device``."""
    if probs is None:
        every = torch.ones(m, n, dtype=torch.bool, device=device)
        return every ^ torch.eye(m, n, dtype=torch.bool, device=device) if exclude_self else every
    entropy = pruning.joint_entropy(*probs)
    if not exclude_self:
        return entropy <= pruning.quantile_sorted(entropy.flatten(), percentile / 100)
    ranked = ~torch.eye(m, dtype=torch.bool, device=entropy.device)
    # A vertex's edge with itself is infinitely unreliable: sorted behind every ranked edge, it is never counted.
    entropy = torch.where(ranked, entropy, torch.inf)
    count = pruning.edge_count(m, n, exclude_self)
    return ranked & (entropy <= pruning.quantile_sorted(entropy.flatten(), percentile / 100, count))


def masked_loss(sides: Sides, mask: Tensor, kept: Tensor, delta: float, eps: float, exclude_self: bool) -> Tensor:
    """The loss of the edges in ``mask``, over ``kept``; differentiable in the student's sides."""
    with torch.no_grad():
        teacher = relations(sides.teacher_a, sides.teacher_b, eps, exclude_self)
    student = relations(sides.a, sides.b, eps, exclude_self)
    huber = F.huber_loss(student, teacher, reduction="none", delta=delta).sum(-1)
    return (huber * mask).sum() / (kept.to(huber.dtype) + COUNT_EPS)


def share_mask(sides: Sides, entropy: Tensor | None, settings: ShareSettings) -> Tensor:
    """The pruning mask of a share's edges, whose threshold is the whole graph's; without ``entropy`` all are kept."""
    if entropy is not None:
        return entropy <= settings.threshold
    return kept_edges(None, len(sides.a), len(sides.b), 100, settings.exclude_self, sides.a.device)


def _leaves(sides: Sides) -> Sides:
    """Sides whose gradients can be asked for."""
    return sides._replace(a=sides.a.detach().requires_grad_(), b=sides.b.detach().requires_grad_())


class ReferenceBackend(Backend):
    """Where ``need_grad`` is false its losses are differentiable PyTorch, so that nothing need wrap them."""

    carries_tangents = True

    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        percentile, delta, eps, exclude_self = settings
        dtype = compute_dtype(*sides)
        sides = Sides(*(x.to(dtype) for x in sides))
        with torch.no_grad():
            mask = kept_edges(probs, len(sides.a), len(sides.b), percentile, exclude_self, sides.a.device)
            sound = all_sound(sides, probs)
            kept = torch.where(sound, mask.sum(), 0)
            poison = torch.where(sound, 0.0, torch.nan).to(dtype)
        if need_grad:
            sides = _leaves(sides)
        with torch.set_grad_enabled(need_grad or torch.is_grad_enabled()):
            loss = masked_loss(sides, mask, kept, delta, eps, exclude_self)
            loss = loss + poison
        if not need_grad:
            return GraphResult(loss, loss.new_empty(0), loss.new_empty(0), kept)
        grad_a, grad_b = (x.add_(poison) for x in torch.autograd.grad(loss, sides[:2]))
        return GraphResult(loss.detach(), grad_a, grad_b, kept)

    def relation_share(
        self,
        sides: Sides,
        probs: Probs | None,
        entropy: Tensor | None,
        settings: ShareSettings,
        grads: Sequence[Tensor],
    ) -> Tensor:
        mask = share_mask(sides, entropy, settings)
        sides = _leaves(sides)
        with torch.enable_grad():
            loss = masked_loss(sides, mask, settings.kept, settings.delta, settings.eps, settings.exclude_self)
        if grads:
            for grad, part in zip(grads, torch.autograd.grad(loss, sides[:2]), strict=True):
                grad.add_(part, alpha=settings.weight)
        return loss.detach() + torch.where(all_sound(sides, None), 0.0, torch.nan).to(loss.dtype)
