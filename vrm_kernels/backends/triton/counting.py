"""For process groups: joint entropies of a share of the edges, and how many of them have each digit."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrm_kernels.backends.triton.edge import wide
from vrm_kernels.backends.triton.operands import FUSED_MULTIPLY_ADD, product
from vrm_kernels.graph import selection

BINS = tl.constexpr(2048)
COUNT = {"BLOCK": 4096, "num_warps": 8, **FUSED_MULTIPLY_ADD}
ROW_MULTIPLE = 16  # of the elements from one row of entropies to the next


@triton.jit
def to_key(x):
    """An unsigned integer that orders as ``x`` does; the two zeros are one value."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        bits = x.to(tl.uint64, bitcast=True)
        top = tl.full([], 1, tl.uint64) << 63
    else:
        bits = x.to(tl.uint32, bitcast=True)
        top = tl.full([], 1, tl.uint32) << 31
    # Of a negative number all bits are inverted, of another the sign alone.
    return tl.where((bits & top) != 0, bits ^ (top | (top - 1)), bits ^ top)


@triton.jit
def add_digits(histogram, key, counted, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Add the digits at SHIFT of the ``counted`` of the 1-D ``key`` to ``histogram [2 ** WIDTH]``; what was added."""
    digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
    counts = tl.histogram(digit, BINS, mask=counted)
    tl.atomic_add(histogram + tl.arange(0, BINS), wide(counts), mask=counts > 0, sem="relaxed")
    return counts


@triton.jit
def count_kernel(
    values,  # [rows, row_stride], of which `columns` are counted
    columns, count, row_stride,
    prefixes,  # [2] int64: the leading digits of the keys that count, signed as those of vrm_kernels.graph.selection
    histograms,  # in/out [2, 2 ** WIDTH] int64; of the LEADING digit [1, 2 ** WIDTH], all keys
    LEADING: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A pass whose prefixes are given: what several processes add up."""
    at = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // columns, at % columns
    counted = at < count
    key = to_key(tl.load(values + row * row_stride + column, counted, 0.0))
    if LEADING:
        add_digits(histograms, key, counted, SHIFT, WIDTH)
    else:
        bits: tl.constexpr = key.dtype.primitive_bitwidth - SHIFT - WIDTH  # of a prefix
        half: tl.constexpr = 1 << (bits - 1)  # keys here are unsigned: as many more as there are negative ones
        low, high = tl.load(prefixes) + half, tl.load(prefixes + 1) + half
        digits = (key >> (SHIFT + WIDTH)).to(tl.int64)
        counts = add_digits(histograms, key, counted & (digits == low), SHIFT, WIDTH)
        other = histograms + (1 << WIDTH)
        if low == high:
            tl.atomic_add(other + tl.arange(0, BINS), wide(counts), mask=counts > 0, sem="relaxed")
        else:
            add_digits(other, key, counted & (digits == high), SHIFT, WIDTH)


def on_device(device: torch.device):
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def entropy_of_logs(probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
    """As :func:`vrm_kernels.graph.pruning.entropy_of_logs`, in rows as far apart as pairwise buffers."""
    m, n = len(probs_a), len(log_probs_b)
    entropy = probs_a.new_empty(m, -(-n // ROW_MULTIPLE) * ROW_MULTIPLE)[:, :n]
    product(probs_a, log_probs_b, entropy)
    return entropy.neg_()


def count_digits(x: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
    """As :func:`vrm_kernels.graph.selection.count_digits`, of ``x [m, n]`` whose rows are contiguous; one launch."""
    if len(prefixes) != 2 or 2**bits > BINS.value:  # asked for on the CPU alone
        return selection.count_digits(x, prefixes, shift, bits)
    leading = shift + bits == 8 * x.element_size()
    counts = prefixes.new_zeros(1 if leading else 2, 2**bits)
    with on_device(x.device):
        count_kernel[(triton.cdiv(x.numel(), COUNT["BLOCK"]),)](
            values=x, columns=x.shape[1], count=x.numel(), row_stride=x.stride(0), prefixes=prefixes,
            histograms=counts, LEADING=leading, SHIFT=shift, WIDTH=bits,
            **COUNT,
        )  # fmt: skip
    return counts.expand(2, -1)
