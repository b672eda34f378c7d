"""What a backend says of itself on this machine: ``(usable, note)``."""

from collections.abc import Callable

Status = Callable[[], tuple[bool, str]]


def constant(status: Status) -> Status:
    """torch.compile need not trace an import. This is all that torch.compiler.assume_constant_result does, besides
    taking a second to import the compiler."""
    status._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return status
