"""Exact order statistics on the device: passes over the digits of order-preserving integer keys, no sort.

Two ranks are found at once, those that the quantile interpolates between. Pass ``p`` counts the p-th digit of the keys
that begin with the digits found so far; then :func:`narrow` finds the bucket of each rank. Counts add up over row
blocks; they are 64-bit integers, so that their order of arrival changes nothing. Where they are to be added over
processes too, :mod:`counting` counts, and :mod:`vrm_kernels.graph.selection` narrows.

Buffers of a graph: ``histograms [passes, 2, 2048]`` int64, zero at first, and ``state [passes, 2, 3]`` int64: of each
rank the digits found (``prefix``), its rank among the keys that begin so, and how many keys lie below them.
"""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.arrays import SIZES
from vrm_kernels.backends.triton.counting import BINS, add_digits, to_key
from vrm_kernels.backends.triton.edge import number, wide

# (shift, width) of the digits, highest first.
DIGITS = {32: ((21, 11), (10, 11), (0, 10)), 64: ((53, 11), (42, 11), (31, 11), (20, 11), (9, 11), (0, 9))}


@triton.jit
def from_key(key, T: tl.constexpr):
    """The number whose key is the int64 ``key``."""
    if T == tl.float64:  # noqa: SIM300
        top = tl.full([], 1, tl.uint64) << 63
        bits = key.to(tl.uint64, bitcast=True)
        x = tl.where((bits & top) != 0, bits ^ top, bits ^ (top | (top - 1))).to(tl.float64, bitcast=True)
    else:
        top = tl.full([], 1, tl.uint32) << 31
        bits = key.to(tl.uint32)
        x = tl.where((bits & top) != 0, bits ^ top, bits ^ (top | (top - 1))).to(tl.float32, bitcast=True)
    return x


@triton.jit
def narrow(histogram, prefix, rank, below, SHIFT: tl.constexpr):
    """The state after a pass, from its histogram: ``(prefix, rank, below, how many keys have this prefix)``."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins)
    bucket = tl.minimum(tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int64), 0), BINS - 1)
    skipped = tl.sum(tl.where(bins < bucket, counts, 0), 0)
    inside = tl.sum(tl.where(bins == bucket, counts, 0), 0)
    return prefix | (bucket << SHIFT), rank - skipped, below + skipped, inside


@triton.jit
def _after(histograms, state, low_rank, high_rank, PASS: tl.constexpr, SHIFT: tl.constexpr):
    """The state of both ranks after pass PASS, whose digits are at SHIFT."""
    if PASS == 0:
        zero = wide(low_rank) * 0
        low = narrow(histograms, zero, wide(low_rank), zero, SHIFT)
        high = narrow(histograms, zero, wide(high_rank), zero, SHIFT)
    else:
        before = state + (PASS - 1) * 6
        histogram = histograms + PASS * 2 * BINS
        low_prefix, high_prefix = tl.load(before), tl.load(before + 3)
        low = narrow(histogram, low_prefix, tl.load(before + 1), tl.load(before + 2), SHIFT)
        # Where both ranks have the same digits so far, they are counted once.
        histogram += tl.where(low_prefix == high_prefix, 0, BINS)
        high = narrow(histogram, high_prefix, tl.load(before + 4), tl.load(before + 5), SHIFT)
    return low, high


@triton.jit
def _count_next(
    values, columns, count, row_stride, first_row, histograms, state, low_rank, high_rank, job,
    PASS: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, PREVIOUS: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = wide(job) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // columns, at % columns
    counted = at < count
    key = to_key(tl.load(values + row * row_stride + column, counted, 0.0))
    if EXCLUDE_SELF:
        counted = counted & (first_row + row != column)
    if PASS == 0:
        add_digits(histograms, key, counted, SHIFT, WIDTH)
    else:
        low, high = _after(histograms, state, low_rank, high_rank, PASS - 1, PREVIOUS)
        low_prefix, high_prefix = low[0], high[0]
        if job == 0:
            out = state + (PASS - 1) * 6
            tl.store(out, low[0])
            tl.store(out + 1, low[1])
            tl.store(out + 2, low[2])
            tl.store(out + 3, high[0])
            tl.store(out + 4, high[1])
            tl.store(out + 5, high[2])
        histogram = histograms + PASS * 2 * BINS
        digits = key.to(tl.int64) >> (SHIFT + WIDTH)
        mask: tl.constexpr = (1 << (key.dtype.primitive_bitwidth - SHIFT - WIDTH)) - 1
        digits = digits & mask
        low_digits = (low_prefix >> (SHIFT + WIDTH)) & mask
        high_digits = (high_prefix >> (SHIFT + WIDTH)) & mask
        add_digits(histogram, key, counted & (digits == low_digits), SHIFT, WIDTH)
        if low_prefix != high_prefix:
            add_digits(histogram + BINS, key, counted & (digits == high_digits), SHIFT, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def histogram_kernel(
    values,  # entropies of each graph: [rows, row_stride], of which `columns` are edges
    columns_0, columns_1, count_0, count_1,
    row_strides,  # of each graph
    first_row,  # of the first values, in its graph
    histograms, state,  # [graphs, passes, 2, 2048], [graphs, passes, 2, 3]
    low_rank_0, high_rank_0, low_rank_1, high_rank_1, jobs_0,
    PASS: tl.constexpr, PASSES: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, PREVIOUS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass PASS, over a block of rows; PREVIOUS is the shift of the pass before."""
    job = tl.program_id(0)
    if job < jobs_0:
        _count_next(
            values[0], columns_0, count_0, row_strides[0], first_row, histograms, state, low_rank_0, high_rank_0, job,
            PASS, SHIFT, WIDTH, PREVIOUS, EXCLUDE_SELF, BLOCK,
        )  # fmt: skip
    else:
        _count_next(
            values[1], columns_1, count_1, row_strides[1], 0, histograms + PASSES * 2 * BINS, state + PASSES * 6,
            low_rank_1, high_rank_1, job - jobs_0, PASS, SHIFT, WIDTH, PREVIOUS, EXCLUDE_SELF, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    histograms, state, bad,
    limits,  # out [3, graphs]: the two order statistics, and the weight between them
    counts,  # out [2, graphs] int64: how many entropies are at or below each
    low_rank_0, high_rank_0, low_rank_1, high_rank_1,
    weights,  # of the high rank, of each graph
    graphs,
    PASSES: tl.constexpr,
):  # fmt: skip
    """After the last pass; one program a graph. Anything not finite makes NaN of the threshold, which keeps no edge."""
    T: tl.constexpr = limits.dtype.element_ty
    graph = tl.program_id(0)
    histograms += graph * PASSES * 2 * BINS
    state += graph * PASSES * 6
    low_rank, high_rank = tl.where(graph == 0, low_rank_0, low_rank_1), tl.where(graph == 0, high_rank_0, high_rank_1)
    low, high = _after(histograms, state, low_rank, high_rank, PASSES - 1, 0)
    sound = tl.load(bad) == 0
    weight = tl.where(graph == 0, number(weights[0], T), number(weights[1], T))
    tl.store(limits + graph, tl.where(sound, from_key(low[0], T), float("nan")))
    tl.store(limits + graphs + graph, tl.where(sound, from_key(high[0], T), float("nan")))
    tl.store(limits + 2 * graphs + graph, weight)
    tl.store(counts + graph, tl.where(sound, low[2] + low[3], 0))
    tl.store(counts + graphs + graph, tl.where(sound, high[2] + high[3], 0))


@triton.jit
def kept_edges(selection, graph, graphs):
    """The number of edges at or below the threshold: no entropy lies between the two order statistics."""
    reached = tl.load(selection.threshold + graph) >= tl.load(selection.limits + graphs + graph)
    return tl.where(reached, tl.load(selection.counts + graphs + graph), tl.load(selection.counts + graph))
