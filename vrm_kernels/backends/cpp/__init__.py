"""The `cpp` backend: whether its extension ``vrm_kernels._C`` can run here, and if not, the reason."""

import functools
import importlib

import torch

from vrm_kernels.backends import build_record
from vrm_kernels.backends.status import constant


@constant
def status(device: torch.device | None = None) -> tuple[bool, str]:
    """``(usable, note)``: what the build can do on this CPU, or why it is missing."""
    return _load()


@functools.cache
def _load() -> tuple[bool, str]:
    if reason := build_record.why_left_out("cpp"):
        return False, reason
    try:
        importlib.import_module("vrm_kernels._C")
        built_from, compiler = torch.ops.vrm_kernels.cpu_built_from()
    except ImportError as error:
        return False, build_record.why_it_does_not_load("cpp", torch.__version__, error)
    if refusal := build_record.why_outdated("cpp", built_from):
        return False, refusal
    return True, f"fused kernels, using {torch.ops.vrm_kernels.cpu_isa()} (built by {compiler})"
