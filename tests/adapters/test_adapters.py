"""Each adapter against the library it is for: the example trains, and the loss is VRMLoss of the right views."""

import os
import subprocess
import sys
from pathlib import Path

import distill_helpers  # noqa: F401
import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vrm_distill import train_alone_one_epoch, validate
from vrm_distill.data import open_dataset
from vrm_kernels import DualViewDataset, VRMLoss

EXAMPLES = Path(__file__).parents[2] / "examples"


class Items(Dataset):
    """A part of the digits, an item a sample."""

    def __init__(self, part, data):
        images, self.labels = part.tensors
        self.images = data.normalized(images)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def noisy(x):
    return x + 0.2 * torch.randn_like(x)


def network(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.fixture(scope="module")
def digits():
    data = open_dataset("digits", train_images=300)
    return Items(data.train, data), Items(data.test, data)


@pytest.fixture(scope="module")
def teacher(digits):
    torch.manual_seed(0)
    model = network(64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    loader = DataLoader(DualViewDataset(digits[0], None, noisy), batch_size=50, shuffle=True)
    for _ in range(8):
        train_alone_one_epoch(model, loader, optimizer, "cpu")
    assert validate(model, DataLoader(digits[1], 100), "cpu") > 0.8
    return model


def test_torchdistill_trains_from_the_examples_yaml(digits, teacher):
    pytest.importorskip("torchdistill")
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.core.distillation import DistillationBox

    import vrm_kernels.adapters.torchdistill  # noqa: F401 (registers)

    config = load_yaml_file(str(EXAMPLES / "torchdistill.yaml"))
    student, before = network(16), {k: v.clone() for k, v in teacher.state_dict().items()}
    datasets = {"train": digits[0], "test": digits[1]}
    box = DistillationBox(teacher, student, datasets, config, torch.device("cpu"), None, False, 1)
    box.teacher_model.eval()
    losses = []
    for epoch in range(8):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, extra in box.train_data_loader:
            assert images.shape == (64, 1, 8, 8) and labels.shape == (32,)
            loss = box.forward_process(images, labels, extra)
            with torch.no_grad():
                s, t = (m(images).chunk(2) for m in (student, teacher))
            assert torch.equal(loss.detach(), VRMLoss(4.0, 2.0)(*s, *t, labels))
            box.post_forward_process(loss)
            losses.append(loss.item())
    assert sum(losses[-9:]) < 0.7 * sum(losses[:9])
    assert validate(student, DataLoader(digits[1], 100), "cpu") > 0.6
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_torchdistill_adapter_is_the_first_import_of_a_process():
    pytest.importorskip("torchdistill")
    code = """
import importlib.util, pathlib, re, sys, torch
try:
    import vrm_kernels.adapters.torchdistill
except RuntimeError as error:  # as in distill_helpers: a torchvision whose operators do not load beside this torch
    assert "operator torchvision::" in str(error), error
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    folder = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent
    library = torch.library.Library("torchvision", "FRAGMENT")
    fakes = re.findall(r'register_fake..torchvision::(\\w+)', (folder / "_meta_registrations.py").read_text())
    for name in fakes:
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import vrm_kernels.adapters.torchdistill
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
assert "VRMLoss" in MIDDLE_LEVEL_LOSS_DICT
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_torchdistill_draws_two_views(digits):
    pytest.importorskip("torchdistill")
    from vrm_kernels.adapters.torchdistill import DualViewWrapper, dual_view_collate

    wrapper = DualViewWrapper(digits[0], None, lambda x: x + 1)
    images, labels, extra = dual_view_collate([wrapper[3], wrapper[5]])
    assert torch.equal(images[:2] + 1, images[2:]) and torch.equal(images[1], digits[0][5][0])
    assert labels.tolist() == [digits[0][3][1], digits[0][5][1]] and extra == {}


def test_lightning_trains(digits, teacher, tmp_path):
    lightning = pytest.importorskip("lightning")
    from vrm_kernels.adapters.lightning import Distillation

    torch.manual_seed(0)
    module = Distillation(teacher, network(16), VRMLoss(4.0, 2.0))
    assert not any("teacher" in name for name in module.state_dict())
    trainer = lightning.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = DataLoader(DualViewDataset(digits[0], None, noisy), batch_size=30, shuffle=True)
    trainer.fit(module, loader, DataLoader(digits[1], 100))
    logged = {name: float(x) for name, x in trainer.callback_metrics.items()}
    assert logged["validation_accuracy"] == pytest.approx(validate(module.student, DataLoader(digits[1], 100), "cpu"))
    assert logged["validation_accuracy"] > 0.6 and logged["kept_inter_sample"] == pytest.approx(0.3 * 30 * 30, rel=0.03)
    assert not teacher.training


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_lightning_converts_the_teacher_with_the_student(precision, digits, teacher, tmp_path):
    lightning = pytest.importorskip("lightning")
    from copy import deepcopy

    from vrm_kernels.adapters.lightning import Distillation

    module = Distillation(deepcopy(teacher), network(16), VRMLoss(4.0, 2.0))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, precision=precision, limit_train_batches=2,
    )  # fmt: skip
    trainer.fit(module, DataLoader(DualViewDataset(digits[0], None, noisy), batch_size=30))
    assert next(module._teacher[0].parameters()).dtype == next(module.student.parameters()).dtype != torch.float32
    assert torch.isfinite(trainer.callback_metrics["loss"])


def test_mdistiller_says_what_a_loader_of_one_view_lacks():
    from vrm_kernels.adapters.mdistiller import VRM

    model = VRM(network(16), network(16)).train()
    with pytest.raises(ValueError, match=r"needs two views of each image.*got \[4, 1, 8, 8\]"):
        model(image=torch.rand(4, 1, 8, 8), target=torch.zeros(4, dtype=torch.int64))


def test_mdistiller_style_distiller():
    """mdistiller is not on the package index: its trainer's calls, as its source makes them, stand in for it."""
    from vrm_kernels.adapters.mdistiller import VRM

    class WithFeatures(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(16)

        def forward(self, x):
            return self.net(x), {"feats": []}

    torch.manual_seed(0)
    distiller = VRM(WithFeatures(), WithFeatures()).train()
    assert not distiller.teacher.training and distiller.student.training and distiller.get_extra_parameters() == 0
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), 1e-3)
    pair, labels = (torch.randn(12, 1, 8, 8), torch.randn(12, 1, 8, 8)), torch.arange(12) % 10
    logits, losses = distiller(image=pair, target=labels, epoch=1, index=None)
    sum(losses.values()).backward()
    optimizer.step()
    assert logits.shape == (12, 10) and all(p.grad is None for p in distiller.teacher.parameters())
    stacked = distiller(image=torch.stack(pair, 1), target=labels)[1]["loss_vrm"]
    assert torch.equal(stacked, distiller(image=pair, target=labels)[1]["loss_vrm"])
    assert distiller.eval()(image=pair[0]).shape == (12, 10)


def test_timm_puts_the_splits_in_this_order():
    """timm's own collate function, on samples whose first split is marked."""
    pytest.importorskip("timm")
    from timm.data.loader import fast_collate

    from vrm_kernels.adapters.timm import split_views

    samples = []
    for i in range(3):
        views = tuple(numpy.full((3, 4, 4), 10 * i + split, dtype=numpy.uint8) for split in (0, 1))
        samples.append((views, i))
    images, labels = fast_collate(samples)
    real, virtual = split_views(images)
    assert real[:, 0, 0, 0].tolist() == [0, 10, 20] and virtual[:, 0, 0, 0].tolist() == [1, 11, 21]
    first, second = split_views(labels)
    assert first.tolist() == second.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        split_views(labels[:3])
