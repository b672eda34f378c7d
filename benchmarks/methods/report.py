"""The comparison in tables and pictures, from the rows of its CSV."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.methods.methods import ABLATIONS, BATCH_METHODS, METHODS, TASKS

Row = dict[str, str]
METHODS_PICTURE, BATCH_PICTURE = "compare.png", "compare-batch.png"
# Okabe and Ito's colours, told apart by colour-blind readers; the markers tell them apart in grey.
STYLES = {"ce": ("#0072B2", "o"), "kd": ("#E69F00", "s"), "vrm": ("#009E73", "D")}
OTHER, FAINT = "#0072B2", "0.55"
ORDER = (*METHODS, *ABLATIONS)


class Dataset:
    """The rows of one dataset, by method, batch size and seed."""

    def __init__(self, name: str, rows: Iterable[Row]) -> None:
        self.name, self.rows = name, [row for row in rows if row["dataset"] == name]
        self.runs: dict[tuple[str, int], dict[int, Row]] = {}
        for row in self.rows:
            self.runs.setdefault((row["method"], int(row["batch_size"])), {})[int(row["seed"])] = row
        self.batches = sorted({batch for _, batch in self.runs})
        # The batch size that the methods are compared at is the one with most of them, or else most students.
        counts = {size: [len(run) for (_, batch), run in self.runs.items() if batch == size] for size in self.batches}
        self.batch = max(self.batches, key=lambda size: (len(counts[size]), sum(counts[size])))

    def present(self, methods: Iterable[str]) -> list[str]:
        """Those of the methods that were run, in their order."""
        return [method for method in methods if (method, self.batch) in self.runs]

    def values(self, method: str, field: str = "last", batch: int | None = None) -> list[float]:
        """Accuracies in percent by seed, in the order of the seeds."""
        run = self.runs.get((method, batch or self.batch), {})
        return [100 * float(run[seed][field]) for seed in sorted(run)]

    def differences(self, method: str, other: str, batch: int | None = None) -> list[float]:
        """What ``method`` has more than ``other`` after the last epoch, in points, of each seed that both have."""
        mine, theirs = (self.runs.get((name, batch or self.batch), {}) for name in (method, other))
        return [100 * (float(mine[s]["last"]) - float(theirs[s]["last"])) for s in sorted(mine.keys() & theirs.keys())]


def datasets(rows: Iterable[Row]) -> list[Dataset]:
    rows = list(rows)
    return [Dataset(name, rows) for name in TASKS if any(row["dataset"] == name for row in rows)]


# ---- tables ----------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row]) -> str:
    """Markdown: of each dataset what was trained, the methods, and the ablations and batch sizes if there are any."""
    parts = []
    for data in datasets(rows):
        parts += [f"### {data.name}", _setting(data), _methods(data)]
        if data.present(ABLATIONS):
            parts += ["Relation matching's ablations:", _ablations(data)]
        if len(data.batches) > 1:
            parts += ["Accuracy after the last epoch against the batch size:", _batches(data)]
    if not parts:
        return "Nothing has been compared yet."
    versions = sorted({f"vrm_kernels {row['vrm_kernels']}, torch {row['torch']}" for row in rows})
    return "\n\n".join([*parts, f"Made with {'; '.join(versions)}."])


def _setting(data: Dataset) -> str:
    task = TASKS[data.name]
    teacher = ", ".join(sorted({f"{100 * float(row['teacher']):.1f} %" for row in data.rows}))
    epochs = ", ".join(sorted({row["epochs"] for row in data.rows}, key=int))
    seconds = sum(float(row["seconds"]) for row in data.rows)
    return (
        f"Teacher `{task.teacher}` ({teacher}), student `{task.student}`, {epochs} epochs, batches of {data.batch} "
        f"where no other is named; alpha {task.alpha:g}, beta {task.beta:g}. {len(data.rows)} students, trained in "
        f"{seconds / 60:.0f} minutes."
    )


def _methods(data: Dataset) -> str:
    head = ["method", "seeds", "last epoch", "best epoch", "last epoch against `ce`", "seeds above `ce`"]
    return _table(head, ([*_accuracies(data, name), *_against(data, name, "ce")] for name in data.present(METHODS)))


def _ablations(data: Dataset) -> str:
    head = ["variant", "seeds", "last epoch", "best epoch"]
    head += [x for other in ("ce", "vrm") for x in (f"against `{other}`", f"seeds above `{other}`")]
    names = [*data.present(["vrm"]), *data.present(ABLATIONS)]
    rows = ([*_accuracies(data, name), *_against(data, name, "ce"), *_against(data, name, "vrm")] for name in names)
    return _table(head, rows)


def _batches(data: Dataset) -> str:
    methods = [name for name in BATCH_METHODS if any((name, size) in data.runs for size in data.batches)]
    head = ["batch", *(f"`{name}`" for name in methods)]
    others = [name for name in methods if name != "vrm"] if "vrm" in methods else []
    head += [x for other in others for x in (f"`vrm` against `{other}`", "seeds above")]
    return _table(
        head,
        (
            [
                str(size),
                *(accuracy(data.values(name, batch=size)) for name in methods),
                *(x for other in others for x in _against(data, "vrm", other, size)),
            ]
            for size in data.batches
        ),
    )


def _accuracies(data: Dataset, method: str) -> list[str]:
    columns = [data.values(method, field) for field in ("last", "best")]
    return [f"`{method}`", str(len(columns[0])), *map(accuracy, columns)]


def _against(data: Dataset, method: str, other: str, batch: int | None = None) -> list[str]:
    differences = data.differences(method, other, batch)
    if method == other or not differences:
        return ["", ""]
    return [gain(differences), f"{sum(x > 0 for x in differences)} of {len(differences)}"]


def accuracy(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds; empty without values."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}{_spread(values, 1)} %"


def gain(values: list[float]) -> str:
    """The mean of the paired differences ± their standard deviation, signed."""
    return f"{statistics.fmean(values):+.2f}{_spread(values, 2)}"


def _spread(values: list[float], digits: int) -> str:
    return f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The pictures that the rows are enough for; the paths of those that were written."""
    found = datasets(rows)
    written = []
    if found:
        written.append(folder / METHODS_PICTURE)
        _draw_methods(found, written[-1])
    if several := [data for data in found if len(data.batches) > 1]:
        written.append(folder / BATCH_PICTURE)
        _draw_batches(several, written[-1])
    return written


def _draw_methods(found: list[Dataset], path: Path) -> None:
    """A panel a dataset: a dot a seed, mean and standard deviation above them, the ablations apart from the methods."""
    from matplotlib.figure import Figure

    longest = max(len(data.present(ORDER)) for data in found)
    figure = Figure(figsize=(5.2 * len(found), 1.6 + 0.36 * (longest + 1)), layout="constrained", dpi=130)
    for axes, data in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        methods, ablations = data.present(METHODS), data.present(ABLATIONS)
        # A row is left free between the two groups.
        places = {name: row for row, name in enumerate(methods)}
        places |= {name: row for row, name in enumerate(ablations, len(methods) + 1)}
        for name, y in places.items():
            values = data.values(name)
            color = STYLES["vrm"][0] if name == "vrm" else OTHER if name in METHODS else FAINT
            axes.plot(values, [y + 0.17] * len(values), "o", color=color, alpha=0.45, markersize=4, markeredgewidth=0)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(
                statistics.fmean(values), y - 0.1, xerr=spread, fmt="D", color=color, capsize=3, markersize=5.5
            )
        for name in places.keys() & {"ce", "vrm"}:
            mean = statistics.fmean(data.values(name))
            axes.axvline(mean, color=STYLES[name][0], alpha=0.5, linewidth=1, linestyle="--", zorder=0)
        if ablations:
            axes.axhline(len(methods), color="0.85", linewidth=1)
        axes.set_yticks(list(places.values()), [name.removeprefix("vrm ") for name in places])
        axes.set_ylim(max(places.values()) + 0.6, -0.6)
        teacher = statistics.fmean(100 * float(row["teacher"]) for row in data.rows)
        axes.set_title(f"{data.name}: batch {data.batch}, teacher {teacher:.1f} %", fontsize=10.5)
        axes.set_xlabel("test accuracy after the last epoch (%)")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    ablated = "; below the line: relation matching's ablations" if any(d.present(ABLATIONS) for d in found) else ""
    figure.suptitle(
        f"Dots: seeds. Diamonds: their mean ± 1 standard deviation. Dashed: the means of ce and vrm{ablated}",
        fontsize=9.5,
    )
    _save(figure, path)


def _draw_batches(found: list[Dataset], path: Path) -> None:
    """A panel a dataset: a line a method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6.2 * len(found), 4.4), layout="constrained", dpi=130)
    for axes, data in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for number, name in enumerate(BATCH_METHODS):
            points = [(size, values) for size in data.batches if (values := data.values(name, batch=size))]
            if not points:
                continue
            color, marker = STYLES[name]
            axes.errorbar(
                # Moved a little aside, so that the bars of one batch size do not hide one another.
                [size * 1.05 ** (number - 1) for size, _ in points],
                [statistics.fmean(values) for _, values in points],
                [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points],
                color=color, marker=marker, linewidth=2, capsize=3, elinewidth=1.2, label=name,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(data.batches, [str(size) for size in data.batches])
        axes.xaxis.set_minor_locator(NullLocator())
        epochs = ", ".join(sorted({row["epochs"] for row in data.rows}, key=int))
        axes.set_title(f"{data.name}: {epochs} epochs whatever the batch size, one learning rate", fontsize=10.5)
        axes.set_xlabel("batch size")
        axes.set_ylabel("test accuracy after the last epoch (%)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="mean over seeds ± 1 standard deviation", title_fontsize=8.5)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    # No version and no date in the file: the same rows give the same bytes.
    figure.savefig(path, metadata={"Software": None})
