"""The `cuda` backend: whether its extension ``vrm_kernels._cuda`` can run here, and if not, the reason."""

import functools
import importlib

import torch


def status() -> tuple[bool, str]:
    """``(usable, note)``: for the device that is current, or why it is missing."""
    return _load()


# As the status of `cpp`: torch.compile need not trace this.
status._dynamo_marked_constant = True


@functools.cache
def _load() -> tuple[bool, str]:
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
