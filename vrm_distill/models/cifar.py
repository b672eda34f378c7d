"""The residual networks for 32x32 images that the distillation literature compares.

ResNet-(6n+2) of He et al. (arXiv 1512.03385, section 4.2) with projection shortcuts and, as ``x4``, four times the
channels after the stem's two; the wide residual networks of Zagoruyko and Komodakis (arXiv 1605.07146); and ResNet-18
and -34 with a 3x3 stem in place of the 7x7 one and its pooling. Any image size works: the last pooling is over the
image.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(in_channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv3x3(channels, channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class _PreActivationBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), _conv3x3(in_channels, channels, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), _conv3x3(channels, channels)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


def _stages(block, in_channels: int, widths, blocks) -> nn.Sequential:
    layers = []
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            layers.append(block(in_channels, width, 2 if stage and i == 0 else 1))
            in_channels = width
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """Images ``[B, in_channels, H, W]`` to logits ``[B, classes]``: a stem, ``blocks`` basic blocks of each width."""

    def __init__(self, in_channels: int, classes: int, stem: int, widths: tuple[int, ...], blocks: tuple[int, ...]):
        super().__init__()
        self.stem = nn.Sequential(_conv3x3(in_channels, stem), nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        self.stages = _stages(_BasicBlock, stem, widths, blocks)
        self.classifier = nn.Linear(widths[-1], classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(images)).mean((2, 3)))


class WideResNet(nn.Module):
    """Images ``[B, in_channels, H, W]`` to logits ``[B, classes]``: depth 6n + 4, ``widen`` times the channels."""

    def __init__(self, in_channels: int, classes: int, depth: int, widen: int) -> None:
        super().__init__()
        widths = tuple(widen * x for x in (16, 32, 64))
        self.stem = _conv3x3(in_channels, 16)
        self.stages = _stages(_PreActivationBlock, 16, widths, ((depth - 4) // 6,) * 3)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.classifier = nn.Linear(widths[-1], classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(F.relu(self.bn(self.stages(self.stem(images)))).mean((2, 3)))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(depth: int, widen: int = 1) -> dict:
    """The arguments of :class:`ResNet` for depth 6n + 2; ``widen`` 4 is the literature's ``x4``."""
    stem = 16 if widen == 1 else 32
    return {"stem": stem, "widths": tuple(widen * x for x in (16, 32, 64)), "blocks": ((depth - 2) // 6,) * 3}


def resnet_imagenet_depth(blocks: tuple[int, int, int, int]) -> dict:
    """The arguments of :class:`ResNet` for ResNet-18 and -34."""
    return {"stem": 64, "widths": (64, 128, 256, 512), "blocks": blocks}
