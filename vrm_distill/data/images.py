"""What a dataset is to the recipe: three parts of images in [0, 1], and what normalises them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

# The mean and the standard deviation are those of this many training images, spread over the whole set.
_STATISTICS = 2000


@dataclass(frozen=True)
class ImageData:
    """A dataset in three parts.

    Each part takes one index or many, ``part[indices]``, and gives ``(images, labels)``: ``[N, in_channels, H, W]``,
    all of one size, either uint8 or float32 in [0, 1], and int64 ``[N]``. Nothing is normalised yet: augmentations want
    [0, 1], and :meth:`normalized` belongs after them.

    ``mean`` and ``std`` have one number, or one a channel. ``notes`` are what the user should be told of the data;
    ``counts`` how many images each split has of each class; ``class_names`` are empty where the source has none.
    """

    name: str
    classes: int
    in_channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Dataset
    validation: Dataset
    test: Dataset
    notes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What there is: one line, and one for each split of a source that has classes by name."""
        parts = f"{len(self.train):,} images to train, {len(self.validation):,} to validate, {len(self.test):,} to test"
        channels = "channel" if self.in_channels == 1 else "channels"
        size = f"{self.size[0]}x{self.size[1]}, {self.in_channels} {channels}"
        return "\n  ".join((f"{self.name}: {self.classes} classes; {parts}; {size}", *self.counts))

    def fingerprint(self) -> str:
        """A number of the images and labels of each part, in their order: another one if any of them is another.

        Images that are not in memory are told apart by name and size: reading them all would take too long.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.validation, self.test):
            digest.update(f"part {len(part)}".encode())
            for piece in _identity(part):
                digest.update(piece)
        return digest.hexdigest()

    def normalized(self, images: Tensor) -> Tensor:
        """``(images - mean) / std`` in float32, on the device of the images."""
        mean, std = (
            torch.tensor(x, dtype=torch.float32, device=images.device).view(-1, 1, 1) for x in (self.mean, self.std)
        )
        return (to_unit(images) - mean) / std

    def with_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "ImageData":
        """The same data normalised otherwise, for instance as a pretrained teacher expects.

        Raises:
            ValueError: neither one number nor one a channel, or a standard deviation that is not positive.
        """
        mean, std = tuple(mean or self.mean), tuple(std or self.std)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.in_channels):
                raise ValueError(f"{name} must be 1 number or {self.in_channels}, one a channel, got {len(values)}")
        if min(std) <= 0:
            raise ValueError(f"std must be > 0, got {' '.join(map(str, std))}")
        return replace(self, mean=mean, std=std)


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; others as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def from_parts(
    name: str, classes: int, train: Dataset, validation: Dataset, test: Dataset, *, train_images: int | None = None
) -> ImageData:
    """``ImageData`` of three parts, its size, channels and statistics read from ``train``.

    Args:
        train_images: train on this many, chosen once and for all from ``train``; ``None`` takes all.

    Raises:
        ValueError: ``train_images`` is not there to be had.
    """
    if train_images is not None:
        if not classes * 2 <= train_images <= len(train):
            raise ValueError(f"{name} has {classes * 2} to {len(train)} images to train on, got {train_images}")
        train = subset(train, split_indices(len(train), train_images)[0])
    step = -(-len(train) // _STATISTICS)
    images = to_unit(train[torch.arange(0, len(train), step)][0])
    channels = images.shape[1]
    return ImageData(
        name=name,
        classes=classes,
        in_channels=channels,
        size=tuple(images.shape[2:]),
        mean=tuple(images.mean((0, 2, 3)).tolist()),
        std=tuple(images.std((0, 2, 3)).clamp(min=1e-3).tolist()),
        train=train,
        validation=validation,
        test=test,
    )


def split_indices(count: int, first: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint random parts of ``range(count)``, the first of that size, each in ascending order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:first].sort().values, order[first:].sort().values


def subset(dataset: Dataset, indices: Tensor) -> Dataset:
    """The samples at ``indices``; in memory if ``dataset`` is."""
    if isinstance(dataset, TensorDataset):
        return TensorDataset(*(x[indices] for x in dataset.tensors))
    return _IndexedSubset(dataset, indices)


def _identity(dataset: Dataset) -> Iterator[bytes]:
    if isinstance(dataset, TensorDataset):
        for x in dataset.tensors:
            yield memoryview(x.contiguous().numpy()).cast("B")
    else:
        yield from dataset.identity()


class _IndexedSubset(Dataset):
    """A subset that, like what it is a part of, takes many indices at once."""

    def __init__(self, dataset: Dataset, indices: Tensor) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]

    def identity(self) -> Iterator[bytes]:
        yield memoryview(self.indices.numpy()).cast("B")
        yield from _identity(self.dataset)
