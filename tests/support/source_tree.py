"""Copies of the project's sources, and what is run in and beside them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".*venv*", ".git", ".*_cache", ".hypothesis", ".benchmarks", "build", "dist", "site", "runs", "shared")
MADE = ("*.so", "*.egg-info", "__pycache__", "_build.json")
SWITCHES = ("VRM_KERNELS_NO_EXTENSION", "VRM_KERNELS_REQUIRE_EXTENSION", "VRM_KERNELS_CUDA", "CXX", "PYTHONPATH")


def copy(to: Path) -> Path:
    """The sources as a fresh clone has them."""
    return shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*LEFT_OUT, *MADE))


def run(*command, cwd: Path, expect: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
    """With none of the build's switches but those given; ``expect`` is the exit status, None any failure."""
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=600
    )
    right = done.returncode != 0 if expect is None else done.returncode == expect
    assert right, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def build_in_place(tree: Path, **settings) -> subprocess.CompletedProcess:
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **settings)


def record_of(tree: Path) -> dict:
    return json.loads((tree / "vrm_kernels" / "_build.json").read_text())


AUTO = """
import torch, vrm_kernels, warnings
warnings.simplefilter("always")
logits = [torch.randn(6, 5, requires_grad=True) for _ in range(4)]
for _ in range(2):
    vrm_kernels.VRMLoss(1.0, 1.0)(*logits, torch.zeros(6, dtype=torch.long)).backward()
print(vrm_kernels.backends.resolve("auto", torch.device("cpu")))
print(vrm_kernels.backends.REGISTRY["cpp"].status()[1])
print(vrm_kernels.__file__)
"""


def auto(python: Path | str, cwd: Path, **environment) -> tuple[str, str, str, str]:
    """What "auto" takes on the CPU, the note on `cpp`, where the package lies, and all warnings of two calls."""
    done = run(python, "-c", AUTO, cwd=cwd, **environment)
    return (*done.stdout.splitlines()[-3:], done.stderr)
