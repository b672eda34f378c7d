"""Stage 5: the gradients of both graphs and of the cross-entropies together, and the totals. See docs/gpu.md."""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.arrays import SIZES, matrix_size, padded, sizes_of
from vrm_kernels.backends.triton.edge import COUNT_EPS, number, wide


@triton.jit
def _mean(losses, m, kept, BLOCK: tl.constexpr, T: tl.constexpr):
    total = tl.zeros([BLOCK], T)
    for start in range(0, m, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(losses + k, k < m, 0.0)
    return tl.sum(total, 0) / (kept.to(T) + COUNT_EPS)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    arrays, rows_a, rows_b, classes,
    weights,  # of the graphs: numbers in two parts
    COMPLETE: tl.constexpr, BOTH_GRAPHS: tl.constexpr, CE_REAL: tl.constexpr, CE_VIRTUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program totals; the others take a BLOCK x BLOCK tile of one view's logits each."""
    T: tl.constexpr = arrays.loss.dtype.element_ty
    job = tl.program_id(0) - 1
    poison = tl.load(arrays.summary + 3)
    if job < 0:
        m_0, _, _, vertices_0, _ = sizes_of(0, rows_a, rows_b, classes, COMPLETE)
        loss = poison
        kept = tl.load(arrays.kept)
        term = _mean(arrays.losses, m_0, kept, BLOCK * BLOCK, T)
        tl.store(arrays.terms + 2, term + poison)
        loss += term * number(weights[0], T)
        if BOTH_GRAPHS:
            m_1, _, _, _, _ = sizes_of(1, rows_a, rows_b, classes, COMPLETE)
            kept_1 = tl.load(arrays.kept + 1)
            term = _mean(arrays.losses + vertices_0, m_1, kept_1, BLOCK * BLOCK, T)
            tl.store(arrays.terms + 3, term + poison)
            loss += term * number(weights[1], T)
        real, virtual = tl.zeros([], T), tl.zeros([], T)
        if CE_REAL:
            real = tl.load(arrays.summary)
        if CE_VIRTUAL:
            virtual = tl.load(arrays.summary + 1)
        tl.store(arrays.terms, real)
        tl.store(arrays.terms + 1, virtual)
        tl.store(arrays.loss, loss + real + virtual)
        if poison != poison:
            tl.store(arrays.kept, kept * 0)
            tl.store(arrays.kept + 1, kept * 0)
    else:
        across = tl.cdiv(classes, BLOCK)
        tiles = tl.cdiv(rows_a, BLOCK) * across
        view = (job >= tiles).to(tl.int32)
        job -= view * tiles
        b, c = (job // across) * BLOCK + tl.arange(0, BLOCK), (job % across) * BLOCK + tl.arange(0, BLOCK)
        rows = tl.where(view == 0, rows_a, rows_b)
        row = wide(view * rows_a + b)[:, None]
        inside = (b < rows)[:, None] & (c < classes)[None]
        total = tl.load(arrays.partial + row * padded(classes) + c[None], inside, 0.0) + poison
        if BOTH_GRAPHS:
            column = wide(view * classes + c)[:, None]
            partial = arrays.partial + matrix_size(rows_a, rows_b, classes) + column * padded(rows_a) + b[None]
            total += tl.trans(tl.load(partial, (c < classes)[:, None] & (b < rows)[None], 0.0))
        out = arrays.grad_a
        if view == 1:
            out = arrays.grad_b
        out += wide(b)[:, None] * classes + c[None]
        if CE_REAL or CE_VIRTUAL:
            columns = tl.where(tl.where(view == 0, CE_REAL, CE_VIRTUAL), classes, 0)
            cross = tl.load(out, (b < rows)[:, None] & (c < columns)[None], 0.0)
            total += cross * tl.load(arrays.summary + 2)
        tl.store(out, total, inside)
