"""Device functions: where a vertex lies, the maths of one edge (csrc/edge.h), and the component-wise formula.

Vertices are numbered over both sides: vertex ``v`` of a graph over rows is row ``v`` of the stacked ``[views, B, C]``
logits, of a graph over columns column ``v % C`` of view ``v // C``.
"""

import torch
import triton
import triton.language as tl

from vrm_kernels.graph import constants

COUNT_EPS = tl.constexpr(constants.COUNT_EPS)
# Sizes whose alignment buys nothing: a kernel is not compiled again for another batch size.
SIZES = (  # noqa: SIM905 (a list would take forty lines)
    "m n m_0 n_0 m_1 n_1 first_b first_b_0 first_b_1 vertices vertices_0 vertices_1 dims dims_0 dims_1 depth_0 "
    "depth_1 samples rows owns others own_base other_base split slab_rows slabs_a slabs first_row first_block_row "
    "block_rows gradient_rows tiles tiles_0 tiles_1 tiles_down tiles_stride sums_stride others_tiles flag_own "
    "flag_other own_stride other_stride literal_plane edges_0 edges_1 all_edges graph graphs columns_0 columns_1 "
    "count_0 count_1 jobs_0 low_rank_0 high_rank_0 low_rank_1 high_rank_1 "
).split()
# As in csrc/edge.h. Below this share of ||a||^2 + ||b||^2 a squared norm from a product lost too many digits.
CANCELLED_32, CANCELLED_64 = tl.constexpr(0.1), tl.constexpr(1e-3)
TINY_32, HUGE_32 = tl.constexpr(1e-30), tl.constexpr(1e30)
TINY_64, HUGE_64 = tl.constexpr(1e-270), tl.constexpr(1e270)
LARGEST_32 = tl.constexpr(constants.LARGEST[torch.float32])
LARGEST_64 = tl.constexpr(constants.LARGEST[torch.float64])


@triton.jit
def number(high, low, T: tl.constexpr):
    """A float of the host's in ``T``: arguments arrive as float32, so that a float64 is sent as a sum of two."""
    x = tl.full([], high, T)
    if T == tl.float64:  # noqa: SIM300
        x += tl.full([], low, T)
    return x


@triton.jit
def wide(x):
    """``x`` in 64 bits, also where the compiler has taken an argument that is 1 for a constant."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def vertex_offset(v, samples, classes, BY_CLASS: tl.constexpr):
    """Offset of component 0 of vertices ``v`` in the stacked logits."""
    v = wide(v)
    if BY_CLASS:
        offset = (v // classes) * samples * classes + v % classes
    else:
        offset = v * classes
    return offset


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)  # tl.sqrt is approximate in float32
    return y


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def can_be_squared(x):
    """Whether squares of such components can be summed; where one cannot, the loss is NaN."""
    LARGEST: tl.constexpr = LARGEST_64 if x.dtype == tl.float64 else LARGEST_32
    return tl.abs(x) <= LARGEST


@triton.jit
def quadratic_edge(dot_s, dot_t, dot_w, square_s, square_t, square_w, reach_s, reach_t, delta, eps_s, eps_t):
    """``(loss, beta, gamma, usable)`` of edges, from the products and squared norms of the centred vectors.

    ``square`` is ``||a||^2 + ||b||^2`` of student, teacher and residual, ``reach`` is ``max|a_c| + max|b_c|``. The
    gradient is ``beta (d_S - d_T) - gamma d_S`` for the scaled student. An edge that is not usable is not certified to
    stay within delta, or is badly conditioned: the component-wise formula must be used instead.
    """
    CANCELLED: tl.constexpr = CANCELLED_64 if dot_s.dtype == tl.float64 else CANCELLED_32
    TINY: tl.constexpr = TINY_64 if dot_s.dtype == tl.float64 else TINY_32
    HUGE: tl.constexpr = HUGE_64 if dot_s.dtype == tl.float64 else HUGE_32
    s2 = square_s - 2 * dot_s
    t2 = square_t - 2 * dot_t
    h = square_w - 2 * dot_w
    # NaN, and infinity minus infinity, compare false.
    sound = (s2 > CANCELLED * square_s) & (t2 > CANCELLED * square_t)
    ns, nt = root(tl.where(sound, s2, 1.0)), root(tl.where(sound, t2, 1.0))
    # One division for 1 / (n_S + eps_S), 1 / (n_T + eps_T), 1 / (n_S + n_T) and 1 / n_S.
    se, te, both = ns + eps_s, nt + eps_t, ns + nt
    se_te, both_ns = se * te, both * ns
    product = se_te * both_ns
    in_range = (product > TINY) & (product < HUGE)
    inverse = 1.0 / tl.where(in_range, product, 1.0)
    beta, rest = inverse * both_ns, inverse * se_te
    u, v, gap = beta * te, beta * se, (s2 - t2) * (rest * ns)
    spread = 0.5 * (h - gap * gap)
    chord = tl.where(spread > 0, spread, 0.0)
    r = eps_t * v - eps_s * u
    loss = 0.5 * r * r + beta * chord
    gamma = u * u * (v * (gap + (eps_s - eps_t) + chord * (rest * both)) + r)
    # Either bound keeps every component within delta; the second certifies nearly all edges of an untrained student.
    certified = (2 * loss <= delta * delta) | (reach_s * u + reach_t * v <= delta)
    return loss, beta, gamma, sound & in_range & certified


@triton.jit
def certified_tile(
    dot_s, dot_t, dot_w, i, j, ranked, stats_ptr, vertices, first_b, entropy, threshold, delta, eps_s,
    eps_t, KEEP_ALL: tl.constexpr,
):  # fmt: skip
    """``(loss, beta, gamma, literal)`` of a tile: zero but on kept certified edges; ``literal`` are the others kept.

    ``i`` and ``j`` are the tile's vertices on either side, ``ranked`` its edges that exist. ``stats_ptr``
    ``[5, vertices]``: squared norms of student, teacher and residual, largest magnitudes of student and teacher.
    """
    row, column = i < vertices, first_b + j < vertices
    a, b = stats_ptr + i, stats_ptr + first_b + j
    squares_s = tl.load(a, row, 0.0)[:, None] + tl.load(b, column, 0.0)[None]
    squares_t = tl.load(a + vertices, row, 0.0)[:, None] + tl.load(b + vertices, column, 0.0)[None]
    squares_w = tl.load(a + 2 * vertices, row, 0.0)[:, None] + tl.load(b + 2 * vertices, column, 0.0)[None]
    reach_s = tl.load(a + 3 * vertices, row, 0.0)[:, None] + tl.load(b + 3 * vertices, column, 0.0)[None]
    reach_t = tl.load(a + 4 * vertices, row, 0.0)[:, None] + tl.load(b + 4 * vertices, column, 0.0)[None]
    loss, beta, gamma, usable = quadratic_edge(
        dot_s, dot_t, dot_w, squares_s, squares_t, squares_w, reach_s, reach_t, delta, eps_s, eps_t
    )
    kept = ranked
    if not KEEP_ALL:
        kept = ranked & (entropy <= threshold)
    certified = kept & usable
    loss, beta, gamma = tl.where(certified, loss, 0.0), tl.where(certified, beta, 0.0), tl.where(certified, gamma, 0.0)
    return loss, beta, gamma, kept & ~usable


@triton.jit
def literal_tile(
    student_ptr, teacher_ptr, i, j, literal, inside, dims, samples, classes, first_b, delta, eps, literal_ptr, plane,
    row_stride, NEED_GRAD: tl.constexpr, BY_CLASS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, T: tl.constexpr,
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
                mask = chosen[:, None] & (d < dims)[None]
                own, other = a[:, None] + d[None] * stride, b + d * stride
                ds = tl.load(student_ptr + own, mask, 0.0) - tl.load(student_ptr + other, d < dims, 0.0)[None]
                dt = tl.load(teacher_ptr + own, mask, 0.0) - tl.load(teacher_ptr + other, d < dims, 0.0)[None]
                square_s += tl.sum(tl.where(mask, ds * ds, 0.0), 1)
                square_t += tl.sum(tl.where(mask, dt * dt, 0.0), 1)
            length = root(square_s)
            inverse_s, inverse_t = 1.0 / (length + eps), 1.0 / (root(square_t) + eps)
            for start in range(0, dims, BLOCK):
                d = start + tl.arange(0, BLOCK)
                mask = chosen[:, None] & (d < dims)[None]
                own, other = a[:, None] + d[None] * stride, b + d * stride
                ds = tl.load(student_ptr + own, mask, 0.0) - tl.load(student_ptr + other, d < dims, 0.0)[None]
                dt = tl.load(teacher_ptr + own, mask, 0.0) - tl.load(teacher_ptr + other, d < dims, 0.0)[None]
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
    student_ptr, teacher_ptr, own_s, own_t, first_other, others, offset, stride, d, dims, samples, classes, delta,
    literal_ptr, plane, own_stride, other_stride, own_mask,
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
            ds = own_s - tl.load(student_ptr + components, d < dims, 0.0)[None]
            dt = own_t - tl.load(teacher_ptr + components, d < dims, 0.0)[None]
            relation = ds * inverse_s[:, None]
            x = relation - dt * inverse_t[:, None]
            slope = tl.minimum(tl.maximum(x, -delta), delta)
            gradient = inverse_s[:, None] * slope - relation * radial[:, None]
            total += tl.where((inverse_s > 0)[:, None], gradient, 0.0)
    return total
