"""The large regime, host side: the vendor's products over blocks of rows, and one epilogue kernel for each block."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vrm_kernels.backends.triton import plan, stages
from vrm_kernels.backends.triton.blocks import combine_kernel, epilogue_kernel
from vrm_kernels.backends.triton.prepare import split_kernel
from vrm_kernels.backends.triton.stages import Block, Graph, Prepared, Problem, Selection, Selector, Totals


def run(problem: Problem, need_grad: bool, ranked: bool, prepared: Prepared) -> tuple[Totals, list[Tensor] | None]:
    """The loss and, if asked for, the gradients of both sides."""
    entropies = [Entropies(problem, prepared, g) for g in problem.graphs] if ranked else None
    if problem.precision.entropy_terms > 1:  # the operands are copies: make room
        prepared = stages.with_probs(prepared, None, None)
    selection = None if entropies is None else select(problem, prepared, entropies)
    return losses_and_gradients(problem, prepared, selection, entropies, need_grad)


def product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """``x [.., m, k]`` by ``y [.., n, k]`` transposed, accumulated in the dtype of ``out [.., m, n]``."""
    multiply = torch.bmm if x.dim() == 3 else torch.mm
    if x.dtype == out.dtype:
        multiply(x, y.mT, out=out)
    elif x.device.type == "cpu":  # a product of two short numbers is exact in float32
        multiply(x.to(out.dtype), y.to(out.dtype).mT, out=out)
    else:
        multiply(x, y.mT, out_dtype=out.dtype, out=out)


# ---- entropies ------------------------------------------------------------------------------------------------------


class Entropies:
    """The joint entropies of a graph, all of them if they fit, else block by block, again the same bits each time."""

    def __init__(self, problem: Problem, prepared: Prepared, graph: Graph) -> None:
        self.graph, self.blocks = graph, plan.blocks(graph.m, graph.n, problem.precision)
        assert prepared.probs is not None and prepared.surprisals is not None
        self.probs = _operand(problem, prepared.probs, graph, graph.m, 0)
        self.surprisals = _operand(problem, prepared.surprisals, graph, graph.n, 1)
        rows = graph.m if self.blocks.whole_entropy else self.blocks.edges
        self.values = problem.new(rows, self.blocks.stride)
        if self.blocks.whole_entropy:
            product(self.probs, self.surprisals, self.values[:, : graph.n])

    def rows(self, first: int, count: int) -> Tensor:
        """``[count, stride]``; overwritten by the next call."""
        if self.blocks.whole_entropy:
            return self.values[first : first + count]
        product(self.probs[first : first + count], self.surprisals, self.values[:count, : self.graph.n])
        return self.values[:count]

    def each(self) -> Iterator[Block]:
        """Of all edges: in the blocks that the edges are visited in, so that the products are the same."""
        m, n, stride = self.graph.m, self.graph.n, self.blocks.stride
        if self.blocks.whole_entropy:
            yield Block(self.values, m, n, stride)
            return
        for _, edge_blocks in self.blocks.starts(m):
            for first, count in edge_blocks:
                yield Block(self.rows(first, count), count, n, stride, first)


def _operand(problem: Problem, x: Tensor, graph: Graph, vertices: int, role: int) -> Tensor:
    """The first ``vertices`` of the stacked ``x`` as an operand ``[vertices, depth]``."""
    depth = problem.samples if graph.by_class else x.shape[1]
    terms = problem.precision.entropy_terms
    if terms == 1:
        if not graph.by_class:
            return x[:vertices]
        return x[: depth * vertices // x.shape[1]].view(-1, depth, x.shape[1]).mT.reshape(vertices, depth)
    width = plan.padded(depth, plan.WIDTH_MULTIPLE)
    out = problem.new(vertices, terms * width, dtype=problem.precision.operand)
    grid = (triton.cdiv(vertices, plan.SPLIT["ROWS"]), triton.cdiv(width, plan.SPLIT["BLOCK"]))
    split_kernel[grid](
        x, out, vertices, depth, width, problem.samples, x.shape[1],
        BY_CLASS=graph.by_class, ROLE=role, TERMS=terms, **plan.SPLIT,
    )  # fmt: skip
    return out


def select(problem: Problem, prepared: Prepared, entropies: list[Entropies]) -> Selection:
    """The thresholds of both graphs."""
    selector = Selector(problem, prepared, [problem.edge_count(g) for g in problem.graphs], prepared.histograms)
    for number in range(len(selector.digits)):
        for k, source in enumerate(entropies):
            for block in source.each():
                selector.count(number, [block], k)
    return selector.finish()


# ---- edges ----------------------------------------------------------------------------------------------------------


class Buffers(NamedTuple):
    """Of one graph; those from ``coefficients`` on of a gradient block, empty without gradients."""

    products: Tensor  # [3, edge block, stride]
    coefficients: Tensor  # [parts, 2, gradient block, stride]: gamma, beta
    literals: Tensor  # [3, gradient block, stride]
    flags: Tensor  # [tiles down, tiles across]
    row_sums: Tensor  # [2, tiles across, gradient block]
    column_sums: Tensor  # [2, tiles down, n]


def losses_and_gradients(
    problem: Problem,
    prepared: Prepared,
    selection: Selection | None,
    entropies: Sequence[Entropies] | None,
    need_grad: bool,
) -> tuple[Totals, list[Tensor] | None]:
    """One graph after the other, so that only one's operands are alive."""
    tiles = [
        triton.cdiv(g.m, plan.EPILOGUE["ROWS"]) * triton.cdiv(g.n, plan.EPILOGUE["COLUMNS"]) for g in problem.graphs
    ]
    losses = problem.new(sum(tiles))
    grads = None
    if need_grad:
        grads = [torch.zeros(x.shape, dtype=losses.dtype, device=x.device) for x in problem.sides[:2]]
    for k, part in enumerate(losses.split(tiles)):
        _graph(problem, prepared, k, selection, entropies[k] if entropies else None, part, grads)
        if isinstance(entropies, list):
            entropies[k] = None  # its memory serves the next
    return stages.total(problem, prepared, losses, tiles, selection), grads


def _graph(problem, prepared, k: int, selection, entropies, losses: Tensor, grads: list[Tensor] | None) -> None:
    graph, precision = problem.graphs[k], problem.precision
    blocks = plan.blocks(graph.m, graph.n, precision)
    (packed,), (stats,), scale = stages.pack(problem, prepared, (graph,))
    scale = scale[int(graph.by_class) :]
    buffers = _buffers(problem, graph, blocks, grads is not None)
    a = packed[0, :, : graph.m]
    b = packed[-1, :, graph.first_b : graph.first_b + graph.n]
    threshold, limits, counts = stages.selection_tensors(selection, scale, prepared.bad)
    if selection is not None:
        threshold = threshold[k:]
    delta, eps = stages.split_float(problem.delta), stages.split_float(problem.eps)
    for first, edge_blocks in blocks.starts(graph.m):
        for row, count in edge_blocks:
            product(a[:, row : row + count], b, buffers.products[:, :count, : graph.n])
            values = buffers.products if selection is None else entropies.rows(row, count)
            grid = (
                triton.cdiv(graph.n, plan.EPILOGUE["COLUMNS"]),
                triton.cdiv(count, plan.EPILOGUE["ROWS"]),
            )
            epilogue_kernel[grid](
                buffers.products, values, prepared.student, prepared.teacher, stats, scale, threshold,
                *buffers[1:], losses, row, count, row - first, blocks.edges, blocks.gradients,
                buffers.flags.shape[0], graph.m, graph.n, blocks.stride, graph.first_b, graph.vertices, graph.dims,
                problem.samples, problem.classes, *delta, *eps, BY_CLASS=graph.by_class,
                EXCLUDE_SELF=problem.exclude_self, KEEP_ALL=selection is None, NEED_GRAD=grads is not None,
                SPLIT=precision.gradient_terms == 3, **plan.EPILOGUE,
            )  # fmt: skip
        if grads is not None:
            rows = sum(count for _, count in edge_blocks)
            chosen = (threshold, limits, counts) if selection is None else (selection.threshold, limits, counts)
            _gradients(
                problem, prepared, k, blocks, buffers, packed, scale, chosen, selection is None, first, rows, grads
            )


def _buffers(problem: Problem, graph: Graph, blocks: plan.Blocks, need_grad: bool) -> Buffers:
    down = triton.cdiv(blocks.gradients, plan.EPILOGUE["ROWS"])
    across = triton.cdiv(graph.n, plan.EPILOGUE["COLUMNS"])
    parts = 2 if problem.precision.gradient_terms == 3 else 1
    rows = blocks.gradients if need_grad else 0
    return Buffers(
        problem.new(3, blocks.edges, blocks.stride),
        problem.new(parts, 2, rows, blocks.stride, dtype=problem.precision.operand),
        problem.new(3, rows, blocks.stride),
        problem.new(down, across, dtype=torch.int32),
        problem.new(2, across, rows),
        problem.new(2, down if need_grad else 0, graph.n),
    )


def _gradients(problem, prepared, k, blocks, buffers, packed, scale, chosen, keep_all, first, rows, grads) -> None:
    """What a gradient block gives to its rows' vertices, and to those of the other side."""
    graph, precision, width = problem.graphs[k], problem.precision, problem.graphs[k].width
    vectors = packed[0, ::2]  # student and residual: by gamma, and by beta
    others = slice(graph.first_b, graph.first_b + graph.n)
    coefficients = buffers.coefficients[..., :rows, : graph.n]
    tile_rows, tile_columns = plan.EPILOGUE["ROWS"], plan.EPILOGUE["COLUMNS"]
    down, across = buffers.flags.shape
    used = triton.cdiv(rows, tile_rows)
    # (own vertices, their first, other vertices, their first, coefficients, sums and how many and how far apart, tiles
    # of the others, strides of flags and of literals, tile sizes)
    sides = (
        (rows, first, graph.n, graph.first_b, coefficients, vectors[:, others], buffers.row_sums, across, across,
         across, across, 1, blocks.stride, 1, tile_rows, tile_columns),
        (graph.n, graph.first_b, rows, first, coefficients.mT, vectors[:, first : first + rows], buffers.column_sums,
         used, down, used, 1, across, 1, blocks.stride, tile_columns, tile_rows),
    )  # fmt: skip
    split = graph.vertices // 2 if problem.complete else graph.first_b
    weight = stages.split_float(problem.weights[k])
    for (
        owns, own_base, count, other_base, weights, values, sums, tiles, tiles_stride, other_tiles, flag_own,
        flag_other, own_stride, other_stride, own_tile, other_tile,
    ) in sides:  # fmt: skip
        out = problem.new(precision.gradient_terms, 2, owns, width)
        product(weights[0], values[..., :width].mT, out[0])
        if precision.gradient_terms == 3:
            product(weights[1], values[..., :width].mT, out[1])
            product(weights[0], values[..., width : 2 * width].mT, out[2])
        grid = (triton.cdiv(owns, plan.COMBINE["ROWS"]), triton.cdiv(graph.dims, plan.COMBINE["BLOCK"]))
        combine_kernel[grid](
            out, sums, packed, prepared.student, prepared.teacher, scale, buffers.literals, buffers.flags, *chosen,
            prepared.bad, *grads, owns, count, own_base, other_base, split, tiles, sums.shape[2], tiles_stride,
            other_tiles, flag_own, flag_other, own_stride, other_stride, buffers.literals.stride(0), graph.vertices,
            graph.dims, width, packed.shape[3], problem.samples, problem.classes,
            *stages.split_float(problem.delta), *weight, problem.edge_count(graph), k, len(problem.graphs),
            OWN_TILE=own_tile, OTHER_TILE=other_tile, BY_CLASS=graph.by_class, KEEP_ALL=keep_all,
            TERMS=precision.gradient_terms, PACKED_TERMS=precision.terms, **plan.COMBINE,
        )  # fmt: skip
