"""The folder of a run: made, found free of an earlier run, and held by one run at a time."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


def prepare_folder(folder: Path, outputs: Sequence[str], overwrite: bool) -> None:
    """Make ``folder``, and make sure that it can be written and holds no earlier run.

    Raises:
        OSError: saying what is in the way and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is a file: name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise OSError(
            f"{folder} is not empty: name another folder, add --resume to go on with the run in it, or --overwrite to "
            f"replace it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): name a folder that can be written") from error
    hold(folder)
    for name in outputs:
        (folder / name).unlink(missing_ok=True)


def hold(folder: Path) -> None:
    """Keep other runs out of ``folder`` until this process ends, however it ends.

    The lock is on the folder itself and leaves no file. A file system without locks holds nothing, and stops nobody.

    Raises:
        OSError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(f"another run is writing to {folder}: wait for it, or name another folder") from None
    except OSError:
        os.close(descriptor)
        return
    release(folder)
    _HELD[folder.resolve()] = descriptor


def release(folder: Path) -> None:
    """Let other runs of this process into ``folder``."""
    if (descriptor := _HELD.pop(folder.resolve(), None)) is not None:
        os.close(descriptor)


_HELD: dict[Path, int] = {}
