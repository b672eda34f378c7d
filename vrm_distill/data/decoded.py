"""Images that are decoded when they are asked for, and the look at all of them before any training."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

# Up to this many images are all decoded before training, to find the broken ones. Of a larger set only the images
# whose files seem cut off are decoded.
DECODE_ALL = 50_000
SHOWN = 10
# How whole files of these formats end; some have a few bytes of padding after it.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_PADDING = 64
_ORIENTATION = 0x0112


class DecodedImages(Dataset):
    """Rows of a ``datasets.Dataset`` as ``(uint8 [N, channels, H, W], int64 [N])``, decoded when they are asked for.

    Images are turned as their EXIF orientation says, grey ones of 16 bits scaled to 8, and those of another size fitted
    to ``size``: scaled, and cropped in the centre.

    Args:
        classes: the number of each label in the rows.
        where: names the image at an index, for messages.
    """

    def __init__(
        self, rows, image: str, label: str, channels: int, size: tuple[int, int], classes: dict, split: str
    ) -> None:
        self.rows, self.image, self.label, self.split = rows, image, label, split
        self.channels, self.size, self.classes = channels, size, classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(index).view(-1).tolist()
        rows = self.rows[indices]
        images = torch.stack([self._decode(entry, i) for entry, i in zip(rows[self.image], indices, strict=True)])
        labels = torch.tensor([self.classes[x] for x in rows[self.label]])
        return (images[0], labels[0]) if isinstance(index, int) else (images, labels)

    def identity(self) -> Iterator[bytes]:
        """What the images are told apart by without reading them: labels, names and sizes of the files."""
        for labels in self.rows.select_columns(self.label).iter(4096):
            yield repr([self.classes[x] for x in labels[self.label]]).encode()
        for entry in self.rows.select_columns(self.image):
            yield repr(_file_size(entry[self.image])).encode()

    def _decode(self, entry: dict, index: int) -> Tensor:
        from PIL import Image, ImageOps

        try:
            image = ImageOps.exif_transpose(eight_bits(open_image(entry))).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:
            raise ValueError(
                f"{_name(entry, index, self.split)} cannot be decoded ({what_is_wrong(entry, error)}): mend or remove "
                f"it, or leave such images out with --skip-broken"
            ) from error
        height, width = self.size
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(image))
        return pixels.unsqueeze(0) if self.channels == 1 else pixels.permute(2, 0, 1)


def inspect(
    name: str, splits: dict, image: str, image_size: int | None, skip_broken: bool = False
) -> tuple[int, tuple[int, int], dict[str, list[int]], list[str]]:
    """Look at every image before any training.

    Returns:
        Channels, size, the rows of each split that can be used, and what the user should be told.

    Raises:
        ValueError: listing the images that are empty, broken or, with no ``image_size``, unlike the others in size.
    """
    total = sum(len(rows) for rows in splits.values())
    if total == 0 or any(len(rows) == 0 for rows in splits.values()):
        raise ValueError(f"{name}: no images in {', '.join(key for key, rows in splits.items() if not len(rows))}")
    good, broken, sizes, grey = {key: [] for key in splits}, [], {}, True
    for key, rows in splits.items():
        for i, row in enumerate(rows.select_columns(image)):
            entry = row[image]
            try:
                picture = open_image(entry)
                mode, size = picture.mode, _turned(picture)
                if total <= DECODE_ALL or skip_broken or _ends_early(entry, picture.format):
                    picture.load()
            except Exception as error:  # what PIL raises depends on the format and on where the damage is
                broken.append(f"{_name(entry, i, key)}: {what_is_wrong(entry, error)}")
                continue
            good[key].append(i)
            grey = grey and (mode in ("1", "L", "I") or mode.startswith("I;16"))
            sizes.setdefault(size, []).append((entry, i, key))
    notes = []
    if broken and not (skip_broken and all(good.values())):
        raise ValueError(
            f"{name}: {len(broken)} of {total} images cannot be read"
            f"{'' if skip_broken else ' (--skip-broken leaves such images out)'}:\n{listed(broken)}"
        )
    if broken:
        left = ", ".join(f"{len(splits[key]) - len(rows)} of {key}" for key, rows in good.items())
        notes = [f"left out {len(broken)} of {total} images that cannot be read ({left}):\n{listed(broken)}"]
    if image_size is not None:
        return (1 if grey else 3), (image_size, image_size), good, notes
    usual = max(sizes, key=lambda s: len(sizes[s]))
    unlike = [(*entry, w, h) for (h, w), entries in sizes.items() if (h, w) != usual for entry in entries]
    if unlike:
        lines = [f"{_name(entry, i, key)}: {w}x{h}" for entry, i, key, w, h in unlike[: SHOWN + 1]]
        raise ValueError(
            f"{name}: {len(unlike)} of {total} images are not {usual[1]}x{usual[0]} like the others "
            f"(--image-size N makes all of them NxN):\n" + listed(lines, len(unlike))
        )
    return (1 if grey else 3), usual, good, notes


def open_image(entry: dict):
    """The image of an entry of ``datasets``, its pixels not read yet.

    Raises:
        ValueError: it holds numbers of no known range.
    """
    from PIL import Image

    content = entry.get("bytes")
    image = Image.open(io.BytesIO(content) if content is not None else entry["path"])
    # A grey PNG has at most 16 bits; older versions of Pillow open it with 32.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"holds {kind} of no known range (mode {image.mode}): save it with 8 or 16 bits")
    return image


def eight_bits(image):
    """A grey image of 16 bits a pixel scaled to 8, which PIL's own conversion would clip; others as they are."""
    from PIL import Image

    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    scaled = Image.fromarray(((numpy.asarray(image).astype("uint32") + 128) // 257).astype("uint8"))
    scaled.info = image.info
    return scaled


def what_is_wrong(entry: dict | None, error: Exception) -> str:
    if entry is None:
        return "no image"
    return (
        "empty" if _file_size(entry)[1] == 0 else str(error).split("\n")[0].replace(str(entry.get("path")), "the file")
    )


def listed(lines: list[str], count: int | None = None) -> str:
    """The first few lines, indented, and how many of ``count`` there are more."""
    count = len(lines) if count is None else count
    more = [f"and {count - SHOWN} more"] if count > SHOWN else []
    return "\n".join(f"  {line}" for line in lines[:SHOWN] + more)


def _name(entry: dict | None, index: int, split: str) -> str:
    path = (entry or {}).get("path")
    return path if path and Path(path).exists() else f"{split} row {index}"


def _file_size(entry: dict) -> tuple[str | None, int]:
    content, path = entry.get("bytes"), entry.get("path")
    if content is not None:
        return path, len(content)
    return path, Path(path).stat().st_size if path and Path(path).exists() else -1


def _turned(image) -> tuple[int, int]:
    """Height and width as the EXIF orientation has them."""
    # If a PNG's header has no EXIF data, Pillow would decode the whole image to look for it behind the pixels.
    known = image.format != "PNG" or "exif" in image.info
    sideways = known and image.getexif().get(_ORIENTATION, 1) >= 5
    return (image.width, image.height) if sideways else (image.height, image.width)


def _ends_early(entry: dict, kind: str) -> bool:
    """Whether a file has no end where files of its kind have one: cut off, or to be decoded to be sure."""
    if kind not in _ENDS:
        return False
    content = entry.get("bytes")
    if content is None:
        with open(entry["path"], "rb") as file:
            file.seek(max(0, _file_size(entry)[1] - _PADDING))
            content = file.read()
    return _ENDS[kind] not in content[-_PADDING:]
