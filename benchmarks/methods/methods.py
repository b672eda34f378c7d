"""What ``make compare`` compares: the data with their networks, the losses, and relation matching's ablations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.methods import losses
from vrm_kernels import VRMLoss


@dataclass(frozen=True)
class Task:
    """A dataset with the models, the length and the weights of relation matching that suit it."""

    source: str
    teacher: str
    student: str
    epochs: int
    teacher_epochs: int
    train_images: int | None = None
    alpha: float = 4.0
    beta: float = 2.0


TASKS = {
    "digits": Task("digits", "conv_32_64_128", "conv_4_8_8", epochs=30, teacher_epochs=40),
    "fashion": Task(
        "idx:/usr/share/datasets/fashion-mnist", "conv_32_64_128", "conv_8_16_16", epochs=10, teacher_epochs=10,
        train_images=20000,
    ),
    "omniglot": Task("omniglot:omniglot", "conv_32_64_128", "conv_16_32_64", epochs=24, teacher_epochs=40),
}  # fmt: skip

# A loss of a task; None trains on cross-entropy alone. The settings are those published for CIFAR-100: KD's (0.1 CE,
# 0.9 KD, temperature 4) and RKD's (25 and 50) from CRD's comparison (arXiv 1910.10699), DKD's and DIST's from
# their own papers.
Maker = Callable[[Task], nn.Module | None]


def _vrm(**settings) -> Maker:
    def make(task: Task) -> VRMLoss:
        weights = {"alpha": task.alpha, "beta": task.beta, **settings}
        return VRMLoss(**weights)

    return make


METHODS: dict[str, Maker] = {
    "ce": lambda task: None,
    "kd": lambda task: losses.PerView(losses.kd, weight=0.9, ce_weight=0.1),
    "dkd": lambda task: losses.PerView(losses.dkd),
    "dist": lambda task: losses.PerView(losses.dist),
    "rkd": lambda task: losses.OnEmbeddings(losses.rkd),
    "vrm": _vrm(),
}
NO_VIRTUAL_VIEW = "vrm no virtual view"
ABLATIONS: dict[str, Maker] = {
    "vrm percentile 10": _vrm(unreliable_pruning_percentile=10),
    "vrm percentile 60": _vrm(unreliable_pruning_percentile=60),
    "vrm no pruning": _vrm(unreliable_pruning_percentile=100),
    NO_VIRTUAL_VIEW: _vrm(),  # the virtual view is then the real one, which is the trainer's doing
    "vrm inter-sample only": _vrm(beta=0.0),
    "vrm inter-class only": _vrm(alpha=0.0),
    "vrm complete": _vrm(relations="complete"),
    # Relations within quarters of the batch, as four processes without --gather-distributed would have them.
    "vrm local batch": lambda task: partial(_in_parts, loss_fn=_vrm()(task), parts=LOCAL_PARTS),
}
LOCAL_PARTS = 4
# Accuracy against batch size is of these methods.
BATCH_METHODS = ("ce", "kd", "vrm")
BATCH_SIZES = (16, 32, 128, 256)


def _in_parts(*tensors, loss_fn: nn.Module, parts: int) -> torch.Tensor:
    """The mean over ``parts`` of the batch, each taken for a batch of its own."""
    return sum(loss_fn(*chunk) for chunk in zip(*(x.tensor_split(parts) for x in tensors), strict=True)) / parts
