"""Runs tests/interpreted_triton.py under Triton's interpreter, on any machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not published for this platform") if sys.platform != "linux" else None

HERE = Path(__file__).parent
GROUPS = {
    "small": "small",
    "large": "large",
    "both": "not small and not large",
}


@pytest.mark.parametrize("group", GROUPS)
def test_parity_under_the_interpreter(group):
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / "interpreted_triton.py"),
        "-k",
        GROUPS[group],
        "--durations=5",
    ]
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
