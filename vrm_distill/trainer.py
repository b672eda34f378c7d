"""The training of one model, step by step, from its start or from where a checkpoint left it."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vrm_distill.data import ImageData, ShardedBatches, Views, batches_loader, mixup
from vrm_distill.engine import Means
from vrm_distill.seeding import seed_everything
from vrm_distill.settings import Settings

# Every so many steps the loss is checked for NaN. Reading it makes the host wait for the device.
_LOOK = 50
# The watcher sees the first steps of a training, this many: that makes the host wait, too.
_WATCHED = 3
_NEVER = 2**62


class Place(NamedTuple):
    """Where in its training a micro-batch of this process is, all counted from 0; ``steps`` are those of an epoch."""

    epoch: int
    step: int
    part: int
    steps: int

    @property
    def progress(self) -> float:
        """Epochs done, the part of this one counted."""
        return self.epoch + self.step / self.steps


# objective(model, real, virtual, labels, place) gives the loss and its terms.
Objective = Callable[[nn.Module, Tensor, Tensor, Tensor, Place], tuple[Tensor, dict[str, Tensor]]]


class NonFiniteLoss(RuntimeError):
    """Training diverged. ``terms`` went first, at ``step`` of ``epoch``, both counted from 1."""

    def __init__(self, terms: list[str], epoch: int, step: int) -> None:
        super().__init__(f"{', '.join(terms)} became NaN or infinite at step {step} of epoch {epoch}")
        self.terms, self.epoch, self.step = terms, epoch, step


@dataclass
class Position:
    """Where a training is: whole epochs done, the optimiser's steps done of the next one, and the time they took."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains ``model`` in place on one objective.

    Everything random in a step is a function of the seed, the epoch, the step, the micro-batch and the process, so that
    what :meth:`state` holds (model, optimiser, schedule, gradient scaler, running mean of the weights, position, the
    epoch's sums) is all that the rest of the training depends on: a training resumed from it ends in the same bits.

    Args:
        accelerator: the device, the precision, and how many processes share each batch.
        model: gives logits ``[B, C]``; on the accelerator's device already.
        epochs, lr: how long, and the first learning rate.
        seed: of the order of the samples and of the augmentations.
        view_epochs: the order and the augmentations of an epoch are those of epoch modulo this; by default no two are
            alike.
        virtual: make the virtual view, too; else the objective gets the real one in its place.
        clip: scale gradients down to this norm where theirs is larger; 0 lets them be.
        watch: is shown the first few steps of a training: the step from 1, the loss and its terms, the gradients' norm.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        data: ImageData,
        settings: Settings,
        objective: Objective,
        *,
        epochs: int,
        lr: float,
        seed: int,
        view_epochs: int | None = None,
        virtual: bool = True,
        clip: float = 0.0,
        watch: Callable[[int, dict[str, float], float], None] | None = None,
    ) -> None:
        self.accelerator, self.data, self.settings, self.objective = accelerator, data, settings, objective
        self.epochs, self.seed, self.virtual, self.clip, self.watch = epochs, seed, virtual, clip, watch
        self.view_epochs = view_epochs or epochs
        self.batches = ShardedBatches(
            len(data.train),
            settings.batch_size,
            seed,
            accelerator.process_index,
            accelerator.num_processes,
            settings.accumulate,
        )
        self.views = Views(data, settings.augment, settings.virtual_views)
        self.average = None
        if settings.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        optimizer = make_optimizer(model, settings, lr)
        self.schedule = _schedule(optimizer, settings, epochs)
        # accelerate may wrap the model for several processes or for a compiler; the network itself stays the same.
        self.bare = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.at, self.means, self.gradients = Position(), Means(), Means()
        self._first_bad: Tensor | None = None

    def epoch(self, checkpoint: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Train to the end of the epoch that :attr:`at` is in.

        Args:
            checkpoint: called every ``settings.checkpoint_steps`` steps, after the loss was found finite.

        Returns:
            Means over the samples of the whole epoch, over all processes: ``loss`` and the objective's terms; with
            clipping over the steps also ``grad_norm``, before it, and ``clipped``, the share of steps that it changed.

        Raises:
            NonFiniteLoss: the loss or one of its terms became NaN or infinite.
        """
        batches = self.replay(self.at.epoch, self.at.step)
        self.model.train()
        start, seconds = time.perf_counter(), self.at.seconds
        while self.at.step < self.batches.steps:
            self._step(batches)
            self.at.seconds = seconds + time.perf_counter() - start
            done = self.at.epoch * self.batches.steps + self.at.step
            if self.at.step % _LOOK == 0 or done % self.settings.checkpoint_steps == 0:
                self._check_finite()
            if done % self.settings.checkpoint_steps == 0:
                self._share_means()
                checkpoint()
        self._check_finite()
        self._share_means()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.at.seconds = seconds + time.perf_counter() - start
        self._broadcast_buffers()
        if not self.accelerator.is_main_process:
            return {}
        return {**self.means.read(), **(self.gradients.read() if self.clip else {})}

    def next_epoch(self) -> None:
        """Move to the first step of the next epoch, with its learning rate."""
        with warnings.catch_warnings():
            # A run that resumes at the end of its first epoch has not called the optimiser in this process.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()
        self.at, self.means, self.gradients = Position(self.at.epoch + 1), Means(), Means()

    @property
    def finished(self) -> bool:
        return self.at.epoch >= self.epochs

    @property
    def result(self) -> nn.Module:
        """The model to judge and to keep: the running mean of the weights if there is one, not wrapped in anything."""
        return self.average.module if self.average is not None else self.bare

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs, as tensors, numbers, text, lists and dicts."""
        scaler = self.accelerator.scaler
        return {
            "epoch": self.at.epoch,
            "step": self.at.step,
            "seconds": self.at.seconds,
            "means": self.means.state(),
            "gradients": self.gradients.state(),
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state` of a trainer of the same settings."""
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.at = Position(state["epoch"], state["step"], state["seconds"])
        # The checkpoint holds the sums of all processes: the first process takes them, as after _share_means.
        main, device = self.accelerator.is_main_process, self.accelerator.device
        self.means = Means.of(state["means"], device, empty=not main)
        self.gradients = Means.of(state["gradients"], device)

    def close(self) -> nn.Module:
        """:attr:`result`, and let go of the optimiser and of the wrappers."""
        result = self.result
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.accelerator.free_memory()
        return result

    def replay(self, epoch: int, step: int = 0) -> Iterator[tuple[Place, Tensor, Tensor, Tensor]]:
        """Place, views and labels of this process's micro-batches, from a step to the end of its epoch."""
        device, source = self.accelerator.device, epoch % self.view_epochs
        self.batches.seek(source, step)
        loader = batches_loader(self.data.train, self.batches, self.settings.workers)
        for number, batch in enumerate(loader, step * self.settings.accumulate):
            place = Place(epoch, *divmod(number, self.settings.accumulate), self.batches.steps)
            images, labels = (x.to(device, non_blocking=True) for x in batch)
            seed_everything(device, self.seed, source, place.step, place.part, self.accelerator.process_index)
            real, virtual = self.views(images, self.virtual)
            if self.settings.mixup:
                real, virtual, labels = mixup(real, virtual, labels, self.data.classes, self.settings.mixup)
            yield place, real, virtual, labels

    def _step(self, batches: Iterator[tuple[Place, Tensor, Tensor, Tensor]]) -> None:
        parts = self.settings.accumulate
        for place, real, virtual, labels in islice(batches, parts):
            # Processes add up their gradients once, with the last part.
            with self.accelerator.no_sync(self.model) if place.part < parts - 1 else nullcontext():
                loss, terms = self.objective(self.model, real, virtual, labels, place)
                self.accelerator.backward(loss / parts)
            values = self.means.add({"loss": loss, **terms}, labels.shape[0])
            bad = torch.where(values.isfinite(), _NEVER, self.at.step)
            self._first_bad = bad if self._first_bad is None else torch.minimum(self._first_bad, bad)
        norm = self._clip() if self.clip else None
        if self.watch is not None and self.at.epoch == 0 and self.at.step < _WATCHED:
            told = dict(zip(self.means.names, values.tolist(), strict=True))
            self.watch(self.at.step + 1, told, float("nan") if norm is None else float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.bare)
        self.at.step += 1

    def _clip(self) -> Tensor:
        """Scale the gradients down to :attr:`clip` where their norm is larger; gives the norm that they had."""
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        parameters = [p for p in self.bare.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.gradients.add({"grad_norm": norm, "clipped": norm > self.clip}, 1)
        return norm

    def _check_finite(self) -> None:
        if self._first_bad is None:
            return
        first = self._first_bad
        if self.accelerator.num_processes > 1:
            first = first.clone()
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        first = first.tolist()
        if min(first) < _NEVER:
            # Name every term that was not finite at that step, and the total only if all terms were finite.
            terms = [name for name, step in zip(self.means.names, first, strict=True) if step == min(first)]
            blamed = [name for name in terms if name != "loss"] or ["loss"]
            raise NonFiniteLoss(blamed, self.at.epoch + 1, min(first) + 1)

    def parameters_finite(self) -> bool:
        """Whether the weights that the last step made are all finite: reads the device."""
        return bool(torch.stack([p.isfinite().all() for p in self.bare.parameters()]).all())

    def _share_means(self) -> None:
        """Make the sums of all processes those of the first, and empty the others'."""
        if self.accelerator.num_processes == 1 or self.means.total is None:
            return
        counts = torch.tensor([self.means.samples], dtype=torch.float64, device=self.accelerator.device)
        both = self.accelerator.reduce(torch.cat((self.means.total, counts)), "sum")
        main = self.accelerator.is_main_process
        self.means.total = both[:-1] if main else torch.zeros_like(both[:-1])
        self.means.samples = int(both[-1]) if main else 0

    def _broadcast_buffers(self) -> None:
        """Give every process the first one's running statistics, which are those that are kept."""
        if self.accelerator.num_processes > 1:
            for buffer in self.result.buffers():
                torch.distributed.broadcast(buffer, 0)


def make_optimizer(model: nn.Module, settings: Settings, lr: float) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=settings.weight_decay)


def _schedule(
    optimizer: torch.optim.Optimizer, settings: Settings, epochs: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    if settings.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, epochs)
    milestones = list(settings.milestones) if settings.schedule == "step" else []
    return schedulers.MultiStepLR(optimizer, milestones, settings.gamma)
