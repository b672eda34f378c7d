"""Omniglot's two small background archives (Lake et al., 2015): handwritten characters of many alphabets."""

import io
import zipfile
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from vrm_distill.data.images import ImageData, from_parts, subset

_ARCHIVES = ("images_background_small1.zip", "images_background_small2.zip")
SIZE = 28
_TRAIN_DRAWINGS = 15
# 2 of the 15 training drawings are set apart to choose a student by.
_VALIDATION_DRAWINGS = 2


def omniglot(folder: str | Path, train_images: int | None = None) -> ImageData:
    """242 classes, white on black at 28x28: each character's first 15 drawings to train and validate, the rest to test.

    The archives share two alphabets; a character's drawing is counted once.

    Raises:
        ValueError: an archive is missing or damaged.
    """
    drawings = _read(Path(folder))
    classes = sorted({character for character, _ in drawings})
    if not classes:
        raise ValueError(f"{folder}: no drawings in {' or '.join(_ARCHIVES)}")
    number = {character: i for i, character in enumerate(classes)}
    keys = sorted(drawings)
    whole = TensorDataset(
        torch.stack([drawings[key] for key in keys]).unsqueeze(1), torch.tensor([number[c] for c, _ in keys])
    )
    drawing = torch.tensor([d for _, d in keys])
    fitted = _TRAIN_DRAWINGS - _VALIDATION_DRAWINGS
    parts = (drawing <= fitted, (drawing > fitted) & (drawing <= _TRAIN_DRAWINGS), drawing > _TRAIN_DRAWINGS)
    return from_parts(
        "omniglot", len(classes), *(subset(whole, part.nonzero()[:, 0]) for part in parts), train_images=train_images
    )


def _read(folder: Path) -> dict[tuple[str, int], Tensor]:
    """``{(alphabet/character, drawing): [28, 28] uint8}``; drawings are numbered from 1."""
    from PIL import Image

    drawings: dict[tuple[str, int], Tensor] = {}
    for archive in _ARCHIVES:
        try:
            with zipfile.ZipFile(folder / archive) as file:
                for name in file.namelist():
                    if not name.endswith(".png"):
                        continue
                    _, alphabet, character, drawing = name.split("/")
                    key = (f"{alphabet}/{character}", int(drawing.removesuffix(".png").rpartition("_")[2]))
                    if key not in drawings:
                        image = Image.open(io.BytesIO(file.read(name))).convert("L")
                        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
                        drawings[key] = 255 - torch.from_numpy(numpy.array(image))
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{folder / archive} cannot be read as Omniglot's drawings: {error}") from error
    return drawings
