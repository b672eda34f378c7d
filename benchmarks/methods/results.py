"""The comparison's CSV: a row a trained student, on the disk as soon as it is trained."""

import csv
import os
from pathlib import Path

Row = dict[str, str]
TRIAL, TEST = "trial", "test"
FIELDS = (
    "dataset",
    "phase",  # trial: judged by the validation images alone; test: of a seed, with the chosen trial's settings
    "method",
    "trial",
    "seed",
    "settings",  # the learning rate and the method's knobs, name=value
    "validation",  # accuracy on the validation images after the last epoch, in [0, 1]
    "validation_ce",  # their mean cross-entropy, nats
    "test",  # accuracy on the test images after the last epoch, in [0, 1]; empty for a trial
    "teacher",  # the teacher's
    "seconds",
    "vrm_kernels",
    "torch",
)
_NUMBERS = {"trial": int, "seed": int, "validation": float, "validation_ce": float, "teacher": float, "seconds": float}


def read(path: Path) -> list[Row]:
    """The rows of a comparison, none if there is no such file yet, without the half row that a kill may have left.

    Raises:
        ValueError: the file is not of a comparison, naming the line.
    """
    try:
        whole = _whole(path.read_bytes()).decode()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    table = csv.reader(whole.splitlines())
    if whole and (header := next(table)) != list(FIELDS):
        raise ValueError(f"{path} is not of a comparison: its columns are {', '.join(header)}")
    rows = []
    for values in table:
        row = dict(zip(FIELDS, values, strict=False))
        try:
            if len(values) != len(FIELDS):
                raise ValueError(f"{len(values)} columns of {len(FIELDS)}")
            for name, kind in _NUMBERS.items():
                kind(row[name])
            if row["phase"] == TEST:
                float(row["test"])
        except ValueError as error:
            raise ValueError(f"{path}, line {table.line_num}: {error}: mend or remove that line") from None
        rows.append(row)
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row, on the disk before this returns; a half row left by a kill is replaced."""
    with path.open("a+b") as file:
        file.seek(0)
        length = len(_whole(file.read()))
        file.truncate(length)
        lines = [] if length else [FIELDS]
        for values in (*lines, [row[name] for name in FIELDS]):
            file.write((",".join(map(str, values)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _whole(content: bytes) -> bytes:
    """The finished lines: a row without its line's end was cut off."""
    return content[: content.rfind(b"\n") + 1]
