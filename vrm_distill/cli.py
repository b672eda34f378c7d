"""``vrm-distill``: distil a student with Virtual Relation Matching, and train the same student without a teacher."""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vrm_distill import options as command
from vrm_distill.data import HOW_TO_INSTALL
from vrm_distill.settings import Settings
from vrm_kernels import backends

# The modules of the extra "distill", and what pip calls them.
_EXTRA = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "kornia": "kornia",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status (2: an option is refused, 1: the run failed, 130: Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    if missing := missing_packages():
        argparse.ArgumentParser(prog="vrm-distill").error(missing)
    parser, options = command.parse(argv)
    try:
        return _evaluate(parser, options) if options.evaluate else _run(parser, options)
    except KeyboardInterrupt:
        print("\nvrm-distill: stopped before anything was written", file=sys.stderr)
        return 130


def missing_packages() -> str | None:
    """What to say if a package of the extra is not installed."""
    missing = [package for module, package in _EXTRA.items() if importlib.util.find_spec(module) is None]
    return f"{', '.join(missing)} not installed: {HOW_TO_INSTALL}" if missing else None


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    # Imported only now: these need the extra, and a second or two.
    from accelerate import Accelerator
    from rich.console import Console

    from vrm_distill import recipe, relations, report

    distributed = "LOCAL_RANK" in os.environ  # set by torchrun
    if distributed and options.output_dir is None:
        parser.error("argument --output-dir: name it under torchrun, for all processes and restarts to agree on it")
    data = _open(parser, options)
    folder = options.output_dir or Path("runs") / f"{data.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    device = _pick_device(parser, options)
    settings = replace(command.settings_of(options), output_dir=folder, device=str(device))
    settings = replace(settings, baselines=tuple(x for x in settings.baselines if x != "none"))
    try:
        backends.resolve(settings.backend, device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"argument --backend: {error}")
    if settings.schedule == "step" and not settings.milestones:
        parser.error("argument --milestones: name the epochs of --schedule step")
    data, teacher = _teacher(parser, options, settings, data)
    # torchrun starts the same command again after a fault: go on then, without being told.
    again = options.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    try:
        resume = recipe.read_state(settings) if again else None
    except ValueError as error:
        parser.error(f"argument --resume: {error}")

    if distributed:
        _join(device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=settings.precision)
    torch.set_num_threads(settings.threads)
    try:
        _check_batch(settings, data, accelerator.num_processes)
    except ValueError as error:
        parser.error(f"argument --batch-size: {error}")
    if accelerator.is_main_process and resume is None:
        try:
            command.prepare_folder(folder, recipe.OUTPUTS, options.overwrite or again)
        except OSError as error:
            parser.error(f"argument --output-dir: {error}")
    console = Console(highlight=False, quiet=not accelerator.is_main_process)
    accelerator.wait_for_everyone()
    console.print(data.summary, soft_wrap=True, markup=False)
    for note in data.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if again and resume is None:
        console.print(f"nothing to resume in {folder}: starting", soft_wrap=True)
    try:
        teacher = None if teacher is None else teacher.to(accelerator.device)
        result = recipe.run(settings, data, console, accelerator, teacher, resume)
        if result is not None:
            report.plot_curves(folder / recipe.CURVES, settings, result)
            relations.plot(folder / recipe.RELATIONS, settings, result.relations)
            report.write_summary(folder / recipe.SUMMARY, settings, result)
    except KeyboardInterrupt:
        state = folder / recipe.STATE
        on = (
            f"--resume goes on from {state}"
            if state.exists()
            else "nothing was saved yet that --resume could go on from"
        )
        print(f"\nvrm-distill: stopped; {on}; finished epochs: {folder / recipe.LOG}", file=sys.stderr)
        return 130
    except (recipe.Diverged, OSError, ValueError) as error:
        print(f"\nvrm-distill: failed: {error}\nFinished epochs: {folder / recipe.LOG}", file=sys.stderr)
        return 1
    finally:
        accelerator.end_training()
    if result is not None:
        _tell(console, settings, result)
    return 0


def _tell(console, settings: Settings, result) -> None:
    from vrm_distill import recipe, report

    console.print()
    console.print(report.table(settings, result))
    for sentence in report.sentences(settings, result):
        console.print("\n" + sentence)
    console.print(f"\nTrained in {result.training_seconds:.0f} s. Written to {settings.output_dir}/:", soft_wrap=True)
    for name, what in (
        (recipe.CURVES, "the training curves"),
        (recipe.RELATIONS, "the relations of teacher and student, before and after"),
        (recipe.LOG, "every epoch of every model"),
        (
            recipe.STUDENT_CHECKPOINT,
            f"the distilled student after its last epoch, of seed {result.best_seed}"
            + (", the best seed on the validation images" if settings.seeds > 1 else ""),
        ),
        (recipe.TEACHER_CHECKPOINT, "the teacher"),
        (recipe.SUMMARY, "this table"),
        (recipe.CONFIG, "the settings, for --config"),
    ):
        if (settings.output_dir / name).exists():
            console.print(f"  {name:<20} {what}", soft_wrap=True)


def _open(parser: argparse.ArgumentParser, options: argparse.Namespace):
    from vrm_distill.data import open_dataset

    try:
        return open_dataset(
            options.dataset,
            train_images=options.train_images,
            image_size=options.image_size,
            data_dir=options.data_dir,
        )
    except ValueError as error:
        blamed = "--train-images" if "images to train on" in str(error) else "--dataset"
        parser.error(f"argument {blamed}: {error}")


def _pick_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    if options.device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
    else:
        device = torch.device(options.device)
    if options.precision == "fp16" and device.type == "cpu":
        parser.error("argument --precision: fp16 needs a GPU to pay: use bf16 or no on the CPU")
    if device.index is not None and "LOCAL_RANK" not in os.environ:
        torch.accelerator.set_device_index(device.index)
    return device


def _teacher(parser: argparse.ArgumentParser, options: argparse.Namespace, settings: Settings, data):
    """The data normalised as the teacher wants, and the teacher if it comes trained; refuses models that do not fit."""
    from vrm_distill import checkpoint
    from vrm_distill.models import check_classes, create_model

    teacher, metadata, blamed = None, {}, "--teacher"
    try:
        if settings.teacher_checkpoint is not None:
            blamed = "--teacher-checkpoint"
            state, metadata = checkpoint.read_weights(settings.teacher_checkpoint)
            if "--teacher" not in options.given and checkpoint.is_known(metadata.get("model", "")):
                raise ValueError(f"the file is of {metadata['model']}: add --teacher {metadata['model']}")
            classes = int(metadata.get("classes", data.classes))
            checkpoint.check_finite(state, settings.teacher_checkpoint)
            teacher = create_model(settings.teacher, data.in_channels, classes)
            checkpoint.load_weights(teacher, state, settings.teacher_checkpoint)
        elif settings.teacher_pretrained:
            teacher = create_model(settings.teacher, data.in_channels, data.classes, pretrained=True)
        probe = teacher or create_model(settings.teacher, data.in_channels, data.classes)
        check_classes("teacher", settings.teacher, probe, data.in_channels, data.size, data.classes)
        blamed = "--student"
        student = create_model(settings.student, data.in_channels, data.classes)
        check_classes("student", settings.student, student, data.in_channels, data.size, data.classes)
        blamed = "--mean/--std"
        mean, std = settings.mean, settings.std
        if teacher is not None and mean is None and std is None:
            expected = getattr(teacher, "pretrained_cfg", None) or {}
            mean = [float(x) for x in metadata.get("mean", "").split()] or expected.get("mean")
            std = [float(x) for x in metadata.get("std", "").split()] or expected.get("std")
        return data.with_statistics(mean, std), teacher
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"argument {blamed}: {error}")


def _join(device: torch.device) -> None:
    """Start the process group under a name of its own for each of torchrun's attempts.

    torchrun keeps one store for all of them: a process that is back first would read there the address of one that is
    gone.
    """
    from torch.distributed import PrefixStore, init_process_group
    from torch.distributed.rendezvous import rendezvous

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, world = next(rendezvous("env://"))
    backend = torch.distributed.get_default_backend_for_device(device)
    both = backend if device.type == "cpu" else f"{device.type}:{backend},cpu:gloo"
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    init_process_group(both, store=PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=world)


def _check_batch(settings: Settings, data, processes: int) -> None:
    from vrm_distill.data import ShardedBatches

    ShardedBatches(len(data.train), settings.batch_size, settings.seed, 0, processes, settings.accumulate)


def _evaluate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from vrm_distill import checkpoint
    from vrm_distill.data import plain_loader, takes_image_size
    from vrm_distill.engine import count_correct
    from vrm_distill.models import check_classes, create_model

    try:
        state, metadata = checkpoint.read_weights(options.evaluate)
        named = metadata.get("model", "")
        # The file may name a model of this package, timm or torchvision, but no other code: that --student names.
        if "--student" not in options.given and not checkpoint.is_known(named):
            says = f"is of {named}: add --student {named}" if named else "names no network: add --student NETWORK"
            raise ValueError(f"{options.evaluate} {says}")
    except (OSError, ValueError) as error:
        parser.error(f"argument --evaluate: {error}")
    trained = [int(x) for x in metadata.get("size", "").split()]
    if options.image_size is None and len(set(trained)) == 1 and takes_image_size(options.dataset):
        options.image_size = trained[0]
    data = _open(parser, options)
    try:
        name = options.student if "--student" in options.given else named
        model = create_model(name, data.in_channels, int(metadata.get("classes", data.classes)))
        checkpoint.load_weights(model, state, options.evaluate)
        check_classes("checkpoint's", name, model, data.in_channels, data.size, data.classes)
        mean, std = (
            getattr(options, key) or [float(x) for x in metadata.get(key, "").split()] for key in ("mean", "std")
        )
        data = data.with_statistics(mean, std)
    except (OSError, ValueError) as error:
        parser.error(f"argument --evaluate: {error}")
    for note in data.notes:
        print(f"note: {note}")
    if trained and trained != list(data.size):
        height, width = data.size
        print(f"note: trained on images of {trained[0]}x{trained[1]}, judged on {height}x{width}")
    torch.set_num_threads(options.threads)
    device = _pick_device(parser, options)
    loader = plain_loader(data.test, workers=options.workers)
    correct, seen = count_correct(model.to(device), loader, device, data.normalized)
    print(f"{options.evaluate}: {int(correct)} of {seen} test images of {data.name} ({int(correct) / seen:.2%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
