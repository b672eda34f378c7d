"""One peer on one problem: verified, then its memory and its time. ``run`` starts this in a process of its own."""

import argparse
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import memory
from benchmarks.harness.oracle import Oracle, acceptable, first, load
from benchmarks.harness.peers import PEERS, Peer
from benchmarks.harness.problem import ALPHA, BETA, MODES, PERCENTILE, Case, make_inputs
from benchmarks.harness.records import Row

# A call slower than this is not repeated: noise is small beside it.
SLOW_SECONDS = 5.0
WARM_UP_SECONDS = 0.1
GEMM_SECONDS = 0.2
MEBIBYTE = 2**20
WRONG = {"status": "wrong", "note": "not timed: its loss or gradient is not the oracle's"}

Result = tuple[Tensor, list[Tensor] | None]


def measure(
    case: Case, oracle: Oracle, *, seconds: float, memory_limit: int, modes: tuple[str, ...] = MODES
) -> Iterator[Row]:
    """One row per mode, as soon as it is known. Nothing is timed unless every mode that ran gave the right answer."""
    peer = PEERS[case.peer]
    torch.set_num_threads(case.threads)
    logits, labels = make_inputs(case)
    rows = {mode: start(case, mode) for mode in modes}
    loss = peer.build()
    if not peer.compiled:  # thread pools and code pages are no part of what a call takes
        tiny = [x.detach()[:8, :8].clone().requires_grad_(x.requires_grad) for x in logits]
        for mode in modes:
            call_once(loss, tiny, labels[:8] % tiny[0].shape[1], mode)
    memory.give_back_freed()
    held = memory.resident("RssAnon")
    calls, last_seconds = {}, {}
    for mode, row in rows.items():
        call = functools.partial(call_once, loss, logits, labels, mode)
        try:
            result, last_seconds[mode], measured = _first_calls(call, peer, held)
            row |= measured | _verified(loss, result, logits, labels, mode, oracle, case.torch_dtype)
        except (RuntimeError, MemoryError) as error:
            row |= failure(error, memory_limit)
        if row["status"] == "ok":
            calls[mode] = call
    if any(row["status"] == "wrong" for row in rows.values()):
        for row in rows.values():
            yield row | (WRONG if row["status"] == "ok" else {})
        return

    before = gemm_unit(case, seconds, memory_limit)
    for mode, row in rows.items():
        if mode in calls:
            samples = _sample(calls[mode], seconds, last_seconds[mode])
            after = gemm_unit(case, seconds, memory_limit)
            row |= _timing(samples, before, after)
            before = after
        yield row


def start(case: Case, mode: str) -> Row:
    """The columns that are known beforehand."""
    matrix = case.batch * case.classes * case.torch_dtype.itemsize / MEBIBYTE
    settings = {"alpha": ALPHA, "beta": BETA, "percentile": PERCENTILE, "relations": "inter_view"}
    sizes = {"logits_mb": 4 * matrix, "gradients_mb": 0.0 if mode == "forward" else 2 * matrix}
    return {**vars(case), "mode": mode, **settings, **sizes}


def failure(error: BaseException | str, memory_limit: int) -> Row:
    """The columns that say how a peer failed."""
    if memory.is_exhausted(error):
        return {"status": "out of memory", "note": f"needs more than {_gigabytes(memory_limit)}"}
    return {"status": "failed", "note": " ".join(str(error).split())[-300:]}


def too_large(needed: int) -> Row:
    """The columns of a peer that is known not to fit."""
    return {"status": "out of memory", "note": f"not run: needs at least {_gigabytes(needed)}"}


def gemm_unit(case: Case, seconds: float, memory_limit: int) -> float | None:
    """Milliseconds of the unit of account: one product of the size of each graph, by the library that torch links."""
    b, c = case.batch, case.classes
    x, y = (torch.randn(b, c).to(case.torch_dtype) for _ in range(2))
    if (b * b + c * c) * x.itemsize > memory_limit / 2:
        return None
    outputs = x.new_empty(b, b), x.new_empty(c, c)

    def products() -> None:
        torch.mm(x, y.t(), out=outputs[0])
        torch.mm(x.t(), y, out=outputs[1])

    products()
    return _quantiles(_sample(products, min(seconds, GEMM_SECONDS), 0.0))[1]


def call_once(loss: Callable[..., Tensor], logits: list[Tensor], labels: Tensor, mode: str) -> Result:
    """What is measured; it leaves no gradient behind."""
    if mode == "forward":
        with torch.no_grad():
            return loss(*logits, labels), None
    value = loss(*logits, labels)
    value.backward()
    grads = [x.grad for x in logits[:2]]
    for x in logits[:2]:
        x.grad = None
    return value.detach(), grads


def _first_calls(call: Callable[[], Result], peer: Peer, held: int) -> tuple[Result, float, Row]:
    """``(result, seconds of the last call, columns)``.

    Memory is the peak of a warm call, since a first one also reads in code, plus what earlier calls left resident since
    ``held``: a workspace that is kept is still the peer's. Of a compiled peer what is left is the compiler's, and is
    not counted.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) == 1 and (peer.compiled or seconds[0] < SLOW_SECONDS)):
        result = None
        memory.give_back_freed()
        left = 0 if peer.compiled else max(0, memory.resident("RssAnon") - held)
        start = time.perf_counter()
        result, peak = memory.peak_of(call)
        seconds.append(time.perf_counter() - start)
    peak_mb = None if peak is None else (peak + left) / MEBIBYTE
    return result, seconds[-1], {"first_call_ms": 1e3 * seconds[0], "peak_mb": peak_mb}


def _verified(loss, result: Result, logits, labels, mode: str, oracle: Oracle, dtype: torch.dtype) -> Row:
    if oracle.rows < len(labels):
        result = call_once(loss, first(logits, oracle.rows), labels[: oracle.rows], mode)
    loss_error, grad_error = oracle.errors(float(result[0]), result[1])
    row = {"verified_against": oracle.source, "loss_error": loss_error, "grad_error": grad_error}
    if acceptable(loss_error, grad_error, dtype):
        return row | {"status": "ok"}
    return row | WRONG


def _sample(call: Callable[[], object], seconds: float, last_seconds: float) -> list[float]:
    """Seconds of each of the repeated calls: as many as fit in ``seconds``, but a few."""
    if last_seconds > SLOW_SECONDS:
        return [last_seconds]
    fewest = 5 if last_seconds < 2 else 3
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + min(seconds, WARM_UP_SECONDS)
        while last_seconds < WARM_UP_SECONDS and time.perf_counter() < end:
            call()
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while len(samples) < fewest or time.perf_counter() < end:
            start = time.perf_counter()
            result = call()
            samples.append(time.perf_counter() - start)
            del result  # freed outside the clock
        return samples
    finally:
        gc.enable()


def _quantiles(samples: list[float]) -> list[float]:
    """20, 50 and 80 %, in milliseconds."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return (torch.tensor(samples, dtype=torch.float64).quantile(points) * 1e3).tolist()


def _timing(samples: list[float], before: float | None, after: float | None) -> Row:
    low, median, high = _quantiles(samples)
    row = {"time_ms": median, "time_p20_ms": low, "time_p80_ms": high, "repeats": len(samples)}
    if before and after:
        unit = (before + after) / 2
        row |= {"gemm_unit_ms": unit, "gemm_drift": after / before, "gemm_units": median / unit}
    return row


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.3g} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    parser.add_argument("oracle", type=Path)
    parser.add_argument("rows", type=Path, help="one line of JSON per mode is added to this file")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--memory", type=int, required=True, help="bytes that it may take")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    args = parser.parse_args()
    memory.limit_address_space(args.memory)
    oracle = load(args.oracle)
    with args.rows.open("a", buffering=1) as file:
        for row in measure(args.case, oracle, seconds=args.seconds, memory_limit=args.memory, modes=tuple(args.modes)):
            print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
