"""``vrm-distill`` refuses a bad option before any work, naming the value and what to do."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from vrm_kernels import backends
from vrm_kernels.distill import cli

for _module in ("kornia", "matplotlib", "rich", "safetensors", "sklearn"):
    pytest.importorskip(_module)


def _refused(capsys, tmp_path, *arguments):
    """The message of a refused command line; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    if "--output-dir" not in arguments:
        arguments = (*arguments, "--output-dir", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == 2
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--dataset", "imagenet", "'digits'"),
        ("--teacher", "resnet9000", "'conv_32_64_128'"),
        ("--student", "resnet9000", "'conv_4_8_8'"),
        ("--backend", "fortran", "'reference'"),
        ("--device", "abacus", "cpu"),
        ("--device", "meta", "no values"),
        ("--device", "cuda:99", "use cpu"),
        ("--epochs", "0", "at least 1"),
        ("--epochs", "-3", "at least 1"),
        ("--epochs", "many", "whole number"),
        ("--teacher-epochs", "0", "at least 1"),
        ("--batch-size", "1", "at least 2"),
        ("--batch-size", "901", "900 training images"),
        ("--train-images", "19", "20 to 900"),
        ("--train-images", "901", "20 to 900"),
        ("--lr", "0", "> 0"),
        ("--lr", "nan", "> 0"),
        ("--teacher-lr", "inf", "finite"),
        ("--alpha", "-1", ">= 0"),
        ("--beta", "nan", ">= 0"),
        ("--percentile", "100.5", "[0, 100]"),
        ("--percentile", "-1", "[0, 100]"),
        ("--seeds", "0", "at least 1"),
        ("--seed", "-1", "at least 0"),
        ("--seed", "1.5", "whole number"),
        ("--threads", "0", "at least 1"),
    ],
)
def test_bad_value(option, value, wanted, capsys, tmp_path):
    batch = ("--batch-size", "8") if option == "--train-images" else ()
    message = _refused(capsys, tmp_path, option, value, *batch)
    assert f"argument {option}" in message and value in message and wanted in message


def test_unknown_option(capsys, tmp_path):
    assert "--temperature" in _refused(capsys, tmp_path, "--temperature", "4")


def test_backend_that_cannot_run_here(capsys, tmp_path, monkeypatch):
    cpp = backends.Backend("cpp", "absent", ("cpu",), "float32", lambda: (False, "it was never built"))
    monkeypatch.setitem(backends.REGISTRY, "cpp", cpp)
    message = _refused(capsys, tmp_path, "--backend", "cpp")
    assert "argument --backend" in message and "it was never built" in message and "auto" in message


def test_output_folder_is_a_file(capsys, tmp_path):
    (tmp_path / "taken").write_text("mine")
    message = _refused(capsys, tmp_path, "--output-dir", str(tmp_path / "taken"))
    assert "taken is a file" in message
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_folder_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = _refused(capsys, tmp_path, "--output-dir", str(tmp_path / "file" / "run"))
    assert "cannot write to" in message and "Not a directory" in message


def test_earlier_run_is_not_overwritten_silently(capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("log.csv", "notes.txt"):
        (folder / name).write_text("mine")
    message = _refused(capsys, tmp_path, "--output-dir", str(folder))
    assert "not empty" in message and "--overwrite" in message
    assert (folder / "log.csv").read_text() == "mine"
    # Asked for, it replaces the files of a run and no others.
    cli._prepare(folder, ("log.csv", "curves.png"), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_missing_extra(capsys, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name in ("kornia", "sklearn") else find_spec(name)
    )
    message = _refused(capsys, tmp_path)
    assert "kornia, scikit-learn not installed: pip install 'vrm_kernels[distill]'" in message


def test_importing_the_package_needs_no_extra():
    """A fresh interpreter without the extra imports the pieces, and the command says what is missing."""
    code = """
import sys
for name in ("kornia", "matplotlib", "rich", "safetensors", "sklearn"):
    sys.modules[name] = None
import vrm_kernels
from vrm_kernels.distill import DualViewDataset, train_one_epoch, validate
import vrm_kernels.distill.cli
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_default_folder_is_new(monkeypatch, tmp_path):
    """Without --output-dir the run goes to a folder named after the dataset and the time."""
    from vrm_kernels.distill import recipe

    class Stop(Exception):
        pass

    def run(settings, data, console):
        assert settings.output_dir.parent.name == "runs" and settings.output_dir.name.startswith("digits-")
        assert (tmp_path / settings.output_dir).is_dir()
        raise Stop

    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "run", run)
    with pytest.raises(Stop):
        cli.main(["--threads", str(threads)])
