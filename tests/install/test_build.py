"""The build leaves out what it cannot build, says why where it is looked for, and lets nothing old pass for new."""

import json
import sys
from pathlib import Path

import pytest
import setuptools
import source_tree
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(source_tree.ROOT / "tools"))
import build_extensions
import cuda_build
import up_to_date
from cuda_build import CannotBuild

STALE = ("_C.abi3.so", "_C.cpython-311-x86_64-linux-gnu.so", "_cuda.abi3.so")


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory) -> Path:
    """A source tree in which older libraries lie, built where there is no compiler."""
    tree = source_tree.copy(tmp_path_factory.mktemp("no compiler") / "tree")
    for name in STALE:
        (tree / "vrm_kernels" / name).write_bytes(b"old")
    said = source_tree.build_in_place(tree, CXX="no-such-c++").stderr
    assert "`cpp` was NOT built: no compiler: no-such-c++ not found" in said
    return tree


def test_the_cause_is_named(without_compiler):
    record = source_tree.record_of(without_compiler)
    assert record["cpp"]["reason"].startswith("no compiler: no-such-c++ not found; install GCC or Clang")
    assert record["cuda"]["reason"]


def test_stale_libraries_go(without_compiler):
    assert not list((without_compiler / "vrm_kernels").glob("*.so"))


def test_asking_for_the_version_keeps_the_record(without_compiler):
    before = source_tree.record_of(without_compiler)
    shown = source_tree.run(sys.executable, "setup.py", "--version", cwd=without_compiler)
    assert shown.stdout.split()[-1] == "0.2.0" and source_tree.record_of(without_compiler) == before


def test_auto_warns_once_and_names_the_cause(without_compiler):
    taken, note, where, warnings = source_tree.auto(sys.executable, without_compiler, PYTHONPATH=str(without_compiler))
    assert taken == "torch" and "no-such-c++ not found" in note and Path(where).is_relative_to(without_compiler)
    said = [line for line in warnings.splitlines() if "backend 'auto' takes 'torch' on cpu" in line]
    assert len(said) == 1 and "no compiler: no-such-c++ not found" in said[0]


def test_a_compiler_that_fails_is_quoted(tmp_path):
    tree = source_tree.copy(tmp_path / "tree")
    compiler = tmp_path / "c++"
    fails = "echo 'ops.cpp:3:10: fatal error: array: No such file or directory' >&2; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-c*) {fails};; *) echo 12.2.0;; esac\n')
    compiler.chmod(0o755)
    source_tree.build_in_place(tree, CXX=str(compiler))
    assert "fatal error: array: No such file or directory" in source_tree.record_of(tree)["cpp"]["reason"]


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py")
"""


def test_required_is_required_whatever_the_reason(tmp_path):
    tree = source_tree.copy(tmp_path / "tree")
    required = {"VRM_KERNELS_REQUIRE_EXTENSION": "1", "expect": None}
    for environment in ({"CXX": "no-such-c++"}, {"VRM_KERNELS_NO_EXTENSION": "1"}):
        said = source_tree.build_in_place(tree, **required, **environment).stderr
        assert "VRM_KERNELS_REQUIRE_EXTENSION asks for the extension vrm_kernels._C" in said
    said = source_tree.run(sys.executable, "-c", WITHOUT_TORCH, cwd=tree, **required).stderr
    assert "asks for the extension vrm_kernels._C: torch is needed to build it" in said


# ---- one extension and the other -------------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch, tmp_path):
    """``build(cpp=..., cuda=...)`` runs the command: each is "built", "left out", or what its compiler dies of."""
    for name in source_tree.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    outcome = {}

    class Compiles(build_ext):
        def run(self):
            (extension,) = self.extensions
            backend = "cuda" if extension.name.endswith("_cuda") else "cpp"
            if outcome[backend] != "built":
                raise RuntimeError(outcome[backend])
            target = Path(self.build_lib, *extension.name.split(".")).with_suffix(".abi3.so")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("new")

    def finder(backend):
        def find(name, abi3):
            if outcome[backend] == "left out":
                raise CannotBuild("told to")
            return setuptools.Extension(name, [f"{backend}.cpp"], py_limited_api=abi3)

        return find

    monkeypatch.setattr(build_extensions, "_cpp_extension", finder("cpp"))
    monkeypatch.setattr(cuda_build, "extension", finder("cuda"))

    def run(**outcomes):
        outcome.update(outcomes)
        command = type("Command", (build_extensions._BuildExtensions, Compiles), {})(
            setuptools.Distribution({"ext_modules": build_extensions.settings()["ext_modules"]})
        )
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()
        package = tmp_path / "lib" / "vrm_kernels"
        record = json.loads((package / "_build.json").read_text())
        return sorted(path.name for path in package.glob("*.so")), {name: of["reason"] for name, of in record.items()}

    return run


def test_both_are_built(build):
    assert build(cpp="built", cuda="built") == (["_C.abi3.so", "_cuda.abi3.so"], {"cpp": "", "cuda": ""})


@pytest.mark.parametrize("failure", ["nvcc fatal: no such host compiler", "left out"])
def test_the_failure_of_one_does_not_cost_the_other(build, failure):
    libraries, reasons = build(cpp="built", cuda=failure)
    assert libraries == ["_C.abi3.so"] and not reasons["cpp"]
    assert ("no such host compiler" in reasons["cuda"]) == (failure != "left out")
    libraries, reasons = build(cpp=failure, cuda="built")  # in the same folder: nothing of the first is left
    assert libraries == ["_cuda.abi3.so"] and reasons["cpp"] and not reasons["cuda"]


def test_a_required_cuda_extension(build, monkeypatch):
    monkeypatch.setenv(cuda_build.CHOICE, "1")
    with pytest.raises(
        build_extensions.Required, match=r"VRM_KERNELS_CUDA=1 asks for .*: the compiler failed: no nvcc"
    ):
        build(cpp="built", cuda="no nvcc")


def test_a_tree_that_cannot_be_written_to_is_built_elsewhere(monkeypatch):
    monkeypatch.setattr(build_extensions.os, "access", lambda path, mode: False)
    options = build_extensions.settings()["options"]
    assert not Path(options["build"]["build_base"]).is_relative_to(source_tree.ROOT)
    assert not Path(options["egg_info"]["egg_base"]).is_relative_to(source_tree.ROOT)


# ---- make build ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"torch": "2.11.0"}, "built beside torch 2.11.0, and this is torch"),
        ({"sources": "0" * 16}, "the sources have changed"),
        ({"reason": "no compiler: c++ not found"}, "tried again: no compiler: c++ not found"),
    ],
)
def test_what_makes_a_build_stale(monkeypatch, tmp_path, changed, said):
    monkeypatch.delenv("VRM_KERNELS_NO_EXTENSION", raising=False)
    monkeypatch.setattr(up_to_date, "ROOT", tmp_path)
    (tmp_path / "csrc").symlink_to(source_tree.ROOT / "csrc")
    (tmp_path / "vrm_kernels").mkdir()
    assert up_to_date.why_not() == "never built"
    torch = up_to_date.importlib.metadata.version("torch")
    record = {
        backend: {
            "reason": "",
            "torch": torch,
            "sources": build_extensions.build_record.fingerprint(source_tree.ROOT / "csrc", backend),
        }
        for backend in ("cpp", "cuda")
    }
    record["cpp"] |= changed
    (tmp_path / "vrm_kernels" / "_build.json").write_text(json.dumps(record))
    assert up_to_date.why_not().startswith(said) and bool(up_to_date.why_not()) == bool(said)


def test_another_torch_is_asked_for(tmp_path):
    """Everything that was installed for the one is older than the note of the other."""
    tree = source_tree.copy(tmp_path / "tree")
    made = tree / ".venv" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.symlink_to(sys.executable)

    def ask(torch):
        source_tree.run("make", ".venv/.torch", f"TORCH={torch}", cwd=tree)
        return (tree / ".venv" / ".torch").stat().st_mtime_ns

    first = ask("torch==2.13.0")
    assert ask("torch==2.13.0") == first < ask("torch==2.12.0")
