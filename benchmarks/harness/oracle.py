"""The right answer, in float64, once per problem; and whether a peer's answer is it.

``python -m benchmarks.harness.oracle CASE FILE`` solves a case (as JSON) in a process of its own.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import memory
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import Case, elements, make_inputs

# The literal formulas in float64 up to here: about 20 s on two cores.
LITERAL_ELEMENTS = 2e8
# The torch backend ranks all edges of a graph at once: up to here in a minute or two, and 12 GB.
WHOLE_EDGES = 2**29
# Beyond what any oracle can do whole, the peer is verified on this many of the samples.
FIRST_SAMPLES = 4096
# (loss, gradient) error that passes, relative to the relation terms alone: the cross-entropies are the same code in
# every peer. The gradient's is for the pruning mask: an entropy within rounding of the threshold may fall on either
# side, and one edge in some 1e6 that does shows as 1e-3 of the gradient (float32 eager against float64: 3e-4 at
# 512x100). A wrong formula shows as more than a percent. How small the error really was is in the results.
TOLERANCE = {
    torch.float64: (1e-6, 1e-5),
    torch.float32: (1e-4, 5e-3),
    torch.bfloat16: (1e-3, 5e-2),
    torch.float16: (1e-3, 2e-2),
}


@dataclass
class Oracle:
    """The loss and both student gradients of the first ``rows`` samples, and how much of them the relations are."""

    source: str
    rows: int
    loss: float
    relation_loss: float
    grads: list[Tensor]  # two [rows, C], float64
    relation_norm: float

    def errors(self, loss: float, grads: list[Tensor] | None) -> tuple[float, float | None]:
        """``(loss_error, grad_error)`` as the results define them."""
        loss_error = abs(loss - self.loss) / abs(self.relation_loss)
        if grads is None:
            return loss_error, None
        squares = sum((x.double() - y).square().sum() for x, y in zip(grads, self.grads, strict=True))
        return loss_error, float(squares.sqrt()) / self.relation_norm


def acceptable(loss_error: float, grad_error: float | None, dtype: torch.dtype) -> bool:
    """Written so that NaN is not."""
    loss_tolerance, grad_tolerance = TOLERANCE[dtype]
    return loss_error <= loss_tolerance and (grad_error is None or grad_error <= grad_tolerance)


def first(tensors: list[Tensor], rows: int) -> list[Tensor]:
    """The first ``rows`` samples as leaves that require what the whole did."""
    return [x.detach()[:rows].clone().requires_grad_(x.requires_grad) for x in tensors]


def solve(case: Case, memory_limit: int) -> Oracle:
    """The best oracle that fits: see :func:`candidates`.

    Raises:
        RuntimeError: none does.
    """
    for peer, dtype, rows in candidates(case, memory_limit):
        if PEERS[peer].status()[0]:
            try:
                return _solve(case, peer, dtype, rows)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_exhausted(error):
                    raise
    raise RuntimeError(f"no oracle can solve {case.size} here")


def candidates(case: Case, memory_limit: int) -> Iterator[tuple[str, str, int]]:
    """``(peer, dtype, rows)``, best first: the literal formulas, whole or in chunks, then the torch backend, whose
    parity with them the tests establish."""
    if elements(case.batch, case.classes) <= LITERAL_ELEMENTS:
        if PEERS["eager"].expected_bytes(case.batch, case.classes, 8, True) <= memory_limit / 4:
            yield "eager", "float64", case.batch
        yield "chunked", "float64", case.batch
    else:
        if max(case.batch, case.classes) ** 2 <= WHOLE_EDGES:
            yield "torch", "float64", case.batch
            yield "torch", "float32", case.batch
        yield "torch", "float64", min(case.batch, FIRST_SAMPLES)


def _solve(case: Case, peer: str, dtype: str, rows: int) -> Oracle:
    logits, labels = make_inputs(case)  # rounded to the case's dtype: that is the problem
    logits = [x.detach().to(getattr(torch, dtype)).requires_grad_(x.requires_grad) for x in first(logits, rows)]
    loss = PEERS[peer].build()(*logits, labels[:rows])
    loss.backward()
    student = first(logits[:2], rows)
    cross_entropy = sum(F.cross_entropy(x, labels[:rows]) for x in student)
    cross_entropy.backward()
    grads = [x.grad.double() for x in logits[:2]]
    relations = torch.stack([x - y.grad for x, y in zip(grads, student, strict=True)])
    part = "" if rows == case.batch else f", first {rows} samples"
    return Oracle(
        source=f"{peer} {dtype}{part}",
        rows=rows,
        loss=loss.item(),
        relation_loss=loss.item() - cross_entropy.item(),
        grads=grads,
        relation_norm=float(relations.norm()),
    )


def save(oracle: Oracle, path: Path) -> None:
    torch.save(vars(oracle), path)


def load(path: Path) -> Oracle:
    return Oracle(**torch.load(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    parser.add_argument("file", type=Path)
    parser.add_argument("--memory", type=int, required=True, help="bytes that it may take")
    args = parser.parse_args()
    torch.set_num_threads(args.case.threads)
    memory.limit_address_space(args.memory)
    save(solve(args.case, args.memory), args.file)


if __name__ == "__main__":
    main()
