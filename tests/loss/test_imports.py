"""Importing the package: torch and the standard library, nothing else, and nothing compiled."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked} or name == "vrm_kernels._C":
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_torch_and_the_standard_library_alone():
    code = (
        "import sys, torch, torch.utils.data\n"
        "before = set(sys.modules)\n"
        "import vrm_kernels\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('vrm_kernels')))"
    )
    new, ours = (set(line.split()) for line in run(code).splitlines())
    assert new - set(sys.stdlib_module_names) - {"torch"} == {"vrm_kernels"}
    assert not {"vrm_kernels._C", "vrm_kernels.backends.cpp.backend", "vrm_distill"} & ours
    assert "vrm_kernels.loss" in ours


def test_it_works_without_numpy_triton_or_the_extension():
    code = BLOCKED.format(blocked={"numpy", "triton", "scipy", "sklearn", "kornia", "matplotlib"}) + (
        "import torch, vrm_kernels\n"
        "logits = [torch.randn(6, 5, requires_grad=True) for _ in range(4)]\n"
        "loss = vrm_kernels.VRMLoss(1.0, 1.0)(*logits, torch.zeros(6, dtype=torch.long))\n"
        "loss.backward()\n"
        "print(vrm_kernels.backends.resolve('auto', torch.device('cpu')), bool(loss.isfinite()))\n"
        "print(float(vrm_kernels.functional.quantile(torch.arange(5.), 0.5)))\n"
        "print(vrm_kernels.backends.describe())"
    )
    first, median, *table = run(code).splitlines()
    assert first == "torch True" and median == "2.0"
    cpp = next(line for line in table if line.startswith("cpp"))
    assert " no " in cpp and "blocked: vrm_kernels._C" in cpp


def test_public_names():
    assert run("import vrm_kernels; print(*sorted(vrm_kernels.__all__))").split() == [
        "DualViewDataset", "VRMLoss", "__version__", "backends", "functional",
    ]  # fmt: skip


def test_importing_prints_nothing_and_warns_of_nothing():
    assert run("import torch, warnings; warnings.simplefilter('error'); import vrm_kernels") == ""


def test_the_kernels_do_not_import_the_recipe():
    importing = [
        str(path)
        for path in (ROOT / "vrm_kernels").rglob("*.py")
        if re.search(r"^\s*(from|import) vrm_distill", path.read_text(), re.MULTILINE)
    ]
    assert importing == []


# Each file imports what comes after its own part, never what comes before; CONTRIBUTING.md draws the same map.
PARTS = (
    "adapters", "__init__", "loss", "functional", "distributed", "ops", "dense", "checks", "backends", "graph", "data",
)  # fmt: skip


def _imports(path: Path) -> set[str]:
    """The parts of vrm_kernels that a file of it imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = [name.split(".")[1] for name in names if name.startswith("vrm_kernels.")]
    return {name for name in ours if name in PARTS}


def test_nothing_imports_upward():
    package = ROOT / "vrm_kernels"
    parts = {path: path.relative_to(package).parts[0].removesuffix(".py") for path in package.rglob("*.py")}
    assert set(PARTS) <= set(parts.values())
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, part in parts.items()
        if part in PARTS
        for name in _imports(path)
        if PARTS.index(name) < PARTS.index(part)
    ]
    assert upward == []
