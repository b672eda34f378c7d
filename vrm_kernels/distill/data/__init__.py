"""The recipe's images: where they come from, their batches, and the augmentations that make the two views."""

from pathlib import Path

from vrm_kernels.distill.data.augment import AUGMENTATIONS, Views, mixup
from vrm_kernels.distill.data.images import ImageData, from_parts, to_unit
from vrm_kernels.distill.data.loaders import ShardedBatches, batches_loader, plain_loader

__all__ = [
    "AUGMENTATIONS",
    "SOURCES",
    "ImageData",
    "ShardedBatches",
    "Views",
    "batches_loader",
    "from_parts",
    "mixup",
    "open_dataset",
    "plain_loader",
    "to_unit",
]

# What --dataset takes, and what each is.
SOURCES = {
    "digits": "scikit-learn's handwritten digits",
    "folder:PATH": "images in PATH/train/CLASS/, and perhaps PATH/test/CLASS/ and PATH/validation/CLASS/",
    "parquet:PATH": "parquet files with images and labels",
    "hub:NAME": "a dataset of the Hugging Face hub",
    "torchvision:NAME": "a torchvision dataset, found in --data-dir",
    "idx:PATH": "the four files of MNIST or Fashion-MNIST",
    "omniglot:PATH": "the two small background archives of Omniglot",
}


def open_dataset(
    source: str, *, train_images: int | None = None, image_size: int | None = None, data_dir: str | Path = "data"
) -> ImageData:
    """The images that ``source`` names, in the form of a key of ``SOURCES``; the path of a folder means ``folder:``.

    Args:
        train_images: train on this many; ``None`` takes them all.
        image_size: make every image of a folder, of parquet files or of the hub square, of this side.

    Raises:
        ValueError: the source cannot be used, saying why: a missing library, no such file, broken images by name.
    """
    kind, colon, where = source.partition(":")
    if not colon and kind != "digits" and Path(source).is_dir():
        kind, where = "folder", source
    if image_size is not None and kind not in ("folder", "parquet", "hub"):
        raise ValueError(f"an image size is for folder:, parquet: and hub:, {source} has its own")
    # Imported only now: each needs a library of its own.
    if kind == "digits" and not colon:
        from vrm_kernels.distill.data.digits import digits

        return digits(train_images)
    if not where:
        raise ValueError(f"{source!r} names no dataset: choose one of {', '.join(SOURCES)}")
    if kind in ("idx", "omniglot", "folder", "parquet") and not Path(where).exists():
        raise ValueError(f"{source}: {where} does not exist")
    if kind == "idx":
        from vrm_kernels.distill.data.idx import idx

        return idx(where, train_images)
    if kind == "omniglot":
        from vrm_kernels.distill.data.omniglot import omniglot

        return omniglot(where, train_images)
    if kind == "torchvision":
        from vrm_kernels.distill.data.vision import torchvision_dataset

        return torchvision_dataset(where, str(data_dir), train_images)
    from vrm_kernels.distill.data import hub

    openers = {"folder": hub.folder, "parquet": hub.parquet, "hub": hub.hub}
    if kind not in openers:
        raise ValueError(f"{source!r} names no dataset: choose one of {', '.join(SOURCES)}")
    return openers[kind](where, train_images=train_images, image_size=image_size)
