"""The loss of one global batch on 1, 2, 3 and 4 processes: ``python -m benchmarks.cpu.scaling``.

Each process has one thread. Writes benchmarks/results/scaling-*.csv and the tables between the
markers of docs/scaling.md.
"""

import argparse
import datetime
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import vrm_kernels.functional as VF
from benchmarks.harness import environment, records
from benchmarks.harness.problem import ALPHA, BETA, PERCENTILE, Case, make_inputs
from benchmarks.report import table
from vrm_kernels.distributed.collectives import Group
from vrm_kernels.graph import selection

SIZES = ((512, 100), (2048, 100), (2048, 1000), (4096, 100))
WORLDS = (1, 2, 3, 4)
PAGE = environment.ROOT / "docs" / "scaling.md"
MEBIBYTE = 2**20

# The projection's assumptions, none of them measured: floating-point operations a second that one GPU's matrix products
# reach on half-precision inputs, and bytes a second that it receives from GPUs beside it and from other machines.
RATE = 2e14
BESIDE, ACROSS = 2e11, 4e10
GPUS_BESIDE = 8
PRODUCTS = 8  # of the graph's own size, for loss and gradients as matrix products
PROJECTED = ((4096, 8), (32768, 8), (32768, 64), (262144, 64), (262144, 1024))
PROJECTED_CLASSES = 1000


def bytes_received(world: int, batch: int, classes: int, itemsize: int = 4) -> int:
    """What one process receives in a step with gradients, by docs/scaling.md; ``batch`` is the global one."""
    others = batch * (world - 1) // world  # rows
    own = classes // world  # columns
    gathered = 2 * others * classes * itemsize + others * own * (2 * itemsize + 4)
    gradients = others * (classes + own) * 4
    # Where a bracket is taken, a sample and counts take as much as the first digit and half of the second.
    counts = 2 * 2 * 8 * sum(2**bits for _, bits in selection.digits(32))
    return gathered + gradients + counts


def _rows(rank: int, world: int, batch: int) -> slice:
    return slice(batch * rank // world, batch * (rank + 1) // world)


def _worker(rank: int, world: int, folder: str, batch: int, classes: int, repeats: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
            timeout=datetime.timedelta(minutes=5),
        )  # fmt: skip
    logits, labels = make_inputs(Case("cpp", batch, classes))
    rows = _rows(rank, world, batch)
    part = [x.detach()[rows].clone().requires_grad_(x.requires_grad) for x in logits]

    def step() -> torch.Tensor:
        loss = VF.vrm_loss(*part, labels[rows], ALPHA, BETA, unreliable_pruning_percentile=PERCENTILE,
                           gather_distributed=True)  # fmt: skip
        loss.backward()
        return loss.detach()

    def exchange() -> None:
        """What a step sends, and nothing else."""
        if world == 1:
            return
        group = Group(dist.group.WORLD.group_name)
        group.sizes = [batch // world] * world
        group.exchange([0.0] * 15, torch.device("cpu"))
        real, virtual, teacher_real, teacher_virtual = (x.detach()[: batch // world] for x in part)
        rows = [group.start_gather_rows(x) for x in (virtual, teacher_virtual)]
        columns = [group.start_swap_columns(x) for x in (real, real, teacher_real)]
        for _, bits in selection.digits(32):
            group.sum(torch.zeros(2, 2, 2**bits, dtype=torch.int64), "")
        rows, columns = ([wait() for wait in waits] for waits in (rows, columns))
        for wait in (group.start_return_columns(columns[0], real.clone()), group.start_sum_rows(rows[0])):
            wait()
        group.sum(torch.zeros(5, dtype=torch.float64), "")

    loss = step()  # verified against one process on the whole batch
    if rank == 0:
        alone = VF.vrm_loss(*(x.detach() for x in logits), labels, ALPHA, BETA)
        assert torch.allclose(loss, alone, rtol=1e-4), (loss, alone)
    results = {}
    for name, call in (("step", step), ("exchange", exchange)):
        call()
        before = _loopback_bytes()
        samples = []
        for _ in range(repeats):
            if world > 1:
                dist.barrier()
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        if world > 1:
            # The slowest process's time is the step's.
            samples = torch.tensor(samples)
            dist.all_reduce(samples, dist.ReduceOp.MAX)
            dist.barrier()
        results[name] = sorted(map(float, samples))[repeats // 2] * 1e3
        results[f"{name}_bytes"] = (_loopback_bytes() - before) // repeats // world
    if rank == 0:
        torch.save(results, Path(folder, "results"))
    if world > 1:
        dist.destroy_process_group()


def _loopback_bytes() -> int:
    """Bytes that the machine has received from itself so far: the processes talk over the loopback device."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")), 0)


def measure(world: int, batch: int, classes: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step (forward + backward) and of what it sends alone, and bytes a process received."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (world, folder, batch, classes, repeats), nprocs=world, start_method="spawn")
        return torch.load(Path(folder, "results"))


def project(batch: int, classes: int, gpus: int) -> dict[str, float]:
    """Milliseconds of compute and of sending, and GiB received, of one of ``gpus`` GPUs, half-precision logits."""
    compute = PRODUCTS * 2 * (batch * batch * classes + classes * classes * batch) / gpus / RATE
    received = bytes_received(gpus, batch, classes, itemsize=2)
    speed = BESIDE if gpus <= GPUS_BESIDE else ACROSS
    return {"compute": 1e3 * compute, "send": 1e3 * received / speed, "received": received / 2**30}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.scaling", description=__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="of each step (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="whose tables to rewrite (default: %(default)s)")
    args = parser.parse_args(arguments)
    where = environment.describe()
    rows = []
    for batch, classes in SIZES:
        for world in WORLDS:
            result = measure(world, batch, classes, args.repeats)
            row = {
                "processes": world,
                "threads_each": 1,
                "batch": batch,
                "classes": classes,
                "step_ms": f"{result['step']:.4g}",
                "exchange_ms": f"{result['exchange']:.4g}",
                "received_mb": f"{result['step_bytes'] / MEBIBYTE:.4g}",
                "formula_mb": f"{bytes_received(world, batch, classes) / MEBIBYTE:.4g}" if world > 1 else "0",
                **where,
            }
            rows.append(row)
            print(", ".join(f"{name} {row[name]}" for name in list(row)[:8]), flush=True)
    path = environment.results_file("scaling", where)
    records.append(path, rows, tuple(rows[0]))
    table.rewrite(args.page, f"{_table(rows, path, where, args.page)}\n\n{_projection()}")
    print(f"{path}\n{args.page}: table from {path.name}")


def _table(rows: list[dict], path: Path, where: dict[str, str], page: Path) -> str:
    head = [
        "B x C",
        "processes",
        "a step, ms",
        "times as fast",
        "sending alone, ms",
        "received, MiB",
        "by the formula, MiB",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    alone = {(row["batch"], row["classes"]): float(row["step_ms"]) for row in rows if row["processes"] == 1}
    for row in rows:
        size = row["batch"], row["classes"]
        faster = f"{alone[size] / float(row['step_ms']):.2f}"
        lines.append(
            [f"{size[0]} x {size[1]}", str(row["processes"]), row["step_ms"], faster, row["exchange_ms"],
             row["received_mb"], row["formula_mb"]]
        )  # fmt: skip
    source = Path(os.path.relpath(path, page.resolve().parent)).as_posix()
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + (
        f"\n\nForward + backward with the cross-entropies, float32, one thread a process on {where['cores']} cores, "
        f"gloo over the loopback device; received: by one process, TCP's own bytes included. {where['cpu']}, "
        f"{where['isa']}, torch {where['torch']}, "
        f"commit {where['commit']}"
        f"{' with changes' if where['dirty'] == 'yes' else ''}; [{path.name}]({source})."
    )


def _projection() -> str:
    head = ["global B", "GPUs", "samples a GPU", "compute, ms", "sending, ms", "received, GiB"]
    lines = [head, ["---:"] * len(head)]
    for batch, gpus in PROJECTED:
        x = project(batch, PROJECTED_CLASSES, gpus)
        lines.append(
            [
                str(batch),
                str(gpus),
                str(batch // gpus),
                f"{x['compute']:.3g}",
                f"{x['send']:.3g}",
                f"{x['received']:.2g}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + (
        f"\n\nA projection, not a measurement: C = {PROJECTED_CLASSES}, half-precision logits, {PRODUCTS} matrix "
        f"products at an assumed {RATE / 1e12:g} TFLOP/s a GPU, {BESIDE / 1e9:g} GB/s among {GPUS_BESIDE} GPUs of a "
        f"machine and "
        f"{ACROSS / 1e9:g} GB/s a GPU across machines, no overlap, no latencies."
    )


if __name__ == "__main__":
    main()
