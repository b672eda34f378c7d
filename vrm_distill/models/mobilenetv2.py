"""MobileNetV2 (Sandler et al., arXiv 1801.04381) as the distillation literature runs it on 32x32 images: half the
width, expansion 6, a stem of stride 2, and no stride in the second stage."""

import torch.nn.functional as F
from torch import Tensor, nn

# (expansion, channels, blocks, stride of the first block)
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_LAST = 1280


class MobileNetV2(nn.Module):
    """Images ``[B, in_channels, H, W]`` to logits ``[B, classes]``."""

    def __init__(self, in_channels: int, classes: int, width: float = 0.5) -> None:
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [_conv_bn(in_channels, channels, 3, stride=2)]
        for expansion, out, blocks, stride in _STAGES:
            for i in range(blocks):
                layers.append(_InvertedResidual(channels, int(out * width), stride if i == 0 else 1, expansion))
                channels = int(out * width)
        layers.append(_conv_bn(channels, _LAST, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(_LAST, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(images), 1).flatten(1))


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.layers = nn.Sequential(
            _conv_bn(in_channels, hidden, 1),
            _conv_bn(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _conv_bn(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
