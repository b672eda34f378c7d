"""The smallest models: one convolutional family, for images of a few pixels and a run of a minute."""

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

    def embed(self, images: Tensor) -> Tensor:
        """What the classifier sees: ``[B, widths[2]]``."""
        return self.features(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


WIDTHS = ((3, 6, 6), (4, 8, 8), (8, 16, 16), (16, 32, 64), (32, 64, 128))
