"""The two views that relation matching is computed across."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class DualViewDataset(Dataset):
    """Yield ``(real_view, virtual_view, label)`` for every ``(image, label)`` of a map-style dataset.

    It is for your own loop and for :func:`vrm_distill.train_one_epoch`, with transforms that take one image. The
    command ``vrm-distill`` augments whole batches on their device instead, by ``vrm_distill.data.Views``.

    Args:
        dataset: map-style, items ``(image, label)`` (anything after the label is dropped).
        transform_real: the light augmentation of the real view; ``None`` passes the image through.
        transform_virtual: the strong (RandAugment-style) augmentation of the virtual view; likewise.

    Both transforms get the same image; the dataset is read once per item.

    Raises:
        TypeError: ``dataset`` has no length or no item access, or a transform is not callable.
    """

    def __init__(
        self,
        dataset: Any,
        transform_real: Callable | None,
        transform_virtual: Callable | None,
    ) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(f"DualViewDataset needs a map-style dataset with a length, got {type(dataset).__name__}")
        for name, transform in (("transform_real", transform_real), ("transform_virtual", transform_virtual)):
            if transform is not None and not callable(transform):
                raise TypeError(f"{name} must be callable or None, got {type(transform).__name__}")
        self.dataset = dataset
        self.transform_real = transform_real
        self.transform_virtual = transform_virtual

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, Any]:
        image, label = self.dataset[index][:2]
        real = image if self.transform_real is None else self.transform_real(image)
        virtual = image if self.transform_virtual is None else self.transform_virtual(image)
        return real, virtual, label


def both_views(model: nn.Module, real: Tensor, virtual: Tensor) -> tuple[Tensor, Tensor]:
    """What ``model`` gives for both views; in one pass if the images are of one size: batch norm sees them together.

    Args:
        model: gives one tensor ``[N, ...]`` for images ``[N, ...]``, logits ``[N, C]`` for instance.
        real, virtual: the images of the two views; of several virtual views one after the other, ``[V * B, ...]``.
    """
    if real.shape[1:] != virtual.shape[1:]:
        return model(real), model(virtual)
    output_real, output_virtual = model(torch.cat((real, virtual))).split((len(real), len(virtual)))
    return output_real, output_virtual
