"""The whole run: a teacher, then for every seed the same student alone and distilled, resumable at any moment."""

import gc
import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from torch import nn

import vrm_kernels
from vrm_distill import checkpoint, failures, relations
from vrm_distill.cache import open_cache, teacher_views
from vrm_distill.data import ImageData, plain_loader
from vrm_distill.engine import count_correct, cross_entropy_loss, loss_of_logits
from vrm_distill.log import Log, progress_bar, start_trackers
from vrm_distill.models import create_model, parameter_count
from vrm_distill.settings import DISTILLED, TEACHER, Settings
from vrm_distill.timing import StepTime, time_loss, time_steps
from vrm_distill.trainer import NonFiniteLoss, Trainer, make_optimizer
from vrm_distill.watch import Watch
from vrm_kernels import VRMLoss
from vrm_kernels.data import both_views

# What a run leaves in its folder.
LOG = "log.csv"
CURVES = "curves.png"
RELATIONS = "relations.png"
SUMMARY = "summary.md"
REPORT = "report.html"
CONFIG = "config.yaml"
STATE = "resume.pt"
STUDENT_CHECKPOINT = "student.safetensors"
TEACHER_CHECKPOINT = "teacher.safetensors"
# The version of what STATE holds. A run does not resume from a checkpoint of another version.
FORMAT = 2
# A run also saves its state at the end of an epoch if the last save is older than this.
SAVE_SECONDS = 20.0
OUTPUTS = (LOG, CURVES, RELATIONS, SUMMARY, REPORT, CONFIG, STATE, STUDENT_CHECKPOINT, TEACHER_CHECKPOINT)
OUTPUTS += (failures.ERROR,)


@dataclass(frozen=True)
class Result:
    """What a run came to.

    ``relations`` and ``step_time``, which are only looked at for the report, are ``None`` where that failed;
    ``warnings`` are what was said in the first steps, and why that failed.

    ``rows`` are the log's; ``best_seed`` is that of the distilled student that was saved (as it was after its last
    epoch, of all seeds the best on the validation images), and of the relations; ``processes`` is how many trained.
    """

    rows: list[dict]
    train_images: int
    test_images: int
    teacher_parameters: int
    student_parameters: int
    best_seed: int
    relations: relations.Relations | None
    step_time: StepTime | None
    training_seconds: float
    warnings: list[str]
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
    # The end of each model's training collects garbage, and need not look at all that was imported.
    frozen_by_caller = gc.get_freeze_count() > 0  # there is one set of frozen objects in a process
    gc.collect()
    gc.freeze()
    try:
        return _Run(settings, data, console, accelerator, teacher, resume or {}).run()
    finally:
        if not frozen_by_caller:
            gc.unfreeze()


def read_state(settings: Settings, data: ImageData, teacher: nn.Module | None) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run in ``settings.output_dir``, or ``None`` if it came to none.

    Args:
        teacher: one that was trained before the run.

    Raises:
        ValueError: the checkpoint cannot be read, or is of a run with other settings, images or another teacher, which
            are named.
    """
    path = settings.output_dir / STATE
    if not path.exists():
        return None
    state = checkpoint.load_state(path)
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} is of another version of vrm-distill: go on with that one, or start anew")
    differences = settings.differences(state["settings"])
    if not differences and state["data"] != data.fingerprint():
        differences.append(f"the images of {settings.dataset} are not those it was trained on: restore them")
    if not differences and state["teacher"] != _fingerprint(teacher):
        where = ", ".join(map(str, settings.teacher_checkpoint)) or settings.teacher
        differences.append(f"the weights in {where} are not those of then")
    if differences:
        raise ValueError(f"{path} is of another run: {'; '.join(differences)}; or start anew in another --output-dir")
    return state


def _fingerprint(teacher: nn.Module | None) -> str | None:
    return None if teacher is None else checkpoint.fingerprint(teacher.state_dict())


class _Run:
    def __init__(self, settings, data, console, accelerator, teacher, resume) -> None:
        self.settings, self.data, self.console, self.accelerator = settings, data, console, accelerator
        self.main, self.folder = accelerator.is_main_process, settings.output_dir
        self.resume, self.teacher = resume, teacher
        self.best: dict[str, Any] | None = resume.get("best")
        self.seconds: float = resume.get("seconds", 0.0)
        self.saved: str | None = None
        self.saved_at = time.monotonic()
        self.watch = Watch(console.print, resume.get("warnings", []))
        self.fingerprints = {"data": data.fingerprint(), "teacher": _fingerprint(teacher)}
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
            with (self.folder / CONFIG).open("w", encoding="utf-8") as file:
                yaml.safe_dump(settings.plain(), file, sort_keys=False, allow_unicode=True)
        self._tell_processes()
        self.watch.sizes(
            parameter_count(self.teacher or self._new_model(settings.teacher, settings.seed)),
            parameter_count(self._new_model(settings.student, settings.seed)),
            self.accelerator.num_processes,
            settings,
        )
        trackers = start_trackers(self.accelerator, settings) if settings.track else []
        done = self.resume.get("task", 0)
        log = self.folder / LOG if self.main else Path(os.devnull)
        with (
            Log(log, self.resume.get("rows", ()), trackers if self.main else ()) as self.log,
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

    def _tell_processes(self) -> None:
        now, then = self.accelerator.num_processes, self.resume.get("processes", self.accelerator.num_processes)
        if now != then:
            self.console.print(
                f"resuming with {now} {'process' if now == 1 else 'processes'} what {then} began: the order of the "
                f"images stays, their augmentations are other draws, and batch norm's statistics"
                f"{'' if self.settings.gather_distributed else ' and the relations'} are of other shares of a batch"
            )

    def _task(self, number: int, state: dict[str, Any] | None) -> None:
        """Train one model, from ``state`` if it was interrupted, and save it if it is to be kept."""
        (method, seed), settings = self.tasks[number], self.settings
        self.progress.update(self.bar, description=method if method == TEACHER else f"seed {seed} {method}")
        name, lr = (settings.teacher, settings.teacher_lr) if method == TEACHER else (settings.student, settings.lr)
        model, what = self._new_model(name, seed), method if method == TEACHER else f"{method}, seed {seed}"
        trainer = Trainer(
            self.accelerator,
            model,
            self.data,
            settings,
            self._objective(method, model, seed),
            epochs=self._epochs(method),
            lr=lr,
            **({"seed": seed} if method == TEACHER else settings.views(seed)),
            virtual=method != "alone_real",
            clip=settings.clip_grad * self._weight(method),
            watch=lambda step, terms, norm: self.watch.step(step, terms, norm, settings, what),
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
                if trainer.at.epoch + 1 == trainer.epochs and not trainer.parameters_finite():
                    raise NonFiniteLoss(["a weight"], trainer.epochs, trainer.at.step)
            except NonFiniteLoss as error:
                last = f"the last good checkpoint is of {self.saved}" if self.saved else "no checkpoint was due before"
                if method == DISTILLED and self._teacher_overflows(trainer, error):
                    blamed = "the teacher's logits are NaN or infinite there, the student is not to blame"
                    advice = "another --teacher-checkpoint, or --precision no"
                else:
                    blamed, advice = last, self._advice(method, lr)
                raise Diverged(f"{error} ({what}); {blamed}: try {advice}") from error
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

    def _teacher_overflows(self, trainer: Trainer, error: NonFiniteLoss) -> bool:
        """Whether the teacher's logits of the step that failed are not finite."""
        with torch.no_grad(), self.accelerator.autocast():
            return not all(
                bool(x.isfinite().all())
                for _, real, virtual, _ in islice(
                    trainer.replay(error.epoch - 1, error.step - 1), self.settings.accumulate
                )
                for x in both_views(self.teacher, real, virtual)
            )

    def _tell_teacher(self, row: dict[str, Any]) -> None:
        self.console.print(f"teacher: {row['test_accuracy']:.1%} of the test images")
        self.watch.teacher(row["test_accuracy"], len(self.data.test), self.data)

    def _keep(self, method: str, seed: int, model: nn.Module, last: dict[str, Any]) -> None:
        """Save the teacher; and the distilled student after its last epoch, if it is of the best seed so far."""
        if method == TEACHER:
            self.teacher = model
            self._tell_teacher(last)
            self._save(TEACHER_CHECKPOINT, self.settings.teacher, model, last)
        # The validation images choose the seed whose student is saved; the test images only judge.
        elif method == DISTILLED and (
            self.best is None or last["validation_accuracy"] > self.best["validation_accuracy"]
        ):
            self.best = last
            self._save(STUDENT_CHECKPOINT, self.settings.student, model, last)
        if method == list(self.settings.methods)[-1]:
            ends = {r["method"]: r["test_accuracy"] for r in self.log.rows if r["seed"] == seed}
            words = [f"{title.removeprefix('student ')} {ends[m]:.1%}" for m, title in self.settings.methods.items()]
            self.console.print(f"seed {seed}: {'; '.join(words)}")

    def _weight(self, method: str) -> float:
        """The sum of the weights of a method's loss, which the norm of its gradients grows with."""
        settings = self.settings
        return {"alone_real": 1.0, DISTILLED: 2.0 + settings.alpha + settings.beta + settings.kd_weight}.get(
            method, 2.0
        )

    def _objective(self, method: str, model: nn.Module, seed: int):
        settings = self.settings
        if method != DISTILLED:
            views = "real" if method == "alone_real" else "both"
            return lambda model, real, virtual, labels, _: cross_entropy_loss(
                model, real, virtual, labels, views, settings.label_smoothing
            )
        self.loss_fn = make_loss(settings)
        teacher, warmup = self.teacher.eval(), settings.relation_warmup
        if not warmup and (settings.alpha or settings.beta) and self.watch.starts_equal(model, self.data, settings):
            warmup = 1.0

        cache = None
        if settings.teacher_cache is not None:
            cache = open_cache(settings, self.data, teacher, self.accelerator, seed)

        def objective(model, real, virtual, labels, place):
            warm = min(1.0, place.progress / warmup) if warmup else 1.0
            self.loss_fn.alpha, self.loss_fn.beta = settings.alpha * warm, settings.beta * warm
            with self.accelerator.autocast():
                teacher_logits = teacher_views(teacher, place, real, virtual, cache)
                logits = both_views(model, real, virtual)
                return loss_of_logits(logits, teacher_logits, labels, self.loss_fn, settings.kd_weight)

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
            "class_names": json.dumps(data.class_names),
            "vrm_kernels": vrm_kernels.__version__,
        }
        metadata |= {key: last[key] for key in ("method", "seed", "epoch", "validation_accuracy", "test_accuracy")}
        if self.main:
            checkpoint.save_checkpoint(self.folder / file, model, metadata)

    def _save_state(self, task: int, trainer: dict[str, Any] | None, where: str) -> None:
        if self.main:
            state = {
                "format": FORMAT,
                "settings": self.settings.plain(),
                **self.fingerprints,
                "processes": self.accelerator.num_processes,
                "warnings": self.watch.warnings,
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
        # Only this process computes the report: the others have finished.
        loss_fn = make_loss(settings)
        loss_fn.gather_distributed = False
        seed = self.best["seed"]
        step_time = self._only_for_the_report(
            "the time of a step",
            lambda: time_steps(
                self.teacher,
                deepcopy(student),
                self.data,
                settings,
                loss_fn,
                lambda model: make_optimizer(model, settings, settings.lr),
                device,
            ),
        )
        looks = self._only_for_the_report(
            "the picture of the relations",
            lambda: relations.compare(
                self.teacher, self._new_model(settings.student, seed), student, self.data, settings, seed, device
            ),
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
            warnings=self.watch.warnings,
            processes=self.accelerator.num_processes,
        )

    def _only_for_the_report(self, what: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, or ``None``: a trained student does not fail for want of it."""
        try:
            return make()
        except Exception as error:
            self.watch.warn(f"the report lacks {what}: {failures.explain(error, self.folder)}")
            return None


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
