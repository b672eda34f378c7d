"""What the sub-commands share: opening the data, choosing the device, reading a trained network."""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vrm_distill import checkpoint, foreign
from vrm_distill.data import ImageData, open_dataset
from vrm_distill.failures import Refused
from vrm_distill.models import create_model


def open_data(options: argparse.Namespace) -> ImageData:
    """The images that the options name.

    Raises:
        Refused: they cannot be used.
    """
    try:
        return open_dataset(
            options.dataset,
            train_images=options.train_images,
            image_size=options.image_size,
            data_dir=options.data_dir,
            skip_broken=options.skip_broken,
        )
    except ValueError as error:
        raise Refused("--train-images" if "images to train on" in str(error) else "--dataset", error) from error


def pick_device(options: argparse.Namespace) -> torch.device:
    """The device that the options name, made the current one."""
    if options.device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
    else:
        device = torch.device(options.device)
    if device.index is not None and "LOCAL_RANK" not in os.environ:
        torch.accelerator.set_device_index(device.index)
    return device


@dataclass(frozen=True)
class Trained:
    """A network of a file: its name, itself, and what the file says of it; ``notes`` are for the user."""

    name: str
    model: nn.Module
    metadata: dict[str, str]
    notes: list[str]

    def numbers(self, key: str) -> list[float]:
        """The numbers under ``key`` of the metadata, none if it is not there."""
        return [float(x) for x in self.metadata.get(key, "").split()]

    @property
    def class_names(self) -> list[str]:
        return json.loads(self.metadata.get("class_names", "[]"))


def read_network(path: Path, named: str | None, option: str, data: ImageData | None = None) -> Trained:
    """The network of a checkpoint.

    Args:
        named: the network that the user says it is, with ``option``. ``None`` takes the name in the file, if it is of
            this package, timm or torchvision: other code than that a file may not choose.
        data: whose channels and classes the network gets where the file does not say.

    Raises:
        OSError, ValueError: the file cannot be read or does not fit the network.
    """
    state, metadata = checkpoint.read_weights(path)
    checkpoint.check_finite(state, path)
    own = metadata.get("model", "")
    if named is None and not checkpoint.is_known(own):
        says = f"is of {own}: add {option} {own}" if own else f"names no network: add {option} NETWORK"
        raise ValueError(f"{path} {says}")
    name = own if named is None else named
    missing = [key for key in ("in_channels", "classes") if key not in metadata]
    if missing and data is None:
        raise ValueError(f"{path} was not written by vrm-distill: its metadata lacks {', '.join(missing)}")
    channels, classes = (
        int(metadata[key]) if key in metadata else getattr(data, key) for key in ("in_channels", "classes")
    )
    model = create_model(name, channels, classes)
    notes = foreign.fit(model, state, path)
    trained = Trained(name, model.eval(), metadata, notes)
    if data is not None and trained.class_names and data.class_names and trained.class_names != list(data.class_names):
        raise ValueError(
            f"{path} was trained on other classes than the data's, or on the same in another order: "
            f"{_few(trained.class_names)}; the data have {_few(data.class_names)}"
        )
    return trained


def _few(names) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
