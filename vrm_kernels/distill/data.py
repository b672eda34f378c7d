"""The recipe's images: a fixed split, and the augmentations that make the two views."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from vrm_kernels.data import DualViewDataset

# RandAugment's operations without its two for colour, which need three channels, and without "invert" and
# "solarize_add", whose white-on-black turned black-on-white is no digit that the test set holds.
GREY_POLICY = [
    [("auto_contrast", 0, 1)],
    [("equalize", 0, 1)],
    [("posterize", 4.0, 8.0)],
    [("solarize", 0.0, 1.0)],
    [("contrast", 0.1, 1.9)],
    [("brightness", 0.1, 1.9)],
    [("sharpness", 0.1, 1.9)],
    [("rotate", -30.0, 30.0)],
    [("shear_x", -0.3, 0.3)],
    [("shear_y", -0.3, 0.3)],
    [("translate_x", -0.1, 0.1)],
    [("translate_y", -0.1, 0.1)],
]


@dataclass(frozen=True)
class ImageData:
    """A dataset in three parts. Images are float32 ``[N, in_channels, H, W]``, labels int64 ``[N]``.

    ``train`` is in [0, 1], what augmentations expect: :meth:`views` normalises after them. ``validation`` and ``test``
    are normalised already.
    """

    name: str
    classes: int
    in_channels: int
    mean: float
    std: float
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    def views(self) -> tuple[nn.Module, nn.Module]:
        """``(real, virtual)``: light and RandAugment-style augmentation of a batch of images, both normalised."""
        import kornia.augmentation as K
        from kornia.augmentation.auto import RandAugment

        normalize = K.Normalize(self.mean, self.std)
        real = K.RandomAffine(degrees=10.0, translate=(0.1, 0.1), p=1.0)
        # kornia draws the two operations once a batch, and each operation's direction once an image.
        virtual = RandAugment(n=2, m=15, policy=GREY_POLICY)
        return nn.Sequential(real, normalize), nn.Sequential(virtual, normalize)


def digits(train_images: int) -> ImageData:
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images of 10 classes, shipped in its wheel.

    The split is fixed and stratified by class: 600 test and 297 validation images, and the training images from the
    other 900.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16  # 16 is the brightest grey
    labels = torch.tensor(source.target)
    pool, held_out = train_test_split(range(len(labels)), train_size=900, stratify=labels, random_state=0)
    validation, test = train_test_split(held_out, test_size=600, stratify=labels[held_out], random_state=0)
    smallest, largest = 20, len(pool)
    if not smallest <= train_images <= largest:
        raise ValueError(f"digits has {smallest} to {largest} images to train on, got {train_images}")
    train = pool[:train_images]
    if largest - train_images >= 10:  # stratifying needs at least one image of each class on either side
        train, _ = train_test_split(pool, train_size=train_images, stratify=labels[pool], random_state=0)
    mean, std = images[train].mean().item(), images[train].std().item()
    return ImageData(
        name="digits",
        classes=10,
        in_channels=1,
        mean=mean,
        std=std,
        train=TensorDataset(images[train], labels[train]),
        validation=TensorDataset((images[validation] - mean) / std, labels[validation]),
        test=TensorDataset((images[test] - mean) / std, labels[test]),
    )


# Each entry is called as loader(train_images).
DATASETS: dict[str, Callable[[int], ImageData]] = {"digits": digits}


def dual_view_loader(data: ImageData, batch_size: int, seed: int) -> DataLoader:
    """Shuffled batches ``(real, virtual, labels)``; every epoch drops its last, incomplete batch.

    The sampler hands the dataset a whole batch of indices, so that each view is one call of its augmentation instead of
    one an image (at 8x8 pixels, tens of times faster). The order comes from ``seed``, the augmentations from torch's
    global generator.
    """
    order = RandomSampler(data.train, generator=torch.Generator().manual_seed(seed))
    views = DualViewDataset(data.train, *data.views())
    return DataLoader(views, sampler=BatchSampler(order, batch_size, drop_last=True), batch_size=None)


def plain_loader(dataset: Dataset, batch_size: int = 1024) -> DataLoader:
    """Batches ``(images, labels)`` in order, each one read at once."""
    batches = BatchSampler(range(len(dataset)), batch_size, drop_last=False)
    return DataLoader(dataset, sampler=batches, batch_size=None)
