"""What the tests of the recipe share: a run of a second or two, and reading what it wrote."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# A test module that imports this one needs the extra "distill", and is skipped without it.
for _module in ("accelerate", "datasets", "kornia", "matplotlib", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(_module)

QUICK = ["--train-images=128", "--batch-size=32", "--teacher=conv_8_16_16", "--teacher-epochs=3", "--epochs=4"]
QUICK += ["--lr=0.03", "--alpha=2", "--beta=1", "--device=cpu", "--seeds=2", "--seed=5"]
# Added where a test looks at neither learning nor schedules.
SHORT = ["--epochs=2", "--teacher-epochs=2"]
COMMAND = [sys.executable, "-m", "vrm_distill.cli"]


def train(*arguments) -> int:
    """The command in this process, without its report, which takes longer than so small a training."""
    from vrm_distill import cli, recipe, report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "time_loss", lambda *_: 1e-4)
        patch.setattr(recipe._Run, "_only_for_the_report", lambda *_: None)
        patch.setattr(report, "write", lambda *_: None)
        return cli.main([*map(str, arguments)])


def plain_head(in_channels, num_classes):
    from vrm_distill import create_model

    return create_model("conv_4_8_8", in_channels, num_classes)


def zero_head(in_channels, num_classes):
    """Starts as torchvision's vision transformers do: all logits equal."""
    model = plain_head(in_channels, num_classes)
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return model


def start(*arguments, launcher=COMMAND, **options) -> subprocess.Popen:
    """The command in a process of its own, one thread, its words captured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen, timeout: float = 400) -> str:
    """What a process said, which must have ended well."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def comparable(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without what differs from one run to the next: its name and its times."""
    return [{key: x for key, x in row.items() if key not in ("run", "seconds", "loss_share")} for row in rows]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same tensors bit for bit."""
    from safetensors.torch import load_file

    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(
        x.dtype == second[name].dtype and x.numpy().tobytes() == second[name].numpy().tobytes()
        for name, x in first.items()
    )


# ---- networks of one's own, by name: --student=distill_helpers:... ---------------------------------------------------


def lazy_linear(num_classes: int, in_channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def without_batch_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))


def idle_parameter(num_classes: int) -> nn.Module:
    """Has a layer that it does not use."""
    model = without_batch_norm(num_classes)
    model[2].idle = nn.Linear(3, 3)
    return model


def mortal(num_classes: int) -> nn.Module:
    """Kills its process in the sixth step, if that is the second one of a run whose folder MORTAL_RUN names, and only
    once: that folder is then copied to one whose name ends in ``-then``."""
    model, steps = idle_parameter(num_classes), 0

    def count(model: nn.Module, _) -> None:
        nonlocal steps
        steps += model.training and torch.is_grad_enabled()
        run = os.environ.get("MORTAL_RUN")
        if steps == 6 and run and os.environ.get("RANK") == "1" and not Path(f"{run}-then").exists():
            shutil.copytree(run, f"{run}-then", ignore=shutil.ignore_patterns(".*"))
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(count)
    return model
