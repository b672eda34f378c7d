"""Every Triton kernel, with the meta-parameters it ships with, compiled for GPUs that are not here: what it needs of
the device, and faults that the interpreter cannot show, by the Triton that is installed and by the oldest supported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
OLDEST = "3.6"  # `make test` puts it there
VERSIONS = {"installed": None, OLDEST: ROOT / ".venv" / f"triton-{OLDEST}"}
# Bytes of its stack that a thread may spill. ptxas settles on a round number of registers and a few words more in any
# kernel; the small regime's two large ones run for a few microseconds, bound by their launch.
SPILLS_ALLOWED = {"gradients": 32, "edges": 48}
FEW = 16
FLOAT64_SPILLS_ALLOWED = {"epilogue": 128}  # twice the registers a number; not a dtype that anyone trains in

LIMITS = """
import json
from benchmarks.gpu import triton_kernels

if __name__ == "__main__":
    targets = [t for t in triton_kernels.TARGETS if t.name == {target!r}]
    for launch, target, (used, faults) in triton_kernels.compile_all(targets, {workers}, every={every}):
        occupancy = used.occupancy(dict(launch.options)["num_warps"], target.shared)
        needs = used.registers, used.spilled, used.shared, occupancy
        print(json.dumps([launch.name, launch.label, *needs, target.shared, faults]))
"""
FAULTS = """
import json, triton
from benchmarks.gpu import triton_kernels

if __name__ == "__main__":
    assert triton.__version__.startswith({oldest!r}), triton.__version__
    targets = [t for t in triton_kernels.TARGETS if t.name == {target!r}]
    for launch, _, faults in triton_kernels.compile_all(targets, {workers}, triton_kernels.faults_of_launch):
        print(json.dumps([launch.name, launch.label, faults]))
"""
PLANTED = """
import json, sys
sys.path.insert(0, {folder!r})
import planted
from triton.compiler import ASTSource
from benchmarks.gpu import triton_kernels

def faults_of(kernel, target):
    known = {{"m": "i32", "n": "i32", "depth": "i32", "histogram": "*i32"}}
    kinds = {{name: known.get(name, "*fp32") for name in kernel.arg_names}}
    options = {{"num_warps": 4, "enable_fp_fusion": True}}
    return triton_kernels.faults_of(ASTSource(kernel, kinds, {{}}), target, options, None, planted.BOUNDS)

for target in triton_kernels.TARGETS:
    for kernel, told in planted.FAULTY.items():
        print(json.dumps([kernel.__name__, target.name, told, faults_of(kernel, target)]))
    for kernel in planted.RIGHT:
        print(json.dumps([kernel.__name__, target.name, None, faults_of(kernel, target)]))
print(json.dumps(["mislaid mask", "as text", "mask lies in", triton_kernels.faults("", planted.MISLAID)]))
"""
WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, os.cpu_count() or 1)


def run(tmp_path, program: str, version: str = "installed", **values) -> list[list]:
    """What ``program`` prints, in a process of its own: in this one Triton's interpreter or a driver may be active."""
    folder = VERSIONS[version]
    if folder is not None and not folder.exists():
        pytest.skip(f"Triton {version} is not in {folder}: `make test` installs it")
    path = tmp_path / "program.py"
    path.write_text(program.format(workers=WORKERS, **values))
    paths = [ROOT] if folder is None else [folder, ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def assert_complete(names) -> None:
    kernels = {*"prepare pack split entropy histogram count finish edges gradients total epilogue combine".split()}  # noqa: SIM905
    staged = "prepare entropy bracket count exact moments pack dense gradients literal finish".split()  # noqa: SIM905
    assert set(names) == kernels | {f"staged {name}" for name in staged}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_the_devices_limits(target, tmp_path):
    rows = run(tmp_path, LIMITS, target=target, every=target in ("sm_90", "gfx942"))
    assert_complete(row[0] for row in rows)
    for kernel, label, registers, spilled, shared, occupancy, limit, faults in rows:
        staged = kernel.startswith("staged")
        assert 0 < registers <= 512
        if staged and target != "gfx942":
            assert registers <= 128 and occupancy >= 0.25, (
                f"{label}: {registers} registers, {occupancy:.0%} on {target}"
            )
        table = FLOAT64_SPILLS_ALLOWED if "fp64" in label else SPILLS_ALLOWED
        allowed = 0 if staged else table.get(kernel, FEW)
        assert spilled <= allowed, f"{label} spills {spilled} bytes a thread on {target}"
        assert shared <= limit, f"{label} needs {shared} bytes of shared memory on {target}, of {limit}"
        assert not faults, f"{label} on {target}: {faults}"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_oldest_triton_makes_no_fault_of_them(target, tmp_path):
    rows = run(tmp_path, FAULTS, OLDEST, target=target, oldest=OLDEST)
    assert_complete(row[0] for row in rows)
    for _, label, faults in rows:
        assert not faults, f"{label} on {target}: {faults}"


@pytest.mark.parametrize("version", VERSIONS)
def test_planted_faults_are_recognised(version, tmp_path):
    for name, target, told, faults in run(tmp_path, PLANTED, version, folder=str(Path(__file__).parent)):
        if told is None:
            assert not faults, f"{name} on {target} is right: {faults}"
        else:
            assert any(told in fault for fault in faults), f"{name} on {target}: {faults}"
