"""Runs interpreted.py under Triton's interpreter, on any machine: see there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GROUPS = {"literal": "literal", "dense": "not literal"}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_parity_under_the_interpreter(group):
    command = [sys.executable, "-m", "pytest", str(HERE / "interpreted.py"), "-k", GROUPS[group], "--durations=5"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("VRM_TEST_DEVICE", None)
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


def test_cpu_tensors_are_refused_without_the_interpreter():
    program = (
        "import torch, vrm_kernels\n"
        "x = [torch.randn(4, 3) for _ in range(4)]\n"
        "vrm_kernels.VRMLoss(1.0, 1.0, backend='triton')(*x, torch.zeros(4, dtype=torch.long))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE.parent, env=environment, capture_output=True, text=True
    )
    assert "backend 'triton' runs on cuda tensors and these are on cpu" in done.stderr, done.stderr
