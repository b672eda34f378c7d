"""``make compare``: cross-entropy, KD, DKD, DIST, RKD and relation matching with its ablations, on the same terms.

Every student of a seed has the same first weights, order of samples, augmentations, schedule and teacher; only the
loss differs. A row of the CSV is one student, written when it is finished: run the command again and it goes on where
it was.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.methods import report as compare_report
from benchmarks.methods.methods import (
    ABLATIONS,
    BATCH_METHODS,
    BATCH_SIZES,
    LOCAL_PARTS,
    METHODS,
    NO_VIRTUAL_VIEW,
    TASKS,
    Task,
)
from vrm_distill import options as command
from vrm_distill.cli import missing_packages
from vrm_distill.settings import Settings

RESULTS = Path("benchmarks/results/compare")
FIELDS = (
    "dataset",
    "method",
    "seed",
    "batch_size",
    "epochs",
    "last",
    "best",
    "teacher",
    "seconds",
    "vrm_kernels",
    "torch",
)
_NUMBERS = {name: int for name in ("seed", "batch_size", "epochs")}
_NUMBERS |= {name: float for name in ("last", "best", "teacher", "seconds")}
CSV = "compare.csv"
_FOLDERS = {"fashion": "--fashion", "omniglot": "--omniglot"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what of the comparison is not in the CSV yet; the exit status (1: a training diverged, 130: Ctrl-C)."""
    parser = _parser()
    options = parser.parse_args(argv)
    path = options.output_dir / CSV
    if missing := missing_packages():
        parser.error(missing)
    from vrm_distill.trainer import NonFiniteLoss

    # What can be wrong is found before anything is trained.
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output_dir):
            pass
        read(path)
    except (OSError, ValueError) as error:
        parser.error(f"argument --output-dir: {error}")
    try:
        comparisons = [(_Comparison(name, options), _todo(name, options, read(path))) for name in options.datasets]
        for comparison, todo in comparisons:
            comparison.open(todo)
    except ValueError as error:
        parser.error(str(error))
    try:
        for comparison, todo in comparisons:
            if todo:
                comparison.run(todo, path)
    except KeyboardInterrupt:
        print(f"\nstopped: the same command goes on; finished students: {path}", file=sys.stderr)
        return 130
    except (NonFiniteLoss, OSError, ValueError) as error:
        print(f"failed: {error}; finished students: {path}", file=sys.stderr)
        return 1
    rows = read(path)
    print(compare_report.render(rows))
    for picture in compare_report.draw(rows, options.output_dir):
        print(f"Written to {picture}")
    return 0


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a comparison, none if there is no such file yet, without the half row that a kill may have left.

    Raises:
        ValueError: the file is not of a comparison, naming the line.
    """
    try:
        whole = _whole(path.read_bytes()).decode()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    table = csv.reader(whole.splitlines())
    if whole and (header := next(table)) != list(FIELDS):
        raise ValueError(f"{path} is not of a comparison: its columns are {', '.join(header)}")
    rows = []
    for values in table:
        row = dict(zip(FIELDS, values, strict=False))
        try:
            if len(values) != len(FIELDS):
                raise ValueError(f"{len(values)} columns of {len(FIELDS)}")
            for name, kind in _NUMBERS.items():
                kind(row[name])
        except ValueError as error:
            raise ValueError(f"{path}, line {table.line_num}: {error}: mend or remove that line") from None
        rows.append(row)
    return rows


def append(path: Path, row: dict) -> None:
    """Add a row, on the disk before this returns; a half row left by a kill is replaced."""
    with path.open("a+b") as file:
        file.seek(0)
        length = len(_whole(file.read()))
        file.truncate(length)
        lines = [] if length else [FIELDS]
        for values in (*lines, [row[name] for name in FIELDS]):
            file.write((",".join(map(str, values)) + "\r\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _whole(content: bytes) -> bytes:
    """The finished lines: a row without its line's end was cut off."""
    return content[: content.rfind(b"\n") + 1]


class _Comparison:
    """One dataset's part of it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.task, self.options, self.folder = name, _task(name, options), options, options.output_dir
        self.settings = Settings(
            batch_size=options.batch_size, lr=options.lr, seeds=options.seeds, checkpoint_steps=10**9
        )

    def open(self, todo: list[tuple[str, int, int]]) -> None:
        """Read the images, if there is anything to do with them.

        Raises:
            ValueError: they cannot be read, or are too few for a batch.
        """
        if not todo:
            return
        from vrm_distill.data import open_dataset

        try:
            self.data = open_dataset(self.task.source, train_images=self.task.train_images)
        except ValueError as error:
            flag = "--train-images" if "images to train on" in str(error) else _FOLDERS.get(self.name, "--datasets")
            raise ValueError(f"argument {flag}: {error}") from None
        if (largest := max(batch for _, _, batch in todo)) > len(self.data.train):
            raise ValueError(
                f"argument --train-images: batches of {largest} are to be compared on {self.name}, which has "
                f"{len(self.data.train)} images to train on"
            )

    def run(self, todo: list[tuple[str, int, int]], path: Path) -> None:
        from accelerate import Accelerator

        from vrm_distill.trainer import NonFiniteLoss

        self.accelerator = Accelerator(cpu=self.options.device == "cpu")
        torch.set_num_threads(self.options.threads)
        teacher, accuracy = self._teacher()
        others = {row["teacher"] for row in read(path) if row["dataset"] == self.name} - {f"{accuracy:.6f}"}
        if others:
            raise ValueError(
                f"{path} has students of {self.name} with a teacher of accuracy {', '.join(others)}, this one has "
                f"{accuracy:.6f}: take another --output-dir, or the settings of then"
            )
        for method, seed, batch in todo:
            started = time.perf_counter()
            try:
                accuracies = self._student(method, seed, batch, teacher)
            except NonFiniteLoss as error:
                error.args = (f"{self.name}, {method}, batch {batch}, seed {seed}: {error}: try a smaller --lr",)
                raise
            row = {
                "dataset": self.name,
                "method": method,
                "seed": seed,
                "batch_size": batch,
                "epochs": self.task.epochs,
                "last": f"{accuracies[-1]:.6f}",
                "best": f"{max(accuracies):.6f}",
                "teacher": f"{accuracy:.6f}",
                "seconds": f"{time.perf_counter() - started:.1f}",
                **_versions(),
            }
            append(path, row)
            print(f"{self.name}: {method}, batch {batch}, seed {seed}: {accuracies[-1]:.2%}", flush=True)

    def _teacher(self) -> tuple[nn.Module, float]:
        """The teacher of this dataset, from an earlier call if it was trained on the same."""
        from vrm_distill.checkpoint import load_checkpoint, save_checkpoint

        path = self.folder / f"teacher-{self.name}.safetensors"
        made_by = f"{self.task.teacher}, {self.task.teacher_epochs} epochs, {len(self.data.train)} images"
        if path.exists():
            model, metadata = load_checkpoint(path)
            if metadata.get("made_by") == made_by:
                return model.to(self.accelerator.device), float(metadata["test_accuracy"])
        model = self._new(self.task.teacher, 0)
        accuracies = self._train(model, "ce", 0, self.settings.batch_size, self.task.teacher_epochs, None, 0.005)
        keys = {"model": self.task.teacher, "in_channels": self.data.in_channels, "classes": self.data.classes}
        save_checkpoint(path, model, {**keys, "made_by": made_by, "test_accuracy": accuracies[-1]})
        return model.eval(), accuracies[-1]

    def _student(self, method: str, seed: int, batch: int, teacher: nn.Module) -> list[float]:
        model = self._new(self.task.student, seed)
        return self._train(model, method, seed, batch, self.task.epochs, teacher, self.settings.lr)

    def _train(self, model, method, seed, batch, epochs, teacher, lr) -> list[float]:
        """Test accuracy after every epoch; ``model`` ends trained."""
        from benchmarks.methods.losses import OnEmbeddings
        from vrm_distill.data import plain_loader
        from vrm_distill.engine import count_correct, cross_entropy_loss, distillation_loss
        from vrm_distill.trainer import Trainer

        loss_fn = {**METHODS, **ABLATIONS}[method](self.task)
        same_view = method == NO_VIRTUAL_VIEW

        def objective(model, real, virtual, labels, _):
            if loss_fn is None:
                return cross_entropy_loss(model, real, virtual, labels, "both")
            if isinstance(loss_fn, OnEmbeddings):
                return loss_fn(teacher, model, real, virtual, labels), {}
            virtual = real if same_view else virtual
            return distillation_loss(teacher, model, real, virtual, labels, loss_fn)

        settings = replace(self.settings, batch_size=batch)
        trainer = Trainer(self.accelerator, model, self.data, settings, objective, epochs=epochs, lr=lr, seed=seed)
        accuracies = []
        while not trainer.finished:
            trainer.epoch()
            correct, seen = count_correct(
                trainer.result, plain_loader(self.data.test), self.accelerator.device, self.data.normalized
            )
            accuracies.append(correct.item() / seen)
            trainer.next_epoch()
        trainer.close()
        return accuracies

    def _new(self, name: str, seed: int) -> nn.Module:
        from vrm_distill.models import create_model

        torch.manual_seed(seed)
        return create_model(name, self.data.in_channels, self.data.classes).to(self.accelerator.device)


def _todo(name: str, options: argparse.Namespace, rows: list[dict[str, str]]) -> list[tuple[str, int, int]]:
    """What :func:`_runs` has and the rows have not.

    Raises:
        ValueError: the rows are of trainings of another length.
    """
    mine, epochs = [row for row in rows if row["dataset"] == name], _task(name, options).epochs
    if other := {row["epochs"] for row in mine} - {str(epochs)}:
        raise ValueError(
            f"argument --epochs: {options.output_dir / CSV} has students of {name} trained for {', '.join(other)} "
            f"epochs, these would be for {epochs}: take another --output-dir"
        )
    done = {(row["method"], int(row["seed"]), int(row["batch_size"])) for row in mine}
    return [run for run in _runs(name, options) if run not in done]


def _runs(name: str, options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """``(method, seed, batch size)``: methods everywhere, the ablations and the batch sizes where asked for."""
    methods = [*METHODS, *(ABLATIONS if name in options.ablate else ())]
    methods = [method for method in methods if not options.methods or method in options.methods]
    runs = [(method, seed, options.batch_size) for method in methods for seed in range(options.seeds)]
    if name in options.ablate:
        sizes = [size for size in BATCH_SIZES if size != options.batch_size]
        compared = [method for method in BATCH_METHODS if method in methods]
        runs += [(method, seed, size) for size in sizes for method in compared for seed in range(options.seeds)]
    return runs


def _task(name: str, options: argparse.Namespace) -> Task:
    """The task with what the command line says instead."""
    task = TASKS[name]
    folder = getattr(options, name, None) if name in _FOLDERS else None
    told = {key: getattr(options, key) for key in ("epochs", "teacher_epochs", "train_images")}
    told["source"] = folder and f"{task.source.partition(':')[0]}:{folder}"
    return replace(task, **{key: value for key, value in told.items() if value})


def _versions() -> dict[str, str]:
    import vrm_kernels

    return {"vrm_kernels": vrm_kernels.__version__, "torch": torch.__version__}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods.train", description=__doc__.splitlines()[0])
    every = (*METHODS, *ABLATIONS)
    parser.add_argument("--datasets", nargs="+", choices=TASKS, default=["digits"])
    parser.add_argument(
        "--ablate",
        nargs="*",
        choices=TASKS,
        default=["digits"],
        help="where to run VRM's ablations and other batch sizes, too",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=every, metavar="METHOD", help=f"only these of {', '.join(every)}"
    )
    parser.add_argument("--fashion", metavar="FOLDER", help="Fashion-MNIST's IDX files, if not where Debian has them")
    parser.add_argument("--omniglot", metavar="FOLDER", help="Omniglot's two small background archives")
    parser.add_argument("--seeds", type=command.integer(1), metavar="N", default=5, help="students of each kind")
    parser.add_argument("--batch-size", type=command.integer(LOCAL_PARTS), metavar="N", default=64)
    parser.add_argument("--lr", type=command.number(0, exclusive=True), default=0.01, help="of the students")
    parser.add_argument("--epochs", type=command.integer(1), metavar="N", help="instead of the dataset's own")
    parser.add_argument("--teacher-epochs", type=command.integer(1), metavar="N", help="likewise")
    parser.add_argument("--train-images", type=command.integer(1), metavar="N", help="likewise")
    parser.add_argument("--device", choices=("cpu", "auto"), default="cpu", help="auto takes a GPU if there is one")
    parser.add_argument("--threads", type=command.integer(1), metavar="N", default=1)
    parser.add_argument("--output-dir", type=Path, metavar="FOLDER", default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
