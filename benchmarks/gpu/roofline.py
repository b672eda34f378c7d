"""What the triton backend should cost on an H100, from counting alone: no GPU is needed, and nothing here is measured.

``python -m benchmarks.gpu.roofline`` prints the table; ``--write`` puts it into docs/triton.md.
"""

import argparse
from collections import Counter
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from benchmarks.gpu.triton_kernels import DOCUMENT, Call, _make
from benchmarks.report.table import rewrite
from vrm_kernels.backends.triton import large, plan

BEGIN, END = "<!-- roofline:begin -->", "<!-- roofline:end -->"
# NVIDIA's data sheet of the H100 SXM: dense products, and device memory. A kernel reaches two thirds of them or so.
RATES = {torch.bfloat16: 989e12, torch.float32: 67e12}
BYTES_PER_SECOND = 3.35e12
LAUNCH_SECONDS = 3e-6  # of a small kernel in a replayed graph
CALLS = [
    Call(b, c, dtype)
    for b, c in ((64, 100), (256, 100), (512, 200), (1024, 1000), (4096, 1000), (65536, 1000), (1024, 21841))
    for dtype in (torch.float32, torch.bfloat16)
]


def count(call: Call) -> tuple[Counter, float]:
    """``(launches by kernel, multiply-adds of the library's products)`` of one forward + backward."""
    launches, work = Counter(), [0.0]

    def product(x, y, out):
        launches["product"] += 1
        work[0] += x.numel() * y.shape[-2]

    patches = (
        mock.patch.object(JITFunction, "run", lambda kernel, *_, **__: launches.update([kernel.__name__])),
        mock.patch.object(large, "product", product),
    )
    with patches[0], patches[1], mock.patch.object(plan, "on_nvidia", lambda device: True):
        _make(call)
    return launches, work[0]


def pairwise_bytes(call: Call, fused: bool, precision: plan.Precision) -> float:
    """Of every edge, what is written to and read from device memory, or the second-level cache."""
    edges = call.batch**2 + call.classes**2
    entropy = 4 + 4 * 2 + 4  # written; two more passes read it (the first is in the product's kernel or reads it too)
    if fused:
        return edges * (entropy + 8 + 4 + 8)  # beta, gamma, and a zero where no edge is literal; read once a view
    parts = 2 if precision.gradient_terms == 3 else 1
    return edges * (entropy + 4 + 2 * 12 + 3 * 2 * parts * precision.operand.itemsize)


def estimate(call: Call) -> str:
    b, c = call.batch, call.classes
    fused = plan.use_fused(torch.float32, b * c * (b + c))
    precision = plan.precision({call.dtype}, torch.float32, b * c, fused, torch.device("cpu"))
    launches, work = count(call)
    unit_work = b * c * (b + c)
    unit = 2 * unit_work / RATES[call.dtype]
    if fused:
        work, rate = 8 * unit_work, RATES[torch.float32]  # tl.dot, one for the entropy, three and four
    else:
        rate = RATES[precision.operand]
    arithmetic, memory = 2 * work / rate, pairwise_bytes(call, fused, precision) / BYTES_PER_SECOND
    overhead = sum(launches.values()) * LAUNCH_SECONDS
    total = arithmetic + memory + overhead
    dtype = str(call.dtype).removeprefix("torch.")
    numbers = (
        f"{b}x{c}",
        dtype,
        "small" if fused else "large",
        sum(launches.values()),
        f"{work / unit_work:.0f}",
        *(f"{1e6 * x:.3g}" for x in (unit, arithmetic, memory, overhead, total)),
        f"{total / unit:.3g}",
    )
    return "| " + " | ".join(map(str, numbers)) + " |"


def table() -> str:
    head = (
        "| size | logits | regime | launches and products | products (units) | one unit, µs | arithmetic, µs | "
        "pairwise memory, µs | launches, µs | sum, µs | sum, units |"
    )
    return "\n".join([head, "|---|---|---|" + "---:|" * 8, *map(estimate, CALLS)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.roofline", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/triton.md")
    args = parser.parse_args()
    text = table()
    print(text)
    if args.write:
        rewrite(DOCUMENT, text, BEGIN, END)


if __name__ == "__main__":
    main()
