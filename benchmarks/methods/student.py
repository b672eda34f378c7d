"""One training of the comparison, and its judgement."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.methods.bank import Bank
from benchmarks.methods.losses import Outputs, outputs
from benchmarks.methods.methods import Method
from vrm_distill.data import ImageData
from vrm_distill.models import create_model

WEIGHT_DECAY = 1e-4


def new_model(name: str, data: ImageData, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    # A quarter faster on a CPU, as is the fused optimizer.
    return create_model(name, data.in_channels, data.classes).to(memory_format=torch.channels_last)


class Training:
    """Steps of AdamW on a method's loss; ``settings`` are ``lr`` and the method's knobs."""

    def __init__(self, model: nn.Module, method: Method, settings: dict[str, float]) -> None:
        knobs = {name: value for name, value in settings.items() if name != "lr"}
        self.model, self.views, self.loss_fn = model.train(), method.views, method.make(**knobs)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=WEIGHT_DECAY, fused=True)

    def step(self, images: Tensor, teacher: list[Outputs], labels: Tensor) -> Tensor:
        """One step on a batch of :meth:`Bank.batch`; the loss."""
        loss = self.loss_fn(split(outputs(self.model, images), self.views), teacher, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train(model: nn.Module, bank: Bank, method: Method, settings: dict[str, float]) -> bool:
    """Train ``model`` in place on the whole bank, the learning rate a cosine of the epochs; False if it diverged."""
    training = Training(model, method, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, bank.epochs)
    for epoch in range(bank.epochs):
        for step in range(bank.steps):
            loss = training.step(*bank.batch(epoch, step, method.views))
        if not loss.isfinite():
            return False
        schedule.step()
    model.eval()
    return True


def split(said: Outputs, views: int) -> list[Outputs]:
    """One ``Outputs`` a view of those of all views, one after the other."""
    return [Outputs(*parts) for parts in zip(*(x.chunk(views) for x in said), strict=True)]


@torch.no_grad()
def judge(model: nn.Module, part: Dataset, data: ImageData) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy in nats of ``model``, in evaluation mode, on a part of the data."""
    images, labels = part[torch.arange(len(part))]
    logits: Tensor = torch.cat([model(data.normalized(x)) for x in images.split(256)])
    cross_entropy = float(F.cross_entropy(logits, labels))
    return (logits.argmax(1) == labels).float().mean().item(), cross_entropy if math.isfinite(
        cross_entropy
    ) else math.inf
