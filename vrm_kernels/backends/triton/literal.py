"""Stage 4: kept edges component by component, from either end. See docs/gpu.md, and csrc/edge.h for the formula."""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.arrays import SIZES, matrix_size, sizes_of
from vrm_kernels.backends.triton.edge import COUNT_EPS, number, root, wide
from vrm_kernels.backends.triton.prepare import NO_TARGET


@triton.jit
def _append(
    lists, entropies, stride, flags, flag_stride, first, self_at, begin, others, limit, total,
    KEEP_ALL: tl.constexpr, EXCLUDE_SELF: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Append to a vertex' list the ends ``first + k`` of those of its edges ``begin <= k < others`` that are to be
    visited; with a TILE, of so many edges that share a flag those where it is set."""
    for start in range(begin, others, CHUNK):
        k = start + tl.arange(0, CHUNK)
        kept = k < others
        if TILE > 0:
            kept = kept & (tl.load(flags + k // TILE * flag_stride, kept, 0) > 0)
        if KEEP_ALL and TILE == 0:
            if EXCLUDE_SELF:
                kept = kept & (k != self_at)
        else:  # NaN, that of an edge with itself, is at or below nothing
            kept = tl.load(entropies + wide(k) * stride, kept, float("nan")) <= limit
        place = total + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(lists + place, first + k, kept)
        total += tl.sum(kept.to(tl.int32), 0)
    return total


@triton.jit
def _append_flagged(
    lists, entropies, stride, flags, flag_stride, first, self_at, others, limit, total,
    KEEP_ALL: tl.constexpr, EXCLUDE_SELF: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """:func:`_append` of all edges; where CHUNK tiles have no flag they are passed over at once."""
    if TILE == 0:
        total = _append(
            lists, entropies, stride, flags, flag_stride, first, self_at, 0, others, limit, total,
            KEEP_ALL, EXCLUDE_SELF, TILE, CHUNK,
        )  # fmt: skip
    else:
        for start in range(0, others, CHUNK * TILE):
            tile = start // TILE + tl.arange(0, CHUNK)
            if tl.max(tl.load(flags + wide(tile) * flag_stride, tile * TILE < others, 0), 0) > 0:
                total = _append(
                    lists, entropies, stride, flags, flag_stride, first, self_at, start,
                    tl.minimum(others, start + CHUNK * TILE), limit, total, KEEP_ALL, EXCLUDE_SELF, TILE, CHUNK,
                )  # fmt: skip
    return total


@triton.jit
def _load(x, mask, T: tl.constexpr):
    return tl.load(x, mask, 0.0).to(T)


@triton.jit
def _differences(own_s, own_t, students, teachers, other, width, d, there):
    """Student's and teacher's components ``d`` of the edges to the vertices that begin at ``other``."""
    T: tl.constexpr = own_s.dtype
    at, mask = other[:, None] + d[None], there[:, None] & (d < width)[None]
    return own_s[None] - _load(students + at, mask, T), own_t[None] - _load(teachers + at, mask, T)


@triton.jit
def _inverses(squares_s, squares_t, there, eps):
    """``(length of the student's difference, what divides it, what divides the teacher's)``."""
    length = root(squares_s)
    return length, tl.where(there, 1.0 / (length + eps), 0.0), tl.where(there, 1.0 / (root(squares_t) + eps), 0.0)


@triton.jit
def _slopes(ds, dt, inverse_s, inverse_t, delta):
    """``(e_S, Huber's derivative, Huber's loss)`` of components."""
    relation = ds * inverse_s[:, None]
    x = relation - dt * inverse_t[:, None]
    slope = tl.minimum(tl.maximum(x, -delta), delta)
    return relation, slope, slope * (x - 0.5 * slope)


@triton.jit
def _vertex(
    arrays, graph, v, rows_a, rows_b, classes, first_row, block_rows, weight, delta, eps, limit, kept,
    COMPLETE: tl.constexpr, EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr, NEED_GRAD: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    OTHERS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The loss of a vertex' edges in which it is on side a, and its gradient from all of them.

    A vertex of more components than registers hold has PARTS of WIDTH, a program each: every one makes the same list
    and takes the sums over all components; the gradient is that of its own.
    """
    T: tl.constexpr = arrays.loss.dtype.element_ty
    m_0, n_0, _, vertices_0, _ = sizes_of(0, rows_a, rows_b, classes, COMPLETE)
    m, n, first_b, vertices, width = sizes_of(graph, rows_a, rows_b, classes, COMPLETE)
    size = matrix_size(rows_a, rows_b, classes)
    if TILE_ROWS > 0 and not COMPLETE:  # those that have edges in the block: its rows, then side b
        v += tl.where(v < block_rows, first_row, first_b - block_rows)
    number_of = graph * vertices_0 + v
    entropies, lists, flags, across = arrays.entropies, arrays.lists, arrays.flags, 0 * n
    if TILE_ROWS == 0:  # those of both graphs; else of a block of one
        block_rows = m
        entropies += graph * wide(m_0) * n_0
        lists += 2 * graph * wide(m_0) * n_0
    row, column = v - first_row, v - first_b
    # Where the vertex is on no side, that side has no edges.
    in_rows = (row >= 0) & (row < block_rows)
    on_a, on_b = tl.where(in_rows, n, 0), tl.where((column >= 0) & (column < n), block_rows, 0)
    lists += wide(tl.minimum(tl.maximum(row, 0), block_rows)) * n
    lists += wide(tl.minimum(tl.maximum(column, 0), n)) * block_rows
    row_flags = flags
    if TILE_ROWS > 0:
        across = tl.cdiv(n, TILE_COLUMNS)
        row_flags += row // TILE_ROWS * across
        flags += column // TILE_COLUMNS
    total = _append_flagged(
        lists, entropies + wide(row) * n, 1, row_flags, 1, first_b, v, on_a, limit, 0 * v,
        KEEP_ALL, EXCLUDE_SELF, TILE_COLUMNS, CHUNK,
    )  # fmt: skip
    counted = total
    if NEED_GRAD:
        total = _append_flagged(
            lists, entropies + column, n, flags, across, first_row, column - first_row, on_b, limit, total,
            KEEP_ALL, EXCLUDE_SELF, TILE_ROWS, CHUNK,
        )  # fmt: skip
    tl.debug_barrier()  # other warps read what this one stored

    part = tl.program_id(1) if PARTS > 1 else 0
    d = part * WIDTH + tl.arange(0, WIDTH)
    students = arrays.vertices + graph * 2 * size
    teachers = students + wide(vertices) * width
    base = wide(v) * width
    own = base + d
    own_s, own_t = _load(students + own, d < width, T), _load(teachers + own, d < width, T)
    losses = tl.zeros([OTHERS], T)
    gradient = tl.zeros([OTHERS, WIDTH], T)
    for start in range(0, total, OTHERS):
        k = start + tl.arange(0, OTHERS)
        there = k < total
        other = wide(tl.load(lists + k, there, 0)) * width
        if PARTS == 1:
            ds, dt = _differences(own_s, own_t, students, teachers, other, width, d, there)
            length, inverse_s, inverse_t = _inverses(tl.sum(ds * ds, 1), tl.sum(dt * dt, 1), there, eps)
            relation, slope, loss = _slopes(ds, dt, inverse_s, inverse_t, delta)
            loss, radial = tl.sum(loss, 1), tl.sum(relation * slope, 1)
        else:
            squares_s, squares_t = tl.zeros([OTHERS], T), tl.zeros([OTHERS], T)
            for first in range(0, width, WIDTH):
                c = first + tl.arange(0, WIDTH)
                s, t = _load(students + base + c, c < width, T), _load(teachers + base + c, c < width, T)
                ds, dt = _differences(s, t, students, teachers, other, width, c, there)
                squares_s += tl.sum(ds * ds, 1)
                squares_t += tl.sum(dt * dt, 1)
            length, inverse_s, inverse_t = _inverses(squares_s, squares_t, there, eps)
            loss, radial = tl.zeros([OTHERS], T), tl.zeros([OTHERS], T)
            for first in range(0, width, WIDTH):
                c = first + tl.arange(0, WIDTH)
                s, t = _load(students + base + c, c < width, T), _load(teachers + base + c, c < width, T)
                ds, dt = _differences(s, t, students, teachers, other, width, c, there)
                relation, slope, huber = _slopes(ds, dt, inverse_s, inverse_t, delta)
                loss += tl.sum(huber, 1)
                radial += tl.sum(relation * slope, 1)
            ds, dt = _differences(own_s, own_t, students, teachers, other, width, d, there)
            relation, slope, huber = _slopes(ds, dt, inverse_s, inverse_t, delta)
        losses += tl.where(k < counted, loss, 0.0)
        if NEED_GRAD:
            radial = tl.where(length > 0, radial / tl.where(length > 0, length, 1.0), 0.0)
            gradient += slope * inverse_s[:, None] - relation * radial[:, None]
    if part == 0 and in_rows:
        loss = tl.sum(losses, 0)
        if TILE_ROWS > 0:  # one vertex of each row of tiles adds the certified edges' loss
            tiles = tl.where(row % TILE_ROWS == 0, across, 0)
            certified = tl.zeros([CHUNK], T)
            for start in range(0, tiles, CHUNK):
                tile = start + tl.arange(0, CHUNK)
                certified += tl.load(arrays.tile_losses + row // TILE_ROWS * across + tile, tile < tiles, 0.0)
            loss += tl.sum(certified, 0)
        tl.store(arrays.losses + number_of, loss)
    if NEED_GRAD:
        scale = weight / (kept.to(T) + COUNT_EPS)
        out = arrays.partial + graph * size + own
        given, written = tl.sum(gradient, 0) * scale, d < width
        if TILE_ROWS > 0:  # to what the certified edges gave, where there are others
            written = d < tl.where(total > 0, width, 0)
            given += tl.load(out, written, 0.0)
        tl.store(out, given, written)


@triton.jit
def _summary(arrays, rows, TARGET: tl.constexpr, BLOCK: tl.constexpr):
    """The cross-entropies' means and 1 / their divisor, and whether any row of logits was not finite."""
    T: tl.constexpr = arrays.loss.dtype.element_ty
    fine = tl.full([BLOCK], 1, tl.int32)
    real, virtual = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    weights = tl.zeros([BLOCK], T)
    for start in range(0, rows, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < rows
        for view in tl.static_range(4):
            fine = tl.minimum(fine, tl.load(arrays.finite + view * rows + k, inside, 1))
        if TARGET != NO_TARGET:
            real += tl.load(arrays.cross_entropy + k, inside, 0.0)
            virtual += tl.load(arrays.cross_entropy + rows + k, inside, 0.0)
            weights += tl.load(arrays.cross_entropy + 2 * rows + k, inside, 0.0)
    poison = tl.where(tl.min(fine, 0) > 0, 0.0, float("nan")).to(T)
    tl.store(arrays.summary + 3, poison)
    if TARGET != NO_TARGET:
        divisor = tl.sum(weights, 0)
        inverse = 1.0 / tl.where(divisor == 0, 1.0, divisor)  # a batch that counts nothing has the sum 0
        tl.store(arrays.summary, tl.sum(real, 0) * inverse)
        tl.store(arrays.summary + 1, tl.sum(virtual, 0) * inverse)
        tl.store(arrays.summary + 2, inverse)


@triton.jit(do_not_specialize=[*SIZES, "rows", "edges_0", "edges_1", "first_job", "first_row", "block_rows"])
def literal_kernel(
    arrays, rows_a, rows_b, classes,
    rows,  # R, of a view, padded
    first_job,  # which of them is the first program
    first_row, block_rows,  # of the block of edges, in the dense form
    edges_0, edges_1,  # where all are kept
    weights, delta, eps,  # of each graph; Huber's; of a relation: numbers in two parts
    COMPLETE: tl.constexpr, EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr, NEED_GRAD: tl.constexpr,
    TARGET: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,  # of edges that share a flag, in the dense form; else 0
    WIDTH_0: tl.constexpr, PARTS_0: tl.constexpr, OTHERS_0: tl.constexpr,
    WIDTH_1: tl.constexpr, PARTS_1: tl.constexpr, OTHERS_1: tl.constexpr, CHUNK: tl.constexpr,
    SUMMARY: tl.constexpr,  # rows that the first job takes at once
):  # fmt: skip
    """The first job sums up, the others take a vertex each, those of graph 0 first; or a part of one."""
    T: tl.constexpr = arrays.loss.dtype.element_ty
    job = tl.program_id(0) + first_job - 1
    _, _, _, vertices_0, _ = sizes_of(0, rows_a, rows_b, classes, COMPLETE)
    graph = (job >= vertices_0).to(tl.int32)
    if KEEP_ALL:
        limit, kept = tl.zeros([], T), wide(tl.where(graph == 0, edges_0, edges_1))
    else:
        limit, kept = tl.load(arrays.thresholds + graph), tl.load(arrays.kept + graph)
    delta, eps = number(delta, T), number(eps, T)
    part = tl.program_id(1) if PARTS_0 > 1 or PARTS_1 > 1 else 0
    if job < 0:
        if part == 0:
            _summary(arrays, rows, TARGET, SUMMARY)
            if KEEP_ALL:
                tl.store(arrays.kept, wide(edges_0))
                tl.store(arrays.kept + 1, wide(edges_1))
    elif job < vertices_0:
        if part < PARTS_0:
            _vertex(
                arrays, 0, job, rows_a, rows_b, classes, first_row, block_rows, number(weights[0], T), delta, eps,
                limit, kept, COMPLETE, EXCLUDE_SELF, KEEP_ALL, NEED_GRAD, TILE_ROWS, TILE_COLUMNS,
                WIDTH_0, PARTS_0, OTHERS_0, CHUNK,
            )  # fmt: skip
    elif part < PARTS_1:
        _vertex(
            arrays, 1, job - vertices_0, rows_a, rows_b, classes, first_row, block_rows, number(weights[1], T),
            delta, eps, limit, kept, COMPLETE, EXCLUDE_SELF, KEEP_ALL, NEED_GRAD, TILE_ROWS, TILE_COLUMNS,
            WIDTH_1, PARTS_1, OTHERS_1, CHUNK,
        )  # fmt: skip
