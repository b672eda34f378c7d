"""The results file: tidy CSV, one row per peer, size, mode, inputs, threads and dtype."""

import csv
from collections.abc import Iterable
from pathlib import Path

KEY = ("peer", "batch", "classes", "mode", "inputs", "dtype", "threads")
STATUSES = ("ok", "out of memory", "too slow", "unavailable", "wrong", "failed")
MEASURED = (
    "status",  # one of STATUSES
    "note",  # why, where it is not ok
    "verified_against",  # the oracle, its dtype, and the samples if not all
    "loss_error",  # of the relation terms, relative to their value
    "grad_error",  # of both gradients, relative to the norm of the relation terms' gradient
    "time_ms",  # median of `repeats` calls
    "time_p20_ms",
    "time_p80_ms",
    "repeats",  # 1: so slow that the first call is the measurement
    "first_call_ms",  # with compilation where there is one
    "gemm_unit_ms",  # torch.mm [B,C]x[C,B] and [C,B]x[B,C] of that dtype into preallocated outputs, same process
    "gemm_drift",  # unit after / unit before: far from 1, the machine was not quiet
    "gemm_units",  # time_ms / gemm_unit_ms
    "peak_mb",  # MiB resident at the peak of a warm call, above the inputs and what was loaded before the first
    "gradients_mb",  # MiB of the two student gradients, which peak_mb contains
    "logits_mb",  # MiB of the four logit matrices, which it does not
)
SETTINGS = ("alpha", "beta", "percentile", "relations")
ENVIRONMENT = (
    "cpu",
    "cores",
    "isa",
    "memory_gb",
    "system",
    "python",
    "torch",
    "compiler",
    "package",
    "extension",
    "commit",
    "dirty",
    "date",
)
COLUMNS = (*KEY, *MEASURED, *SETTINGS, *ENVIRONMENT)
# Of a GPU's results, which have all the columns above too.
GPU_MEASURED = ("replay_ms", "replay_units", "replay_note")  # replays of a CUDA graph, where it can be captured
GPU_ENVIRONMENT = ("gpu", "capability", "gpu_memory_gb", "cuda", "driver", "triton")
GPU_COLUMNS = (*COLUMNS, *GPU_MEASURED, *GPU_ENVIRONMENT)
_INTEGERS = {"batch", "classes", "threads", "repeats"}
_FLOATS = {name for name in MEASURED if name.endswith(("_ms", "_mb", "_error"))} | {
    "gemm_units",
    "gemm_drift",
    "replay_ms",
    "replay_units",
    "alpha",
    "beta",
    "percentile",
}

Row = dict[str, str | int | float | None]


def append(path: Path, rows: Iterable[Row], columns: tuple[str, ...] = COLUMNS) -> None:
    """Add ``rows``, with the header if the file is new: an interrupted run keeps what it measured."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _written(row.get(name)) for name in columns} for row in rows)


def read(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[Row]:
    """The rows, numbers as numbers and empty cells as ``None``.

    Raises:
        ValueError: the file lacks a column, naming it.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is not a benchmark result: it lacks the columns {', '.join(missing)}")
        return [{name: _parsed(name, row[name]) for name in columns} for row in reader]


def newest(folder: Path, pattern: str = "cpu-*.csv") -> Path:
    """The file whose measurements are the latest, by the date written in it (a checkout forgets a file's own).

    Raises:
        FileNotFoundError: there is none.
    """
    dated = [(max(row["date"] or "" for row in rows), path) for path in folder.glob(pattern) if (rows := read(path))]
    if not dated:
        raise FileNotFoundError(f"no {pattern} in {folder}: run 'make bench', or 'python -m benchmarks.cpu.run'")
    return max(dated)[1]


def key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def _written(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parsed(name: str, text: str):
    if not text:
        return None
    return int(text) if name in _INTEGERS else float(text) if name in _FLOATS else text
