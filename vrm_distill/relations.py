"""A picture of what was matched: both relation graphs of a few held-out images, before and after the training.

A relation is a vector, so the picture shows of every edge (i, j) three numbers:

- its cosine with the direction of i's own class, which is one-hot in the inter-sample graph (vectors over classes) and
  the images of that class in the inter-class graph (vectors over images): what the relation says;
- its loss, ``sum_c huber(eS_ijc - eT_ijc)``: 0 where student and teacher agree, about 1 where they have nothing to do
  with each other (below delta it is 1 minus the cosine between them), 2 where they are opposed;
- whether the pruning keeps it.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vrm_distill.data import ImageData, Views
from vrm_distill.seeding import seed_everything
from vrm_distill.settings import Settings
from vrm_kernels import functional as VF
from vrm_kernels.backends import contract, reference
from vrm_kernels.data import both_views
from vrm_kernels.graph.constants import RELATION_EPS

# The picture shows this many images and classes, found among this many held-out images.
IMAGES, CLASSES, CANDIDATES = 48, 16, 256
# The edges of more classes than this are ranked among the classes shown: the entropies of all would not fit.
RANKED = 4096

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Look:
    """One student's edges: rows are vertices of the real view, columns of the virtual one, ``[N, N]`` each."""

    relation: Tensor
    loss: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Graph:
    """One graph; ``classes`` are the ``N`` shown vertices' own, in ascending order, ``teacher`` its relations."""

    classes: list[int]
    teacher: Tensor
    before: Look
    after: Look


@dataclass(frozen=True)
class Relations:
    """Both graphs of the student of ``seed``."""

    inter_sample: Graph
    inter_class: Graph
    seed: int


def compare(
    teacher: nn.Module,
    before: nn.Module,
    after: nn.Module,
    data: ImageData,
    settings: Settings,
    seed: int,
    device: torch.device,
) -> Relations:
    """Look at the validation images through the teacher and through a student with its first and its last weights.

    Both views are augmented as in training. The models are on ``device`` and are left in evaluation mode.
    """
    images, labels = pick(data.validation)
    seed_everything(device, seed)
    real, virtual = Views(data, settings.augment)(images.to(device))
    # The batch norm of a new model has no statistics yet: it takes this batch's, as in the first step.
    before.train()
    with torch.no_grad():
        logits = [tuple(x.float().cpu() for x in both_views(m, real, virtual)) for m in (teacher.eval(), before, after)]
    before.eval()
    both = [graph(*logits, labels, by_class, settings.percentile, settings.relations) for by_class in (False, True)]
    return Relations(*both, seed)


def pick(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """A few images, sorted by class, about as many of each class: ``(images, labels)``.

    They are looked for among images spread over the set, because to know a label may be to read a file.
    """
    images, labels = dataset[torch.linspace(0, len(dataset) - 1, min(len(dataset), CANDIDATES)).long()]
    classes, counts = labels.unique(return_counts=True)
    classes = classes[counts.argsort(descending=True, stable=True)[:CLASSES]]
    each = IMAGES // len(classes)
    chosen = torch.cat([(labels == c).nonzero()[:each, 0] for c in classes.sort().values])
    return images[chosen], labels[chosen]


def graph(
    teacher: Pair, before: Pair, after: Pair, labels: Tensor, by_class: bool, percentile: float, relations: str
) -> Graph:
    """The real-virtual edges of the inter-sample or (``by_class``) the inter-class graph.

    Args:
        teacher, before, after: logits of the real and of the virtual view, ``[B, C]`` each, on the CPU.
        labels: ``[B]``, ascending. Of the classes only these are shown.
        relations: as of :class:`vrm_kernels.VRMLoss`; with ``"complete"``, edges in one view are ranked, too.
    """
    samples, classes = teacher[0].shape
    if by_class:
        shown = labels.unique()
        own = F.normalize((labels == shown[:, None]).float(), dim=1)  # [N, B]
    else:
        shown = torch.arange(samples)
        own = F.one_hot(labels, classes).float()  # [N, C]

    def look(student: Pair) -> tuple[Look, Tensor]:
        complete = relations == "complete"
        (a, b, ta, tb), (p, q) = list(contract.both_graphs(contract.Views(*student, *teacher), complete))[by_class]
        n = classes if by_class else samples
        # The real view is the first n vertices on the left side, the virtual view the last n on the right.
        vectors = a[:n][shown], b[-n:][shown], ta[:n][shown], tb[-n:][shown]
        seen, where = n, shown
        if n > RANKED:
            p, q = (x.unflatten(0, (-1, n))[:, shown].flatten(0, 1) for x in (p, q))
            seen, where = len(shown), torch.arange(len(shown))
        kept = reference.kept_edges((p, q), len(p), len(q), percentile, complete)[:seen, -seen:][where][:, where]
        relation, teachers, loss = (torch.stack(rows) for rows in zip(*_rows(*vectors, own), strict=True))
        return Look(relation, loss, kept), teachers

    (first, teachers), (last, _) = look(before), look(after)
    return Graph((shown if by_class else labels).tolist(), teachers, first, last)


def _rows(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, own: Tensor):
    """Of each vertex on the left: the student's cosines, the teacher's, and the losses, of its edges. Row by row,
    because all vectors of all edges are large where there are many classes."""
    for i in range(len(a)):
        student, teacher = (reference.relations(x[i : i + 1], y, RELATION_EPS)[0] for x, y in ((a, b), (ta, tb)))
        loss = F.huber_loss(student, teacher, reduction="none", delta=VF.DEFAULT_DELTA).sum(-1)
        yield student @ own[i], teacher @ own[i], loss


# ---- the picture -----------------------------------------------------------------------------------------------------

_WORDS = {
    "inter_sample": (
        "Inter-sample graph: a vertex is an image, a relation the normalised difference of two images' logits",
        "How to read it. Row: an image in its real view; column: an image in its virtual (augmented) view; both sorted "
        "by class, each square along the diagonal one class.",
        "Relations: red where the difference points to the row's own class, as it should between two classes. Within "
        "a class, on the diagonal, only the augmentation tells the two apart: pale, or blue where the virtual view is "
        "the surer one.",
    ),
    "inter_class": (
        "Inter-class graph: a vertex is a class, a relation the normalised difference of two classes' logits over all "
        "images",
        "How to read it. Row: a class in the real view; column: a class in the virtual view.",
        "Relations: red where the row's class beats the column's on the images of the row's class. On the diagonal a "
        "class meets itself in the other view, and only the augmentation is left.",
    ),
}
_MISMATCH = "Mismatch: the loss of each edge; 0: teacher and student agree, 1: unrelated, 2: opposed."
_KEPT = (
    "Kept (dark): the {percentile:g} % of all edges whose joint entropy under the student is lowest. Only they count."
)


def plot(path: Path, settings: Settings, relations: Relations) -> None:
    """Both graphs, one above the other: the teacher's relations, then the student's before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 14), layout="constrained", dpi=100)
    figure.suptitle(
        f"{settings.dataset}: the relations of {settings.student} (seed {relations.seed}) and of {settings.teacher} on "
        f"{len(relations.inter_sample.classes)} validation images",
        fontsize=13,
    )
    for part, (name, words) in zip(figure.subfigures(2, 1, hspace=0.03), _WORDS.items(), strict=True):
        _block(part, getattr(relations, name), *words, settings)
    figure.savefig(path)


def _block(figure, graph: Graph, title: str, how: str, what: str, settings: Settings) -> None:
    """One graph: the teacher on the left, two rows of the student beside it, and what to see below the teacher."""
    figure.suptitle(title, fontsize=11.5, fontweight="bold")
    axes = figure.subplots(2, 4)
    looks = {"before training": graph.before, "after training": graph.after}
    # One scale for both rows, so that a colour means the same before and after.
    worst = max(1.0, *(float(look.loss.max()) for look in looks.values()))
    relation = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}
    shown = _heat(axes[0, 0], graph.teacher, graph.classes, "teacher: relations", **relation)
    figure.colorbar(shown, ax=axes[:, 1], shrink=0.5, aspect=30, label="cosine with the row's own class")
    for (when, look), (_, student, mismatch, mask) in zip(looks.items(), axes, strict=True):
        _heat(student, look.relation, graph.classes, f"student {when}: relations", **relation)
        kept = int(look.kept.sum())
        mean = float(look.loss[look.kept].mean()) if kept else 0.0
        heading = f"{when}: mismatch\nmean of all {float(look.loss.mean()):.2f}, of the kept {mean:.2f}"
        shown = _heat(mismatch, look.loss, graph.classes, heading, cmap="viridis", vmin=0, vmax=worst)
        heading = f"{when}: kept edges\n{kept} of {look.kept.numel()} ({kept / look.kept.numel():.0%})"
        _heat(mask, look.kept, graph.classes, heading, cmap="Greys", vmin=0, vmax=1.25)
    figure.colorbar(shown, ax=axes[:, 2], shrink=0.5, aspect=30, label="loss of the edge")
    axes[1, 0].axis("off")
    ranked = "" if settings.relations == "inter_view" else " Ranked among the edges within a view, too."
    words = (how, what, _MISMATCH, _KEPT.format(percentile=settings.percentile) + ranked)
    text = "\n\n".join(textwrap.fill(sentence, 42) for sentence in words)
    axes[1, 0].text(0, 1, text, va="top", fontsize=8.5, transform=axes[1, 0].transAxes)


def _heat(axes, values: Tensor, classes: list[int], title: str, **colours):
    """A heat map with the classes on both sides, and lines between them where they have several vertices."""
    shown = axes.imshow(values.float().numpy(), interpolation="nearest", **colours)
    names = sorted(set(classes))
    starts = [classes.index(name) for name in names]
    if len(names) < len(classes):
        for start in starts[1:]:
            for line in (axes.axhline, axes.axvline):
                line(start - 0.5, color="0.6", linewidth=0.4)
    ends = [*starts[1:], len(classes)]
    ticks = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names)
    axes.tick_params(length=0, labelsize=7 if len(names) <= 10 else 6, pad=1)
    if len(names) > 10:
        axes.tick_params(axis="x", rotation=90)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("class, virtual view", fontsize=7.5, labelpad=2)
    axes.set_ylabel("class, real view", fontsize=7.5, labelpad=2)
    return shown
