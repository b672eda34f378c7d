"""What ``make compare`` compares: the data with their networks, and the methods with what is tuned of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.methods import losses
from benchmarks.methods.losses import Loss, per_view, relation_matching


@dataclass(frozen=True)
class Task:
    """A dataset with the networks and the lengths that suit it."""

    source: str
    teacher: str
    student: str
    epochs: int
    teacher_epochs: int
    seeds: int
    train_images: int | None = None


TASKS = {
    "digits": Task("digits", "conv_32_64_128", "conv_4_8_8", epochs=30, teacher_epochs=40, seeds=10),
    "fashion": Task(
        "idx:/usr/share/datasets/fashion-mnist", "conv_32_64_128", "conv_8_16_16", epochs=5, teacher_epochs=8,
        seeds=5, train_images=5000,
    ),
    "omniglot": Task("omniglot:omniglot", "conv_32_64_128", "conv_16_32_64", epochs=12, teacher_epochs=30, seeds=5),
}  # fmt: skip
BATCH = 64


@dataclass(frozen=True)
class Knob:
    """A number that is tuned: its first trial's value, and between what the other trials draw it, evenly in its log."""

    name: str
    published: float
    low: float
    high: float

    def at(self, fraction: float) -> float:
        return float(f"{math.exp(math.log(self.low) + fraction * math.log(self.high / self.low)):.4g}")


LEARNING_RATE = Knob("lr", 0.01, 0.003, 0.05)


@dataclass(frozen=True)
class Method:
    """A way to train a student: ``make(**knobs)`` is its loss, of so many views, the real one and then virtual ones."""

    what: str
    make: Callable[..., Loss]
    knobs: tuple[Knob, ...] = ()
    views: int = 2

    def trials(self, count: int) -> list[dict[str, float]]:
        """What each trial takes for the learning rate and the knobs.

        The first has the published values; the others are Sobol's points, so that trial ``i`` of every method has the
        same learning rate, and all are spread evenly.
        """
        knobs = (LEARNING_RATE, *self.knobs)
        # Its first point is a corner: left out.
        points = torch.quasirandom.SobolEngine(len(knobs)).draw(count)[1:].tolist()
        drawn = [{knob.name: knob.at(x) for knob, x in zip(knobs, point, strict=True)} for point in points]
        return [{knob.name: knob.published for knob in knobs}, *drawn]


ALPHA, BETA = Knob("alpha", 4.0, 0.5, 64.0), Knob("beta", 2.0, 0.25, 32.0)


def _vrm(what: str, views: int = 2, knobs: tuple[Knob, ...] = (ALPHA, BETA), **settings) -> Method:
    return Method(what, lambda alpha, beta=0.0: relation_matching(alpha=alpha, beta=beta, **settings), knobs, views)


def _with_kd(alpha: float, kd_weight: float) -> Loss:
    return relation_matching(kd_weight, alpha=alpha, beta=alpha / 2)


def _term(what: str, term: Callable[..., losses.Term], *knobs: Knob) -> Method:
    return Method(what, lambda **weights: per_view(term(**weights)), knobs)


def _cross_entropy(what: str, views: int) -> Method:
    return Method(what, lambda: losses.cross_entropy, views=views)


# The published values are those for CIFAR-100: of KD, RKD and AT from CRD's comparison (arXiv 1910.10699), of the
# others from their own papers; CC's is for its term as it is here, and relation matching's are this package's defaults.
METHODS: dict[str, Method] = {
    "ce real view": _cross_entropy("cross-entropy, real view", 1),
    "ce": _cross_entropy("cross-entropy, both views", 2),
    "ce 3 views": _cross_entropy("cross-entropy, a second virtual view", 3),
    "kd": _term("KD", losses.kd, Knob("weight", 9.0, 0.3, 30.0), Knob("temperature", 4.0, 1.0, 8.0)),
    "lskd": _term("logit standardisation", losses.lskd, Knob("weight", 9.0, 0.3, 30.0)),
    "dkd": _term("decoupled KD", losses.dkd, Knob("alpha", 1.0, 0.1, 10.0), Knob("beta", 8.0, 0.5, 32.0)),
    "dist": _term("DIST", losses.dist, Knob("beta", 2.0, 0.1, 20.0), Knob("gamma", 2.0, 0.1, 20.0)),
    "rkd": _term("relational KD", losses.rkd, Knob("distance", 25.0, 1.0, 200.0), Knob("angle", 50.0, 2.0, 400.0)),
    "cc": _term("correlation congruence", losses.cc, Knob("weight", 100.0, 10.0, 1000.0)),
    "at": _term("attention transfer", losses.at, Knob("weight", 1000.0, 10.0, 10000.0)),
    "vrm": _vrm("relation matching"),
    "vrm zscore": _vrm("of z-scores of the logits", normalize="zscore"),
    "vrm kd": Method("and KD; beta is half of alpha", _with_kd, (ALPHA, Knob("kd_weight", 9.0, 0.3, 30.0))),
    "vrm 3 views": _vrm("a second virtual view", views=3),
    "vrm no pruning": _vrm("keeps every edge", unreliable_pruning_percentile=100.0),
    "vrm real view": _vrm("the real view alone", views=1),
    "vrm no inter-class": _vrm("inter-sample graph alone", knobs=(ALPHA,)),
}
# What the page asks: a method, and what it is compared with.
QUESTIONS = {
    "Does relation matching help over cross-entropy of the same two views?": ("vrm", "ce"),
    "Over KD?": ("vrm", "kd"),
    "What does pruning add?": ("vrm", "vrm no pruning"),
    "What does the virtual view add?": ("vrm", "vrm real view"),
    "What does it add to cross-entropy?": ("ce", "ce real view"),
    "What does the inter-class graph add?": ("vrm", "vrm no inter-class"),
    "What do z-scores of the logits add?": ("vrm zscore", "vrm"),
    "What does KD add to it?": ("vrm kd", "vrm"),
    "What does a second virtual view add?": ("vrm 3 views", "vrm"),
    "To cross-entropy?": ("ce 3 views", "ce"),
}
