"""What the tests on a GPU share."""

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


def on_cpu(result: Result) -> Result:
    return result._replace(loss=result.loss.cpu(), grads=tuple(grad.cpu() for grad in result.grads))


def beyond_rounding(x: torch.Tensor, oracle: torch.Tensor) -> float:
    """The error of ``x`` relative to the norm of ``oracle``, less what rounding to the dtype of ``x`` may have cost:
    half a spacing of its numbers, which for numbers too small to be normal ones does not shrink with them."""
    limits, oracle = torch.finfo(x.dtype), oracle.double()
    spacing = limits.eps * oracle.abs().clamp(min=limits.tiny)
    excess = ((x.double() - oracle).abs() - spacing / 2).clamp(min=0)
    return float(excess.norm() / oracle.norm())
