"""How much of a training step the loss takes, and would take with the eager class."""

import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vrm_kernels.distill.engine import Batches, both_views
from vrm_kernels.loss import VRMLoss


@dataclass(frozen=True)
class StepTime:
    """Median seconds of a training step, of its loss (forward, and backward to the logits), and of the eager loss."""

    step: float
    loss: float
    eager_loss: float

    @property
    def share(self) -> float:
        return self.loss / self.step

    @property
    def eager_step(self) -> float:
        return self.step - self.loss + self.eager_loss

    @property
    def eager_share(self) -> float:
        return self.eager_loss / self.eager_step


def time_steps(
    teacher: nn.Module,
    student: nn.Module,
    loader: Batches,
    loss_fn: VRMLoss,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    device: torch.device,
    *,
    steps: int = 40,
    warm_up: int = 5,
) -> StepTime:
    """Time distillation steps: batch, teacher, student, loss, backward and optimiser.

    The steps are those of :func:`vrm_kernels.distill.train_one_epoch`, taken on a copy of ``student``, except that the
    backward pass stops at the logits for a moment, so that the loss's share of it can be told apart. The eager loss
    runs on the same logits in the same step, outside the clock of the step.

    Args:
        loader: at least one batch ``(real, virtual, labels)``; gone through as often as ``steps`` needs.
    """
    student = deepcopy(student).train()
    teacher.eval()
    optimizer = make_optimizer(student.parameters())
    eager = deepcopy(loss_fn)
    eager.backend = "reference"
    batches = _endless(loader)
    seconds: list[tuple[float, float, float]] = []
    for _ in range(warm_up + steps):
        start = _now(device)
        real, virtual, labels = (x.to(device) for x in next(batches))
        with torch.no_grad():
            teacher_logits = both_views(teacher, real, virtual)
        logits = both_views(student, real, virtual)
        loss_start = _now(device)
        gradients = _logit_gradients(loss_fn, logits, teacher_logits, labels)
        loss_end = _now(device)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(logits, gradients)
        optimizer.step()
        end = _now(device)
        _logit_gradients(eager, logits, teacher_logits, labels)
        seconds.append((end - start, loss_end - loss_start, _now(device) - end))
    return StepTime(*(statistics.median(column) for column in zip(*seconds[warm_up:], strict=True)))


def _logit_gradients(loss_fn, logits, teacher_logits, labels) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in logits]
    loss_fn(*leaves, *teacher_logits, labels).backward()
    return [x.grad for x in leaves]


def _endless(loader: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    while True:
        yield from loader


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
