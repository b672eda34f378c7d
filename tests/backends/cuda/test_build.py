"""When the CUDA extension is built, for what, and what is said when it is not. Nothing is compiled here."""

import re
import runpy
import shutil
import sys

import pytest
import setuptools
import torch
from cuda_resources import ROOT
from setuptools.command import build_ext
from torch.utils import cpp_extension

import vrm_kernels
from vrm_kernels import backends
from vrm_kernels.backends import cuda

sys.path.insert(0, str(ROOT / "tools"))
import cuda_build


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in (cuda_build.CHOICE, "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_build, "REPORT", tmp_path / "_cuda_report.py")


def reason():
    return re.search(r"REASON = (['\"])(.*)\1", cuda_build.REPORT.read_text()).group(2)


def test_a_cpu_build_of_torch_is_left_alone(monkeypatch, capsys):
    """Not even a look at the toolkit: it could not be of use."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cuda_build, "target_flags", lambda *_: pytest.fail("looked for a toolkit"))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", lambda *_, **__: pytest.fail("made an extension"))
    assert cuda_build.extensions() == []
    assert reason() == f"this torch ({torch.__version__}) is a CPU build"
    said = [line for line in capsys.readouterr().err.splitlines() if "cuda" in line]
    assert len(said) == 1 and "left out" in said[0] and reason() in said[0]


def test_no_toolkit(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for home in (None, str(tmp_path)):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        assert cuda_build.extensions() == []
        assert "no CUDA toolkit" in reason() and "CUDA 13.0" in reason() and "CUDA_HOME" in reason()


def test_a_toolkit_of_another_major_version(monkeypatch, tmp_path):
    """torch refuses it while everything is being built."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", lambda *_, **__: "made")
    nvcc = fake_nvcc(tmp_path, ["80"], release="12.8")
    assert cuda_build.extensions() == []
    assert "is CUDA 12.8 and torch is built for CUDA 13.2" in reason() and "CUDA_HOME" in reason()
    nvcc.write_text(nvcc.read_text().replace("12.8", "13.0"))
    assert cuda_build.extensions() == ["made"]


def test_a_build_for_rocm_is_no_cpu_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cuda_build.extensions() == [] and reason().endswith("is a ROCm build")


def test_the_compilers_name_on_windows(tmp_path):
    (tmp_path / "bin").mkdir()
    for system, name in (("nt", "nvcc.exe"), ("posix", "nvcc")):
        assert cuda_build.compiler_of(str(tmp_path), system) is None
        (tmp_path / "bin" / name).write_text("")
        assert cuda_build.compiler_of(str(tmp_path), system) == tmp_path / "bin" / name
    assert cuda_build.compiler_of(None) is None


def test_the_builds_choice(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv(cuda_build.CHOICE, "1")
    with pytest.raises(RuntimeError, match=r"asks for the CUDA extension.*CPU build"):
        cuda_build.extensions()
    monkeypatch.setenv(cuda_build.CHOICE, "0")
    assert cuda_build.extensions() == [] and "told to leave it out" in reason()
    monkeypatch.setenv(cuda_build.CHOICE, "yes")
    with pytest.raises(ValueError, match="0, 1 or unset, not 'yes'"):
        cuda_build.extensions()


def fake_nvcc(folder, targets, release="13.0"):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    lines = [f"echo 'Cuda compilation tools, release {release}, V{release}.1'", *(f"echo sm_{t}" for t in targets)]
    nvcc.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    nvcc.chmod(0o755)
    return nvcc


def test_default_targets_are_those_the_toolkit_knows(tmp_path, monkeypatch):
    both = fake_nvcc(tmp_path / "old", ["75", "80", "90", "90a"])
    assert cuda_build.target_flags(both) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    new = fake_nvcc(tmp_path / "new", ["80", "90", "100", "100a", "120"])
    assert cuda_build.target_flags(new)[-2:] == [
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert cuda_build.target_flags(new) == []  # torch reads the variable itself


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_this_toolkit_knows_every_default_target():
    flags = cuda_build.target_flags(shutil.which("nvcc"))
    assert len(flags) == len(cuda_build.DEFAULT_TARGETS) + 1 and flags[-1].endswith("code=compute_100")


def test_the_extension_needs_no_gpu(monkeypatch, tmp_path):
    """With a CUDA build of torch and a toolkit, and whatever GPU or none."""
    fake_nvcc(tmp_path, ["80", "90", "100"])
    made = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(
        cpp_extension, "CUDAExtension", lambda *args, **settings: made.append((args, settings)) or "made"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    assert cuda_build.extensions() == ["made"] and reason() == ""
    ((name, sources), settings) = made[0]
    assert name == "vrm_kernels._cuda" and all((ROOT / source).exists() for source in (*sources, *settings["depends"]))
    assert "-gencode=arch=compute_90,code=sm_90" in settings["extra_compile_args"]["nvcc"]
    assert not any("fast" in flag for flags in settings["extra_compile_args"].values() for flag in flags)


def test_a_compiler_that_fails_leaves_the_package_installable(monkeypatch, tmp_path, capsys):
    class Extension:
        optional = False

    def fail(_):
        raise RuntimeError("\nnvcc fatal: no such host compiler\nmore")

    copied = tmp_path / "lib" / "vrm_kernels" / cuda_build.REPORT.name
    copied.parent.mkdir(parents=True)
    copied.write_text("")
    one = Extension()
    cuda_build.attempt(fail, one, str(tmp_path / "lib"))
    assert one.optional and reason() == "nvcc failed: nvcc fatal: no such host compiler"
    assert copied.read_text() == cuda_build.REPORT.read_text()
    assert "no such host compiler" in capsys.readouterr().err
    monkeypatch.setenv(cuda_build.CHOICE, "1")
    with pytest.raises(RuntimeError, match="no such host compiler"):
        cuda_build.attempt(fail, one, str(tmp_path / "lib"))


# ---- setup.py: what one extension's failure costs --------------------------------------------------------------------


@pytest.fixture
def setup_py(monkeypatch, tmp_path):
    """Runs a copy of setup.py, which then writes beside the copy, and gives what it calls setup() with."""

    def run():
        for name in ("setup.py", "vrm_kernels/__init__.py"):
            copy = tmp_path / "tree" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text((ROOT / name).read_text())
        called = []
        monkeypatch.setattr(setuptools, "setup", lambda **settings: called.append(settings))
        runpy.run_path(str(tmp_path / "tree" / "setup.py"))
        return called[0]

    for name in ("VRM_KERNELS_NO_EXTENSION", "VRM_KERNELS_REQUIRE_EXTENSION"):
        monkeypatch.delenv(name, raising=False)
    return run


def cpp_reason(tmp_path):
    return (tmp_path / "tree" / "vrm_kernels" / "_build_report.py").read_text().split("REASON = ")[1].strip()


@pytest.fixture
def build(setup_py, monkeypatch, tmp_path):
    """``build(broken)`` builds both extensions, with a toolchain that fails for those named, and returns the others.
    "toolkit" is torch's check of toolkit and compiler, before everything else."""
    made = []

    def torchs_build(command):
        if "toolkit" in made[0] and any(cuda_build.is_cuda(module) for module in command.extensions):
            raise RuntimeError("The host's compiler is too new for this toolkit")
        for module in command.extensions:
            command.build_extension(module)

    def one_build(_, extension):
        if extension.name in made[0]:
            raise RuntimeError(f"no {extension.name}")
        made.append(extension.name)

    def run(broken):
        monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", torchs_build)
        monkeypatch.setattr(build_ext.build_ext, "build_extension", one_build)
        monkeypatch.setattr(cuda_build, "extensions", lambda: [setuptools.Extension("vrm_kernels._cuda", [])])
        settings = setup_py()
        command = settings["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": settings["ext_modules"]}))
        command.ensure_finalized()
        made[:] = [broken]
        command.run()
        return made[1:]

    return run


BOTH = ["vrm_kernels._C", "vrm_kernels._cuda"]


def test_both_extensions_are_built(build, tmp_path):
    assert build(()) == BOTH and cpp_reason(tmp_path) == "''"


@pytest.mark.parametrize("broken", ["vrm_kernels._cuda", "toolkit"])
def test_a_failure_of_nvcc_does_not_cost_the_cpu_extension(build, monkeypatch, tmp_path, broken):
    assert build((broken,)) == BOTH[:1]
    assert reason().startswith("nvcc failed: ") and cpp_reason(tmp_path) == "''"
    monkeypatch.setenv(cuda_build.CHOICE, "1")
    with pytest.raises(RuntimeError, match=r"asks for the CUDA extension.*(no vrm_kernels._cuda|too new)"):
        build((broken,))
    assert cpp_reason(tmp_path) == "''"


def test_a_failure_of_the_cpu_extension_does_not_cost_the_cuda_one(build, monkeypatch, tmp_path):
    """As on Windows: the CPU kernels use vectors that MSVC does not have."""
    assert build(BOTH[:1]) == BOTH[1:]
    assert "no vrm_kernels._C" in cpp_reason(tmp_path) and not cuda_build.REPORT.exists()
    monkeypatch.setenv("VRM_KERNELS_REQUIRE_EXTENSION", "1")
    with pytest.raises(RuntimeError, match="no vrm_kernels._C"):
        build(BOTH[:1])


def test_a_build_without_extensions_says_so_of_both(setup_py, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("VRM_KERNELS_NO_EXTENSION", "1")
    assert setup_py()["ext_modules"] == []
    assert "VRM_KERNELS_NO_EXTENSION" in reason() and "VRM_KERNELS_NO_EXTENSION" in cpp_reason(tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "backend `cuda`" in line]
    assert len(said) == 1 and "left out" in said[0]
    monkeypatch.setenv(cuda_build.CHOICE, "1")
    with pytest.raises(RuntimeError, match="asks for the CUDA extension"):
        setup_py()


def test_describe_says_why_it_is_missing():
    usable, note = backends.REGISTRY["cuda"].status()
    if usable:
        pytest.skip("it is not missing here")
    if torch.version.cuda is None:
        assert note.startswith("built without CUDA: ")
    row = next(line for line in backends.describe().splitlines() if line.startswith("cuda"))
    assert row.split()[1] == "cuda" and row.endswith(note) and "\n" not in note
    with pytest.raises(RuntimeError, match="runs on cuda tensors and these are on cpu"):
        backends.resolve("cuda", torch.device("cpu"))
    with pytest.raises(RuntimeError, match=re.escape(note)):
        backends.resolve("cuda", torch.device("cuda"))


def test_a_missing_report_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vrm_kernels._cuda_report", None)
    monkeypatch.delattr(vrm_kernels, "_cuda_report", raising=False)
    cuda._load.cache_clear()
    try:
        usable, note = cuda.status()
    finally:
        cuda._load.cache_clear()
    assert not usable and "make build" in note
