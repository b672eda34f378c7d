"""Before any edge: softmaxes, common means, and the vertices centred, scaled and laid out for products."""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.arrays import SIZES
from vrm_kernels.backends.triton.edge import can_be_squared, exponential, is_finite, wide
from vrm_kernels.backends.triton.operands import store_operand, vertex_offset
from vrm_kernels.graph import constants

ENTROPY_EPS = tl.constexpr(constants.ENTROPY_EPS)


@triton.jit
def _row(
    student, student_stride, teacher, teacher_stride, row, rows, classes, logits, probs, surprisals, moments, bad,
    SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One row of one view: stack it, take its softmax and its moments, and look for what cannot be squared."""
    out = wide(row) * classes
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), T)
    sum_s, sum_t = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    fine = tl.full([BLOCK], 1, tl.int32)
    for start in range(0, classes, BLOCK):
        c = start + columns
        mask = c < classes
        s = tl.load(student + wide(c) * student_stride, mask, 0.0).to(T)
        t = tl.load(teacher + wide(c) * teacher_stride, mask, 0.0).to(T)
        tl.store(logits.student + out + c, s, mask)
        tl.store(logits.teacher + out + c, t, mask)
        fine = tl.minimum(fine, (can_be_squared(s) & can_be_squared(t)).to(tl.int32))
        top = tl.maximum(top, tl.where(mask, s, float("-inf")))
        sum_s += s
        sum_t += t
    if tl.min(fine, 0) == 0:
        tl.atomic_max(bad, 1)
    if SOFTMAX:
        peak = tl.max(top, 0)
        mean_s, mean_t = tl.sum(sum_s, 0) / classes, tl.sum(sum_t, 0) / classes
        total, m2_s, m2_t = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
        for start in range(0, classes, BLOCK):
            c = start + columns
            mask = c < classes
            s = tl.load(student + wide(c) * student_stride, mask, 0.0).to(T)
            t = tl.load(teacher + wide(c) * teacher_stride, mask, 0.0).to(T)
            total += tl.where(mask, exponential(s - peak), 0.0)
            m2_s += tl.where(mask, (s - mean_s) * (s - mean_s), 0.0)
            m2_t += tl.where(mask, (t - mean_t) * (t - mean_t), 0.0)
        total = tl.sum(total, 0)
        tl.store(moments + row, mean_s)
        tl.store(moments + rows + row, tl.sum(m2_s, 0))
        tl.store(moments + 2 * rows + row, mean_t)
        tl.store(moments + 3 * rows + row, tl.sum(m2_t, 0))
        for start in range(0, classes, BLOCK):
            c = start + columns
            mask = c < classes
            s = tl.load(student + wide(c) * student_stride, mask, 0.0).to(T)
            p = exponential(s - peak) / total
            tl.store(probs + out + c, p, mask)
            tl.store(surprisals + out + c, -tl.log(p + ENTROPY_EPS), mask)


@triton.jit
def _column_moments(x, strides, first, last, c, classes, T: tl.constexpr, ROWS: tl.constexpr):
    """Mean and sum of squared deviations of rows ``first`` to ``last`` of the columns ``c``."""
    total = tl.zeros([ROWS, c.shape[0]], T)
    columns = wide(c)[None] * strides[1]
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < last)[:, None] & (c < classes)[None]
        total += tl.load(x + wide(r)[:, None] * strides[0] + columns, mask, 0.0).to(T)
    mean = tl.sum(total, 0) / (last - first)
    total = tl.zeros([ROWS, c.shape[0]], T)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < last)[:, None] & (c < classes)[None]
        x_r = tl.load(x + wide(r)[:, None] * strides[0] + columns, mask, 0.0).to(T) - mean[None]
        total += tl.where(mask, x_r * x_r, 0.0)
    return mean, tl.sum(total, 0)


@triton.jit
def _columns(
    student, student_strides, teacher, teacher_strides, first, last, c, classes, slab, slabs, moments,
    T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The moments of a slab of rows of some columns, of student and teacher."""
    mask = c < classes
    out = moments + wide(slab) * classes + c
    plane = wide(slabs) * classes
    mean, m2 = _column_moments(student, student_strides, first, last, c, classes, T, ROWS)
    tl.store(out, mean, mask)
    tl.store(out + plane, m2, mask)
    mean, m2 = _column_moments(teacher, teacher_strides, first, last, c, classes, T, ROWS)
    tl.store(out + 2 * plane, mean, mask)
    tl.store(out + 3 * plane, m2, mask)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    sides,  # student [m, C], [n, C], teacher [m, C], [n, C], any dtype
    strides,  # of each its row's and its column's
    logits,  # out [m + n, C]
    probs, surprisals,  # out [m + n, C]: P and -log(P + 1e-7), if SOFTMAX
    row_moments,  # out [4, m + n]: mean and squared deviations of student, then teacher, if SOFTMAX
    column_moments,  # out [4, slabs, C]: the same of the columns, for each slab of rows
    bad,  # in/out [1] int32: becomes 1 if anything is not finite
    m, n, classes, slab_rows, slabs_a, slabs,
    SOFTMAX: tl.constexpr, ROW_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a row, and one a tile of columns of a slab of rows."""
    T: tl.constexpr = logits.student.dtype.element_ty
    job = tl.program_id(0)
    rows = m + n
    a, b, teacher_a, teacher_b = sides[0], sides[1], sides[2], sides[3]
    of_a, of_b, of_teacher_a, of_teacher_b = strides[0], strides[1], strides[2], strides[3]
    if job < m:
        _row(
            a + wide(job) * of_a[0], of_a[1], teacher_a + wide(job) * of_teacher_a[0], of_teacher_a[1],
            job, rows, classes, logits, probs, surprisals, row_moments, bad, SOFTMAX, ROW_BLOCK, T,
        )  # fmt: skip
    elif job < rows:
        row = (job - m).to(tl.int64)
        _row(
            b + row * of_b[0], of_b[1], teacher_b + row * of_teacher_b[0], of_teacher_b[1],
            job, rows, classes, logits, probs, surprisals, row_moments, bad, SOFTMAX, ROW_BLOCK, T,
        )  # fmt: skip
    else:
        tile = (job - rows) // slabs
        slab = (job - rows) % slabs
        c = tile * COLUMNS + tl.arange(0, COLUMNS)
        if slab < slabs_a:
            first = slab * slab_rows
            last = tl.minimum(first + slab_rows, m)
            _columns(
                a, of_a, teacher_a, of_teacher_a, first, last, c, classes, slab, slabs, column_moments, T, ROWS,
            )  # fmt: skip
        else:
            first = (slab - slabs_a) * slab_rows
            last = tl.minimum(first + slab_rows, n)
            _columns(
                b, of_b, teacher_b, of_teacher_b, first, last, c, classes, slab, slabs, column_moments, T, ROWS,
            )  # fmt: skip


# ---- vertices -------------------------------------------------------------------------------------------------------


@triton.jit
def _slab_count(slab, m, n, slab_rows, slabs_a):
    return tl.where(slab < slabs_a, tl.minimum(slab_rows, m - slab * slab_rows),
                    tl.minimum(slab_rows, n - (slab - slabs_a) * slab_rows))  # fmt: skip


@triton.jit
def _mean(moments, d, dims, m, n, slab_rows, slabs_a, slabs, T: tl.constexpr):
    """The mean of both sides' components ``d``; where that overflows, zero."""
    total = tl.zeros([d.shape[0]], T)
    for slab in range(slabs):
        count = _slab_count(slab, m, n, slab_rows, slabs_a)
        total += tl.load(moments + wide(slab) * dims + d, d < dims, 0.0) * count
    mean = total / (m + n)
    return tl.where(is_finite(mean), mean, 0.0)


@triton.jit
def _energy(moments, d, dims, m, n, slab_rows, slabs_a, slabs, T: tl.constexpr):
    """The squared deviations of components ``d`` from their mean: within the slabs, and of the slabs' means."""
    mean = _mean(moments, d, dims, m, n, slab_rows, slabs_a, slabs, T)
    total = tl.zeros([d.shape[0]], T)
    plane = wide(slabs) * dims
    for slab in range(slabs):
        count = _slab_count(slab, m, n, slab_rows, slabs_a)
        at = moments + wide(slab) * dims + d
        apart = tl.load(at, d < dims, 0.0) - mean
        total += tl.load(at + plane, d < dims, 0.0) + count * apart * apart
    return tl.where(d < dims, total, 0.0)


@triton.jit
def student_scale(moments, dims, m, n, slab_rows, slabs_a, slabs, T: tl.constexpr, BLOCK: tl.constexpr):
    """What brings the student's centred vectors to the teacher's size: a power of two, which rounds nothing.

    Without it a student that is its teacher but for a factor would have a residual, though it has no loss. The student
    or the teacher may be as good as a single point: then any number will do.
    """
    energy_s, energy_t = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    for start in range(0, dims, BLOCK):
        d = start + tl.arange(0, BLOCK)
        energy_s += _energy(moments, d, dims, m, n, slab_rows, slabs_a, slabs, T)
        energy_t += _energy(moments + 2 * wide(slabs) * dims, d, dims, m, n, slab_rows, slabs_a, slabs, T)
    exponent = (0.5 * (tl.log2(tl.sum(energy_t, 0)) - tl.log2(tl.sum(energy_s, 0)))).to(tl.float32)
    exponent = tl.where(exponent == exponent, exponent, 0.0)
    exponent = tl.minimum(tl.maximum(exponent, -26.0), 26.0)
    bits = (tl.floor(exponent + 0.5).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True).to(T)


@triton.jit
def _pack(
    tile, logits, moments, packed, stats, scale_out, vertices, dims, width, samples, classes, m, n, slab_rows, slabs_a,
    slabs,
    BY_CLASS: tl.constexpr, TERMS: tl.constexpr, ROUND_TF32: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = logits.student.dtype.element_ty
    v = tile * ROWS + tl.arange(0, ROWS)
    inside = v < vertices
    at = vertex_offset(v, samples, classes, BY_CLASS)
    stride = wide(classes) if BY_CLASS else 1
    scale = student_scale(moments, dims, m, n, slab_rows, slabs_a, slabs, T, BLOCK)
    if tile == 0:
        tl.store(scale_out, scale)
    row = packed + wide(v)[:, None] * (width * TERMS)
    plane = wide(vertices) * width * TERMS
    role = 3 * plane
    means_t = moments + 2 * wide(slabs) * dims
    square_s, square_t, square_w = tl.zeros([ROWS], T), tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    reach_s, reach_t = tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (d < dims)[None]
        components = at[:, None] + d[None] * stride
        mean_s = _mean(moments, d, dims, m, n, slab_rows, slabs_a, slabs, T)
        mean_t = _mean(means_t, d, dims, m, n, slab_rows, slabs_a, slabs, T)
        s = tl.where(mask, (tl.load(logits.student + components, mask, 0.0) - mean_s[None]) * scale, 0.0)
        t = tl.where(mask, tl.load(logits.teacher + components, mask, 0.0) - mean_t[None], 0.0)
        w = s - t
        write = inside[:, None] & (d < width)[None]
        kept_s = store_operand(row, role, s, d[None], width, write, TERMS, ROUND_TF32)
        kept_t = store_operand(row + plane, role, t, d[None], width, write, TERMS, ROUND_TF32)
        kept_w = store_operand(row + 2 * plane, role, w, d[None], width, write, TERMS, ROUND_TF32)
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


@triton.jit(do_not_specialize=SIZES)
def pack_kernel(
    logits,
    moments,  # of each graph [4, slabs, dims]
    packed,  # out, of each graph [roles, 3, vertices, TERMS * width]: student, teacher, residual
    stats,  # out, of each graph [5, vertices]
    scale,  # out [2]
    vertices_0, vertices_1, dims_0, dims_1, width_0, width_1, samples, classes, m, n, slab_rows, slabs_a, slabs,
    tiles_0,
    TERMS: tl.constexpr, ROUND_TF32: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Centre both sides, scale the student, subtract, and lay the vertices out as operands. One program ROWS vertices.

    The first ``tiles_0`` programs take the graph over rows, the others that over columns.
    """
    tile = tl.program_id(0)
    if tile < tiles_0:
        _pack(
            tile, logits, moments[0], packed[0], stats[0], scale, vertices_0, dims_0, width_0, samples, classes,
            m, n, slab_rows, slabs_a, slabs, False, TERMS, ROUND_TF32, ROWS, BLOCK,
        )  # fmt: skip
    else:  # a column has one slab in each view
        _pack(
            tile - tiles_0, logits, moments[1], packed[1], stats[1], scale + 1, vertices_1, dims_1, width_1,
            samples, classes, classes, classes, classes, 1, 2, True, TERMS, ROUND_TF32, ROWS, BLOCK,
        )  # fmt: skip
