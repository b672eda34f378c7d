"""The registry: which implementations exist, where each can run, and why one cannot.

A backend computes one contract, written out in :mod:`vrm_kernels.ops`. Asked for by name it runs or raises; only
``"auto"`` chooses, from the tensors' device alone, in the order of ``AUTO_ORDER``.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vrm_kernels.backends import cpp, cuda, triton

# "auto" takes the first of these that runs on the tensors' device.
AUTO_ORDER = ("cpp", "triton", "cuda", "torch")


@dataclass(frozen=True)
class Backend:
    """One row of the registry.

    ``module`` holds ``relation_graph`` (the contract is written out in :mod:`vrm_kernels.ops`) and may hold a fused
    ``vrm_graphs``; it is imported when the backend is first used. ``devices`` are device types, ``()`` meaning any.
    ``status`` says ``(usable, note)`` for this machine. ``interpreted`` are devices on which it only runs for tests,
    slowly, and which "auto" does not give it. The module also holds what :mod:`vrm_kernels.distributed.loss` asks for.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    dtypes: str
    status: Callable[[], tuple[bool, str]]
    interpreted: tuple[str, ...] = ()

    def load(self):
        return importlib.import_module(self.module)

    def runs_on(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices + self.interpreted

    def is_for(self, device_type: str) -> bool:
        """Whether "auto" may take it there."""
        return self.runs_on(device_type) and device_type not in self.interpreted


_ALL_DTYPES = "float64 float32 bfloat16 float16"


def _always(note: str) -> Callable[[], tuple[bool, str]]:
    return lambda: (True, note)


REGISTRY = {
    backend.name: backend
    for backend in (
        Backend(
            "reference",
            "vrm_kernels.backends.reference",
            (),
            _ALL_DTYPES,
            _always("the formulas, literally; stores every pairwise tensor; twice differentiable"),
        ),
        Backend(
            "torch",
            "vrm_kernels.backends.torch",
            (),
            _ALL_DTYPES,
            _always(
                "matrix products over row blocks, pure PyTorch; off the CPU it reads the device once or twice a block"
            ),
        ),
        Backend("cpp", "vrm_kernels.backends.cpp.backend", ("cpu",), _ALL_DTYPES, cpp.status),
        Backend(
            "triton",
            "vrm_kernels.backends.triton.backend",
            ("cuda",),
            _ALL_DTYPES,
            triton.status,
            interpreted=triton.interpreter_devices(),
        ),
        Backend("cuda", "vrm_kernels.backends.cuda.backend", ("cuda",), _ALL_DTYPES, cuda.status),
    )
}


def check_name(name: str) -> None:
    if name != "auto" and name not in REGISTRY:
        raise ValueError(f"unknown backend {name!r}: choose 'auto' or one of {', '.join(map(repr, REGISTRY))}")


def resolve(name: str, device: torch.device) -> str:
    """The name of the backend that will run for tensors on ``device``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that cannot run here or on this device, saying why.
    """
    check_name(name)
    if name == "auto":
        return next(n for n in AUTO_ORDER if REGISTRY[n].is_for(device.type) and REGISTRY[n].status()[0])
    backend = REGISTRY[name]
    if not backend.runs_on(device.type):
        raise RuntimeError(
            f"backend {name!r} runs on {' and '.join(backend.devices)} tensors and these are on {device}: "
            f"move them, or use backend='auto'"
        )
    usable, note = backend.status()
    if not usable:
        raise RuntimeError(f"backend {name!r} cannot run here: {note}. Use backend='auto' to take one that can")
    return name


def describe() -> str:
    """A table of the backends: name, devices, dtypes, and whether each is usable here or why not."""
    rows = [("backend", "devices", "dtypes", "usable", "note")]
    for backend in REGISTRY.values():
        usable, note = backend.status()
        devices = " ".join(backend.devices) or "any"
        rows.append((backend.name, devices, backend.dtypes, "yes" if usable else "no", note))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = ["  ".join([*(row[k].ljust(widths[k]) for k in range(4)), row[4]]) for row in rows]
    return "\n".join([*lines, f"auto: the first of {', '.join(AUTO_ORDER)} that is usable on the tensors' device"])
