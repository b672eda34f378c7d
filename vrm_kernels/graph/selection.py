"""Order statistics of numbers that are spread over processes, or come in blocks: by counting, without a sort.

Floats become signed integers of the same order (their *keys*). The leading digit of the wanted key is found by counting
how many keys have each; then the next digit among the keys that begin so; and so on. Counts from several processes or
blocks add up, so the result is exact wherever the numbers lie, and nothing but counts is exchanged.

A *bracket* leaves little to count: two of a sample of the numbers, between which the wanted ones very likely lie. One
pass counts how many are outside and collects those inside, whose keys begin with what those of both ends do.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.graph import forms

DIGIT_BITS = 11  # of a digit, the last of which may have fewer: what kernels on a GPU count in shared memory
# 2^32 over the plastic number and over its square: multiples of both, mod 2^32, spread evenly over the plane.
PLANE_HASH = 3242174889, 2447445413


def keys(x: Tensor) -> Tensor:
    """int64 in the order of the floats, -0 and 0 being one; NaN lies beyond the infinities."""
    x = x + 0.0
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64).long()
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int32 if x.dtype == torch.float32 else torch.int64).max, bits)


def from_keys(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats whose :func:`keys` these are."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    return torch.where(key < 0, key ^ torch.iinfo(integer).max, key).to(integer).view(dtype)


def count_digits(x: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
    """How many keys have each digit, among those that begin with each prefix: ``[P, 2**bits]`` int64.

    Args:
        x: float32 or float64, any shape.
        prefixes: ``[P]`` int64: ``key >> (shift + bits)`` of the keys that count; ignored for the leading digit.
        shift, bits: the digit is the ``bits`` bits of the key from bit ``shift`` on.
    """
    key = keys(x).flatten()
    digit = (key >> shift) & (2**bits - 1)
    counts = torch.zeros(prefixes.numel(), 2**bits, dtype=torch.int64, device=x.device)
    if shift + bits == 8 * x.element_size():
        digit ^= 2 ** (bits - 1)  # the sign: negative keys come first
        return counts + counts[0].scatter_add(0, digit, torch.ones_like(digit))
    for prefix, row in zip(prefixes, counts, strict=True):
        row.scatter_add_(0, digit, (key >> (shift + bits) == prefix).long())
    return counts


class Known(NamedTuple):
    """What is known of the wanted numbers before any digit is counted."""

    prefixes: Tensor  # [G, R] int64: ``key >> unknown``
    unknown: int  # bits of a key
    counts: Tensor  # [G, R, 2**bits]: of the first digit that is not known


def digits(unknown: int) -> list[tuple[int, int]]:
    """``(shift, bits)`` of the digits of the ``unknown`` lowest bits of a key, the leading one first."""
    return [(max(0, end - DIGIT_BITS), min(DIGIT_BITS, end)) for end in range(unknown, 0, -DIGIT_BITS)]


def order_statistics(
    count: Callable[[Tensor, int, int], Tensor], ranks: Tensor, dtype: torch.dtype, known: Known | None = None
) -> tuple[Tensor, Tensor]:
    """``(values, at_most)``: the numbers of the given ranks, and how many numbers are at most as large as each. Nothing
    is read by the host.

    Args:
        count: ``count(prefixes [G, R], shift, bits) -> [G, R, 2**bits]``, what :func:`count_digits` gives for each of G
            sets of numbers, summed over all their parts.
        ranks: ``[G, R]`` int64, of R wanted order statistics of each set, from 0.
        dtype: of the numbers.
        known: if the numbers of each set are those that begin with what is known.
    """
    width = torch.finfo(dtype).bits
    prefixes, unknown, counts = known or (torch.zeros_like(ranks), width, None)
    remaining, below, here = ranks, torch.zeros_like(ranks), torch.zeros_like(ranks)
    for shift, bits in digits(unknown):
        if counts is None:
            counts = count(prefixes, shift, bits)
        cumulative = counts.cumsum(-1)
        digit = torch.searchsorted(cumulative, remaining[..., None], right=True).clamp_(max=2**bits - 1)
        here = counts.gather(-1, digit)[..., 0]
        before = cumulative.gather(-1, digit)[..., 0] - here
        remaining, below = remaining - before, below + before
        digit = digit[..., 0]
        prefixes = digit - 2 ** (bits - 1) if shift + bits == width else (prefixes << bits) | digit
        counts = None
    return from_keys(prefixes, dtype), below + here


def places(slots: slice, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the numbers of a ``[rows, columns]`` matrix that fill the given slots of a sample."""
    slot = torch.arange(slots.start, slots.stop)
    row, column = (((slot * factor) % 2**32 * n) >> 32 for factor, n in zip(PLANE_HASH, (rows, columns), strict=True))
    return row, column


def bracket(sample: Tensor, ranks: Sequence[int], size: int) -> Tensor:
    """The ends ``[2]`` of a bracket of two wanted ranks among ``size`` numbers, from a sample ``[S]`` of them: infinite
    where the sample does not reach so far."""
    last = len(sample) - 1
    low, high = (last * rank / max(1, size - 1) for rank in ranks)
    margin = forms.DEVIATIONS * math.sqrt(low * (1 - low / last)) + 2
    reach = math.floor(low - margin), math.ceil(high + margin)
    ends = sample.new_tensor([-torch.inf, torch.inf])
    for end, place in zip(ends, reach, strict=True):
        if 0 <= place <= last:
            end.copy_(sample.kthvalue(place + 1).values)
    return ends


def common_prefix(ends: Tensor) -> tuple[list[int], int]:
    """``([key >> unknown of each set], unknown)``: what all keys between the ends ``[G, 2]`` of each set begin with,
    and how many bits follow: as many as any of the sets needs, one at least."""
    of_ends = keys(ends).tolist()
    width = torch.finfo(ends.dtype).bits
    unknown = max(1, *(((low ^ high) & (2**width - 1)).bit_length() for low, high in of_ends))
    return [low >> unknown for low, _ in of_ends], unknown


def split(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """``(counts [3] int64, inside)``: how many numbers are below a bracket, equal to its low end, and equal to its high
    end where that is another; and the numbers strictly inside, in any order, NaN among them."""
    at_low = x == low
    counts = torch.stack([(x < low).sum(), at_low.sum(), ((x == high) & ~at_low).sum()])
    return counts, x[~((x <= low) | (x >= high))]
