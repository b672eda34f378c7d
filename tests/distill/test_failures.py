"""Whatever goes wrong ends as a sentence that names the option, the file or the network."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from distill_helpers import QUICK, read_log, train
from PIL import Image
from torch import nn

from vrm_distill import checkpoint, cli, create_model, data, failures, recipe, run_folder, timing
from vrm_distill.cli import main
from vrm_distill.models import check_classes

TINY = [*QUICK, "--baselines=none", "--seeds=1", "--epochs=1", "--teacher-epochs=1"]


def _refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as status:
        main([*map(str, arguments)])
    assert status.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, "1e39") for option in ("--lr", "--teacher-lr", "--alpha", "--weight-decay", "--mean", "--gamma")),
        *((option, "nan") for option in ("--mean", "--std", "--clip-grad")),
        *((option, "9" * 30) for option in ("--seed", "--epochs", "--threads", "--workers", "--image-size")),
        ("--threads", "100000"),
    ],
)
def test_numbers_that_overflow_where_they_are_used(option, value, capsys):
    said = _refusal(capsys, option, value)
    assert said.startswith(f"vrm-distill: error: argument {option}: must be") and f"got {value}" in said


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("alpha: [1, 2]", "alpha takes one value, got [1, 2]"),
        ("epochs: {a: 1}", "epochs takes one value, got {'a': 1}"),
        ("mean: {a: 1}", "mean takes values, got {'a': 1}"),
        ("[" * 10000, "cannot be read"),
    ],
)
def test_yaml_of_another_shape(content, wanted, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    assert wanted in _refusal(capsys, f"--config={tmp_path / 'mine.yaml'}")


def test_what_nobody_thought_of_is_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recipe, "run", lambda *_: 1 / 0)
    assert main([*TINY, "--output-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "failed: ZeroDivisionError: division by zero (test_failures.py, line " in said
    assert f"the traceback is in {tmp_path / 'run' / 'error.txt'}" in said and "Traceback" not in said
    assert "ZeroDivisionError" in (tmp_path / "run" / "error.txt").read_text()
    monkeypatch.setattr(cli, "missing_packages", lambda: 1 / 0)
    assert main([]) == 1
    assert "failed: ZeroDivisionError" in capsys.readouterr().err


def test_known_failures_say_what_to_do(tmp_path):
    for error, wanted in (
        (OSError(errno.ENOSPC, "No space left on device"), f"no space is left on the disk of {tmp_path}"),
        (MemoryError(), "out of memory (MemoryError): a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nx"), "out of memory ([enf"),
        (RuntimeError("Expected... pass `find_unused_parameters=True` ..."), "add --find-unused-parameters"),
        (ValueError("a\x1b[31mb"), "a\\x1b[31mb"),
    ):
        assert failures.explain(error, tmp_path).startswith(wanted) or wanted in failures.explain(error, tmp_path)


def test_names_from_outside_are_text_everywhere(tmp_path, capsys):
    """Markup of rich, mathtext of matplotlib, HTML, an emoji's name, and a terminal that has ASCII alone."""
    folder, photos = tmp_path / "[bold]a[/x] :smile: <b>&", tmp_path / "$x^{$ [red]"
    for i in range(40):
        path = photos / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * i).save(path)
    arguments = [x for x in TINY if not x.startswith(("--train-images", "--batch-size"))]
    arguments += [f"--dataset=folder:{photos}", "--batch-size=8"]
    assert main([*arguments, "--output-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert str(folder) in said.replace("\n", "") and photos.name in said
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "[bold]a[/x] :smile: &lt;b&gt;&amp;" in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 2 and page.count("src=") == 2
    for needed in ("student distilled", "test accuracy", "Settings", "clip_grad", "Environment", torch.__version__):
        assert needed in page
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "vrm_distill", *TINY, "--seeds=2", "--output-dir", str(tmp_path / "\u00e9")],
        env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"Written to" in done.stdout


def test_factory_in_the_folder_where_the_command_was_started(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\ndef make(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    (tmp_path / "own_fault.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert train(*TINY, "--student=own_networks:make", "--output-dir=run") == 0
    said = _refusal(capsys, "--student=own_fault:make")
    assert "argument --student: cannot import 'own_fault:make': SyntaxError" in said


class Tuple(nn.Module):
    """Gives auxiliary logits in training alone, as googlenet, inception_v3 and DeiT do."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        return (logits, logits) if self.training else logits


def test_tuple_in_training_alone_is_found_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "run", lambda *_: pytest.fail("it was trained"))
    monkeypatch.setitem(sys.modules, "tuples", sys.modules[__name__])
    for option in ("--student", "--teacher"):
        said = _refusal(capsys, f"{option}=tuples:Tuple", "--output-dir", tmp_path / "run")
        assert f"argument {option}: the {option[2:]} tuples:Tuple in training must give logits [B, 10]" in said
        assert "it gives a tuple" in said and "aux_logits" in said
    # A trained teacher is never put in training mode.
    check_classes("teacher", "x", Tuple(10), 1, (8, 8), 10, training=False)


def test_head_of_other_classes_says_how_to_fit_one():
    with pytest.raises(ValueError, match=r"tells 1000 classes apart, the data have 10.*num_classes=10.*teacher-epochs"):
        check_classes("teacher", "x", nn.Sequential(nn.Flatten(), nn.Linear(64, 1000)), 1, (8, 8), 10)


def test_two_runs_into_one_folder(capsys, tmp_path):
    run_folder.prepare_folder(tmp_path / "run", (), overwrite=False)
    code = (
        "import sys, pathlib\nfrom vrm_distill.run_folder import prepare_folder\n"
        "try:\n    prepare_folder(pathlib.Path(sys.argv[1]), (), True)\nexcept OSError as e:\n    print(e)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def other():
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert f"another run is writing to {tmp_path / 'run'}" in other()
    run_folder.release(tmp_path / "run")
    assert other() == "" and os.listdir(tmp_path / "run") == []


def test_weights_that_only_the_last_step_made_infinite(capsys, tmp_path, monkeypatch):
    """No later loss tells: the weights are looked at before they are written."""
    from vrm_distill import trainer

    step = trainer.Trainer._step

    def last_step_diverges(self, loader):
        step(self, loader)
        if self.at.step == self.batches.steps and self.at.epoch == self.epochs - 1:
            next(self.bare.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(trainer.Trainer, "_step", last_step_diverges)
    assert main([*TINY, "--output-dir", str(tmp_path / "run")]) == 1
    assert "a weight became NaN or infinite at step 4 of epoch 1 (teacher)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "teacher.safetensors").exists()


def test_teacher_that_overflows_is_named(capsys, tmp_path):
    teacher, path = create_model("conv_8_16_16", 1, 10), tmp_path / "teacher.pth"
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1e15)
    torch.save(teacher.state_dict(), path)
    arguments = ["--teacher=conv_8_16_16", f"--teacher-checkpoint={path}", "--output-dir", str(tmp_path / "run")]
    assert main([*TINY, *arguments]) == 1
    said = capsys.readouterr().err
    assert "the teacher's logits are NaN or infinite there, the student is not to blame" in said
    assert "another --teacher-checkpoint" in said and "--lr" not in said


def test_teachers_own_network_needs_no_naming(tmp_path, capsys):
    path = tmp_path / "teacher.safetensors"
    names = {"model": "conv_8_16_16", "in_channels": 1, "classes": 10}
    checkpoint.save_checkpoint(path, create_model("conv_8_16_16", 1, 10), names)
    quick = [x for x in TINY if not x.startswith("--teacher=")]
    assert train(*quick, f"--teacher-checkpoint={path}", "--output-dir", tmp_path / "run") == 0
    assert "teacher: conv_8_16_16" in (tmp_path / "run" / "config.yaml").read_text()


def test_report_costs_no_run(capsys, tmp_path, monkeypatch):
    """What is only for the report may fail: the students are there, and so is the rest of the report."""
    monkeypatch.setattr(timing, "_logit_gradients", lambda *_: torch.empty(2**60))
    monkeypatch.setattr(recipe.relations, "compare", lambda *_: 1 / 0)
    monkeypatch.setattr(recipe, "time_loss", lambda *_: 1e-3)
    assert main([*TINY, "--output-dir", str(tmp_path / "run")]) == 0
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "Warning: the report lacks the time of a step: " in summary
    assert "Warning: the report lacks the picture of the relations: ZeroDivisionError" in summary
    assert (tmp_path / "run" / "curves.png").exists() and not (tmp_path / "run" / "relations.png").exists()
    assert len(read_log(tmp_path / "run")) == 2


def test_eager_loss_is_not_tried_where_it_is_large(monkeypatch):
    """1000 classes and a batch of 256 would cost the eager class gigabytes; a step is timed all the same."""
    from vrm_distill.settings import Settings
    from vrm_kernels import VRMLoss

    part = torch.utils.data.TensorDataset(torch.rand(256, 1, 4, 4), torch.arange(256) % 2)
    images = data.from_parts("many", 1000, part, part, part)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1000))
    found = timing.time_steps(
        network, network, images, Settings(batch_size=256, augment="none"), VRMLoss(1.0, 1.0),
        lambda model: torch.optim.SGD(model.parameters(), 0.1), torch.device("cpu"), seconds=0.0,
    )  # fmt: skip
    assert found.eager_loss is None and found.step > found.loss > 0


def test_batch_that_leaves_one_image_to_a_part(capsys):
    said = _refusal(capsys, "--batch-size=4", "--accumulate=4")
    assert "argument --batch-size: a batch of 4 leaves one image to each of 1 processes' 4 micro-batches" in said
