"""``vrm-distill train``, and ``vrm-distill`` alone: the whole run, from its options to its report."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration
from torch import nn

from vrm_distill import failures, log, options, recipe, run_folder
from vrm_distill.commands.common import Trained, open_data, pick_device, read_network
from vrm_distill.data import ImageData, ShardedBatches, check_views
from vrm_distill.failures import Refused
from vrm_distill.models import check_classes, create_model
from vrm_distill.settings import Settings
from vrm_kernels import backends


def main(argv: Sequence[str]) -> int:
    """Everything that can be refused is, before anything is trained or written."""
    given = options.parse(argv)
    distributed = "LOCAL_RANK" in os.environ  # set by torchrun
    if distributed and given.output_dir is None:
        raise Refused("--output-dir", "name it under torchrun, for all processes and restarts to agree on it")
    data = open_data(given)
    device = pick_device(given)
    settings = _settings(given, data, device)
    data, teacher, settings, notes = _networks(given, settings, data)
    try:
        check_views(data, settings.augment)
    except ValueError as error:
        raise Refused("--augment", error) from error
    # torchrun starts the same command again after a fault: go on then, without being told.
    again = given.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if distributed:
        _join(device)
    accelerator = _accelerator(settings, device)
    try:
        ShardedBatches(len(data.train), settings.batch_size, 0, 0, accelerator.num_processes, settings.accumulate)
    except ValueError as error:
        raise Refused("--batch-size", error) from error
    try:
        resume = recipe.read_state(settings, data, teacher) if again else None
    except ValueError as error:
        raise Refused("--resume", error) from error
    if accelerator.is_main_process:
        try:
            if resume is None:
                run_folder.prepare_folder(settings.output_dir, recipe.OUTPUTS, given.overwrite or again)
            else:
                run_folder.hold(settings.output_dir)
        except OSError as error:
            raise Refused("--output-dir", error) from error
    console = log.console(quiet=not accelerator.is_main_process)
    accelerator.wait_for_everyone()
    console.print(data.summary)
    for note in (*data.notes, *notes):
        console.print(f"note: {note}")
    if again and resume is None:
        console.print(f"nothing to resume in {settings.output_dir}: starting")
    try:
        return _train(settings, data, console, accelerator, teacher, resume)
    finally:
        run_folder.release(settings.output_dir)


def _train(settings, data, console, accelerator, teacher, resume) -> int:
    where = settings.output_dir
    try:
        teacher = None if teacher is None else teacher.to(accelerator.device)
        result = recipe.run(settings, data, console, accelerator, teacher, resume)
        if result is not None:
            from vrm_distill import report

            report.write(settings, data, result)
            report.tell(console, settings, result)
        return 0
    except KeyboardInterrupt:
        state = where / recipe.STATE
        on = f"--resume goes on from {state}"
        on = on if state.exists() else "nothing was saved yet that --resume could go on from"
        print(f"\nvrm-distill: stopped; {on}; finished epochs: {where / recipe.LOG}", file=sys.stderr)
        return 130
    except Exception as error:
        kept = "" if isinstance(error, (recipe.Diverged, OSError)) else failures.write_traceback(error, where)
        words = failures.explain(error, where)
        print(f"\nvrm-distill: failed: {words}\nFinished epochs: {where / recipe.LOG}{kept}", file=sys.stderr)
        return 1
    finally:
        accelerator.end_training()


def _settings(given: Namespace, data: ImageData, device: torch.device) -> Settings:
    """The settings of the options, of which each alone is good: here they are looked at together."""
    where = given.output_dir or Path("runs") / f"{data.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = replace(options.settings_of(given), output_dir=where, device=str(device))
    settings = replace(settings, baselines=tuple(x for x in settings.baselines if x != "none"))
    if settings.precision == "fp16" and device.type == "cpu":
        raise Refused("--precision", "fp16 needs a GPU to pay: use bf16 or no on the CPU")
    try:
        backends.resolve(settings.backend, device)
    except (ValueError, RuntimeError) as error:
        raise Refused("--backend", error) from error
    if settings.schedule == "step" and not settings.milestones:
        raise Refused("--milestones", "name the epochs of --schedule step")
    try:
        log.check_trackers(settings.track)
    except ValueError as error:
        raise Refused("--track", error) from error
    return settings


def _networks(
    given: Namespace, settings: Settings, data: ImageData
) -> tuple[ImageData, nn.Module | None, Settings, list[str]]:
    """The data normalised as the teacher wants; the teacher if it comes trained; the settings with its name; notes.

    Raises:
        Refused: a network that does not fit the images, in training or in evaluation.
    """
    shape = (data.in_channels, data.size, data.classes)
    trained, teacher, blamed = None, None, "--teacher"
    try:
        if settings.teacher_checkpoint is not None:
            blamed = "--teacher-checkpoint"
            named = settings.teacher if "--teacher" in given.given else None
            trained = read_network(settings.teacher_checkpoint, named, "--teacher", data)
            teacher, settings = trained.model, replace(settings, teacher=trained.name)
        elif settings.teacher_pretrained:
            teacher = create_model(settings.teacher, data.in_channels, data.classes, pretrained=True)
        probe = teacher or create_model(settings.teacher, data.in_channels, data.classes)
        check_classes("teacher", settings.teacher, probe, *shape, training=teacher is None)
        blamed = "--student"
        student = create_model(settings.student, data.in_channels, data.classes)
        check_classes("student", settings.student, student, *shape)
        blamed = "--mean/--std"
        mean, std = settings.mean, settings.std
        if teacher is not None and mean is None and std is None:
            mean, std = _statistics(trained, teacher)
        return data.with_statistics(mean, std), teacher, settings, trained.notes if trained else []
    except Refused:
        raise
    except Exception as error:  # a factory of the user's may raise anything
        raise Refused(blamed, failures.explain(error)) from error


def _statistics(trained: Trained | None, teacher: nn.Module):
    """What the teacher was trained to see: its checkpoint's, or timm's configuration's."""
    expected = getattr(teacher, "pretrained_cfg", None) or {}
    return tuple((trained.numbers(key) if trained else None) or expected.get(key) for key in ("mean", "std"))


def _accelerator(settings: Settings, device: torch.device) -> Accelerator:
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=settings.precision,
        log_with=list(settings.track) or None,
        project_config=ProjectConfiguration(logging_dir=str(settings.output_dir / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=settings.find_unused_parameters)],
    )
    torch.set_num_threads(settings.threads)
    return accelerator


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
