"""The large regime, host side: the vendor's products over blocks of rows, and one epilogue kernel for each block."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vrm_kernels.backends.triton import plan, stages
from vrm_kernels.backends.triton.arrays import Found, Selection, Totals
from vrm_kernels.backends.triton.blocks import Sums, combine_kernel, epilogue_kernel
from vrm_kernels.backends.triton.operands import coefficient_products, parts, product, split_kernel
from vrm_kernels.backends.triton.stages import Block, Graph, Prepared, Problem, Selector


def run(problem: Problem, need_grad: bool, ranked: bool, prepared: Prepared) -> tuple[Totals, list[Tensor] | None]:
    """The loss and, if asked for, the gradients of both sides."""
    entropies = [Entropies(problem, prepared, g) for g in problem.graphs] if ranked else None
    if problem.precision.entropy_terms > 1:  # the operands are copies: make room
        prepared = stages.with_probs(prepared, None, None)
    selection = None if entropies is None else select(problem, prepared, entropies)
    return losses_and_gradients(problem, prepared, selection, entropies, need_grad)


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
        x=x, out=out, rows=vertices, dims=depth, width=width, samples=problem.samples, classes=x.shape[1],
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
    """Of one graph; ``found`` and ``sums`` of a gradient block, empty without gradients."""

    products: Tensor  # [3, edge block, stride]
    found: Found  # [parts, 2, gradient block, stride]: gamma, beta; [3, gradient block, stride]; [tiles down, across]
    sums: Sums


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
    chosen = stages.or_stand_ins(selection, scale, prepared.bad)
    delta, eps = parts(problem.delta), parts(problem.eps)
    for first, edge_blocks in blocks.starts(graph.m):
        for row, count in edge_blocks:
            product(a[:, row : row + count], b, buffers.products[:, :count, : graph.n])
            values = buffers.products if selection is None else entropies.rows(row, count)
            grid = (
                triton.cdiv(graph.n, plan.EPILOGUE["COLUMNS"]),
                triton.cdiv(count, plan.EPILOGUE["ROWS"]),
            )
            epilogue_kernel[grid](
                products=buffers.products, entropies=values, logits=prepared.logits, stats=stats, scale=scale,
                threshold=chosen.threshold if selection is None else chosen.threshold[k:], found=buffers.found,
                sums=buffers.sums, losses=losses, first_row=row, rows=count, first_block_row=row - first,
                block_rows=blocks.edges, gradient_rows=blocks.gradients, tiles_down=buffers.found.flags.shape[0],
                m=graph.m, n=graph.n, stride=blocks.stride, first_b=graph.first_b, vertices=graph.vertices,
                dims=graph.dims, samples=problem.samples, classes=problem.classes, delta=delta, eps=eps,
                BY_CLASS=graph.by_class, EXCLUDE_SELF=problem.exclude_self, KEEP_ALL=selection is None,
                NEED_GRAD=grads is not None, SPLIT=precision.gradient_terms == 3, **plan.EPILOGUE,
            )  # fmt: skip
        if grads is not None:
            rows = sum(count for _, count in edge_blocks)
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
        Found(
            problem.new(parts, 2, rows, blocks.stride, dtype=problem.precision.operand),
            problem.new(3, rows, blocks.stride),
            problem.new(down, across, dtype=torch.int32),
        ),
        Sums(problem.new(2, across, rows), problem.new(2, down if need_grad else 0, graph.n)),
    )


class Side(NamedTuple):
    """The vertices whose gradient a launch adds to, as the kernel names it; strides are of flags and of literals."""

    owns: int
    own_base: int
    others: int
    other_base: int
    tiles: int  # of the sums
    tiles_stride: int
    others_tiles: int
    flag_own: int
    flag_other: int
    own_stride: int
    other_stride: int
    OWN_TILE: int
    OTHER_TILE: int


def _gradients(problem, prepared, k, blocks, buffers, packed, scale, chosen, keep_all, first, rows, grads) -> None:
    """What a gradient block gives to its rows' vertices, and to those of the other side."""
    graph, precision, width = problem.graphs[k], problem.precision, problem.graphs[k].width
    vectors = packed[0, ::2]  # student and residual: by gamma, and by beta
    others = slice(graph.first_b, graph.first_b + graph.n)
    coefficients = buffers.found.coefficients[..., :rows, : graph.n]
    tile_rows, tile_columns = plan.EPILOGUE["ROWS"], plan.EPILOGUE["COLUMNS"]
    down, across = buffers.found.flags.shape
    used = triton.cdiv(rows, tile_rows)
    of_rows = Side(
        owns=rows, own_base=first, others=graph.n, other_base=graph.first_b, tiles=across, tiles_stride=across,
        others_tiles=across, flag_own=across, flag_other=1, own_stride=blocks.stride, other_stride=1,
        OWN_TILE=tile_rows, OTHER_TILE=tile_columns,
    )  # fmt: skip
    of_columns = Side(
        owns=graph.n, own_base=graph.first_b, others=rows, other_base=first, tiles=used, tiles_stride=down,
        others_tiles=used, flag_own=1, flag_other=across, own_stride=1, other_stride=blocks.stride,
        OWN_TILE=tile_columns, OTHER_TILE=tile_rows,
    )  # fmt: skip
    for side, weights, values, sums in (
        (of_rows, coefficients, vectors[:, others], buffers.sums.rows),
        (of_columns, coefficients.mT, vectors[:, first : first + rows], buffers.sums.columns),
    ):
        out = problem.new(precision.gradient_terms, 2, side.owns, width)
        coefficient_products(weights, values, out)
        grid = (triton.cdiv(side.owns, plan.COMBINE["ROWS"]), triton.cdiv(graph.dims, plan.COMBINE["BLOCK"]))
        combine_kernel[grid](
            products=out, sums=sums, packed=packed, logits=prepared.logits, scale=scale,
            literals=buffers.found.literals, flags=buffers.found.flags, selection=chosen, bad=prepared.bad,
            grads=tuple(grads), **side._asdict(), split=graph.vertices // 2 if problem.complete else graph.first_b,
            sums_stride=sums.shape[2], literal_plane=buffers.found.literals.stride(0), vertices=graph.vertices,
            dims=graph.dims, width=width, packed_width=packed.shape[3], samples=problem.samples,
            classes=problem.classes, delta=parts(problem.delta), weight=problem.weight_parts[k],
            all_edges=problem.edge_count(graph), graph=k, graphs=len(problem.graphs), BY_CLASS=graph.by_class,
            KEEP_ALL=keep_all, TERMS=precision.gradient_terms, PACKED_TERMS=precision.terms, **plan.COMBINE,
        )  # fmt: skip
