"""Small graphs: products, epilogue and literal edges in one kernel, both graphs in one launch.

Pairwise buffers are ``[m, n]``, those of the graph over rows first, then those of the graph over columns.
"""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.arrays import SIZES, Found, Sizes
from vrm_kernels.backends.triton.edge import COUNT_EPS, certified_tile, number, wide
from vrm_kernels.backends.triton.literal import literal_gradient, literal_tile
from vrm_kernels.backends.triton.operands import vertex_offset
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
    tile, logits, graph, samples, classes, packed, stats, scale, entropies, threshold, found, losses, delta, eps,
    BY_CLASS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr, NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    m, n, width = graph.m, graph.n, graph.width
    across = tl.cdiv(n, BLOCK)
    i = (tile // across) * BLOCK + tl.arange(0, BLOCK)
    j = (tile % across) * BLOCK + tl.arange(0, BLOCK)
    a = packed + i[:, None] * width
    b = packed + (graph.first_b + j)[None] * width
    inside_a, inside_b = (i < m)[:, None], (j < n)[None]
    plane = graph.vertices * width
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
        dot_s, dot_t, dot_w, i, j, ranked, stats, graph.vertices, graph.first_b, entropy, limit, delta,
        tl.load(scale) * eps, eps, KEEP_ALL,
    )  # fmt: skip
    total = tl.sum(loss, 1)
    any_literal = tl.max(tl.max(literal.to(tl.int32), 1), 0)
    if NEED_GRAD:
        tl.store(found.coefficients + at, beta, inside_a & inside_b)
        tl.store(found.coefficients + wide(m) * n + at, gamma, inside_a & inside_b)
        tl.store(found.flags + tile, any_literal)
        if any_literal == 0:
            tl.store(found.literals + at, tl.zeros([BLOCK, BLOCK], T), inside_a & inside_b)
    if any_literal > 0:
        corner = (tile // across).to(tl.int64) * BLOCK * n + (tile % across) * BLOCK
        total += literal_tile(
            logits, samples, classes, graph.dims, graph.first_b, i, j, literal, inside_a & inside_b, delta, eps,
            found.literals + corner, wide(m) * n, n, NEED_GRAD, BY_CLASS, BLOCK, BLOCK, DEPTH, T,
        )  # fmt: skip
    tl.store(losses + tile, tl.sum(total, 0))


@triton.jit
def _behind(found, edges, tiles):
    """What the tiles of the second graph leave."""
    return Found(found.coefficients + 2 * edges, found.literals + 3 * edges, found.flags + tiles)


@triton.jit(do_not_specialize=SIZES)
def edges_kernel(
    logits,
    packed,  # of each graph [3, vertices, width]
    stats,  # of each graph [5, vertices]
    scale, entropies, threshold,  # [graphs], [m, n] of each graph, [graphs]
    found,  # out, of each graph: coefficients [2, m, n] (beta, gamma), literals [3, m, n], flags [tiles]
    losses,  # out [tiles]: its share of the loss
    vertices_0, m_0, n_0, first_b_0, dims_0, width_0, vertices_1, m_1, n_1, first_b_1, dims_1, width_1,
    samples, classes, delta, eps, tiles_0,
    EXCLUDE_SELF: tl.constexpr, KEEP_ALL: tl.constexpr, NEED_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Three products a tile, and all that follows from them: loss and the gradient's coefficients.

    Literals of a tile without literal edges are zeros in the first of their three planes.
    """
    T: tl.constexpr = logits.student.dtype.element_ty
    tile = tl.program_id(0)
    if tile < tiles_0:
        graph = Sizes(vertices_0, m_0, n_0, first_b_0, dims_0, width_0)
        _edges(
            tile, logits, graph, samples, classes, packed[0], stats[0], scale, entropies, threshold, found, losses,
            number(delta, T), number(eps, T), False, EXCLUDE_SELF, KEEP_ALL, NEED_GRAD, PRECISION, BLOCK, DEPTH, T,
        )  # fmt: skip
    else:
        graph = Sizes(vertices_1, m_1, n_1, first_b_1, dims_1, width_1)
        edges = wide(m_0) * n_0
        _edges(
            tile - tiles_0, logits, graph, samples, classes, packed[1], stats[1], scale + 1, entropies + edges,
            threshold + 1, _behind(found, edges, tiles_0), losses + tiles_0,
            number(delta, T), number(eps, T), True, EXCLUDE_SELF, KEEP_ALL, NEED_GRAD, PRECISION, BLOCK, DEPTH, T,
        )  # fmt: skip


# ---- gradients ------------------------------------------------------------------------------------------------------


@triton.jit
def _one_side(
    first_own, owns, others, own_base, other_base, d, logits, graph, samples, classes, packed, found,
    own_stride, other_stride, flag_own, flag_other, edges, delta,
    BY_CLASS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """``(gradient of the scaled student, gradient of the student)`` that vertices get as one side of their edges.

    ``first_own`` is a position on their side. TILE positions share a tile of edges, and the own may straddle two.
    """
    dims, width = graph.dims, graph.width
    own = first_own + tl.arange(0, BLOCK)
    inside = own < owns
    last = tl.minimum(first_own + BLOCK, owns) - 1
    plane = graph.vertices * width
    stride = wide(classes) if BY_CLASS else 1
    total, literal = tl.zeros([BLOCK, BLOCK], T), tl.zeros([BLOCK, BLOCK], T)
    beta_sum, gamma_sum = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    raw = vertex_offset(own_base + own, samples, classes, BY_CLASS)[:, None] + d[None] * stride
    mask = inside[:, None] & (d < dims)[None]
    own_s, own_t = tl.load(logits.student + raw, mask, 0.0), tl.load(logits.teacher + raw, mask, 0.0)
    for start in range(0, others, BLOCK):
        other = start + tl.arange(0, BLOCK)
        at = wide(own)[:, None] * own_stride + other[None] * other_stride
        edge = inside[:, None] & (other < others)[None]
        beta = tl.load(found.coefficients + at, edge, 0.0)
        gamma = tl.load(found.coefficients + edges + at, edge, 0.0)
        vectors = packed + (other_base + other)[:, None] * width + d[None]
        there = (other < others)[:, None] & (d < width)[None]
        total = tl.dot(gamma, tl.load(vectors, there, 0.0), total, input_precision=PRECISION)
        total = tl.dot(-beta, tl.load(vectors + 2 * plane, there, 0.0), total, input_precision=PRECISION)
        beta_sum += tl.sum(beta, 1)
        gamma_sum += tl.sum(gamma, 1)
        tile = (tl.minimum(first_own, owns - 1) // TILE) * flag_own + (start // TILE) * flag_other
        next_tile = (last // TILE) * flag_own + (start // TILE) * flag_other
        if tl.maximum(tl.load(found.flags + tile), tl.load(found.flags + next_tile)) > 0:
            literals = found.literals + wide(first_own) * own_stride + wide(start) * other_stride
            literal += literal_gradient(
                logits, samples, classes, own_s, own_t, inside, start, others, other_base + start, stride, d, dims,
                delta, literals, edges, own_stride, other_stride, BY_CLASS, BLOCK, T,
            )  # fmt: skip
    vectors = packed + (own_base + own)[:, None] * width + d[None]
    there = inside[:, None] & (d < width)[None]
    a, w = tl.load(vectors, there, 0.0), tl.load(vectors + 2 * plane, there, 0.0)
    return total + beta_sum[:, None] * w - gamma_sum[:, None] * a, literal


@triton.jit
def _vertex_gradient(
    view, first_vertex, d, logits, graph, samples, classes, packed, scale, found, weight, delta,
    BY_CLASS: tl.constexpr, COMPLETE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The gradient ``[BLOCK, d]`` of the vertices at ``first_vertex`` on of a view's side, or sides, in one graph."""
    m, n, first_b = graph.m, graph.n, graph.first_b
    edges = wide(m) * n
    across = tl.cdiv(n, TILE)
    linear, literal = tl.zeros([BLOCK, BLOCK], T), tl.zeros([BLOCK, BLOCK], T)
    if COMPLETE or view == 0:
        x, y = _one_side(
            first_vertex, m, n, 0, first_b, d, logits, graph, samples, classes, packed, found,
            n, 1, across, 1, edges, delta, BY_CLASS, PRECISION, BLOCK, TILE, T,
        )  # fmt: skip
        linear += x
        literal += y
    if COMPLETE or view == 1:
        x, y = _one_side(
            first_vertex, n, m, first_b, 0, d, logits, graph, samples, classes, packed, found,
            1, n, 1, across, edges, delta, BY_CLASS, PRECISION, BLOCK, TILE, T,
        )  # fmt: skip
        linear += x
        literal += y
    return (linear * tl.load(scale) + literal) * weight


@triton.jit
def _edge_weight(weight, selection, all_edges, graph, graphs, KEEP_ALL: tl.constexpr, T: tl.constexpr):
    """What a graph's sum over its edges is multiplied by: its weight over its number of kept edges."""
    if KEEP_ALL:
        kept = all_edges
    else:
        kept = kept_edges(selection, graph, graphs)
    return number(weight, T) / (kept.to(T) + COUNT_EPS)


@triton.jit(do_not_specialize=SIZES)
def gradients_kernel(
    logits, packed, scale, found, selection, bad,
    grads,  # out [rows_a, C], [rows_b, C]
    vertices_0, m_0, n_0, first_b_0, dims_0, width_0, vertices_1, m_1, n_1, first_b_1, dims_1, width_1,
    samples, classes,  # of one view
    delta, weights, tiles_0, edges_0, edges_1,
    GRAPHS: tl.constexpr, COMPLETE: tl.constexpr, KEEP_ALL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # of the edges; a multiple of BLOCK
):  # fmt: skip
    """Both graphs' gradient of a BLOCK x BLOCK tile of one view's logits: nothing is added to by two programs.

    With COMPLETE graphs the vertices of the second view follow those of the first, on both sides.
    """
    T: tl.constexpr = logits.student.dtype.element_ty
    limit = number(delta, T)
    across = tl.cdiv(classes, BLOCK)
    view, first_row = tl.program_id(1), (tl.program_id(0) // across) * BLOCK
    first_column = (tl.program_id(0) % across) * BLOCK
    row, column = first_row + tl.arange(0, BLOCK), first_column + tl.arange(0, BLOCK)
    # Without a second graph the views may differ in their rows.
    rows = samples if COMPLETE else tl.where(view == 0, m_0, n_0)
    before = view * (samples if COMPLETE else m_0)
    weight = _edge_weight(weights[0], selection, edges_0, 0, GRAPHS, KEEP_ALL, T)
    gradient = _vertex_gradient(
        view, first_row + (before if COMPLETE else 0), column,
        logits, Sizes(vertices_0, m_0, n_0, first_b_0, dims_0, width_0), samples, classes, packed[0], scale, found,
        weight, limit, False, COMPLETE, PRECISION, BLOCK, TILE, T,
    )  # fmt: skip
    if GRAPHS == 2:
        weight = _edge_weight(weights[1], selection, edges_1, 1, GRAPHS, KEEP_ALL, T)
        of_columns = _vertex_gradient(
            view, first_column + (view * classes if COMPLETE else 0), row,
            logits, Sizes(vertices_1, m_1, n_1, first_b_1, dims_1, width_1), samples, classes, packed[1], scale + 1,
            _behind(found, wide(m_0) * n_0, tiles_0), weight, limit, True, COMPLETE, PRECISION, BLOCK, TILE, T,
        )  # fmt: skip
        gradient += tl.trans(of_columns)
    gradient = tl.where(tl.load(bad) > 0, float("nan"), gradient)
    at, inside = wide(row)[:, None] * classes + column[None], (row < rows)[:, None] & (column < classes)[None]
    if view == 0:
        tl.store(grads[0] + at, gradient, inside)
    else:
        tl.store(grads[1] + at, gradient, inside)


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
    selection, bad,
    totals,  # out
    tiles_0, tiles_1, weights, edges_0, edges_1,
    GRAPHS: tl.constexpr, KEEP_ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the tiles' shares to the loss, its terms and the kept counts; one program, one order, always."""
    T: tl.constexpr = totals.loss.dtype.element_ty
    poison = tl.where(tl.load(bad) > 0, float("nan"), 0.0).to(T)
    total = poison
    for graph in tl.static_range(GRAPHS):
        if KEEP_ALL:
            count = (edges_0 if graph == 0 else edges_1) + tl.zeros([], tl.int64)
        else:
            count = kept_edges(selection, graph, GRAPHS)
        first = 0 if graph == 0 else tiles_0
        share = _sum(losses + first, tiles_0 if graph == 0 else tiles_1, T, BLOCK)
        term = share / (count.to(T) + COUNT_EPS) + poison
        total += number(weights[graph], T) * term
        tl.store(totals.terms + graph, term)
        tl.store(totals.kept + graph, tl.where(tl.load(bad) > 0, 0, count))
    tl.store(totals.loss, total)
