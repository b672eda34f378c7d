"""The package as its users get it: a source distribution, the wheel that pip builds of it in isolation, and what an
environment makes of them. ``make test-install`` runs these."""

import os
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import source_tree
import torch

pytestmark = pytest.mark.install
TORCH = f"torch=={torch.__version__}"
SDIST = "from setuptools import build_meta; print(build_meta.build_sdist(__import__('sys').argv[1]))"


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    tree = source_tree.copy(tmp_path_factory.mktemp("sdist") / "tree with spaces")
    source_tree.run(sys.executable, "-c", SDIST, "..", cwd=tree)
    (made,) = tree.parent.glob("*.tar.gz")
    return made


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built by pip in isolation, beside the torch that is here: the newest release would be gigabytes."""
    if torch.version.cuda is not None:
        pytest.skip("an isolated build would download this CUDA build of torch")
    folder = tmp_path_factory.mktemp("wheel")
    constraint = folder / "constraints.txt"
    constraint.write_text(f"{TORCH}\n")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist)
    source_tree.run(*pip, cwd=folder, PIP_CONSTRAINT=str(constraint), PIP_BUILD_CONSTRAINT=str(constraint))
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
def environment(tmp_path):
    """``environment(what)`` installs it into a fresh environment that finds this torch; gives its Python."""

    def make(what: Path, **settings) -> Path:
        venv.create(tmp_path / "venv", with_pip=False)
        python = tmp_path / "venv" / "bin" / "python"
        found = source_tree.run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
        site = Path(found.stdout.strip())
        (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
        source_tree.run(*pip, "--no-build-isolation", "--ignore-installed", what, cwd=tmp_path, **settings)
        return python

    return make


def test_the_source_distribution_has_all_that_the_repository_has(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    copy = sdist.parent / "tree with spaces"
    kept = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    missing = {name for name in kept - names if "egg-info" not in name and "__pycache__" not in name}
    assert not missing and {"csrc/edge.h", "tools/build_extensions.py", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]


def test_the_wheel_is_for_every_python_and_holds_the_library(wheel):
    assert "-cp310-abi3-" in wheel.name and wheel.name.startswith("vrm_kernels-0.2.0-")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"vrm_kernels/_C.abi3.so", "vrm_kernels/_build.json", "vrm_kernels/py.typed"} <= names
    assert "vrm_distill/presets/digits.yaml" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "tools", "benchmarks"))]


def test_the_wheel_installs_and_computes(wheel, environment, tmp_path):
    python = environment(wheel)
    taken, note, where, warnings = source_tree.auto(python, tmp_path)
    assert taken == "cpp" and "fused kernels" in note and "takes 'torch'" not in warnings
    assert Path(where).is_relative_to(tmp_path)
    smoke = source_tree.run(python, source_tree.ROOT / "tests" / "install" / "smoke.py", cwd=tmp_path)
    assert "cpp agrees with the reference" in smoke.stdout


def test_without_a_compiler_it_installs_and_says_so_once(sdist, environment, tmp_path):
    python = environment(sdist, CXX="no-such-c++")
    taken, note, _, warnings = source_tree.auto(python, tmp_path)
    assert taken == "torch" and note.startswith("no compiler: no-such-c++ not found")
    assert warnings.count("backend 'auto' takes 'torch'") == 1


def test_without_an_extension_the_wheel_is_for_every_platform(sdist, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist)
    source_tree.run(*pip, cwd=tmp_path, VRM_KERNELS_NO_EXTENSION="1")
    (made,) = tmp_path.glob("*.whl")
    assert made.name == "vrm_kernels-0.2.0-py3-none-any.whl"
    source_tree.run(*pip, cwd=tmp_path, expect=None, VRM_KERNELS_NO_EXTENSION="1", VRM_KERNELS_REQUIRE_EXTENSION="1")


@pytest.fixture
def built_tree(wheel, tmp_path) -> Path:
    """A source tree with the library in it that its sources give, as an editable install leaves it."""
    tree = source_tree.copy(tmp_path / "tree")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("_C.abi3.so", "_build.json"):
            archive.extract(f"vrm_kernels/{name}", tree)
    return tree


def test_a_change_of_the_sources_makes_the_library_outdated(built_tree):
    def auto():
        return source_tree.auto(sys.executable, built_tree, PYTHONPATH=str(built_tree))

    assert auto()[0] == "cpp"
    with (built_tree / "csrc" / "edge.h").open("a") as header:
        header.write("// changed\n")
    taken, note, _, warnings = auto()
    assert taken == "torch" and "built from other sources" in note and "run 'make build'" in warnings


def test_a_source_tree_in_the_way_says_so(wheel, environment, tmp_path):
    tree = source_tree.copy(tmp_path / "tree")
    taken, note, where, _ = source_tree.auto(environment(wheel), tree)
    assert taken == "torch" and f"Python uses the source tree {tree}" in note and Path(where).is_relative_to(tree)


def test_a_tree_that_cannot_be_written_to(tmp_path):
    tree = source_tree.copy(tmp_path / "tree")
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = tmp_path / "out"
    out.mkdir()
    without = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and nothing here takes that from it")
        without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, tree)
    source_tree.run(*without, *pip, cwd=out, VRM_KERNELS_NO_EXTENSION="1")
    assert len(list(out.glob("*.whl"))) == 1


def test_make_finds_the_torch_of_an_environment(tmp_path):
    """With an empty TORCH: an activated virtual environment's, which is not among the system's packages."""
    tree = source_tree.copy(tmp_path / "tree")
    source_tree.run("make", ".venv/bin/python", "TORCH=", f"PYTHON={sys.executable}", cwd=tree)
    found = source_tree.run(
        tree / ".venv" / "bin" / "python", "-c", "import torch; print(torch.__file__)", cwd=tmp_path
    )
    assert found.stdout.strip() == torch.__file__
