"""A few small losses through every path of a GPU backend, for compute-sanitizer to watch.

``python -m benchmarks.gpu.sanitize triton|cuda [--own]``; ``--own`` leaves out the paths that multiply with the
vendor's library, whose kernels racecheck and initcheck would watch too, and which read the padding that nothing writes.
"""

import argparse
from collections.abc import Callable, Iterator

import torch

import vrm_kernels.functional as VF
from vrm_kernels import checks

BACKENDS = ("triton", "cuda")


def paths(backend: str, own: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each path's name, and what makes the backend take it."""
    if backend == "triton":
        from vrm_kernels.graph import forms

        for name, instructions in (("literal", 2**60), ("dense", 0))[: 1 if own else 2]:
            yield name, lambda instructions=instructions: setattr(forms, "LITERAL_INSTRUCTIONS", instructions)
        return
    from vrm_kernels.backends.cuda import backend as cuda_backend

    for form in ("one_launch", "launches", "literal", "tiles", "dense")[: 3 if own else 5]:
        yield form, lambda form=form: setattr(cuda_backend, "TUNING", cuda_backend.Tuning(form, 32, 0))


def losses(backend: str, device: str) -> Iterator[tuple[str, float, float]]:
    """``(what, loss, norm of the gradients)`` on the path that is set."""
    for relations in checks.RELATIONS:
        for sign in (1.0, -1.0):  # of the student: with -1 no edge is certified
            teacher = [torch.randn(40, 33, device=device) for _ in range(2)]
            students = [(sign * x + 0.5 * torch.randn_like(x)).requires_grad_() for x in teacher]
            loss = VF.vrm_loss(*students, *teacher, None, 1.0, 1.0, False, False, relations=relations, backend=backend)
            loss.backward()
            yield f"{relations} {sign:+g}", loss.item(), float(torch.stack([x.grad.norm() for x in students]).norm())


def main(words: list[str] | None = None, device: str = "cuda") -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("--own", action="store_true")
    args = parser.parse_args(words)
    for name, take in paths(args.backend, args.own):
        take()
        torch.manual_seed(0)
        for what, loss, norm in losses(args.backend, device):
            print(f"{args.backend} {name}: {what}: loss {loss:.6g}, gradients {norm:.6g}")


if __name__ == "__main__":
    main()
