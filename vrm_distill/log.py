"""What a run says while it runs: a CSV, a bar, and TensorBoard if asked; all by the first process alone."""

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vrm_distill.checkpoint import write_atomically
from vrm_kernels.functional import TERM_NAMES

FIELDS = (
    *("run", "method", "seed", "epoch", "train_loss", *TERM_NAMES, "kd", "loss_share", "lr"),
    *("validation_accuracy", "test_accuracy", "seconds"),
)


class Log:
    """The CSV, one row an epoch of a model, each on disk as soon as it is added.

    Args:
        path: a new file, or one to write anew from ``rows``.
        rows: of the epochs that an earlier, interrupted run finished.
        tensorboard: a folder to write TensorBoard's events to.
    """

    def __init__(self, path: Path, rows: list[dict[str, Any]] = (), tensorboard: Path | None = None) -> None:
        self.path, self.rows, self._folder = path, list(rows), tensorboard

    def __enter__(self) -> "Log":
        if self.rows:
            # An interrupted run may have logged more than its last checkpoint knows of: those epochs come again.
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(_rounded(row) for row in self.rows)
            write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))
        self._file = self.path.open("a" if self.rows else "w", newline="")
        self._writer = csv.DictWriter(self._file, FIELDS, restval="")
        if not self.rows:
            self._writer.writeheader()
            self._file.flush()
        self._events = None
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._folder))
        return self

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._writer.writerow(_rounded(row))
        self._file.flush()
        if self._events is not None:
            group = f"{row['method']}-{row['seed']}"
            for name, value in row.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{group}/{name}", value, row["epoch"])
            self._events.flush()

    def __exit__(self, *_) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
