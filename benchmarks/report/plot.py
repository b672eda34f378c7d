"""Time and memory against B and against C, from a results file: ``python -m benchmarks.report.plot [CSV]``."""

import argparse
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter

from benchmarks.harness import environment, records
from benchmarks.harness.peers import PEERS
from benchmarks.harness.records import Row

# Okabe and Ito's palette, told apart by colour-blind readers; the markers tell them apart in grey.
STYLES = dict(
    zip(
        PEERS,
        (
            ("#000000", "o"),
            ("#E69F00", "s"),
            ("#56B4E9", "^"),
            ("#009E73", "D"),
            ("#CC79A7", "v"),
            ("#D55E00", "*"),
        ),
        strict=True,
    )
)
MISSING = {"out of memory": "x", "too slow": "_"}
FIXED = {"batch": ("classes", 100), "classes": ("batch", 64)}
LABELS = {"batch": "samples B", "classes": "classes C"}
GREY = "0.5"


def draw(rows: list[Row], axis: str, path: Path) -> None:
    """One figure, time beside memory, against ``axis`` ("batch" or "classes"); forward + backward, random logits."""
    other, value = FIXED[axis]
    threads = max(row["threads"] for row in rows)
    rows = [
        row
        for row in rows
        if row["mode"] == "forward+backward"
        and row["inputs"] == "random"
        and row["threads"] == threads
        and row[other] == value
    ]
    rows.sort(key=lambda row: row[axis])
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _panel(panels[0], rows, axis, "time", ("time_ms", "gemm_unit_ms"), 1e-3, "s")
    _panel(panels[1], rows, axis, "peak memory above inputs", ("peak_mb", "logits_mb"), 2**20, "B")
    present = [name for name in PEERS if any(row["peer"] == name for row in rows)]
    handles = [_handle(name, *STYLES[name]) for name in present]
    handles += [Line2D([], [], color=GREY, linestyle="--", label="GEMM unit | logits")]
    missing = {row["status"] for row in rows}
    handles += [
        Line2D([], [], color=GREY, linestyle="", marker=marker, markersize=9, markeredgewidth=2, label=status)
        for status, marker in MISSING.items()
        if status in missing
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    title = f"VRM loss, forward + backward, {'C' if other == 'classes' else 'B'} = {value}"
    if rows:
        title += f", {rows[0]['dtype']}, {threads} threads, {rows[0]['cpu']} ({rows[0]['isa']})"
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No creation date in the file: the same results give the same bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _panel(
    axes: Axes, rows: list[Row], axis: str, label: str, columns: tuple[str, str], unit: float, symbol: str
) -> None:
    """``columns`` are the measured one and the grey one beside it, in ``unit`` of ``symbol``."""
    measured, beside = columns
    axes.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel=label)
    for level, (name, (colour, marker)) in enumerate(STYLES.items()):
        mine = [row for row in rows if row["peer"] == name]
        # A tenth of a MiB is what the measurement resolves: less would only stretch the axis.
        least = 0.1 if unit > 1 else 0.0
        points = [(row[axis], unit * max(row[measured], least)) for row in mine if row[measured] is not None]
        if points:
            style = {"color": colour, "marker": marker, "markersize": _marker_size(marker)}
            axes.plot(*zip(*points, strict=True), **style, zorder=3 + level)
        for row in mine:
            if row["status"] in MISSING:
                # Along the top edge, one level a peer, so that none hides another.
                axes.plot(
                    row[axis],
                    0.97 - 0.035 * level,
                    color=colour,
                    marker=MISSING[row["status"]],
                    markersize=9,
                    markeredgewidth=2,
                    transform=axes.get_xaxis_transform(),
                )
    values: dict[int, list[float]] = {}
    for row in rows:
        if row[beside]:
            values.setdefault(row[axis], []).append(row[beside] * unit)
    if values:
        axes.plot([*values], [sorted(v)[len(v) // 2] for v in values.values()], color=GREY, linestyle="--", zorder=2)
    if any(row["status"] in MISSING for row in rows):  # room for the marks
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.25)
    axes.set_xticks(sorted({row[axis] for row in rows}))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(axis="x", labelrotation=45)
    axes.yaxis.set_major_formatter(EngFormatter(symbol))
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _marker_size(marker: str) -> int:
    return 11 if marker == "*" else 6


def _handle(name: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markersize=_marker_size(marker), label=name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.plot", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", help="default: the newest under benchmarks/results")
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: beside the CSV)")
    args = parser.parse_args(arguments)
    source = args.csv or records.newest(environment.RESULTS)
    rows = records.read(source)
    for axis in FIXED:
        path = (args.output or source.parent) / f"cpu-{axis}.png"
        draw(rows, axis, path)
        print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
