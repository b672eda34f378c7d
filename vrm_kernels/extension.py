"""The compiled extension ``vrm_kernels._C``: loaded at first use, and if it cannot be, the reason."""

import functools
import importlib

import torch


def status() -> tuple[bool, str]:
    """``(usable, note)``: what the build can do on this CPU, or why it is missing."""
    return _load()


# torch.compile need not trace an import. This is all that torch.compiler.assume_constant_result does, besides taking a
# second to import the compiler.
status._dynamo_marked_constant = True


@functools.cache
def _load() -> tuple[bool, str]:
    try:
        module = importlib.import_module("vrm_kernels._C")
    except ImportError as error:
        return False, f"{_why_missing()} ({error})"
    return True, module.build_info()


def _why_missing() -> str:
    try:
        from vrm_kernels import _build_report
    except ImportError:
        return "the extension vrm_kernels._C was never built: run 'make build'"
    return _build_report.REASON or "the extension vrm_kernels._C was built but does not load: run 'make build' again"


def cuda_status() -> tuple[bool, str]:
    """:func:`status` of ``vrm_kernels._cuda``, the CUDA kernels."""
    return _load_cuda()


cuda_status._dynamo_marked_constant = True


@functools.cache
def _load_cuda() -> tuple[bool, str]:
    try:
        from vrm_kernels import _cuda_report
    except ImportError:
        return False, "built without CUDA: the extension vrm_kernels._cuda was never built: run 'make build'"
    if _cuda_report.REASON:
        return False, f"built without CUDA: {_cuda_report.REASON}"
    if not torch.cuda.is_available():
        return False, "built with CUDA, but torch finds no CUDA device here"
    try:
        importlib.import_module("vrm_kernels._cuda")
    except ImportError as error:
        return False, f"the extension vrm_kernels._cuda was built but does not load: run 'make build' again ({error})"
    if refusal := torch.ops.vrm_kernels.cuda_refusal():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return False, (
            f"the CUDA kernels are not built for {torch.cuda.get_device_name()} ({refusal}): build again with "
            f"TORCH_CUDA_ARCH_LIST={capability}"
        )
    return True, "CUDA C++ kernels; not yet measured on a GPU"
