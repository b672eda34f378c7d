"""What a run says while it runs: a CSV, a bar, a console, and trackers if asked; all by the first process alone."""

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vrm_distill.checkpoint import write_atomically
from vrm_distill.settings import Settings
from vrm_kernels.functional import TERM_NAMES

FIELDS = (
    *("run", "method", "seed", "epoch", "train_loss", *TERM_NAMES, "kd", "grad_norm", "clipped", "loss_share", "lr"),
    *("validation_accuracy", "test_accuracy", "seconds"),
)


class Log:
    """The CSV, one row an epoch of a model, each on disk as soon as it is added.

    Args:
        path: a new file, or one to write anew from ``rows``.
        rows: of the epochs that an earlier, interrupted run finished.
        trackers: accelerate's, to send the rows to, too.
    """

    def __init__(self, path: Path, rows: Sequence[dict[str, Any]] = (), trackers: Sequence = ()) -> None:
        self.path, self.rows, self._trackers = path, list(rows), trackers

    def __enter__(self) -> "Log":
        if self.rows:
            # An interrupted run may have logged more than its last checkpoint knows of: those epochs come again.
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(_rounded(row) for row in self.rows)
            write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))
        self._file = self.path.open("a" if self.rows else "w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, FIELDS, restval="")
        if not self.rows:
            self._writer.writeheader()
            self._file.flush()
        return self

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._writer.writerow(_rounded(row))
        self._file.flush()
        group = f"{row['method']}-{row['seed']}"
        values = {f"{group}/{name}": value for name, value in row.items() if isinstance(value, float)}
        for tracker in self._trackers:
            # Weights & Biases has one count of steps for all curves, which must not fall with the next model.
            tracker.log(values, **({} if tracker.name == "wandb" else {"step": row["epoch"]}))

    def __exit__(self, *_) -> None:
        self._file.close()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: naming them.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")


def start_trackers(accelerator: Accelerator, settings: Settings) -> list:
    """accelerate's trackers of ``settings.track``, told the settings.

    TensorBoard's events and MLflow's artifacts go to the run's folder; where Weights & Biases and MLflow keep their
    records is for their own environment variables to say.
    """
    folder = settings.output_dir
    # Trackers accept only numbers and text as settings.
    config = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in settings.plain().items()
    }
    names = {"wandb": {"name": folder.name, "dir": str(folder)}, "mlflow": {"run_name": folder.name}}
    options = {name: names[name] for name in settings.track if name in names}
    accelerator.init_trackers("vrm-distill", config=config, init_kwargs=options)
    return accelerator.trackers


def console(*, file=None, quiet: bool = False, width: int | None = None) -> Console:
    """A console that prints what it is given: names from outside hold no markup and no emoji, and lines are not cut."""
    return Console(file=file, quiet=quiet, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
