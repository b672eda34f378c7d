"""When the CUDA extension is built, for what, and what is said when it is not. Nothing is compiled here."""

import re
import shutil
import sys

import pytest
import torch
from cuda_resources import ROOT
from torch.utils import cpp_extension

from vrm_kernels import backends

sys.path.insert(0, str(ROOT / "tools"))
import cuda_build

NAME = "vrm_kernels._cuda"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (cuda_build.CHOICE, "VRM_KERNELS_NO_EXTENSION", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def reason() -> str:
    """Why it is left out."""
    with pytest.raises(cuda_build.CannotBuild) as why:
        cuda_build.extension(NAME, True)
    return str(why.value)


def test_a_cpu_build_of_torch_is_left_alone(monkeypatch):
    """Not even a look at the toolkit: it could not be of use."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cuda_build, "target_flags", lambda *_: pytest.fail("looked for a toolkit"))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", lambda *_, **__: pytest.fail("made an extension"))
    assert reason() == f"this torch ({torch.__version__}) is a CPU build"


def test_no_toolkit(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for home in (None, str(tmp_path)):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        assert "no CUDA toolkit" in reason() and "CUDA 13.0" in reason() and "CUDA_HOME" in reason()


def test_a_toolkit_of_another_major_version(monkeypatch, tmp_path):
    """torch refuses it while everything is being built."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDAExtension", lambda *_, **__: "made")
    nvcc = fake_nvcc(tmp_path, ["80"], release="12.8")
    assert "is CUDA 12.8 and torch is built for CUDA 13.2" in reason() and "CUDA_HOME" in reason()
    nvcc.write_text(nvcc.read_text().replace("12.8", "13.0"))
    assert cuda_build.extension(NAME, True) == "made"


def test_a_build_for_rocm_is_no_cpu_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reason().endswith("is a ROCm build")


def test_the_compilers_name_on_windows(tmp_path):
    (tmp_path / "bin").mkdir()
    for system, name in (("nt", "nvcc.exe"), ("posix", "nvcc")):
        assert cuda_build.compiler_of(str(tmp_path), system) is None
        (tmp_path / "bin" / name).write_text("")
        assert cuda_build.compiler_of(str(tmp_path), system) == tmp_path / "bin" / name
    assert cuda_build.compiler_of(None) is None


def test_the_builds_choice(monkeypatch):
    monkeypatch.setenv(cuda_build.CHOICE, "0")
    assert "told to leave it out (VRM_KERNELS_CUDA=0)" in reason()
    monkeypatch.setenv(cuda_build.CHOICE, "yes")
    with pytest.raises(ValueError, match="0, 1 or unset, not 'yes'"):
        cuda_build.extension(NAME, True)
    monkeypatch.delenv(cuda_build.CHOICE)
    monkeypatch.setenv("VRM_KERNELS_NO_EXTENSION", "1")
    assert "told to leave it out (VRM_KERNELS_NO_EXTENSION)" in reason()


def fake_nvcc(folder, targets, release="13.0", first=(), mode=0o755):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    lines = [f"echo 'Cuda compilation tools, release {release}, V{release}.1'", *(f"echo sm_{t}" for t in targets)]
    nvcc.write_text("\n".join(["#!/bin/sh", *first, *lines, ""]))
    nvcc.chmod(mode)
    return nvcc


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"first": ["echo 'no licence' >&2", "exit 1"]}, r"bin/nvcc --version fails: no licence"),
        ({"first": ["exit 1"]}, r"bin/nvcc --version fails: .*exit status 1"),
        ({"mode": 0o644}, r"bin/nvcc --version fails: .*Permission denied"),
        ({"targets": ["75"]}, r"compiles for none of sm_80, sm_90, sm_100; set TORCH_CUDA_ARCH_LIST"),
    ],
)
def test_a_toolkit_that_does_not_work(monkeypatch, tmp_path, broken, said):
    fake_nvcc(tmp_path, **{"targets": ["80"], **broken})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert re.search(said, reason())


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
    assert cuda_build.extension(NAME, True) == "made"
    ((name, sources), settings) = made[0]
    assert name == NAME and all((ROOT / source).exists() for source in sources) and settings["py_limited_api"]
    assert "-gencode=arch=compute_90,code=sm_90" in settings["extra_compile_args"]["nvcc"]
    assert not any("fast" in flag for flags in settings["extra_compile_args"].values() for flag in flags)


def test_describe_says_why_it_is_missing():
    usable, note = backends.REGISTRY["cuda"].status()
    if usable:
        pytest.skip("it is not missing here")
    if torch.version.cuda is None:
        assert note.startswith("built without CUDA: ")
    row = next(line for line in backends.describe().splitlines() if line.startswith("cuda"))
    assert row.split()[1] == "cuda" and note in row and "\n" not in note
    with pytest.raises(RuntimeError, match="runs on cuda tensors and these are on cpu"):
        backends.resolve("cuda", torch.device("cpu"))
    with pytest.raises(RuntimeError, match=re.escape(note)):
        backends.resolve("cuda", torch.device("cuda"))
