"""What of `make gpu-check` can be tested without a GPU: its arguments, its results file, its picture, its refusal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE

ROOT = Path(__file__).parents[1]
gpu = pytest.importorskip("benchmarks.gpu", reason="matplotlib or the benchmarks are not here")


def row(peer, b, c, **columns):
    return {
        "peer": peer,
        "batch": b,
        "classes": c,
        "mode": "forward+backward",
        "dtype": "float32",
        "gpu": "none",
    } | columns


def test_arguments():
    args = gpu.arguments(["out", "--sizes", "64x100", "4096x1000", "--peers", "triton", "eager"])
    assert args.sizes == [(64, 100), (4096, 1000)] and args.peers == ["triton", "eager"]
    assert set(gpu.arguments(["out"]).sizes) >= {(64, 100), (4096, 1000), (65536, 1000), (1024, 21841)}
    for words in ([], ["out", "--sizes", "64"], ["out", "--peers", "cpp"]):
        with pytest.raises(SystemExit):
            gpu.arguments(words)


def test_results_are_read_back_and_drawn(tmp_path):
    from benchmarks import records

    rows = [
        row("triton", 64, 100, status="ok", time_ms=0.25, replay_ms=0.125, replay_units=2.0, peak_mb=1.5),
        row("eager", 64, 100, status="out of memory", note="needs more"),
    ]
    path = tmp_path / "gpu.csv"
    records.append(path, rows, records.GPU_COLUMNS)
    read = records.read(path, records.GPU_COLUMNS)
    assert read[0]["replay_ms"] == 0.125 and read[0]["gpu"] == "none" and read[1]["time_ms"] is None
    assert records.read(path)[0]["time_ms"] == 0.25
    gpu.draw(read, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 5000


def test_every_peer_of_the_issue_is_there():
    assert list(gpu.GPU_PEERS) == ["eager", "eager+compile", "chunked", "torch", "triton"] == list(gpu.STYLES)


@pytest.mark.skipif(DEVICE != "cpu" or torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    command = [shutil.which("bash"), str(ROOT / "benchmarks" / "gpu_check.sh"), str(tmp_path / "results")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "no CUDA device" in done.stderr and "== build" not in done.stdout
