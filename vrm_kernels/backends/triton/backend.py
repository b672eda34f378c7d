"""The `triton` backend, on NVIDIA and AMD GPUs. See docs/triton.md.

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
    compute_dtype,
    with_cross_entropies,
)
from vrm_kernels.backends.triton import counting, large, plan, shares, small, stages
from vrm_kernels.backends.triton.counting import on_device
from vrm_kernels.backends.triton.stages import Graph, Problem
from vrm_kernels.graph import pruning


class TritonBackend(Backend):
    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        percentile, delta, eps, exclude_self = settings
        compute = compute_dtype(*sides)
        (m, dims), n = sides.a.shape, sides.b.shape[0]
        fused = plan.use_fused(compute, m * n * dims)
        precision = plan.precision({x.dtype for x in sides}, compute, (m + n) * dims // 2, fused, sides.a.device)
        graph = Graph(False, m, n, m, m + n, dims)
        problem = Problem(sides, (graph,), (1.0,), percentile, delta, eps, False, exclude_self, precision)
        ranked = probs is not None
        with on_device(sides.a.device):
            # Passed on without a name here, so that what is used up can be freed.
            run = small.run if fused else large.run
            totals, grads = run(problem, need_grad, ranked, _with_given_probs(problem, probs))
        grad_a, grad_b = grads or (totals.loss.new_empty(0), totals.loss.new_empty(0))
        return GraphResult(totals.loss, grad_a, grad_b, totals.kept[0])

    def vrm_loss(
        self,
        views: Views,
        labels: Tensor | None,
        class_weight: Tensor | None,
        settings: LossSettings,
        need_grad: bool,
    ) -> LossResult:
        compute = compute_dtype(*views)
        b, c = views.student_real.shape
        device, complete, percentile = views.student_real.device, settings.complete, settings.percentile
        sides = 2 if complete else 1
        fused = plan.use_fused(compute, sides**2 * b * c * (b + c))
        precision = plan.precision({x.dtype for x in views}, compute, b * c, fused, device)
        graphs = tuple(
            Graph(by_class, sides * vertices, sides * vertices, 0 if complete else vertices, 2 * vertices, dims)
            for by_class, vertices, dims in ((False, b, c), (True, c, b))
        )
        weights = settings.alpha, settings.beta
        problem = Problem(
            views, graphs, weights, percentile, settings.delta, settings.eps, complete, complete, precision
        )
        with on_device(device):
            run = small.run if fused else large.run
            totals, grads = run(problem, need_grad, percentile < 100, _with_softmax(problem))
        grad_a, grad_b = grads or (totals.loss.new_empty(0), totals.loss.new_empty(0))
        relations = LossResult(totals.loss, grad_a, grad_b, totals.terms, totals.kept)
        return with_cross_entropies(relations, views, labels, class_weight, settings, need_grad)

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
        return shares.relation_share(sides, entropy, settings, grads)


def _with_given_probs(problem: Problem, probs: Probs | None) -> stages.Prepared:
    prepared = stages.prepare(problem, softmax=False)
    if probs is None:
        return prepared
    p, q = (x.to(problem.precision.compute).contiguous() for x in probs)
    prepared.bad[:1].logical_or_(~(p.sum() + q.sum()).isfinite())
    return stages.with_probs(prepared, p, -pruning.log_probs(q))


def _with_softmax(problem: Problem) -> stages.Prepared:
    prepared = stages.prepare(problem, softmax=True)
    assert prepared.surprisals is not None
    if problem.complete:
        return prepared
    # Vertex 0 of side b is the first of the virtual view.
    return stages.with_probs(prepared, prepared.probs, prepared.surprisals[problem.samples :])
