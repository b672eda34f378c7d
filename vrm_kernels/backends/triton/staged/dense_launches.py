"""The dense form's stages from the host's side: the library's products, and the launches around them."""

from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.backends.contract import float32_products
from vrm_kernels.backends.triton.operands import (
    AVERAGING_COMPONENTS,
    FUSED_MULTIPLY_ADD,
    coefficient_products,
    parts,
    product,
    split_kernel,
)
from vrm_kernels.backends.triton.staged import launches
from vrm_kernels.backends.triton.staged.dense import dense_kernel, gradients_kernel, moments_kernel, pack_kernel
from vrm_kernels.backends.triton.staged.launches import Call, blocks, padded, wider

MOMENTS = {"BLOCK": 1024, "num_warps": 4}
PACK = {"ROWS": 8, "BLOCK": 64, "num_warps": 8}
SPLIT = {"ROWS": 32, "BLOCK": 64, "num_warps": 4}
GRADIENTS = {"ROWS": 32, "BLOCK": 64, "num_warps": 8}
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
            "medium": Precision(torch.bfloat16, 1, 1, 1),
        }[float32_products()]
    if torch.float16 in kinds:  # three more digits than bfloat16, and too short a range for the coefficients
        return Precision(torch.bfloat16, 3, 3, 3)
    return Precision(torch.bfloat16, 1 if logits[0].numel() >= AVERAGING_COMPONENTS else 3, 3, 1)


def entropy(call: Call, precision: Precision) -> None:
    """Of all edges, by the library; the operands are copies where they are sums."""
    first = 0
    for k, (values, (m, n)) in enumerate(zip(_entropies(call), _shapes(call), strict=True)):
        depth, first_b = call.layout.depths[k], 0 if call.problem.complete else m
        rows = call.layout.vertices_of[k]
        p, q = (x[first : first + rows * depth].view(rows, depth) for x in (call.arrays.probs, call.arrays.surprisals))
        first += rows * depth
        operands = [p[:m], q[first_b : first_b + n]]
        if precision.entropy_terms > 1:
            operands = [_split(x, role, precision) for role, x in enumerate(operands)]
        product(operands[0], operands[1], values)
        if call.problem.exclude_self:  # beyond every other number in order
            values.fill_diagonal_(torch.nan)


def _split(x: Tensor, role: int, precision: Precision) -> Tensor:
    (rows, depth), terms = x.shape, precision.entropy_terms
    width = -(-depth // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    out = x.new_empty(rows, terms * width, dtype=precision.operand)
    split_kernel[(blocks(rows, SPLIT["ROWS"]), blocks(width, SPLIT["BLOCK"]))](
        x=x, out=out, rows=rows, dims=depth, width=width, samples=rows, classes=depth,
        BY_CLASS=False, ROLE=role, TERMS=terms, **SPLIT, **FUSED_MULTIPLY_ADD,
    )  # fmt: skip
    return out


def edges(call: Call, precision: Precision) -> None:
    """Loss and gradients of the certified edges, and flags where there are others; one graph after the other."""
    total = sum(call.layout.vertices_of)
    graphs = len(call.layout.tiles)
    if graphs == 2:
        moments = call.arrays.losses.new_empty(4, total)
        moments_kernel[(total,)](moments=moments, **call.common, **MOMENTS)
    else:
        moments = _moments_of_columns(call)
    flags, losses = (
        x[: sum(call.layout.tiles)].split(call.layout.tiles) for x in (call.arrays.flags, call.arrays.tile_losses)
    )
    for graph in range(graphs):
        _graph(call, precision, graph, moments, flags[graph], losses[graph])


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


def _graph(call: Call, precision: Precision, graph: int, moments: Tensor, flags: Tensor, losses: Tensor) -> None:
    problem, new = call.problem, moments.new_empty
    (m, n, dims), vertices = problem.sizes[graph], call.layout.vertices_of[graph]
    first_b = 0 if problem.complete else m
    width, stride = -(-dims // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, padded(n)
    packed = new(1 if precision.terms == 1 else 2, 3, vertices, precision.terms * width, dtype=precision.operand)
    stats, scale = new(5, vertices), new(1)
    pack_kernel[(blocks(vertices, PACK["ROWS"]),)](
        moments=moments, packed=packed, stats=stats, scale=scale, packed_width=width, GRAPH=graph,
        TERMS=precision.terms, **call.common, **wider(PACK, stats.dtype),
    )  # fmt: skip

    down, across = blocks(m, launches.DENSE["ROWS"]), blocks(n, launches.DENSE["COLUMNS"])
    rows = max(PRODUCT_ROWS, PRODUCT_BYTES // (3 * stride * stats.element_size()))
    rows = min(m, blocks(rows, launches.DENSE["ROWS"]) * launches.DENSE["ROWS"])
    split, grads = precision.gradient_terms == 3, problem.need_grad
    products = new(3, rows, stride)
    coefficients = new((2 if split else 1, 2, m, stride) if grads else 0, dtype=precision.operand)
    row_sums, column_sums = new((2, across, m) if grads else 0), new((2, down, n) if grads else 0)
    keep_all = problem.percentile >= 100
    a, b = packed[0, :, :m], packed[-1, :, first_b : first_b + n]
    for first in range(0, m, rows):
        count = min(rows, m - first)
        product(a[:, first : first + count], b, products[:, :count, :n])
        dense_kernel[(across, blocks(count, launches.DENSE["ROWS"]))](
            products=products, stats=stats, scale=scale, coefficients=coefficients, row_sums=row_sums,
            column_sums=column_sums, first_row=first, block_rows=rows, flags=flags, losses=losses,
            delta=parts(problem.delta), eps=parts(problem.eps), GRAPH=graph, EXCLUDE_SELF=problem.exclude_self,
            KEEP_ALL=keep_all, NEED_GRAD=grads, SPLIT=split, **call.common, **wider(launches.DENSE, stats.dtype),
        )  # fmt: skip
    if not grads:
        return
    vectors = packed[0, ::2]  # student and residual: by gamma, and by beta
    weights = coefficients[..., :n]
    sides = (
        (0, m, weights, vectors[:, first_b : first_b + n], row_sums, across),
        (first_b, n, weights.mT, vectors[:, :m], column_sums, down),
    )
    for number, (own_base, owns, coefficient, other, sums, tiles) in enumerate(sides):
        out = new(precision.gradient_terms, 2, owns, width)
        coefficient_products(coefficient, other, out)
        gradients_kernel[(blocks(owns, GRADIENTS["ROWS"]), blocks(width, GRADIENTS["BLOCK"]))](
            products=out, sums=sums, packed=packed, scale=scale, packed_width=width, own_base=own_base, owns=owns,
            other_tiles=tiles, edges=problem.whole_edges or call.layout.edges[graph], weight=call.weights[graph],
            GRAPH=graph, KEEP_ALL=keep_all, ADD=number == 1 and problem.complete, TERMS=precision.gradient_terms,
            PACKED_TERMS=precision.terms, **call.common, **GRADIENTS,
        )  # fmt: skip


def _shapes(call: Call) -> list[tuple[int, int]]:
    return [(m, n) for m, n, _ in call.problem.sizes]


def _entropies(call: Call) -> list[Tensor]:
    shapes = _shapes(call)
    sizes = [m * n for m, n in shapes]
    parts_of = call.arrays.entropies[: sum(sizes)].split(sizes)
    return [x.view(shape) for x, shape in zip(parts_of, shapes, strict=True)]
