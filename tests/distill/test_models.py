"""Models by name: the literature's sizes, libraries' and one's own; misfits are named before training."""

import re
import sys

import distill_helpers  # noqa: F401
import pytest
import torch
from torch import nn

from vrm_distill import models
from vrm_distill.models import MODELS, check_classes, check_name, create_model, is_known, parameter_count

# Millions of parameters at 100 classes, as the papers that compare them give them.
LITERATURE = {
    "resnet20": 0.28, "resnet32": 0.47, "resnet56": 0.86, "resnet110": 1.74, "resnet8x4": 1.23, "resnet32x4": 7.43,
    "wrn_16_2": 0.70, "wrn_40_1": 0.57, "wrn_40_2": 2.26, "mobilenetv2": 0.81, "resnet18": 11.22, "resnet34": 21.33,
}  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), LITERATURE.items())
def test_sizes_are_the_literatures(name, millions):
    with torch.device("meta"):
        assert round(parameter_count(create_model(name, 3, 100)) / 1e6, 2) == millions


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet110", "resnet34", "resnet18")])
def test_every_model_takes_images_and_gives_logits(name):
    model = create_model(name, 1, 7)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    check_classes("student", name, model, 1, (12, 9), 7)
    assert model.training


def test_ones_own_factory():
    name = "distill_helpers:lazy_linear"
    check_name(name)
    assert not is_known(name)
    model = create_model(name, 1, 5)
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet9000", "resnet8x4"),
        ("nowhere.at_all:factory", "cannot import"),
        ("vrm_kernels:nothing", "cannot import"),
        ("vrm_kernels:__name__", "not a function"),
        ("timm:no_such_model", "no model"),
        ("torchvision:no_such_model", "no classification model"),
    ],
)
def test_names_that_mean_nothing_are_refused(name, wanted):
    if name.partition(":")[0] in ("timm", "torchvision"):
        pytest.importorskip(name.partition(":")[0])
    with pytest.raises(ValueError, match=wanted):
        check_name(name)


def test_library_that_is_absent_or_of_another_torch(monkeypatch):
    keep_torch = f"pip install timm torchvision torch=={torch.__version__}"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        with pytest.raises(ValueError, match=re.escape(f"timm:resnet18 needs timm: {keep_torch}")):
            check_name("timm:resnet18")

    def fail(_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(models.importlib, "import_module", fail)
    with pytest.raises(ValueError, match=r"nms does not exist\).* the one made for torch") as error:
        check_name("timm:resnet18")
    assert keep_torch in str(error.value)


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:mobilenet_v3_small"])
def test_models_of_libraries(name):
    pytest.importorskip(name.partition(":")[0])
    assert is_known(name)
    model = create_model(name, 3, 9)
    check_classes("teacher", name, model, 3, (32, 32), 9)
    with pytest.raises(ValueError, match=r"the teacher .* tells 9 classes apart, the data have 10"):
        check_classes("teacher", name, model, 3, (32, 32), 10)


def test_images_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="cannot take images of 3 x 8 x 8"):
        check_classes("student", "resnet8", create_model("resnet8", 1, 10), 3, (8, 8), 10)
    with pytest.raises(ValueError, match=r"must give logits \[B, 10\], it gives shape"):
        check_classes("student", "conv", nn.Conv2d(3, 10, 1), 3, (8, 8), 10)
