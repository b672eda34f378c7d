"""How much memory a call takes, as the kernel counts it."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str = "VmRSS") -> int:
    """A memory field of this process (``VmRSS``, ``RssAnon``, ``VmHWM``, ``VmSize``), bytes; 0 where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def give_back_freed() -> None:
    """Return freed heap to the system, so that it counts neither as held before a call nor as free room within it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """``(result, bytes)``: the highest resident memory during ``call`` less that just before it.

    Everything that became resident counts: temporaries, results, workspaces of the libraries. ``None`` where the system
    cannot reset its high-water mark (Linux can, through /proc/self/clear_refs).
    """
    give_back_freed()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return call(), None
    before = resident()
    result = call()
    return result, max(0, resident("VmHWM") - before)


def limit_address_space(more: int) -> None:
    """Make this process fail, instead of the machine, when it asks for ``more`` bytes above what it has now."""
    if resource is not None:
        limit = resident("VmSize") + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def is_exhausted(error: BaseException | str) -> bool:
    """Whether ``error`` says that memory ran out (torch's CPU allocator raises a plain ``RuntimeError``)."""
    text = str(error).lower()
    words = ("bad_alloc", "allocate memory", "out of memory", "memoryerror", "insufficient memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)
