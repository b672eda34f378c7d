"""Order statistics by digits: exact on any numbers, in any number of parts."""

import pytest
import torch

from vrm_kernels import backends
from vrm_kernels.graph import selection

CHOSEN = [name for name in ("torch", "cpp") if backends.REGISTRY[name].status()[0]]
KINDS = pytest.mark.parametrize("kind", ["random", "ties", "extremes", "equal"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def numbers(kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 600, generator=generator, dtype=dtype)
    if kind == "ties":
        return (2 * x).round()
    if kind == "extremes":
        limits = torch.finfo(dtype)
        values = [torch.inf, -torch.inf, limits.max, limits.min, limits.tiny, -limits.tiny, limits.tiny / 4, 0.0, -0.0]
        x[:, : 30 * len(values)] = torch.tensor(values, dtype=dtype).repeat(30)
    if kind == "equal":
        x[:] = -1.5
    return x


@pytest.mark.parametrize("name", CHOSEN)
@FLOATS
@KINDS
def test_order_statistics_are_those_of_a_sort(kind, dtype, name):
    count_digits = backends.REGISTRY[name].load().count_digits
    for seed in range(5):
        x = numbers(kind, dtype, seed)
        ranks = torch.randint(600, (2, 2), generator=torch.Generator().manual_seed(seed))
        ranks[0] = torch.tensor([0, 599])

        def count(prefixes, shift, bits, x=x):
            parts = [
                [count_digits(part.contiguous(), p, shift, bits) for part in row.view(6, 100).split(4)]
                for row, p in zip(x, prefixes, strict=True)
            ]
            return torch.stack([sum(row) for row in parts])

        values, at_most = selection.order_statistics(count, ranks, dtype)
        expected = x.sort(1).values.gather(1, ranks)
        assert torch.equal(values, expected)  # compares -0 and 0 as equal
        assert torch.equal(at_most, (x[:, None] <= expected[..., None]).sum(-1))


@FLOATS
def test_keys_are_in_the_order_of_the_floats(dtype):
    x = numbers("extremes", dtype, 0)[0].unique()
    key = selection.keys(x)
    assert bool((key.diff() > 0).all())
    assert torch.equal(selection.from_keys(key, dtype), x)
    assert bool(selection.keys(torch.tensor([torch.nan], dtype=dtype)) > key.max())


@pytest.mark.parametrize("name", CHOSEN)
@FLOATS
@KINDS
def test_a_split_counts_outside_and_collects_inside(kind, dtype, name):
    """Between ends that are among the numbers, are the same, are none of them, or are infinite."""
    split = backends.REGISTRY[name].load().split
    for rows, seed in ((1, 0), (40, 1), (1200, 2)):
        x = numbers(kind, dtype, seed).view(rows, -1)
        padded = torch.nn.functional.pad(x, (0, 5), value=0.0)[:, : x.shape[1]]
        values = x.unique()
        low, high = float(values[len(values) // 3]), float(values[2 * len(values) // 3])
        for ends in (
            (low, high),
            (low, low),
            (low, torch.inf),
            (-torch.inf, high),
            (-torch.inf, torch.inf),
            (3e9, 4e9),
        ):
            counts, inside = split(padded, *ends)
            at_high = (x == ends[1]).sum() if ends[0] < ends[1] else 0
            assert counts.tolist() == [(x < ends[0]).sum(), (x == ends[0]).sum(), at_high]
            assert torch.equal(inside.sort().values, x[(x > ends[0]) & (x < ends[1])].sort().values)


@pytest.mark.parametrize("name", CHOSEN)
@FLOATS
def test_a_split_collects_nan(dtype, name):
    split = backends.REGISTRY[name].load().split
    x = torch.zeros(3, 50, dtype=dtype)
    x[1, 7] = x[2, 40] = torch.nan
    counts, inside = split(x, -2.0, -1.0)
    assert counts.tolist() == [0, 0, 0] and inside.isnan().tolist() == [True, True]
    assert split(x[:, :0], 0.0, 1.0)[1].numel() == 0


@FLOATS
def test_a_bracket_holds_its_ranks(dtype):
    """As wide as the rank is uncertain, and open at the ends of the sample."""
    n = 2**13
    sample = torch.arange(n, dtype=dtype)[torch.randperm(n)]
    for rank in (0, 3, 500, n // 2, n - 600, n - 2):
        margin = 6 * (rank * (1 - rank / (n - 1))) ** 0.5 + 2
        low, high = selection.bracket(sample, [rank, rank + 1], n).tolist()
        assert low == pytest.approx(rank - margin, abs=2) if rank > margin + 1 else low == -torch.inf
        assert high == pytest.approx(rank + 1 + margin, abs=2) if rank + margin < n - 3 else high == torch.inf


@FLOATS
def test_keys_inside_a_bracket_begin_with_the_common_prefix(dtype):
    width, eps = torch.finfo(dtype).bits, torch.finfo(dtype).eps
    # A difference of a quarter leaves the exponent and two bits of 4.0; numbers of both signs have nothing in common.
    mantissa = 23 if dtype == torch.float32 else 52
    for pair, wanted in (
        ((4.0, 4.9), mantissa - 2), ((3.99, 4.0), mantissa + 1), ((-1e-9, 2.0), width), ((-torch.inf, 1.0), width),
        ((1.0, torch.inf), width - 1), ((5.0, 5.0), 1), ((1.0, 1.0 + eps), 1),
    ):  # fmt: skip
        (prefix,), unknown = selection.common_prefix(torch.tensor([pair], dtype=dtype))
        assert unknown == wanted
        between = torch.linspace(max(pair[0], -9.0), min(pair[1], 9.0), 50, dtype=dtype)
        assert unknown == width or {key >> unknown for key in selection.keys(between).tolist()} == {prefix}
    ends = torch.tensor([(4.0, 4.1), (1.0, torch.inf)], dtype=dtype)
    prefixes, unknown = selection.common_prefix(ends)
    assert unknown == width - 1 and prefixes == [key >> unknown for key in selection.keys(ends[:, 0]).tolist()]


def test_digits_cover_the_unknown_bits():
    for unknown in range(1, 65):
        digits = selection.digits(unknown)
        ends = [unknown, *(shift for shift, _ in digits)]
        assert [shift + bits for shift, bits in digits] == ends[:-1] and ends[-1] == 0
        assert max(bits for _, bits in digits) <= selection.DIGIT_BITS


def test_places_spread_over_the_rows_and_columns():
    rows, columns = selection.places(slice(1000, 9192), 64, 33)
    for place, n in ((rows, 64), (columns, 33), (rows * 33 + columns, 64 * 33)):
        counts = place.bincount(minlength=n)
        assert len(counts) == n and counts.min() > 0 and counts.max() <= 2 * 8192 // n + 2
