"""The `triton` backend: whether it can run here (Triton, a GPU that it compiles for), and if not, the reason. See
backend.py; imports no Triton."""

import functools
import importlib.metadata
import os

import torch

from vrm_kernels.backends.status import constant, cuda_index

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)


@constant
def status(device: torch.device | None = None) -> tuple[bool, str]:
    """``(usable, note)`` of that device. Imports no Triton: that takes a second."""
    return _status(cuda_index(device))


def interpreter_devices() -> tuple[str, ...]:
    """Triton's own switch makes its kernels run on the CPU, from its import to the end of the process."""
    return ("cpu",) if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes") else ()


@functools.cache
def _status(device: int | None) -> tuple[bool, str]:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False, f"Triton is not installed: pip install 'triton>={'.'.join(map(str, OLDEST))}'"
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return False, f"Triton {version} is too old: {'.'.join(map(str, OLDEST))} or newer is needed"
    if interpreter_devices():
        return True, f"Triton {version} interpreted on the CPU (TRITON_INTERPRET is set): for tests, very slow"
    if device is None:
        return False, f"Triton {version} is installed, but torch {torch.__version__} finds no CUDA or ROCm device"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}: 8.0 or newer is needed"
    return True, f"Triton {version} on {name}"
