"""The triton backend on a GPU: what the interpreter cannot show. Skipped, by name, where there is none."""

import pytest
import torch
from device import kernels_of, on_cpu
from helpers import (
    DTYPES,
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    Case,
    assert_close,
    evaluate,
    expected_of,
    inputs,
    make_logits,
    settings_of,
)
from share_checks import check_group_on_a_gpu, check_shares_on_a_gpu
from triton_suite import OnAnyDevice, check_against_torch

from benchmarks.gpu.warm import FLOAT64, LARGE, RAGGED, SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class TestOnAGpu(OnAnyDevice):
    name = "triton"
    kernels = {"small": SMALL, "large": LARGE}  # noqa: RUF012
    own = {"small"}  # noqa: RUF012

    @pytest.fixture(params=["small", "large"])
    def kind(self, request):
        return request.param


def on_gpu(case: Case, dtype=torch.float32):
    return [x.cuda() for x in inputs(case, dtype)]


def fresh(shape, seed, dtype=torch.float32):
    return [x.cuda() for x in make_logits(Case(shape), dtype, seed)]


def test_each_shape_takes_its_regime():
    """What the tests below say of regimes is said of these kernels."""
    for shape, dtype, own in (
        (SMALL, torch.float32, True),
        (LARGE, torch.float32, False),
        (FLOAT64, torch.float64, False),
    ):
        logits = fresh(shape, 0, dtype)
        names = kernels_of(lambda logits=logits: evaluate("triton", logits))
        assert ("edges_kernel" in names) == own and ("epilogue_kernel" in names) != own, names


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for dtype in DTYPES for shape in RAGGED if dtype != torch.float64 or shape == FLOAT64],
    ids=str,
)
def test_parity_with_the_reference_on_the_cpu(shape, relations, dtype):
    for kind, percentile in (("random", 30.0), ("opposite", 100.0), ("converged:1e-2", 100.0)):
        if shape == (1, 1) and kind != "random":
            continue
        case = Case(shape, kind=kind, relations=relations, percentile=percentile)
        floors = NEAR_CONVERGENCE_FLOOR if kind.startswith("converged") else FLOOR
        for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
            oracle, eager, uncancelled = expected_of(case, dtype, alpha, beta)
            result = on_cpu(evaluate("triton", on_gpu(case, dtype), alpha=alpha, beta=beta, **settings_of(case)))
            assert_close(result, oracle, eager, floors[dtype], uncancelled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_large_regime_follows_the_torch_backend_in_float64(dtype):
    check_against_torch("triton", LARGE, dtype, "cuda")


def test_a_second_device_is_used_where_the_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    logits = [x.to("cuda:1") for x in make_logits(Case(SMALL), torch.float32, 0)]
    assert evaluate("triton", logits).loss.device == torch.device("cuda:1")


def test_more_edges_than_32_bits_count():
    """50000 x 50000 edges, whose entropies are computed again in every pass. Labels apart, all rows are random."""
    if torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GB of GPU memory")
    logits = fresh((50_000, 16), 0)
    result = evaluate("triton", logits, beta=0.0)
    edges = 50_000**2
    assert abs(result.kept[0] - 0.3 * edges) < 1e-4 * edges
    assert result.loss.isfinite() and all(g.isfinite().all() for g in result.grads)


# ---- shares of a graph, for several processes ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shares_on_the_device(dtype):
    check_shares_on_a_gpu("triton", dtype)


@pytest.mark.parametrize("relations", MODES)
def test_a_group_of_one_process(relations, monkeypatch):
    check_group_on_a_gpu("triton", relations, monkeypatch)
