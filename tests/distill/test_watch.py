"""A run that will come to little says so, and a student whose head starts with zeros trains all the same."""

import pytest
import torch
from distill_helpers import QUICK, plain_head, read_log, train, zero_head

from vrm_distill.data import open_dataset
from vrm_distill.settings import Settings
from vrm_distill.watch import Watch

RUN = [*QUICK, "--baselines=none", "--seeds=1", "--train-images=300"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch") / "run"
    assert train(*RUN, "--teacher-epochs=8", "--teacher-lr=0.01", "--epochs=1", f"--output-dir={folder}") == 0
    return f"--teacher-checkpoint={folder / 'teacher.safetensors'}"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_student_with_a_head_of_zeros_trains(optimizer, teacher, tmp_path, capsys):
    accuracies = {}
    for head in ("zero_head", "plain_head"):
        folder = tmp_path / head
        rates = {"sgd": "0.1", "adamw": "0.01"}
        arguments = [f"--student=distill_helpers:{head}", f"--optimizer={optimizer}", f"--lr={rates[optimizer]}"]
        arguments += [teacher, "--alpha=4", "--beta=2", "--epochs=8"]
        assert train(*RUN, *arguments, f"--output-dir={folder}") == 0
        said, rows = capsys.readouterr().out, read_log(folder)
        accuracies[head] = float(rows[-1]["test_accuracy"])
        assert ("starts with the same logits for all images" in " ".join(said.split())) == (head == "zero_head")
        assert all(float(row["clipped"]) == 0 and float(row["grad_norm"]) < 100 for row in rows[1:])
    assert accuracies["zero_head"] > accuracies["plain_head"] - 0.1


def test_clipping_bounds_the_step_and_is_logged(tmp_path):
    arguments = [*RUN, "--optimizer=sgd", "--momentum=0", "--lr=0.1", "--epochs=1", "--teacher-epochs=1"]
    assert train(*arguments, "--clip-grad=0.001", f"--output-dir={tmp_path / 'clipped'}") == 0
    assert train(*arguments, "--clip-grad=0", f"--output-dir={tmp_path / 'free'}") == 0
    rows = {name: read_log(tmp_path / name) for name in ("clipped", "free")}
    assert all(float(row["clipped"]) == 1 and float(row["grad_norm"]) > 0.01 for row in rows["clipped"])
    assert all(row["clipped"] == row["grad_norm"] == "" for row in rows["free"])
    assert train(*arguments, f"--output-dir={tmp_path / 'usual'}") == 0
    usual = read_log(tmp_path / "usual")
    assert [row["train_loss"] for row in usual] == [row["train_loss"] for row in rows["free"]]
    assert {row["clipped"] for row in usual} == {"0"}


def _said(look):
    said = []
    look(Watch(said.append, []))
    return said


def test_every_warning():
    data, settings = open_dataset("digits", train_images=100), Settings(alpha=4.0, beta=2.0)
    terms = {"ce_real": 1.0, "ce_virtual": 1.0, "inter_sample": 40.0, "inter_class": 21.0}
    (said,) = _said(lambda watch: watch.step(2, terms, 3.0, settings, "distilled, seed 0"))
    assert "the relations are 101 times the cross-entropies at step 2 of distilled, seed 0" in said
    assert not _said(lambda watch: watch.step(2, terms | {"inter_class": 19.0}, 9e5, settings, "x"))
    (said,) = _said(lambda watch: watch.step(1, {"ce_real": 1.0}, 2e6, settings, "x"))
    assert "a norm of 2.0e+06 at step 1 of x" in said
    (said,) = _said(lambda watch: watch.teacher(0.13, 600, data))
    assert "the teacher is near chance, 13.0% of 600 test images" in said
    assert not _said(lambda watch: watch.teacher(0.15, 600, data))
    (said,) = _said(lambda watch: watch.sizes(10, 11, 1, settings))
    assert "has 11 parameters, more than the 10 of its teacher" in said
    (said,) = _said(lambda watch: watch.sizes(10, 10, 2, settings))
    assert "--gather-distributed" in said
    assert not _said(lambda watch: watch.sizes(10, 10, 2, Settings(gather_distributed=True)))
    watch = Watch(lambda _: None, [])
    watch.sizes(10, 11, 1, settings)
    watch.sizes(10, 11, 1, settings)
    assert len(watch.warnings) == 1
    torch.manual_seed(0)
    assert _said(lambda watch: watch.starts_equal(zero_head(1, 10), data, settings))
    assert not _said(lambda watch: watch.starts_equal(plain_head(1, 10), data, settings))
