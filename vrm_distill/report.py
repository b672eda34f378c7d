"""What a run says at its end: a table, a sentence on the loss's share of a step, and a picture of the curves."""

import statistics
from pathlib import Path

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vrm_distill import page, recipe, relations
from vrm_distill.data import ImageData
from vrm_distill.log import console
from vrm_distill.recipe import Result
from vrm_distill.settings import DISTILLED, TEACHER, Settings
from vrm_kernels import __version__, backends

# Okabe and Ito's colours, told apart by colour-blind readers; the dashes tell them apart in grey.
STYLES = {
    "alone_real": ("#0072B2", (0, (1, 1))),
    "alone_both": ("#E69F00", (0, (5, 2))),
    "distilled": ("#009E73", "-"),
}


def write(settings: Settings, data: ImageData, result: Result) -> None:
    """The curves, the relations, the summary and the page, into the run's folder."""
    folder = settings.output_dir
    # matplotlib would read a "$" in a name as the start of a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        plot_curves(folder / recipe.CURVES, settings, result)
        if result.relations is not None:
            relations.plot(folder / recipe.RELATIONS, settings, result.relations)
    write_summary(folder / recipe.SUMMARY, settings, result)
    said = [*(f"Warning: {warning}." for warning in result.warnings), *sentences(settings, result)]
    page.write(settings, data, result.processes, columns(settings, result), said)


def tell(screen: Console, settings: Settings, result: Result) -> None:
    """The same on the screen, and what lies where."""
    screen.print()
    screen.print(table(settings, result))
    for sentence in sentences(settings, result):
        screen.print("\n" + sentence)
    screen.print(f"\nTrained in {result.training_seconds:.0f} s. Written to {settings.output_dir}/:")
    best = ", the best seed on the validation images" if settings.seeds > 1 else ""
    for name, what in (
        (recipe.REPORT, "everything in one page, for a browser"),
        (recipe.CURVES, "the training curves"),
        (recipe.RELATIONS, "the relations of teacher and student, before and after"),
        (recipe.LOG, "every epoch of every model"),
        (
            recipe.STUDENT_CHECKPOINT,
            f"the distilled student after its last epoch, of seed {result.best_seed}{best}",
        ),
        (recipe.TEACHER_CHECKPOINT, "the teacher"),
        (recipe.SUMMARY, "this table"),
        (recipe.CONFIG, "the settings, for --config"),
    ):
        if (settings.output_dir / name).exists():
            screen.print(f"  {name:<20} {what}")


def columns(settings: Settings, result: Result) -> list[tuple[str, str, str, str]]:
    """Model, network, parameters and accuracy of the teacher and of the students, below the names of these."""
    rows = [("model", "network", "parameters", "test accuracy")]
    models = [(TEACHER, TEACHER, settings.teacher, result.teacher_parameters)]
    models += [
        (method, title, settings.student, result.student_parameters) for method, title in settings.methods.items()
    ]
    for method, title, network, parameters in models:
        rows.append((title, network, f"{parameters:,}", accuracy(result.final_accuracies(method))))
    return rows


def table(settings: Settings, result: Result) -> Table:
    """:func:`columns`; Markdown when printed."""
    heads, *rows = columns(settings, result)
    shown = Table(box=box.MARKDOWN)
    for head in heads:
        shown.add_column(head, justify="right" if head in heads[2:] else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*(cell.replace("|", "\\|") for cell in row))
    return shown


def accuracy(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread} %"


def sentences(settings: Settings, result: Result) -> list[str]:
    """What the table does not say: what was measured, the gain, and the price."""
    seeds = "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds: mean ± standard deviation"
    time = result.step_time
    backend = backends.resolve(settings.backend, torch.device(settings.device))
    said = [
        f"Accuracy on {result.test_images} held-out images after the last epoch, not the best one; students over "
        f"{seeds}. All methods of a seed share their first weights, batches and augmentations."
    ]
    if "alone_both" in settings.methods:
        alone, distilled = (result.final_accuracies(method) for method in ("alone_both", DISTILLED))
        gains = [100 * (d - a) for d, a in zip(distilled, alone, strict=True)]
        said.append(
            f"Distilled against alone on both views: {statistics.fmean(gains):+.1f} points "
            f"(by seed {' '.join(f'{gain:+.1f}' for gain in gains)})."
        )
    if time is None:
        return said
    # The first process timed these steps by itself, with the whole batch, after the training.
    one = " in one process, without what processes send each other" if result.processes > 1 else ""
    eager = ""
    if time.eager_loss is not None:
        eager = (
            f"With the eager class (backend reference) the loss takes {1e3 * time.eager_loss:.2f} ms: "
            f"{time.eager_share:.0%} of a step of {1e3 * time.eager_step:.2f} ms. "
        )
    said.append(
        f"A distillation step takes {1e3 * time.step:.2f} ms{one}, the teacher {1e3 * time.teacher:.2f} ms of it "
        f"({time.teacher / time.step:.0%}), the loss {1e3 * time.loss:.2f} ms "
        f"({time.share:.0%}, backend {backend}). {eager}Medians, {settings.batch_size // settings.accumulate} samples "
        f"a batch."
    )
    return said


def write_summary(path: Path, settings: Settings, result: Result) -> None:
    """The same table and sentences as Markdown, and the settings that made them."""
    with path.open("w", encoding="utf-8") as file:
        paper = console(file=file, width=120)
        paper.print(table(settings, result))
        for warning in result.warnings:
            paper.print(f"\nWarning: {warning}.")
        # Leave out settings that are off by default and were not changed.
        told = {name: value for name, value in settings.plain().items() if name != "output_dir"}
        default = Settings().plain()
        made_by = ", ".join(f"{n} {v}" for n, v in told.items() if v not in (None, False, []) or v != default[n])
        made_by += f", vrm_kernels {__version__}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, "
        made_by += "1 process" if result.processes == 1 else f"{result.processes} processes"
        for sentence in (*sentences(settings, result), f"Settings: {made_by}."):
            paper.print("\n" + sentence)


def plot_curves(path: Path, settings: Settings, result: Result) -> None:
    """Test accuracy and training loss by epoch, the mean over the seeds in a band of one standard deviation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for method, title in settings.methods.items():
        color, dashes = STYLES[method]
        for axes, field, scale in ((left, "test_accuracy", 100), (right, "ce_real", 1)):
            epochs, mean, spread = _by_epoch(result.rows, method, field, scale)
            axes.plot(epochs, mean, color=color, linestyle=dashes, linewidth=2, label=title)
            low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=color, alpha=0.18, linewidth=0)
    teacher = 100 * result.final_accuracies(TEACHER)[-1]
    left.axhline(teacher, color="0.35", linewidth=1)
    left.annotate(
        f"teacher {teacher:.1f} %", (0.01, teacher), xycoords=("axes fraction", "data"), xytext=(0, -3),
        textcoords="offset points", color="0.35", va="top",
    )  # fmt: skip
    left.set(title="Accuracy on the test images", xlabel="epoch", ylabel="accuracy (%)")
    right.set(title="Training cross-entropy, real view", xlabel="epoch", ylabel="cross-entropy (nats)")
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(NullLocator())
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _zoom(left, settings, result, teacher)
    left.legend(loc="lower right", frameon=False)
    figure.suptitle(
        f"{settings.dataset}, {result.train_images} training images: {settings.student} "
        f"({result.student_parameters:,} parameters) beside {settings.teacher} ({result.teacher_parameters:,}); "
        + ("1 seed" if settings.seeds == 1 else f"mean of {settings.seeds} seeds, band: ± 1 standard deviation"),
        fontsize=10.5,
    )
    figure.savefig(path)


def _by_epoch(rows: list[dict], method: str, field: str, scale: float) -> tuple[list, list, list]:
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            values.setdefault(row["epoch"], []).append(scale * row[field])
    mean = [statistics.fmean(v) for v in values.values()]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values.values()]
    return list(values), mean, spread


def _zoom(axes, settings: Settings, result: Result, teacher: float) -> None:
    """Leave the first epochs' climb out of the picture where the end is what there is to see."""
    finals = [100 * value for method in settings.methods for value in result.final_accuracies(method)]
    low, high = min([*finals, teacher]), max([*finals, teacher])
    axes.set_ylim(max(0.0, low - max(12.0, 2 * (high - low))), min(100.5, high + 2))
