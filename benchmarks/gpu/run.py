"""Every backend that runs on a GPU, beside the eager class, the compiled one and the chunked one, on the GPU at hand.

``python -m benchmarks.gpu.run --csv FILE`` adds to FILE what it does not hold yet. Each peer is verified before it is
timed, by CUDA events around a call and by replays of a CUDA graph. What does not fit is a result and is written as one.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import environment, records
from benchmarks.harness.oracle import Oracle, acceptable, first
from benchmarks.harness.peers import PEERS, Peer
from benchmarks.harness.problem import ALPHA, BETA, MODES, PERCENTILE, Case, elements, make_inputs, parse_size
from benchmarks.harness.records import Row
from vrm_kernels import VRMLoss, backends
from vrm_kernels.backends.torch import is_literal

SIZES = ((64, 100), (256, 100), (512, 200), (1024, 1000), (4096, 1000), (65536, 1000), (1024, 21841))
LARGEST = SIZES[5:]  # in bfloat16 alone
DTYPES = ("float32", "bfloat16")
MEBIBYTE = 2**20
ORACLE_SAMPLES = 4096  # verified on the first of the samples beyond
# A call slower than this is not repeated.
SLOW_SECONDS = 2.0
# torch.compile takes most of a minute a size and mode: float32, forward + backward, up to this many components.
COMPILE_ELEMENTS = 1e8
# Passing every component through memory some forty times takes half a minute a call from here on.
PAIRWISE_ELEMENTS = 1e11
# In this order, so that what runs out of time is what others have measured already.
GROUPS = (("cuda", "triton", "torch"), ("eager", "chunked"), ("eager+compile", "eager+graphs"))
# What reads the device, or captures graphs itself, is not captured: a capture that fails leaves torch's generators of
# random numbers unusable. `torch` reads it but for small graphs.
CAPTURED = ("cuda", "triton", "eager", "eager+compile")


def _loss(backend: str) -> Callable[[], VRMLoss]:
    return lambda: VRMLoss(ALPHA, BETA, unreliable_pruning_percentile=PERCENTILE, backend=backend)


GPU_PEERS = {name: PEERS[name] for name in ("eager", "eager+compile", "chunked", "torch")}
GPU_PEERS["eager+graphs"] = replace(
    PEERS["eager+compile"], name="eager+graphs", what="the same in the mode reduce-overhead", mode="reduce-overhead"
)
GPU_PEERS["triton"] = Peer("triton", "backend triton: the stages of docs/gpu.md", "triton", _loss("triton"))
GPU_PEERS["cuda"] = Peer("cuda", "backend cuda: CUDA C++ kernels, and torch's products", "cuda", _loss("cuda"))


def describe_gpu() -> Row:
    """One value for each of ``records.GPU_ENVIRONMENT``, and for the usual environment."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = ""
    return environment.describe() | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gb": f"{properties.total_memory / 2**30:.0f}",
        "cuda": torch.version.cuda or torch.version.hip or "",
        "driver": driver,
        "triton": backends.REGISTRY["triton"].status()[1],
    }


def on_gpu(case: Case) -> tuple[list[Tensor], Tensor]:
    logits, labels = make_inputs(case)
    return [x.detach().cuda().requires_grad_(x.requires_grad) for x in logits], labels.cuda()


def solve(case: Case, logits: list[Tensor], labels: Tensor) -> Oracle:
    """The torch backend in float64, whose parity with the formulas the tests establish; of the first samples."""
    rows = min(case.batch, ORACLE_SAMPLES)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in first(logits, rows)]
    loss = PEERS["torch"].build()(*wide, labels[:rows])
    loss.backward()
    students = first(wide[:2], rows)
    cross_entropy = sum(F.cross_entropy(x, labels[:rows]) for x in students)
    cross_entropy.backward()
    relations = torch.stack([x.grad - y.grad for x, y in zip(wide[:2], students, strict=True)])
    part = "" if rows == case.batch else f", first {rows} samples"
    difference = loss.item() - cross_entropy.item()
    grads = [x.grad for x in wide[:2]]
    return Oracle(f"torch float64{part}", rows, loss.item(), difference, grads, float(relations.norm()))


def call_once(loss: Callable[..., Tensor], logits: list[Tensor], labels: Tensor, mode: str, graphs: bool = False):
    if graphs:  # torch's own keep their results in memory that the next call uses again
        torch.compiler.cudagraph_mark_step_begin()
    if mode == "forward":
        with torch.no_grad():
            return loss(*logits, labels), None
    for x in logits[:2]:
        x.grad = None
    value = loss(*logits, labels)
    value.backward()
    return value.detach(), [x.grad for x in logits[:2]]


def milliseconds(call: Callable[[], object], seconds: float) -> list[float]:
    """Of each call, by CUDA events around it; warmed up, and as many as fit in ``seconds``, three at least."""
    once = _timed(call, 1)[0]
    if once > 1e3 * SLOW_SECONDS:
        return [once]
    _timed(call, 3)
    repeats = int(max(3, min(1000, 1e3 * seconds / max(once, 1e-3))))
    return _timed(call, repeats)


def _timed(call: Callable[[], object], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def gemm_unit(case: Case, seconds: float) -> float:
    """Milliseconds of one product of the size of each graph, into preallocated outputs, by row blocks if need be.

    By replay: a small product takes less time than its launch.
    """
    total = 0.0
    generator = torch.Generator().manual_seed(0)
    for rows, depth in ((case.batch, case.classes), (case.classes, case.batch)):
        x, y = (torch.randn(rows, depth, generator=generator).to("cuda", case.torch_dtype) for _ in range(2))
        block = max(1, min(rows, 2**32 // rows))
        out = x.new_empty(block, rows)

        def products(x=x, y=y, out=out, block=block, rows=rows):
            for start in range(0, rows, block):
                part = x[start : start + block]
                torch.mm(part, y.t(), out=out[: len(part)])

        total += replayed(products, seconds / 2)
    return total


def replayed(call: Callable[[], object], seconds: float) -> float:
    """Milliseconds of a replay of ``call``, which must not read the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    took = statistics.median(milliseconds(graph.replay, seconds))
    del result, graph
    return took


def is_captured(peer: Peer, case: Case) -> bool:
    literal = is_literal(case.batch, case.batch, case.classes) and is_literal(case.classes, case.classes, case.batch)
    return peer.name in CAPTURED or (peer.name == "torch" and literal)


def measure(peer: Peer, case: Case, mode: str, oracle: Oracle, inputs, unit: float, seconds: float) -> Row:
    """One row."""
    logits, labels = inputs
    matrix = case.batch * case.classes * case.torch_dtype.itemsize / MEBIBYTE
    row = {
        **vars(case),
        "mode": mode,
        "alpha": ALPHA,
        "beta": BETA,
        "percentile": PERCENTILE,
        "relations": "inter_view",
    }
    row |= {"logits_mb": 4 * matrix, "gradients_mb": 0.0 if mode == "forward" else 2 * matrix, "gemm_unit_ms": unit}
    needed = peer.expected_bytes(case.batch, case.classes, 4, mode != "forward")
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        return row | {"status": "out of memory", "note": f"not run: needs at least {needed / 2**30:.3g} GB"}
    components = elements(case.batch, case.classes)
    if peer.backend == "reference" and components > PAIRWISE_ELEMENTS:
        return row | {"status": "too slow", "note": f"not run: {components:.1e} components pass through memory"}
    if peer.compiled and (components > COMPILE_ELEMENTS or case.dtype != "float32" or mode == "forward"):
        return row | {"status": "too slow", "note": "not run: compiled at the smaller sizes only"}
    try:
        loss = peer.build()
        once = functools.partial(call_once, mode=mode, graphs=peer.mode is not None)
        call = functools.partial(once, loss, logits, labels)
        start = time.perf_counter()
        if oracle.rows < case.batch:
            value, grads = once(loss, first(logits, oracle.rows), labels[: oracle.rows])
        else:
            value, grads = call()
        torch.cuda.synchronize()
        row["first_call_ms"] = 1e3 * (time.perf_counter() - start)
        loss_error, grad_error = oracle.errors(float(value), grads)
        row |= {"verified_against": oracle.source, "loss_error": loss_error, "grad_error": grad_error}
        if not acceptable(loss_error, grad_error, case.torch_dtype):
            return row | {"status": "wrong", "note": "not timed: its loss or gradient is not the oracle's"}
        del value, grads
        for x in logits[:2]:
            x.grad = None
        call()
        for x in logits[:2]:
            x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
        samples = sorted(milliseconds(call, seconds))
        row |= {"status": "ok", "repeats": len(samples), "time_ms": statistics.median(samples)}
        row |= {"time_p20_ms": samples[len(samples) // 5], "time_p80_ms": samples[len(samples) * 4 // 5]}
        row["gemm_units"] = row["time_ms"] / unit
        row["replay_note"] = "not captured"
        if is_captured(peer, case):
            with contextlib.suppress(torch.OutOfMemoryError):  # a graph keeps what a call gives back
                took = replayed(call, seconds)
                row |= {"replay_ms": took, "replay_note": "", "replay_units": took / unit}
    except torch.OutOfMemoryError:
        row |= {"status": "out of memory", "note": f"needs more than {free / 2**30:.3g} GB"}
    except Exception as error:  # of whatever kind: the others are to be measured
        row |= {"status": "failed", "note": f"{type(error).__name__}: " + " ".join(str(error).split())[-300:]}
    finally:
        for x in logits[:2]:
            x.grad = None
        gc.collect()
        torch.cuda.empty_cache()
    return row


def run(
    sizes, dtypes, peers: Sequence[str], seconds: float, deadline: float, done: set[tuple] = frozenset()
) -> Iterator[Row]:
    """All rows but those ``done``, small problems first; after the ``deadline`` the rest is written as not run."""
    columns = describe_gpu()
    for (batch, classes), dtype in itertools.product(sizes, dtypes):
        if (batch, classes) in LARGEST and dtype != "bfloat16":
            continue
        cases = [(Case(name, batch, classes, dtype=dtype), mode) for name in peers for mode in MODES]
        cases = [(case, mode) for case, mode in cases if (*vars(case).values(), mode) not in done]
        if cases and time.monotonic() <= deadline:
            inputs = on_gpu(cases[0][0])
            oracle, unit = solve(cases[0][0], *inputs), gemm_unit(cases[0][0], seconds)
            torch.cuda.empty_cache()
        for case, mode in cases:
            if time.monotonic() > deadline:
                row = {**vars(case), "mode": mode, "status": "too slow", "note": "not run: out of time"}
            else:
                row = measure(GPU_PEERS[case.peer], case, mode, oracle, inputs, unit, seconds)
            yield row | columns
        inputs = oracle = None
        torch.cuda.empty_cache()


def results_file(folder: Path) -> Path:
    """A new file's name: the device and the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return folder / f"gpu-{torch.cuda.get_device_name().lower().replace(' ', '-')}-{stamp}.csv"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__)
    parser.add_argument("--csv", type=Path, help="default: a new gpu-*.csv in benchmarks/results")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=SIZES, metavar="BxC")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--peers", nargs="+", choices=GPU_PEERS, default=[name for group in GROUPS for name in group])
    parser.add_argument("--seconds", type=float, default=0.1, help="of repeated calls for each figure (default: 0.1)")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for all of it (default: 240)")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: this measures on a GPU (torch {torch.__version__})")
    path = args.csv or results_file(environment.RESULTS)
    old = records.read(path, records.GPU_COLUMNS) if path.exists() else []
    done = {
        tuple(row[name] for name in ("peer", "batch", "classes", "inputs", "dtype", "threads", "mode")) for row in old
    }
    for row in run(args.sizes, args.dtypes, args.peers, args.seconds, time.monotonic() + args.budget, done):
        records.append(path, [row], records.GPU_COLUMNS)
        shown = f"{row['time_ms']:10.3f} ms" if row["status"] == "ok" else f"{row['status']}: {row['note']}"
        if row.get("replay_ms"):
            shown += f", replay {row['replay_ms']:.3f} ms, {row['replay_units']:.3g} units, {row['peak_mb']:.0f} MB"
        size = f"{row['batch']}x{row['classes']}"
        print(f"{size:<11}{row['dtype']:<10}{row['peer']:<15}{row['mode']:<17}{shown}", flush=True)
        if row["status"] == "failed":
            torch.cuda.synchronize()  # raises where the device is lost: a new process can go on
    print(f"written to {path}")


if __name__ == "__main__":
    main()
