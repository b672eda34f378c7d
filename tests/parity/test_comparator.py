"""The comparator fails on a wrong result: in one entry, in the loss, in the mask, and in a backend that is wrong."""

import pytest
import torch
from device import beyond_rounding
from helpers import (
    FLOOR,
    Case,
    Result,
    assert_close,
    assert_parity,
    errors,
    expected_of,
    relative_error,
)

from vrm_kernels import backends

CASE = Case((17, 31), seed=1700)
SINGLE = torch.float32


def with_grad(result: Result, k: int, grad: torch.Tensor) -> Result:
    return result._replace(grads=tuple(grad if j == k else x for j, x in enumerate(result.grads)))


@pytest.fixture
def results():
    oracle, eager, _ = expected_of(CASE, SINGLE, 1.0, 0.0)
    assert_close(eager, oracle, eager, FLOOR[SINGLE])
    return oracle, eager


@pytest.mark.parametrize("k", [0, 1])
def test_one_entry_off_by_a_thousandth_fails(results, k):
    oracle, eager = results
    grad = eager.grads[k].flatten()
    typical = (grad.abs() - grad.square().mean().sqrt()).abs().argmin()  # the entry nearest the root mean square
    grad[typical] *= 1 + 1e-3
    grad = grad.view(CASE.shape)
    with pytest.raises(AssertionError, match=f"grad {k}: relative error"):
        assert_close(with_grad(eager, k, grad), oracle, eager, FLOOR[SINGLE])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda grad: grad * (1 + 1e-4),
        lambda grad: -grad,
        lambda grad: grad * 0,
        lambda grad: grad.roll(1, 0),
        lambda grad: torch.cat((grad[:-1], grad[-1:] * 1.01)),
        lambda grad: grad.masked_fill(grad == grad.max(), torch.nan),
        lambda grad: grad.masked_fill(grad == grad.max(), torch.inf),
    ],
)
def test_a_wrong_gradient_fails(results, spoil):
    oracle, eager = results
    for k in (0, 1):
        with pytest.raises(AssertionError, match=f"grad {k}"):
            assert_close(with_grad(eager, k, spoil(eager.grads[k])), oracle, eager, FLOOR[SINGLE])


@pytest.mark.parametrize("factor", [1 + 1e-4, 0.0, -1.0, torch.nan])
def test_a_wrong_loss_fails(results, factor):
    oracle, eager = results
    with pytest.raises(AssertionError, match="loss: relative error"):
        assert_close(eager._replace(loss=eager.loss * factor), oracle, eager, FLOOR[SINGLE])


def test_one_edge_more_fails(results):
    oracle, eager = results
    with pytest.raises(AssertionError, match="kept"):
        assert_close(eager._replace(kept=(eager.kept[0] + 1, eager.kept[1])), oracle, eager, FLOOR[SINGLE])


def test_swapped_views_fail(results):
    oracle, eager = results
    with pytest.raises(AssertionError, match="grad 0"):
        assert_close(eager._replace(grads=eager.grads[::-1]), oracle, eager, FLOOR[SINGLE])


def test_the_eager_error_it_allows_is_small(results):
    """The bar is relative to eager float32: were that loose, so would the bar be."""
    oracle, eager = results
    assert max(errors(eager, oracle).values()) < 2e-6


def test_where_the_oracle_is_zero_only_zero_is_close():
    zero, tiny = torch.zeros(3), torch.tensor([0.0, 1e-30, 0.0])
    assert relative_error(zero, zero) == 0
    assert relative_error(tiny, zero) == float("inf")
    assert relative_error(torch.full((3,), torch.nan), torch.ones(3)) == float("inf")


@pytest.mark.parametrize("output", ["loss", "grad_real", "grad_virtual", "kept"])
def test_a_backend_that_is_wrong_by_a_ten_thousandth_fails(backend, output, monkeypatch):
    """Through the whole path: operator, autograd rule, evaluation."""
    chosen = backends.REGISTRY[backend].load()
    right = chosen.vrm_loss

    def wrong(*args):
        result = right(*args)
        value = getattr(result, output)
        return result._replace(**{output: value + 1 if output == "kept" else value * (1 + 1e-4)})

    assert_parity(backend, CASE)
    monkeypatch.setattr(chosen, "vrm_loss", wrong)
    with pytest.raises(AssertionError, match="relative error|kept"):
        assert_parity(backend, CASE)


def test_gradients_too_small_for_their_dtype_are_compared_in_its_spacing():
    """float16 has numbers 6e-8 apart near zero: of gradients of 1e-6 it keeps a digit, and that is no fault."""
    oracle = 1e-6 * torch.randn(100, 100, dtype=torch.float64)
    half = oracle.half()
    assert relative_error(half, oracle) > 1e-2 and beyond_rounding(half, oracle) < 1e-9
    assert (
        beyond_rounding(half + torch.finfo(torch.float16).smallest_normal / 1024, oracle) > 1e-2
    )  # one number further
    assert beyond_rounding(1.01 * oracle, oracle) == pytest.approx(0.01, rel=1e-3)
