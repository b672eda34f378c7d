"""The threshold's quantile is torch.quantile's, bit for bit, and goes on where torch.quantile stops."""

import ctypes
import math

import pytest
import torch

import vrm_kernels.functional as VF
from vrm_kernels.graph import pruning

QS = [0.0, 1e-9, 0.01, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.999, 0.9999999, 1.0]
SIZES = [1, 2, 3, 4, 10, 11, 101, 1000, 4097, 65_537]
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def same_bits(x, y):
    """Equal, NaN where the other is."""
    return x.dtype == y.dtype and x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def data(kind, n, dtype):
    generator = torch.Generator(torch.get_default_device()).manual_seed(n)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == "tied":
        x = (2 * x).round()
    elif kind == "all equal":
        x = torch.full((n,), 0.1, dtype=torch.float64)
    elif kind == "wide":
        x = x * 10.0 ** (30 * torch.rand(n, generator=generator) - 15)
    elif kind == "positive infinities":
        x[torch.rand(n, generator=generator) < 0.3] = torch.inf
    elif kind == "negative infinities":
        x[torch.rand(n, generator=generator) < 0.3] = -torch.inf
    elif kind == "denormal":
        x = x * (1e-310 if dtype == torch.float64 else 1e-40)
    elif kind == "one NaN":
        x[n // 2] = torch.nan
    return x.to(dtype)


KINDS = [
    "random", "tied", "all equal", "wide", "positive infinities", "negative infinities", "denormal", "one NaN",
]  # fmt: skip


@FLOATS
@pytest.mark.parametrize("kind", KINDS)
def test_quantile_is_torchs(kind, dtype):
    for n in SIZES:
        x = data(kind, n, dtype)
        for q in QS:
            assert same_bits(VF.quantile(x, q), torch.quantile(x, q)), (n, q)


@FLOATS
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_a_whole_rank_does_not_look_at_the_next_value(infinity, dtype):
    """Beside an infinity, lerp by 0 would be NaN: torch takes the value itself."""
    x = torch.tensor([1.0, infinity, 2.0, infinity, 3.0], dtype=dtype)
    for q in (0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.8, 1.0):
        assert same_bits(VF.quantile(x, q), torch.quantile(x, q)), q
    qs = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=dtype)
    assert same_bits(VF.quantile(x, qs), torch.quantile(x, qs))


@FLOATS
def test_rank_is_torchs(dtype):
    """The rank that backends work from, through values whose gaps make any other weight show."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    for n in [*range(1, 40), 1001, 12_345, 90_000, 2**20 + 7]:
        x = torch.rand(n, generator=generator, dtype=dtype).cumsum(0)
        ordered = x.sort().values
        for q in QS:
            below, weight = pruning.rank(q, n, dtype)
            assert 0 <= below <= n - 1 and 0 <= weight < 1
            high = ordered[below + 1] if weight > 0 else ordered[below]
            value = ordered[below].lerp(high, torch.tensor(weight, dtype=dtype))
            assert torch.equal(value, torch.quantile(x, q)), (n, q)


@FLOATS
def test_rank_as_tensors_is_rank(dtype):
    x = torch.zeros(1, dtype=dtype)
    for n in [*range(1, 40), 1001, 12_345, 90_000, 2**20 + 7, 2**24 - 1, 2**24, 2**24 + 1, 10**9 + 7]:
        for q in QS:
            below, weight = pruning.ranks(q, n, x)
            expected = pruning.rank(q, n, dtype)
            assert int(below) == expected[0], (n, q)
            assert torch.equal(weight, torch.tensor(expected[1], dtype=dtype)), (n, q)


def test_rank_is_torchs_at_its_largest_size():
    """2**24 ordered values, their own index: what torch.quantile returns is the rank it formed, rounded to float32."""
    n = 2**24
    ordered = torch.arange(n, dtype=torch.float32)
    expected = torch.quantile(ordered, torch.tensor(QS))
    for q, value in zip(QS, expected, strict=True):
        below, weight = pruning.rank(q, n, torch.float32)
        above = ordered[below + 1] if weight > 0 else ordered[below]
        assert torch.equal(ordered[below].lerp(above, torch.tensor(weight)), value), q


def test_beyond_the_older_torchs_limit():
    n = 2**24 + 12_345
    x = torch.randn(n, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    if pruning.ROUNDED_UP_TO:
        with pytest.raises(RuntimeError, match="too large"):
            torch.quantile(x, 0.3)
    for q in (0.0, 0.3, 1.0):
        position = ctypes.c_float(q).value * (n - 1)
        below, above = math.floor(position), math.ceil(position)
        weight = torch.tensor(position - below, dtype=torch.float32)
        low, high = x.kthvalue(below + 1).values, x.kthvalue(above + 1).values
        expected = low.lerp(high, weight)
        assert torch.equal(VF.quantile(x, q), expected)
        assert pruning.ROUNDED_UP_TO or torch.equal(torch.quantile(x, q), expected)
    x[n // 2] = torch.nan
    assert VF.quantile(x, 0.3).isnan()


@FLOATS
def test_q_may_be_a_tensor(dtype):
    x = data("random", 1001, dtype)
    for q in (torch.tensor(0.3, dtype=dtype), torch.tensor(QS, dtype=dtype), torch.tensor([0.5], dtype=dtype)):
        value = VF.quantile(x, q)
        assert value.shape == q.shape and same_bits(value, torch.quantile(x, q))
    assert VF.quantile(x, torch.empty(0, dtype=dtype)).shape == (0,)


def test_any_shape_and_stride_and_half_precision():
    x = torch.randn(7, 5, 3)
    assert torch.equal(VF.quantile(x.transpose(0, 2)[:, ::2], 0.3), torch.quantile(x.transpose(0, 2)[:, ::2], 0.3))
    for dtype in (torch.float16, torch.bfloat16):
        value = VF.quantile(x.to(dtype), 0.3)
        assert value.dtype == torch.float32 and torch.equal(value, torch.quantile(x.to(dtype).float(), 0.3))
    x.requires_grad_()
    assert not VF.quantile(x, 0.3).requires_grad


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan"), torch.tensor(1.5), torch.tensor([0.5, float("nan")])])
def test_q_outside_the_unit_interval_is_refused(q):
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got"):
        VF.quantile(torch.randn(5), q)


def test_other_refusals():
    with pytest.raises(ValueError, match="at least one element"):
        VF.quantile(torch.empty(0), 0.5)
    with pytest.raises(TypeError, match="x must be floating .* got torch.int64"):
        VF.quantile(torch.arange(5), 0.5)
    with pytest.raises(TypeError, match="q must be floating"):
        VF.quantile(torch.randn(5), torch.tensor(1))
    with pytest.raises(ValueError, match=r"0-D or 1-D tensor, got shape \(1, 1\)"):
        VF.quantile(torch.randn(5), torch.tensor([[0.5]]))
    with pytest.raises(TypeError, match="q must be a number, got str"):
        VF.quantile(torch.randn(5), "0.5")


def sampled_places(n: int) -> list[int]:
    """Where csrc/cpu/select.h takes its sample of ``n`` numbers: splitmix64, mod n."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    return [mix(k) % n for k in range(int(n**0.6))]


def tied(n: int) -> torch.Tensor:
    return torch.cat([torch.full((n // 2,), 0.1), torch.full((n // 2,), 0.3)])


def planted(n: int) -> torch.Tensor:
    """The sample sees the largest numbers alone, so that the bracket misses and passes over digits find the value."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    x[sampled_places(n)] += 100
    return x


@pytest.mark.parametrize("make", [tied, planted])
def test_several_threads_again_and_again(make):
    """No thread may run ahead."""
    threads = torch.get_num_threads()
    x = make(140_000)
    try:
        torch.set_num_threads(4)
        for q in (0.1, 0.3, 0.7):
            assert {float(VF.quantile(x, q)) for _ in range(30)} == {float(torch.quantile(x, q))}
    finally:
        torch.set_num_threads(threads)
