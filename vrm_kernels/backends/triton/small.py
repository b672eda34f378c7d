"""The small regime, host side: both graphs in every launch."""

import torch
import triton
from torch import Tensor

from vrm_kernels.backends.triton import plan, stages
from vrm_kernels.backends.triton.fused import edges_kernel, entropy_kernel, gradients_kernel
from vrm_kernels.backends.triton.stages import Block, Prepared, Problem, Selection, Selector, Totals


def run(problem: Problem, need_grad: bool, ranked: bool, prepared: Prepared) -> tuple[Totals, list[Tensor] | None]:
    """The loss and, if asked for, the gradients of both sides."""
    selection = select(problem, prepared) if ranked else None
    return losses_and_gradients(problem, prepared, selection, need_grad)


def select(problem: Problem, prepared: Prepared) -> Selection:
    """The entropies of all edges and the thresholds: six launches."""
    first, last = problem.graphs[0], problem.graphs[-1]
    sizes = [g.m * g.n for g in problem.graphs]
    entropies = problem.new(sum(sizes))
    selector = Selector(problem, prepared, [problem.edge_count(g) for g in problem.graphs], prepared.histograms)
    tiles = [_tiles(g, plan.ENTROPY["BLOCK"]) for g in problem.graphs]
    assert prepared.probs is not None
    depth = prepared.probs.shape[1]
    entropy_kernel[(sum(tiles),)](
        prepared.probs, prepared.surprisals, entropies,
        first.m, first.n, depth, last.m, last.n, problem.samples, problem.samples, depth, tiles[0],
        PRECISION=problem.precision.dot, **plan.ENTROPY,
    )  # fmt: skip
    blocks = [Block(x, g.m, g.n, g.n) for x, g in zip(entropies.split(sizes), problem.graphs, strict=True)]
    for number in range(len(selector.digits)):
        selector.count(number, blocks)
    selection = selector.finish()
    return Selection(selection.threshold, selection.limits, selection.counts, entropies)


def losses_and_gradients(
    problem: Problem, prepared: Prepared, selection: Selection | None, need_grad: bool
) -> tuple[Totals, list[Tensor] | None]:
    """Two launches for the loss, two more for the gradients."""
    graphs, precision = problem.graphs, problem.precision
    first, last = graphs[0], graphs[-1]
    packed, stats, scale = stages.pack(problem, prepared, graphs)
    edges = sum(g.m * g.n for g in graphs)
    tiles = [_tiles(g, plan.EDGES["BLOCK"]) for g in graphs]
    coefficients = problem.new(2 * edges if need_grad else 0)
    literals = problem.new(3 * edges if need_grad else 0)
    flags, losses = problem.new(sum(tiles), dtype=torch.int32), problem.new(sum(tiles))
    entropies = prepared.student if selection is None else selection.entropies
    chosen = stages.selection_tensors(selection, scale, prepared.bad)
    delta, eps = stages.split_float(problem.delta), stages.split_float(problem.eps)
    shapes = [k for g in (first, last) for k in (g.vertices, g.m, g.n, g.first_b, g.dims, g.width)]
    keep = {"KEEP_ALL": selection is None, "PRECISION": precision.dot}
    edges_kernel[(sum(tiles),)](
        prepared.student, prepared.teacher, packed[0], packed[-1], stats[0], stats[-1], scale, entropies, chosen[0],
        coefficients, literals, flags, losses, *shapes, problem.samples, problem.classes, *delta, *eps, tiles[0],
        EXCLUDE_SELF=problem.exclude_self, NEED_GRAD=need_grad, **keep, **plan.EDGES,
    )  # fmt: skip
    totals = stages.total(problem, prepared, losses, tiles, selection)
    if not need_grad:
        return totals, None
    grads = [problem.new(rows, problem.classes) for rows in problem.rows]
    block = plan.GRADIENTS["BLOCK"]
    gradients_kernel[(triton.cdiv(max(problem.rows), block) * triton.cdiv(problem.classes, block), 2)](
        prepared.student, prepared.teacher, packed[0], packed[-1], scale, coefficients, literals, flags, *chosen,
        prepared.bad, *grads, *shapes, problem.samples, problem.classes, *delta,
        *stages.split_float(problem.weights[0]), *stages.split_float(problem.weights[-1]), tiles[0],
        problem.edge_count(first), problem.edge_count(last),
        GRAPHS=len(graphs), COMPLETE=problem.complete, TILE=plan.EDGES["BLOCK"], **keep, **plan.GRADIENTS,
    )  # fmt: skip
    return totals, grads


def _tiles(graph: stages.Graph, block: int) -> int:
    return triton.cdiv(graph.m, block) * triton.cdiv(graph.n, block)
