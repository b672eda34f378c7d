"""Device functions that every form uses: numbers, and the maths of one edge (csrc/edge.h)."""

import torch
import triton
import triton.language as tl

from vrm_kernels.graph import constants

COUNT_EPS = tl.constexpr(constants.COUNT_EPS)
LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts, of which the first has so few bits that its products with whole numbers are exact.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440054690583e-4)
# As in csrc/edge.h. Below this share of ||a||^2 + ||b||^2 a squared norm from a product lost too many digits.
CANCELLED_32, CANCELLED_64 = tl.constexpr(0.1), tl.constexpr(1e-3)
TINY_32, HUGE_32 = tl.constexpr(1e-30), tl.constexpr(1e30)
TINY_64, HUGE_64 = tl.constexpr(1e-270), tl.constexpr(1e270)
LARGEST_32 = tl.constexpr(constants.LARGEST[torch.float32])
LARGEST_64 = tl.constexpr(constants.LARGEST[torch.float64])


@triton.jit
def number(parts, T: tl.constexpr):
    """A float of the host's in ``T``: arguments arrive as float32, so that a float64 is sent as a sum of two."""
    x = tl.full([], parts[0], T)
    if T == tl.float64:  # noqa: SIM300
        x += tl.full([], parts[1], T)
    return x


@triton.jit
def wide(x):
    """``x`` in 64 bits, also where the compiler has taken an argument that is 1 for a constant."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)  # tl.sqrt is approximate in float32
    return y


@triton.jit
def exponential(x):
    """exp(x), x <= 0, to two roundings; ``tl.exp`` loses digits in proportion to ``|x|`` in float32."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        whole = tl.floor(x * LOG2_E + 0.5)
        rest = (x - whole * LN2_HIGH) - whole * LN2_LOW
        y = tl.exp2(rest * LOG2_E) * tl.exp2(tl.maximum(whole, -160.0))
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
