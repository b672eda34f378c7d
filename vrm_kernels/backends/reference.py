"""The formulas of Virtual Relation Matching (arXiv 2502.20760), literally: the oracle.

Plain differentiable PyTorch, any dtype, twice differentiable, one or two dozen ``[M, N, D]`` tensors alive at once.
This is also the eager class that the benchmarks compare with: there is no second copy of these formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm_kernels.graph import pruning, selection
from vrm_kernels.graph.constants import COUNT_EPS, RELATION_EPS


def relations(a: Tensor, b: Tensor, exclude_self: bool = False) -> Tensor:
    """``e_ij = (a_i - b_j) / (||a_i - b_j|| + 1e-7)`` of ``[M, D]`` and ``[N, D]``: ``[M, N, D]``."""
    difference = a[:, None] - b[None]
    if exclude_self:  # edges that do not exist: any constant, whose derivatives are zero as those at d = 0 are not
        self_edges = torch.eye(len(a), len(b), dtype=torch.bool, device=a.device)
        difference = difference.masked_fill(self_edges[..., None], 1.0)
    return difference / (difference.norm(dim=-1, keepdim=True) + RELATION_EPS)


def kept_edges(probs: tuple[Tensor, Tensor] | None, m: int, n: int, percentile: float, exclude_self: bool) -> Tensor:
    """The pruning mask ``[M, N]``: ranked edges whose joint entropy is at or below the percentile's quantile."""
    if probs is None:
        return ~torch.eye(m, n, dtype=torch.bool) if exclude_self else torch.ones(m, n, dtype=torch.bool)
    entropy = pruning.joint_entropy(*probs)
    if not exclude_self:
        return entropy <= pruning.quantile_sorted(entropy.flatten(), percentile / 100)
    ranked = ~torch.eye(m, dtype=torch.bool, device=entropy.device)
    # A vertex's edge with itself is infinitely unreliable: sorted behind every ranked edge, it is never counted.
    entropy = torch.where(ranked, entropy, torch.inf)
    count = pruning.edge_count(m, n, exclude_self)
    return ranked & (entropy <= pruning.quantile_sorted(entropy.flatten(), percentile / 100, count))


def relation_graph(
    a: Tensor,
    b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    probs: tuple[Tensor, Tensor] | None,
    percentile: float,
    delta: float,
    exclude_self: bool,
) -> tuple[Tensor, Tensor]:
    """``(loss, kept)`` of one graph, differentiable in ``a`` and ``b``; all inputs of one dtype."""
    with torch.no_grad():
        mask = kept_edges(probs, a.shape[0], b.shape[0], percentile, exclude_self).to(a.device)
    kept = mask.sum()
    return masked_loss(a, b, teacher_a, teacher_b, mask, kept, delta, exclude_self), kept


def masked_loss(a, b, teacher_a, teacher_b, mask: Tensor, kept: Tensor, delta: float, exclude_self: bool) -> Tensor:
    """The loss of the edges in ``mask``, over ``kept``."""
    with torch.no_grad():
        teacher = relations(teacher_a, teacher_b, exclude_self)
    huber = F.huber_loss(relations(a, b, exclude_self), teacher, reduction="none", delta=delta).sum(-1)
    return (huber * mask).sum() / (kept.to(huber.dtype) + COUNT_EPS)


entropy_of_logs = pruning.entropy_of_logs
count_digits = selection.count_digits


def share_mask(a: Tensor, b: Tensor, entropy: Tensor | None, threshold, exclude_self: bool) -> Tensor:
    """The pruning mask of a share's edges, whose threshold is the whole graph's; without ``entropy`` all are kept."""
    if entropy is not None:
        return entropy <= threshold
    return kept_edges(None, len(a), len(b), 100, exclude_self).to(a.device)


def relation_share(
    a, b, teacher_a, teacher_b, probs, entropy, threshold, kept, edges, weight, delta, exclude_self, grads
) -> Tensor:
    """The contract is written out in :mod:`vrm_kernels.distributed.loss`."""
    mask = share_mask(a, b, entropy, threshold, exclude_self)
    with torch.enable_grad():
        student = [x.detach().requires_grad_() for x in (a, b)]
        loss = masked_loss(*student, teacher_a, teacher_b, mask, kept, delta, exclude_self)
    if grads:
        for grad, part in zip(grads, torch.autograd.grad(loss, student), strict=True):
            grad.add_(part, alpha=weight)
    return loss.detach()
