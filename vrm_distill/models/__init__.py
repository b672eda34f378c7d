"""Models by name: the literature's small ones here, timm's, torchvision's, and any factory of yours."""

import importlib
import inspect
import re
from copy import deepcopy
from functools import partial

import torch
from torch import nn

from vrm_distill.models.cifar import ResNet, WideResNet, resnet, resnet_imagenet_depth
from vrm_distill.models.convnet import WIDTHS, ConvNet
from vrm_distill.models.mobilenetv2 import MobileNetV2

__all__ = ["MODELS", "check_classes", "check_logits", "check_name", "create_model", "is_known", "parameter_count"]

# Each entry is called as factory(in_channels, classes).
MODELS = {
    **{"conv_" + "_".join(map(str, widths)): partial(ConvNet, widths=widths) for widths in WIDTHS},
    **{f"resnet{depth}": partial(ResNet, **resnet(depth)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, **resnet(depth, 4)) for depth in (8, 32)},
    "resnet18": partial(ResNet, **resnet_imagenet_depth((2, 2, 2, 2))),
    "resnet34": partial(ResNet, **resnet_imagenet_depth((3, 4, 6, 3))),
    **{
        f"wrn_{depth}_{widen}": partial(WideResNet, depth=depth, widen=widen)
        for depth, widen in ((16, 1), (16, 2), (40, 1), (40, 2))
    },
    "mobilenetv2": MobileNetV2,
}

_LIBRARY = re.compile(r"(timm|torchvision):([\w.-]+)")


def is_known(name: str) -> bool:
    """Whether ``name`` is of this package, timm or torchvision, and not a path into other Python code."""
    return name in MODELS or _LIBRARY.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Refuse a name that :func:`create_model` would refuse, without building the model.

    Raises:
        ValueError: saying what is wrong with the name, and what there is.
    """
    if name not in MODELS:
        _factory(name)


def create_model(name: str, in_channels: int, classes: int, *, pretrained: bool = False) -> nn.Module:
    """A new model by name: images ``[B, in_channels, H, W]`` to logits ``[B, classes]``.

    Args:
        name: in ``MODELS``, or ``timm:NAME``, ``torchvision:NAME``, or ``package.module:factory``, called with the
            keyword ``num_classes`` and, if it takes it, ``in_channels``.
        pretrained: with timm and torchvision, download the library's weights; the model then has their classes.

    Raises:
        ValueError: a name that means nothing, or of a library that is not installed.
    """
    if name in MODELS:
        if pretrained:
            raise ValueError(f"{name} has no weights to download: train it, or name a checkpoint")
        return MODELS[name](in_channels, classes)
    library, factory = _factory(name)
    if library == "timm":
        # A pretrained model keeps its own classes, since a new head would be untrained.
        return factory(pretrained=pretrained, in_chans=in_channels, **({} if pretrained else {"num_classes": classes}))
    if library == "torchvision":
        if in_channels != 3:
            raise ValueError(
                f"{name}: torchvision's models take 3 channels, the images have {in_channels}; name another model"
            )
        return factory(weights="DEFAULT") if pretrained else factory(weights=None, num_classes=classes)
    if pretrained:
        raise ValueError(f"{name} is yours: have the factory load its weights, or name a checkpoint")
    takes = inspect.signature(factory).parameters
    return factory(num_classes=classes, **({"in_channels": in_channels} if "in_channels" in takes else {}))


def check_classes(
    role: str,
    name: str,
    model: nn.Module,
    in_channels: int,
    size: tuple[int, int],
    classes: int,
    *,
    training: bool = True,
) -> None:
    """Refuse a ``model`` that does not give ``classes`` logits for images of that many channels and that size.

    Args:
        training: try it in training mode, too. The model stays as it was.

    Raises:
        ValueError: naming the role, the model, the mode and what it gives.
    """
    device = next(model.parameters(), torch.empty(0)).device
    images = torch.zeros(2, in_channels, *size, device=device)
    for mode in ("evaluation", "training") if training else ("evaluation",):
        try:
            with torch.no_grad():
                if mode == "evaluation":  # lazy layers take their shapes from this
                    logits = _in_mode(model, False, images)
                else:  # of a copy, so that batch norm keeps no trace of it
                    logits = _in_mode(deepcopy(model), True, images)
        except Exception as error:  # a network of the user's may raise anything
            shape = f"{in_channels} x {size[0]} x {size[1]}"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"the {role} {name} cannot take images of {shape} in {mode}: {reason}") from error
        check_logits(f"the {role} {name}{' in training' if mode == 'training' else ''}", logits, classes)


def check_logits(what: str, logits: object, classes: int | None = None) -> None:
    """Refuse what a network gave, ``what`` beginning the sentence, unless it is logits ``[B, classes]``.

    Raises:
        ValueError: saying what it gave instead.
    """
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        found = f"shape {list(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"{what} must give logits [B, {classes or 'C'}], it gives {found}: name a factory that wraps it and "
            f"returns the logits alone (or switches auxiliary outputs off, for instance with aux_logits=False)"
        )
    if classes is not None and logits.shape[1] != classes:
        raise ValueError(
            f"{what} tells {logits.shape[1]} classes apart, the data have {classes}: give it a new head of {classes}, "
            f"for instance by package.module:factory that makes the pretrained network with num_classes={classes}, "
            f"and train that first (--teacher-epochs)"
        )


def _in_mode(model: nn.Module, training: bool, images: torch.Tensor) -> object:
    was_training = model.training
    model.train(training)
    try:
        return model(images)
    finally:
        model.train(was_training)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _install(library: str) -> str:
    """How to get timm or torchvision beside this torch: left alone, pip may replace torch for a newer torchvision's."""
    return f"pip install {'timm ' if library == 'timm' else ''}torchvision torch=={torch.__version__}"


def _factory(name: str):
    """``(library or None, callable)`` of a name with a colon."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(MODELS)}, timm:NAME, torchvision:NAME or "
            f"package.module:factory"
        )
    if module in ("timm", "torchvision"):
        try:
            library = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} needs {error.name}: {_install(module)}") from error
        except Exception as error:  # a build for another torch can fail in any way
            raise ValueError(
                f"{name}: {module} is installed but cannot be imported ({error}): most often torchvision was made for "
                f"another torch; install the one made for torch {torch.__version__}, from where that came from: "
                f"{_install(module)}"
            ) from error
        if module == "timm":
            if not library.is_model(attribute):
                raise ValueError(f"timm has no model {attribute!r}: timm.list_models('*{attribute[:5]}*') lists some")
            return module, partial(library.create_model, attribute)
        if attribute not in library.models.list_models(module=library.models):
            raise ValueError(f"torchvision has no classification model {attribute!r}")
        return module, partial(library.models.get_model, attribute)
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise ValueError(f"{name} is a {type(factory).__name__}, not a function that makes a model")
    return None, factory
