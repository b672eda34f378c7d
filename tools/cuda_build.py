"""Decides whether the extension ``vrm_kernels._cuda`` can be built, and how. Used by build_extensions.py."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "csrc" / "cuda"
CHOICE = "VRM_KERNELS_CUDA"  # of the build alone: "0" leaves it out, "1" makes its absence an error
DEFAULT_TARGETS = (80, 90, 100)  # of NVIDIA's numbering; the last one's PTX serves what comes after
FLAGS = {"cxx": ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-fvisibility=hidden"], "nvcc": ["-O3", "-lineinfo"]}


class CannotBuild(Exception):
    """Why an extension is left out."""


def extension(name: str, abi3: bool):
    """The extension, or :class:`CannotBuild`. Needs no GPU, and looks for no toolkit beside a CPU build of torch."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"{CHOICE} must be 0, 1 or unset, not {choice!r}")
    if choice == "0" or os.environ.get("VRM_KERNELS_NO_EXTENSION"):
        switch = f"{CHOICE}=0" if choice == "0" else "VRM_KERNELS_NO_EXTENSION"
        raise CannotBuild(f"the build was told to leave it out ({switch})")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuild(f"torch is needed to build it and is not installed here ({error})") from error
    if torch.version.cuda is None:
        raise CannotBuild(f"this torch ({torch.__version__}) is a {'ROCm' if torch.version.hip else 'CPU'} build")
    nvcc = compiler_of(cpp_extension.CUDA_HOME)
    if nvcc is None:
        raise CannotBuild(
            f"no CUDA toolkit: torch is built for CUDA {torch.version.cuda}; set CUDA_HOME to such a toolkit"
        )
    # torch refuses another major version too, but less plainly.
    toolkit = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if toolkit and int(toolkit[1]) != int(torch.version.cuda.split(".")[0]):
        found = f"the toolkit in {cpp_extension.CUDA_HOME} is CUDA {toolkit[1]}.{toolkit[2]}"
        raise CannotBuild(f"{found} and torch is built for CUDA {torch.version.cuda}; set CUDA_HOME to such a toolkit")
    sources = [str(path.relative_to(ROOT)) for path in sorted((*FOLDER.rglob("*.cpp"), *FOLDER.rglob("*.cu")))]
    flags = {**FLAGS, "nvcc": FLAGS["nvcc"] + target_flags(nvcc)}
    macros = [("USE_CUDA", None)]  # opens the part of the stable ABI that is CUDA's
    return cpp_extension.CUDAExtension(
        name, sources, extra_compile_args=flags, define_macros=macros, py_limited_api=abi3
    )


def compiler_of(toolkit: str | None, system: str = os.name) -> Path | None:
    """nvcc of the toolkit in this folder, if there is one."""
    nvcc = Path(toolkit or "", "bin", "nvcc.exe" if system == "nt" else "nvcc")
    return nvcc if toolkit and nvcc.exists() else None


def output_of(nvcc: Path | str, *arguments: str) -> str:
    try:
        return subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise CannotBuild(f"{nvcc} {' '.join(arguments)} fails: {said[0] if said else error}") from error


def target_flags(nvcc: Path | str) -> list[str]:
    """What to compile for. torch's own rule where the user set its variable; else not what GPU happens to be visible,
    but the default targets that this toolkit knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    known = {int(number) for number in re.findall(r"sm_(\d+)\b", output_of(nvcc, "--list-gpu-code"))}
    targets = [number for number in DEFAULT_TARGETS if number in known]
    if not targets:
        wanted = ", ".join(f"sm_{number}" for number in DEFAULT_TARGETS)
        raise CannotBuild(f"{nvcc} compiles for none of {wanted}; set TORCH_CUDA_ARCH_LIST to the GPU that is meant")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    return [*flags, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
