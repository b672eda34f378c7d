"""Compiles the Triton variants that the device tests take, in parallel: ``python -m benchmarks.gpu.warm``.

By calling the backend, each process another kind of call, so that what is compiled is what will be asked for.
"""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch

# Shapes of tests/backends/triton/test_device.py: of small and of large graphs, and ragged ones.
SMALL, LARGE = (64, 100), (700, 450)
RAGGED = ((1, 1), (7, 3), (67, 101), (129, 33))
FLOAT64 = (67, 101)  # whose kernels take seconds to compile: one shape


class Call(NamedTuple):
    backend: str
    dtype: str
    shape: tuple[int, int]
    relations: str = "inter_view"
    percentile: float = 30.0
    form: str = ""  # where it is not the one that the sizes ask for
    precision: str = "highest"


def _calls() -> Iterator[Call]:
    """Those that take longest first."""
    settings = list(itertools.product(("complete", "inter_view"), (30.0, 100.0)))
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        shapes = RAGGED if dtype == "float32" else (FLOAT64,)
        for setting in settings:
            for form in ("dense", "literal"):
                yield from (Call("triton", dtype, shape, *setting, form) for shape in shapes)
            if dtype != "float64":
                yield Call("triton", dtype, LARGE, *setting)
    yield from (Call("triton", "float32", SMALL, *setting) for setting in settings)
    for precision in ("high", "medium"):
        yield Call("triton", "float32", FLOAT64, percentile=100.0, form="dense", precision=precision)


CALLS = list(_calls())


def call(what: Call, device: str = "cuda") -> float:
    """Loss and gradients, and the loss alone."""
    import vrm_kernels.functional as VF
    from vrm_kernels.graph import forms

    instructions = {"": forms.LITERAL_INSTRUCTIONS, "literal": 2**60, "dense": 0}[what.form]
    torch.set_float32_matmul_precision(what.precision)
    logits = [torch.randn(what.shape).to(device, getattr(torch, what.dtype)) for _ in range(4)]
    settings = {
        "relations": what.relations, "unreliable_pruning_percentile": what.percentile, "backend": what.backend,
    }  # fmt: skip
    with mock.patch.object(forms, "LITERAL_INSTRUCTIONS", instructions):
        with torch.no_grad():
            VF.vrm_loss(*logits, None, 1.0, 1.0, False, False, **settings)
        students = [x.requires_grad_() for x in logits[:2]]
        loss = VF.vrm_loss(*students, *logits[2:], None, 1.0, 1.0, False, False, **settings)
        loss.backward()
    return loss.item()


def main() -> None:
    failed = 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(call, what): what for what in CALLS}
        for done in as_completed(waiting):
            if error := done.exception():
                failed += 1
                print(waiting[done], repr(error)[:300], flush=True)
    print(f"{len(CALLS) - failed} of {len(CALLS)} kinds of call compiled")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
