"""Two results files side by side, for whoever changes a kernel:
``python -m benchmarks.report.compare OLD.csv NEW.csv``.

It reports and never judges: a slower result is not a failure. Whether a difference means something is said beside it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import records
from benchmarks.harness.records import Row

HEAD = ("size", "peer", "mode", "inputs", "dtype", "threads", "old ms", "new ms", "new/old", "units", "memory", "")


def lines(old: list[Row], new: list[Row]) -> Iterator[str]:
    """The report. Ratios are new / old: below 1 is better. ``units`` is the ratio of GEMM units, in which a machine
    that was slower as a whole cancels; ``memory`` that of the peaks above the inputs.
    """
    for name in records.ENVIRONMENT:
        values = [str(rows[0][name]) for rows in (old, new)]
        if values[0] != values[1]:
            yield f"{name}: {values[0]} -> {values[1]}"
    before, after = ({records.key(row): row for row in rows} for rows in (old, new))
    table = [HEAD, *(_row(before[key], after[key]) for key in after if key in before)]
    widths = [max(len(cells[k]) for cells in table) for k in range(len(HEAD))]
    yield ""
    for cells in table:
        yield "  ".join(
            cell.ljust(width) if k < 4 or k == len(HEAD) - 1 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
    for name, ours, theirs in (("old", before, after), ("new", after, before)):
        alone = [key for key in ours if key not in theirs]
        if alone:
            yield f"only in the {name} file: " + ", ".join(f"{key[1]}x{key[2]} {key[0]} {key[3]}" for key in alone)


def _row(old: Row, new: Row) -> tuple[str, ...]:
    name = (f"{new['batch']}x{new['classes']}", *(str(new[k]) for k in ("peer", "mode", "inputs", "dtype", "threads")))
    if old["status"] != "ok" or new["status"] != "ok":
        shown = [f"{row['time_ms']:.3f}" if row["status"] == "ok" else row["status"] for row in (old, new)]
        return (*name, *shown, "", "", "", "" if old["status"] == new["status"] else "status changed")
    times = [f"{row['time_ms']:.3f}" for row in (old, new)]
    ratios = [_ratio(old[k], new[k]) for k in ("time_ms", "gemm_units", "peak_mb")]
    return (*name, *times, *ratios, hint(old, new))


def hint(old: Row, new: Row) -> str:
    """Whether the two medians differ by more than their samples spread."""
    if old["time_p20_ms"] <= new["time_p80_ms"] and new["time_p20_ms"] <= old["time_p80_ms"]:
        return "within noise (20 to 80 % overlap)"
    if min(old["repeats"], new["repeats"]) < 3:
        return "a single call: no spread known"
    return "faster" if new["time_ms"] < old["time_ms"] else "slower"


def _ratio(old: float | None, new: float | None) -> str:
    return f"{new / old:.2f}" if old and new is not None else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    try:
        old, new = (records.read(path) for path in (args.old, args.new))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not (old and new):
        parser.error("a file without results")
    print("\n".join(lines(old, new)))


if __name__ == "__main__":
    main()
