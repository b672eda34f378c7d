"""Large graphs: what surrounds the vendor's matrix products. One graph a launch, a block of its rows at a time.

Pairwise buffers have rows of ``stride`` elements, of which the first ``n`` are edges.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vrm_kernels.backends.triton.arrays import SIZES
from vrm_kernels.backends.triton.edge import COUNT_EPS, certified_tile, number, wide
from vrm_kernels.backends.triton.literal import literal_gradient, literal_tile
from vrm_kernels.backends.triton.operands import store_coefficient, vertex_offset
from vrm_kernels.backends.triton.select import kept_edges


class Sums(NamedTuple):
    """Of gamma and beta, over the tiles of a gradient block."""

    rows: Tensor  # [2, tiles across, gradient block]
    columns: Tensor  # [2, tiles down, n]


@triton.jit(do_not_specialize=SIZES)
def epilogue_kernel(
    products,  # [3, block, stride]: of student, teacher, residual
    entropies,  # [block, stride]
    logits, stats, scale, threshold,
    found,  # out, of the gradient block: coefficients [parts, 2, .., stride] (gamma, beta), literals [3, .., stride]
    sums,  # out, see above
    losses,  # out [tiles of the graph]
    first_row, rows, first_block_row,  # of products in the graph, how many, and in the gradient block
    block_rows, gradient_rows, tiles_down,  # capacities of the buffers
    m, n, stride, first_b, vertices, dims, samples, classes, delta, eps,
    BY_CLASS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr, NEED_GRAD: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All that follows from the three products of a tile of edges; literals only of tiles that have literal edges."""
    T: tl.constexpr = logits.student.dtype.element_ty
    delta, eps = number(delta, T), number(eps, T)
    across = tl.num_programs(0)
    tile_i, tile_j = tl.program_id(1), tl.program_id(0)
    local = tile_i * ROWS + tl.arange(0, ROWS)
    i, j = first_row + local, tile_j * COLUMNS + tl.arange(0, COLUMNS)
    inside = (local < rows)[:, None] & (j < n)[None]
    at = wide(local)[:, None] * stride + j[None]
    plane = wide(block_rows) * stride
    dot_s, dot_t = tl.load(products + at, inside, 0.0), tl.load(products + plane + at, inside, 0.0)
    dot_w = tl.load(products + 2 * plane + at, inside, 0.0)
    ranked = inside
    if EXCLUDE_SELF:
        ranked = ranked & (i[:, None] != j[None])
    if KEEP_ALL:
        entropy, limit = dot_s, delta
    else:
        entropy, limit = tl.load(entropies + at, inside, 0.0), tl.load(threshold)
    loss, beta, gamma, literal = certified_tile(
        dot_s, dot_t, dot_w, i, j, ranked, stats, vertices, first_b, entropy, limit, delta,
        tl.load(scale) * eps, eps, KEEP_ALL,
    )  # fmt: skip
    total = tl.sum(loss, 1)
    any_literal = tl.max(tl.max(literal.to(tl.int32), 1), 0)
    block_tile = first_block_row // ROWS + tile_i
    plane = wide(gradient_rows) * stride
    if NEED_GRAD:
        out = found.coefficients + wide(first_block_row) * stride + at
        gamma = store_coefficient(out, gamma, 2 * plane, inside, SPLIT)
        beta = store_coefficient(out + plane, beta, 2 * plane, inside, SPLIT)
        row = sums.rows + wide(tile_j) * gradient_rows + first_block_row + local
        tl.store(row, tl.sum(gamma, 1), local < rows)
        tl.store(row + wide(across) * gradient_rows, tl.sum(beta, 1), local < rows)
        column = sums.columns + wide(block_tile) * n + j
        tl.store(column, tl.sum(gamma, 0), j < n)
        tl.store(column + wide(tiles_down) * n, tl.sum(beta, 0), j < n)
        tl.store(found.flags + block_tile * across + tile_j, any_literal)
    if any_literal > 0:
        corner = wide(first_block_row + tile_i * ROWS) * stride + tile_j * COLUMNS
        total += literal_tile(
            logits, samples, classes, dims, first_b, i, j, literal, inside, delta, eps,
            found.literals + corner, plane, stride, NEED_GRAD, BY_CLASS, ROWS, COLUMNS, DEPTH, T,
        )  # fmt: skip
    tl.store(losses + (first_row // ROWS + tile_i) * across + tile_j, tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    products,  # [terms, 2, owns, width]: gamma by the other side's vectors, beta by their residuals
    sums,  # [2, tiles, sums_stride]: of the own vertices' gamma and beta, over the other side
    packed,  # [roles, 3, vertices, packed_width]
    logits, scale, literals, flags, selection, bad,
    grads,  # in/out [rows_a, C], [rows_b, C]
    owns, others, own_base, other_base,  # own vertices, other vertices, and the first of each
    split,  # own vertices from here on are rows or columns of grads_b
    tiles, sums_stride, tiles_stride, others_tiles, flag_own, flag_other, own_stride, other_stride, literal_plane,
    vertices, dims, width, packed_width, samples, classes, delta, weight, all_edges, graph, graphs,
    OWN_TILE: tl.constexpr, OTHER_TILE: tl.constexpr, BY_CLASS: tl.constexpr, KEEP_ALL: tl.constexpr,
    TERMS: tl.constexpr, PACKED_TERMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of the own vertices what their edges of a gradient block give them."""
    T: tl.constexpr = logits.student.dtype.element_ty
    delta = number(delta, T)
    first = tl.program_id(0) * ROWS
    own, d = first + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = own < owns
    mask = inside[:, None] & (d < dims)[None]
    total = tl.zeros([ROWS, BLOCK], T)
    at = wide(own)[:, None] * width + d[None]
    plane = wide(owns) * width
    for term in tl.static_range(TERMS):
        total += tl.load(products + 2 * term * plane + at, mask, 0.0)
        total -= tl.load(products + (2 * term + 1) * plane + at, mask, 0.0)
    gamma_sum, beta_sum = tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    for tile in range(tiles):
        gamma_sum += tl.load(sums + wide(tile) * sums_stride + own, inside, 0.0)
        beta_sum += tl.load(sums + wide(tiles_stride + tile) * sums_stride + own, inside, 0.0)
    vectors = packed + wide(own_base + own)[:, None] * packed_width + d[None]
    residuals = vectors + 2 * wide(vertices) * packed_width
    a, w = tl.load(vectors, mask, 0.0).to(T), tl.load(residuals, mask, 0.0).to(T)
    if PACKED_TERMS > 1 and TERMS > 1:  # as much of them as the products saw
        a += tl.load(vectors + width, mask, 0.0).to(T)
        w += tl.load(residuals + width, mask, 0.0).to(T)
    total = (total + beta_sum[:, None] * w - gamma_sum[:, None] * a) * tl.load(scale)

    stride = wide(classes) if BY_CLASS else 1
    raw = vertex_offset(own_base + own, samples, classes, BY_CLASS)[:, None] + d[None] * stride
    own_s, own_t = tl.load(logits.student + raw, mask, 0.0), tl.load(logits.teacher + raw, mask, 0.0)
    for tile in range(others_tiles):
        flagged = tl.load(flags + (own // OWN_TILE) * flag_own + tile * flag_other, inside, 0) > 0
        if tl.max(flagged.to(tl.int32), 0) > 0:
            start = tile * OTHER_TILE
            total += literal_gradient(
                logits, samples, classes, own_s, own_t, flagged, start, others, other_base + start, stride, d, dims,
                delta, literals + wide(first) * own_stride + wide(start) * other_stride, literal_plane,
                own_stride, other_stride, BY_CLASS, OTHER_TILE, T,
            )  # fmt: skip
    if KEEP_ALL:
        kept = all_edges
    else:
        kept = kept_edges(selection, graph, graphs)
    total *= number(weight, T) / (wide(kept).to(T) + COUNT_EPS)
    total = tl.where(tl.load(bad) > 0, float("nan"), total)

    place = wide(own_out_of(own, own_base, split))[:, None]
    out = place + wide(d)[None] * classes if BY_CLASS else place * classes + d[None]
    in_a = mask & ((own_base + own) < split)[:, None]
    in_b = mask & ((own_base + own) >= split)[:, None]
    tl.store(grads[0] + out, tl.load(grads[0] + out, in_a, 0.0) + total, in_a)
    tl.store(grads[1] + out, tl.load(grads[1] + out, in_b, 0.0) + total, in_b)


@triton.jit
def own_out_of(own, own_base, split):
    """The row or column of vertices in the gradient of their view."""
    vertex = own_base + own
    return tl.where(vertex < split, vertex, vertex - split)
