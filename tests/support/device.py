"""What the tests on a GPU share; on the CPU, where the interpreter runs them, what stands for streams and graphs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from helpers import Result


def kernels_of(call) -> set[str]:
    """The names of the kernels that ``call`` launches."""
    from torch.profiler import ProfilerActivity, profile

    call()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return {event.key for event in profiler.key_averages()}


def captured(step: Callable[[], list[torch.Tensor]], device: str) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """``(results, replay)``: a CUDA graph of ``step``, whose replays write the same storage."""
    if device == "cpu":
        results = step()

        def again() -> None:
            for x, new in zip(results, step(), strict=True):
                x.copy_(new)

        return results, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


@contextlib.contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    """Waiting for the device is an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_streams(call: Callable, batches: Sequence, device: str) -> list:
    """``call`` of each batch, each on a stream of its own."""
    if device == "cpu":
        return [call(batch) for batch in batches]
    torch.cuda.synchronize()
    results = []
    streams = [torch.cuda.Stream() for _ in batches]
    for stream, batch in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            results.append(call(batch))
    torch.cuda.synchronize()
    return results


def on_cpu(result: Result) -> Result:
    return result._replace(loss=result.loss.cpu(), grads=tuple(grad.cpu() for grad in result.grads))


def beyond_rounding(x: torch.Tensor, oracle: torch.Tensor) -> float:
    """The error of ``x`` relative to the norm of ``oracle``, less what rounding to the dtype of ``x`` may have cost:
    half a spacing of its numbers, which for numbers too small to be normal ones does not shrink with them."""
    limits, oracle = torch.finfo(x.dtype), oracle.double()
    spacing = limits.eps * oracle.abs().clamp(min=limits.tiny)
    excess = ((x.double() - oracle).abs() - spacing / 2).clamp(min=0)
    return float(excess.norm() / oracle.norm())
