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
def _store_terms(out, high, low, width, mask, ROLE: tl.constexpr):
    """A sum of two numbers as three: ``[high, low, high]``, or of the other side ``[high, high, low]``. The product
    along all of them is that of the sums, but for ``low low``."""
    tl.store(out, high, mask)
    tl.store(out + width, low if ROLE == 0 else high, mask)
    tl.store(out + 2 * width, high if ROLE == 0 else low, mask)


@triton.jit
def store_operand(out, role, x, d, width, mask, TERMS: tl.constexpr):
    """Write ``x`` as the operand of a product, and return what was written; with three terms as one of either side,
    the second ``role`` elements on."""
    T: tl.constexpr = x.dtype
    S: tl.constexpr = out.dtype.element_ty
    x = tl.where(is_finite(x), x, 0.0)  # what is not is never read as an edge, but a zero times it would be NaN
    high = x.to(S)
    written = high.to(T)
    if TERMS > 1:
        low = (x - written).to(S)
        _store_terms(out + d, high, low, width, mask, 0)
        _store_terms(out + role + d, high, low, width, mask, 1)
        written += low.to(T)
    else:
        tl.store(out + d, high, mask)
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


@triton.jit(do_not_specialize=["rows", "dims"])
def split_kernel(
    x,  # [rows, dims]
    out,  # [rows, 3 * width]
    rows, dims, width,
    ROLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A matrix as an operand of sums of two short numbers."""
    S: tl.constexpr = out.dtype.element_ty
    v = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (v < rows)[:, None]
    value = tl.load(x + wide(v)[:, None] * dims + d[None], there & (d < dims)[None], 0.0)
    high = value.to(S)
    low = (value - high.to(value.dtype)).to(S)
    _store_terms(out + wide(v)[:, None] * (3 * width) + d[None], high, low, width, there & (d < width)[None], ROLE)
