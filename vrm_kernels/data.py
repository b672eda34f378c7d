"""The two views that relation matching is computed across."""

from collections.abc import Callable, Mapping
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
        TypeError: ``dataset`` has no length or no item access, a transform is not callable, or (when it is read) an
            item is no ``(image, label)``.
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
        item = self.dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise TypeError(
                f"DualViewDataset needs items (image, label), this dataset gives {_kind(item)}: give it a dataset that "
                f"picks the two, whose __getitem__ returns for instance item['image'], item['label']"
            )
        image, label = item[:2]
        real = image if self.transform_real is None else self.transform_real(image)
        virtual = image if self.transform_virtual is None else self.transform_virtual(image)
        return real, virtual, label


def views_of(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A batch ``(real, virtual, labels)``, as a loader over a :class:`DualViewDataset` gives it.

    Raises:
        TypeError: it is something else, saying what.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 3 and all(isinstance(x, Tensor) for x in batch):
        real, virtual, labels = batch
        return real, virtual, labels
    raise TypeError(
        f"expected batches (real, virtual, labels) of tensors, the loader gives {_kind(batch)}: load from a "
        f"vrm_kernels.DualViewDataset, with transforms that end in tensors"
    )


def both_views(model: nn.Module | Callable[[Tensor], Tensor], real: Tensor, virtual: Tensor) -> tuple[Tensor, Tensor]:
    """What ``model`` gives for both views; in one pass if the images are of one size: batch norm sees them together.

    Args:
        model: gives one tensor ``[N, ...]`` for images ``[N, ...]``, logits ``[N, C]`` for instance.
        real, virtual: the images of the two views; of several virtual views one after the other, ``[V * B, ...]``.

    Raises:
        TypeError: the model gives something else than a tensor, saying what.
    """
    if real.shape[1:] != virtual.shape[1:]:
        return output_of(model, real), output_of(model, virtual)
    output_real, output_virtual = output_of(model, torch.cat((real, virtual))).split((len(real), len(virtual)))
    return output_real, output_virtual


def output_of(model: nn.Module | Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``model(images)``.

    Raises:
        TypeError: it is no tensor.
        ValueError: batch norm has one value a channel to normalise, as of a last batch of one image.
    """
    try:
        output = model(images)
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise ValueError(
            f"batch norm cannot normalise a batch of {len(images)} in training: leave out an incomplete last batch "
            f"with DataLoader(..., drop_last=True)"
        ) from error
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model must return one tensor of logits, it returns {_kind(output)}: pass a module that picks it, "
            f"whose forward returns for instance model(images).logits or model(images)[0]"
        )
    return output


def _kind(value: Any) -> str:
    """What ``value`` is, and what is in it."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, list(value)[:8]))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(x).__name__ for x in value[:8])}"
    return f"a {type(value).__name__}"
