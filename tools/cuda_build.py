"""Decides whether the extension ``vrm_kernels._cuda`` can be built, and how. Used by setup.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "csrc" / "cuda"
REPORT = ROOT / "vrm_kernels" / "_cuda_report.py"
CHOICE = "VRM_KERNELS_CUDA"  # of the build alone: "0" leaves it out, "1" makes its absence an error
DEFAULT_TARGETS = (80, 90, 100)  # of NVIDIA's numbering; the last one's PTX serves what comes after
FLAGS = {"cxx": ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-fvisibility=hidden"], "nvcc": ["-O3", "-lineinfo"]}


class Required(RuntimeError):
    """The build was told to have the extension, and cannot."""


def extensions() -> list:
    """The extension, or none, having said why. Needs no GPU, and looks for no toolkit beside a CPU build of torch."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"{CHOICE} must be 0, 1 or unset, not {choice!r}")
    modules, reason = ([], f"the build was told to leave it out ({CHOICE}=0)") if choice == "0" else _find()
    if reason:
        leave_out(reason)
    else:
        _report("")
    return modules


def is_cuda(extension) -> bool:
    return extension.name.endswith("._cuda")


def leave_out(reason: str) -> None:
    """Says so, or raises where the build was told to have it."""
    if os.environ.get(CHOICE) == "1":
        raise Required(f"{CHOICE}=1 asks for the CUDA extension, which cannot be built: {reason}")
    _report(reason)


def attempt(build_extension, extension, build_lib: str) -> None:
    """Builds it with setuptools' own ``build_extension``; a failure leaves the rest of the package installable."""
    try:
        build_extension(extension)
    except Exception as error:  # whatever a toolchain fails with
        give_up(error, build_lib)
        extension.optional = True  # setuptools then does not miss the file


def give_up(error: Exception, build_lib: str) -> None:
    """After ``error``, which ended its build: says so, or raises where the build was told to have the extension."""
    if os.environ.get(CHOICE) == "1":
        raise Required(f"{CHOICE}=1 asks for the CUDA extension, whose build failed: {error}") from error
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
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return [], f"this torch ({torch.__version__}) is a {'ROCm' if torch.version.hip else 'CPU'} build"

    nvcc = compiler_of(cpp_extension.CUDA_HOME)
    if nvcc is None:
        return [], f"no CUDA toolkit: torch is built for CUDA {torch.version.cuda}; set CUDA_HOME to such a toolkit"
    # torch refuses another major version too, but only once the build of everything has begun.
    toolkit = re.search(r"release (\d+)\.(\d+)", _output_of(nvcc, "--version"))
    if toolkit and int(toolkit[1]) != int(torch.version.cuda.split(".")[0]):
        found = f"the toolkit in {cpp_extension.CUDA_HOME} is CUDA {toolkit[1]}.{toolkit[2]}"
        return [], f"{found} and torch is built for CUDA {torch.version.cuda}; set CUDA_HOME to such a toolkit"
    sources = [str((FOLDER / name).relative_to(ROOT)) for name in ("binding.cpp", "relation_graphs.cu")]
    depends = [str(p.relative_to(ROOT)) for pattern in ("*.h", "*.cuh") for p in FOLDER.glob(pattern)]
    flags = {**FLAGS, "nvcc": FLAGS["nvcc"] + target_flags(nvcc)}
    module = cpp_extension.CUDAExtension(
        "vrm_kernels._cuda", sources, depends=[*depends, "csrc/edge.h"], extra_compile_args=flags
    )
    return [module], ""


def compiler_of(toolkit: str | None, system: str = os.name) -> Path | None:
    """nvcc of the toolkit in this folder, if there is one."""
    nvcc = Path(toolkit or "", "bin", "nvcc.exe" if system == "nt" else "nvcc")
    return nvcc if toolkit and nvcc.exists() else None


def _output_of(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def target_flags(nvcc: Path | str) -> list[str]:
    """What to compile for. torch's own rule where the user set its variable; else not what GPU happens to be visible,
    but the default targets that this toolkit knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    known = {int(number) for number in re.findall(r"sm_(\d+)\b", _output_of(nvcc, "--list-gpu-code"))}
    targets = [number for number in DEFAULT_TARGETS if number in known]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    return [*flags, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
