"""Datasets of torchvision, where it is installed."""

import numpy
import torch
from torch.utils.data import TensorDataset

from vrm_distill.data.images import ImageData, from_parts, split_indices, subset

_VALIDATION_FRACTION = 0.1


def torchvision_dataset(name: str, root: str, train_images: int | None = None) -> ImageData:
    """A torchvision dataset that is an array in memory (MNIST's and CIFAR's families), already in ``root``.

    A tenth of the training images is set apart for validation, the same ones every time.

    Raises:
        ValueError: torchvision is not installed, has no such dataset, or does not find it in ``root``.
    """
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch can fail in any way
        raise ValueError(f"torchvision:{name} needs a torchvision that works with this torch ({error})") from error
    kind = getattr(datasets, name, None)
    if kind is None or name.startswith("_"):
        raise ValueError(f"torchvision has no dataset {name!r}")
    try:
        train, test = (_in_memory(kind(root, train=part)) for part in (True, False))
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"torchvision:{name} is not one of the sets held in memory: use folder:PATH ({error})"
        ) from error
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"torchvision:{name} is not in {root} ({str(error).splitlines()[0]}): torchvision.datasets.{name}"
            f"({str(root)!r}, download=True) fetches it, and --data-dir says where it is"
        ) from error
    rest, validation = split_indices(len(train), len(train) - int(_VALIDATION_FRACTION * len(train)))
    classes = int(max(train.tensors[1].max(), test.tensors[1].max())) + 1
    return from_parts(
        name.lower(), classes, subset(train, rest), subset(train, validation), test, train_images=train_images
    )


def _in_memory(dataset) -> TensorDataset:
    images = torch.from_numpy(numpy.asarray(dataset.data))
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, torch.as_tensor(dataset.targets))
