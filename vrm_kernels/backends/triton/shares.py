"""A process's share of a graph: the contract is that of :class:`vrm_kernels.backends.contract.Backend`.

Entropies are the library's products. What counts them, and all that follows, are kernels, those of either regime: they
take the threshold and the number of kept edges from tensors on the device.
"""

from collections.abc import Sequence

import triton
from torch import Tensor

from vrm_kernels.backends.contract import ShareSettings, Sides
from vrm_kernels.backends.triton import large, plan, small, stages
from vrm_kernels.backends.triton.arrays import Selection
from vrm_kernels.backends.triton.operands import product
from vrm_kernels.backends.triton.select import BINS, count_kernel
from vrm_kernels.backends.triton.stages import Graph, Problem
from vrm_kernels.graph import selection


def entropy_of_logs(probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
    """As :func:`vrm_kernels.graph.pruning.entropy_of_logs`, in rows as far apart as pairwise buffers."""
    m, n = len(probs_a), len(log_probs_b)
    entropy = probs_a.new_empty(m, plan.row_stride(n))[:, :n]
    product(probs_a, log_probs_b, entropy)
    return entropy.neg_()


def count_digits(x: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
    """As :func:`vrm_kernels.graph.selection.count_digits`, of ``x [m, n]`` whose rows are contiguous; one launch."""
    if len(prefixes) != 2 or 2**bits > BINS.value:  # asked for on the CPU alone
        return selection.count_digits(x, prefixes, shift, bits)
    leading = shift + bits == 8 * x.element_size()
    counts = prefixes.new_zeros(1 if leading else 2, 2**bits)
    with stages.on_device(x.device):
        count_kernel[(triton.cdiv(x.numel(), plan.HISTOGRAM["BLOCK"]),)](
            values=x, columns=x.shape[1], count=x.numel(), row_stride=x.stride(0), prefixes=prefixes,
            histograms=counts, LEADING=leading, SHIFT=shift, WIDTH=bits,
            **plan.HISTOGRAM,
        )  # fmt: skip
    return counts.expand(2, -1)


class _Stored(large.Entropies):
    """Entropies that are given, in the place of :class:`large.Entropies`."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def rows(self, first: int, count: int) -> Tensor:
        return self.values[first : first + count]


def relation_share(sides: Sides, entropy: Tensor | None, settings: ShareSettings, grads: Sequence[Tensor]) -> Tensor:
    """The share's part of the loss; ``entropy`` is what :func:`entropy_of_logs` gave, or rows of it."""
    threshold, kept, edges, weight, delta, eps, exclude_self = settings
    a = sides.a
    # Columns of logits are copied by torch, in tiles; the kernels would read them a row at a time.
    sides = Sides(*(x.contiguous() for x in sides))
    (m, dims), n = a.shape, len(sides.b)
    fused = plan.use_fused(a.dtype, m * n * dims)
    precision = plan.precision({a.dtype}, a.dtype, (m + n) * dims // 2, fused, a.device)
    graph = Graph(False, m, n, m, m + n, dims, edges)
    problem = Problem(sides, (graph,), (weight,), 100.0, delta, eps, False, exclude_self, precision)
    with stages.on_device(a.device):
        prepared = stages.prepare(problem, softmax=False)
        chosen = None
        if entropy is not None:
            # Copies, since a kernel is compiled apart for numbers that do not lie on 16 bytes.
            limits = threshold.repeat(2)
            chosen = Selection(limits, limits, kept.repeat(2))
        if fused:
            whole = None if entropy is None else entropy.contiguous()
            totals, parts = small.losses_and_gradients(problem, prepared, chosen, whole, bool(grads))
        else:
            stored = None if entropy is None else [_Stored(entropy)]
            totals, parts = large.losses_and_gradients(problem, prepared, chosen, stored, bool(grads))
    for grad, part in zip(grads, parts or (), strict=True):
        grad.add_(part)
    return totals.terms[0]
