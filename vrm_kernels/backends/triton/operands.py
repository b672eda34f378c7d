"""Matrix products, and what they read: vertices as operands, numbers as sums of short ones."""

import ctypes
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrm_kernels.backends.triton.edge import is_finite, wide

# An option of every launch, spelled out: its default is to change.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}
# Components of a view's logits from which the roundings of single bfloat16 operands average out below the error that is
# asked for.
AVERAGING_COMPONENTS = 2**20


@functools.lru_cache(maxsize=1024)
def parts(x: float) -> tuple[float, float]:
    """``x`` as the sum of two float32 numbers, which is what a kernel can be given of it."""
    high = ctypes.c_float(x).value
    return (high, x - high) if math.isfinite(high) else (high, 0.0)


def product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """``x [.., m, k]`` by ``y [.., n, k]`` transposed, accumulated in the dtype of ``out [.., m, n]``."""
    multiply = torch.bmm if x.dim() == 3 else torch.mm
    if x.dtype == out.dtype:
        multiply(x, y.mT, out=out)
    elif x.device.type == "cpu":  # a product of two short numbers is exact in float32
        multiply(x.to(out.dtype), y.to(out.dtype).mT, out=out)
    else:
        multiply(x, y.mT, out_dtype=out.dtype, out=out)


def coefficient_products(coefficients: Tensor, vectors: Tensor, out: Tensor) -> None:
    """``coefficients [parts, 2, owns, others]`` by ``vectors [2, others, terms * width]``, into ``out [.., 2, owns,
    width]``: one product, or three that add up to that of sums of two, where ``out`` has room for them."""
    width = out.shape[-1]
    product(coefficients[0], vectors[..., :width].mT, out[0])
    if len(out) == 3:
        product(coefficients[1], vectors[..., :width].mT, out[1])
        product(coefficients[0], vectors[..., width : 2 * width].mT, out[2])


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
def round_tf32(x):
    """To the 11 significant bits that TF32 products read, to nearest: read as they are, the rest would be cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def store_operand(
    out, role, x, d, width, mask, TERMS: tl.constexpr, ROUND_TF32: tl.constexpr
):  # fmt: skip
    """Write ``x`` as the operand of a product, and return what was written.

    With three terms a number is a sum ``high + low`` of two short ones, and the operands' components are laid out
    ``[high, low, high]`` on one side (role 0) and ``[high, high, low]`` on the other (role 1, ``role`` elements on):
    the product along all of them is that of the sums, but for ``low low``.
    """
    T: tl.constexpr = x.dtype
    S: tl.constexpr = out.dtype.element_ty
    x = tl.where(is_finite(x), x, 0.0)  # what is not is never read as an edge, but a zero times it would be NaN
    if ROUND_TF32:
        x = round_tf32(x)
    high = x.to(S)
    tl.store(out + d, high, mask)
    written = high.to(T)
    if TERMS > 1:
        low = (x - written).to(S)
        tl.store(out + d + width, low, mask)
        tl.store(out + d + 2 * width, high, mask)
        tl.store(out + role + d, high, mask)
        tl.store(out + role + d + width, high, mask)
        tl.store(out + role + d + 2 * width, low, mask)
        written += low.to(T)
    return written


@triton.jit
def store_coefficient(out, x, part, mask, SPLIT: tl.constexpr):
    """Write ``x`` as an operand, or as the sum of two, ``part`` elements apart; returns what was written."""
    high = x.to(out.dtype.element_ty)
    tl.store(out, high, mask)
    written = high.to(x.dtype)
    if SPLIT:
        low = (x - written).to(out.dtype.element_ty)
        tl.store(out + part, low, mask)
        written += low.to(x.dtype)
    return written


@triton.jit(do_not_specialize=["rows", "dims", "samples"])
def split_kernel(
    x,  # [.., C] stacked
    out,  # [rows, TERMS * width]
    rows, dims, width, samples, classes,
    BY_CLASS: tl.constexpr, ROLE: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first vertices of ``x`` as an operand of sums of two (3 TERMS) or three (6 TERMS) short numbers."""
    T: tl.constexpr = x.dtype.element_ty
    S: tl.constexpr = out.dtype.element_ty
    v = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stride = wide(classes) if BY_CLASS else 1
    at = vertex_offset(v, samples, classes, BY_CLASS)
    value = tl.load(x + at[:, None] + d[None] * stride, (v < rows)[:, None] & (d < dims)[None], 0.0)
    high = value.to(S)
    middle = (value - high.to(T)).to(S)
    low = (value - high.to(T) - middle.to(T)).to(S)
    to = out + wide(v)[:, None] * (TERMS * width) + d[None]
    mask = (v < rows)[:, None] & (d < width)[None]
    # Term by term: high high, high middle, middle high; and middle middle, high low, low high.
    tl.store(to, high, mask)
    tl.store(to + width, high if ROLE == 0 else middle, mask)
    tl.store(to + 2 * width, middle if ROLE == 0 else high, mask)
    if TERMS == 6:
        tl.store(to + 3 * width, middle, mask)
        tl.store(to + 4 * width, high if ROLE == 0 else low, mask)
        tl.store(to + 5 * width, low if ROLE == 0 else high, mask)
