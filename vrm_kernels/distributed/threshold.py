"""What prunes the relation graphs of a global batch: exact quantiles of joint entropies that are spread over processes.

On the CPU a graph of many edges is bracketed: a sample, one pass over the entropies, and digits of the few that are
left. The host decides whether the bracket held, by sums that all processes see. Otherwise, and on a device, which is
not read, every digit takes a pass over all entropies.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vrm_kernels.distributed.collectives import Group, tensor_on
from vrm_kernels.distributed.shares import Limits, Share
from vrm_kernels.graph import pruning, selection

# Entropies a process from which on a bracket costs less than three passes; measured at B x 100 on two processes.
BRACKETED_EDGES = 2**19


def limits(
    group: Group, shares: Sequence[Share], percentile: float, dtype: torch.dtype, device: torch.device
) -> Limits:
    """The exact quantiles of the global graphs' joint entropies, and how many edges are at or below them."""
    edges = [share.edges for share in shares]
    if percentile == 100:
        infinite = torch.full((len(shares),), torch.inf, dtype=dtype, device=device)
        return Limits(infinite, tensor_on(device, edges, torch.int64))
    positions = [pruning.rank(percentile / 100, n, dtype) for n in edges]
    # A rank that is whole does not look at the next value, which may be infinite.
    ranks = tensor_on(device, [[below, below + (weight > 0)] for below, weight in positions], torch.int64)
    weights = tensor_on(device, [weight for _, weight in positions], dtype)
    found = None
    if device.type == "cpu" and max(edges) > BRACKETED_EDGES * group.world:
        found = _by_bracket(group, shares, ranks)
    values, at_most = found or _by_digits(group, shares, ranks, dtype)
    low, high = values.unbind(1)
    threshold = low.lerp(high, weights)
    return Limits(threshold, torch.where(threshold >= high, at_most[:, 1], at_most[:, 0]))


def _by_digits(group: Group, shares: Sequence[Share], ranks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`vrm_kernels.graph.selection.order_statistics`, of all entropies."""

    def count(prefixes: Tensor, shift: int, bits: int) -> Tensor:
        counts = torch.stack([share.count_digits(p, shift, bits) for share, p in zip(shares, prefixes, strict=True)])
        return group.sum(counts, "sum of the counts of entropies")

    return selection.order_statistics(count, ranks, dtype)


def _by_bracket(group: Group, shares: Sequence[Share], ranks: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same, or ``None`` where a rank is outside of its bracket, or too much inside."""
    samples = [share.sample() for share in shares]
    sizes = [len(sample) for sample in samples]
    samples = group.sum(torch.cat(samples), "sum of the samples of entropies").split(sizes)
    # Of all pairs of vertices: the edge of a vertex with itself, which is infinite, may be in a sample.
    ends = torch.stack(
        [
            selection.bracket(sample, wanted, share.vertices**2)
            for share, sample, wanted in zip(shares, samples, ranks.tolist(), strict=True)
        ]
    )
    if bool(ends.isnan().any()):
        return None
    prefix, unknown = selection.common_prefix(ends)
    parts = [share.split(*of_graph) for share, of_graph in zip(shares, ends.tolist(), strict=True)]

    def count(prefixes: Tensor, shift: int, bits: int) -> Tensor:
        counted = zip(shares, parts, prefixes, strict=True)
        return torch.stack([share.backend.count_digits(inside, p, shift, bits) for share, (_, inside), p in counted])

    # Where the entropies lie to the bracket, and the first digit of those inside, travel together.
    prefixes = torch.tensor(prefix)[:, None].expand_as(ranks)
    first = count(prefixes, *selection.digits(unknown)[0])[:, 0]
    own = torch.cat((torch.stack([counts for counts, _ in parts]), first), 1)
    sums = group.sum(own, "sum of the counts of entropies")
    below, low_end, inside, high_end = sums[:, :4].cumsum(1)[..., None].unbind(1)  # and what comes before
    if bool(sums[:, 4].any()) or bool(((ranks < below) | (ranks >= high_end)).any()):
        return None
    known = selection.Known(prefixes, unknown, sums[:, None, 5:].expand(-1, ranks.shape[1], -1))
    values, at_most = selection.order_statistics(
        lambda *digit: group.sum(count(*digit), "sum of the counts of entropies"), ranks - low_end, ends.dtype, known
    )
    at_low, at_high = ranks < low_end, ranks >= inside
    values = torch.where(at_low, ends[:, :1], torch.where(at_high, ends[:, 1:], values))
    return values, torch.where(at_low, low_end, torch.where(at_high, high_end, low_end + at_most))
