"""Device functions: the component-wise formula of the edges that no certificate covers, and its gradient."""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.edge import root, wide
from vrm_kernels.backends.triton.operands import vertex_offset


@triton.jit
def literal_tile(
    logits, samples, classes, dims, first_b, i, j, literal, inside, delta, eps, literal_ptr, plane, row_stride,
    NEED_GRAD: tl.constexpr, BY_CLASS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The component-wise loss ``[ROWS]`` of a tile's ``literal`` edges; leaves what their gradient needs, if any.

    That is, for each edge of the tile, ``1 / (n_S + eps)``, ``1 / (n_T + eps)`` and ``sum_c e_S,c huber'_c / n_S``, in
    three planes of ``literal_ptr`` (which points at the tile's first edge); zeros for an edge that is not literal.
    ``inside`` are the edges of the tile that exist.
    """
    total = tl.zeros([ROWS], T)
    stride = wide(classes) if BY_CLASS else 1
    a = vertex_offset(i, samples, classes, BY_CLASS)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    for column in range(COLUMNS):
        chosen = tl.max(tl.where(columns[None] == column, literal, False).to(tl.int32), 1) > 0
        inverse_s, inverse_t, radial = tl.zeros([ROWS], T), tl.zeros([ROWS], T), tl.zeros([ROWS], T)
        if tl.max(chosen.to(tl.int32), 0) > 0:
            vertex = first_b + tl.max(tl.where(columns == column, j, 0), 0)
            b = vertex_offset(vertex, samples, classes, BY_CLASS)
            square_s, square_t = tl.zeros([ROWS], T), tl.zeros([ROWS], T)
            for start in range(0, dims, BLOCK):
                d = start + tl.arange(0, BLOCK)
                there = d < dims
                mask = chosen[:, None] & there[None]
                own, other = a[:, None] + d[None] * stride, b + d * stride
                ds = tl.load(logits.student + own, mask, 0.0) - tl.load(logits.student + other, there, 0.0)[None]
                dt = tl.load(logits.teacher + own, mask, 0.0) - tl.load(logits.teacher + other, there, 0.0)[None]
                square_s += tl.sum(tl.where(mask, ds * ds, 0.0), 1)
                square_t += tl.sum(tl.where(mask, dt * dt, 0.0), 1)
            length = root(square_s)
            inverse_s, inverse_t = 1.0 / (length + eps), 1.0 / (root(square_t) + eps)
            for start in range(0, dims, BLOCK):
                d = start + tl.arange(0, BLOCK)
                there = d < dims
                mask = chosen[:, None] & there[None]
                own, other = a[:, None] + d[None] * stride, b + d * stride
                ds = tl.load(logits.student + own, mask, 0.0) - tl.load(logits.student + other, there, 0.0)[None]
                dt = tl.load(logits.teacher + own, mask, 0.0) - tl.load(logits.teacher + other, there, 0.0)[None]
                relation = ds * inverse_s[:, None]
                x = tl.where(mask, relation - dt * inverse_t[:, None], 0.0)
                slope = tl.minimum(tl.maximum(x, -delta), delta)
                total += tl.sum(slope * (x - 0.5 * slope), 1)
                radial += tl.sum(relation * slope, 1)
            radial = tl.where(chosen & (length > 0), radial / length, 0.0)
            inverse_s, inverse_t = tl.where(chosen, inverse_s, 0.0), tl.where(chosen, inverse_t, 0.0)
        if NEED_GRAD:
            there = tl.max(tl.where(columns[None] == column, inside, False).to(tl.int32), 1) > 0
            out = literal_ptr + wide(rows) * row_stride + column
            tl.store(out, inverse_s, there)
            tl.store(out + plane, inverse_t, there)
            tl.store(out + 2 * plane, radial, there)
    return total


@triton.jit
def literal_gradient(
    logits, samples, classes, own_s, own_t, own_mask, first_other, others, offset, stride, d, dims, delta, literal_ptr,
    plane, own_stride, other_stride,
    BY_CLASS: tl.constexpr, OTHERS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradient ``[own, d]`` that the literal edges between own vertices and up to OTHERS others give the own.

    The formula is odd in the edge's direction: own may be either side. ``literal_ptr`` points at the tile's first edge.
    """
    total = tl.zeros(own_s.shape, T)
    rows = tl.arange(0, own_s.shape[0]).to(tl.int64)
    for other in range(OTHERS):
        planes = literal_ptr + rows * own_stride + other * other_stride
        mask = own_mask & (rows * 0 + (first_other + other) < others)
        inverse_s = tl.load(planes, mask, 0.0)
        if tl.max(inverse_s, 0) > 0:
            literal = mask & (inverse_s > 0)
            inverse_t, radial = tl.load(planes + plane, literal, 0.0), tl.load(planes + 2 * plane, literal, 0.0)
            components = vertex_offset(offset + other, samples, classes, BY_CLASS) + d * stride
            ds = own_s - tl.load(logits.student + components, d < dims, 0.0)[None]
            dt = own_t - tl.load(logits.teacher + components, d < dims, 0.0)[None]
            relation = ds * inverse_s[:, None]
            x = relation - dt * inverse_t[:, None]
            slope = tl.minimum(tl.maximum(x, -delta), delta)
            gradient = inverse_s[:, None] * slope - relation * radial[:, None]
            total += tl.where((inverse_s > 0)[:, None], gradient, 0.0)
    return total
