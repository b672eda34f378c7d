"""The stages of docs/gpu.md in Triton.

Nothing here reads the device or branches on what is on it: a call can be captured in a CUDA graph.
"""

from collections.abc import Sequence

from torch import Tensor

from vrm_kernels.backends.contract import (
    Backend,
    GraphResult,
    GraphSettings,
    LossResult,
    LossSettings,
    Probs,
    ShareSettings,
    Sides,
    Views,
    graph_sizes,
)
from vrm_kernels.backends.triton import counting, dense_launches, launches
from vrm_kernels.backends.triton.arrays import Arrays
from vrm_kernels.backends.triton.counting import on_device
from vrm_kernels.backends.triton.launches import Given, Problem
from vrm_kernels.backends.triton.prepare import Targets
from vrm_kernels.graph import forms, pruning

NO_TARGETS = Targets(None, None)


class TritonBackend(Backend):
    def vrm_loss(
        self,
        views: Views,
        labels: Tensor | None,
        class_weight: Tensor | None,
        settings: LossSettings,
        need_grad: bool,
    ) -> LossResult:
        sizes = graph_sizes(views, settings.complete)
        form = forms.form(sizes, settings.percentile)
        alpha, beta, ce_real, ce_virtual, percentile, delta, eps, complete, *_ = settings
        problem = Problem(
            views, None, sizes, (alpha, beta), percentile, delta, eps, complete, complete, need_grad, form
        )
        targets = NO_TARGETS
        if labels is not None and (ce_real or ce_virtual):
            targets = Targets(labels.contiguous(), None if class_weight is None else class_weight.contiguous())
        with on_device(views.student_real.device):
            arrays = _run(problem, targets, settings)
        return LossResult(arrays.loss, arrays.grad_a, arrays.grad_b, arrays.terms, arrays.kept)

    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        (m, dims), n = sides.a.shape, len(sides.b)
        percentile, delta, eps, exclude_self = settings
        if probs is None or percentile >= 100 or pruning.edge_count(m, n, exclude_self) == 0:
            probs, percentile = None, 100.0
        sizes = ((m, n, dims),)
        form = forms.form(sizes, percentile)
        problem = Problem(sides, probs, sizes, (1.0, 0.0), percentile, delta, eps, False, exclude_self, need_grad, form)
        with on_device(sides.a.device):
            arrays = _run(problem, NO_TARGETS, None)
        return GraphResult(arrays.loss, arrays.grad_a, arrays.grad_b, arrays.kept[0])

    def entropy_of_logs(self, probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
        return counting.entropy_of_logs(probs_a, log_probs_b)

    def count_digits(self, entropy: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        return counting.count_digits(entropy, prefixes, shift, bits)

    def relation_share(
        self,
        sides: Sides,
        probs: Probs | None,
        entropy: Tensor | None,
        settings: ShareSettings,
        grads: Sequence[Tensor],
    ) -> Tensor:
        (m, dims), n = sides.a.shape, len(sides.b)
        threshold, kept, edges, weight, delta, eps, exclude_self = settings
        sizes, percentile = ((m, n, dims),), 100.0 if entropy is None else 0.0
        form = forms.form(sizes, 100.0)  # how many of its edges are kept is not known
        need_grad = bool(grads)
        problem = Problem(
            sides, None, sizes, (weight, 0.0), percentile, delta, eps, False, exclude_self, need_grad, form, edges
        )
        with on_device(sides.a.device):
            given = Given(entropy, threshold, kept) if entropy is not None else None
            arrays = _run(problem, NO_TARGETS, None, given)
        for grad, part in zip(grads, (arrays.grad_a, arrays.grad_b), strict=False):
            grad.add_(part)
        return arrays.terms[2]


def _run(problem: Problem, targets: Targets, settings: LossSettings | None, given: Given | None = None) -> Arrays:
    """All stages; ``settings`` are those of the cross-entropies. With a ``given`` selection edges are not ranked."""
    call = launches.lay_out(problem, given)
    ranked = problem.percentile < 100 and given is None
    launches.prepare(call, targets, settings)
    if problem.form == "dense":
        precision = dense_launches.precision_of(call.logits, call.dtype)
        graphs = dense_launches.entropies(call, precision, given.entropy if given else None)
        if ranked:
            dense_launches.select(call, graphs)
        dense_launches.edges(call, precision, targets, graphs)
    else:
        if ranked:
            launches.entropy(call)
            launches.select(call)
        launches.literal(call, targets)
    launches.finish(call, targets, settings)
    return call.arrays
