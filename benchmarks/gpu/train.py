"""Some steps of a real recipe on the GPU: ``python -m benchmarks.gpu.train FILE``.

vrm_distill's own networks and loss, in each way that people train: bfloat16 autocast, float16 with a GradScaler, the
whole step in a CUDA graph, a process group, torch.compile, and the command ``vrm-distill``. The losses of the first
steps are compared with those of the same steps on the CPU; a step is timed with and without the relations.
"""

import argparse
import contextlib
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vrm_distill.engine import cross_entropy_loss, distillation_loss
from vrm_distill.models import create_model
from vrm_kernels import VRMLoss, backends

COLUMNS = ("variant", "backend", "status", "loss_error", "step_ms", "alone_ms", "note")
STEPS = 6  # compared
TIMED = 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """What is trained on; the same numbers wherever it runs."""

    teacher: str = "resnet32x4"
    student: str = "resnet8x4"
    batch: int = 64
    classes: int = 100
    size: int = 32


@dataclass(frozen=True)
class Variant:
    """``tolerance`` is of the losses. An untrained student's entropies are nearly equal, so that which edges are kept
    is decided by rounding: even in float32 another device's loss is near, not the same."""

    name: str
    precision: str = "no"
    graph: bool = False
    gather: bool = False
    compiled: bool = False
    tolerance: float = 0.02


# In this order: what is asked for most first, and what compiles for long last.
VARIANTS = (
    Variant("float32"),
    Variant("bf16 autocast", "bf16", tolerance=0.05),
    Variant("fp16, GradScaler", "fp16", tolerance=0.05),
    Variant("CUDA graph of the whole step", graph=True),
    Variant("process group of one, gather_distributed", gather=True),
    Variant("student under torch.compile", compiled=True),
)


class Training:
    """A teacher, a student, one batch, and a step; ``backend`` ``None`` trains without the relations."""

    def __init__(self, recipe: Recipe, variant: Variant, backend: str | None, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (recipe.batch, 3, recipe.size, recipe.size)
        self.batch = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
        self.labels = torch.randint(recipe.classes, (recipe.batch,), generator=generator).to(device)
        torch.manual_seed(0)
        self.teacher, self.student = (
            create_model(name, 3, recipe.classes).to(device) for name in (recipe.teacher, recipe.student)
        )
        self.teacher.eval()
        self.forward: nn.Module = torch.compile(self.student) if variant.compiled else self.student
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device, enabled=variant.precision == "fp16")
        self.loss_fn = (
            None if backend is None else VRMLoss(16.0, 8.0, backend=backend, gather_distributed=variant.gather)
        )
        self.variant, self.device = variant, device

    def step(self) -> Tensor:
        dtype = DTYPES.get(self.variant.precision)
        self.optimizer.zero_grad()
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            if self.loss_fn is None:
                loss, _ = cross_entropy_loss(self.forward, *self.batch, self.labels, "both")
            else:
                loss, _ = distillation_loss(self.teacher, self.forward, *self.batch, self.labels, self.loss_fn)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def captured(training: Training) -> Callable[[], Tensor]:
    """A step as the replay of one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.step()

    def replay() -> Tensor:
        graph.replay()
        return loss.clone()

    return replay


def run(training: Training, steps: int, timed: int) -> tuple[list[float], float]:
    """The losses of the first steps, and the milliseconds of a later one."""
    on_gpu = training.device == "cuda"
    step, losses = training.step, []
    side = torch.cuda.Stream() if training.variant.graph and on_gpu else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
        losses += [step() for _ in range(steps // 2)]
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
        step = captured(training)
    losses += [step() for _ in range(steps - steps // 2)]
    took = []
    for _ in range(timed):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - start))
    return [float(x) for x in losses], statistics.median(took) if took else 0.0


@contextlib.contextmanager
def group_of_one(device: str):
    """A process group of this process alone."""
    library = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(library, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(recipe: Recipe, variant: Variant, backend: str, device: str, expected: list[float], timed: int) -> dict:
    """One row of the table."""
    row = {"variant": variant.name, "backend": backend}
    try:
        with group_of_one(device) if variant.gather else contextlib.nullcontext():
            losses, step_ms = run(Training(recipe, variant, backend, device), len(expected), timed)
        error = max(abs(x - y) / y for x, y in zip(losses, expected, strict=True))
        status = "ok" if error <= variant.tolerance else "wrong"
        _, alone_ms = run(Training(recipe, variant, None, device), 4, timed)
        return row | {"status": status, "loss_error": error, "step_ms": step_ms, "alone_ms": alone_ms}
    except Exception as error:  # the other variants are to be tried
        return row | {"status": "failed", "note": f"{type(error).__name__}: " + " ".join(str(error).split())[:300]}


def command(device: str, words: tuple[str, ...] = ()) -> dict:
    """``vrm-distill`` on the digits, a few epochs, on both devices: the student's last loss."""
    row = {"variant": "vrm-distill", "backend": "auto"}
    quick = ["--teacher=conv_8_16_16", "--teacher-epochs=2", "--epochs=2", "--train-images=128", "--batch-size=32"]
    quick += ["--baselines=none", "--seeds=1"]
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cpu", device):
            output = Path(folder, f"run-{len(losses)}")
            line = [sys.executable, "-m", "vrm_distill", *quick, *words, "--device", name, "--output-dir", str(output)]
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                missing = "No module named" in done.stderr or "pip install" in done.stderr
                last = (done.stderr.strip().splitlines() or [""])[-1]
                return row | {"status": "not run" if missing else "failed", "note": last[:300]}
            with (output / "log.csv").open(newline="") as file:
                losses.append([float(x["train_loss"]) for x in csv.DictReader(file)][-1])
    error = abs(losses[1] - losses[0]) / losses[0]
    return row | {
        "status": "ok" if error < 0.2 else "wrong",
        "loss_error": error,
    }  # each device draws its augmentations


def rows(recipe: Recipe, device: str, budget: float, timed: int) -> Iterator[dict]:
    """Every variant with what "auto" takes; then the other backends, in bfloat16. Budget in seconds."""
    deadline = time.monotonic() + budget
    expected = {  # of either half precision bfloat16: a CPU is slow in float16
        precision: run(Training(recipe, Variant("", precision), "torch", "cpu"), STEPS, 0)[0]
        for precision in ("no", "bf16")
    }
    auto = backends.resolve("auto", torch.device(device))
    others = [name for name in backends.AUTO[device] if name != auto and backends.REGISTRY[name].status()[0]]
    short = [variant for variant in VARIANTS if not variant.compiled]
    jobs = [(variant, auto) for variant in short] + [(VARIANTS[1], name) for name in others]
    jobs += [(variant, auto) for variant in VARIANTS if variant.compiled]
    for variant, backend in jobs:
        if variant.graph and device != "cuda":
            continue
        if time.monotonic() > deadline:
            yield {"variant": variant.name, "backend": backend, "status": "not run", "note": "out of time"}
        else:
            yield measure(
                recipe, variant, backend, device, expected["no" if variant.precision == "no" else "bf16"], timed
            )
    if time.monotonic() < deadline:
        yield command(device)


def main(words: list[str] | None = None, device: str = "cuda", recipe: Recipe = Recipe()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.train", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds (default: 120)")
    args = parser.parse_args(words)
    failed = False
    with args.file.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows(recipe, device, args.budget, TIMED):
            row = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(row)
            file.flush()
            print(*row.values(), sep="  ", flush=True)
            failed |= row["status"] in ("wrong", "failed")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
