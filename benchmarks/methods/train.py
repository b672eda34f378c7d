"""``make compare``: every method tuned with the same number of trials on validation images, then judged on test images.

Every student of a seed has the same first weights, batches, views and teacher; only the loss and what was chosen for it
differ. A row of the CSV is one student, written when it is finished: run the command again and it goes on where it was.
"""

import argparse
import hashlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.methods import cost, results
from benchmarks.methods.methods import BATCH, METHODS, TASKS, Task
from benchmarks.methods.results import TEST, TRIAL, Row
from vrm_distill import options as command
from vrm_distill.cli import missing_packages

RESULTS = Path("benchmarks/results/compare")
SCRATCH = Path("runs/compare")
CSV = "compare.csv"
# The seeds of students that are judged on test images count from 0.
TUNING_SEED, TEACHER_SEED = 1000, 2000
TEACHER_LR = 0.005
_FOLDERS = {"fashion": "--fashion", "omniglot": "--omniglot"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what of the comparison is not in the CSV yet; the exit status (1: it failed, 130: Ctrl-C)."""
    parser = _parser()
    options = parser.parse_args(argv)
    path = options.output_dir / CSV
    if missing := missing_packages():
        parser.error(missing)
    # What can be wrong is found before anything is trained.
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        options.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output_dir):
            pass
        rows = results.read(path)
    except (OSError, ValueError) as error:
        parser.error(f"argument --output-dir: {error}")
    comparisons = [Comparison(name, _task(name, options), options) for name in options.datasets]
    for comparison in comparisons:
        try:
            images = len(_data(comparison.task).train)
            if images < BATCH:
                raise ValueError(f"{comparison.name} has {images} images to train on, a batch has {BATCH}")
            comparison.left(rows)
        except ValueError as error:
            about_images = "images to train on" in str(error)
            flag = "--train-images" if about_images else _FOLDERS.get(comparison.name, "--datasets")
            parser.error(f"argument {flag}: {error}")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            _all(pool, teacher, [(c.task, c.scratch) for c in comparisons if c.left(rows)])
            for comparison in comparisons:
                comparison.run(pool, path)
        costs = options.output_dir / cost.CSV
        for name in {c.name for c in comparisons} - {row["dataset"] for row in cost.read(costs)}:
            print(f"{name}: timing a step of each method", flush=True)
            cost.append(costs, cost.measure(name, _task(name, options)))
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        print(f"\nstopped: the same command goes on; finished students: {path}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"failed: {error}; finished students: {path}", file=sys.stderr)
        return 1
    print(f"{path}: {len(results.read(path))} students; python -m benchmarks.methods.page writes the page")
    return 0


@dataclass(frozen=True)
class Job:
    """One student to train."""

    name: str
    task: Task
    scratch: Path
    method: str
    phase: str
    trial: int
    seed: int
    settings: dict[str, float]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.method, self.phase, self.trial, self.seed


class Comparison:
    """One dataset's part of it."""

    def __init__(self, name: str, task: Task, options: argparse.Namespace) -> None:
        self.name, self.task, self.scratch, self.trials = name, task, options.scratch, options.trials
        self.methods = [method for method in METHODS if not options.methods or method in options.methods]

    def run(self, pool: ProcessPoolExecutor, path: Path) -> None:
        """Trials, then the students of the chosen ones."""
        if not self.left(results.read(path)):
            return
        _, accuracy = teacher(self.task, self.scratch)
        others = {row["teacher"] for row in self._mine(results.read(path))} - {f"{accuracy:.6f}"}
        if others:
            raise ValueError(
                f"{path} has students of {self.name} with a teacher of accuracy {', '.join(others)}, this one has "
                f"{accuracy:.6f}: take another --output-dir, or the settings of then"
            )
        # The test images' students are known once all trials are there.
        for _ in (TRIAL, TEST):
            jobs = self.left(results.read(path))
            seeds = sorted({job.seed for job in jobs})
            _all(pool, bank_file, [(self.task, self.scratch, seed) for seed in seeds])
            for row in _each(pool, student, jobs):
                results.append(path, row)
                judged = (
                    f"test {float(row['test']):.2%}" if row["test"] else f"validation {float(row['validation']):.2%}"
                )
                print(f"{self.name}: {row['method']}, {row['settings']}, seed {row['seed']}: {judged}", flush=True)
        for seed in (TUNING_SEED, *range(self.task.seeds)):
            bank_path(self.task, self.scratch, seed).unlink(missing_ok=True)

    def left(self, rows: Iterable[Row]) -> list[Job]:
        """The trials that the rows have not; of a method whose trials are all there, the test students likewise.

        Raises:
            ValueError: the rows are of other trials than these.
        """
        mine = self._mine(rows)
        done = {(row["method"], row["phase"], int(row["trial"]), int(row["seed"])): row for row in mine}
        jobs: list[Job] = []
        for method in self.methods:
            tried = METHODS[method].trials(self.trials)
            make = [(TRIAL, trial, TUNING_SEED) for trial in range(self.trials)]
            if all((method, *key) in done for key in make):
                best = choose(row for row in mine if row["method"] == method)
                make += [(TEST, best, seed) for seed in range(self.task.seeds)]
            for phase, trial, seed in make:
                job = Job(self.name, self.task, self.scratch, method, phase, trial, seed, tried[trial])
                if job.key not in done:
                    jobs.append(job)
                elif done[job.key]["settings"] != written(job.settings):
                    raise ValueError(
                        f"trial {trial} of {method} on {self.name} was {done[job.key]['settings']} and is "
                        f"{written(job.settings)}: take another --output-dir"
                    )
        # By seed, so that the processes read one bank at a time.
        return sorted(jobs, key=lambda job: (job.phase == TEST, job.seed))

    def _mine(self, rows: Iterable[Row]) -> list[Row]:
        return [row for row in rows if row["dataset"] == self.name]


def choose(rows: Iterable[Row]) -> int:
    """The trial with the best validation accuracy; among equals, the lowest cross-entropy there."""
    trials = [row for row in rows if row["phase"] == TRIAL]
    return int(max(trials, key=lambda row: (float(row["validation"]), -float(row["validation_ce"])))["trial"])


def written(settings: dict[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in settings.items())


# ---- in the processes ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _data(task: Task):
    from vrm_distill.data import open_dataset

    return open_dataset(task.source, train_images=task.train_images)


@lru_cache(maxsize=1)
def teacher(task: Task, scratch: Path):
    """``(teacher, its accuracy on the test images)``: trained on both views, or from an earlier call."""
    from benchmarks.methods import bank
    from benchmarks.methods.student import judge, new_model, train
    from vrm_distill.checkpoint import load_checkpoint, save_checkpoint

    data = _data(task)
    made_by = f"{task.teacher}, {task.teacher_epochs} epochs, {len(data.train)} images, torch {torch.__version__}"
    path = scratch / f"teacher-{_digest(task.source, made_by)}.safetensors"
    if path.exists():
        model, metadata = load_checkpoint(path)
        return model, float(metadata["test_accuracy"])
    model = new_model(task.teacher, data, TEACHER_SEED)
    batches = bank.make(data, TEACHER_SEED, task.teacher_epochs, None, views=2)
    train(model, batches, METHODS["ce"], {"lr": TEACHER_LR})
    accuracy, _ = judge(model, data.test, data)
    keys = {"model": task.teacher, "in_channels": data.in_channels, "classes": data.classes}
    save_checkpoint(path, model, {**keys, "made_by": made_by, "test_accuracy": accuracy})
    return model, accuracy


def bank_path(task: Task, scratch: Path, seed: int) -> Path:
    """Where the bank of a seed is; its name says what it depends on."""
    model, _ = teacher(task, scratch)
    weights = hashlib.sha256(b"".join(x.numpy().tobytes() for x in model.state_dict().values())).hexdigest()
    parts = (task.source, task.epochs, len(_data(task).train), weights, torch.__version__)
    return scratch / f"bank-{_digest(*parts)}-{seed}.pt"


def bank_file(task: Task, scratch: Path, seed: int) -> None:
    """Make the bank of a seed, if it is not there."""
    from benchmarks.methods import bank

    path = bank_path(task, scratch, seed)
    if not path.exists():
        bank.make(_data(task), seed, task.epochs, teacher(task, scratch)[0]).save(path)


@lru_cache(maxsize=1)
def _bank(path: Path):
    from benchmarks.methods.bank import Bank

    return Bank.load(path)


def student(job: Job) -> Row:
    """Train and judge one student: its row. One that diverged has the accuracy of a guess, and is never chosen."""
    import vrm_kernels
    from benchmarks.methods.student import judge, new_model, train

    data = _data(job.task)
    bank = _bank(bank_path(job.task, job.scratch, job.seed))
    model = new_model(job.task.student, data, job.seed)
    started = time.perf_counter()
    finite = train(model, bank, METHODS[job.method], job.settings)
    seconds = time.perf_counter() - started
    guess = 1 / data.classes, float("inf")
    accuracy, cross_entropy = judge(model, data.validation, data) if finite else guess
    test = ""
    if job.phase == TEST:
        test = f"{(judge(model, data.test, data) if finite else guess)[0]:.6f}"
    return {
        "dataset": job.name,
        "phase": job.phase,
        "method": job.method,
        "trial": str(job.trial),
        "seed": str(job.seed),
        "settings": written(job.settings),
        "validation": f"{accuracy:.6f}",
        "validation_ce": f"{cross_entropy:.6f}",
        "test": test,
        "teacher": f"{teacher(job.task, job.scratch)[1]:.6f}",
        "seconds": f"{seconds:.1f}",
        "vrm_kernels": vrm_kernels.__version__,
        "torch": torch.__version__,
    }


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _each(pool: ProcessPoolExecutor, work, jobs: Iterable):
    """Results as they come; after a fault what was not begun is left."""
    futures = [pool.submit(work, job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _all(pool: ProcessPoolExecutor, work, arguments: Iterable[tuple]) -> None:
    for _ in _each(pool, _apply, [(work, x) for x in arguments]):
        pass


def _apply(call) -> None:
    work, arguments = call
    work(*arguments)


# ---- the command line ------------------------------------------------------------------------------------------------


def _task(name: str, options: argparse.Namespace) -> Task:
    """The task with what the command line says instead."""
    task = TASKS[name]
    folder = getattr(options, name) if name in _FOLDERS else None
    told = {key: getattr(options, key) for key in ("epochs", "teacher_epochs", "train_images", "seeds")}
    told["source"] = folder and f"{task.source.partition(':')[0]}:{folder}"
    return replace(task, **{key: value for key, value in told.items() if value})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods.train", description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", choices=TASKS, default=["digits"])
    count = {"type": command.integer(1), "metavar": "N"}
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"only these of {', '.join(METHODS)}"
    )
    parser.add_argument("--fashion", metavar="FOLDER", help="Fashion-MNIST's IDX files, if not where Debian has them")
    parser.add_argument("--omniglot", metavar="FOLDER", help="Omniglot's two small background archives")
    parser.add_argument("--trials", **count, default=10, help="of each method, on validation images (default: 10)")
    parser.add_argument("--seeds", **count, help="students of each method on test images, instead of the dataset's own")
    parser.add_argument("--epochs", **count, help="likewise")
    parser.add_argument("--teacher-epochs", **count, help="likewise")
    parser.add_argument("--train-images", **count, help="likewise")
    parser.add_argument("--processes", **count, default=2, help="of one thread each, a student each (default: 2)")
    parser.add_argument("--output-dir", type=Path, metavar="FOLDER", default=RESULTS)
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", default=SCRATCH, help="for teachers and batches")
    return parser


if __name__ == "__main__":
    sys.exit(main())
