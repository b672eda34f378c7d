"""Pictures with digits to find: scikit-learn's, of several sizes, among pieces of other digits, lines and noise."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, STRIDE = 48, 4
CELLS = SIDE // STRIDE  # the detector's locations are CELLS x CELLS
CLASSES, BACKGROUND, IGNORED = 10, 10, -1
MOST = 4  # digits a picture
SMALLEST, LARGEST = 10, 20  # sides of a digit, pixels


class Scenes(NamedTuple):
    """Pictures, what is in them, and what each location should say."""

    images: Tensor  # [N, 1, SIDE, SIDE] in [0, 1]
    found: list[tuple[Tensor, Tensor]]  # a picture's boxes [K, 4], x1 y1 x2 y2 in pixels, and digits [K]
    classes: Tensor  # [N, CELLS, CELLS]: a digit, BACKGROUND or IGNORED
    distances: Tensor  # [N, 4, CELLS, CELLS]: of a location to the left, upper, right, lower side, pixels


def make_scenes(digits: Tensor, labels: Tensor, count: int, seed: int) -> Scenes:
    """``count`` pictures of ``digits`` ``[M, 1, 8, 8]`` in [0, 1], whose ``labels`` are ``[M]``."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def digit(side: int) -> tuple[Tensor, int]:
        number = integer(0, len(labels))
        image = F.interpolate(digits[number][None], (side, side), mode="bilinear")[0, 0]
        return image, int(labels[number])

    images, found = torch.zeros(count, 1, SIDE, SIDE), []
    for image in images[:, 0]:
        for _ in range(5):  # pieces of digits
            piece, _ = digit(24)
            size, row, column = integer(4, 9), integer(0, SIDE - 9), integer(0, SIDE - 9)
            image[row : row + size, column : column + size] = 0.7 * piece[6 : 6 + size, 6 : 6 + size]
        (image if integer(0, 2) else image.T)[integer(0, SIDE)] = 0.5  # a line
        boxes, names = torch.zeros(0, 4), []
        for _ in range(integer(1, MOST + 1)):
            side = integer(SMALLEST, LARGEST + 1)
            pixels, name = digit(side)
            row, column = integer(0, SIDE - side), integer(0, SIDE - side)
            rows, columns = ((pixels > 0.25).any(axis).nonzero().squeeze(1) for axis in (1, 0))
            box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]).float()
            box += torch.tensor([column, row, column, row])
            if names and overlap(box, boxes).max() > 0:
                continue
            image[row : row + side, column : column + side] = pixels
            boxes, names = torch.cat((boxes, box)), [*names, name]
        found.append((boxes, torch.tensor(names)))
    images += 0.05 * torch.randn(images.shape, generator=generator)
    targets = [_targets(*what) for what in found]
    return Scenes(images.clamp(0, 1), found, *(torch.stack(x) for x in zip(*targets, strict=True)))


def views(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The real view and the virtual one: contrast, noise and a hole alone, so that a location is the same place in
    both."""

    def changed(contrast: float, noise: float) -> Tensor:
        scale = 1 + contrast * (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1)
        return images * scale + noise * torch.randn(images.shape, generator=generator)

    real, virtual = changed(0.2, 0.05), changed(0.6, 0.15)
    row, column = torch.randint(0, SIDE - 8, (2,), generator=generator).tolist()
    virtual[..., row : row + 8, column : column + 8] = 0
    return real, virtual


def centres() -> Tensor:
    """Where the locations are, ``[2, CELLS, CELLS]``: x and y in pixels."""
    at = (torch.arange(CELLS) + 0.5) * STRIDE
    return torch.stack((at.expand(CELLS, -1), at[:, None].expand(-1, CELLS)))


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes ``[..., 4]`` and ``[..., 4]``."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = sum((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (boxes, others))
    return shared / (areas - shared).clamp(min=1e-6)


def _targets(boxes: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
    """A location near the middle of a digit says which; elsewhere in its box it is ignored."""
    classes, distances = torch.full((CELLS, CELLS), BACKGROUND), torch.zeros(4, CELLS, CELLS)
    at = centres()
    for box, name in zip(boxes, names, strict=True):
        sides = torch.cat((at - box[:2, None, None], box[2:, None, None] - at))
        away = (at - ((box[:2] + box[2:]) / 2)[:, None, None]).abs() / (box[2:] - box[:2])[:, None, None]
        middle = (away < 0.25).all(0)
        middle.view(-1)[away.square().sum(0).argmin()] = True
        classes[(sides > 0).all(0) & (classes == BACKGROUND)] = IGNORED
        classes[middle] = name
        distances[:, middle] = sides[:, middle].clamp(min=0.5)
    return classes, distances
