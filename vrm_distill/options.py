"""The options of ``vrm-distill``: what each takes, and how YAML and the command line go together."""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vrm_distill.data import AUGMENTATIONS, SOURCES
from vrm_distill.models import MODELS, check_name
from vrm_distill.settings import BASELINES, OPTIMIZERS, PRECISIONS, SCHEDULES, Settings
from vrm_kernels import backends, checks

_PRESETS = Path(__file__).parent / "presets"


def presets() -> list[str]:
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options of a command line: its own, over those of ``--config``, of ``--preset``, and the defaults.

    A YAML file's entries are put before the command line as options, so that one set of checks serves both.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--preset", choices=presets(), help="settings that come with the package")
    files.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of options, named as here without --")
    chosen, _ = files.parse_known_args(argv)
    parser = _parser(files)
    paths = [_PRESETS / f"{chosen.preset}.yaml"] if chosen.preset else []
    paths += [chosen.config] if chosen.config else []
    arguments = [argument for path in paths for argument in _from_yaml(parser, path)]
    options = parser.parse_args([*arguments, *argv])
    options.given = {argument.partition("=")[0] for argument in (*arguments, *argv) if argument.startswith("--")}
    return parser, options


def settings_of(options: argparse.Namespace) -> Settings:
    values = {name: getattr(options, name) for name in Settings.__dataclass_fields__}
    return Settings(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})


def _from_yaml(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"argument --config: {path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"argument --config: {path} must hold 'option: value' lines")
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    arguments = []
    for key, value in content.items():
        flag = f"--{str(key).replace('_', '-')}"
        if flag not in known or flag in ("--config", "--preset", "--help"):
            parser.error(f"argument --config: {path} has {key!r}, which is no option (see --help)")
        if value is None:
            continue
        if isinstance(value, bool) and f"--no-{flag[2:]}" in known:
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, bool) and known[flag].nargs == 0:  # a flag that is there or not
            arguments += [flag] if value else []
        elif value is False and "no" in (known[flag].choices or ()):  # YAML reads a bare no as False
            arguments.append(f"{flag}=no")
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)] if value else ([flag, "none"] if flag == "--baselines" else [])
        else:
            # With "=", so that a negative number is a value and not an option.
            arguments.append(f"{flag}={value}")
    return arguments


def _parser(files: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vrm-distill",
        description="Train a teacher, or take a trained one; then for each seed a small student alone on the real "
        "view, alone on both views, and distilled with Virtual Relation Matching. Ends with a table, curves, a log and "
        "checkpoints. Runs as it is under torchrun.",
        epilog="Start: vrm-distill (a minute and a half, no download); vrm-distill --dataset folder:PATH --image-size "
        "224 --teacher timm:resnet34 --teacher-checkpoint FILE --student timm:resnet18 --baselines none --seeds 1.",
        parents=[files],
        allow_abbrev=False,
    )
    fields = Settings.__dataclass_fields__

    def group(title: str) -> Callable[..., None]:
        section = parser.add_argument_group(title)

        def add(flag: str, help: str, **kind) -> None:
            default = fields[flag[2:].replace("-", "_")].default
            if isinstance(default, bool):
                kind["action"] = argparse.BooleanOptionalAction
            shown = "" if default in (None, False, ()) else " (default: %(default)s)"
            section.add_argument(flag, help=help + shown, default=default, **kind)

        return add

    network = {"type": _network, "metavar": "NETWORK"}
    positive = {"type": number(0, exclusive=True)}
    count = {"type": integer(1), "metavar": "N"}

    add = group("data")
    add("--dataset", f"{'; '.join(f'{name}: {what}' for name, what in SOURCES.items())}", type=str, metavar="SOURCE")
    add("--data-dir", "where torchvision's datasets are", type=Path, metavar="FOLDER")
    add("--train-images", "how many of its images to train on, instead of all (digits: 900)", **count)
    add("--image-size", "make all images of folder:, parquet: and hub: N x N", type=integer(8), metavar="N")
    add("--mean", "what normalises the images; by default the teacher's own, or else the data's", type=float, nargs="+")
    add("--std", "likewise", type=number(0, exclusive=True), nargs="+")
    add(
        "--augment",
        "the real view's, by default after the images' channels and size; the virtual view adds RandAugment",
        choices=AUGMENTATIONS,
    )
    add("--workers", "processes that decode images", type=integer(0), metavar="N")

    add = group("models")
    add("--teacher", f"{', '.join(MODELS)}; timm:NAME; torchvision:NAME; package.module:factory", **network)
    add(
        "--teacher-checkpoint",
        "a trained teacher's weights: .safetensors, or a PyTorch state dict",
        type=Path,
        metavar="FILE",
    )
    add("--teacher-pretrained", "take the weights that timm or torchvision offer for the teacher")
    add("--student", "as --teacher", **network)
    add("--baselines", "students to train without the teacher", nargs="+", choices=(*BASELINES, "none"))

    add = group("training")
    add("--teacher-epochs", "the teacher's passes over the training images", **count)
    add("--teacher-lr", "the teacher's first learning rate", **positive, metavar="LR")
    add("--epochs", "a student's passes over the training images", **count)
    add("--lr", "a student's first learning rate", **positive, metavar="LR")
    add("--batch-size", "images a step over all processes, each in two views", type=integer(2), metavar="N")
    add(
        "--accumulate",
        "split each process's share of a batch in N, gradients added up; relations stay within a part",
        **count,
    )
    add("--optimizer", "what takes the steps", choices=OPTIMIZERS)
    add("--momentum", "of sgd", type=number(0, 1))
    add("--weight-decay", "of either optimiser", type=number(0))
    add("--schedule", "of the learning rate", choices=SCHEDULES)
    add(
        "--milestones",
        "the epochs after which --schedule step multiplies the learning rate",
        type=integer(1),
        nargs="+",
    )
    add("--gamma", "by this", **positive)
    add("--precision", "mixed precision: bf16, or fp16 with gradient scaling", choices=PRECISIONS)
    add("--label-smoothing", "of the cross-entropies", type=number(0, 1))
    add(
        "--mixup",
        "mix images and labels with a Beta(A, A) weight, alike in both views; 0 is off",
        type=number(0),
        metavar="A",
    )
    add("--ema", "judge and keep a running mean of the weights with this decay; 0 is off", type=number(0, 1))

    add = group("relation matching")
    add("--alpha", "weight of the inter-sample relations", type=number(0))
    add("--beta", "weight of the inter-class relations", type=number(0))
    add("--relation-warmup", "epochs over which both weights grow from 0", type=number(0), metavar="EPOCHS")
    add("--percentile", "how many of the edges to keep, in percent", type=number(0, 100), metavar="P")
    add("--relations", "which edges there are", choices=checks.RELATIONS)
    add("--normalize", "zscore: relations of logits with mean 0 and deviation 1 in each image", choices=("zscore",))
    add("--virtual-views", "virtual views of an image, the loss being the mean over them", **count)
    add("--kd-weight", "weight of KD's divergence at temperature 4, added for each view", type=number(0), metavar="W")
    add("--backend", "what computes the loss", choices=("auto", *backends.REGISTRY))
    add("--gather-distributed", "under torchrun: relations of the global batch, not of each process's share")

    add = group("run")
    add("--seeds", "how many students of each kind to train", **count)
    add("--seed", "the first seed; the others follow it", type=integer(0), metavar="N")
    add("--device", "where to train: auto takes a GPU if there is one; or for instance cpu or cuda:0", type=_device)
    add(
        "--threads",
        "CPU threads: raise it for large networks on a CPU; those as small as the default's gain from no more",
        **count,
    )
    add(
        "--checkpoint-steps",
        "save what --resume goes on from every N steps, and at an epoch's end if that was 20 s ago",
        **count,
    )
    add("--tensorboard", "write TensorBoard's events, too")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help="where to write, a new or empty folder (default: runs/DATASET-DATE-TIME)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output-dir")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --output-dir, or start it if there is none",
    )
    parser.add_argument(
        "--evaluate", type=Path, metavar="FILE", help="only judge this checkpoint on the test images of --dataset"
    )
    return parser


def integer(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return parse


def number(low: float, high: float = math.inf, *, exclusive: bool = False) -> Callable[[str], float]:
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


def _network(text: str) -> str:
    try:
        check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _device(text: str) -> str:
    if text == "auto":
        return text
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
    return str(device)


def prepare_folder(folder: Path, outputs: Sequence[str], overwrite: bool) -> None:
    """Make ``folder``, and make sure that it can be written and holds no earlier run.

    Raises:
        OSError: saying what is in the way and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is a file: name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise OSError(
            f"{folder} is not empty: name another folder, add --resume to go on with the run in it, or --overwrite to "
            f"replace it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in outputs:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): name a folder that can be written") from error
