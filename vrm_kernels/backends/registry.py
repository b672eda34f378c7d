"""The registry: which implementations exist, where each can run, and why one cannot.

A backend that is asked for by name runs or raises. Only ``"auto"`` chooses: by ``AUTO``, from the tensors' device
alone.
"""

import functools
import importlib
import warnings
from dataclasses import dataclass

import torch

from vrm_kernels.backends import cpp, cuda, device_record, triton
from vrm_kernels.backends.contract import Backend
from vrm_kernels.backends.status import Status, constant

# "auto" takes the first of these that is usable on the tensors' device, and `torch` on devices of any other type. On a
# GPU these are what a device has found right (device_record.json): `triton` belongs before `torch` once one has.
AUTO = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")}


@dataclass(frozen=True)
class Entry:
    """One row of the registry.

    ``implementation`` names a subclass of :class:`vrm_kernels.backends.contract.Backend`, ``module:Class``, which is
    imported when the backend is first used. ``devices`` are device types; ``()`` means any. ``status`` says
    ``(usable, note)`` for a device of such a type. On ``interpreted`` devices it runs for tests only, slowly.
    """

    name: str
    implementation: str
    devices: tuple[str, ...]
    status: Status
    interpreted: tuple[str, ...] = ()

    def load(self) -> Backend:
        return _load(self.implementation)

    def runs_on(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices + self.interpreted


@functools.cache
def _load(implementation: str) -> Backend:
    module, _, name = implementation.partition(":")
    return getattr(importlib.import_module(module), name)()


def _always(note: str) -> Status:
    return lambda device=None: (True, note)


REGISTRY = {
    entry.name: entry
    for entry in (
        Entry(
            "reference",
            "vrm_kernels.backends.reference:ReferenceBackend",
            (),
            _always("the formulas, literally; stores every pairwise tensor; twice differentiable"),
        ),
        Entry(
            "torch",
            "vrm_kernels.backends.torch:TorchBackend",
            (),
            _always("matrix products over row blocks, pure PyTorch; large graphs wait for their device once each"),
        ),
        Entry("cpp", "vrm_kernels.backends.cpp.backend:CppBackend", ("cpu",), cpp.status),
        Entry(
            "triton",
            "vrm_kernels.backends.triton.backend:TritonBackend",
            ("cuda",),
            triton.status,
            interpreted=triton.interpreter_devices(),
        ),
        Entry("cuda", "vrm_kernels.backends.cuda.backend:CudaBackend", ("cuda",), cuda.status),
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
        return _first_usable(device)
    backend = REGISTRY[name]
    if not backend.runs_on(device.type):
        raise RuntimeError(
            f"backend {name!r} runs on {' and '.join(backend.devices)} tensors and these are on {device}: "
            f"move them, or use backend='auto'"
        )
    usable, note = backend.status(device)
    if not usable:
        raise RuntimeError(f"backend {name!r} cannot run here: {note}. Use backend='auto' to take one that can")
    return name


@constant
def _first_usable(device: torch.device) -> str:
    missing = {}
    for name in AUTO.get(device.type, ("torch",)):
        usable, note = REGISTRY[name].status(device)
        if usable:
            break
        missing[name] = note
    if name == "torch" and missing:
        why = [f"{other!r} cannot run here: {note}" for other, note in missing.items()]
        for other, entry in REGISTRY.items():
            if device.type in entry.devices and other not in missing and entry.status(device)[0]:
                why.append(f"{other!r} can, and has to be asked for by name: {device_record.note(other)}")
        _warn(device.type, "; ".join(why))
    return name


@functools.cache
def _warn(device_type: str, why: str) -> None:
    """Warns once: the loss is right, but slower than it could be."""
    warnings.warn(f"backend 'auto' takes 'torch' on {device_type}, which is slower: {why}", stacklevel=2)


def describe() -> str:
    """A table of the backends: name, devices, and whether each is usable here or why not; of those for a GPU also on
    which they have been run, and how that ended."""
    rows = [("backend", "devices", "usable", "note")]
    for backend in REGISTRY.values():
        usable, note = backend.status()
        devices = " ".join(backend.devices) or "any"
        ran = f"; {device_record.note(backend.name)}" if "cuda" in backend.devices else ""
        rows.append((backend.name, devices, "yes" if usable else "no", note + ran))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["  ".join([*(row[k].ljust(widths[k]) for k in range(3)), row[3]]) for row in rows]
    order = "; ".join(f"on {device}: {', '.join(names)}" for device, names in AUTO.items())
    return "\n".join([*lines, f"auto: the first that is usable {order}; elsewhere: torch"])
