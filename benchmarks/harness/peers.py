"""What is compared: the loss as its users have it today, and every CPU backend of this package."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.problem import ALPHA, BETA, PERCENTILE, elements, largest_graph
from vrm_kernels import VRMLoss, backends
from vrm_kernels.backends import reference
from vrm_kernels.backends.contract import Views, both_graphs, compute_dtype
from vrm_kernels.graph import constants

# Components of a row chunk of `chunked`: 64 MB a tensor in float32, large enough to keep every core busy.
CHUNK_ELEMENTS = 2**24


class ChunkedLoss(nn.Module):
    """The eager formulas over chunks of rows, each recomputed in backward: what a careful user does about memory today.

    The formulas are the reference's own; only ``[rows, N, D]`` of them is alive at a time, and the ``[M, N]`` mask.
    """

    def __init__(self, alpha: float, beta: float, percentile: float, delta: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta, self.percentile, self.delta = alpha, beta, percentile, delta

    def forward(self, student_real: Tensor, student_virtual: Tensor, teacher_real: Tensor, teacher_virtual: Tensor, y):
        views = Views(student_real, student_virtual, teacher_real, teacher_virtual)
        views = Views(*(x.to(compute_dtype(*views)) for x in views))
        loss = F.cross_entropy(views.student_real, y) + F.cross_entropy(views.student_virtual, y)
        for weight, (sides, probs) in zip((self.alpha, self.beta), both_graphs(views, False), strict=True):
            loss = loss + weight * self.graph(*sides, probs)
        return loss

    def graph(self, a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor, probs) -> Tensor:
        with torch.no_grad():
            mask = reference.kept_edges(probs, a.shape[0], b.shape[0], self.percentile, False)
        rows = max(1, CHUNK_ELEMENTS // b.numel())
        total = a.new_zeros(())
        for part in zip(a.split(rows), teacher_a.split(rows), mask.split(rows), strict=True):
            total = total + checkpoint(self.chunk, *part, b, teacher_b, use_reentrant=False, preserve_rng_state=False)
        return total / (mask.sum().to(total.dtype) + constants.COUNT_EPS)

    def chunk(self, a: Tensor, teacher_a: Tensor, mask: Tensor, b: Tensor, teacher_b: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = reference.relations(teacher_a, teacher_b, constants.RELATION_EPS)
        student = reference.relations(a, b, constants.RELATION_EPS)
        huber = F.huber_loss(student, teacher, reduction="none", delta=self.delta).sum(-1)
        return (huber * mask).sum()


def _loss(backend: str) -> Callable[[], nn.Module]:
    return lambda: VRMLoss(ALPHA, BETA, unreliable_pruning_percentile=PERCENTILE, backend=backend)


@dataclass(frozen=True)
class Peer:
    """One line of every table and plot.

    ``backend`` is the registry's backend that must be usable. ``copies`` are the pairwise tensors that it is known to
    hold at its peak (forward: of the larger graph; forward+backward: of both), a lower bound used to refuse a
    problem that cannot fit before the machine is driven out of memory by trying; 0 where it stores none.
    """

    name: str
    what: str
    backend: str
    make: Callable[[], nn.Module]
    compiled: bool = False
    mode: str | None = None  # torch.compile's
    copies: tuple[float, float] = (0.0, 0.0)

    def status(self) -> tuple[bool, str]:
        """``(usable, why not)`` on this machine."""
        try:
            backends.REGISTRY[backends.resolve(self.backend, torch.device("cpu"))].load()
        except (RuntimeError, ImportError) as error:
            return False, " ".join(str(error).split())
        if self.compiled and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            return False, "torch.compile on the CPU needs a C++ compiler"
        return True, ""

    def build(self) -> nn.Module:
        """The loss ``(S, S', T, T', labels) -> scalar``."""
        loss = self.make()
        # Static shapes: a training loop has one batch size, and it is the form in which the compiler does best.
        return torch.compile(loss, dynamic=False, mode=self.mode) if self.compiled else loss

    def expected_bytes(self, batch: int, classes: int, itemsize: int, backward: bool) -> int:
        """What it needs at the least above its inputs, or 0 where that is not known."""
        components = elements(batch, classes) if backward else largest_graph(batch, classes)
        return int(self.copies[backward] * components * itemsize)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "eager", "the formulas, literally (backend reference)", "reference", _loss("reference"), copies=(2.9, 5.5)
        ),
        Peer("eager+compile", "the same under torch.compile", "reference", _loss("reference"), True, copies=(1.0, 1.0)),
        Peer(
            "chunked",
            "the same in row chunks under activation checkpointing",
            "reference",
            lambda: ChunkedLoss(ALPHA, BETA, PERCENTILE),
        ),
        Peer("torch", "backend torch: matrix products in pure PyTorch", "torch", _loss("torch")),
        Peer("torch+compile", "the same under torch.compile", "torch", _loss("torch"), True),
        Peer("cpp", "backend cpp: the fused C++ kernel", "cpp", _loss("cpp")),
    )
}
