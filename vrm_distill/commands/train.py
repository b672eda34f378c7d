"""``vrm-distill train``, and ``vrm-distill`` alone: the whole run, from its options to its report."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration
from torch import nn

from vrm_distill import failures, log, options, recipe, run_folder
from vrm_distill.cache import open_cache
from vrm_distill.commands.common import Trained, open_data, pick_device, read_network
from vrm_distill.data import ImageData, ShardedBatches, check_views
from vrm_distill.failures import Refused
from vrm_distill.models import check_classes, create_model
from vrm_distill.models.ensemble import JOINT, Ensemble
from vrm_distill.settings import Settings
from vrm_kernels import backends


def main(argv: Sequence[str]) -> int:
    """Everything that can be refused is, before anything is trained or written."""
    given = options.parse(argv)
    if _distributed() and given.output_dir is None:
        raise Refused("--output-dir", "name it under torchrun, for all processes and restarts to agree on it")
    ready = prepare(given)
    settings, data, teacher, accelerator = ready[:4]
    # torchrun starts the same command again after a fault: then the run resumes without --resume.
    again = given.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
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
    for note in (*data.notes, *ready.notes):
        console.print(f"note: {note}")
    if again and resume is None:
        console.print(f"nothing to resume in {settings.output_dir}: starting")
    try:
        return _train(settings, data, console, accelerator, teacher, resume)
    finally:
        run_folder.release(settings.output_dir)


class Ready(NamedTuple):
    """What a run starts from; ``teacher`` is ``None`` if it is to be trained first."""

    settings: Settings
    data: ImageData
    teacher: nn.Module | None
    accelerator: Accelerator
    notes: list[str]


def prepare(given: Namespace) -> Ready:
    """Images, networks, processes and teacher cache of the options, each looked at together with the others.

    Raises:
        Refused: naming the option.
    """
    data = open_data(given)
    device = pick_device(given)
    settings = _settings(given, data, device)
    data, teacher, settings, notes = _networks(given, settings, data)
    try:
        check_views(data, settings.augment)
    except ValueError as error:
        raise Refused("--augment", error) from error
    if _distributed():
        _join(device)
    accelerator = _accelerator(settings, device)
    try:
        ShardedBatches(len(data.train), settings.batch_size, 0, 0, accelerator.num_processes, settings.accumulate)
    except ValueError as error:
        raise Refused("--batch-size", error) from error
    if settings.teacher_cache is not None and teacher is not None:
        try:
            for seed in settings.all_seeds:
                open_cache(settings, data, teacher, accelerator, seed)
        except (OSError, ValueError) as error:
            raise Refused("--teacher-cache", error) from error
    return Ready(settings, data, teacher, accelerator, notes)


def _distributed() -> bool:
    return "LOCAL_RANK" in os.environ  # set by torchrun


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
    if settings.teacher_cache is None and settings.teacher_cache_dtype != "float32":
        raise Refused("--teacher-cache-dtype", "is for the logits in --teacher-cache: name that folder, too")
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
    trained: list[Trained] = []
    teacher, blamed = None, "--teacher"
    try:
        names = settings.teacher.split(JOINT)
        if settings.teacher_checkpoint:
            blamed = "--teacher-checkpoint"
            trained, settings = _trained(given, settings, data)
            teacher = trained[0].model if len(trained) == 1 else Ensemble(x.model for x in trained)
        elif len(names) > 1:
            raise ValueError(f"{len(names)} teachers must come trained: name a --teacher-checkpoint for each")
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
        return data.with_statistics(mean, std), teacher, settings, [note for x in trained for note in x.notes]
    except Refused:
        raise
    except Exception as error:  # a factory of the user's may raise anything
        raise Refused(blamed, failures.explain(error)) from error


def _trained(given: Namespace, settings: Settings, data: ImageData) -> tuple[list[Trained], Settings]:
    """The teachers of ``--teacher-checkpoint``, and the settings with their names."""
    files = settings.teacher_checkpoint
    names: list[str | None] = [None] * len(files)
    if "--teacher" in given.given:
        names = settings.teacher.split(JOINT)
        if len(names) != len(files):
            raise ValueError(f"{len(names)} --teacher and {len(files)} --teacher-checkpoint: name one for each")
    trained = [read_network(path, name, "--teacher", data) for path, name in zip(files, names, strict=True)]
    return trained, replace(settings, teacher=JOINT.join(x.name for x in trained))


def _statistics(trained: list[Trained], teacher: nn.Module):
    """What the teacher was trained to see: its checkpoint's, or timm's configuration's."""
    networks = teacher.members if isinstance(teacher, Ensemble) else [teacher]
    found = []
    for number, network in enumerate(networks):
        expected = getattr(network, "pretrained_cfg", None) or {}
        known = [(trained[number].numbers(key) if trained else None) or expected.get(key) for key in ("mean", "std")]
        found.append([None if x is None else list(x) for x in known])
    if any(other != found[0] for other in found):
        raise ValueError(f"the teachers were trained on images normalised otherwise, mean and std {found}: name them")
    return found[0]


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
