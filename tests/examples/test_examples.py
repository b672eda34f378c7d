"""Every example runs, and its student has learnt."""

import csv
import importlib
import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
from distill_helpers import finish, start

EXAMPLES = Path(__file__).parents[2] / "examples"
# Chance is 10 %, or 1 in 11 pixels.
IN_ONE_PROCESS = {
    "minimal": None,
    "features": None,
    "dense": None,
    "lightning_fit": "lightning",
    "torchdistill_run": "torchdistill",
    "timm_train": "timm",
}
IN_TWO_PROCESSES = ("ddp", "fsdp2")


def student_accuracy(output: str) -> float:
    return float(re.search(r"student ([\d.]+)%", output)[1]) / 100


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_example(name, capsys, monkeypatch):
    if IN_ONE_PROCESS[name]:
        pytest.importorskip(IN_ONE_PROCESS[name])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.modules.pop("digits", None)
    output = capsys.readouterr().out
    assert student_accuracy(output) > 0.4, output


@pytest.mark.parametrize("name", IN_TWO_PROCESSES)
def test_example_of_two_processes(name):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    output = finish(start(EXAMPLES / f"{name}.py", launcher=launcher))
    assert student_accuracy(output) > 0.4, output


def test_detection_writes_every_detector_and_a_table(capsys, monkeypatch, tmp_path):
    """In seconds no detector learns what the page's did; the teacher finds something."""
    pytest.importorskip("pycocotools")
    monkeypatch.syspath_prepend(str(EXAMPLES / "detection"))
    distil = importlib.import_module("distil")
    try:
        for name, value in (("TEACHER_WIDTH", 12), ("STUDENT_WIDTH", 4)):
            monkeypatch.setattr(distil, name, value)
        monkeypatch.setattr(distil, "WEIGHTS", {"alone": (0.0,), "kd": (1.0,), "vrm": (1.0, 4.0)})
        distil.main(["--pictures=128", "--judged=32", "--epochs=8", "--seeds=1", f"--output={tmp_path}"])
    finally:
        for name in ("distil", "detector", "scenes"):
            sys.modules.pop(name)
    with (tmp_path / "detection.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = ["teacher", *["alone"] * 2, *["kd"] * 2, *["vrm"] * 3]
    assert [row["method"] for row in rows] == methods and float(rows[0]["map"]) > 0
    tried = {row["weight"]: float(row["map"]) for row in rows if (row["part"], row["method"]) == ("validation", "vrm")}
    assert tried.keys() == {"1", "4"} and tried[rows[-1]["weight"]] == max(tried.values())
    assert (tmp_path / "detection.md").read_text() in capsys.readouterr().out


def test_every_example_is_run():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    assert scripts == {*IN_ONE_PROCESS, *IN_TWO_PROCESSES}
