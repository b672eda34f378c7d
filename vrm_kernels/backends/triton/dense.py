"""The dense form's own stages: centred operands, what follows from three products a tile, gradients. See docs/gpu.md.

One graph a launch. Its operands are ``packed [roles, 3, V, TERMS * width]``: student, teacher, residual, centred, the
student scaled; a number is a sum of one or two short ones: :func:`vrm_kernels.backends.triton.operands.store_operand`.
"""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.arrays import SIZES, matrix_size, padded, sizes_of
from vrm_kernels.backends.triton.edge import COUNT_EPS, certified_tile, is_finite, number, wide
from vrm_kernels.backends.triton.operands import store_coefficient, store_operand

DENSE_SIZES = ("packed_width", "first_row", "block_rows", "row", "room", "edges", "own_base", "owns", "other_tiles")


@triton.jit(do_not_specialize=[*SIZES])
def moments_kernel(
    arrays,
    moments,  # out [4, V of both graphs]: mean and squared deviations of student, of teacher
    rows_a, rows_b, classes, COMPLETE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a vertex, and its components; those of one graph are the vertices of the other."""
    T: tl.constexpr = moments.dtype.element_ty
    job = tl.program_id(0)
    _, _, _, vertices_0, _ = sizes_of(0, rows_a, rows_b, classes, COMPLETE)
    graph = (job >= vertices_0).to(tl.int32)
    _, _, _, vertices, width = sizes_of(graph, rows_a, rows_b, classes, COMPLETE)
    dims = tl.where(graph == 0, classes, rows_a)
    x = arrays.vertices + graph * 2 * matrix_size(rows_a, rows_b, classes) + wide(job - graph * vertices_0) * width
    for role in tl.static_range(2):
        total = tl.zeros([BLOCK], T)
        for start in range(0, dims, BLOCK):
            d = start + tl.arange(0, BLOCK)
            total += tl.load(x + d, d < dims, 0.0).to(T)
        mean = tl.sum(total, 0) / dims
        squares = tl.zeros([BLOCK], T)
        for start in range(0, dims, BLOCK):
            d = start + tl.arange(0, BLOCK)
            apart = tl.load(x + d, d < dims, 0.0).to(T) - mean
            squares += tl.where(d < dims, apart * apart, 0.0)
        out = moments + 2 * role * tl.num_programs(0) + job
        tl.store(out, mean)
        tl.store(out + tl.num_programs(0), tl.sum(squares, 0))
        x += wide(vertices) * width


@triton.jit
def _mean(moments, d, dims):
    """Of component ``d`` over the vertices of both views; zero where it overflows."""
    mean = 0.5 * (tl.load(moments + d, d < dims, 0.0) + tl.load(moments + dims + d, d < dims, 0.0))
    return tl.where(is_finite(mean), mean, 0.0)


@triton.jit
def _energy(moments, plane, d, dims, count):
    """The squared deviations of component ``d``: within the views of ``count`` vertices, and between them."""
    first, second = tl.load(moments + d, d < dims, 0.0), tl.load(moments + dims + d, d < dims, 0.0)
    within = tl.load(moments + plane + d, d < dims, 0.0) + tl.load(moments + plane + dims + d, d < dims, 0.0)
    return within + 0.5 * count * (first - second) * (first - second)


@triton.jit
def _student_scale(moments, plane, dims, count, BLOCK: tl.constexpr, T: tl.constexpr):
    """What brings the student's centred vectors to the teacher's size: a power of two, which rounds nothing.

    Without it a student that is its teacher but for a factor would have a residual, though it has no loss.
    """
    energy_s, energy_t = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    for start in range(0, dims, BLOCK):
        d = start + tl.arange(0, BLOCK)
        energy_s += _energy(moments, plane, d, dims, count)
        energy_t += _energy(moments + 2 * plane, plane, d, dims, count)
    exponent = (0.5 * (tl.log2(tl.sum(energy_t, 0)) - tl.log2(tl.sum(energy_s, 0)))).to(tl.float32)
    exponent = tl.where(exponent == exponent, exponent, 0.0)  # either may be as good as a single point
    exponent = tl.minimum(tl.maximum(exponent, -26.0), 26.0)
    bits = (tl.floor(exponent + 0.5).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True).to(T)


@triton.jit(do_not_specialize=[*SIZES, *DENSE_SIZES])
def pack_kernel(
    arrays, moments,
    packed,  # out
    stats,  # out [5, V]: squared norms of student, teacher, residual; largest magnitudes of student, teacher
    scale,  # out [1]
    rows_a, rows_b, classes, packed_width,
    GRAPH: tl.constexpr, COMPLETE: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program ROWS vertices."""
    T: tl.constexpr = stats.dtype.element_ty
    _, _, _, vertices_0, _ = sizes_of(0, rows_a, rows_b, classes, COMPLETE)
    _, _, _, vertices_1, _ = sizes_of(1, rows_a, rows_b, classes, COMPLETE)
    _, _, _, vertices, width = sizes_of(GRAPH, rows_a, rows_b, classes, COMPLETE)
    dims = classes if GRAPH == 0 else rows_a
    plane = vertices_0 + vertices_1
    if GRAPH == 0:
        moments += vertices_0
    students = arrays.vertices + GRAPH * 2 * matrix_size(rows_a, rows_b, classes)
    teachers = students + wide(vertices) * width
    scaled = _student_scale(moments, plane, dims, vertices // 2, 1024, T)
    if tl.program_id(0) == 0:
        tl.store(scale, scaled)
    v = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = v < vertices
    out = packed + wide(v)[:, None] * (packed_width * TERMS)
    layer = wide(vertices) * packed_width * TERMS
    square_s, square_t, square_w = tl.zeros([ROWS], T), tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    reach_s, reach_t = tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    for start in range(0, packed_width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (d < dims)[None]
        at = wide(v)[:, None] * width + d[None]
        mean_s, mean_t = _mean(moments, d, dims), _mean(moments + 2 * plane, d, dims)
        s = tl.where(mask, (tl.load(students + at, mask, 0.0).to(T) - mean_s[None]) * scaled, 0.0)
        t = tl.where(mask, tl.load(teachers + at, mask, 0.0).to(T) - mean_t[None], 0.0)
        write = inside[:, None] & (d < packed_width)[None]
        kept_s = store_operand(out, 3 * layer, s, d[None], packed_width, write, TERMS)
        kept_t = store_operand(out + layer, 3 * layer, t, d[None], packed_width, write, TERMS)
        kept_w = store_operand(out + 2 * layer, 3 * layer, s - t, d[None], packed_width, write, TERMS)
        # Of what the products will see, so that each distance is that of the two written vectors; but a component that
        # was not finite must show.
        square_s += tl.sum(kept_s * kept_s + tl.where(is_finite(s), 0.0, float("inf")), 1)
        square_t += tl.sum(kept_t * kept_t + tl.where(is_finite(t), 0.0, float("inf")), 1)
        square_w += tl.sum(kept_w * kept_w, 1)
        reach_s = tl.maximum(reach_s, tl.max(tl.abs(s), 1))
        reach_t = tl.maximum(reach_t, tl.max(tl.abs(t), 1))
    tl.store(stats + v, square_s, inside)
    tl.store(stats + vertices + v, square_t, inside)
    tl.store(stats + 2 * vertices + v, square_w, inside)
    tl.store(stats + 3 * vertices + v, reach_s, inside)
    tl.store(stats + 4 * vertices + v, reach_t, inside)


@triton.jit(do_not_specialize=[*SIZES, *DENSE_SIZES])
def dense_kernel(
    arrays,
    products,  # [3, room, stride]: of student, teacher, residual
    stats, scale,
    coefficients,  # out [parts, 2, block_rows, stride]: gamma, beta; zero but on certified edges
    row_sums, column_sums,  # out [2, tiles across, block_rows], [2, tiles down, n]: of gamma and beta
    rows_a, rows_b, classes,
    first_row, block_rows,  # of the block of edges
    row, room,  # of it the first that products has, and for how many there is room
    delta, eps,  # numbers in two parts
    GRAPH: tl.constexpr, COMPLETE: tl.constexpr, EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr,
    NEED_GRAD: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program a tile of edges. In a tile with uncertified edges those alone keep their entropy: others become NaN."""
    T: tl.constexpr = stats.dtype.element_ty
    _, n, first_b, vertices, _ = sizes_of(GRAPH, rows_a, rows_b, classes, COMPLETE)
    delta, eps = number(delta, T), number(eps, T)
    across, tile_j = tl.num_programs(0), tl.program_id(0)
    tile_i = row // ROWS + tl.program_id(1)
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row += local
    i, j = first_row + row, tile_j * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = (local < room) & (row < block_rows)
    inside = in_rows[:, None] & (j < n)[None]
    stride = tl.multiple_of(padded(n), 16)
    at = wide(local)[:, None] * stride + j[None]
    plane = wide(room) * stride
    dot_s, dot_t = tl.load(products + at, inside, 0.0), tl.load(products + plane + at, inside, 0.0)
    dot_w = tl.load(products + 2 * plane + at, inside, 0.0)
    ranked = inside
    if EXCLUDE_SELF:
        ranked = ranked & (i[:, None] != j[None])
    entropies = arrays.entropies + wide(row)[:, None] * n + j[None]
    if KEEP_ALL:
        entropy, limit = tl.zeros([ROWS, COLUMNS], T), delta
    else:
        entropy, limit = tl.load(entropies, inside, float("nan")), tl.load(arrays.thresholds + GRAPH)
    loss, beta, gamma, literal = certified_tile(
        dot_s, dot_t, dot_w, i, j, ranked, stats, vertices, first_b, entropy, limit, delta, tl.load(scale) * eps, eps,
        KEEP_ALL,
    )  # fmt: skip
    any_literal = tl.max(tl.max(literal.to(tl.int32), 1), 0)
    tile = tile_i * across + tile_j
    tl.store(arrays.tile_losses + tile, tl.sum(tl.sum(loss, 1), 0))
    tl.store(arrays.flags + tile, any_literal)
    if NEED_GRAD:
        out = coefficients + wide(row)[:, None] * stride + j[None]
        layer = wide(block_rows) * stride
        gamma = store_coefficient(out, gamma, 2 * layer, inside, SPLIT)
        beta = store_coefficient(out + layer, beta, 2 * layer, inside, SPLIT)
        by_row = row_sums + wide(tile_j) * block_rows + row
        tl.store(by_row, tl.sum(gamma, 1), in_rows)
        tl.store(by_row + wide(across) * block_rows, tl.sum(beta, 1), in_rows)
        column = column_sums + wide(tile_i) * n + j
        tl.store(column, tl.sum(gamma, 0), j < n)
        tl.store(column + wide(tl.cdiv(block_rows, ROWS)) * n, tl.sum(beta, 0), j < n)
    if any_literal > 0:
        tl.store(entropies, tl.where(literal, entropy, float("nan")), inside)


@triton.jit(do_not_specialize=[*SIZES, *DENSE_SIZES])
def gradients_kernel(
    arrays,
    products,  # [terms, 2, owns, packed_width]: gamma by the other side's vectors, beta by their residuals
    sums,  # [2, other_tiles, owns]: of the own vertices' gamma and beta
    packed, scale,
    rows_a, rows_b, classes, packed_width,
    own_base, owns,  # first of the own vertices, and how many
    other_tiles,
    edges,  # where all are kept
    weight,  # a number in two parts
    GRAPH: tl.constexpr, COMPLETE: tl.constexpr, KEEP_ALL: tl.constexpr, ADD: tl.constexpr, TERMS: tl.constexpr,
    PACKED_TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the own vertices of one side, what a block's certified edges give them; ADD: to what they were given."""
    T: tl.constexpr = sums.dtype.element_ty
    _, _, _, vertices, width = sizes_of(GRAPH, rows_a, rows_b, classes, COMPLETE)
    own, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = own < owns
    mask = inside[:, None] & (d < packed_width)[None]
    total = tl.zeros([ROWS, BLOCK], T)
    at = wide(own)[:, None] * packed_width + d[None]
    plane = wide(owns) * packed_width
    for term in tl.static_range(TERMS):
        total += tl.load(products + 2 * term * plane + at, mask, 0.0)
        total -= tl.load(products + (2 * term + 1) * plane + at, mask, 0.0)
    gamma, beta = tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    for tile in range(other_tiles):
        gamma += tl.load(sums + wide(tile) * owns + own, inside, 0.0)
        beta += tl.load(sums + wide(other_tiles + tile) * owns + own, inside, 0.0)
    vectors = packed + wide(own_base + own)[:, None] * (packed_width * PACKED_TERMS) + d[None]
    residuals = vectors + 2 * wide(vertices) * packed_width * PACKED_TERMS
    a, w = tl.load(vectors, mask, 0.0).to(T), tl.load(residuals, mask, 0.0).to(T)
    if PACKED_TERMS > 1 and TERMS > 1:  # as much of them as the products saw
        a += tl.load(vectors + packed_width, mask, 0.0).to(T)
        w += tl.load(residuals + packed_width, mask, 0.0).to(T)
    if KEEP_ALL:
        kept = wide(edges)
    else:
        kept = tl.load(arrays.kept + GRAPH)
    total = (total + beta[:, None] * w - gamma[:, None] * a) * tl.load(scale)
    total *= number(weight, T) / (kept.to(T) + COUNT_EPS)
    out = (
        arrays.partial + GRAPH * matrix_size(rows_a, rows_b, classes) + wide(own_base + own)[:, None] * width + d[None]
    )
    there = inside[:, None] & (d < width)[None]
    if ADD:
        total += tl.load(out, there, 0.0)
    tl.store(out, total, there)
