"""Every example runs, and its student has learnt."""

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


def test_every_example_is_run():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    assert scripts == {*IN_ONE_PROCESS, *IN_TWO_PROCESSES}
