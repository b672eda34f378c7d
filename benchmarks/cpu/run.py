"""The suite: every peer on every problem, each in a fresh process with a time-out and a limit on its memory.

``python -m benchmarks.cpu.run`` writes benchmarks/results/cpu-*.csv; ``--quick`` a few minutes' worth under runs/bench.
What does not fit, or takes too long, is a result and is written as one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.harness import environment, records
from benchmarks.harness.measure import failure, start, too_large
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import DTYPES, INPUTS, MODES, Case, elements, parse_size
from benchmarks.harness.records import Row

SIZES = ((64, 100), (256, 100), (512, 100), (128, 1000), (1024, 1000), (4096, 100), (16384, 100), (64, 21841))
# Between the headline's sizes, so that both axes of the plots have points.
MORE_CLASSES = ((64, 1000), (64, 2000))
MORE_CLASSES_PEERS = ("eager", "eager+compile", "torch", "cpp")
MORE_SAMPLES = ((2048, 100), (8192, 100), (32768, 100))
TRAINED_SIZES = ((64, 100), (256, 100), (512, 100), (128, 1000), (1024, 1000), (4096, 100))
TRAINED_PEERS = ("eager", "torch", "cpp")
THREADS_SIZE = (1024, 1000)
QUICK_SIZES = ((64, 100), (256, 100))
QUICK_OUTPUT = environment.ROOT / "runs" / "bench"
# A time well above the overheads, which is extrapolated to larger sizes.
EXTRAPOLATE_FROM_MS = 1000.0
# A process is stopped after this many times the limit of a call: it makes a few, and may compile. An oracle's too.
CALLS_PER_PROCESS = 3
NOISY_DRIFT = 1.2


@dataclass(frozen=True)
class Limits:
    seconds: float  # of repeats, each mode
    slow: float  # seconds of one call: beyond, it is too slow
    memory: int  # bytes for one process; 0: four fifths of what is available when it starts

    def memory_now(self) -> int:
        return self.memory or environment.available_bytes() * 4 // 5 or 4 * 2**30


def suite(threads: int, dtype: str) -> list[Case]:
    """The full suite, small problems first."""
    groups = (
        (SIZES, PEERS, "random"),
        (MORE_CLASSES, MORE_CLASSES_PEERS, "random"),
        (MORE_SAMPLES, ("cpp",), "random"),
        (TRAINED_SIZES, TRAINED_PEERS, "trained"),
    )
    cases = [
        Case(peer, b, c, inputs, dtype, threads) for sizes, peers, inputs in groups for b, c in sizes for peer in peers
    ]
    if threads > 1:
        cases += [Case(peer, *THREADS_SIZE, threads=1, dtype=dtype) for peer in ("torch", "cpp")]
    return in_order(cases)


def in_order(cases: list[Case]) -> list[Case]:
    """Small problems first, and all peers of a problem one after the other: what is compared is measured together."""
    peers = list(PEERS)
    return sorted(
        dict.fromkeys(cases),
        key=lambda k: (elements(k.batch, k.classes), k.batch, k.inputs, -k.threads, peers.index(k.peer)),
    )


def run(cases: list[Case], limits: Limits, output: Path) -> Iterator[Row]:
    """Measure ``cases`` in their order and add the rows to ``output`` as they come."""
    columns = environment.describe()
    history: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for k, case in enumerate(cases):
            rows = [_foreseen(case, mode, history, limits) for mode in MODES]
            modes = tuple(mode for mode, row in zip(MODES, rows, strict=True) if row is None)
            measured = _measure(case, modes, limits, scratch, k) if modes else {}
            rows = [row or measured[mode] for mode, row in zip(MODES, rows, strict=True)]
            history += rows
            rows = [row | columns for row in rows]
            records.append(output, rows)
            yield from rows


def _foreseen(case: Case, mode: str, history: list[Row], limits: Limits) -> Row | None:
    """What needs no process to be known. That it cannot fit comes before that it would be slow."""
    peer = PEERS[case.peer]
    needed = peer.expected_bytes(case.batch, case.classes, case.torch_dtype.itemsize, mode != "forward")
    if peer.status()[0] and needed > limits.memory_now():
        return start(case, mode) | too_large(needed)
    return too_slow(case, mode, history, limits.slow)


def too_slow(case: Case, mode: str, history: list[Row], slow: float) -> Row | None:
    """A "too slow" row where a smaller problem shows that one call would take longer than ``slow`` seconds."""
    row = start(case, mode)
    same = [name for name in records.KEY if name not in ("batch", "classes")]
    known = [
        old
        for old in history
        if all(old[name] == row[name] for name in same) and (old.get("time_ms") or 0) >= EXTRAPOLATE_FROM_MS
    ]
    if not known:
        return None
    last = known[-1]
    ratio = elements(case.batch, case.classes) / elements(last["batch"], last["classes"])
    expected = last["time_ms"] / 1e3 * ratio
    if expected <= slow:
        return None
    note = f"not run: about {expected:.0f} s a call, going by {last['batch']}x{last['classes']}; limit {slow:g} s"
    return row | {"status": "too slow", "note": note}


def _measure(case: Case, modes: tuple[str, ...], limits: Limits, scratch: Path, k: int) -> dict[str, Row]:
    """The rows of one case by mode; one that the process did not write says why."""
    blank = {mode: start(case, mode) for mode in modes}
    usable, reason = PEERS[case.peer].status()
    if not usable:
        return {mode: row | {"status": "unavailable", "note": reason} for mode, row in blank.items()}

    bytes_now = limits.memory_now()
    oracle = scratch / f"{case.size}-{case.inputs}-{case.dtype}.pt"
    unsolved = oracle.with_suffix(".unsolved")
    if not (oracle.exists() or unsolved.exists()):
        solver = replace(case, peer="", threads=max(case.threads, torch.get_num_threads()))
        command = ["benchmarks.harness.oracle", json.dumps(vars(solver)), str(oracle)]
        why = _run(command, solver, limits.slow * CALLS_PER_PROCESS, bytes_now, scratch)
        if why is not None:
            unsolved.write_text(f"not verified, so not timed: no oracle: {why['status']}, {why['note']}")
    if unsolved.exists():
        return {mode: row | {"status": "failed", "note": unsolved.read_text()} for mode, row in blank.items()}

    file = scratch / f"{k}.jsonl"
    command = ["benchmarks.harness.measure", json.dumps(vars(case)), str(oracle), str(file)]
    command += [f"--seconds={limits.seconds}", "--modes", *modes]
    why = _run(command, case, limits.slow * CALLS_PER_PROCESS, bytes_now, scratch)
    lines = file.read_text().splitlines() if file.exists() else []
    written = {row["mode"]: row for row in map(json.loads, lines)}
    return {mode: written.get(mode) or blank[mode] | (why or failure("no result", bytes_now)) for mode in modes}


def _run(module: list[str], case: Case, timeout: float, memory_limit: int, scratch: Path) -> Row | None:
    """Run ``python -m module ...``; ``None`` if it ended well, else the columns that say why it did not."""
    variables = {
        "OMP_NUM_THREADS": str(case.threads),
        # Compilations are shared by the processes of one run, and by nothing else.
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *module, f"--memory={memory_limit}"],
        cwd=environment.ROOT,
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a compiler has workers: they end with it
    )
    try:
        _, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"status": "too slow", "note": f"stopped after {timeout:g} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode == -signal.SIGKILL:
        return {"status": "out of memory", "note": "killed by the system"}
    return failure(stderr or f"exit status {process.returncode}", memory_limit)


def line(row: Row) -> str:
    """One row for the terminal."""
    size = f"{row['batch']}x{row['classes']}"
    name = f"{size:<9}  {row['peer']:<13}  {row['mode']:<16}  {row['inputs']:<7}  {row['threads']}"
    if row["status"] != "ok":
        return f"{name}  {row['status']}: {row['note']}"
    units = f"{row['gemm_units']:.3g} units" if row.get("gemm_units") else ""
    peak = f"{row['peak_mb']:.0f} MB" if row.get("peak_mb") is not None else ""
    return f"{name}  {row['time_ms']:10.2f} ms  {units:>12}  {peak:>9}"


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small sizes, short repeats, into runs/bench")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--sizes", nargs="+", type=parse_size, help="such as 64x100: these alone, with --inputs")
    parser.add_argument("--inputs", choices=INPUTS, default="random", help="with --sizes (default: random)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seconds", type=float, help="of repeated calls in each mode (default: 1, quick 0.3)")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds: a slower call is recorded as too slow (default: 60)"
    )
    parser.add_argument("--memory", type=float, default=0.0, help="GB for one peer (default: 0.8 of what is available)")
    parser.add_argument("--output", type=Path, help="folder of the results")
    args = parser.parse_args(arguments)

    sizes = args.sizes or (QUICK_SIZES if args.quick else None)
    if sizes:
        cases = in_order([Case(peer, b, c, args.inputs, args.dtype, args.threads) for b, c in sizes for peer in PEERS])
    else:
        cases = suite(args.threads, args.dtype)
    cases = [case for case in cases if case.peer in args.peers]
    seconds = args.seconds or (0.3 if args.quick else 1.0)
    folder = args.output or (QUICK_OUTPUT if args.quick else environment.RESULTS)
    output = environment.results_file("cpu", environment.describe(), folder)
    drifts = []
    for row in run(cases, Limits(seconds, args.limit, int(args.memory * 2**30)), output):
        print(line(row), flush=True)
        drifts += [row["gemm_drift"]] if row.get("gemm_drift") else []
    noisy = sum(max(drift, 1 / drift) > NOISY_DRIFT for drift in drifts)
    if noisy:
        print(
            f"not a quiet machine: in {noisy} of {len(drifts)} rows the GEMM unit changed by more than {NOISY_DRIFT:g}x"
        )
    print(f"written to {os.path.relpath(output)}")
    return output


if __name__ == "__main__":
    main()
