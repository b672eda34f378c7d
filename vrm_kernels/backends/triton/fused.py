"""Small graphs: products, epilogue and literal edges in one kernel, both graphs in one launch.

Of a graph with ``m`` vertices on side a and ``n`` on side b, edge ``(i, j)`` is vertex ``i`` with ``first_b + j``.
Pairwise buffers are ``[m, n]``, those of the graph over rows first, then those of the graph over columns.
"""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.edge import (
    COUNT_EPS,
    SIZES,
    certified_tile,
    literal_gradient,
    literal_tile,
    number,
    vertex_offset,
    wide,
)
from vrm_kernels.backends.triton.select import kept_edges


@triton.jit
def _entropy(
    tile, probs, surprisals, m, n, depth, samples, classes, entropies,
    BY_CLASS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = probs.dtype.element_ty
    across = tl.cdiv(n, BLOCK)
    i = (tile // across) * BLOCK + tl.arange(0, BLOCK)
    j = (tile % across) * BLOCK + tl.arange(0, BLOCK)
    stride = wide(classes) if BY_CLASS else 1
    a, b = vertex_offset(i, samples, classes, BY_CLASS), vertex_offset(j, samples, classes, BY_CLASS)
    total = tl.zeros([BLOCK, BLOCK], T)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        p = tl.load(probs + a[:, None] + k[None] * stride, (i < m)[:, None] & (k < depth)[None], 0.0)
        s = tl.load(surprisals + b[None] + k[:, None] * stride, (j < n)[None] & (k < depth)[:, None], 0.0)
        total = tl.dot(p, s, total, input_precision=PRECISION)
    tl.store(entropies + wide(i)[:, None] * n + j[None], total, (i < m)[:, None] & (j < n)[None])


@triton.jit(do_not_specialize=SIZES)
def entropy_kernel(
    probs, surprisals,  # [.., C] stacked: of side a, and of side b on
    entropies,  # out [m, n] of each graph
    m_0, n_0, depth_0, m_1, n_1, depth_1, samples, classes, tiles_0,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The joint entropies of all edges; one program a tile."""
    tile = tl.program_id(0)
    if tile < tiles_0:
        _entropy(
            tile, probs, surprisals, m_0, n_0, depth_0, samples, classes, entropies, False, PRECISION, BLOCK, DEPTH,
        )  # fmt: skip
    else:
        _entropy(
            tile - tiles_0, probs, surprisals, m_1, n_1, depth_1, samples, classes,
            entropies + wide(m_0) * n_0, True, PRECISION, BLOCK, DEPTH,
        )  # fmt: skip


# ---- loss and coefficients ------------------------------------------------------------------------------------------


@triton.jit
def _edges(
    tile, student, teacher, packed, stats, scale, entropies, threshold, coefficients, literals, flags, losses,
    vertices, m, n, first_b, dims, width, samples, classes, delta_high, delta_low, eps_high, eps_low,
    BY_CLASS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr, NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = student.dtype.element_ty
    delta, eps = number(delta_high, delta_low, T), number(eps_high, eps_low, T)
    across = tl.cdiv(n, BLOCK)
    i = (tile // across) * BLOCK + tl.arange(0, BLOCK)
    j = (tile % across) * BLOCK + tl.arange(0, BLOCK)
    a = packed + i[:, None] * width
    b = packed + (first_b + j)[None] * width
    inside_a, inside_b = (i < m)[:, None], (j < n)[None]
    plane = vertices * width
    dot_s, dot_t, dot_w = (
        tl.zeros([BLOCK, BLOCK], T),
        tl.zeros([BLOCK, BLOCK], T),
        tl.zeros([BLOCK, BLOCK], T),
    )
    for start in range(0, width, DEPTH):  # width is a multiple of DEPTH, the components beyond dims are zero
        d = start + tl.arange(0, DEPTH)
        at_a, at_b = a + d[None], b + d[:, None]
        x, y = tl.load(at_a, inside_a, 0.0), tl.load(at_b, inside_b, 0.0)
        dot_s = tl.dot(x, y, dot_s, input_precision=PRECISION)
        x, y = tl.load(at_a + plane, inside_a, 0.0), tl.load(at_b + plane, inside_b, 0.0)
        dot_t = tl.dot(x, y, dot_t, input_precision=PRECISION)
        x, y = tl.load(at_a + 2 * plane, inside_a, 0.0), tl.load(at_b + 2 * plane, inside_b, 0.0)
        dot_w = tl.dot(x, y, dot_w, input_precision=PRECISION)
    ranked = inside_a & inside_b
    if EXCLUDE_SELF:
        ranked = ranked & (i[:, None] != j[None])
    at = wide(i)[:, None] * n + j[None]
    if KEEP_ALL:
        entropy, limit = dot_s, delta
    else:
        entropy, limit = tl.load(entropies + at, ranked, 0.0), tl.load(threshold)
    loss, beta, gamma, literal = certified_tile(
        dot_s, dot_t, dot_w, i, j, ranked, stats, vertices, first_b, entropy, limit, delta,
        tl.load(scale) * eps, eps, KEEP_ALL,
    )  # fmt: skip
    total = tl.sum(loss, 1)
    any_literal = tl.max(tl.max(literal.to(tl.int32), 1), 0)
    if NEED_GRAD:
        tl.store(coefficients + at, beta, inside_a & inside_b)
        tl.store(coefficients + wide(m) * n + at, gamma, inside_a & inside_b)
        tl.store(flags + tile, any_literal)
        if any_literal == 0:
            tl.store(literals + at, tl.zeros([BLOCK, BLOCK], T), inside_a & inside_b)
    if any_literal > 0:
        corner = (tile // across).to(tl.int64) * BLOCK * n + (tile % across) * BLOCK
        total += literal_tile(
            student, teacher, i, j, literal, inside_a & inside_b, dims, samples, classes, first_b, delta, eps,
            literals + corner, wide(m) * n, n, NEED_GRAD, BY_CLASS, BLOCK, BLOCK, DEPTH, T,
        )  # fmt: skip
    tl.store(losses + tile, tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def edges_kernel(
    student, teacher,  # [.., C] stacked
    packed_0, packed_1,  # [3, vertices, width] of each graph
    stats_0, stats_1,  # [5, vertices]
    scale, entropies, threshold,  # [graphs], [m, n] of each graph, [graphs]
    coefficients,  # out [2, m, n] of each graph: beta, gamma; zero but on certified edges
    literals,  # out [3, m, n] of each graph, see literal_tile; of a tile without literal edges zeros in the first
    flags, losses,  # out [tiles]: whether a tile has literal edges; its share of the loss
    vertices_0, m_0, n_0, first_b_0, dims_0, width_0, vertices_1, m_1, n_1, first_b_1, dims_1, width_1,
    samples, classes, delta_high, delta_low, eps_high, eps_low, tiles_0,
    EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr, NEED_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Three products a tile, and all that follows from them: loss and the gradient's coefficients."""
    tile = tl.program_id(0)
    if tile < tiles_0:
        _edges(
            tile, student, teacher, packed_0, stats_0, scale, entropies, threshold, coefficients, literals, flags,
            losses, vertices_0, m_0, n_0, first_b_0, dims_0, width_0, samples, classes, delta_high, delta_low,
            eps_high, eps_low, False, EXCLUDE_SELF, KEEP_ALL, NEED_GRAD, PRECISION, BLOCK, DEPTH,
        )  # fmt: skip
    else:
        edges = wide(m_0) * n_0
        _edges(
            tile - tiles_0, student, teacher, packed_1, stats_1, scale + 1, entropies + edges, threshold + 1,
            coefficients + 2 * edges, literals + 3 * edges, flags + tiles_0, losses + tiles_0,
            vertices_1, m_1, n_1, first_b_1, dims_1, width_1, samples, classes, delta_high, delta_low,
            eps_high, eps_low, True, EXCLUDE_SELF, KEEP_ALL, NEED_GRAD, PRECISION, BLOCK, DEPTH,
        )  # fmt: skip


# ---- gradients ------------------------------------------------------------------------------------------------------


@triton.jit
def _one_side(
    first_own, owns, others, own_base, other_base, d, student, teacher, packed, coefficients, literals,
    flags, vertices, own_stride, other_stride, flag_own, flag_other, edges, dims, width, samples, classes, delta,
    BY_CLASS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """``(gradient of the scaled student, gradient of the student)`` that vertices get as one side of their edges.

    ``first_own`` is a position on their side. TILE positions share a tile of edges, and the own may straddle two.
    """
    own = first_own + tl.arange(0, BLOCK)
    inside = own < owns
    last = tl.minimum(first_own + BLOCK, owns) - 1
    plane = vertices * width
    stride = wide(classes) if BY_CLASS else 1
    total, literal = tl.zeros([BLOCK, BLOCK], T), tl.zeros([BLOCK, BLOCK], T)
    beta_sum, gamma_sum = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    raw = vertex_offset(own_base + own, samples, classes, BY_CLASS)[:, None] + d[None] * stride
    mask = inside[:, None] & (d < dims)[None]
    own_s, own_t = tl.load(student + raw, mask, 0.0), tl.load(teacher + raw, mask, 0.0)
    for start in range(0, others, BLOCK):
        other = start + tl.arange(0, BLOCK)
        at = wide(own)[:, None] * own_stride + other[None] * other_stride
        edge = inside[:, None] & (other < others)[None]
        beta, gamma = tl.load(coefficients + at, edge, 0.0), tl.load(coefficients + edges + at, edge, 0.0)
        vectors = packed + (other_base + other)[:, None] * width + d[None]
        there = (other < others)[:, None] & (d < width)[None]
        total = tl.dot(gamma, tl.load(vectors, there, 0.0), total, input_precision=PRECISION)
        total = tl.dot(-beta, tl.load(vectors + 2 * plane, there, 0.0), total, input_precision=PRECISION)
        beta_sum += tl.sum(beta, 1)
        gamma_sum += tl.sum(gamma, 1)
        tile = (tl.minimum(first_own, owns - 1) // TILE) * flag_own + (start // TILE) * flag_other
        next_tile = (last // TILE) * flag_own + (start // TILE) * flag_other
        if tl.maximum(tl.load(flags + tile), tl.load(flags + next_tile)) > 0:
            literal += literal_gradient(
                student, teacher, own_s, own_t, start, others, other_base + start, stride, d, dims, samples, classes,
                delta, literals + wide(first_own) * own_stride + wide(start) * other_stride, edges,
                own_stride, other_stride, inside, BY_CLASS, BLOCK, T,
            )  # fmt: skip
    vectors = packed + (own_base + own)[:, None] * width + d[None]
    there = inside[:, None] & (d < width)[None]
    a, w = tl.load(vectors, there, 0.0), tl.load(vectors + 2 * plane, there, 0.0)
    return total + beta_sum[:, None] * w - gamma_sum[:, None] * a, literal


@triton.jit
def _vertex_gradient(
    view, first_vertex, d, student, teacher, packed, scale, coefficients, literals, flags, weight,
    vertices, m, n, first_b, dims, width, samples, classes, delta,
    BY_CLASS: tl.constexpr, COMPLETE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The gradient ``[BLOCK, d]`` of the vertices at ``first_vertex`` on of a view's side, or sides, in one graph."""
    edges = wide(m) * n
    across = tl.cdiv(n, TILE)
    linear, literal = tl.zeros([BLOCK, BLOCK], T), tl.zeros([BLOCK, BLOCK], T)
    if COMPLETE or view == 0:
        x, y = _one_side(
            first_vertex, m, n, 0, first_b, d, student, teacher, packed, coefficients, literals, flags, vertices,
            n, 1, across, 1, edges, dims, width, samples, classes, delta, BY_CLASS, PRECISION, BLOCK, TILE, T,
        )  # fmt: skip
        linear += x
        literal += y
    if COMPLETE or view == 1:
        x, y = _one_side(
            first_vertex, n, m, first_b, 0, d, student, teacher, packed, coefficients, literals, flags, vertices,
            1, n, 1, across, edges, dims, width, samples, classes, delta, BY_CLASS, PRECISION, BLOCK, TILE, T,
        )  # fmt: skip
        linear += x
        literal += y
    return (linear * tl.load(scale) + literal) * weight


@triton.jit
def _edge_weight(
    high, low, threshold, limits, counts, all_edges, graph, graphs, KEEP_ALL: tl.constexpr, T: tl.constexpr
):
    """What a graph's sum over its edges is multiplied by: its weight over its number of kept edges."""
    if KEEP_ALL:
        kept = all_edges
    else:
        kept = kept_edges(threshold, limits, counts, graph, graphs)
    return number(high, low, T) / (kept.to(T) + COUNT_EPS)


@triton.jit(do_not_specialize=SIZES)
def gradients_kernel(
    student, teacher, packed_0, packed_1, scale, coefficients, literals, flags, threshold, limits, counts, bad,
    grads_a, grads_b,  # out [rows_a, C], [rows_b, C]
    vertices_0, m_0, n_0, first_b_0, dims_0, width_0, vertices_1, m_1, n_1, first_b_1, dims_1, width_1,
    samples, classes,  # of one view
    delta_high, delta_low, alpha_high, alpha_low, beta_high, beta_low, tiles_0, edges_0, edges_1,
    GRAPHS: tl.constexpr, COMPLETE: tl.constexpr, KEEP_ALL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # of the edges; a multiple of BLOCK
):  # fmt: skip
    """Both graphs' gradient of a BLOCK x BLOCK tile of one view's logits: nothing is added to by two programs.

    With COMPLETE graphs the vertices of the second view follow those of the first, on both sides.
    """
    T: tl.constexpr = student.dtype.element_ty
    delta = number(delta_high, delta_low, T)
    across = tl.cdiv(classes, BLOCK)
    view, first_row = tl.program_id(1), (tl.program_id(0) // across) * BLOCK
    first_column = (tl.program_id(0) % across) * BLOCK
    row, column = first_row + tl.arange(0, BLOCK), first_column + tl.arange(0, BLOCK)
    # Without a second graph the views may differ in their rows.
    rows = samples if COMPLETE else tl.where(view == 0, m_0, n_0)
    before = view * (samples if COMPLETE else m_0)
    weight = _edge_weight(alpha_high, alpha_low, threshold, limits, counts, edges_0, 0, GRAPHS, KEEP_ALL, T)
    gradient = _vertex_gradient(
        view, first_row + (before if COMPLETE else 0), column, student, teacher, packed_0, scale,
        coefficients, literals, flags, weight,
        vertices_0, m_0, n_0, first_b_0, dims_0, width_0, samples, classes, delta,
        False, COMPLETE, PRECISION, BLOCK, TILE, T,
    )  # fmt: skip
    if GRAPHS == 2:
        weight = _edge_weight(beta_high, beta_low, threshold, limits, counts, edges_1, 1, GRAPHS, KEEP_ALL, T)
        of_columns = _vertex_gradient(
            view, first_column + (view * classes if COMPLETE else 0), row, student, teacher, packed_1, scale + 1,
            coefficients + 2 * wide(m_0) * n_0,
            literals + 3 * wide(m_0) * n_0, flags + tiles_0, weight,
            vertices_1, m_1, n_1, first_b_1, dims_1, width_1, samples, classes, delta,
            True, COMPLETE, PRECISION, BLOCK, TILE, T,
        )  # fmt: skip
        gradient += tl.trans(of_columns)
    gradient = tl.where(tl.load(bad) > 0, float("nan"), gradient)
    at, inside = wide(row)[:, None] * classes + column[None], (row < rows)[:, None] & (column < classes)[None]
    if view == 0:
        tl.store(grads_a + at, gradient, inside)
    else:
        tl.store(grads_b + at, gradient, inside)


# ---- the loss -------------------------------------------------------------------------------------------------------


@triton.jit
def _sum(losses, count, T: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(losses + at, at < count, 0.0).to(tl.float64)
    return tl.sum(total, 0).to(T)


@triton.jit(do_not_specialize=SIZES)
def total_kernel(
    losses,  # [tiles] of each graph, one after the other
    threshold, limits, counts, bad,
    loss, terms, kept,  # out [], [graphs], [graphs] int64
    tiles_0, tiles_1, alpha_high, alpha_low, beta_high, beta_low, edges_0, edges_1,
    GRAPHS: tl.constexpr, KEEP_ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the tiles' shares to the loss, its terms and the kept counts; one program, one order, always."""
    T: tl.constexpr = loss.dtype.element_ty
    poison = tl.where(tl.load(bad) > 0, float("nan"), 0.0).to(T)
    total = poison
    for graph in tl.static_range(GRAPHS):
        if KEEP_ALL:
            count = (edges_0 if graph == 0 else edges_1) + tl.zeros([], tl.int64)
        else:
            count = kept_edges(threshold, limits, counts, graph, GRAPHS)
        first = 0 if graph == 0 else tiles_0
        share = _sum(losses + first, tiles_0 if graph == 0 else tiles_1, T, BLOCK)
        term = share / (count.to(T) + COUNT_EPS) + poison
        weight = number(alpha_high, alpha_low, T) if graph == 0 else number(beta_high, beta_low, T)
        total += weight * term
        tl.store(terms + graph, term)
        tl.store(kept + graph, tl.where(tl.load(bad) > 0, 0, count))
    tl.store(loss, total)
