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
LIMITS = """
import json
from benchmarks.gpu import triton_kernels as kernels

if __name__ == "__main__":
    target = next(t for t in kernels.TARGETS if t.name == {target!r})
    launches = kernels.recorded()
    launches = kernels.kinds([x for x in launches if {float64} or x.dtype != "fp64"], {same})
    for launch, (used, faults) in kernels.compile_all(launches, target, {workers}):
        occupancy = used.occupancy(dict(launch.options)["num_warps"], target.shared)
        needs = used.registers, used.spilled, used.shared, occupancy
        print(json.dumps([launch.name, launch.label, *needs, target.shared, faults]))
"""
# Each variant, but for those that differ in alignment alone; as far as the compiled form shows faults.
FAULTS = """
import json, triton
from benchmarks.gpu import triton_kernels as kernels

if __name__ == "__main__":
    assert triton.__version__.startswith({version!r}), triton.__version__
    target = next(t for t in kernels.TARGETS if t.name == {target!r})
    launches = kernels.kinds(kernels.recorded(), {same})
    for launch, faults in kernels.compile_all(launches, target, {workers}, kernels.faults_of_launch):
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

for target in (x for x in triton_kernels.TARGETS if x.name in ("sm_90", "gfx942")):
    for kernel, told in planted.FAULTY.items():
        print(json.dumps([kernel.__name__, target.name, told, faults_of(kernel, target)]))
    for kernel in planted.RIGHT:
        print(json.dumps([kernel.__name__, target.name, None, faults_of(kernel, target)]))
print(json.dumps(["mislaid mask", "as text", "mask lies in", triton_kernels.faults("", planted.MISLAID)]))
"""
WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, os.cpu_count() or 1)


def run(tmp_path, program: str, triton: str = "installed", **values) -> list[list]:
    """What ``program`` prints, in a process of its own: in this one Triton's interpreter or a driver may be active."""
    folder = VERSIONS[triton]
    if folder is not None and not folder.exists():
        pytest.skip(f"Triton {triton} is not in {folder}: `make test` installs it")
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
    kernels = (
        "prepare entropy sample missed digits bracket count exact moments pack split dense gradients literal finish"
    )
    assert set(names) == {*kernels.split()}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_the_devices_limits(target, tmp_path):
    """Each kernel; for the device that most is known of each variant. `python -m benchmarks.gpu.triton_kernels` does so
    for all. None spills."""
    known = target == "sm_90"
    rows = run(tmp_path, LIMITS, target=target, float64=known, same=f"lambda x: x.{'label' if known else 'name'}")
    assert_complete(row[0] for row in rows)
    for _, label, registers, spilled, shared, occupancy, limit, faults in rows:
        if target != "gfx942":
            assert 0 < registers <= 128 and occupancy >= 0.25, (
                f"{label}: {registers} registers, {occupancy:.0%} on {target}"
            )
        assert spilled == 0, f"{label} spills {spilled} bytes a thread on {target}"
        assert shared <= limit, f"{label} needs {shared} bytes of shared memory on {target}, of {limit}"
        assert not faults, f"{label} on {target}: {faults}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "target", "same"),
    [
        ("installed", "sm_90", "lambda x: (x.label, x.signature)"),
        (OLDEST, "sm_90", "lambda x: (x.name, x.dtype)"),
        (OLDEST, "gfx942", "lambda x: x.name"),
    ],
)
def test_the_compiler_makes_no_fault_of_them(version, target, same, tmp_path):
    """Most faults show in what is the same for all targets."""
    prefix = OLDEST if version == OLDEST else ""
    rows = run(tmp_path, FAULTS, version, target=target, version=prefix, same=same)
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
