r"""One relation graph as matrix products, in pure PyTorch: no ``[M, N, D]`` tensor, any device.

With ``dS = a_i - b_j``, ``dT`` the teacher's, ``n = ||dS||``, ``m = ||dT||`` and ``e = d / (||d|| + eps)``, an edge
none of whose components leaves Huber's quadratic zone (a *certified* edge) has the loss ``q / 2``,
``q = ||eS - eT||^2``. In terms of the *residuals* ``w_i = aS_i - aT_i``, ``z_j = bS_j - bT_j``, for which
``dS - dT = w_i - z_j``::

    n^2 = ||aS_i - bS_j||^2    m^2 = ||aT_i - bT_j||^2    h = ||w_i - z_j||^2                       three products
    n - m = (n^2 - m^2) / (n + m)              g = 2 n m (1 - cos) = h - (n - m)^2
    u = 1 / (n + epsS)   v = 1 / (m + epsT)    r = n u - m v = epsT v - epsS u
    q = r^2 + u v g
    d(q/2)/d dS = beta (w_i - z_j) - gamma dS
        beta = u v             gamma = u^2 (v (n - m + epsS - epsT + g / 2n) + r)
    grad aS = rowsum(beta) w - beta z - rowsum(gamma) aS + gamma bS        and its mirror image: four products

All of it is written in small differences, so that the digits last as the student converges. Two changes of variables
make them last longer, and change nothing else:

- a vector common to all vertices is subtracted from both sides, because ``n^2`` as products cancels;
- the student is scaled to the teacher's size, because a relation hardly depends on its length: a student that is the
  teacher up to a factor has no residual. With ``epsS = scale eps`` that is exact.

Kept edges that are not certified, and those where ``n^2`` or ``m^2`` cancelled (the *guard*), take the formula
literally, component by component, from the vectors as given.

A device is asked once a graph which edges those are, after all others are done. It is not asked for a small graph:
there every edge takes the formula literally, in blocks of rows, and a CUDA graph can capture the loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.backends.contract import (
    Backend,
    GraphResult,
    GraphSettings,
    Probs,
    ShareSettings,
    Sides,
    all_sound,
    compute_dtype,
)
from vrm_kernels.backends.reference import kept_edges, share_mask
from vrm_kernels.graph.constants import COUNT_EPS

# Guard: n^2 and m^2 must exceed this fraction of the two squared norms that they are computed from. In float32, with
# the student at the teacher + 1 % noise (64 x 10 to 256 x 10, 128 x 100), the gradient's relative error reached 6e-5
# with 0.01, 5e-5 with 0.03 and 4e-6 with 0.1, where little but edges between the two views of one vertex is guarded.
GUARD = {torch.float32: 0.1, torch.float64: 1e-3}
# Beyond these the student is as good as a single point, or the teacher is.
SCALE_RANGE = (1e-8, 1e8)
# Off the CPU, relations of up to this many components are taken literally. On an H100 the eager class, which stores
# them, takes 5.7 ms for 512 x 200 (7e7 components in both graphs); products and their waits took 9 to 11.
LITERAL_ELEMENTS = 2**26
# Components of the relations of a block of rows that are taken literally: 64 MB a tensor in float32, five at a time.
LITERAL_BLOCK = 2**24
# Elements of a mask in which torch looks for the edges at once.
NONZERO_ELEMENTS = 2**30


class Vertices(NamedTuple):
    """The vertices of one side of the graph, centred, and what an edge needs to know of each."""

    x: Tensor  # [M, D]
    square: Tensor  # [M], squared norm
    guard: Tensor  # [M], the squared length of an edge must exceed the sum of its two vertices' guards
    top: Tensor  # [M], largest component
    bottom: Tensor  # [M], smallest component

    @classmethod
    def of(cls, x: Tensor) -> "Vertices":
        square = x.square().sum(1)
        limits = torch.finfo(x.dtype)
        # Products must neither overflow nor underflow; and in one dimension every cosine is 1 or -1: all cancels.
        usable = (square < limits.max * limits.eps) & (x.shape[1] > 1)
        guard = torch.where(usable, GUARD[x.dtype] * square + limits.tiny / limits.eps, torch.inf)
        return cls(x, square, guard, x.amax(1), x.amin(1))

    def block(self, rows: slice) -> "Vertices":
        return Vertices(*(field[rows] for field in self))


class TorchBackend(Backend):
    carries_tangents = True

    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        dtype = compute_dtype(*sides)
        sides = Sides(*(x.to(dtype).contiguous() for x in sides))
        if probs is not None:
            p, q = (x.to(compute_dtype(*probs)) for x in probs)
            probs = p, q
        m, n = len(sides.a), len(sides.b)
        keep = kept_edges(probs, m, n, settings.percentile, settings.exclude_self, sides.a.device)
        sound = all_sound(sides, probs)
        poison = torch.where(sound, 0.0, torch.nan).to(dtype)
        kept = torch.where(sound, keep.sum(), 0)
        loss, grads = _masked(sides, keep, kept, settings.delta, settings.eps, need_grad)
        if not need_grad:
            return GraphResult(loss + poison, loss.new_empty(0), loss.new_empty(0), kept)
        grad_a, grad_b = (grad.add_(poison) for grad in grads)
        return GraphResult(loss + poison, grad_a, grad_b, kept)

    def relation_share(
        self,
        sides: Sides,
        probs: Probs | None,
        entropy: Tensor | None,
        settings: ShareSettings,
        grads: Sequence[Tensor],
    ) -> Tensor:
        sides = Sides(*(x.contiguous() for x in sides))
        keep = share_mask(sides, entropy, settings)
        loss, parts = _masked(sides, keep, settings.kept, settings.delta, settings.eps, bool(grads))
        for grad, part in zip(grads, parts, strict=True):
            grad.add_(part, alpha=settings.weight)
        return loss + torch.where(all_sound(sides, None), 0.0, torch.nan).to(loss.dtype)


def is_literal(m: int, n: int, dims: int) -> bool:
    """Whether a graph of ``m x n`` edges off the CPU is computed without reading the device."""
    return m * n * dims <= LITERAL_ELEMENTS


def _masked(vectors: Sides, keep: Tensor, kept: Tensor, delta: float, eps: float, need_grad: bool):
    """``(loss, gradients of the student's two sides, if any)`` of the edges in ``keep``, divided by ``kept``. It
    overwrites ``keep``."""
    count = kept.to(vectors.a.dtype) + COUNT_EPS
    if not _is_cpu(keep.device) and is_literal(len(vectors.a), *vectors.b.shape):
        loss, grads = _every_edge(vectors, keep, delta, eps, need_grad)
        return loss / count, [x.div_(count) for x in grads]
    (a_s, b_s), (a_t, b_t) = _centred(vectors.a, vectors.b), _centred(vectors.teacher_a, vectors.teacher_b)
    scale = (_size(a_t, b_t) / _size(a_s, b_s)).clamp_(*SCALE_RANGE).nan_to_num_(1.0)
    a_s, b_s = a_s * scale, b_s * scale
    w, z = a_s - a_t, b_s - b_t
    sides = [(Vertices.of(x), Vertices.of(y)) for x, y in ((a_s, b_s), (a_t, b_t), (w, z))]

    loss = scale.new_zeros(())
    # The gradients of certified edges are with respect to the scaled student, those of literal edges are not.
    certified_grads, literal_grads = ([torch.zeros_like(x) for x in vectors[:2]] if need_grad else [] for _ in range(2))
    step = max(1, _block_elements(loss.device) // len(z))
    for start in range(0, len(w), step):
        rows = slice(start, start + step)
        student, teacher, residual = ((x.block(rows), y) for x, y in sides)
        q, beta, gamma = _certified_edges(student, teacher, residual, keep[rows], eps * scale, eps, delta, need_grad)
        loss += q.sum() / 2
        if need_grad:
            _add_products(certified_grads, rows, beta, gamma, w[rows], z, a_s[rows], b_s)
    step = max(1, NONZERO_ELEMENTS // len(z))
    for start in range(0, len(w), step):
        i, j = keep[start : start + step].nonzero(as_tuple=True)  # here, and nowhere else, the device is waited for
        loss += _literal_edges(vectors, i + start, j, delta, eps, literal_grads)

    both = zip(certified_grads, literal_grads, strict=True)
    return loss / count, [x.mul_(scale).add_(y).div_(count) for x, y in both]


def _is_cpu(device: torch.device) -> bool:
    """Whether reading a tensor waits for nothing."""
    return device.type == "cpu"


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides less their common mean; where that overflows, less nothing."""
    mean = ((a.sum(0) + b.sum(0)) / (a.shape[0] + b.shape[0])).nan_to_num_(0.0, 0.0, 0.0)
    return a - mean, b - mean


def _size(a: Tensor, b: Tensor) -> Tensor:
    return torch.hypot(a.norm(), b.norm())


def _squared_distances(pair: tuple[Vertices, Vertices]) -> Tensor:
    a, b = pair
    return torch.addmm(b.square, a.x, b.x.t(), alpha=-2).add_(a.square[:, None])


def _unguarded(pair: tuple[Vertices, Vertices], squared_distances: Tensor) -> Tensor:
    """Which edges kept their digits. NaN compares false."""
    a, b = pair
    return squared_distances - b.guard > a.guard[:, None]


def _largest_components(pair: tuple[Vertices, Vertices]) -> Tensor:
    """A bound on the components of ``a_i - b_j``, from the extremes of each."""
    a, b = pair
    return torch.maximum(a.top[:, None] - b.bottom, b.top - a.bottom[:, None])


def _certified_edges(student, teacher, residual, keep, eps_s, eps_t, delta, need_grad):
    """``q, beta, gamma`` of a block, zero except on certified edges, which are taken out of ``keep``."""
    n2, m2, h = (_squared_distances(pair) for pair in (student, teacher, residual))
    unguarded = _unguarded(student, n2) & _unguarded(teacher, m2)
    n, m = n2.sqrt(), m2.sqrt()
    difference = n2.sub_(m2).div_(n + m)
    g = h.addcmul_(difference, difference, value=-1).clamp_(min=0)
    u, v = (n + eps_s).reciprocal_(), m.add_(eps_t).reciprocal_()
    beta = u * v
    r = (v * eps_t).sub_(u * eps_s)
    q = (beta * g).addcmul_(r, r)

    # All components are within delta where the norm is, and also where the extreme components are.
    bound = (_largest_components(student) * u).addcmul_(_largest_components(teacher), v)
    certified = ((q <= delta * delta) | (bound <= delta)).logical_and_(unguarded).logical_and_(keep)
    keep.logical_and_(~certified)
    drop = ~certified
    q.masked_fill_(drop, 0)
    if need_grad:
        gamma = g.div_(n).mul_(0.5).add_(difference).add_(eps_s - eps_t).mul_(v).add_(r).mul_(u).mul_(u)
        beta.masked_fill_(drop, 0)
        gamma.masked_fill_(drop, 0)
        return q, beta, gamma
    return q, None, None


def _add_products(grads, rows, beta, gamma, w, z, a, b) -> None:
    grad_a, grad_b = grads[0][rows], grads[1]
    grad_a.addcmul_(beta.sum(1, keepdim=True), w).addmm_(beta, z, alpha=-1)
    grad_a.addcmul_(gamma.sum(1, keepdim=True), a, value=-1).addmm_(gamma, b)
    grad_b.addcmul_(beta.sum(0)[:, None], z).addmm_(beta.t(), w, alpha=-1)
    grad_b.addcmul_(gamma.sum(0)[:, None], b, value=-1).addmm_(gamma.t(), a)


def _literal_edges(vectors: Sides, i: Tensor, j: Tensor, delta: float, eps: float, grads: list[Tensor]) -> Tensor:
    """The sum of the Huber losses of the edges ``i, j``, in chunks; adds their gradients to ``grads``, if any."""
    a, b, teacher_a, teacher_b = vectors
    total = a.new_zeros(())
    step = max(1, _block_elements(a.device) // a.shape[1])
    for own, other in zip(i.split(step), j.split(step), strict=True):
        student = a.index_select(0, own).sub_(b.index_select(0, other))
        teacher = teacher_a.index_select(0, own).sub_(teacher_b.index_select(0, other))
        loss, grad = _huber(student, teacher, None, delta, eps, bool(grads))
        total += loss
        if grads:
            grads[0].index_add_(0, own, grad)
            grads[1].index_add_(0, other, grad.neg_())
    return total


def _every_edge(vectors: Sides, keep: Tensor, delta: float, eps: float, need_grad: bool) -> tuple[Tensor, list[Tensor]]:
    """The sum of the Huber losses of the edges in ``keep``, and the gradients of both sides, if any."""
    a, b, teacher_a, teacher_b = vectors
    total = a.new_zeros(())
    grads = [torch.zeros_like(a), torch.zeros_like(b)] if need_grad else []
    step = max(1, LITERAL_BLOCK // max(1, b.numel()))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        student, teacher = a[rows, None] - b, teacher_a[rows, None] - teacher_b
        loss, grad = _huber(student, teacher, ~keep[rows, :, None], delta, eps, need_grad)
        total += loss
        if need_grad:
            grads[0][rows] = grad.sum(1)
            grads[1] -= grad.sum(0)
    return total, grads


def _huber(student: Tensor, teacher: Tensor, drop: Tensor | None, delta: float, eps: float, need_grad: bool):
    """``(sum of the losses, gradients)`` of edges whose differences are ``[.., D]``, without those in ``drop [.., 1]``.
    It overwrites the differences."""
    relation, length = _relations(student, eps)
    difference = _relations(teacher, eps)[0].neg_().add_(relation)
    slope = difference.clamp(-delta, delta)  # huber' ; and huber(x) = slope (x - slope / 2)
    if drop is not None:
        slope.masked_fill_(drop, 0)
    loss = torch.dot(slope.view(-1), difference.sub_(slope, alpha=0.5).view(-1))
    if not need_grad:
        return loss, None
    radial = (relation * slope).sum(-1, keepdim=True) / length
    radial = torch.where(length > 0, radial, 0)
    return loss, slope.div_(length + eps).addcmul_(relation, radial, value=-1)


def _relations(difference: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Relations ``[.., D]``, which overwrite the differences, and the differences' lengths ``[.., 1]``."""
    length = difference.norm(dim=-1, keepdim=True)
    return difference.div_(length + eps), length


def _block_elements(device: torch.device) -> int:
    """Elements of a [rows, N] block or an [edges, D] chunk: on the CPU what caches hold, elsewhere what fills it."""
    return 2**16 * torch.get_num_threads() if _is_cpu(device) else 2**22
