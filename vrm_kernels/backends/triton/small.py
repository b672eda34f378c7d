"""The small regime, host side: both graphs in every launch."""

import torch
import triton
from torch import Tensor

from vrm_kernels.backends.triton import plan, stages
from vrm_kernels.backends.triton.arrays import Found, Selection, Sizes, Totals
from vrm_kernels.backends.triton.fused import edges_kernel, entropy_kernel, gradients_kernel
from vrm_kernels.backends.triton.operands import parts
from vrm_kernels.backends.triton.stages import Block, Graph, Prepared, Problem, Selector


def run(problem: Problem, need_grad: bool, ranked: bool, prepared: Prepared) -> tuple[Totals, list[Tensor] | None]:
    """The loss and, if asked for, the gradients of both sides."""
    selection, entropies = select(problem, prepared) if ranked else (None, None)
    return losses_and_gradients(problem, prepared, selection, entropies, need_grad)


def select(problem: Problem, prepared: Prepared) -> tuple[Selection, Tensor]:
    """The thresholds and the entropies of all edges: six launches."""
    first, last = problem.graphs[0], problem.graphs[-1]
    sizes = [g.m * g.n for g in problem.graphs]
    entropies = problem.new(sum(sizes))
    selector = Selector(problem, prepared, [problem.edge_count(g) for g in problem.graphs], prepared.histograms)
    tiles = [_tiles(g, plan.ENTROPY["BLOCK"]) for g in problem.graphs]
    assert prepared.probs is not None
    depth = prepared.probs.shape[1]
    entropy_kernel[(sum(tiles),)](
        probs=prepared.probs, surprisals=prepared.surprisals, entropies=entropies,
        m_0=first.m, n_0=first.n, depth_0=depth, m_1=last.m, n_1=last.n, depth_1=problem.samples,
        samples=problem.samples, classes=depth, tiles_0=tiles[0], PRECISION=problem.precision.dot, **plan.ENTROPY,
    )  # fmt: skip
    blocks = [Block(x, g.m, g.n, g.n) for x, g in zip(entropies.split(sizes), problem.graphs, strict=True)]
    for number in range(len(selector.digits)):
        selector.count(number, blocks)
    return selector.finish(), entropies


def losses_and_gradients(
    problem: Problem, prepared: Prepared, selection: Selection | None, entropies: Tensor | None, need_grad: bool
) -> tuple[Totals, list[Tensor] | None]:
    """Two launches for the loss, two more for the gradients. Without a selection every edge is kept."""
    graphs, precision = problem.graphs, problem.precision
    first, last = graphs[0], graphs[-1]
    packed, stats, scale = stages.pack(problem, prepared, graphs)
    edges = sum(g.m * g.n for g in graphs)
    tiles = [_tiles(g, plan.EDGES["BLOCK"]) for g in graphs]
    found = Found(
        problem.new(2 * edges if need_grad else 0),
        problem.new(3 * edges if need_grad else 0),
        problem.new(sum(tiles), dtype=torch.int32),
    )
    losses = problem.new(sum(tiles))
    chosen = stages.or_stand_ins(selection, scale, prepared.bad)
    delta = parts(problem.delta)
    common = {
        "logits": prepared.logits, "packed": (packed[0], packed[-1]), "scale": scale, "found": found,
        **_sizes(first, 0), **_sizes(last, 1), "samples": problem.samples, "classes": problem.classes, "delta": delta,
        "tiles_0": tiles[0], "KEEP_ALL": selection is None, "PRECISION": precision.dot,
    }  # fmt: skip
    edges_kernel[(sum(tiles),)](
        stats=(stats[0], stats[-1]), entropies=prepared.logits.student if entropies is None else entropies,
        threshold=chosen.threshold, losses=losses, eps=parts(problem.eps),
        EXCLUDE_SELF=problem.exclude_self, NEED_GRAD=need_grad, **common, **plan.EDGES,
    )  # fmt: skip
    totals = stages.total(problem, prepared, losses, tiles, selection)
    if not need_grad:
        return totals, None
    grads = [problem.new(rows, problem.classes) for rows in problem.rows]
    block = plan.GRADIENTS["BLOCK"]
    gradients_kernel[(triton.cdiv(max(problem.rows), block) * triton.cdiv(problem.classes, block), 2)](
        selection=chosen, bad=prepared.bad, grads=tuple(grads), weights=problem.weight_parts,
        edges_0=problem.edge_count(first), edges_1=problem.edge_count(last),
        GRAPHS=len(graphs), COMPLETE=problem.complete, TILE=plan.EDGES["BLOCK"], **common, **plan.GRADIENTS,
    )  # fmt: skip
    return totals, grads


def _tiles(graph: Graph, block: int) -> int:
    return triton.cdiv(graph.m, block) * triton.cdiv(graph.n, block)


def _sizes(graph: Graph, number: int) -> dict[str, int]:
    """What the kernels are told of graph ``number``: see :class:`arrays.Sizes`."""
    return {f"{name}_{number}": getattr(graph, name) for name in Sizes._fields}
