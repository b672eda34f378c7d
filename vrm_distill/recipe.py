"""The whole run: a teacher, then for every seed the same student alone and distilled, resumable at any moment."""

import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from torch import nn

import vrm_kernels
from vrm_distill import checkpoint, relations
from vrm_distill.data import ImageData, plain_loader
from vrm_distill.engine import count_correct, cross_entropy_loss, distillation_loss
from vrm_distill.log import Log, progress_bar
from vrm_distill.models import create_model, parameter_count
from vrm_distill.settings import DISTILLED, TEACHER, Settings
from vrm_distill.timing import StepTime, time_loss, time_steps
from vrm_distill.trainer import NonFiniteLoss, Trainer, make_optimizer
from vrm_kernels import VRMLoss

# What a run leaves in its folder.
LOG = "log.csv"
CURVES = "curves.png"
RELATIONS = "relations.png"
SUMMARY = "summary.md"
CONFIG = "config.yaml"
STATE = "resume.pt"
STUDENT_CHECKPOINT = "student.safetensors"
TEACHER_CHECKPOINT = "teacher.safetensors"
# A run also saves its state at the end of an epoch, if it has not for so many seconds.
SAVE_SECONDS = 20.0
OUTPUTS = (LOG, CURVES, RELATIONS, SUMMARY, CONFIG, STATE, STUDENT_CHECKPOINT, TEACHER_CHECKPOINT)


@dataclass(frozen=True)
class Result:
    """What a run came to.

    ``rows`` are the log's; ``best_seed`` is that of the distilled student that was saved (as it was after its last
    epoch, of all seeds the best on the validation images), and of the relations; ``processes`` is how many trained.
    """

    rows: list[dict]
    train_images: int
    test_images: int
    teacher_parameters: int
    student_parameters: int
    best_seed: int
    relations: relations.Relations
    step_time: StepTime
    training_seconds: float
    processes: int = 1

    def final_accuracies(self, method: str) -> list[float]:
        """Test accuracies after the last epoch, in the order of the seeds."""
        last = {row["seed"]: row["test_accuracy"] for row in self.rows if row["method"] == method}
        return [last[seed] for seed in sorted(last)]


class Diverged(RuntimeError):
    """A loss became NaN or infinite; the message says where, and what to do."""


def run(
    settings: Settings,
    data: ImageData,
    console: Console,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    resume: dict[str, Any] | None = None,
) -> Result | None:
    """Train everything, writing the log epoch by epoch and the checkpoints as they come.

    Args:
        teacher: a trained one; ``None`` trains it first.
        resume: what :func:`read_state` found of an interrupted run.

    Returns:
        The result, in the first process; ``None`` in the others.

    Raises:
        Diverged: a loss became NaN or infinite; what was written so far stays.
        OSError: a file could not be written; likewise.
    """
    return _Run(settings, data, console, accelerator, teacher, resume or {}).run()


def read_state(settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run in ``settings.output_dir``, or ``None`` if it came to none.

    Raises:
        ValueError: the checkpoint cannot be read, or is of a run with other settings, which are named.
    """
    path = settings.output_dir / STATE
    if not path.exists():
        return None
    state = checkpoint.load_state(path)
    if differences := settings.differences(state.get("settings", {})):
        raise ValueError(f"{path} is of another run: {'; '.join(differences)}")
    return state


class _Run:
    def __init__(self, settings, data, console, accelerator, teacher, resume) -> None:
        self.settings, self.data, self.console, self.accelerator = settings, data, console, accelerator
        self.main, self.folder = accelerator.is_main_process, settings.output_dir
        self.resume, self.teacher = resume, teacher
        self.best: dict[str, Any] | None = resume.get("best")
        self.seconds: float = resume.get("seconds", 0.0)
        self.saved: str | None = None
        self.saved_at = time.monotonic()
        shards = {"rank": accelerator.process_index, "world": accelerator.num_processes, "workers": settings.workers}
        self.judges = {
            "validation_accuracy": plain_loader(data.validation, **shards),
            "test_accuracy": plain_loader(data.test, **shards),
        }
        self.tasks = [] if teacher is not None else [(TEACHER, settings.seed)]
        self.tasks += [(method, seed) for seed in settings.all_seeds for method in settings.methods]

    def run(self) -> Result | None:
        settings = self.settings
        if self.main:
            for name in OUTPUTS:
                checkpoint.remove_leftovers(self.folder / name)
        if self.main and not self.resume:
            with (self.folder / CONFIG).open("w") as file:
                yaml.safe_dump(settings.plain(), file, sort_keys=False)
        events = self.folder / "tensorboard" if settings.tensorboard else None
        done = self.resume.get("task", 0)
        with (
            Log(self.folder / LOG if self.main else Path("/dev/null"), self.resume.get("rows", ()), events) as self.log,
            progress_bar(self.console) as self.progress,
        ):
            if self.teacher is not None and not self.log.rows:
                self.log.add({**self._row(TEACHER, settings.seed, 0), **self._accuracies(self.teacher)})
                self._tell_teacher(self.log.rows[-1])
            elif self.teacher is None and done:
                self.teacher = self._reload(settings.teacher, TEACHER_CHECKPOINT)
            total = sum(self._epochs(method) for method, _ in self.tasks)
            finished = sum(self._epochs(method) for method, _ in self.tasks[:done])
            self.bar = self.progress.add_task(TEACHER, total=total, completed=finished)
            if done == len(self.tasks):
                self.console.print(f"nothing left to train in {self.folder}")
            for number in range(done, len(self.tasks)):
                self._task(number, self.resume.get("trainer") if number == done else None)
            if not self.main:
                return None
            self.progress.update(self.bar, description="judging")
            return self._result()

    def _task(self, number: int, state: dict[str, Any] | None) -> None:
        """Train one model, from ``state`` if it was interrupted, and save it if it is to be kept."""
        (method, seed), settings = self.tasks[number], self.settings
        self.progress.update(self.bar, description=method if method == TEACHER else f"seed {seed} {method}")
        name, lr = (settings.teacher, settings.teacher_lr) if method == TEACHER else (settings.student, settings.lr)
        trainer = Trainer(
            self.accelerator,
            self._new_model(name, seed),
            self.data,
            settings,
            self._objective(method),
            epochs=self._epochs(method),
            lr=lr,
            seed=seed,
            virtual=method != "alone_real",
        )
        if state is not None:
            trainer.load_state(state)
            after = f", after {trainer.at.step} of its {trainer.batches.steps} steps" if trainer.at.step else ""
            self.console.print(f"resuming {method}, seed {seed} at epoch {trainer.at.epoch + 1}{after}")
            self.progress.advance(self.bar, trainer.at.epoch)
        elif self.resume and number == self.resume["task"]:
            self.console.print(f"resuming {method}, seed {seed} at epoch 1")
        started = time.perf_counter() - self.seconds

        def save() -> None:
            self.seconds = time.perf_counter() - started
            if not trainer.parameters_finite():
                raise NonFiniteLoss(["a weight"], trainer.at.epoch + 1, trainer.at.step)
            where = f"epoch {trainer.at.epoch + 1}, step {trainer.at.step} of {method}, seed {seed}"
            self._save_state(number, trainer.state(), where)

        while not trainer.finished:
            row = self._row(method, seed, trainer.at.epoch + 1)
            row["lr"] = float(trainer.optimizer.param_groups[0]["lr"])
            try:
                means = trainer.epoch(save)
            except NonFiniteLoss as error:
                last = f"the last good checkpoint is of {self.saved}" if self.saved else "no checkpoint was due before"
                advice = self._advice(method, lr)
                raise Diverged(f"{error} ({method}, seed {seed}); {last}: try {advice}") from error
            row["train_loss"] = means.pop("loss", None)
            row |= means
            if method == DISTILLED:
                steps = trainer.batches.steps
                row["loss_share"] = self._loss_share(trainer.at.seconds / steps)
            row |= self._accuracies(trainer.result)
            row["seconds"] = trainer.at.seconds
            self.log.add(row)
            trainer.next_epoch()
            self.progress.advance(self.bar)
            self._save_epoch(number, trainer, started)
        self.seconds = time.perf_counter() - started
        self._keep(method, seed, trainer.close(), self.log.rows[-1])
        self._save_state(number + 1, None, f"the end of {method}, seed {seed}")

    def _save_epoch(self, number: int, trainer: Trainer, started: float) -> None:
        """Save a run whose steps are too slow or too few for ``checkpoint_steps``, between two epochs.

        The first process alone decides by its clock: nothing that the others take part in depends on it. Weights that
        are not finite are left for the next step to report.
        """
        due = self.main and not trainer.finished and time.monotonic() - self.saved_at > SAVE_SECONDS
        if due and trainer.parameters_finite():
            method, seed = self.tasks[number]
            self.seconds = time.perf_counter() - started
            self._save_state(number, trainer.state(), f"the end of epoch {trainer.at.epoch} of {method}, seed {seed}")

    def _advice(self, method: str, lr: float) -> str:
        advice = [f"a smaller {'--teacher-lr' if method == TEACHER else '--lr'} than {lr:g}"]
        if method == DISTILLED and (self.settings.alpha or self.settings.beta):
            advice += ["a longer --relation-warmup", "a smaller --alpha and --beta"]
        if self.settings.precision != "no":
            advice.append("--precision no")
        return ", or ".join((", ".join(advice[:-1]), advice[-1])) if advice[1:] else advice[0]

    def _tell_teacher(self, row: dict[str, Any]) -> None:
        self.console.print(f"teacher: {row['test_accuracy']:.1%} of the test images")

    def _keep(self, method: str, seed: int, model: nn.Module, last: dict[str, Any]) -> None:
        """Save the teacher; and the distilled student after its last epoch, if it is of the best seed so far."""
        if method == TEACHER:
            self.teacher = model
            self._tell_teacher(last)
            self._save(TEACHER_CHECKPOINT, self.settings.teacher, model, last)
        # Which seed's student to save is chosen by the validation images: the test images only judge.
        elif method == DISTILLED and (
            self.best is None or last["validation_accuracy"] > self.best["validation_accuracy"]
        ):
            self.best = last
            self._save(STUDENT_CHECKPOINT, self.settings.student, model, last)
        if method == list(self.settings.methods)[-1]:
            ends = {r["method"]: r["test_accuracy"] for r in self.log.rows if r["seed"] == seed}
            words = [f"{title.removeprefix('student ')} {ends[m]:.1%}" for m, title in self.settings.methods.items()]
            self.console.print(f"seed {seed}: {'; '.join(words)}")

    def _objective(self, method: str):
        settings = self.settings
        if method != DISTILLED:
            views = "real" if method == "alone_real" else "both"
            return lambda model, real, virtual, labels, _: cross_entropy_loss(
                model, real, virtual, labels, views, settings.label_smoothing
            )
        self.loss_fn = make_loss(settings)
        teacher = self.teacher.eval()

        def objective(model, real, virtual, labels, progress):
            warm = min(1.0, progress / settings.relation_warmup) if settings.relation_warmup else 1.0
            self.loss_fn.alpha, self.loss_fn.beta = settings.alpha * warm, settings.beta * warm
            with self.accelerator.autocast():
                return distillation_loss(teacher, model, real, virtual, labels, self.loss_fn, settings.kd_weight)

        return objective

    def _accuracies(self, model: nn.Module) -> dict[str, float]:
        accuracies = {}
        for name, loader in self.judges.items():
            correct, seen = count_correct(model, loader, self.accelerator.device, self.data.normalized)
            counts = torch.tensor([correct, seen], dtype=torch.float64, device=self.accelerator.device)
            correct, seen = self.accelerator.reduce(counts, "sum").tolist()
            accuracies[name] = correct / seen
        return accuracies

    def _row(self, method: str, seed: int, epoch: int) -> dict[str, Any]:
        return {"run": self.folder.name, "method": method, "seed": seed, "epoch": epoch}

    def _epochs(self, method: str) -> int:
        return self.settings.teacher_epochs if method == TEACHER else self.settings.epochs

    def _new_model(self, name: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return create_model(name, self.data.in_channels, self.data.classes).to(self.accelerator.device)

    def _reload(self, name: str, file: str) -> nn.Module:
        model, _ = checkpoint.load_checkpoint(self.folder / file, self._new_model(name, self.settings.seed).cpu())
        return model.to(self.accelerator.device)

    def _save(self, file: str, name: str, model: nn.Module, last: dict) -> None:
        data = self.data
        metadata = {
            "model": name,
            "in_channels": data.in_channels,
            "classes": data.classes,
            "dataset": data.name,
            "size": f"{data.size[0]} {data.size[1]}",
            "mean": " ".join(map(str, data.mean)),
            "std": " ".join(map(str, data.std)),
            "vrm_kernels": vrm_kernels.__version__,
        }
        metadata |= {key: last[key] for key in ("method", "seed", "epoch", "validation_accuracy", "test_accuracy")}
        if self.main:
            checkpoint.save_checkpoint(self.folder / file, model, metadata)

    def _save_state(self, task: int, trainer: dict[str, Any] | None, where: str) -> None:
        if self.main:
            state = {
                "settings": self.settings.plain(),
                "task": task,
                "trainer": trainer,
                "rows": self.log.rows,
                "best": self.best,
                "seconds": self.seconds,
            }
            checkpoint.save_state(self.folder / STATE, state)
        self.saved, self.saved_at = f"{where}, in {self.folder / STATE}", time.monotonic()

    def _loss_share(self, step_seconds: float) -> float:
        samples = self.settings.batch_size // self.accelerator.num_processes // self.settings.accumulate
        seconds = time_loss(self.loss_fn, samples, self.data.classes, self.accelerator.device)
        return min(1.0, seconds * self.settings.accumulate / step_seconds)

    def _result(self) -> Result:
        settings, device = self.settings, self.accelerator.device
        student = self._reload(settings.student, STUDENT_CHECKPOINT)
        # Of this process alone: the others have finished.
        loss_fn = make_loss(settings)
        loss_fn.gather_distributed = False
        step_time = time_steps(
            self.teacher,
            deepcopy(student),
            self.data,
            settings,
            loss_fn,
            lambda model: make_optimizer(model, settings, settings.lr),
            device,
        )
        seed = self.best["seed"]
        looks = relations.compare(
            self.teacher, self._new_model(settings.student, seed), student, self.data, settings, seed, device
        )
        return Result(
            rows=self.log.rows,
            train_images=len(self.data.train),
            test_images=len(self.data.test),
            teacher_parameters=parameter_count(self.teacher),
            student_parameters=parameter_count(student),
            best_seed=seed,
            relations=looks,
            step_time=step_time,
            training_seconds=self.seconds,
            processes=self.accelerator.num_processes,
        )


def make_loss(settings: Settings) -> VRMLoss:
    return VRMLoss(
        settings.alpha,
        settings.beta,
        unreliable_pruning_percentile=settings.percentile,
        relations=settings.relations,
        normalize=settings.normalize,
        label_smoothing=settings.label_smoothing,
        backend=settings.backend,
        gather_distributed=settings.gather_distributed,
    )
