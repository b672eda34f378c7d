"""README's five rows and the GPU table of docs/benchmarks.md: ``python -m benchmarks.report.summary``.

From the newest CPU results, and from the GPU results of the commit that was measured last. Rewrites what stands between
the markers of each page, and nothing else.
"""

import argparse
import os
from pathlib import Path

from benchmarks.harness import environment, records
from benchmarks.harness.problem import elements
from benchmarks.harness.records import Row
from benchmarks.report.table import PAGE, cell, ratio, rewrite, table, time

README = environment.ROOT / "README.md"
ROWS = ("<!-- rows:begin -->", "<!-- rows:end -->")
GPU = ("<!-- gpu:begin -->", "<!-- gpu:end -->")
SIZES = ((64, 100), (256, 100), (128, 1000), (1024, 1000), (4096, 1000))
GPU_PEERS = ("eager", "eager+compile", "eager+graphs", "chunked", "torch", "triton", "cuda")


class Measured:
    """Forward + backward on random inputs, from several files: found by peer, size and dtype."""

    def __init__(self, paths: list[Path], columns: tuple[str, ...] = records.COLUMNS) -> None:
        self.paths = paths
        rows = [row for path in paths for row in records.read(path, columns)]
        threads = max(row["threads"] for row in rows)
        self.rows = {
            (row["peer"], row["batch"], row["classes"], row["dtype"]): row
            for row in rows
            if (row["mode"], row["inputs"], row["threads"]) == ("forward+backward", "random", threads)
            and row["note"] != "not run: out of time"
        }
        self.first = rows[0]

    def get(self, peer: str, size: tuple[int, int], dtype: str = "float32") -> Row | None:
        return self.rows.get((peer, *size, dtype))

    def links(self, page: Path) -> str:
        """Where the numbers are, as links on ``page``."""
        places = [(path, Path(os.path.relpath(path, page.resolve().parent)).as_posix()) for path in self.paths]
        return ", ".join(f"[{path.name}]({place})" for path, place in places)


def gpu_files(folder: Path) -> list[Path]:
    """The GPU results of the commit that was measured last.

    Raises:
        FileNotFoundError: there are none.
    """
    commit = records.read(records.newest(folder, "gpu-*.csv"))[0]["commit"]
    return sorted(path for path in folder.glob("gpu-*.csv") if records.read(path)[0]["commit"] == commit)


def rows(cpu: Measured, gpu: Measured, page: Path) -> str:
    """README's table."""

    def row(size):
        cells = []
        for results, ours in ((cpu, "cpp"), (gpu, "cuda")):
            eager, mine = results.get("eager", size), results.get(ours, size)
            cells += [cell(eager, _ms), cell(mine, _ms), ratio(eager, mine)]
        return cells

    processor = f"{cpu.first['cores']} CPU cores"
    head = [f"eager, {processor}", "`cpp`", "", f"eager, {gpu.first['gpu']}", "`cuda`", ""]
    where = [f"torch {first['torch']}, commit {first['commit']}" for first in (cpu.first, gpu.first)]
    return (
        f"{table(head, SIZES, row)}\n\nLoss and gradients, float32, by call; empty: not measured. CPU: "
        f"{cpu.first['cpu']}, {cpu.first['isa']}, {where[0]} ({cpu.links(page)}). GPU: {where[1]} ({gpu.links(page)})."
    )


def gpu_table(gpu: Measured, page: Path) -> str:
    """By call and by replay of a CUDA graph, for each size and dtype."""
    sizes = sorted({(b, c) for _, b, c, _ in gpu.rows}, key=lambda size: elements(*size))
    parts = []
    for dtype in sorted({dtype for *_, dtype in gpu.rows}, reverse=True):  # float32 first
        peers = [peer for peer in GPU_PEERS if any(key[0] == peer and key[3] == dtype for key in gpu.rows)]

        def row(size, peers=peers, dtype=dtype):
            return [cell(gpu.get(peer, size, dtype), _call_and_replay) for peer in peers]

        shown = [size for size in sizes if any(gpu.get(peer, size, dtype) for peer in peers)]
        parts += [f"Forward + backward, {dtype}, by call / by replay of a CUDA graph where one can be captured:"]
        parts += [table([f"`{peer}`" for peer in peers], shown, row)]
    where = gpu.first
    changed = " with changes" if where["dirty"] == "yes" else ""
    parts += [
        f"Every peer was verified before it was timed. Measured on {where['gpu']}, driver {where['driver']}, Python "
        f"{where['python']}, torch {where['torch']}, {where['triton']}; vrm_kernels {where['package']}, commit "
        f"{where['commit']}{changed}, {where['date'][:10]}: {gpu.links(page)}."
    ]
    return "\n\n".join(parts)


def _ms(row: Row) -> str:
    return time(row["time_ms"])


def _call_and_replay(row: Row) -> str:
    return time(row["time_ms"]) + ("" if row["replay_ms"] is None else f" / {time(row['replay_ms'])}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.summary", description=__doc__)
    parser.add_argument("--results", type=Path, default=environment.RESULTS, help="the folder of results")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    try:
        cpu = Measured([records.newest(args.results)])
        gpu = Measured(gpu_files(args.results), records.GPU_COLUMNS)
        rewrite(args.readme, rows(cpu, gpu, args.readme), *ROWS)
        rewrite(args.page, gpu_table(gpu, args.page), *GPU)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.readme} and {args.page}: tables from {', '.join(path.name for path in cpu.paths + gpu.paths)}")


if __name__ == "__main__":
    main()
