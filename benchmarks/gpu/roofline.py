"""What the stages of docs/gpu.md should cost on an H100, by counting: nothing here is measured, and no GPU is needed.

``python -m benchmarks.gpu.roofline`` prints the table; ``--write`` puts it into docs/gpu.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.report.table import rewrite
from vrm_kernels.graph import forms

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- stages:begin -->", "<!-- stages:end -->"
# Measured on one H100 80GB HBM3: a large copy, large products in bfloat16, float32 multiply-adds.
BYTES, MATRIX, FLOAT = 3.05e12, 773e12, 52e12
LAUNCH, TRIP = 1.5e-6, 0.6e-6  # of a kernel in a replayed graph; a dependent load from memory
PERCENTILE = 30.0
TILE = 2048  # vertices of a side of what the CUDA backend's dense form takes at a time, with launches of its own
SIZES = (
    ((64, 100), "f32"),
    ((256, 100), "f32"),
    ((512, 200), "f32"),
    ((1024, 1000), "f32"),
    ((1024, 1000), "bf16"),
    ((4096, 1000), "f32"),
    ((4096, 1000), "f32 high"),
    ((4096, 1000), "bf16"),
    ((65536, 1000), "bf16"),
    ((1024, 21841), "bf16"),
)


class Products(NamedTuple):
    """Of a graph's own size: for the entropies, the edges, and the gradient. Those of sums of two terms are three.
    tests/backends/cuda/test_host.py counts what the CUDA backend multiplies."""

    entropy: int
    edges: int
    gradient: int


PRODUCTS = {
    "f32": Products(1, 3, 4),
    "f32 high": Products(3, 9, 12),
    "f32 medium": Products(3, 3, 4),
    "f16": Products(3, 9, 4),
    "bf16": Products(3, 3, 4),
}


class Stage(NamedTuple):
    """One stage of both graphs: what it moves through memory, what it computes, and what waits for what."""

    name: str
    launches: int
    trips: int
    bytes: float = 0.0
    float_operations: float = 0.0
    matrix_operations: float = 0.0

    def seconds(self) -> float:
        work = max(self.bytes / BYTES, self.float_operations / FLOAT, self.matrix_operations / MATRIX)
        return self.launches * LAUNCH + self.trips * TRIP + work


def stages(batch: int, classes: int, dtype: str) -> Iterator[Stage]:
    logits, edges, share = batch * classes, batch**2 + classes**2, PERCENTILE / 100
    unit = 2.0 * logits * (batch + classes)  # operations of one product of both graphs
    read, operand = 4 if "f32" in dtype else 2, 4 if dtype == "f32" else 2  # bytes of a logit, of an operand's term
    products = PRODUCTS[dtype]
    coefficient = operand * (2 if products.gradient > 4 else 1)
    graphs = [(batch, batch, classes), (classes, classes, batch)]
    literal = forms.form(graphs, PERCENTILE) == "literal"
    levels = max(forms.levels(m * n) for m, n, _ in graphs)
    tiles_of = [-(-m // TILE) * -(-n // TILE) for m, n, _ in graphs]
    # Entropies that are not stored are computed for the threshold and again for the edges.
    times = [2 if m * n > forms.STORED_EDGES else 1 for m, n, _ in graphs]
    ranking = sum(2.0 * m * n * dims * k for (m, n, dims), k in zip(graphs, times, strict=True))
    tiles, entropy_tiles = sum(tiles_of), sum(n * k for n, k in zip(tiles_of, times, strict=True))
    copied = (8 + 4) * 4 if literal else (4 + 4) * read  # vertices of both graphs; probabilities, surprisals
    yield Stage("prepare", 1, 4, logits * (4 * read + copied + 2 * 4), 30.0 * 4 * logits)
    arithmetic = (ranking, 0.0) if literal or dtype == "f32" else (0.0, products.entropy * ranking)
    yield Stage("entropy", 1 if literal else entropy_tiles, 2, 4.0 * edges, *arithmetic)
    # A block of 1024 threads reads what is left about ten times, at two operations a thread and microsecond.
    left = min(edges, forms.SELECT_EDGES)
    yield Stage("select", 2 * levels + 1, 14 * (levels + 1), 4.0 * edges, 10.0 * left * 132)
    if literal:
        # Two visits of a kept component; FLOAT counts a multiply-add, one instruction, twice.
        yield Stage("literal", 1, 5, 0.0, 2 * share * unit * forms.LITERAL_VISIT)
    else:
        parts = 4 if products.edges > 3 else 1  # of a packed vector
        yield Stage("pack", 8, 3, logits * (4 * read + 2 * 6 * operand * parts))
        dense = products.edges * unit
        arithmetic = (dense, 0.0) if dtype == "f32" else (30.0 * edges, dense)
        yield Stage("dense", 4 * tiles, 3, edges * (4 + 2 * coefficient + 1 / 8), *arithmetic)
        yield Stage("literal", tiles, 3)  # where all edges are certified
        gradient = products.gradient * unit
        arithmetic = (gradient, 0.0) if dtype == "f32" else (0.0, gradient)
        yield Stage(
            "gradients", (products.gradient + 2) * tiles, 3, edges * 4 * coefficient + 4.0 * 8 * logits, *arithmetic
        )
    yield Stage("finish", 1, 2, logits * 4 * 4 * 2)


def table() -> str:
    names = ("prepare", "entropy", "select", "pack", "dense", "literal", "gradients", "finish")
    lines = [
        "| B x C | logits | form | " + " | ".join(names) + " | sum, µs | units |",
        "|---|---|---|" + "---:|" * (len(names) + 2),
    ]
    for (batch, classes), dtype in SIZES:
        found = {stage.name: stage.seconds() for stage in stages(batch, classes, dtype)}
        total = sum(found.values())
        unit = 2.0 * batch * classes * (batch + classes) / (FLOAT if dtype == "f32" else MATRIX)
        cells = [f"{1e6 * found[name]:.3g}" if name in found else "" for name in names]
        kind = "dense" if "dense" in found else "literal"
        row = [f"{batch} x {classes}", dtype, kind, *cells, f"{1e6 * total:.3g}", f"{total / unit:.3g}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.roofline", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/gpu.md")
    args = parser.parse_args()
    text = table()
    print(text)
    if args.write:
        rewrite(DOCUMENT, text, BEGIN, END)


if __name__ == "__main__":
    main()
