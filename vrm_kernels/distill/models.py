"""The recipe's models: one convolutional family, wide for the teacher and narrow for the student."""

from functools import partial

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three 3x3 convolutions, each with batch norm and ReLU, then a mean over the image and a linear classifier.

    Images ``[B, in_channels, H, W]`` of any size to logits ``[B, classes]``. ``widths`` are the three layers' channels;
    the second and the third halve the image.
    """

    def __init__(self, in_channels: int, classes: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(widths, (1, 2, 2), strict=True):
            layers += [
                nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


_WIDTHS = ((3, 6, 6), (4, 8, 8), (8, 16, 16), (16, 32, 64), (32, 64, 128))
# Each entry is called as factory(in_channels, classes).
MODELS = {"conv_" + "_".join(map(str, widths)): partial(ConvNet, widths=widths) for widths in _WIDTHS}


def create_model(name: str, in_channels: int, classes: int) -> nn.Module:
    """A new model by name.

    Raises:
        ValueError: a name that is not in ``MODELS``.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](in_channels, classes)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
