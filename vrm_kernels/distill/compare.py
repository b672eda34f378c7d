"""``make compare``: cross-entropy, KD, DKD, DIST, RKD and relation matching with its ablations, on the same terms.

Every student of a seed has the same first weights, order of samples, augmentations, schedule and teacher; only the
loss differs. A row of the CSV is one student, written when it is finished: run the command again and it goes on where
it was.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vrm_kernels import VRMLoss
from vrm_kernels.distill import losses
from vrm_kernels.distill.settings import Settings

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


@dataclass(frozen=True)
class Task:
    """A dataset with the models, the length and the weights of relation matching that suit it."""

    source: str
    teacher: str
    student: str
    epochs: int
    teacher_epochs: int
    train_images: int | None = None
    alpha: float = 4.0
    beta: float = 2.0


TASKS = {
    "digits": Task("digits", "conv_32_64_128", "conv_4_8_8", epochs=30, teacher_epochs=40),
    "fashion": Task(
        "idx:/usr/share/datasets/fashion-mnist", "conv_32_64_128", "conv_8_16_16", epochs=10, teacher_epochs=10,
        train_images=20000,
    ),
    "omniglot": Task("omniglot:omniglot", "conv_32_64_128", "conv_16_32_64", epochs=40, teacher_epochs=60),
}  # fmt: skip

# A loss of a task; None trains on cross-entropy alone. The settings are those published for CIFAR-100: KD's (0.1 CE,
# 0.9 KD, temperature 4) and RKD's (25 and 50) from CRD's comparison (arXiv 1910.10699), DKD's and DIST's from
# their own papers.
Maker = Callable[[Task], nn.Module | None]


def _vrm(**settings) -> Maker:
    def make(task: Task) -> VRMLoss:
        weights = {"alpha": task.alpha, "beta": task.beta, **settings}
        return VRMLoss(**weights)

    return make


METHODS: dict[str, Maker] = {
    "ce": lambda task: None,
    "kd": lambda task: losses.PerView(losses.kd, weight=0.9, ce_weight=0.1),
    "dkd": lambda task: losses.PerView(losses.dkd),
    "dist": lambda task: losses.PerView(losses.dist),
    "rkd": lambda task: losses.PerView(losses.rkd),
    "vrm": _vrm(),
}
ABLATIONS: dict[str, Maker] = {
    "vrm percentile 10": _vrm(unreliable_pruning_percentile=10),
    "vrm percentile 60": _vrm(unreliable_pruning_percentile=60),
    "vrm no pruning": _vrm(unreliable_pruning_percentile=100),
    "vrm no virtual view": _vrm(),  # the virtual view is then the real one, see _data
    "vrm inter-sample only": _vrm(beta=0.0),
    "vrm inter-class only": _vrm(alpha=0.0),
    "vrm complete": _vrm(relations="complete"),
    # Relations within quarters of the batch, as four processes without --gather-distributed would have them.
    "vrm local batch": lambda task: partial(_in_parts, loss_fn=_vrm()(task), parts=4),
}
BATCH_SIZES = (16, 32, 128, 256)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what of the comparison is not in the CSV yet."""
    options = _parser().parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "compare.csv"
    for name in options.datasets:
        task = TASKS[name]
        task = replace(task, source=_source(name, task, options), epochs=options.epochs or task.epochs)
        task = replace(task, teacher_epochs=options.teacher_epochs or task.teacher_epochs)
        task = replace(task, train_images=options.train_images or task.train_images)
        done = {(row["dataset"], row["method"], int(row["seed"]), int(row["batch_size"])) for row in read(path)}
        todo = [run for run in _runs(name, options) if (name, *run) not in done]
        if todo:
            _Comparison(name, task, options).run(todo, path)
    plot(read(path), options.output_dir / "compare.png")
    (options.output_dir / "compare.md").write_text(table(read(path)))
    print((options.output_dir / "compare.md").read_text())
    return 0


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a comparison, none if there is no such file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: last and best test accuracy by dataset, method and batch size: mean and deviation over the seeds."""
    groups: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["method"], row["batch_size"]), []).append(row)
    lines = ["| dataset | method | batch | seeds | last epoch | best epoch |", "|---|---|---:|---:|---:|---:|"]
    for (dataset, method, batch), group in groups.items():
        cells = [_spread([100 * float(row[key]) for row in group]) for key in ("last", "best")]
        lines.append(f"| {dataset} | {method} | {batch} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Accuracy after the last epoch, a panel a dataset, a dot a seed, methods in rows."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure(figsize=(5.5 * len(datasets), 6), layout="constrained", dpi=130)
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        mine = [row for row in rows if row["dataset"] == dataset]
        labels = list(dict.fromkeys(f"{row['method']} ({row['batch_size']})" for row in mine))
        for row in mine:
            y = -labels.index(f"{row['method']} ({row['batch_size']})")
            axes.plot(100 * float(row["last"]), y, "o", color="#0072B2", alpha=0.6)
        axes.set(title=dataset, xlabel="test accuracy after the last epoch (%)", yticks=range(0, -len(labels), -1))
        axes.set_yticklabels(labels)
        axes.grid(alpha=0.25)
    figure.savefig(path)


class _Comparison:
    def __init__(self, name: str, task: Task, options: argparse.Namespace) -> None:
        from accelerate import Accelerator

        from vrm_kernels.distill.data import open_dataset

        self.name, self.task, self.folder = name, task, options.output_dir
        self.data = open_dataset(task.source, train_images=task.train_images)
        self.accelerator = Accelerator(cpu=options.device == "cpu")
        torch.set_num_threads(options.threads)
        self.settings = Settings(
            batch_size=options.batch_size, lr=options.lr, seeds=options.seeds, checkpoint_steps=10**9
        )

    def run(self, todo: list[tuple[str, int, int]], path: Path) -> None:
        teacher, accuracy = self._teacher()
        for method, seed, batch in todo:
            started = time.perf_counter()
            accuracies = self._student(method, seed, batch, teacher)
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
            _append(path, row)
            print(f"{self.name}: {method}, batch {batch}, seed {seed}: {accuracies[-1]:.2%}", flush=True)

    def _teacher(self) -> tuple[nn.Module, float]:
        """The teacher of this dataset, from an earlier call if it was trained on the same."""
        from vrm_kernels.distill.checkpoint import load_checkpoint, save_checkpoint

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
        from vrm_kernels.distill.data import plain_loader
        from vrm_kernels.distill.engine import count_correct, cross_entropy_loss, distillation_loss
        from vrm_kernels.distill.trainer import Trainer

        loss_fn = {**METHODS, **ABLATIONS}[method](self.task)
        same_view = method == "vrm no virtual view"

        def objective(model, real, virtual, labels, _):
            if loss_fn is None:
                return cross_entropy_loss(model, real, virtual, labels, "both")
            virtual = real if same_view else virtual
            return distillation_loss(teacher, model, real, virtual, labels, loss_fn)

        settings = replace(self.settings, batch_size=min(batch, len(self.data.train)))
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
        from vrm_kernels.distill.models import create_model

        torch.manual_seed(seed)
        return create_model(name, self.data.in_channels, self.data.classes).to(self.accelerator.device)


def _in_parts(*tensors, loss_fn: nn.Module, parts: int) -> torch.Tensor:
    """The mean over ``parts`` of the batch, each taken for a batch of its own."""
    return sum(loss_fn(*chunk) for chunk in zip(*(x.chunk(parts) for x in tensors), strict=True)) / parts


def _runs(name: str, options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """``(method, seed, batch size)``: methods everywhere, the ablations and the batch sizes where asked for."""
    methods = [*METHODS, *(ABLATIONS if name in options.ablate else ())]
    methods = [method for method in methods if not options.methods or method in options.methods]
    runs = [(method, seed, options.batch_size) for method in methods for seed in range(options.seeds)]
    if name in options.ablate:
        sizes = [size for size in BATCH_SIZES if size != options.batch_size]
        compared = [method for method in ("ce", "kd", "vrm") if method in methods]
        runs += [(method, seed, size) for size in sizes for method in compared for seed in range(options.seeds)]
    return runs


def _source(name: str, task: Task, options: argparse.Namespace) -> str:
    folder = {"fashion": options.fashion, "omniglot": options.omniglot}.get(name)
    return task.source if folder is None else f"{task.source.partition(':')[0]}:{folder}"


def _append(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _versions() -> dict[str, str]:
    import vrm_kernels

    return {"vrm_kernels": vrm_kernels.__version__, "torch": torch.__version__}


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} %"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vrm_kernels.distill.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", choices=TASKS, default=["digits"])
    parser.add_argument("--ablate", nargs="*", choices=TASKS, default=["digits"], help="where to run VRM's ablations")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *ABLATIONS), help="only these")
    parser.add_argument("--fashion", metavar="FOLDER", help="Fashion-MNIST's IDX files, if not where Debian has them")
    parser.add_argument("--omniglot", metavar="FOLDER", help="Omniglot's two small background archives")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, help="instead of the dataset's own")
    parser.add_argument("--teacher-epochs", type=int, help="likewise")
    parser.add_argument("--train-images", type=int, help="likewise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results/compare"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
