"""Anything that Hugging Face ``datasets`` opens: a folder of images, parquet files, or a dataset of the hub."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from vrm_distill.data.images import ImageData, from_parts, split_indices, subset

# The names that splits go by. What is called a test on the hub may have no labels: see _labelled.
_TEST = ("test", "validation", "valid", "val", "dev")
_VALIDATION_FRACTION = 0.1
# Sets of this many bytes and fewer, decoded, are kept in memory; larger ones are decoded batch by batch.
_IN_MEMORY = 2**30
# Up to this many images are decoded before training to find the broken ones; of more, only the headers are read.
_DECODE_ALL = 50_000
_SHOWN = 10


def folder(path: str, **options) -> ImageData:
    """Images in ``path/train/CLASS/*`` and perhaps ``path/test/CLASS/*`` and ``path/validation/CLASS/*``.

    With a validation and no test, the validation is what is tested on.
    """
    return _open(Path(path).resolve().name, "imagefolder", data_dir=path, **options)


def parquet(path: str, **options) -> ImageData:
    """Parquet files with a column of images and one of labels; a folder's are split by their names (train*, test*)."""
    here = Path(path)
    if here.is_dir():
        files = {
            split: [str(file) for file in sorted(here.glob(f"{split}*.parquet"))]
            for split in ("train", *_TEST)
            if any(here.glob(f"{split}*.parquet"))
        }
        if not files:
            raise ValueError(f"{path} holds no train*.parquet")
    else:
        files = {"train": [path]}
    return _open(here.resolve().stem, "parquet", data_files=files, **options)


def hub(name: str, **options) -> ImageData:
    """A dataset of the hub, ``NAME`` or ``OWNER/NAME``: needs a network the first time."""
    return _open(name.rpartition("/")[2], name, **options)


class DecodedImages(Dataset):
    """Rows of a ``datasets.Dataset`` as ``(uint8 [N, channels, H, W], int64 [N])``, decoded when they are asked for."""

    def __init__(self, rows, image: str, label: str, channels: int, size: tuple[int, int], classes: dict) -> None:
        self.rows, self.image, self.label = rows, image, label
        self.channels, self.size, self.classes = channels, size, classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(index).view(-1).tolist()
        rows = self.rows[indices]
        images = torch.stack([self._decode(entry, i) for entry, i in zip(rows[self.image], indices, strict=True)])
        labels = torch.tensor([self.classes[x] for x in rows[self.label]])
        return (images[0], labels[0]) if isinstance(index, int) else (images, labels)

    def _decode(self, entry: dict, index: int) -> Tensor:
        from PIL import Image, ImageOps

        try:
            image = _eight_bits(_image(entry)).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:
            raise ValueError(f"{_name(entry, index)} cannot be decoded: {error}") from error
        height, width = self.size
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(image))
        return pixels.unsqueeze(0) if self.channels == 1 else pixels.permute(2, 0, 1)


def _open(
    name: str, source: str, *, train_images: int | None = None, image_size: int | None = None, **where: Any
) -> ImageData:
    try:
        import datasets
    except ImportError as error:
        from vrm_distill.data import HOW_TO_INSTALL

        raise ValueError(f"this source needs Hugging Face datasets: {HOW_TO_INSTALL}") from error
    try:
        # A bar that counts files of this machine as "downloading" is silenced.
        with _no_bars(datasets) if where else nullcontext():
            splits = datasets.load_dataset(source, **where)
    except Exception as error:  # datasets' own, the hub's, the network's and the parsers' have no common ancestor
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot open {name}: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"{name} has no part called train: it has {', '.join(splits)}")
    image, label = _columns(name, splits["train"], datasets, where.get("data_dir"))
    splits = {key: rows.cast_column(image, datasets.Image(decode=False)) for key, rows in splits.items()}
    found = {key: set(rows.unique(label)) for key, rows in splits.items()}
    names = sorted(set().union(*found.values()), key=lambda x: (isinstance(x, str), x))
    names = [x for x in names if not (isinstance(x, int) and x < 0)]  # -1 stands for "kept secret"
    splits = {key: rows for key, rows in splits.items() if -1 not in found[key]}
    feature, notes = splits["train"].features[label], []
    if hasattr(feature, "names") and feature.names:
        names = list(range(len(feature.names)))
        if source == "imagefolder":
            notes = _missing_classes(name, feature.names, {key: found[key] for key in splits})
    channels, size = _inspect(name, splits, image, image_size)
    classes = {x: i for i, x in enumerate(names)}
    parts = {key: DecodedImages(rows, image, label, channels, size, classes) for key, rows in splits.items()}
    train, validation, test = _split(name, parts)
    if sum(map(len, (train, validation, test))) * channels * size[0] * size[1] <= _IN_MEMORY:
        train, validation, test = (TensorDataset(*part[torch.arange(len(part))]) for part in (train, validation, test))
    return replace(from_parts(name, len(names), train, validation, test, train_images=train_images), notes=tuple(notes))


@contextmanager
def _no_bars(datasets):
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()


def _missing_classes(name: str, classes: list[str], found: dict[str, set[int]]) -> list[str]:
    """What to tell the user about classes, by their names, that a split has no image of.

    Raises:
        ValueError: one that is not there to train on: most often a folder's name that is spelt in two ways.
    """
    missing = {key: [title for i, title in enumerate(classes) if i not in seen] for key, seen in found.items()}
    if absent := missing.pop("train"):
        holders = [key for key, titles in missing.items() if not set(absent) <= set(titles)]
        raise ValueError(
            f"{name}: train has no images of {_some(absent)}, {' and '.join(holders)} "
            f"{'has' if len(holders) == 1 else 'have'}: is a folder's name misspelt?"
        )
    return [f"{key} has no images of {_some(titles)}" for key, titles in missing.items() if titles]


def _some(titles: list[str]) -> str:
    more = f" and {len(titles) - _SHOWN} more classes" if len(titles) > _SHOWN else ""
    return ", ".join(titles[:_SHOWN]) + more


def _misplaced(root: str) -> str:
    """The images of a folder that lie at another depth than most, for which no class is told; else nothing."""
    from PIL import Image

    known = set(Image.registered_extensions())
    files = [path for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in known]
    depths = Counter(len(path.relative_to(root).parts) for path in files)
    usual = max(depths, key=lambda depth: (depths[depth], depth), default=0)
    stray = [path for path in files if len(path.relative_to(root).parts) != usual]
    if not stray:
        return ""
    count = f"{len(stray)} images do" if len(stray) > 1 else "1 image does"
    return f"{count} not lie in a class's own folder like the others, move it there or away:\n" + _listed(
        [str(path) for path in stray]
    )


def _columns(name: str, rows, datasets, root: str | None) -> tuple[str, str]:
    """The columns of the images and of the labels."""
    columns = rows.features
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    # Parquet files that datasets did not write hold an image as a struct, or as its bytes alone.
    images = images or [key for key in ("image", "img", "images") if key in columns]
    labels = [key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [key for key in ("label", "fine_label", "labels") if key in columns] or labels
    if images and not labels and root is not None and (stray := _misplaced(root)):
        raise ValueError(f"{name}: {stray}")
    if not images or not labels:
        missing = "images" if not images else "labels (a folder for each class, or a column called label)"
        raise ValueError(f"{name} has no {missing}: its columns are {', '.join(columns)}")
    return images[0], labels[0]


def _split(name: str, parts: dict[str, DecodedImages]) -> tuple[Dataset, Dataset, Dataset]:
    """Train, validation and test; what is missing is set apart from the training images, the same ones every time."""
    train, held_out = parts["train"], [parts[key] for key in _TEST if key in parts]
    while len(held_out) < 2:
        count = max(1, int(_VALIDATION_FRACTION * len(train)))
        if count * 2 > len(train):
            raise ValueError(f"{name} has {len(train)} training images: too few to set some apart for validation")
        rest, apart = split_indices(len(train), len(train) - count)
        # A test that the data bring comes first; images set apart then serve to choose the student.
        train, held_out = subset(train, rest), [*held_out, subset(train, apart)]
    test, validation = held_out[:2]
    return train, validation, test


def _inspect(name: str, splits: dict, image: str, image_size: int | None) -> tuple[int, tuple[int, int]]:
    """Channels and size of the images; every one that cannot be used is named.

    Raises:
        ValueError: listing the images that are empty, broken or, with no ``image_size``, unlike the others in size.
    """
    total = sum(len(rows) for rows in splits.values())
    if total == 0 or any(len(rows) == 0 for rows in splits.values()):
        raise ValueError(f"{name}: no images in {', '.join(key for key, rows in splits.items() if not len(rows))}")
    broken, sizes, grey = [], {}, True
    for file, entry in _entries(splits, image):
        try:
            picture = _image(entry)
            if picture.mode in ("I", "F"):
                kind = "32-bit integers" if picture.mode == "I" else "floating-point numbers"
                broken.append(
                    f"{file}: holds {kind} of no known range (mode {picture.mode}): save it with 8 or 16 bits"
                )
                continue
            if total <= _DECODE_ALL:
                picture.load()
        except Exception as error:  # what PIL raises depends on the format and on where the damage is
            broken.append(f"{file}: {_what_is_wrong(entry, error)}")
            continue
        grey = grey and (picture.mode in ("1", "L") or picture.mode.startswith("I;16"))
        sizes.setdefault((picture.height, picture.width), []).append(file)
    if broken:
        raise ValueError(f"{name}: {len(broken)} of {total} images cannot be read:\n" + _listed(broken))
    if image_size is not None:
        return (1 if grey else 3), (image_size, image_size)
    size = max(sizes, key=lambda s: len(sizes[s]))
    unlike = [f"{file}: {w}x{h}" for (h, w), files in sizes.items() if (h, w) != size for file in files]
    if unlike:
        raise ValueError(
            f"{name}: {len(unlike)} of {total} images are not {size[1]}x{size[0]} like the others "
            f"(--image-size N makes all of them NxN):\n" + _listed(unlike)
        )
    return (1 if grey else 3), size


def _entries(splits: dict, image: str) -> Iterator[tuple[str, dict]]:
    for key, rows in splits.items():
        for i, entry in enumerate(rows.select_columns(image)):
            yield _name(entry[image], i, key), entry[image]


def _name(entry: dict | None, index: int, split: str = "") -> str:
    path = (entry or {}).get("path")
    return path if path and Path(path).exists() else f"{split} row {index}".strip()


def _image(entry: dict):
    from PIL import Image

    content = entry.get("bytes")
    return Image.open(io.BytesIO(content) if content is not None else entry["path"])


def _eight_bits(image):
    """A grey image of 16 bits a pixel scaled to 8, which PIL's own conversion would clip; others as they are."""
    from PIL import Image

    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((numpy.asarray(image).astype("uint32") + 128) // 257).astype("uint8"))


def _what_is_wrong(entry: dict | None, error: Exception) -> str:
    if entry is None:
        return "no image"
    content = entry.get("bytes")
    length = len(content) if content is not None else Path(entry["path"]).stat().st_size
    return "empty" if length == 0 else str(error).splitlines()[0].replace(str(entry.get("path")), "the file")


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(f"  {line}" for line in lines[:_SHOWN] + more)
