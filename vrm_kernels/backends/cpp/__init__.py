"""The `cpp` backend: whether its extension ``vrm_kernels._C`` can run here, and if not, the reason."""

import functools
import importlib


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
