"""What a backend says of itself: ``(usable, note)``."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


class Status(Protocol):
    def __call__(self, device: torch.device | None = None) -> tuple[bool, str]:
        """What it says for a device of the backend's types; by default for the current one."""


def cuda_index(device: torch.device | None) -> int | None:
    """Which GPU ``device`` is, or ``None`` where torch finds none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def constant(function: F) -> F:
    """Marks a function whose result torch.compile takes for a constant, so that it does not trace an import.
    torch.compiler.assume_constant_result does the same, but takes a second to import the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
