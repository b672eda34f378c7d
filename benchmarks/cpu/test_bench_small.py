"""Forward + backward of small problems under pytest-benchmark: ``pytest benchmarks/cpu/test_bench_small.py``.

Every peer is verified against the float64 oracle before it is timed.
"""

import functools

import pytest
import torch

from benchmarks.harness import oracle
from benchmarks.harness.measure import call_once
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import Case, make_inputs

SIZES = ((64, 100), (256, 100), (128, 1000))
MEMORY = 16 * 2**30


@functools.cache
def solved(batch: int, classes: int) -> oracle.Oracle:
    return oracle.solve(Case("", batch, classes), MEMORY)


@pytest.mark.parametrize("peer", ("eager", "eager+compile", "torch", "cpp"))
@pytest.mark.parametrize(("batch", "classes"), SIZES, ids=lambda n: str(n))
def test_forward_backward(benchmark, batch: int, classes: int, peer: str) -> None:
    usable, reason = PEERS[peer].status()
    if not usable:
        pytest.skip(reason)
    case = Case(peer, batch, classes, threads=torch.get_num_threads())
    logits, labels = make_inputs(case)
    loss = PEERS[peer].build()
    value, grads = call_once(loss, logits, labels, "forward+backward")
    errors = solved(batch, classes).errors(float(value), grads)
    assert oracle.acceptable(*errors, case.torch_dtype), f"{peer} is wrong: (loss, gradient) errors {errors}"
    benchmark.group = f"{case.size}, forward + backward"
    benchmark.extra_info |= {"loss_error": errors[0], "grad_error": errors[1], "threads": case.threads}
    benchmark(call_once, loss, logits, labels, "forward+backward")
