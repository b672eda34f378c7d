"""Where the time on the device goes, by kernel: ``python -m benchmarks.gpu.profile FILE``.

Forward + backward of each GPU backend, relations alone, at four sizes; microseconds a call, the longest kernels first.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.run import on_gpu
from benchmarks.harness.problem import ALPHA, BETA, Case
from vrm_kernels import VRMLoss, backends

CASES = tuple(
    Case(backend, batch, classes, inputs, dtype)
    for batch, classes, inputs, dtype in (
        (64, 100, "trained", "float32"),
        (512, 200, "trained", "float32"),
        (1024, 1000, "trained", "bfloat16"),
        (4096, 1000, "trained", "bfloat16"),
    )
    for backend in ("cuda", "triton")
)
CALLS = 10
KERNELS = 16  # shown of each


def kernels(case: Case) -> list[tuple[str, float, float]]:
    """``(kernel, microseconds a call, launches a call)``."""
    logits, labels = on_gpu(case)
    criterion = VRMLoss(ALPHA, BETA, ce_loss_on_real=False, ce_loss_on_virtual=False, backend=case.peer)

    def step() -> None:
        for x in logits[:2]:
            x.grad = None
        criterion(*logits, labels).backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
    rows = [(k.key, k.self_device_time_total / CALLS, k.count / CALLS) for k in profiler.key_averages()]
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def report(cases=CASES) -> Iterator[str]:
    for case in cases:
        title = f"{case.peer} {case.size} {case.dtype} {case.inputs}"
        try:
            if not backends.REGISTRY[case.peer].status()[0]:
                yield f"== {title}: not usable here"
                continue
            rows = kernels(case)
        except Exception as error:  # the other sizes are to be seen
            yield f"== {title}: {type(error).__name__}: {str(error)[:200]}"
            continue
        yield f"== {title}: {sum(row[1] for row in rows):.1f} us, {sum(row[2] for row in rows):.0f} launches"
        yield from (f"{time:10.1f} us x{count:<5.1f} {name[:100]}" for name, time, count in rows[:KERNELS])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__)
    parser.add_argument("file", type=Path)
    args = parser.parse_args(words)
    with args.file.open("w") as file:
        for line in report():
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
