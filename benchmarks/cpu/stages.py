"""Where the `cpp` backend's time goes, stage by stage, in GEMM units: ``python -m benchmarks.cpu.stages``.

Writes benchmarks/results/stages-*.csv and the table between the markers of docs/cpu.md.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from benchmarks.harness import environment, records
from benchmarks.harness.measure import gemm_unit
from benchmarks.harness.problem import ALPHA, BETA, PERCENTILE, Case, make_inputs
from benchmarks.report import table
from vrm_kernels import backends
from vrm_kernels.backends.contract import LossSettings, Views
from vrm_kernels.graph.constants import RELATION_EPS

SIZES = ((64, 100), (256, 100), (512, 100), (128, 1000), (1024, 1000), (4096, 100))
STAGES = ("softmax", "center", "pack", "entropy", "threshold", "edges", "gradient")  # in the order of csrc/cpu/stages.h
# Least work in units of one fused multiply-add a component of every edge: the entropy is one product; a kept edge takes
# three dot products and four additions of a multiple of a vector. The rest touches no edge.
FLOORS = {"entropy": 1.0, "edges": 7 * PERCENTILE / 100}
PAGE = environment.ROOT / "docs" / "cpu.md"


def measure(batch: int, classes: int, threads: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of every stage of forward + backward, of the whole call, and the GEMM unit."""
    chosen = backends.REGISTRY["cpp"].load()
    settings = LossSettings(ALPHA, BETA, True, True, PERCENTILE, 1.0, RELATION_EPS, False, 0.0, -100)
    case = Case("cpp", batch, classes, threads=threads)
    torch.set_num_threads(threads)
    logits, labels = make_inputs(case)
    views = Views(*(x.detach() for x in logits))

    def call():
        chosen.vrm_loss(views, labels, None, settings, True)

    for _ in range(3):
        call()
    samples: list[dict[str, float]] = []
    unit = gemm_unit(case, seconds, 2**34)
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        torch.ops.vrm_kernels.cpu_take_stage_seconds()
        start = time.perf_counter()
        call()
        total = time.perf_counter() - start
        stages = torch.ops.vrm_kernels.cpu_take_stage_seconds()
        samples.append({**dict(zip(STAGES, stages, strict=True)), "total": total})
    unit = min(unit, gemm_unit(case, seconds, 2**34))
    median = {name: sorted(s[name] for s in samples)[len(samples) // 2] * 1e3 for name in samples[0]}
    return {**median, "gemm_unit": unit}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.stages", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="of repeats, each size (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="whose table to rewrite (default: %(default)s)")
    args = parser.parse_args(arguments)
    where = environment.describe()
    rows = []
    for batch, classes in SIZES:
        result = measure(batch, classes, args.threads, args.seconds)
        for stage in (*STAGES, "total"):
            rows.append(
                {
                    "batch": batch,
                    "classes": classes,
                    "threads": args.threads,
                    "stage": stage,
                    "time_ms": f"{result[stage]:.4g}",
                    "gemm_unit_ms": f"{result['gemm_unit']:.4g}",
                    "gemm_units": f"{result[stage] / result['gemm_unit']:.3g}",
                    "floor_units": FLOORS.get(stage, ""),
                    **where,
                }
            )
        print(f"{batch}x{classes}: " + ", ".join(f"{s} {result[s]:.3g} ms" for s in (*STAGES, "total")), flush=True)
    path = environment.results_file("stages", where)
    records.append(path, rows, tuple(rows[0]))
    table.rewrite(args.page, _table(rows, path, where, args.page))
    print(f"{path}\n{args.page}: table from {path.name}")


def _table(rows: list[dict], path: Path, where: dict[str, str], page: Path) -> str:
    sizes = list(dict.fromkeys((row["batch"], row["classes"]) for row in rows))
    units = {(row["batch"], row["classes"], row["stage"]): row["gemm_units"] for row in rows}
    lines = [["stage", *(f"{b} x {c}" for b, c in sizes), "floor"], ["---", *["---:"] * (len(sizes) + 1)]]
    for stage in (*STAGES, "total"):
        floor = f"{FLOORS[stage]:g}" if stage in FLOORS else f"{sum(FLOORS.values()):g}" if stage == "total" else ""
        lines.append([stage, *(units[(*size, stage)] for size in sizes), floor])
    lines.append(["one unit, ms", *(_unit(rows, size) for size in sizes), ""])
    source = Path(os.path.relpath(path, page.resolve().parent)).as_posix()
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + (
        f"\n\nGEMM units; float32, {rows[0]['threads']} threads, random inputs, percentile {PERCENTILE:g}, the "
        "whole loss with its gradients. Where each graph has a thread of its own (64 x 100) the stages add up to more "
        f"than the total. {where['cpu']}, {where['isa']}, "
        f"torch {where['torch']}, commit {where['commit']}{' with changes' if where['dirty'] == 'yes' else ''}; "
        f"[{path.name}]({source})."
    )


def _unit(rows: list[dict], size: tuple[int, int]) -> str:
    return next(row["gemm_unit_ms"] for row in rows if (row["batch"], row["classes"]) == size)


if __name__ == "__main__":
    main()
