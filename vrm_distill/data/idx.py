"""IDX files, the format of MNIST and Fashion-MNIST: four files, gzipped or not, in one folder."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from vrm_distill.data.images import ImageData, from_parts, split_indices, subset

_UNSIGNED_BYTE = 0x08
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
VALIDATION_FRACTION = 0.1


def idx(folder: str | Path, train_images: int | None = None) -> ImageData:
    """The images of a folder with ``train-images-idx3-ubyte`` and the three files beside it, each perhaps ``.gz``.

    A tenth of the training images is set apart for validation, the same ones every time.

    Raises:
        ValueError: naming each file that is missing, cut short, or not what its name says.
    """
    folder, tensors, problems = Path(folder), [], []
    for name in _FILES:
        try:
            tensors.append(read_idx(_find(folder, name), dimensions=3 if "images" in name else 1))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(problems))
    images, labels, test_images, test_labels = tensors
    for part, x, y in (("train", images, labels), ("t10k", test_images, test_labels)):
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"{folder}: {part} has {len(x)} images and {len(y)} labels")
    rest, validation = split_indices(len(images), len(images) - int(VALIDATION_FRACTION * len(images)))
    whole = TensorDataset(images.unsqueeze(1), labels.long())
    return from_parts(
        folder.name or "idx",
        int(max(labels.max(), test_labels.max())) + 1,
        subset(whole, rest),
        subset(whole, validation),
        TensorDataset(test_images.unsqueeze(1), test_labels.long()),
        train_images=train_images,
    )


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor of one IDX file: two zero bytes, the type, the number of dimensions, their sizes, the values.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:2] != b"\0\0":
        raise ValueError(f"{path.name} is not an IDX file")
    if content[2] != _UNSIGNED_BYTE or content[3] != dimensions:
        raise ValueError(f"{path.name} must hold unsigned bytes in {dimensions} dimensions, not {content[3]}")
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1)]
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path.name} holds {len(content) - header} bytes where its header says {math.prod(shape)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise ValueError(f"no {name} or {name}.gz")
