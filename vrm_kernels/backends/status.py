"""What a backend says of itself: ``(usable, note)``."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


class Status(Protocol):
    def __call__(self, device: torch.device | None = None) -> tuple[bool, str]:
        """Of a device of the backend's types; by default of the one that is current."""


def cuda_index(device: torch.device | None) -> int | None:
    """Which GPU ``device`` is, or ``None`` where torch finds none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def constant(function: F) -> F:
    """torch.compile need not trace an import. This is all that torch.compiler.assume_constant_result does, besides
    taking a second to import the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
