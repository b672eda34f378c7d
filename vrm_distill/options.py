"""The options of ``vrm-distill``: what each takes, and how YAML and the command line go together."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vrm_distill.data import AUGMENTATIONS, SOURCES
from vrm_distill.failures import Refused
from vrm_distill.models import MODELS, check_name
from vrm_distill.models.ensemble import JOINT
from vrm_distill.settings import BASELINES, CACHE_DTYPES, OPTIMIZERS, PRECISIONS, SCHEDULES, TRACKERS, Settings
from vrm_kernels import backends, checks

_PRESETS = Path(__file__).parent / "presets"


def presets() -> list[str]:
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


# Options are used in float32 and in 32 bits: no number may overflow there.
_LARGEST = torch.finfo(torch.float32).max
_LARGEST_INTEGER = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """A parser that raises :class:`Refused` instead of printing its forty lines of usage."""

    def error(self, message: str) -> None:
        raise Refused(None, message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line: its own, over those of ``--config``, of ``--preset``, and the defaults.

    A YAML file's entries are put before the command line as options, so that one set of checks serves both.
    """
    files = Parser(add_help=False, allow_abbrev=False)
    files.add_argument("--preset", choices=presets(), help="settings that come with the package")
    files.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of options, named as here without --")
    chosen, _ = files.parse_known_args(argv)
    parser = _parser(files)
    paths = [_PRESETS / f"{chosen.preset}.yaml"] if chosen.preset else []
    paths += [chosen.config] if chosen.config else []
    arguments = [argument for path in paths for argument in _from_yaml(parser, path)]
    options = parser.parse_args([*arguments, *argv])
    options.given = {argument.partition("=")[0] for argument in (*arguments, *argv) if argument.startswith("--")}
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    values = {name: getattr(options, name) for name in Settings.__dataclass_fields__}
    if isinstance(options.teacher, list):
        values["teacher"] = JOINT.join(options.teacher)
    return Settings(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})


def _from_yaml(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise Refused("--config", f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise Refused("--config", f"{path} must hold 'option: value' lines")
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    arguments = []
    for key, value in content.items():
        flag = f"--{str(key).replace('_', '-')}"
        if flag not in known or flag in ("--config", "--preset", "--help"):
            raise Refused("--config", f"{path} has {key!r}, which is no option (see --help)")
        if value is None:
            continue
        single = not isinstance(value, (list, dict))
        if isinstance(value, dict) or not (single or known[flag].nargs == "+"):
            raise Refused(
                "--config", f"{path}: {key} takes {'values' if known[flag].nargs else 'one value'}, got {value!r}"
            )
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
    parser = Parser(
        prog="vrm-distill",
        description="Train a teacher, or take a trained one; then for each seed a small student alone on the real "
        "view, alone on both views, and distilled with Virtual Relation Matching. Ends with a table, curves, a report, "
        "a log and checkpoints. Runs as it is under torchrun. Other commands: vrm-distill eval --help, vrm-distill "
        "export --help; vrm-distill cache, with these options, fills --teacher-cache; vrm-distill train is this one.",
        epilog="Start: vrm-distill (a minute and a half, no download); vrm-distill --dataset folder:PATH --image-size "
        "224 --teacher timm:resnet34 --teacher-checkpoint FILE --student timm:resnet18 --baselines none --seeds 1.",
        parents=[files],
        allow_abbrev=False,
    )
    network = {"type": _network, "metavar": "NETWORK"}
    positive = {"type": number(0, exclusive=True)}
    count = {"type": integer(1), "metavar": "N"}

    add_data(parser)
    add = _group(parser, "views")
    add(
        "--augment",
        "the real view's, by default after the images' channels and size; the virtual view adds RandAugment",
        choices=AUGMENTATIONS,
    )
    add(
        "--view-epochs",
        "so many epochs of views, the same for every seed, again and again: --teacher-cache is then no larger",
        type=integer(1),
        metavar="N",
    )

    add = _group(parser, "models")
    add(
        "--teacher",
        f"{', '.join(MODELS)}; timm:NAME; torchvision:NAME; package.module:factory; of several, each with its "
        f"checkpoint, the mean of the logits teaches",
        type=_networks,
        metavar="NETWORK",
        nargs="+",
    )
    add(
        "--teacher-checkpoint",
        "a trained teacher's weights: .safetensors, or a PyTorch state dict; of several teachers, one for each",
        type=Path,
        metavar="FILE",
        nargs="+",
    )
    add("--teacher-pretrained", "take the weights that timm or torchvision offer for the teacher")
    add("--teacher-cache", "keep the teacher's logits there, and read those that are", type=Path, metavar="FOLDER")
    add("--teacher-cache-dtype", "as these: float16 rounds what the student sees", choices=CACHE_DTYPES)
    add("--student", "as --teacher", **network)
    add("--baselines", "students to train without the teacher", nargs="+", choices=(*BASELINES, "none"))

    add = _group(parser, "training")
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
    add(
        "--clip-grad",
        "scale gradients down to this norm times the sum of the loss's weights (alpha, beta and 1 for each view's "
        "cross-entropy), which usual training stays far below; 0 is off",
        type=number(0),
        metavar="NORM",
    )
    add("--find-unused-parameters", "under torchrun: for a network that does not use all its parameters in a step")

    add = _group(parser, "relation matching")
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

    add = _group(parser, "run")
    add("--seeds", "how many students of each kind to train", **count)
    add("--seed", "the first seed; the others follow it", type=integer(0), metavar="N")
    add_machine(parser)
    add(
        "--checkpoint-steps",
        "save what --resume goes on from every N steps, and at an epoch's end if that was 20 s ago",
        **count,
    )
    add("--track", "log to these, too", nargs="+", choices=TRACKERS)
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
    return parser


def _group(parser: argparse.ArgumentParser, title: str) -> Callable[..., None]:
    """Adds options to a group of ``parser``; an option's default is that of the setting of its name."""
    section = parser.add_argument_group(title)

    def add(flag: str, help: str, **kind) -> None:
        default = Settings.__dataclass_fields__[flag[2:].replace("-", "_")].default
        if isinstance(default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        shown = "" if default in (None, False, ()) else " (default: %(default)s)"
        section.add_argument(flag, help=help + shown, default=default, **kind)

    return add


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, and what network it is of."""
    parser.add_argument("checkpoint", type=Path, metavar="FILE", help="student.safetensors of a run, for instance")
    parser.add_argument(
        "--network", type=_network, metavar="NETWORK", help="what it is of, where the file does not say: as --student"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that say which images, and how they are read."""
    add = _group(parser, "data")
    add("--dataset", f"{'; '.join(f'{name}: {what}' for name, what in SOURCES.items())}", type=str, metavar="SOURCE")
    add("--data-dir", "where torchvision's datasets are", type=Path, metavar="FOLDER")
    add(
        "--train-images",
        "how many of its images to train on, instead of all (digits: 900)",
        type=integer(1),
        metavar="N",
    )
    add("--image-size", "make all images of folder:, parquet: and hub: N x N", type=integer(8, 2**14), metavar="N")
    add(
        "--mean",
        "what normalises the images; by default the teacher's own, or else the data's",
        type=number(),
        nargs="+",
    )
    add("--std", "likewise", type=number(0, exclusive=True), nargs="+")
    add("--skip-broken", "leave out images that cannot be decoded, and say how many; decodes all of them first")
    add("--workers", "processes that decode images", type=integer(0, 1024), metavar="N")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options that say where to compute."""
    add = _group(parser, "machine")
    add("--device", "where to train: auto takes a GPU if there is one; or for instance cpu or cuda:0", type=_device)
    add(
        "--threads",
        "CPU threads: raise it for large networks on a CPU; those as small as the default's gain from no more",
        # More threads than CPUs only wait for each other, and thousands of them end the process.
        type=integer(1, 4 * (os.cpu_count() or 1)),
        metavar="N",
    )


def integer(low: int, high: int = _LARGEST_INTEGER) -> Callable[[str], int]:
    """A whole number in ``[low, high]``, for argparse."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, got {value}")
        return value

    return parse


def number(low: float = -_LARGEST, high: float = _LARGEST, *, exclusive: bool = False) -> Callable[[str], float]:
    """A number in ``[low, high]``, without ``low`` if ``exclusive``, for argparse."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        # Written so that NaN fails.
        if not (low <= value <= high) or (exclusive and value == low):
            above = f"{'>' if exclusive else '>='} {low:g} and finite in float32"
            wanted = above if high == _LARGEST else f"in [{low:g}, {high:g}]"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


def _network(text: str) -> str:
    try:
        check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _networks(text: str) -> str:
    """One network, or several joined as ``config.yaml`` has them."""
    return JOINT.join(map(_network, text.split(JOINT)))


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
