"""The backend triton on a GPU. The interpreter runs the same suites, interpreted.py, at smaller sizes."""

import pytest
import torch
from device import kernels_of
from helpers import Case, evaluate, make_logits
from share_checks import check_group_on_a_gpu, check_shares_on_a_gpu
from triton_suite import Blocks, Forms, OnAnyDevice, Thresholds, check_against_torch, choose

from benchmarks.gpu.warm import FLOAT64, LARGE, RAGGED, SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STAGES = {
    "literal": {"prepare_kernel", "entropy_kernel", "exact_kernel", "literal_kernel", "finish_kernel"},
    "dense": {"prepare_kernel", "moments_kernel", "pack_kernel", "dense_kernel", "gradients_kernel", "exact_kernel",
              "bracket_kernel", "count_kernel", "literal_kernel", "finish_kernel"},
}  # fmt: skip


class TestForms(Forms):
    shape, shapes, float64_shape = (67, 101), RAGGED, FLOAT64


class TestOnAGpu(OnAnyDevice):
    name = "triton"
    kernels = {"literal": SMALL, "dense": LARGE}  # noqa: RUF012
    own = {"literal"}  # noqa: RUF012

    @pytest.fixture(params=["literal", "dense"])
    def kind(self, request):
        return request.param

    def test_each_shape_takes_its_form(self, kind, shape):
        """What is said above of forms is said of these kernels."""
        logits = self.logits(Case(shape))
        names = kernels_of(lambda: evaluate(self.name, logits))
        other = STAGES["dense"] - STAGES["literal"] if kind == "literal" else {"entropy_kernel"}
        assert STAGES[kind] <= names and not names & other, names


class TestBlocks(Blocks):
    pass


class TestThresholds(Thresholds):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dense_form_follows_the_torch_backend_in_float64(dtype):
    check_against_torch("triton", LARGE, dtype, "cuda")


@pytest.mark.parametrize("form", ["literal", "dense"])
def test_shares_on_the_device(monkeypatch, form):
    choose(monkeypatch, form)
    for dtype in (torch.float32, torch.float64):
        check_shares_on_a_gpu("triton", dtype)


def test_a_group_of_one_process(monkeypatch):
    check_group_on_a_gpu("triton", "inter_view", monkeypatch)


def test_a_second_device_is_used_where_the_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    logits = [x.to("cuda:1") for x in make_logits(Case(SMALL), torch.float32, 0)]
    assert evaluate("triton", logits).loss.device == torch.device("cuda:1")


def test_more_edges_than_32_bits_count():
    """50000 x 50000 edges, whose entropies are computed twice. Labels apart, all rows are random."""
    if torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GB of GPU memory")
    logits = [x.cuda() for x in make_logits(Case((50_000, 16)), torch.float32, 0)]
    result = evaluate("triton", logits, beta=0.0)
    edges = 50_000**2
    assert abs(result.kept[0] - 0.3 * edges) < 1e-4 * edges
    assert result.loss.isfinite() and all(g.isfinite().all() for g in result.grads)
