"""All the batches of one seed, made once: the views of every epoch and step, and what the teacher says of them.

They are those that ``vrm-distill`` would draw: order, views and first weights follow from the seed alone, whatever the
method. The methods differ in nothing else then, and a student costs its own steps only.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.methods.losses import Outputs, outputs
from benchmarks.methods.methods import BATCH
from vrm_distill.checkpoint import save_state
from vrm_distill.data import ImageData, ShardedBatches, Views
from vrm_distill.seeding import seed_everything

VIEWS = 3  # the real one, and two virtual ones


class Bank:
    """``epochs`` times ``steps`` batches of ``views`` views each.

    ``images`` ``[epochs, steps, views, B, channels, H, W]`` float16, ``labels`` ``[epochs, steps, B]``, and of a
    teacher its :class:`Outputs`, ``[epochs, steps, views, B, ...]``.
    """

    def __init__(self, images: Tensor, labels: Tensor, teacher: Outputs | None) -> None:
        self.images, self.labels, self.teacher = images, labels, teacher
        self.epochs, self.steps = labels.shape[:2]

    def batch(self, epoch: int, step: int, views: int) -> tuple[Tensor, list[Outputs], Tensor]:
        """``(images [views * B, ...], one Outputs of the teacher a view, labels [B])``."""
        images = self.images[epoch, step, :views].flatten(0, 1).float()
        said = []
        if self.teacher is not None:
            said = [Outputs(*(x[epoch, step, view] for x in self.teacher)) for view in range(views)]
        return images, said, self.labels[epoch, step]

    def save(self, path: Path) -> None:
        teacher = {} if self.teacher is None else self.teacher._asdict()
        save_state(path, {"images": self.images, "labels": self.labels, "teacher": teacher})

    @classmethod
    def load(cls, path: Path) -> "Bank":
        content = torch.load(path, weights_only=True, mmap=True)
        return cls(content["images"], content["labels"], Outputs(**content["teacher"]) if content["teacher"] else None)


@torch.no_grad()
def make(data: ImageData, seed: int, epochs: int, teacher: nn.Module | None, views: int = VIEWS) -> Bank:
    """The bank of one seed; the teacher sees the images as the students will, rounded to float16."""
    batches, draw = ShardedBatches(len(data.train), BATCH, seed), Views(data, virtual_views=views - 1)
    shape = (epochs, batches.steps, views, BATCH)
    images = torch.empty(*shape, data.in_channels, *data.size, dtype=torch.float16)
    labels = torch.empty(epochs, batches.steps, BATCH, dtype=torch.int64)
    said: list[Tensor] = []
    for epoch in range(epochs):
        batches.seek(epoch, 0)
        for step, indices in enumerate(batches):
            x, labels[epoch, step] = data.train[indices]
            seed_everything(x.device, seed, epoch, step, 0, 0)
            images[epoch, step] = torch.cat(draw(x)).unflatten(0, (views, BATCH))
            if teacher is None:
                continue
            told = outputs(teacher, images[epoch, step].flatten(0, 1).float())
            said = said or [torch.empty(*shape, *x.shape[1:]) for x in told]
            for place, x in zip(said, told, strict=True):
                place[epoch, step] = x.unflatten(0, (views, BATCH))
    return Bank(images, labels, Outputs(*said) if said else None)
