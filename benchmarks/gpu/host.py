"""What a call costs the host, on any machine: ``python -m benchmarks.gpu.host``. Launches return at once.

Microseconds of the whole loss with its gradients, median and quartiles: of the backend alone, and through VRMLoss and
autograd.
"""

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from vrm_kernels import VRMLoss, backends
from vrm_kernels.backends.contract import LossSettings, Views
from vrm_kernels.graph.constants import RELATION_EPS

REPEATS = 2000
SETTINGS = LossSettings(16.0, 8.0, True, True, 30.0, 1.0, RELATION_EPS, False, 0.0, -100)


def microseconds(call: Callable[[], object]) -> str:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    low, median, high = statistics.quantiles(times[REPEATS // 10 :], n=4)
    return f"{median:.0f} ({low:.0f} to {high:.0f})"


def main(batch: int = 64, classes: int = 100) -> None:
    views = Views(*(torch.randn(batch, classes) for _ in range(4)))
    labels = torch.zeros(batch, dtype=torch.long)
    name = "triton-staged"
    backend = backends.REGISTRY[name].load()
    criterion = VRMLoss(16.0, 8.0, backend=name)
    students = [x.clone().requires_grad_() for x in views[:2]]

    def step() -> None:
        for x in students:
            x.grad = None
        criterion(*students, *views[2:], labels).backward()

    with mock.patch.object(JITFunction, "run", lambda *args, **options: None):
        print(
            f"{name} {batch}x{classes}: {microseconds(lambda: backend.vrm_loss(views, labels, None, SETTINGS, True))}"
        )
        with mock.patch.object(backends, "resolve", lambda chosen, device: name):
            print(f"VRMLoss and autograd: {microseconds(step)}")


if __name__ == "__main__":
    main()
