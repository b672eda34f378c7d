"""The `triton` backend: the contract of :mod:`vrm_kernels.ops`, on NVIDIA and AMD GPUs. See docs/triton.md.

Nothing here reads the device or branches on what is on it: a call can be captured in a CUDA graph.
"""

from torch import Tensor

from vrm_kernels import ops
from vrm_kernels.backends.triton import large, plan, small, stages
from vrm_kernels.backends.triton.shares import count_digits, entropy_of_logs, relation_share  # noqa: F401
from vrm_kernels.backends.triton.stages import Graph, Problem
from vrm_kernels.graph import pruning


def relation_graph(
    a: Tensor,
    b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    probs: tuple[Tensor, Tensor] | None,
    percentile: float,
    delta: float,
    exclude_self: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, kept, grad_a, grad_b)``: the contract is written out in :mod:`vrm_kernels.ops`."""
    sides = (a, b, teacher_a, teacher_b)
    compute = ops.compute_dtype(*sides)
    (m, dims), n = a.shape, b.shape[0]
    fused = plan.use_fused(compute, m * n * dims)
    precision = plan.precision({x.dtype for x in sides}, compute, (m + n) * dims // 2, fused, a.device)
    graph = Graph(False, m, n, m, m + n, dims)
    problem = Problem(sides, (graph,), (1.0,), percentile, delta, False, exclude_self, precision)
    ranked = probs is not None and percentile < 100
    with stages.on_device(a.device):
        # Passed on without a name here, so that what is used up can be freed.
        totals, grads = (small if fused else large).run(problem, need_grad, ranked, _with_given_probs(problem, probs))
    if grads is None:
        return totals.loss, totals.kept[0], totals.loss.new_empty(0), totals.loss.new_empty(0)
    return totals.loss, totals.kept[0], *grads


def vrm_graphs(
    student_real: Tensor,
    student_virtual: Tensor,
    teacher_real: Tensor,
    teacher_virtual: Tensor,
    alpha: float,
    beta: float,
    percentile: float,
    delta: float,
    complete: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, grad_real, grad_virtual, terms [2], kept [2])``: both graphs, fused."""
    sides = (student_real, student_virtual, teacher_real, teacher_virtual)
    compute = ops.compute_dtype(*sides)
    b, c = student_real.shape
    views = 2 if complete else 1
    fused = plan.use_fused(compute, views**2 * b * c * (b + c))
    precision = plan.precision({x.dtype for x in sides}, compute, b * c, fused, student_real.device)
    graphs = tuple(
        Graph(by_class, views * vertices, views * vertices, 0 if complete else vertices, 2 * vertices, dims)
        for by_class, vertices, dims in ((False, b, c), (True, c, b))
    )
    problem = Problem(sides, graphs, (alpha, beta), percentile, delta, complete, complete, precision)
    ranked = percentile < 100
    with stages.on_device(student_real.device):
        totals, grads = (small if fused else large).run(problem, need_grad, ranked, _with_softmax(problem))
    if grads is None:
        grads = [totals.loss.new_empty(0), totals.loss.new_empty(0)]
    return totals.loss, *grads, totals.terms, totals.kept


def _with_given_probs(problem: Problem, probs: tuple[Tensor, Tensor] | None) -> stages.Prepared:
    prepared = stages.prepare(problem, softmax=False)
    if probs is None:
        return prepared
    p, q = (x.to(problem.precision.compute).contiguous() for x in probs)
    prepared.bad[:1].logical_or_(~(p.sum() + q.sum()).isfinite())
    return stages.with_probs(prepared, p, -pruning.log_probs(q))


def _with_softmax(problem: Problem) -> stages.Prepared:
    prepared = stages.prepare(problem, softmax=True)
    if problem.complete:
        return prepared
    # Vertex 0 of side b is the first of the virtual view.
    return stages.with_probs(prepared, prepared.probs, prepared.surprisals[problem.samples :])
