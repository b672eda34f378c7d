"""``vrm-distill``: distil a student with Virtual Relation Matching, and train the same student without a teacher."""

import argparse
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vrm_kernels import backends
from vrm_kernels.distill.data import DATASETS
from vrm_kernels.distill.models import MODELS

# The modules of the extra "distill", and what pip calls them.
_EXTRA = {
    "kornia": "kornia",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status (2: an option is refused, 1: the run failed, 130: Ctrl-C)."""
    parser = _parser()
    options = parser.parse_args(argv)
    if missing := [package for module, package in _EXTRA.items() if importlib.util.find_spec(module) is None]:
        parser.error(f"{', '.join(missing)} not installed: pip install 'vrm_kernels[distill]'")
    try:
        return _run(parser, options)
    except KeyboardInterrupt:
        print("\nvrm-distill: stopped before anything was written", file=sys.stderr)
        return 130


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    # Imported only now: these need the extra, and a second or two.
    from rich.console import Console

    from vrm_kernels.distill import recipe, report

    if options.batch_size > options.train_images:
        parser.error(
            f"argument --batch-size: {options.batch_size} is larger than the {options.train_images} training images: "
            f"no batch would be full"
        )
    try:
        backends.resolve(options.backend, options.device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"argument --backend: {error}")
    torch.set_num_threads(options.threads)
    try:
        data = DATASETS[options.dataset](options.train_images)
    except ValueError as error:
        parser.error(f"argument --train-images: {error}")
    if options.output_dir is None:
        options.output_dir = Path("runs") / f"{options.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        _prepare(options.output_dir, recipe.OUTPUTS, options.overwrite)
    except OSError as error:
        parser.error(f"argument --output-dir: {error}")

    fields = recipe.Settings.__dataclass_fields__
    settings = recipe.Settings(**{name: getattr(options, name) for name in fields})
    output = settings.output_dir
    console = Console(highlight=False)
    log = output / recipe.LOG
    try:
        result = recipe.run(settings, data, console)
        report.plot_curves(output / recipe.CURVES, settings, result)
        report.write_summary(output / recipe.SUMMARY, settings, result)
    except KeyboardInterrupt:
        print(f"\nvrm-distill: stopped; every epoch finished so far is in {log}", file=sys.stderr)
        return 130
    except (recipe.NonFiniteLoss, OSError) as error:
        print(f"\nvrm-distill: failed: {error}\nEvery epoch finished so far is in {log}", file=sys.stderr)
        return 1

    console.print()
    console.print(report.table(settings, result))
    for sentence in report.sentences(settings, result):
        console.print("\n" + sentence)
    console.print(f"\nTrained in {result.training_seconds:.0f} s. Written to {output}/:", soft_wrap=True)
    for name, what in (
        (recipe.CURVES, "the training curves"),
        (recipe.LOG, "every epoch of every model"),
        (recipe.STUDENT_CHECKPOINT, f"the distilled student best on the validation images, seed {result.best_seed}"),
        (recipe.TEACHER_CHECKPOINT, "the teacher"),
        (recipe.SUMMARY, "this table"),
    ):
        console.print(f"  {name:<20} {what}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vrm-distill",
        description="Train a teacher, then for each seed a small student three times: alone on the real view, alone on "
        "both views, and distilled with Virtual Relation Matching. Ends with a table, curves, a log and checkpoints.",
    )

    def add(flag: str, help: str, default, **kind) -> None:
        parser.add_argument(flag, help=f"{help} (default: %(default)s)", default=default, **kind)

    add("--dataset", "images to learn", "digits", choices=DATASETS)
    add("--train-images", "how many of its images to train on", 900, type=_integer(1), metavar="N")
    networks = {"choices": MODELS, "metavar": "NETWORK"}
    add("--teacher", f"named after its layers' channels, one of {', '.join(MODELS)}", "conv_32_64_128", **networks)
    add("--student", "one of the same", "conv_4_8_8", **networks)
    add("--teacher-epochs", "the teacher's passes over the training images", 40, type=_integer(1), metavar="N")
    add("--epochs", "a student's passes over the training images", 30, type=_integer(1), metavar="N")
    add("--batch-size", "images a batch, each in two views", 64, type=_integer(2), metavar="N")
    add("--teacher-lr", "the teacher's first learning rate", 0.005, type=_number(0, exclusive=True), metavar="LR")
    add("--lr", "a student's first learning rate", 0.01, type=_number(0, exclusive=True), metavar="LR")
    add("--alpha", "weight of the inter-sample relations", 4.0, type=_number(0))
    add("--beta", "weight of the inter-class relations", 2.0, type=_number(0))
    add("--percentile", "how many of the edges to keep, in percent", 30.0, type=_number(0, 100), metavar="P")
    add("--backend", "what computes the loss", "auto", choices=("auto", *backends.REGISTRY))
    add("--seeds", "how many students of each kind to train", 10, type=_integer(1), metavar="N")
    add("--seed", "the first seed; the others follow it", 0, type=_integer(0), metavar="N")
    add("--device", "where to train, for instance cpu or cuda:0", "cpu", type=_device)
    add("--threads", "CPU threads; networks this small gain from no more", 1, type=_integer(1), metavar="N")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help="where to write, a new or empty folder (default: runs/DATASET-DATE-TIME)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output-dir")
    return parser


def _integer(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return parse


def _number(low: float, high: float = math.inf, *, exclusive: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        # Written so that NaN fails.
        if not (low <= value <= high) or math.isinf(value) or (exclusive and value == low):
            above = f"{'>' if exclusive else '>='} {low:g} and finite"
            wanted = above if high == math.inf else f"in [{low:g}, {high:g}]"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no device is called {text!r}: for instance cpu, cuda or cuda:1") from None
    if device.type == "meta":
        raise argparse.ArgumentTypeError("the device 'meta' holds no values to train on")
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # what an absent device raises depends on the device and on how torch was built
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason}): use cpu") from None
    return device


def _prepare(folder: Path, outputs: Sequence[str], overwrite: bool) -> None:
    """Make ``folder``, and make sure that it can be written and holds no earlier run.

    Raises:
        OSError: saying what is in the way and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is a file: name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise OSError(f"{folder} is not empty: name another folder, or add --overwrite to replace the run in it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in outputs:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): name a folder that can be written") from error


if __name__ == "__main__":
    sys.exit(main())
