"""What a step costs beside its kernels: ``python -m benchmarks.cpu.host``.

The loss is computed by a backend that does nothing, so that what is left is Python, autograd and the checks: forward,
forward + backward, and the functions most of it is spent in. With ``--triton`` the backend is `triton`, but
its launches do nothing: what a GPU waits for that is faster than its host.
"""

import argparse
import cProfile
import pstats
import time
from unittest import mock

import torch

import vrm_kernels
from vrm_kernels import backends
from vrm_kernels.backends.contract import GraphResult, LossResult, empty_loss_result
from vrm_kernels.backends.registry import Entry, _load

BATCH, CLASSES = 64, 100


class Nothing(backends.Backend):
    """Gives every call the same numbers."""

    result: LossResult | None = None

    def vrm_loss(self, views, labels, class_weight, settings, need_grad) -> LossResult:
        if self.result is None:
            self.result = LossResult(*(x.zero_() for x in empty_loss_result(views, True)))
        return self.result

    def relation_graph(self, sides, probs, settings, need_grad) -> GraphResult:
        raise NotImplementedError

    def relation_share(self, sides, probs, entropy, settings, grads) -> torch.Tensor:
        raise NotImplementedError


def without_launches() -> backends.Backend:
    """`triton`, whose kernels then do not run in this process."""
    from triton.runtime.jit import JITFunction

    from vrm_kernels.backends.triton.backend import TritonBackend

    JITFunction.run = lambda kernel, *args, grid, warmup, **options: None
    return TritonBackend()


def microseconds(step, repeats: int) -> float:
    """The least of the medians of ten runs: others' work on this machine only adds."""
    medians = []
    for _ in range(10):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        medians.append(sorted(times)[repeats // 2])
    return 1e6 * min(medians)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.host", description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000, help="in each of ten runs (default: %(default)s)")
    parser.add_argument("--profile", type=int, default=12, metavar="N", help="functions shown (default: %(default)s)")
    parser.add_argument("--triton", action="store_true", help="the host's side of triton, without its launches")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logits = [torch.randn(BATCH, CLASSES, requires_grad=k < 2) for k in range(4)]
    labels = torch.randint(CLASSES, (BATCH,))
    entry = Entry("nothing", "nothing:Nothing", (), lambda device: (True, "does nothing"))
    load = lambda self: nothing if self is entry else _load(self.implementation)  # noqa: E731
    nothing = without_launches() if args.triton else Nothing()
    with mock.patch.dict(backends.REGISTRY, nothing=entry), mock.patch.object(Entry, "load", load):
        loss_fn = vrm_kernels.VRMLoss(16.0, 8.0, backend="nothing")

        def forward():
            return loss_fn(*logits, labels)

        def step():
            logits[0].grad = logits[1].grad = None
            forward().backward()

        step()
        print(f"forward             {microseconds(forward, args.repeats):6.1f} us")
        print(f"forward + backward  {microseconds(step, args.repeats):6.1f} us")
        with torch.no_grad():
            print(f"forward, no grad    {microseconds(forward, args.repeats):6.1f} us")
        if args.profile:
            profile = cProfile.Profile()
            profile.enable()
            for _ in range(args.repeats):
                step()
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(args.profile)


if __name__ == "__main__":
    main()
