"""For process groups: joint entropies of a share of the edges, and how many of them have each digit."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrm_kernels.backends.triton.arrays import PADDING
from vrm_kernels.backends.triton.edge import wide
from vrm_kernels.backends.triton.operands import FUSED_MULTIPLY_ADD, product
from vrm_kernels.backends.triton.select import to_key

BINS = tl.constexpr(2048)
COUNT = {"BLOCK": 4096, "num_warps": 8, **FUSED_MULTIPLY_ADD}


@triton.jit
def _add(histogram, digit, counted):
    # No masked histogram: of a tile the compiler would reorder mask and digits each on its own.
    digit = tl.where(counted, digit, BINS)
    counts = tl.histogram(tl.reshape(digit, [digit.numel]), 2 * BINS)
    bins = tl.arange(0, 2 * BINS)
    tl.atomic_add(histogram + bins, wide(counts), mask=(counts > 0) & (bins < BINS), sem="relaxed")


@triton.jit
def add_digits(
    histograms, key, counted, prefixes, LEADING: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Add the digits of the ``counted`` keys that begin with a prefix to its histogram."""
    digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    if LEADING:  # with the sign, of which negative keys come first
        _add(histograms, digit ^ (1 << (BITS - 1)), counted)
    else:
        begin, low, high = (key >> (SHIFT + BITS)).to(tl.int64), tl.load(prefixes), tl.load(prefixes + 1)
        _add(histograms, digit, counted & (begin == low))
        _add(histograms + (1 << BITS), digit, counted & (begin == high))


@triton.jit(do_not_specialize=["columns", "count"])
def digits_kernel(
    values,  # [rows, row_stride], of which `columns` are counted
    columns, count, row_stride,
    prefixes,  # [2] int64: as of vrm_kernels.graph.selection.count_digits
    histograms,  # in/out [2, 2 ** BITS] int64; of the LEADING digit [1, 2 ** BITS], all keys
    LEADING: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // columns, at % columns
    key = to_key(tl.load(values + row * row_stride + column, at < count, 0.0))
    add_digits(histograms, key, at < count, prefixes, LEADING, SHIFT, BITS)


def on_device(device: torch.device):
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def entropy_of_logs(probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
    """As :func:`vrm_kernels.graph.pruning.entropy_of_logs`, in rows as far apart as pairwise buffers."""
    m, n = len(probs_a), len(log_probs_b)
    entropy = probs_a.new_empty(m, -(-n // PADDING.value) * PADDING.value)[:, :n]
    product(probs_a, log_probs_b, entropy)
    return entropy.neg_()


def count_digits(x: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
    """As :func:`vrm_kernels.graph.selection.count_digits`, of ``x [m, n]`` whose rows are contiguous; one launch."""
    leading = shift + bits == 8 * x.element_size()
    counts = prefixes.new_zeros(1 if leading else 2, 2**bits)
    with on_device(x.device):
        digits_kernel[(triton.cdiv(x.numel(), COUNT["BLOCK"]),)](
            values=x, columns=x.shape[1], count=x.numel(), row_stride=x.stride(0), prefixes=prefixes,
            histograms=counts, LEADING=leading, SHIFT=shift, BITS=bits,
            **COUNT,
        )  # fmt: skip
    return counts.expand(2, -1)
