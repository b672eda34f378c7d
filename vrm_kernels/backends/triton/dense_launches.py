"""The dense form's stages from the host's side: the library's products, and the launches around them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.backends.contract import float32_products
from vrm_kernels.backends.triton import launches
from vrm_kernels.backends.triton.dense import dense_kernel, gradients_kernel, moments_kernel, pack_kernel
from vrm_kernels.backends.triton.entropy import missed_kernel, sample_kernel
from vrm_kernels.backends.triton.launches import Call, blocks, padded, wider
from vrm_kernels.backends.triton.operands import (
    AVERAGING_COMPONENTS,
    FUSED_MULTIPLY_ADD,
    coefficient_products,
    parts,
    product,
    split_kernel,
)
from vrm_kernels.backends.triton.prepare import Targets
from vrm_kernels.graph import forms, pruning, selection

MOMENTS = {"BLOCK": 1024, "num_warps": 4}
PACK = {"ROWS": 8, "BLOCK": 64, "num_warps": 8}
SPLIT = {"ROWS": 32, "BLOCK": 64, "num_warps": 4}
GRADIENTS = {"ROWS": 32, "BLOCK": 64, "num_warps": 8}
SAMPLE = {"BLOCK": 8, "DEPTH": 128, "num_warps": 4}
MISSED, MISSED_PROGRAMS = {"BLOCK": 16, "DEPTH": 16, "num_warps": 4}, 2048
WIDTH_MULTIPLE = 64  # of the operands' components
# Of the products of some rows of edges, which the epilogue reads back from the second-level cache; but no fewer rows
# than a product needs to be efficient.
PRODUCT_BYTES, PRODUCT_ROWS = 24 * 2**20, 256


class Precision(NamedTuple):
    """Products' operands are numbers of dtype ``operand``: 1 term, or 3 terms for a sum of two (see operands.py)."""

    operand: torch.dtype
    terms: int  # of the edges' products
    entropy_terms: int  # they rank
    gradient_terms: int


def precision_of(logits: tuple[Tensor, ...], compute: torch.dtype) -> Precision:
    """float32 follows torch's own switch; half logits take the matrix units."""
    if compute == torch.float64:
        return Precision(compute, 1, 1, 1)
    kinds = {x.dtype for x in logits}
    if torch.float32 in kinds:
        return {
            "highest": Precision(compute, 1, 1, 1),
            "high": Precision(torch.bfloat16, 3, 3, 3),
            "medium": Precision(torch.bfloat16, 1, 3, 1),
        }[float32_products()]
    if torch.float16 in kinds:  # three more digits than bfloat16, and too short a range for the coefficients
        return Precision(torch.bfloat16, 3, 3, 3)
    return Precision(torch.bfloat16, 1 if logits[0].numel() >= AVERAGING_COMPONENTS else 3, 3, 1)


class Blocks:
    """The entropies of a graph in blocks of rows: all at once if they are stored, else computed again when asked for,
    by the same products, which give the same bits."""

    def __init__(self, call: Call, graph: int, precision: Precision, given: Tensor | None) -> None:
        self.call, self.graph, self.given = call, graph, given
        self.m, self.n, _ = call.problem.sizes[graph]
        self.rows, self.filled, self.selected = call.layout.block_rows[graph], False, False
        begin = call.layout.entropies[graph]
        self.room = call.arrays.entropies[begin : begin + self.rows * self.n].view(self.rows, self.n)
        self.operands: tuple[Tensor, Tensor] | None = None
        if call.problem.percentile >= 100 or given is not None:
            return
        arrays, depth = call.arrays, call.layout.depths[graph]
        p, q = (
            _of_graph(x, call.problem.sizes, call.layout.depths, graph, side).view(-1, depth)
            for side, x in enumerate((arrays.probs, arrays.surprisals))
        )
        if precision.entropy_terms > 1:
            p, q = _split(p, 0, precision), _split(q, 1, precision)
        elif self.rows < self.m:  # the gradient takes the place of the others before these are read again
            p, q = p.clone(), q.clone()
        self.operands = p, q

    @property
    def stored(self) -> bool:
        return self.rows == self.m

    def again(self) -> tuple[Tensor, Tensor]:
        """What entropies that are not stored are products of."""
        assert self.operands is not None
        return self.operands

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """``(first row, entropies)``."""
        for first in range(0, self.m, self.rows):
            values = self.room[: self.m - first]
            if not self.filled:
                self._fill(first, values)
            self.filled = self.stored
            yield first, values

    def _fill(self, first: int, values: Tensor) -> None:
        if self.given is not None:
            values.copy_(self.given[first : first + len(values)])
        elif self.operands is not None:
            product(self.operands[0][first : first + len(values)], self.operands[1], values)
            if self.call.problem.exclude_self:  # beyond every other number in order
                values.diagonal(first).fill_(torch.nan)
            if self.stored:
                self.operands = None
            elif self.selected:
                self._once_more(first, values)

    def _once_more(self, first: int, values: Tensor, *digits) -> None:
        """Where the bracket missed the rank all entropies are those of ``missed_kernel``; else this does nothing."""
        left, right = self.again()
        left = left[first : first + len(values)]
        arrays = self.call.arrays._replace(entropies=values)
        prefixes, histograms, leading, shift, bits = digits or (None, None, False, 0, 0)
        tiles = blocks(len(left), MISSED["BLOCK"]) * blocks(self.n, MISSED["BLOCK"])
        missed_kernel[(min(tiles, MISSED_PROGRAMS),)](
            arrays=arrays, left=left, right=right, prefixes=prefixes, histograms=histograms, m=len(left), n=self.n,
            depth=left.shape[1], first_row=first, GRAPH=self.graph, EXCLUDE_SELF=self.call.problem.exclude_self,
            LEADING=leading, SHIFT=shift, BITS=bits, **MISSED, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip

    def select_once_more(self) -> None:
        """Where the bracket missed the rank, the threshold and the kept count from all entropies' digits."""
        call, self.selected = self.call, True
        edges = call.layout.edges[self.graph]
        rank, weight = pruning.rank(call.problem.percentile / 100, edges, call.dtype)

        def count(prefixes: Tensor, shift: int, bits: int) -> Tensor:
            leading = shift + bits == 8 * call.dtype.itemsize
            counts = prefixes.new_zeros(1 if leading else 2, 2**bits)
            for first in range(0, self.m, self.rows):  # the same tiles as later, and so the same bits
                self._once_more(first, self.room[: self.m - first], prefixes, counts, leading, shift, bits)
            return counts.expand(1, 2, -1)

        ranks = torch.arange(rank, rank + 2, device=call.arrays.kept.device)[None].clamp_(max=edges - 1)
        values, at_most = selection.order_statistics(count, ranks, call.dtype)
        (low, high), (below, through) = values[0], at_most[0]
        threshold = low.lerp(high, weight) if weight > 0 else low
        kept = torch.where(threshold >= high, through, below)
        own = slice(self.graph, self.graph + 1)
        for out, found in ((call.arrays.thresholds, threshold), (call.arrays.kept, kept)):
            out[own] = torch.where(call.arrays.missed[own] > 0, found, out[own])


def _of_graph(x: Tensor, sizes, depths, graph: int, side: int) -> Tensor:
    lengths = [size[side] * depth for size, depth in zip(sizes, depths, strict=True)]
    return x[: sum(lengths)].split(lengths)[graph]


def entropies(call: Call, precision: Precision, given: Tensor | None) -> list[Blocks]:
    return [Blocks(call, graph, precision, given) for graph in range(len(call.problem.sizes))]


def select(call: Call, graphs: list[Blocks]) -> None:
    """The thresholds. What is not stored is sampled, counted as it is computed, and where that missed counted again."""
    begin = 0
    for blocks_of in graphs:
        size = forms.sample(blocks_of.m * blocks_of.n)
        if blocks_of.stored:
            next(iter(blocks_of))
        else:
            left, right = blocks_of.again()
            sample_kernel[(blocks(size, SAMPLE["BLOCK"]),)](
                out=call.arrays.samples[begin:], left=left, right=right, sample=size, n=blocks_of.n,
                edges=blocks_of.m * blocks_of.n, depth=left.shape[1], EXCLUDE_SELF=call.problem.exclude_self,
                **SAMPLE, **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
        begin += size
    launches.select(call, lambda: ((x.graph, values.numel()) for x in graphs for _, values in x))
    for blocks_of in graphs:
        if not blocks_of.stored:
            blocks_of.select_once_more()


def _split(x: Tensor, role: int, precision: Precision) -> Tensor:
    rows, depth = x.shape
    width = -(-depth // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    out = x.new_empty(rows, 3 * width, dtype=precision.operand)
    split_kernel[(blocks(rows, SPLIT["ROWS"]), blocks(width, SPLIT["BLOCK"]))](
        x=x, out=out, rows=rows, dims=depth, width=width, ROLE=role, **SPLIT, **FUSED_MULTIPLY_ADD
    )
    return out


def edges(call: Call, precision: Precision, targets: Targets, graphs: list[Blocks]) -> None:
    """Loss and gradients of all edges, the certified ones from products; one graph after the other."""
    total = sum(call.layout.vertices_of)
    if len(graphs) == 2:
        moments = call.arrays.losses.new_empty(4, total)
        moments_kernel[(total,)](moments=moments, **call.common, **MOMENTS)
    else:
        moments = _moments_of_columns(call)
    for blocks_of in graphs:
        _graph(call, precision, targets, blocks_of, moments)


def _moments_of_columns(call: Call) -> Tensor:
    """What moments_kernel leaves of components that are no vertices, those of a graph of its own; by torch."""
    classes, rows = call.common["classes"], call.layout.vertices_of[0]
    moments = call.arrays.losses.new_empty(4, rows + 2 * classes)
    for k, x in enumerate(call.logits):
        role, view = divmod(k, 2)
        squares, mean = torch.var_mean(x.to(moments.dtype), 0, correction=0)
        columns = slice(rows + view * classes, rows + (view + 1) * classes)
        moments[2 * role, columns], moments[2 * role + 1, columns] = mean, squares * len(x)
    return moments


def _graph(call: Call, precision: Precision, targets: Targets, blocks_of: Blocks, moments: Tensor) -> None:
    problem, new, graph = call.problem, moments.new_empty, blocks_of.graph
    (m, n, dims), vertices = problem.sizes[graph], call.layout.vertices_of[graph]
    first_b = 0 if problem.complete else m
    width, stride = -(-dims // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, padded(n)
    packed = new(1 if precision.terms == 1 else 2, 3, vertices, precision.terms * width, dtype=precision.operand)
    stats, scale = new(5, vertices), new(1)
    pack_kernel[(blocks(vertices, PACK["ROWS"]),)](
        moments=moments, packed=packed, stats=stats, scale=scale, packed_width=width, GRAPH=graph,
        TERMS=precision.terms, **call.common, **wider(PACK, stats.dtype),
    )  # fmt: skip

    rows_at_once = max(PRODUCT_ROWS, PRODUCT_BYTES // (3 * stride * stats.element_size()))
    rows_at_once = min(blocks_of.rows, blocks(rows_at_once, launches.DENSE["ROWS"]) * launches.DENSE["ROWS"])
    across, down = blocks(n, launches.DENSE["COLUMNS"]), blocks(blocks_of.rows, launches.DENSE["ROWS"])
    split, grads = precision.gradient_terms == 3, problem.need_grad
    products = new(3, rows_at_once, stride)
    terms = 2 if split else 1
    coefficients = new(terms * 2 * blocks_of.rows * stride * grads, dtype=precision.operand)
    sums = new(padded(2 * across * blocks_of.rows) + 2 * down * n if grads else 0)
    keep_all = problem.percentile >= 100
    a, b = packed[0, :, :m], packed[-1, :, first_b : first_b + n]
    vectors = packed[0, ::2]  # student and residual: by gamma, and by beta
    for first, values in blocks_of:
        # Of the last block, which may have fewer rows, these are smaller.
        rows, down = len(values), blocks(len(values), launches.DENSE["ROWS"])
        common = call.common | {"arrays": call.arrays._replace(entropies=values)}
        block = {"first_row": first, "block_rows": rows}
        weights = coefficients[: terms * 2 * rows * stride].view(terms, 2, rows * grads, stride)
        row_sums = sums[: 2 * across * rows].view(2, across, rows * grads)
        column_sums = sums[padded(2 * across * rows) :][: 2 * down * n].view(2, down, n * grads)
        for row in range(0, rows, rows_at_once):
            count = min(rows_at_once, rows - row)
            product(a[:, first + row : first + row + count], b, products[:, :count, :n])
            dense_kernel[(across, blocks(count, launches.DENSE["ROWS"]))](
                products=products, stats=stats, scale=scale, coefficients=weights, row_sums=row_sums,
                column_sums=column_sums, row=row, room=rows_at_once, delta=parts(problem.delta),
                eps=parts(problem.eps), GRAPH=graph, EXCLUDE_SELF=problem.exclude_self, KEEP_ALL=keep_all,
                NEED_GRAD=grads, SPLIT=split, **common, **block, **wider(launches.DENSE, stats.dtype),
            )  # fmt: skip
        if grads:
            weights = weights[..., :n]
            # Side b first, whose vertices have edges in every block; those of a complete graph are also of side a.
            for own_base, owns, coefficient, other, own_sums, tiles, add in (
                (first_b, n, weights.mT, vectors[:, first : first + rows], column_sums, down, first > 0),
                (first, rows, weights, vectors[:, first_b : first_b + n], row_sums, across, problem.complete),
            ):
                out = new(precision.gradient_terms, 2, owns, width)
                coefficient_products(coefficient, other, out)
                gradients_kernel[(blocks(owns, GRADIENTS["ROWS"]), blocks(width, GRADIENTS["BLOCK"]))](
                    products=out, sums=own_sums, packed=packed, scale=scale, packed_width=width, own_base=own_base,
                    owns=owns, other_tiles=tiles, edges=problem.whole_edges or call.layout.edges[graph],
                    weight=call.weights[graph], GRAPH=graph, KEEP_ALL=keep_all, ADD=add,
                    TERMS=precision.gradient_terms, PACKED_TERMS=precision.terms, **common, **GRADIENTS,
                )  # fmt: skip
        # A vertex of the block's rows or of side b; all of a complete graph are of side b.
        job, jobs = 1 + sum(call.layout.vertices_of[:graph]), n if problem.complete else rows + n
        if graph == 0 and first == 0:  # the first launch of all sums up as well
            job, jobs = 0, jobs + 1
        launches.literal(call, targets, graph, job, jobs, arrays=common["arrays"], **block)
    blocks_of.operands = None  # large, where they were kept for the edges
