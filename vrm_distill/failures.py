"""What went wrong, in a sentence: the one place that turns exceptions into words for the person at the command line."""

import errno
import re
import traceback
from pathlib import Path

import torch

ERROR = "error.txt"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A loader in another process passes its error on as a text that ends with the error's own traceback.
_IN_A_WORKER = re.compile(r"^Caught \w+ in DataLoader worker process.*^[\w.]+: ", re.DOTALL | re.MULTILINE)


class Refused(Exception):
    """An option that cannot be: ``option`` is its name, ``None`` if the message says it."""

    def __init__(self, option: str | None, message: object) -> None:
        super().__init__(f"argument {option}: {message}" if option else str(message))


def explain(error: BaseException, folder: Path | None = None) -> str:
    """One sentence on ``error``, and what to do where that is known; ``folder`` is the run's."""
    text = printable(_IN_A_WORKER.sub("", str(error)))
    if isinstance(error, OSError) and error.errno in _FULL:
        where = error.filename or folder or "the files"
        return f"no space is left on the disk of {where}: free some, and --resume goes on from the last checkpoint"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"out of memory ({_first(text) or type(error).__name__}): a smaller --batch-size, or --accumulate N"
    if "find_unused_parameters" in text:
        return "a parameter of the network gets no gradient in some process: add --find-unused-parameters"
    if "DataLoader worker" in text and "exited unexpectedly" in text:
        return f"{_first(text)}: most often it ran out of memory; --workers 0 reads images without such processes"
    # This package's own errors are whole sentences; other errors need their type and their place.
    if isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("vrm_"):
        return text
    return f"{type(error).__name__}: {_first(text)} ({_place(error)})"


def write_traceback(error: BaseException, folder: Path) -> str:
    """Keep the traceback in ``folder`` for whoever looks into it; where it is, or nothing if it cannot be written."""
    try:
        (folder / ERROR).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return ""
    return f"; the traceback is in {folder / ERROR}"


def printable(text: str) -> str:
    """``text`` with the characters that would steer a terminal spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _first(text: str) -> str:
    return text.strip().partition("\n")[0]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "nowhere"
