"""How much of a training step the loss takes, and would take with the eager class."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vrm_distill.data import ImageData, ShardedBatches, Views, batches_loader
from vrm_distill.engine import loss_of_logits
from vrm_distill.settings import Settings
from vrm_kernels.data import both_views
from vrm_kernels.loss import VRMLoss

# The eager class stores a dozen tensors of so many numbers, 32 MiB each. Larger ones are not tried for the report.
_EAGER_ELEMENTS = 2**23


@dataclass(frozen=True)
class StepTime:
    """Median seconds of a training step, of the teacher's pass in it, of its loss (forward, and backward to the
    logits), and of the eager loss.

    ``eager_loss`` is ``None`` where its pairwise tensors were too large to try.
    """

    step: float
    teacher: float
    loss: float
    eager_loss: float | None

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
    data: ImageData,
    settings: Settings,
    loss_fn: VRMLoss,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    device: torch.device,
    *,
    steps: int = 40,
    warm_up: int = 5,
    seconds: float = 5.0,
) -> StepTime:
    """Time distillation steps: batch, views, teacher, student, loss, backward and optimiser; ``student`` is changed.

    The steps are those of a training in float32 in one process, except that the backward pass stops at the logits for a
    moment, so that the loss's share of it can be told apart. The eager loss runs on the same logits in the same step,
    outside the clock of the step, unless its pairwise tensors would be too large.

    Args:
        steps, warm_up, seconds: so many steps after the first few, or fewer if they take longer; one at least.
    """
    student.train()
    teacher.eval()
    optimizer = make_optimizer(student)
    eager = deepcopy(loss_fn)
    eager.backend = "reference"
    samples, classes = settings.batch_size // settings.accumulate, data.classes
    affordable = samples * classes * max(samples, classes) <= _EAGER_ELEMENTS
    batches = ShardedBatches(len(data.train), samples, settings.seed)
    batches = _endless(batches_loader(data.train, batches, settings.workers))
    views = Views(data, settings.augment, settings.virtual_views)
    times: list[tuple[float, float, float, float]] = []
    begun = time.perf_counter()
    while len(times) < warm_up + steps and (not times or time.perf_counter() - begun < seconds):
        start = _now(device)
        images, labels = (x.to(device) for x in next(batches))
        real, virtual = views(images)
        teacher_start = _now(device)
        with torch.no_grad():
            teacher_logits = both_views(teacher, real, virtual)
        teacher_end = _now(device)
        logits = both_views(student, real, virtual)
        loss_start = _now(device)
        gradients = _logit_gradients(loss_fn, logits, teacher_logits, labels, settings.kd_weight)
        loss_end = _now(device)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(logits, gradients)
        optimizer.step()
        end = _now(device)
        if affordable:
            _logit_gradients(eager, logits, teacher_logits, labels, settings.kd_weight)
        times.append((end - start, teacher_end - teacher_start, loss_end - loss_start, _now(device) - end))
    counted = times[min(warm_up, len(times) // 2) :]
    step, teacher_pass, loss, eager = (statistics.median(column) for column in zip(*counted, strict=True))
    return StepTime(step, teacher_pass, loss, eager if affordable else None)


def time_loss(loss_fn: VRMLoss, samples: int, classes: int, device: torch.device) -> float:
    """Seconds that the loss takes on random logits of a batch like the training's, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(samples, classes, generator=generator).to(device) for _ in range(4)]
    labels = torch.arange(samples, device=device) % classes
    start = _now(device)
    _logit_gradients(loss_fn, logits[:2], logits[2:], labels)
    return _now(device) - start


def _logit_gradients(loss_fn, logits, teacher_logits, labels, kd_weight: float = 0.0) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in logits]
    loss_of_logits(leaves, teacher_logits, labels, loss_fn, kd_weight)[0].backward()
    return [x.grad for x in leaves]


def _endless(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
