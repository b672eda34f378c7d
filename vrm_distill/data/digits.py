"""scikit-learn's handwritten digits, the dataset that needs no download."""

import torch
from torch.utils.data import TensorDataset

from vrm_distill.data.images import ImageData, from_parts

DEFAULT_TRAIN = 900


def digits(train_images: int | None = None) -> ImageData:
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images of 10 classes, shipped in its wheel.

    The split is fixed and stratified by class: 600 test and 297 validation images, and the training images from the
    other 900.

    Raises:
        ValueError: more training images than there are, or fewer than two a class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16  # 16 is the brightest grey
    labels = torch.tensor(source.target)
    pool, held_out = train_test_split(range(len(labels)), train_size=DEFAULT_TRAIN, stratify=labels, random_state=0)
    validation, test = train_test_split(held_out, test_size=600, stratify=labels[held_out], random_state=0)
    train_images = DEFAULT_TRAIN if train_images is None else train_images
    smallest, largest = 20, len(pool)
    if not smallest <= train_images <= largest:
        raise ValueError(f"digits has {smallest} to {largest} images to train on, got {train_images}")
    train = pool[:train_images]
    if largest - train_images >= 10:  # stratifying needs at least one image of each class on either side
        train, _ = train_test_split(pool, train_size=train_images, stratify=labels[pool], random_state=0)
    parts = (TensorDataset(images[part], labels[part]) for part in (train, validation, test))
    return from_parts("digits", 10, *parts)
