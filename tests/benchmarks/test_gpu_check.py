"""What of `make gpu-check` can be tested without a GPU: its arguments, its results file, its picture, its refusal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE

ROOT = Path(__file__).parents[2]
gpu = pytest.importorskip("benchmarks.gpu.run", reason="matplotlib or the benchmarks are not here")


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
    from benchmarks.harness import records

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
    assert list(gpu.GPU_PEERS) == ["eager", "eager+compile", "chunked", "torch", "triton", "cuda"] == list(gpu.STYLES)
    assert sorted(gpu.GPU_PEERS) == sorted(name for group in gpu.GROUPS for name in group)
    assert gpu.GPU_PEERS["cuda"].build().backend == "cuda" and gpu.GPU_PEERS["triton"].build().backend == "triton"


def test_cuda_is_compared_with_triton():
    """Only where both ran, and a ratio beyond what is allowed is named."""
    rows = [
        row("triton", 64, 100, status="ok", time_ms=0.2, replay_ms=0.1, peak_mb=4.0),
        row("cuda", 64, 100, status="ok", time_ms=0.25, replay_ms=0.12, peak_mb=2.0),
        row("triton", 512, 200, status="ok", time_ms=1.0, replay_ms=None, peak_mb=4.0),
        row("cuda", 512, 200, status="ok", time_ms=1.4, replay_ms=1.3, peak_mb=4.0),
        row("triton", 1024, 1000, status="ok", time_ms=1.0, peak_mb=4.0),
        row("cuda", 1024, 1000, status="wrong"),
    ]
    first, second = gpu.ratios(rows)
    assert first == "64x100 float32 forward+backward: cuda / triton: a call 1.25, a replay 1.20, memory 0.50"
    assert second == "512x200 float32 forward+backward: cuda / triton: a call 1.40, memory 1.00  more than 1.3"


STUB = """#!/usr/bin/env bash
echo "$TORCH_CUDA_ARCH_LIST|$*" >>"$LOG"
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *REGISTRY*) echo "torch $USABLE" ;;
esac
[ -z "$BROKEN" ] || [[ "$*" != *$BROKEN* ]]
"""


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    """Runs the script with stand-ins for Python and compute-sanitizer, of which what ``broken`` matches fails. Returns
    the finished process and the commands, each after the targets that it was to compile for."""
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    for name in ("TORCH_CUDA_ARCH_LIST", "GPU_BENCH_ARGS"):
        monkeypatch.delenv(name, raising=False)

    def run(broken="", usable="triton cuda", **more):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "PYTHON": str(tmp_path / "python"), "LOG": str(log), "BROKEN": broken}
        command = [shutil.which("bash"), str(ROOT / "benchmarks" / "gpu" / "check.sh"), str(tmp_path / "results")]
        environment = os.environ | environment | {"USABLE": usable} | more
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


def test_everything_is_done_for_both_backends(gpu_check, tmp_path):
    done, commands = gpu_check()
    assert done.returncode == 0 and "0 failures" in done.stdout, done.stdout + done.stderr
    assert any(c.startswith("9.0|setup.py") and "build_ext" in c for c in commands)  # for the GPU at hand
    for name in ("triton", "cuda"):
        assert sum(f"tests/backends/{name}/test_device.py" in c for c in commands) == 1
    assert any("triton or cuda or torch" in c for c in commands)
    sanitized = sorted(c.split("--tool ")[1].split(" ")[0] for c in commands if "sanitize cuda" in c)
    assert sanitized == ["initcheck", "memcheck", "racecheck", "synccheck"]
    assert {c.split("--tool ")[1].split(" ")[0] for c in commands if "sanitize triton" in c} == {
        "memcheck",
        "racecheck",
    }
    assert all(("--own" in c) == ("check --e" in c and ("racecheck" in c or "initcheck" in c)) for c in commands
               if "sanitize cuda" in c)  # fmt: skip
    assert (tmp_path / "results" / "cuda-initcheck.txt").exists()
    assert "-m benchmarks.gpu.run " in commands[-1] and "--budget 240" in commands[-1]


@pytest.mark.parametrize(
    "broken",
    [
        "build_ext",
        "backends/cuda/test_device",
        "backends/triton/test_device",
        "suite.xml",
        "initcheck",
        "tool racecheck",
        "m benchmarks.gpu.run ",
    ],
)
def test_a_failure_is_told_and_stops_nothing(gpu_check, broken):
    everything = gpu_check()[1]
    done, commands = gpu_check(broken)
    assert done.returncode == 1 and len(commands) == len(everything)
    assert "0 failures" not in done.stdout and " failures after " in done.stdout


def test_a_backend_that_cannot_run_is_a_failure(gpu_check):
    done, commands = gpu_check(usable="triton")
    assert done.returncode == 1 and "cuda cannot run" in done.stdout
    assert (
        not any("backends/cuda" in c or "sanitize cuda" in c for c in commands)
        and "benchmarks.gpu.run " in commands[-1]
    )


def test_the_users_targets_and_arguments_are_kept(gpu_check):
    _, commands = gpu_check(TORCH_CUDA_ARCH_LIST="8.0+PTX", GPU_BENCH_ARGS="--sizes 64x100 --budget 20")
    assert any(c.startswith("8.0+PTX|setup.py") for c in commands)
    assert commands[-1].endswith("--budget 240 --sizes 64x100 --budget 20")


@pytest.mark.skipif(DEVICE != "cpu" or torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    command = [shutil.which("bash"), str(ROOT / "benchmarks" / "gpu" / "check.sh"), str(tmp_path / "results")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "no CUDA device" in done.stderr and "== build" not in done.stdout
