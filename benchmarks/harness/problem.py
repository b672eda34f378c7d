"""What is measured: the settings of the loss, the inputs, and the name of one measurement."""

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 16.0
BETA = 8.0
PERCENTILE = 30.0
MODES = ("forward", "forward+backward")
INPUTS = {
    "random": "student and teacher logits independent, standard normal: an untrained student, the worst case",
    "trained": "teacher 2 N(0, 1) + 10 on the label's class, its virtual view 1 N(0, 1) away, the student 0.5 N(0, 1) "
    "from the teacher in each view: a student that has learnt",
}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def parse_size(text: str) -> tuple[int, int]:
    """A command line's ``64x100``, for argparse."""
    try:
        b, c = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a size is BxC, such as 64x100, not {text!r}") from None
    return b, c


@dataclass(frozen=True)
class Case:
    """One peer on one problem; both modes are measured in one process."""

    peer: str
    batch: int
    classes: int
    inputs: str = "random"
    dtype: str = "float32"
    threads: int = 1

    @property
    def size(self) -> str:
        return f"{self.batch}x{self.classes}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def elements(batch: int, classes: int) -> int:
    """Components of all relations of both graphs, ``B B C + C C B``: what the loss's work is proportional to."""
    return batch * classes * (batch + classes)


def largest_graph(batch: int, classes: int) -> int:
    """Components of the relations of the larger graph alone."""
    return batch * classes * max(batch, classes)


def make_inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """``([S, S', T, T'] each [B, C], labels [B])``, the same numbers for every peer; the student's require grad."""
    b, c = case.batch, case.classes
    generator = torch.Generator().manual_seed(b * 1_000_003 + c)

    def normal() -> Tensor:
        return torch.randn(b, c, generator=generator)

    labels = torch.randint(c, (b,), generator=generator)
    if case.inputs == "random":
        logits = [normal() for _ in range(4)]
    elif case.inputs == "trained":
        teacher = 2 * normal() + 10 * F.one_hot(labels, c)
        virtual = teacher + normal()
        logits = [teacher + 0.5 * normal(), virtual + 0.5 * normal(), teacher, virtual]
    else:
        raise ValueError(f"unknown inputs {case.inputs!r}: one of {', '.join(INPUTS)}")
    logits = [x.to(case.torch_dtype).requires_grad_(k < 2) for k, x in enumerate(logits)]
    # A cast or an expression leaves a graph behind: what is measured starts from leaves.
    return [x.detach().requires_grad_(x.requires_grad) for x in logits], labels
