"""nvcc compiles every kernel of the `cuda` backend without a warning and within stated resources.

The forms literal and dense for every target; the present ones, which do not change and take four times as long, for the
target that has run them. The table in docs/cuda.md has them all.
"""

import re
import shutil

import cuda_resources
import pytest
from build_extensions import OLDEST_TORCH
from cuda_resources import DEFAULT_TARGETS, DTYPES, FOLDER, KERNELS, STEP_KERNELS, Resources

TARGET_OF_PRESENT = 90

needs_nvcc = pytest.mark.skipif(cuda_resources.NVCC is None, reason="no nvcc here")


@pytest.fixture(scope="module")
def resources():
    kernels = cuda_resources.compile_kernels
    return kernels(cuda_resources.FORMS) + kernels(cuda_resources.PRESENT, [TARGET_OF_PRESENT])


@needs_nvcc
def test_every_kernel_is_compiled_for_every_target(resources):
    kernels = {(r.kernel, r.dtype, r.target) for r in resources}
    targets = dict.fromkeys(KERNELS, DEFAULT_TARGETS) | dict.fromkeys(STEP_KERNELS, (TARGET_OF_PRESENT,))
    assert kernels == {
        (name, dtype, target)
        for name, compiled in targets.items()
        for dtype in DTYPES.values()
        for target in compiled
        if dtype == "float32" or name not in cuda_resources.FLOAT32_ALONE
    }
    assert len(resources) == len(kernels)


@needs_nvcc
def test_resources_are_within_their_allowances(resources):
    assert not over_allowance(resources)


def most_registers(r):
    if r.kernel == "steps/one_launch":
        return cuda_resources.MOST_REGISTERS_OF_ONE_LAUNCH
    if r.kernel in STEP_KERNELS and r.dtype == "float64":
        return cuda_resources.MOST_REGISTERS_OF_FLOAT64_STEPS
    return cuda_resources.MOST_REGISTERS


def over_allowance(resources):
    return [
        r
        for r in resources
        if r.registers > most_registers(r)
        or r.spills > cuda_resources.MOST_SPILLS
        or r.stack > cuda_resources.MOST_STACK
        or r.shared != 0  # all of it is given at launch, and bounded by a static_assert
    ]


def test_the_allowances_can_be_exceeded():
    sound = Resources("dense", "float64", 90, 128, 0, 0, 0)
    assert not over_allowance([sound])
    for fault in ({"registers": 129}, {"spills": 8}, {"stack": 16}, {"shared": 1024}):
        assert over_allowance([sound._replace(**fault)])
    assert not over_allowance([sound._replace(kernel="steps/one_launch", registers=200)])


@needs_nvcc
def test_a_warning_is_an_error(tmp_path):
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel() { int unused; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        cuda_resources.compile_kernels(source)


@needs_nvcc
def test_the_table_in_the_docs_is_of_these_kernels(resources):
    """Register counts differ between versions of nvcc; which kernels there are does not."""
    page = (cuda_resources.ROOT / "docs" / "cuda.md").read_text()
    made = page[page.index(cuda_resources.BEGIN) : page.index(cuda_resources.END)]
    stated = cuda_resources.registers(made)
    compiled = {(r.kernel, r.dtype, r.target): r.registers for r in resources}
    present = {(name, dtype, target) for name, dtype, target in stated if name in STEP_KERNELS}
    assert stated.keys() - present == {row for row in compiled if row[0] in KERNELS}
    assert {row[:2] for row in present} == {row[:2] for row in compiled if row[0] in STEP_KERNELS}
    if cuda_resources.version() in made:
        assert compiled.items() <= stated.items(), "run: python tests/support/cuda_resources.py"


def test_device_code_keeps_to_what_windows_has():
    """There the macros NAN and INFINITY may be functions of the host, and M_PI and its kin are not defined."""
    sources = [p for p in FOLDER.rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    found = {
        p.name: re.findall(r"\b(?:NAN|INFINITY|HUGE_VAL|M_\w+|__builtin_\w+)\b(?=[;,) ])", code(p)) for p in sources
    }
    assert len(sources) > 5 and not any(found.values()), found


def code(path):
    return re.sub(r"//.*", "", path.read_text())


@pytest.mark.parametrize("source", ["operators.cpp", "steps/binding.cpp"])
def test_the_bindings_fit_torchs_own_headers(tmp_path, source):
    """Not compiled against a CUDA build of torch here, but what there is of its headers is read: the syntax and the
    names hold. (test_host.py compiles and runs it with the host's stand-ins for guard and stream.)"""
    import subprocess
    import sysconfig

    from torch.utils import cpp_extension

    compiler = shutil.which("g++")
    if cuda_resources.NVCC is None or compiler is None:
        pytest.skip("no nvcc or no g++ here")
    toolkit = subprocess.run([cuda_resources.NVCC, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    toolkit = re.search(r"INCLUDES=\"-I([^\"]+)\"", toolkit).group(1)
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # generated; only CUDA builds of torch ship it
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n")
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include"), toolkit, str(tmp_path)]
    macros = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
    done = subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-fsyntax-only",
            "-Wall",
            "-Werror",
            *macros,
            *(f"-isystem{p}" for p in includes),
            FOLDER / source,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
