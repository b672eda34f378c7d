"""An anchor-free detector: every location says what is there, and how far it is to the four sides of its box."""

import contextlib
import io

import torch
import torch.nn.functional as F
from scenes import BACKGROUND, CLASSES, IGNORED, STRIDE, Scenes, centres, overlap
from torch import Tensor, nn

WEIGHT = torch.ones(CLASSES + 1)
WEIGHT[BACKGROUND] = 0.3  # most locations are background


class Detector(nn.Module):
    """Images ``[B, 1, H, W]`` to ``(logits [B, 11, H / 4, W / 4], distances [B, 4, H / 4, W / 4] in pixels)``."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        double = 2 * width
        self.backbone = nn.Sequential(
            block(1, width, stride=2),
            block(width, double, stride=2),
            block(double, double),
            block(double, double, 1, 2),
        )
        self.classes = nn.Sequential(block(double, double), nn.Conv2d(double, CLASSES + 1, 1))
        self.sides = nn.Sequential(block(double, double), nn.Conv2d(double, 4, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(images)
        return self.classes(maps), F.softplus(self.sides(maps)) * STRIDE


def detection_loss(logits: Tensor, distances: Tensor, classes: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the locations that count, and 1 - IoU of those in the middle of a digit."""
    here = (classes != BACKGROUND) & (classes != IGNORED)
    apart = 1 - overlap(*(boxes_of(x)[here] for x in (distances, wanted)))
    return F.cross_entropy(logits, classes, WEIGHT, ignore_index=IGNORED) + apart.mean()


def boxes_of(distances: Tensor) -> Tensor:
    """``[B, 4, H, W]`` distances to boxes ``[B, H, W, 4]``, x1 y1 x2 y2."""
    at = centres()
    return torch.cat((at - distances[:, :2], at + distances[:, 2:]), 1).movedim(1, -1)


@torch.no_grad()
def precision(model: nn.Module, scenes: Scenes) -> tuple[float, float]:
    """COCO's mean average precision over IoU of 0.5 to 0.95, and that at 0.5, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    model.eval()
    logits, distances = (torch.cat(x) for x in zip(*map(model, scenes.images.split(64)), strict=True))
    scores = logits.softmax(1)[:, :CLASSES].flatten(2).mT
    guesses = [
        {"image_id": i, "category_id": digit, "bbox": _corner(box), "score": score}
        for i, (s, boxes) in enumerate(zip(scores, boxes_of(distances).flatten(1, 2), strict=True))
        for digit, score, box in _best(s, boxes)
    ]
    things = [(i, *thing) for i, what in enumerate(scenes.found) for thing in zip(*what, strict=True)]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(scenes.images))],
        "categories": [{"id": digit} for digit in range(CLASSES)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": int(digit), "bbox": _corner(box), "iscrowd": 0,
             "area": float((box[2:] - box[:2]).prod())}
            for n, (i, box, digit) in enumerate(things, 1)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(guesses), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return float(judged.stats[0]), float(judged.stats[1])


def _corner(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def _best(scores: Tensor, boxes: Tensor, most: int = 20) -> list[tuple[int, float, Tensor]]:
    """``(digit, score, box)`` of one picture, the best first; of boxes that overlap by more than half, the best."""
    chosen: list[tuple[int, float, Tensor]] = []
    score, digit = scores.max(1)
    for at in score.argsort(descending=True)[: 3 * most].tolist():
        if not chosen or overlap(boxes[at], torch.stack([box for _, _, box in chosen])).max() < 0.5:
            chosen.append((int(digit[at]), float(score[at]), boxes[at]))
    return chosen[:most]
