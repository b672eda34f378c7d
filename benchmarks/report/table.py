"""The CPU tables of docs/benchmarks.md, from a results file: ``python -m benchmarks.report.table [CSV]``.

Rewrites what stands between ``<!-- bench:begin -->`` and ``<!-- bench:end -->``, and nothing else.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.harness import environment, records
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import INPUTS, elements
from benchmarks.harness.records import Row

PAGE = environment.ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SCALING_CLASSES = 100
SCALING_FROM = 2048


class Results:
    """The rows of a file, found by what was measured."""

    def __init__(self, rows: list[Row], source: str) -> None:
        self.rows = {records.key(row): row for row in rows}
        self.source = source
        self.first = rows[0]
        self.threads = max(row["threads"] for row in rows)
        self.dtype = self.first["dtype"]
        with_rivals = [row for row in rows if row["inputs"] == "random" and row["peer"] != "cpp"] or rows
        self.sizes = sorted({(row["batch"], row["classes"]) for row in with_rivals}, key=lambda size: elements(*size))
        measured = {row["peer"] for row in rows if row["status"] == "ok"}
        # The peer whose ratios are shown: the fastest there is.
        self.hero = "cpp" if "cpp" in measured else "torch"

    def get(self, peer, size, mode="forward+backward", inputs="random", threads=None) -> Row | None:
        return self.rows.get((peer, *size, mode, inputs, self.dtype, threads or self.threads))


def render(results: Results) -> str:
    """The markdown between the markers."""
    first = results.first
    hardware = (
        f"{first['cpu']}, {first['cores']} cores, {first['isa']}, {first['memory_gb']} GB; Python {first['python']}, "
        f"torch {first['torch']}, {first['compiler']}; vrm_kernels {first['package']}, commit {first['commit']}"
        f"{' with changes' if first['dirty'] == 'yes' else ''}, {first['date'][:10]}"
    )
    peers = "; ".join(f"`{peer.name}`: {peer.what}" for peer in PEERS.values())
    parts = [
        f'Forward + backward, {results.dtype}, {results.threads} threads; median time. Inputs "random": '
        f"{INPUTS['random']}. A GEMM unit is one `torch.mm` of `[B,C]x[C,B]` and one of `[C,B]x[B,C]`.",
        times(results),
        "Peak resident memory above the inputs, MiB, the two gradients included:",
        memories(results),
        f'`{results.hero}` on its own: inputs "trained" are {INPUTS["trained"]}.',
        conditions(results),
        *scaling(results),
        f"Peers: {peers}.",
        f"Every peer was verified before it was timed. Measured on {hardware}. `make bench` makes these numbers, and "
        f"[{results.source}]({results.source}) holds all of them.",
    ]
    return "\n\n".join(parts)


def times(results: Results) -> str:
    hero = results.hero

    def row(size):
        cells = [cell(results.get(peer, size), lambda r: time(r["time_ms"])) for peer in PEERS]
        mine = results.get(hero, size)
        ratios = [ratio(results.get(peer, size), mine) for peer in ("eager", "eager+compile")]
        return [*cells, *ratios, cell(mine, _units)]

    head = [
        *(f"`{peer}`" for peer in PEERS),
        f"`{hero}` against eager",
        "against eager+compile",
        f"`{hero}`, GEMM units",
    ]
    return table(head, results.sizes, row)


def memories(results: Results) -> str:
    def row(size):
        return [cell(results.get(peer, size), lambda r: _mebibytes(r["peak_mb"])) for peer in PEERS]

    return table([f"`{peer}`" for peer in PEERS], results.sizes, row)


def conditions(results: Results) -> str:
    hero = results.hero
    sizes = sorted({(b, c) for peer, b, c, *_ in results.rows if peer == hero}, key=lambda size: elements(*size))

    def row(size):
        trained, eager = (results.get(peer, size, inputs="trained") for peer in (hero, "eager"))
        rows = (results.get(hero, size), results.get(hero, size, "forward"), trained)
        return [
            *(cell(r, lambda r: time(r["time_ms"])) for r in rows),
            ratio(eager, trained),
            *(cell(r, _units) for r in rows[:1]),
            cell(rows[0], lambda r: _mebibytes(r["peak_mb"])),
        ]

    head = ["random", "random, forward alone", "trained", "trained, against eager", "random, GEMM units", "peak MiB"]
    return table(head, sizes, row)


def scaling(results: Results) -> Iterable[str]:
    """How time grows with the batch, and with threads, in a sentence each, where it was measured."""
    hero = results.hero
    points = sorted(
        (b, row["time_ms"])
        for (peer, b, c, mode, inputs, _, threads), row in results.rows.items()
        if (peer, c, mode, inputs, threads) == (hero, SCALING_CLASSES, "forward+backward", "random", results.threads)
        and b >= SCALING_FROM
        and row["status"] == "ok"
    )
    if len(points) > 2:
        (b0, t0), (b1, t1) = points[0], points[-1]
        power = math.log(t1 / t0) / math.log(b1 / b0)
        yield f"From B = {b0} to {b1} at C = {SCALING_CLASSES}, `{hero}`'s time grows as B to the power {power:.2f}."
    if results.threads > 1:
        for size in results.sizes:
            one, many = (results.get(hero, size, threads=n) for n in (1, results.threads))
            if ok(one) and ok(many):
                yield (
                    f"From 1 to {results.threads} threads, `{hero}` at {name(size)} is "
                    f"{one['time_ms'] / many['time_ms']:.2f} times as fast."
                )


def rewrite(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put ``text`` between the markers of ``page``.

    Raises:
        ValueError: they are not there once each, in their order.
    """
    old = page.read_text()
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{page} must have one line {begin} and, after it, one line {end}")
    before, rest = old.split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def table(head: list[str], sizes: Iterable[tuple[int, int]], row: Callable[[tuple[int, int]], list[str]]) -> str:
    lines = [["B x C", *head], ["---", *["---:"] * len(head)], *([name(size), *row(size)] for size in sizes)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def name(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def ok(row: Row | None) -> bool:
    return row is not None and row["status"] == "ok"


def cell(row: Row | None, shown: Callable[[Row], str]) -> str:
    """A result that is not a number is shown as what it is."""
    if row is None:
        return ""
    return shown(row) if ok(row) else row["status"]


def time(milliseconds: float) -> str:
    return f"{_three(milliseconds / 1e3)} s" if milliseconds >= 1e3 else f"{_three(milliseconds)} ms"


def _mebibytes(size: float | None) -> str:
    return "" if size is None else _three(size) if size >= 1 else "< 1"


def _units(row: Row) -> str:
    return "" if row["gemm_units"] is None else _three(row["gemm_units"])


def ratio(slow: Row | None, fast: Row | None) -> str:
    if not (ok(slow) and ok(fast)):
        return ""
    return f"{_three(slow['time_ms'] / fast['time_ms'])}x"


def _three(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.table", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", help="default: the newest under benchmarks/results")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    source = (args.csv or records.newest(environment.RESULTS)).resolve()
    relative = Path(os.path.relpath(source, args.page.resolve().parent)).as_posix()
    try:
        rewrite(args.page, render(Results(records.read(source), relative)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.page}: tables from {source.name}")


if __name__ == "__main__":
    main()
