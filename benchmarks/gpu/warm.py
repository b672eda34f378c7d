"""Compiles the Triton variants that the device tests take, in parallel: ``python -m benchmarks.gpu.warm``.

By calling the backend, each process another kind of call, so that what is compiled is what will be asked for.
"""

import itertools
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

# Shapes of tests/backends/triton/test_device.py: of the regimes for small and large graphs, and ragged ones.
SMALL, LARGE = (64, 100), (700, 450)
RAGGED = ((1, 1), (7, 3), (67, 101), (129, 33))
FLOAT64 = (67, 101)  # whose kernels take seconds to compile: one shape
# Those that take longest first.
DTYPES = ("float64", "float32", "bfloat16", "float16")
CALLS = [
    (dtype, shape, relations, percentile)
    for dtype, shape, relations, percentile in itertools.product(
        DTYPES, (LARGE, SMALL, *RAGGED), ("complete", "inter_view"), (30.0, 100.0)
    )
    if dtype != "float64" or shape == FLOAT64
]


def call(dtype: str, shape: tuple[int, int], relations: str, percentile: float, device: str = "cuda") -> float:
    """Loss and gradients, and the loss alone."""
    import vrm_kernels.functional as VF

    logits = [torch.randn(shape).to(device, getattr(torch, dtype)) for _ in range(4)]
    settings = {"relations": relations, "unreliable_pruning_percentile": percentile, "backend": "triton"}
    with torch.no_grad():
        VF.vrm_loss(*logits, None, 1.0, 1.0, False, False, **settings)
    students = [x.requires_grad_() for x in logits[:2]]
    loss = VF.vrm_loss(*students, *logits[2:], None, 1.0, 1.0, False, False, **settings)
    loss.backward()
    return loss.item()


def main() -> None:
    failed = 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(call, *arguments): arguments for arguments in CALLS}
        for done in as_completed(waiting):
            if error := done.exception():
                failed += 1
                print(waiting[done], repr(error)[:300], flush=True)
    print(f"{len(CALLS) - failed} of {len(CALLS)} kinds of call compiled")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
