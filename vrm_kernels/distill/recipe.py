"""The whole run: a teacher, then for every seed the same student alone and distilled, logged epoch by epoch."""

import csv
import math
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import vrm_kernels
from vrm_kernels import VRMLoss
from vrm_kernels.distill.checkpoint import save_checkpoint
from vrm_kernels.distill.data import ImageData, dual_view_loader, plain_loader
from vrm_kernels.distill.engine import train_alone_one_epoch, train_one_epoch, validate
from vrm_kernels.distill.models import create_model, parameter_count
from vrm_kernels.distill.timing import StepTime, time_steps

TEACHER = "teacher"
# The three ways of training one student, by their names in the log.
METHODS = {
    "alone_real": "student alone, real view",
    "alone_both": "student alone, both views",
    "distilled": "student distilled",
}
TERMS = ("ce_real", "ce_virtual", "inter_sample", "inter_class", "kept_inter_sample", "kept_inter_class")
FIELDS = ("run", "method", "seed", "epoch", "train_loss", *TERMS, "validation_accuracy", "test_accuracy", "seconds")
# What a run leaves in its folder.
LOG = "log.csv"
CURVES = "curves.png"
SUMMARY = "summary.md"
STUDENT_CHECKPOINT = "student.safetensors"
TEACHER_CHECKPOINT = "teacher.safetensors"
OUTPUTS = (LOG, CURVES, SUMMARY, STUDENT_CHECKPOINT, TEACHER_CHECKPOINT)

WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Settings:
    """What ``vrm-distill`` takes; its help says what each means."""

    dataset: str
    train_images: int
    teacher: str
    student: str
    teacher_epochs: int
    teacher_lr: float
    epochs: int
    batch_size: int
    lr: float
    alpha: float
    beta: float
    percentile: float
    backend: str
    seed: int
    seeds: int
    device: torch.device
    output_dir: Path

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class Result:
    """``rows`` are the log's; ``best_seed`` is that of the distilled student that was saved."""

    rows: list[dict]
    test_images: int
    teacher_parameters: int
    student_parameters: int
    best_seed: int
    step_time: StepTime
    training_seconds: float

    def final_accuracies(self, method: str) -> list[float]:
        """Test accuracies after the last epoch, in the order of the seeds."""
        last = {row["seed"]: row["test_accuracy"] for row in self.rows if row["method"] == method}
        return [last[seed] for seed in sorted(last)]


class NonFiniteLoss(RuntimeError):
    """Training diverged."""


def run(settings: Settings, data: ImageData, console: Console) -> Result:
    """Train everything, writing the log epoch by epoch and the checkpoints as they come.

    Raises:
        NonFiniteLoss: a loss became NaN or infinite; what was written so far stays.
        OSError: a file could not be written; likewise.
    """
    started = time.perf_counter()
    with _Log(settings.output_dir / LOG) as log, _progress(console) as progress:
        trainer = _Trainer(settings, data, log, progress)

        trainer.bar = progress.add_task(TEACHER, total=settings.teacher_epochs)
        teacher = trainer.new_model(settings.teacher, settings.seed)
        last = trainer.train(TEACHER, settings.seed, teacher)
        trainer.save(TEACHER_CHECKPOINT, settings.teacher, teacher, last)
        console.print(f"teacher: {last['test_accuracy']:.1%} of the test images")

        best, best_student = None, None
        trainer.bar = progress.add_task("students", total=settings.seeds * len(METHODS) * settings.epochs)
        for seed in settings.all_seeds:
            initial = trainer.new_model(settings.student, seed)
            accuracies = []
            for method, title in METHODS.items():
                short = title.removeprefix("student ")
                progress.update(trainer.bar, description=f"seed {seed} {short}")
                student = deepcopy(initial)
                last = trainer.train(method, seed, student, teacher)
                accuracies.append(f"{short} {last['test_accuracy']:.1%}")
                # Which student to save is chosen by the validation images: the test images only judge.
                if method == "distilled" and (
                    best is None or last["validation_accuracy"] > best["validation_accuracy"]
                ):
                    best, best_student = last, student
                    trainer.save(STUDENT_CHECKPOINT, settings.student, student, last)
            console.print(f"seed {seed}: {'; '.join(accuracies)}")
        training_seconds = time.perf_counter() - started
        progress.update(trainer.bar, description="students")
        step_time = trainer.time_steps(teacher, best_student)

    return Result(
        rows=log.rows,
        test_images=len(data.test),
        teacher_parameters=parameter_count(teacher),
        student_parameters=parameter_count(best_student),
        best_seed=best["seed"],
        step_time=step_time,
        training_seconds=training_seconds,
    )


class _Trainer:
    """Trains one model after another on the same data, order and augmentations, given the seed."""

    def __init__(self, settings: Settings, data: ImageData, log: "_Log", progress: Progress) -> None:
        self.settings, self.data, self.log, self.progress = settings, data, log, progress
        self.bar = None
        self.validation, self.test = plain_loader(data.validation), plain_loader(data.test)
        self.loss_fn = VRMLoss(
            settings.alpha,
            settings.beta,
            unreliable_pruning_percentile=settings.percentile,
            backend=settings.backend,
        )

    def new_model(self, name: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return create_model(name, self.data.in_channels, self.data.classes).to(self.settings.device)

    def train(self, method: str, seed: int, model: nn.Module, teacher: nn.Module | None = None) -> dict:
        """Train ``model`` in place; the log's row of its last epoch."""
        settings, device = self.settings, self.settings.device
        epochs, lr = (
            (settings.teacher_epochs, settings.teacher_lr) if method == TEACHER else (settings.epochs, settings.lr)
        )
        loader = self._loader(seed)
        optimizer = _optimizer(model.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            if method == "distilled":
                means = train_one_epoch(teacher, model, loader, self.loss_fn, optimizer, device)
            else:
                views = "real" if method == "alone_real" else "both"
                means = train_alone_one_epoch(model, loader, optimizer, device, views=views)
            seconds = time.perf_counter() - start
            schedule.step()
            loss = means.pop("loss")
            row = {
                "run": settings.output_dir.name,
                "method": method,
                "seed": seed,
                "epoch": epoch,
                "train_loss": loss,
                **means,
                "validation_accuracy": validate(model, self.validation, device),
                "test_accuracy": validate(model, self.test, device),
                "seconds": seconds,
            }
            self.log.add(row)
            self.progress.advance(self.bar)
            if not math.isfinite(loss):
                terms = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
                raise NonFiniteLoss(
                    f"the loss became {loss} ({method}, seed {seed}, epoch {epoch}; {terms}): try a smaller "
                    f"{'--teacher-lr' if method == TEACHER else '--lr'} than {lr:g}"
                )
        return row

    def save(self, file: str, name: str, model: nn.Module, last: dict) -> None:
        data = self.data
        metadata = {
            "model": name,
            "in_channels": data.in_channels,
            "classes": data.classes,
            "dataset": data.name,
            "mean": data.mean,
            "std": data.std,
            "vrm_kernels": vrm_kernels.__version__,
        }
        metadata |= {key: last[key] for key in ("method", "seed", "epoch", "validation_accuracy", "test_accuracy")}
        save_checkpoint(self.settings.output_dir / file, model, metadata)

    def time_steps(self, teacher: nn.Module, student: nn.Module) -> StepTime:
        settings = self.settings
        loader = self._loader(settings.seed)
        return time_steps(teacher, student, loader, self.loss_fn, lambda p: _optimizer(p, settings.lr), settings.device)

    def _loader(self, seed: int):
        # Seeded afresh for each model: every method of a seed sees the same augmented batches in the same order.
        torch.manual_seed(seed)
        return dual_view_loader(self.data, self.settings.batch_size, seed)


def _optimizer(parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)


class _Log:
    """The CSV log, one row an epoch, each on disk as soon as it is added."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []

    def __enter__(self) -> "_Log":
        # Mode "x": a run never overwrites another's log, however it came to share its folder.
        self._file = self.path.open("x", newline="")
        self._writer = csv.DictWriter(self._file, FIELDS, restval="")
        self._writer.writeheader()
        return self

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self._writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()

    def __exit__(self, *_) -> None:
        self._file.close()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
