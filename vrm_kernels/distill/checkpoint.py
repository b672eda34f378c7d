"""Checkpoints: a state dict and what rebuilds its model, in one safetensors file that holds no code."""

import os
import tempfile
from pathlib import Path

from torch import nn

from vrm_kernels.distill.models import create_model

# What load_checkpoint needs to find in a file's metadata.
_REBUILD = ("model", "in_channels", "classes")


def save_checkpoint(path: str | os.PathLike, model: nn.Module, metadata: dict[str, str | int | float]) -> None:
    """Write ``model`` and ``metadata`` to ``path``: whole or, if interrupted, not at all.

    Args:
        metadata: must have ``model`` (a name in ``MODELS``), ``in_channels`` and ``classes``; all values are kept as
            text.

    Raises:
        ValueError: one of those is missing.
        OSError: the file cannot be written; an earlier file at ``path`` is then untouched.
    """
    from safetensors.torch import save

    if missing := [key for key in _REBUILD if key not in metadata]:
        raise ValueError(f"the metadata of a checkpoint must name {', '.join(_REBUILD)}: missing {', '.join(missing)}")
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    payload = save(tensors, {key: str(value) for key, value in metadata.items()})
    path = Path(path)
    # Renaming within one folder replaces the file in one step: a reader sees the old one or the new one.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # as open() would have made it, not private like a temporary file
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load_checkpoint(path: str | os.PathLike) -> tuple[nn.Module, dict[str, str]]:
    """The model of :func:`save_checkpoint`, in evaluation mode on the CPU, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of this package, or of a model that this version does not know.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors checkpoint: {error}") from error
    if missing := [key for key in _REBUILD if key not in metadata]:
        raise ValueError(f"{path} was not written by save_checkpoint: its metadata lacks {', '.join(missing)}")
    model = create_model(metadata["model"], int(metadata["in_channels"]), int(metadata["classes"]))
    model.load_state_dict(state)
    return model.eval(), metadata
