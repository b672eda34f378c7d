"""Decides whether the extension ``vrm_kernels._cuda`` can be built, and how. Used by setup.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path(__file__).parent
REPORT = ROOT / "vrm_kernels" / "_cuda_report.py"
CHOICE = "VRM_KERNELS_CUDA"  # of the build alone: "0" leaves it out, "1" makes its absence an error
DEFAULT_TARGETS = (80, 90, 100)  # of NVIDIA's numbering; the last one's PTX serves what comes after
FLAGS = {"cxx": ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-fvisibility=hidden"], "nvcc": ["-O3", "-lineinfo"]}


def extensions() -> list:
    """The extension, or none, having said why. Needs no GPU, and looks for no toolkit beside a CPU build of torch."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"{CHOICE} must be 0, 1 or unset, not {choice!r}")
    modules, reason = ([], f"the build was told to leave it out ({CHOICE}=0)") if choice == "0" else _find()
    if choice == "1" and reason:
        raise RuntimeError(f"{CHOICE}=1 asks for the CUDA extension, which cannot be built: {reason}")
    _report(reason)
    return modules


def attempt(build_extension, extension, build_lib: str) -> None:
    """Builds it with setuptools' own ``build_extension``; a failure leaves the rest of the package installable."""
    try:
        build_extension(extension)
    except Exception as error:  # whatever a toolchain fails with
        if os.environ.get(CHOICE) == "1":
            raise
        extension.optional = True  # setuptools then does not miss the file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        copied = Path(build_lib, "vrm_kernels", REPORT.name)
        _report(f"nvcc failed: {lines[0] if lines else type(error).__name__}", *([copied] if copied.exists() else []))


def _report(reason: str, *copies: Path) -> None:
    """Leaves the reason where describe() finds it, and says it."""
    for path in (REPORT, *copies):
        path.write_text(
            '"""Written by setup.py: why vrm_kernels._cuda is missing; empty where it was built."""\n\n'
            f"REASON = {reason!r}\n"
        )
    if reason:
        print(f"vrm_kernels: the backend `cuda` was left out: {reason}", file=sys.stderr)


def _find() -> tuple[list, str]:
    try:
        import torch
    except ImportError as error:
        return [], f"torch is not installed here ({error})"
    if torch.version.cuda is None:
        return [], f"this torch ({torch.__version__}) is a CPU build"
    from torch.utils import cpp_extension

    nvcc = Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc"
    if not nvcc.exists():
        return [], f"no CUDA toolkit: torch is built for CUDA {torch.version.cuda}; set CUDA_HOME to such a toolkit"
    sources = [str((FOLDER / name).relative_to(ROOT)) for name in ("binding.cpp", "relation_graphs.cu")]
    depends = [str(p.relative_to(ROOT)) for pattern in ("*.h", "*.cuh") for p in FOLDER.glob(pattern)]
    flags = {**FLAGS, "nvcc": FLAGS["nvcc"] + target_flags(nvcc)}
    module = cpp_extension.CUDAExtension(
        "vrm_kernels._cuda", sources, depends=[*depends, "csrc/edge.h"], extra_compile_args=flags
    )
    return [module], ""


def target_flags(nvcc: Path | str) -> list[str]:
    """What to compile for. torch's own rule where the user set its variable; else not what GPU happens to be visible,
    but the default targets that this toolkit knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = {int(number) for number in re.findall(r"sm_(\d+)\b", listed)}
    targets = [number for number in DEFAULT_TARGETS if number in known]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    return [*flags, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
