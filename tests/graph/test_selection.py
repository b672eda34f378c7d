"""Order statistics by digits: exact on any numbers, in any number of parts."""

import pytest
import torch

from vrm_kernels import backends
from vrm_kernels.graph import selection

COUNTERS = {"torch": selection.count_digits}
if backends.REGISTRY["cpp"].status()[0]:
    COUNTERS["cpp"] = backends.REGISTRY["cpp"].load().count_digits


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


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "ties", "extremes", "equal"])
def test_order_statistics_are_those_of_a_sort(kind, dtype, wide, counter):
    for seed in range(5):
        x = numbers(kind, dtype, seed)
        ranks = torch.randint(600, (2, 2), generator=torch.Generator().manual_seed(seed))
        ranks[0] = torch.tensor([0, 599])

        def count(prefixes, shift, bits, x=x):
            parts = [
                [COUNTERS[counter](part.contiguous(), p, shift, bits) for part in row.view(6, 100).split(4)]
                for row, p in zip(x, prefixes, strict=True)
            ]
            return torch.stack([sum(row) for row in parts])

        values, at_most = selection.order_statistics(count, ranks, dtype, wide)
        expected = x.sort(1).values.gather(1, ranks)
        assert torch.equal(values, expected)  # compares -0 and 0 as equal
        assert torch.equal(at_most, (x[:, None] <= expected[..., None]).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_are_in_the_order_of_the_floats(dtype):
    x = numbers("extremes", dtype, 0)[0].unique()
    key = selection.keys(x)
    assert bool((key.diff() > 0).all())
    assert torch.equal(selection.from_keys(key, dtype), x)
    assert bool(selection.keys(torch.tensor([torch.nan], dtype=dtype)) > key.max())
