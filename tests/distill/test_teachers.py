"""Several teachers teach the mean of their logits; what does not go together is refused before anything is trained."""

import pytest
import torch
from distill_helpers import QUICK, SHORT, comparable, read_log, same_weights, train

from vrm_distill import cli, load_checkpoint, save_checkpoint
from vrm_distill.models import create_model
from vrm_distill.models.ensemble import Ensemble

NAMES = ("conv_8_16_16", "conv_4_8_8")


def _teacher(folder, name, seed, mean="0.3"):
    torch.manual_seed(seed)
    model = create_model(name, 1, 10)
    path = folder / f"{name}-{seed}.safetensors"
    keys = {"model": name, "in_channels": 1, "classes": 10, "mean": mean, "std": "0.4"}
    save_checkpoint(path, model, keys)
    return path


@pytest.fixture
def teachers(tmp_path):
    return [_teacher(tmp_path, name, seed) for seed, name in enumerate(NAMES)]


def _run(folder, *options):
    quick = [option for option in (*QUICK, *SHORT) if not option.startswith("--teacher=")]
    return train(*quick, "--baselines=none", *options, f"--output-dir={folder}")


def test_the_mean_of_the_logits():
    members = [create_model(name, 1, 10).eval() for name in NAMES]
    images = torch.randn(3, 1, 8, 8)
    said = [member(images) for member in members]
    torch.testing.assert_close(Ensemble(members).eval()(images), (said[0] + said[1]) / 2)


def test_a_run_with_two_teachers(tmp_path, teachers):
    """Their order is the settings'; a teacher twice teaches as it does alone; the config of a run makes it again."""
    first, second = teachers
    assert _run(tmp_path / "both", "--teacher-checkpoint", first, second) == 0
    assert _run(tmp_path / "named", "--teacher", *NAMES, "--teacher-checkpoint", first, second) == 0
    for name in ("single", "twice"):
        assert _run(tmp_path / name, "--teacher-checkpoint", *([first] if name == "single" else [first, first])) == 0
    both, named, single, twice = (tmp_path / name for name in ("both", "named", "single", "twice"))
    assert same_weights(both / "student.safetensors", named / "student.safetensors")
    assert not same_weights(both / "student.safetensors", single / "student.safetensors")
    assert same_weights(twice / "student.safetensors", single / "student.safetensors")
    assert cli.main(["--config", str(both / "config.yaml"), f"--output-dir={tmp_path / 'again'}"]) == 0
    assert comparable(read_log(tmp_path / "again")) == comparable(read_log(both))
    members = Ensemble(load_checkpoint(path)[0] for path in teachers)
    parameters = sum(p.numel() for p in members.parameters())
    summary = (tmp_path / "again" / "summary.md").read_text()
    assert f"{NAMES[0]}+{NAMES[1]}" in summary and f"{parameters:,}" in summary


def test_what_does_not_go_together_is_refused(tmp_path, teachers, capsys):
    other = _teacher(tmp_path, NAMES[0], 7, mean="0.5")
    for options, wanted in (
        (["--teacher", *NAMES], "2 teachers must come trained: name a --teacher-checkpoint for each"),
        (["--teacher", *NAMES, "--teacher-checkpoint", teachers[0]], "2 --teacher and 1 --teacher-checkpoint"),
        (["--teacher-checkpoint", teachers[0], other], "normalised otherwise"),
        (["--teacher", "conv_4_8_8", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit):
            _run(tmp_path / "run", *options)
        assert wanted in capsys.readouterr().err and not (tmp_path / "run").exists()
