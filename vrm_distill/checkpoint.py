"""Files that are whole or not there: models as safetensors, and the state of a run. Loading one executes nothing."""

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from vrm_distill import foreign
from vrm_distill.models import create_model, is_known

# What load_checkpoint needs to find in a file's metadata.
_REBUILD = ("model", "in_channels", "classes")


def save_checkpoint(path: str | os.PathLike, model: nn.Module, metadata: dict[str, str | int | float]) -> None:
    """Write ``model`` and ``metadata`` to ``path``: whole or, if interrupted, not at all.

    Args:
        metadata: must have ``model`` (a name for ``create_model``), ``in_channels`` and ``classes``; all values are
            kept as text.

    Raises:
        ValueError: one of those is missing, or the model has NaN or infinite numbers.
        OSError: the file cannot be written; an earlier file at ``path`` is then untouched.
    """
    from safetensors.torch import save

    if missing := [key for key in _REBUILD if key not in metadata]:
        raise ValueError(f"the metadata of a checkpoint must name {', '.join(_REBUILD)}: missing {', '.join(missing)}")
    # Cloned, because a file of this format has no two tensors over one storage (tied weights).
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in model.state_dict().items()}
    check_finite(tensors, f"{path} is not written: the model")
    payload = save(tensors, {key: str(value) for key, value in metadata.items()})
    write_atomically(path, lambda file: file.write(payload))


def load_checkpoint(path: str | os.PathLike, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, str]]:
    """The model of :func:`save_checkpoint`, in evaluation mode on the CPU, and its metadata.

    Args:
        model: what to load the weights into; by default a new model of the name in the file. A name that is a path into
            Python code (``package.module:factory``) is not followed, since a file must not choose what runs: build
            that model and pass it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of this package, of a model that this version does not know, or of another shape.
    """
    state, metadata = read_weights(path)
    if missing := [key for key in _REBUILD if key not in metadata]:
        raise ValueError(f"{path} was not written by save_checkpoint: its metadata lacks {', '.join(missing)}")
    if model is None:
        name = metadata["model"]
        if not is_known(name):
            raise ValueError(
                f"{path} is of an unknown model {name!r}: build it and pass it as load_checkpoint(..., model)"
            )
        model = create_model(name, int(metadata["in_channels"]), int(metadata["classes"]))
    foreign.fit(model, state, path)
    return model.eval(), metadata


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and text metadata, of a safetensors file or of a PyTorch file that holds a state dict.

    A PyTorch file may hold the state dict under one of the keys that training code commonly uses.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: a folder, neither of these files, or one that would have to run code to be read.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        there = ", ".join(sorted(file.name for file in Path(path).glob("*.safetensors")))
        raise ValueError(f"{path} is a folder: name the file in it, {there or 'for instance student.safetensors'}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        if Path(path).suffix not in (".pt", ".pth", ".bin", ".tar", ".ckpt"):
            raise ValueError(f"{path} is not a safetensors checkpoint: {error}") from error
    try:
        content = foreign.read_plain(path)
    except ValueError as error:
        raise ValueError(f"{error}; save a state dict: torch.save(model.state_dict(), FILE)") from None
    return foreign.find_state(content, path), {}


def check_finite(state: dict[str, Tensor], what: str | os.PathLike) -> None:
    """Refuse weights that a diverged training left; ``what`` they are of begins the sentence.

    Raises:
        ValueError: naming the first tensor with a NaN or an infinite number, and how many more there are.
    """
    bad = [name for name, x in state.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise ValueError(f"{what} has NaN or infinite numbers in {bad[0]}{more}: take an earlier checkpoint of it")


def fingerprint(state: dict[str, Tensor]) -> str:
    """A number of the tensors of a state dict: another one if a name or a bit of a value is another."""
    digest = hashlib.blake2b(digest_size=16)
    for name, x in state.items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_state(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write a dict of tensors, numbers, text, lists and dicts: whole or, if interrupted, not at all.

    It is made in memory first: torch's own writer turns a full disk and Ctrl-C into errors of its own.
    """
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load_state(path: str | os.PathLike) -> dict[str, Any]:
    """What :func:`save_state` wrote, tensors on the CPU.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: another kind of file, or one that would have to run code to be read.
    """
    return foreign.read_plain(path)


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, and move it there once it is on the disk.

    Renaming within one folder replaces the file in one step: a reader, after a kill or a full disk too, finds the old
    file or the new one.
    """
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_temporary(path), delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # as open() would have made it, not private like a temporary file
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on the disk, too
    finally:
        os.close(folder)


def remove_leftovers(path: Path) -> None:
    """Remove what a killed :func:`write_atomically` left beside ``path``."""
    for leftover in path.parent.glob(f"{_temporary(path)}*"):
        leftover.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    return f".{path.name}."
