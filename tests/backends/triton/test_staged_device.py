"""The backend triton-staged on a GPU. The interpreter runs the same suites, staged_interpreted.py, at smaller sizes."""

import pytest
import torch
from device import kernels_of
from helpers import Case, evaluate
from share_checks import check_group_on_a_gpu, check_shares_on_a_gpu
from triton_suite import OnAnyDevice, StagedBlocks, StagedForms, StagedThresholds, check_against_torch, choose

from benchmarks.gpu.warm import FLOAT64, LARGE, RAGGED, SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STAGES = {
    "literal": {"prepare_kernel", "entropy_kernel", "exact_kernel", "literal_kernel", "finish_kernel"},
    "dense": {"prepare_kernel", "moments_kernel", "pack_kernel", "dense_kernel", "gradients_kernel", "exact_kernel",
              "bracket_kernel", "count_kernel", "literal_kernel", "finish_kernel"},
}  # fmt: skip
PRESENT = {"edges_kernel", "epilogue_kernel", "combine_kernel", "histogram_kernel", "total_kernel"}


class TestForms(StagedForms):
    shape, shapes, float64_shape = (67, 101), RAGGED, FLOAT64


class TestOnAGpu(OnAnyDevice):
    name = "triton-staged"
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
        assert STAGES[kind] <= names and not names & (PRESENT | other), names


class TestBlocks(StagedBlocks):
    pass


class TestThresholds(StagedThresholds):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dense_form_follows_the_torch_backend_in_float64(dtype):
    check_against_torch("triton-staged", LARGE, dtype, "cuda")


@pytest.mark.parametrize("form", ["literal", "dense"])
def test_shares_on_the_device(monkeypatch, form):
    choose(monkeypatch, form)
    check_shares_on_a_gpu("triton-staged", torch.float32)


def test_a_group_of_one_process(monkeypatch):
    check_group_on_a_gpu("triton-staged", "inter_view", monkeypatch)
