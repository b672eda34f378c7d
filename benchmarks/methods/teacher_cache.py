"""What ``--teacher-cache`` saves: ``python -m benchmarks.methods.teacher_cache --datasets digits fashion``.

The parts of a distillation step of ``vrm-distill``, processor time in one thread: the views, the teacher's pass, the
reading of its logits instead, and the student's step. They take turns, so that a busy machine is busy for all.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import environment
from benchmarks.methods.methods import TASKS
from vrm_distill.settings import Settings

TEACHER, STUDENT = "conv_32_64_128", "conv_4_8_8"
RESULTS = environment.RESULTS / "teacher-cache.csv"
FIELDS = ("images", "teacher", "student", "views_ms", "teacher_ms", "read_ms", "student_ms", "without_ms", "with_ms",
          "teacher_share", *("cpu", "torch", "package", "commit", "date"))  # fmt: skip
WARM_UP, REPEATS = 5, 40


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods.teacher_cache", description=__doc__)
    parser.add_argument("--datasets", nargs="+", choices=("digits", "fashion"), default=["digits"])
    parser.add_argument("--output", type=Path, metavar="FILE", default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    described = environment.describe()
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for name in options.datasets:
            row = measure(TASKS[name].source)
            writer.writerow({**described, **row})
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return 0


def measure(source: str, repeats: int = REPEATS) -> dict[str, str]:
    """Median milliseconds of each part of a step, batches of 64 with the recipe's defaults."""
    from accelerate import Accelerator

    from vrm_distill.cache import open_cache, teacher_views
    from vrm_distill.data import open_dataset
    from vrm_distill.engine import loss_of_logits
    from vrm_distill.models import create_model, parameter_count
    from vrm_distill.recipe import make_loss
    from vrm_distill.trainer import Trainer
    from vrm_kernels.data import both_views

    data = open_dataset(source)
    teacher, student = (create_model(name, data.in_channels, data.classes) for name in (TEACHER, STUDENT))
    teacher.eval()
    times: dict[str, list[float]] = {}

    def timed(part: str, call: Callable):
        start = time.process_time()
        result = call()
        times.setdefault(part, []).append(1e3 * (time.process_time() - start))
        return result

    with tempfile.TemporaryDirectory() as folder:
        settings = replace(Settings(), epochs=1 + (WARM_UP + repeats) // 14, teacher_cache=Path(folder) / "cache")
        accelerator = Accelerator(cpu=True)
        cache = open_cache(settings, data, teacher, accelerator, seed=0)
        loss_fn = make_loss(settings)
        trainer = Trainer(accelerator, student, data, settings, None, epochs=settings.epochs, lr=settings.lr, seed=0)
        batches = (batch for epoch in range(settings.epochs) for batch in trainer.replay(epoch))

        def step(real, virtual, teacher_logits, labels) -> None:
            loss, _ = loss_of_logits(both_views(student, real, virtual), teacher_logits, labels, loss_fn)
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        for _ in range(WARM_UP + repeats):
            place, real, virtual, labels = timed("views", lambda: next(batches))
            timed("teacher", lambda: teacher_views(teacher, place, real, virtual, None))  # noqa: B023 (called at once)
            teacher_views(teacher, place, real, virtual, cache)
            said = timed("read", lambda: teacher_views(teacher, place, real, virtual, cache))  # noqa: B023
            timed("student", lambda: step(real, virtual, said, labels))  # noqa: B023
        trainer.close()
    views, asked, read, own = (
        statistics.median(times[part][WARM_UP:]) for part in ("views", "teacher", "read", "student")
    )
    sizes = [f"{parameter_count(model)} parameters" for model in (teacher, student)]
    numbers = {"views_ms": views, "teacher_ms": asked, "read_ms": read, "student_ms": own,
               "without_ms": views + asked + own, "with_ms": views + read + own}  # fmt: skip
    return {
        "images": f"{data.size[0]}x{data.size[1]}",
        "teacher": sizes[0],
        "student": sizes[1],
        **{name: f"{value:.3f}" for name, value in numbers.items()},
        "teacher_share": f"{asked / numbers['without_ms']:.3f}",
    }


if __name__ == "__main__":
    sys.exit(main())
