"""A process's share of a graph: the contract is that of :class:`vrm_kernels.backends.contract.Backend`.

Entropies are counted by :mod:`counting`. What follows are the kernels of either regime: they take the threshold and the
number of kept edges from tensors on the device.
"""

from collections.abc import Sequence

from torch import Tensor

from vrm_kernels.backends.contract import ShareSettings, Sides
from vrm_kernels.backends.triton import large, plan, small, stages
from vrm_kernels.backends.triton.arrays import Selection
from vrm_kernels.backends.triton.counting import on_device
from vrm_kernels.backends.triton.stages import Graph, Problem


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
    with on_device(a.device):
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
