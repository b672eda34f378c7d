"""What a step of each method takes: processor time, in one thread.

The methods take turns, so that a machine that is busy for a while is busy for all of them.
"""

import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.methods.methods import BATCH, METHODS, Task
from benchmarks.methods.results import Row

CSV = "cost.csv"
FIELDS = ("dataset", "what", "ms", "repeats", "torch")
WARM_UP, REPEATS = 3, 30


def read(path: Path) -> list[Row]:
    """The rows, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[Row]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def measure(name: str, task: Task, repeats: int = REPEATS) -> list[Row]:
    """Median milliseconds of a batch: its two views, the teacher's pass over them, and a step of each method's student.

    The student's step is forward, loss, backward and the optimiser, with the published settings.
    """
    from benchmarks.methods import bank
    from benchmarks.methods.losses import outputs
    from benchmarks.methods.student import Training, new_model
    from vrm_distill.data import Views, open_dataset

    torch.set_num_threads(1)
    data = open_dataset(task.source, train_images=task.train_images)
    teacher, draw = new_model(task.teacher, data, 0).eval(), Views(data)
    images, _ = data.train[torch.arange(BATCH)]
    batches = bank.make(data, 0, 1, teacher)

    @torch.no_grad()
    def judge() -> None:
        outputs(teacher, torch.cat(draw(images)))

    def steps(method: str) -> Iterator[None]:
        settings = METHODS[method].trials(1)[0]
        training = Training(new_model(task.student, data, 0), METHODS[method], settings)
        while True:
            yield training.step(*batches.batch(0, 0, METHODS[method].views))

    work: dict[str, Callable[[], object]] = {"two views": lambda: draw(images), "two views and teacher": judge}
    work |= {method: steps(method).__next__ for method in METHODS}
    times: dict[str, list[float]] = {what: [] for what in work}
    for repeat in range(WARM_UP + repeats):
        for what, call in work.items():
            start = time.process_time()
            call()
            if repeat >= WARM_UP:
                times[what].append(1e3 * (time.process_time() - start))
    return [
        {"dataset": name, "what": what, "ms": f"{statistics.median(taken):.3f}", "repeats": str(repeats),
         "torch": torch.__version__}
        for what, taken in times.items()
    ]  # fmt: skip
