"""What a backend says of itself on this machine: ``(usable, note)``."""

from collections.abc import Callable
from typing import Any, TypeVar

Status = Callable[[], tuple[bool, str]]
F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """torch.compile need not trace an import. This is all that torch.compiler.assume_constant_result does, besides
    taking a second to import the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
