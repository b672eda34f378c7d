"""The recipe's images: where they come from, their batches, and the augmentations that make the two views."""

from pathlib import Path

from vrm_distill.data.augment import AUGMENTATIONS, Views, check_views, mixup
from vrm_distill.data.images import ImageData, from_parts, to_unit
from vrm_distill.data.loaders import ShardedBatches, batches_loader, plain_loader

__all__ = [
    "AUGMENTATIONS",
    "HOW_TO_INSTALL",
    "SOURCES",
    "ImageData",
    "ShardedBatches",
    "Views",
    "batches_loader",
    "check_views",
    "from_parts",
    "mixup",
    "open_dataset",
    "plain_loader",
    "takes_image_size",
    "to_unit",
]

HOW_TO_INSTALL = "install the extra distill: pip install '.[distill]' in a clone of vrm_kernels"
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

_KINDS = {form.partition(":")[0] for form in SOURCES}


def takes_image_size(source: str) -> bool:
    """Whether the images of ``source`` can be made of another size."""
    return _parts(source)[0] in ("folder", "parquet", "hub")


def _parts(source: str) -> tuple[str, str, str]:
    """``KIND:PATH`` in three; the path of a folder alone is of the kind ``folder``."""
    kind, colon, where = source.partition(":")
    if not colon and kind != "digits" and Path(source).is_dir():
        return "folder", ":", source
    return kind, colon, where


def open_dataset(
    source: str,
    *,
    train_images: int | None = None,
    image_size: int | None = None,
    data_dir: str | Path = "data",
    skip_broken: bool = False,
) -> ImageData:
    """The images that ``source`` names, in the form of a key of ``SOURCES``; the path of a folder means ``folder:``.

    Args:
        train_images: train on this many; ``None`` takes them all.
        image_size: make every image of a folder, of parquet files or of the hub square, of this side.
        skip_broken: leave out those of their images that cannot be decoded.

    Raises:
        ValueError: the source cannot be used, saying why: a missing library, no such file, broken images by name.
    """
    kind, colon, where = _parts(source)
    if kind not in _KINDS or (colon if kind == "digits" else not where):
        raise ValueError(f"{source!r} names no dataset: choose one of {', '.join(SOURCES)}")
    if image_size is not None and not takes_image_size(source):
        raise ValueError(f"an image size is for folder:, parquet: and hub:, {source} has its own")
    # Imported only now: each needs a library of its own.
    if kind == "digits":
        from vrm_distill.data.digits import digits

        return digits(train_images)
    if kind in ("idx", "omniglot", "folder", "parquet") and not Path(where).exists():
        raise ValueError(f"{source}: {where} does not exist")
    if kind == "idx":
        from vrm_distill.data.idx import idx

        return idx(where, train_images)
    if kind == "omniglot":
        from vrm_distill.data.omniglot import omniglot

        return omniglot(where, train_images)
    if kind == "torchvision":
        from vrm_distill.data.vision import torchvision_dataset

        return torchvision_dataset(where, str(data_dir), train_images)
    from vrm_distill.data import hub

    openers = {"folder": hub.folder, "parquet": hub.parquet, "hub": hub.hub}
    return openers[kind](where, train_images=train_images, image_size=image_size, skip_broken=skip_broken)
