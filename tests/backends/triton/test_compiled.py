"""Every Triton kernel, with the meta-parameters it ships with, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of its stack that a thread may spill. ptxas settles on a round number of registers and a few words more in any
# kernel; the small regime's two large ones run for a few microseconds, bound by their launch.
SPILLS_ALLOWED = {"gradients": 32, "edges": 48}
FEW = 16
FLOAT64_SPILLS_ALLOWED = {"epilogue": 128}  # twice the registers a number; not a dtype that anyone trains in

PROGRAM = """
import json
from benchmarks.gpu import triton_kernels

if __name__ == "__main__":
    targets = [t for t in triton_kernels.TARGETS if t.name in {names!r}]
    for launch, target, used in triton_kernels.compile_all(targets, {workers}):
        print(json.dumps([launch.kernel, launch.label, used.registers, used.spilled, used.shared, target.shared]))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_the_devices_limits(target, tmp_path):
    """In a process of its own, since this one may have Triton's interpreter or a GPU driver active."""
    program = tmp_path / "compile_matrix.py"
    program.write_text(PROGRAM.format(names=[target], workers=min(4, os.cpu_count() or 1)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    kernels = {*"prepare pack split entropy histogram count finish edges gradients total epilogue combine".split()}  # noqa: SIM905
    if target == "gfx942":  # its matrix units take float32 as it is
        kernels.remove("split")
    assert {row[0].removesuffix("_kernel") for row in rows} == kernels
    for kernel, label, registers, spilled, shared, limit in rows:
        assert 0 < registers <= 512
        table = FLOAT64_SPILLS_ALLOWED if "fp64" in label else SPILLS_ALLOWED
        allowed = table.get(kernel.removesuffix("_kernel"), FEW)
        assert spilled <= allowed, f"{label} spills {spilled} bytes a thread on {target}"
        assert shared <= limit, f"{label} needs {shared} bytes of shared memory on {target}, of {limit}"
