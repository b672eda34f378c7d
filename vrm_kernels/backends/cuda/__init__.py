"""The `cuda` backend: whether its extension ``vrm_kernels._cuda`` can run here, and if not, the reason."""

import functools
import importlib

import torch

from vrm_kernels.backends import build_record
from vrm_kernels.backends.status import constant, cuda_index


@constant
def status(device: torch.device | None = None) -> tuple[bool, str]:
    """``(usable, note)``: whether it was built for that device, or why it is missing."""
    return _load(cuda_index(device))


@functools.cache
def _load(device: int | None) -> tuple[bool, str]:
    if reason := build_record.why_left_out("cuda"):
        return False, f"built without CUDA: {reason}"
    if device is None:
        return False, "built with CUDA, but torch finds no CUDA device here"
    try:
        importlib.import_module("vrm_kernels._cuda")
    except ImportError as error:
        return False, build_record.why_it_does_not_load("cuda", torch.__version__, error)
    if refusal := build_record.why_outdated("cuda", torch.ops.vrm_kernels.cuda_built_from()[0]):
        return False, refusal
    with torch.cuda.device(device):
        refusal = torch.ops.vrm_kernels.cuda_refusal()
    if refusal:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return False, (
            f"the CUDA kernels are not built for {torch.cuda.get_device_name(device)} ({refusal}): build again with "
            f"TORCH_CUDA_ARCH_LIST={capability}"
        )
    return True, "CUDA C++ kernels"
