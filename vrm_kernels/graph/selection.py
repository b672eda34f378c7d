"""Order statistics of numbers that are spread over processes, or come in blocks: by counting digits, without a sort.

Floats become signed integers of the same order (their *keys*). The leading digit of the wanted key is found by counting
how many keys have each; then the next digit among the keys that begin so; and so on. Counts from several processes or
blocks add up, so the result is exact wherever the numbers lie, and nothing but counts is exchanged. Nothing is read by
the host.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# How many bits each digit has, by the bytes of the float. Wide digits take fewer passes, each of which may have to
# compute all numbers again; narrow ones leave less to exchange.
NARROW_DIGITS = {4: (11, 11, 10), 8: (11, 11, 11, 11, 11, 9)}
WIDE_DIGITS = {4: (16, 16), 8: (16, 16, 16, 16)}


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


def order_statistics(
    count: Callable[[Tensor, int, int], Tensor], ranks: Tensor, dtype: torch.dtype, wide_digits: bool
) -> tuple[Tensor, Tensor]:
    """``(values, at_most)``: the numbers of the given ranks, and how many numbers are at most as large as each.

    Args:
        count: ``count(prefixes [G, R], shift, bits) -> [G, R, 2**bits]``, what :func:`count_digits` gives for each of G
            sets of numbers, summed over all their parts.
        ranks: ``[G, R]`` int64, of R wanted order statistics of each set, from 0.
        dtype: of the numbers.
    """
    size = torch.finfo(dtype).bits // 8
    remaining, below = ranks.clone(), torch.zeros_like(ranks)
    prefixes = torch.zeros_like(ranks)
    here = below
    shift = 8 * size
    for bits in (WIDE_DIGITS if wide_digits else NARROW_DIGITS)[size]:
        leading = shift == 8 * size
        shift -= bits
        counts = count(prefixes, shift, bits)
        cumulative = counts.cumsum(-1)
        digit = torch.searchsorted(cumulative, remaining[..., None], right=True).clamp_(max=2**bits - 1)
        here = counts.gather(-1, digit)[..., 0]
        before = cumulative.gather(-1, digit)[..., 0] - here
        remaining, below = remaining - before, below + before
        digit = digit[..., 0]
        prefixes = digit - 2 ** (bits - 1) if leading else (prefixes << bits) | digit
    return from_keys(prefixes, dtype), below + here
