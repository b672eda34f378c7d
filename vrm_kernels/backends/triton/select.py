"""Stage 3: thresholds, ``torch.quantile``'s to the bit, and how many entropies are at or below each. See docs/gpu.md.

A bracket of a graph is eight int64: how many of its source lie below its lower end, are equal to it, are equal to its
upper end, and lie strictly between (those are collected); the keys of both ends; how many entropies its source has, and
the wanted rank among them. The source of the first are all entropies, of another what the one before collected.
"""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.edge import number, root, wide
from vrm_kernels.graph import forms

BELOW, AT_LOW, AT_HIGH, INSIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOW, HIGH, COUNT, RANK = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
FIELDS = tl.constexpr(8)
BUCKETS, BITS = tl.constexpr(32), tl.constexpr(5)
DEVIATIONS = tl.constexpr(forms.DEVIATIONS)
HASH = tl.constexpr(2654435761)  # a prime near 2^32 over the golden ratio: its multiples spread evenly over any size
# Of each graph: where a source begins and how many it has, where what lies inside a bracket goes and for how many there
# is room, the wanted rank, the size of a sample, programs.
COUNTS = [f"{name}_{graph}" for name in ("from", "count", "to", "room", "rank", "sample", "jobs") for graph in (0, 1)]


@triton.jit
def to_key(x):
    """A signed integer that orders as ``x`` does, NaN beyond infinity; the two zeros are one value."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return key


@triton.jit
def from_key(key, T: tl.constexpr):
    if T == tl.float64:  # noqa: SIM300
        x = tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(tl.float64, bitcast=True)
    else:
        key = key.to(tl.int32)
        x = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _distance(key, low):
    """``key - low >= 0``, unsigned: it may exceed the largest signed number."""
    if low.dtype == tl.int64:
        distance = (key - low).to(tl.uint64, bitcast=True)
    else:
        distance = (key - low).to(tl.uint32, bitcast=True)
    return distance


@triton.jit
def order_statistic(values, count, rank, BLOCK: tl.constexpr):
    """Of ``count`` values the key at ``rank``, and the key at the rank after it (the largest if there is none)."""
    T: tl.constexpr = values.dtype.element_ty
    at = tl.arange(0, BLOCK)
    LARGEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if T == tl.float64 else 0x7FFFFFFF  # noqa: SIM300
    low, high = to_key(tl.full([], float("inf"), T)), to_key(tl.full([], float("-inf"), T))
    for start in range(0, count, BLOCK):
        x = tl.load(values + start + at, start + at < count, float("nan"))
        key = to_key(x)
        low = tl.minimum(low, tl.min(tl.where(x == x, key, low), 0))
        high = tl.maximum(high, tl.max(tl.where(x == x, key, high), 0))
    span = _distance(tl.maximum(high, low), low)
    shift = tl.full([], 0, tl.int32)
    while (span >> shift.to(span.dtype)) >= BUCKETS:
        shift += BITS
    rest, inside = wide(rank), wide(count)
    bins = tl.arange(0, BUCKETS)
    while (inside > 1) & (shift >= 0):
        counts = tl.zeros([BUCKETS], tl.int64)
        for start in range(0, count, BLOCK):
            key = to_key(tl.load(values + start + at, start + at < count, float("nan")))
            digit = _distance(key, low) >> shift.to(span.dtype)
            there = (start + at < count) & (key >= low) & (digit < BUCKETS)
            counts += tl.histogram(digit.to(tl.int32), BUCKETS, mask=there)
        bucket = tl.minimum(tl.sum((tl.cumsum(counts, 0) <= rest).to(tl.int32), 0), BUCKETS - 1)
        rest -= tl.sum(tl.where(bins < bucket, counts, 0), 0)
        inside = tl.sum(tl.where(bins == bucket, counts, 0), 0)
        low += bucket.to(low.dtype) << shift.to(low.dtype)
        shift -= BITS
    first = tl.full([], LARGEST, low.dtype)
    for start in range(0, count, BLOCK):
        key = to_key(tl.load(values + start + at, start + at < count, float("nan")))
        first = tl.minimum(first, tl.min(tl.where((start + at < count) & (key >= low), key, LARGEST), 0))
    following = tl.full([], LARGEST, low.dtype)
    at_most = wide(0 * rank)
    for start in range(0, count, BLOCK):
        key = to_key(tl.load(values + start + at, start + at < count, float("nan")))
        following = tl.minimum(following, tl.min(tl.where((start + at < count) & (key > first), key, LARGEST), 0))
        at_most += tl.sum(((start + at < count) & (key <= first)).to(tl.int32), 0)
    return first, tl.where(at_most > rank + 1, first, following)


@triton.jit
def _source(arrays, start, LEVEL: tl.constexpr):
    """The source of a level's bracket: entropies, or what the level before collected."""
    if LEVEL == 0:
        values = arrays.entropies + wide(start)
    else:
        values = arrays.collected + wide(start)
    return values


@triton.jit
def _left(bracket):
    """The wanted rank among those inside; outside of them where it is an end's."""
    return tl.load(bracket + RANK) - tl.load(bracket + BELOW) - tl.load(bracket + AT_LOW)


@triton.jit
def _rank_inside(bracket, inside):
    return tl.minimum(tl.maximum(_left(bracket), 0), tl.maximum(inside - 1, 0))


@triton.jit(do_not_specialize=COUNTS)
def bracket_kernel(
    arrays, from_0, from_1, count_0, count_1, rank_0, rank_1, sample_0, sample_1, LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a graph: the ends of a bracket, from a sample of its source."""
    T: tl.constexpr = arrays.entropies.dtype.element_ty
    graph = tl.program_id(0)
    bracket = arrays.brackets + (LEVEL * 2 + graph) * FIELDS
    count, rank = wide(tl.where(graph == 0, count_0, count_1)), wide(tl.where(graph == 0, rank_0, rank_1))
    if LEVEL > 0:
        before = bracket - 2 * FIELDS
        count = tl.minimum(tl.load(before + INSIDE), count)
        rank = _rank_inside(before, count)
    values = _source(arrays, tl.where(graph == 0, from_0, from_1), LEVEL)
    sample, size = arrays.samples + tl.where(graph == 0, 0, sample_0), tl.where(graph == 0, sample_0, sample_1)
    # Where all entropies are not stored, the sample is there: sample_kernel computed it.
    gathered = tl.where((LEVEL == 0) & (tl.where(graph == 0, from_0, from_1) < 0), 0, size)
    for start in range(0, gathered, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = k.to(tl.int64) * HASH % tl.maximum(count, 1)
        tl.store(sample + k, tl.load(values + at, k < size * tl.minimum(count, 1), 0.0), k < size)
    tl.debug_barrier()
    share = rank.to(tl.float32) / tl.maximum(count - 1, 1).to(tl.float32)
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    margin = root(share * (1.0 - share) * size) * DEVIATIONS + 2.0
    first = (share * (size - 1) - margin).to(tl.int32)
    last = (share * (size - 1) + margin).to(tl.int32)
    low, _ = order_statistic(sample, size, tl.maximum(first, 0), BLOCK)
    high, _ = order_statistic(sample, size, tl.minimum(last, size - 1), BLOCK)
    # An end of the sample is none of the source.
    low = tl.where(first < 0, to_key(tl.full([], float("-inf"), T)), low)
    high = tl.where(last >= size, to_key(tl.full([], float("inf"), T)), high)
    tl.store(bracket + LOW, wide(low))
    tl.store(bracket + HIGH, wide(high))
    tl.store(bracket + COUNT, count)
    tl.store(bracket + RANK, rank)


@triton.jit(do_not_specialize=COUNTS)
def count_kernel(
    arrays, from_0, from_1, count_0, count_1, to_0, to_1, room_0, room_1, jobs_0, LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program BLOCK entropies: where they lie to the bracket, and those inside, collected in any order."""
    job = tl.program_id(0)
    graph = (job >= jobs_0).to(tl.int32)
    job -= graph * jobs_0
    bracket = arrays.brackets + (LEVEL * 2 + graph) * FIELDS
    count = wide(tl.where(graph == 0, count_0, count_1))
    if LEVEL > 0:
        count = tl.load(bracket + COUNT)
    at = wide(job) * BLOCK + tl.arange(0, BLOCK)
    if wide(job) * BLOCK < count:
        there = at < count
        x = tl.load(_source(arrays, tl.where(graph == 0, from_0, from_1), LEVEL) + at, there, float("nan"))
        key = to_key(x)
        low, high = tl.load(bracket + LOW).to(key.dtype), tl.load(bracket + HIGH).to(key.dtype)
        inside = (there & (key > low) & (key < high)).to(tl.int32)
        found = tl.sum(inside, 0)
        tl.atomic_add(bracket + BELOW, wide(tl.sum((there & (key < low)).to(tl.int32), 0)), sem="relaxed")
        tl.atomic_add(bracket + AT_LOW, wide(tl.sum((there & (key == low)).to(tl.int32), 0)), sem="relaxed")
        equal = there & (key == high) & (high > low)
        tl.atomic_add(bracket + AT_HIGH, wide(tl.sum(equal.to(tl.int32), 0)), sem="relaxed")
        first = tl.atomic_add(bracket + INSIDE, wide(found), sem="relaxed")
        place = first + tl.cumsum(inside, 0) - 1
        out = arrays.collected + wide(tl.where(graph == 0, to_0, to_1))
        tl.store(out + place, x, (inside > 0) & (place < tl.where(graph == 0, room_0, room_1)))


@triton.jit
def _interpolated(low, high, weight):
    """``torch.lerp``, as it rounds on a device: one fused multiply-add."""
    apart = high - low
    start, slope = tl.where(weight < 0.5, low, high), tl.where(weight < 0.5, weight, weight - 1.0)
    if low.dtype == tl.float64:
        x = tl.fma(slope, apart, start)
    else:  # in float64 product and sum of float32 numbers round once, to float32
        x = (slope.to(tl.float64) * apart.to(tl.float64) + start.to(tl.float64)).to(tl.float32)
    return x


@triton.jit(do_not_specialize=COUNTS)
def exact_kernel(
    arrays,
    from_0, from_1, count_0, count_1, rank_0, rank_1,  # of all entropies
    to_0, to_1, room_0, room_1,  # of what the last bracket left
    weights,  # of the entropy at the rank after, of each graph: a number in two parts
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a graph: among what the last bracket left, or among all entropies if a bracket missed."""
    T: tl.constexpr = arrays.entropies.dtype.element_ty
    graph = tl.program_id(0)
    weight = tl.where(graph == 0, number(weights[0], T), number(weights[1], T))
    count, rank = wide(tl.where(graph == 0, count_0, count_1)), wide(tl.where(graph == 0, rank_0, rank_1))
    values = _source(arrays, tl.where(graph == 0, from_0, from_1), 0)
    held = rank >= 0
    for level in tl.static_range(LEVELS):
        bracket = arrays.brackets + (level * 2 + graph) * FIELDS
        below, at_low = tl.load(bracket + BELOW), tl.load(bracket + AT_LOW)
        inside, at_high = tl.load(bracket + INSIDE), tl.load(bracket + AT_HIGH)
        here, source = tl.load(bracket + RANK), tl.load(bracket + COUNT)
        if level + 1 < LEVELS:  # the next bracket's source is what found room
            room = tl.load(bracket + 2 * FIELDS + COUNT)
        else:
            room = wide(tl.where(graph == 0, room_0, room_1))
        after = tl.minimum(here + (weight > 0).to(tl.int64), source - 1)
        held = held & (here >= below) & (after < below + at_low + inside + at_high) & (inside <= room)
    if LEVELS > 0:
        last = arrays.brackets + ((LEVELS - 1) * 2 + graph) * FIELDS
        inside = tl.load(last + INSIDE)
        rank = tl.where(held, _rank_inside(last, inside), rank)
        count = tl.where(held, inside, count)
        if held:
            values = _source(arrays, tl.where(graph == 0, to_0, to_1), 1)
    low, high = order_statistic(values, count, rank, BLOCK)
    for k in tl.static_range(LEVELS):
        bracket = arrays.brackets + ((LEVELS - 1 - k) * 2 + graph) * FIELDS
        left = _left(bracket)
        inside = tl.load(bracket + INSIDE)
        low_end, high_end = tl.load(bracket + LOW).to(low.dtype), tl.load(bracket + HIGH).to(low.dtype)
        # The rank may be an end's, and the rank after it another end's, or the first or the next of those inside.
        after = tl.where(left < 0, low, high)
        after = tl.where(left + 1 < 0, low_end, tl.where(left + 1 >= inside, high_end, after))
        here = tl.where(left < 0, low_end, tl.where(left >= inside, high_end, low))
        low, high = tl.where(held, here, low), tl.where(held, after, high)
    low = from_key(low, T)
    high = tl.where(weight > 0, from_key(high, T), low)
    threshold = _interpolated(low, high, weight)
    limit = to_key(threshold)
    kept = wide(0 * rank)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = to_key(tl.load(values + at, at < count, float("nan")))
        kept += tl.sum(((at < count) & (key <= limit)).to(tl.int32), 0)
    for level in tl.static_range(LEVELS):
        bracket = arrays.brackets + (level * 2 + graph) * FIELDS
        more = tl.load(bracket + BELOW)
        more += tl.where(tl.load(bracket + LOW).to(limit.dtype) <= limit, tl.load(bracket + AT_LOW), 0)
        more += tl.where(tl.load(bracket + HIGH).to(limit.dtype) <= limit, tl.load(bracket + AT_HIGH), 0)
        kept += tl.where(held, more, 0)
    tl.store(arrays.thresholds + graph, threshold)
    tl.store(arrays.kept + graph, kept)
    tl.store(arrays.missed + graph, tl.where(held, 0, 1))
