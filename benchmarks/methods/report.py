"""The comparison in tables and a picture, from the rows of its CSV."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.methods.methods import METHODS, QUESTIONS, TASKS
from benchmarks.methods.results import TEST, TRIAL, Row

PICTURE = "compare.png"
BASE, RIVAL = "ce", "kd"
# Okabe and Ito's colours, told apart by colour-blind readers.
COLORS = {"ce": "#0072B2", "kd": "#E69F00", "vrm": "#009E73"}
FAINT = "0.45"
CONFIDENCE = 0.95


class Dataset:
    """The rows of one dataset: trials by method, and test students by method and seed."""

    def __init__(self, name: str, rows: Iterable[Row]) -> None:
        self.name, self.rows = name, [row for row in rows if row["dataset"] == name]
        self.trials: dict[str, list[Row]] = {}
        self.runs: dict[str, dict[int, Row]] = {}
        for row in self.rows:
            if row["phase"] == TRIAL:
                self.trials.setdefault(row["method"], []).append(row)
            elif row["phase"] == TEST:
                self.runs.setdefault(row["method"], {})[int(row["seed"])] = row

    @property
    def methods(self) -> list[str]:
        """Those that were judged on test images, in their order."""
        return [method for method in METHODS if method in self.runs]

    def values(self, method: str) -> list[float]:
        """Test accuracies in percent by seed, in the order of the seeds."""
        run = self.runs.get(method, {})
        return [100 * float(run[seed]["test"]) for seed in sorted(run)]

    def differences(self, method: str, other: str) -> list[float]:
        """What ``method`` has more than ``other`` on test images, in points, of each seed that both have."""
        mine, theirs = self.runs.get(method, {}), self.runs.get(other, {})
        return [100 * (float(mine[s]["test"]) - float(theirs[s]["test"])) for s in sorted(mine.keys() & theirs.keys())]


def datasets(rows: Iterable[Row]) -> list[Dataset]:
    rows = list(rows)
    return [Dataset(name, rows) for name in TASKS if any(row["dataset"] == name for row in rows)]


# ---- tables ----------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row], costs: Sequence[Row] = ()) -> str:
    """Markdown: the answers, then of each dataset what was chosen and how it did, then what the methods cost."""
    found = datasets(rows)
    if not any(data.methods for data in found):
        return "No student has been judged on test images yet."
    parts = ["### Answers", _answers(found)]
    for data in found:
        parts += [f"### {data.name}", _setting(data), *([_methods(data)] if data.methods else [])]
    if costs:
        told = "Processor time of one thread for a batch: what comes before, and each method's step of the student."
        parts += ["### What a step costs", told, _costs(costs)]
    versions = sorted({f"vrm_kernels {row['vrm_kernels']}, torch {row['torch']}" for row in rows})
    return "\n\n".join([*parts, f"Made with {'; '.join(versions)}."])


def _answers(found: list[Dataset]) -> str:
    found = [data for data in found if data.methods]
    head = ["question", "difference", *(data.name for data in found)]
    lines = []
    for question, (method, other) in QUESTIONS.items():
        cells = [_answer(data.differences(method, other)) for data in found]
        if any(cells):
            lines.append([question, f"`{method}` - `{other}`", *cells])
    return _table(head, lines, left=2)


def _answer(values: list[float]) -> str:
    if not values:
        return ""
    return f"{interval(values)}, {sum(x > 0 for x in values)} of {len(values)} above"


def _setting(data: Dataset) -> str:
    task = TASKS[data.name]
    teacher = ", ".join(sorted({f"{100 * float(row['teacher']):.1f} %" for row in data.rows}))
    seconds = sum(float(row["seconds"]) for row in data.rows)
    missing = [f"`{method}`" for method in METHODS if method not in data.runs]
    return (
        f"Teacher `{task.teacher}` ({teacher} of the test images), student `{task.student}`, {task.epochs} epochs. "
        f"{len(data.rows)} students, {seconds / 60:.0f} minutes of one core."
        + (f" Not judged yet: {', '.join(missing)}." if missing else "")
    )


def _methods(data: Dataset) -> str:
    head = ["method", "", "chosen of", "settings", "validation", "seeds", "test", f"against `{BASE}`"]
    lines = []
    for name in data.methods:
        row = next(iter(data.runs[name].values()))
        (chosen,) = [trial for trial in data.trials[name] if trial["trial"] == row["trial"]]
        against = data.differences(name, BASE) if name != BASE else []
        lines.append([
            f"`{name}`", METHODS[name].what, f"{len(data.trials[name])} trials", row["settings"],
            f"{100 * float(chosen['validation']):.1f} %", str(len(data.runs[name])), accuracy(data.values(name)),
            interval(against) if against else "",
        ])  # fmt: skip
    return _table(head, lines, left=4)


def _costs(costs: Sequence[Row]) -> str:
    """Milliseconds of a student's step by method and dataset, and what comes before it."""
    names = list(dict.fromkeys(row["dataset"] for row in costs))
    what = list(dict.fromkeys(row["what"] for row in costs))
    found = {(row["what"], row["dataset"]): f"{float(row['ms']):.2f} ms" for row in costs}
    return _table(["", *names], ([f"`{x}`", *(found.get((x, name), "") for name in names)] for x in what))


def accuracy(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "") + " %"


def interval(values: list[float]) -> str:
    """The mean of the paired differences, signed, and between what the mean is with 95 % confidence (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def half_width(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean of normal values; 0 for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return 0.0
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _table(head: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    lines = [head, [*["---"] * left, *["---:"] * (len(head) - left)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path) -> bool:
    """A panel a dataset: what each method has more than ``ce``, a dot a seed, the mean in its confidence interval."""
    from matplotlib.figure import Figure

    found = [data for data in datasets(rows) if BASE in data.runs and len(data.methods) > 1]
    if not found:
        return False
    longest = max(len(data.methods) for data in found) - 1
    figure = Figure(figsize=(5.2 * len(found), 1.8 + 0.34 * longest), layout="constrained", dpi=130)
    for axes, data in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        names = [name for name in data.methods if name != BASE]
        for y, name in enumerate(names):
            values = data.differences(name, BASE)
            if not values:
                continue
            color = COLORS.get(name, FAINT)
            axes.plot(values, [y + 0.18] * len(values), "o", color=color, alpha=0.45, markersize=4, markeredgewidth=0)
            axes.errorbar(
                statistics.fmean(values), y - 0.1, xerr=half_width(values), fmt="D", color=color, capsize=3,
                markersize=5,
            )  # fmt: skip
        axes.axvline(0, color=COLORS[BASE], linewidth=1, zorder=0)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(f"{data.name}: {BASE} {accuracy(data.values(BASE))}", fontsize=10.5)
        axes.set_xlabel(f"test accuracy, points above {BASE}")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Dots: seeds. Diamonds: the mean of the paired differences, and its 95 % confidence interval",
                    fontsize=9.5)  # fmt: skip
    # No version and no date in the file: the same rows give the same bytes.
    figure.savefig(path, metadata={"Software": None})
    return True
