"""The registry: what is there, what it says of itself, and that the compiled backend is there where it can be."""

import dataclasses
import importlib
import shutil

import pytest
import torch

from vrm_kernels import backends
from vrm_kernels.backends import cpp, device_record, registry, triton

COMPILERS = ("c++", "g++", "clang++")


def test_the_compiled_backend_is_usable_where_it_can_be_built():
    """Never a skip where it counts: with a compiler and ninja on the machine, a missing extension is a failure."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    ninja = importlib.util.find_spec("ninja") is not None or shutil.which("ninja")
    usable, note = backends.REGISTRY["cpp"].status()
    if not (compiler and ninja):
        assert usable or "build" in note  # built elsewhere, or says what to do
        pytest.skip(f"no C++ compiler or no ninja here: {note}")
    assert usable, f"{compiler} is here but the extension is not: run 'make build'\n{backends.describe()}"
    assert backends.resolve("auto", torch.device("cpu")) == "cpp"


def test_describe_is_a_table_of_every_backend():
    lines = backends.describe().splitlines()
    assert lines[0].split() == ["backend", "devices", "usable", "note"]
    rows = {line.split()[0]: line for line in lines[1:-1]}
    assert list(rows) == list(backends.REGISTRY)
    for name, row in rows.items():
        usable, note = backends.REGISTRY[name].status()
        assert note and note in row
        assert f"  {'yes' if usable else 'no'} " in row
    assert lines[-1].startswith("auto: ") and all(", ".join(names) in lines[-1] for names in backends.AUTO.values())
    positions = {line.index(word) for line, word in zip(lines[:2], ("usable", "yes"), strict=True)}
    assert len(positions) == 1  # columns line up


@pytest.mark.parametrize("name", list(backends.REGISTRY))
def test_a_registered_backend_has_its_contract(name):
    backend = backends.REGISTRY[name]
    assert backend.name == name
    if backend.status()[0]:
        assert isinstance(backend.load(), backends.Backend)


@pytest.mark.parametrize("name", [name for name, backend in backends.REGISTRY.items() if not backend.devices])
def test_pure_pytorch_backends_are_usable_everywhere(name):
    assert backends.REGISTRY[name].status()[0]
    assert backends.resolve(name, torch.device("cuda")) == name


def test_auto_without_the_extension_is_torch(monkeypatch):
    missing = dataclasses.replace(backends.REGISTRY["cpp"], status=lambda device=None: (False, "not built"))
    monkeypatch.setitem(backends.REGISTRY, "cpp", missing)
    assert backends.resolve("auto", torch.device("cpu")) == "torch"
    assert "no" in next(line for line in backends.describe().splitlines() if line.startswith("cpp")).split()


def test_auto_on_each_gpu_takes_what_that_one_can_run_and_a_device_found_right(monkeypatch):
    """Two devices: `cuda` was built for the second alone; Triton compiles for both, and is offered by name."""
    usable = {"cuda": {1}, "triton": {0, 1}}

    def on(name):
        return lambda device=None: (device.index in usable[name], "not built for it")

    for name in usable:
        monkeypatch.setitem(backends.REGISTRY, name, dataclasses.replace(backends.REGISTRY[name], status=on(name)))
    registry._warn.cache_clear()
    with pytest.warns(UserWarning, match="not built for it; 'triton' can, and has to be asked for by name: wrong for"):
        assert [backends.resolve("auto", torch.device("cuda", k)) for k in range(2)] == ["torch", "cuda"]
    with pytest.raises(RuntimeError, match="'cuda' cannot run here"):
        backends.resolve("cuda", torch.device("cuda", 0))
    assert backends.resolve("triton", torch.device("cuda", 0)) == "triton"
    for kind in ("mps", "xpu", "meta"):
        assert backends.resolve("auto", torch.device(kind)) == "torch"


def test_auto_takes_on_a_gpu_what_a_device_found_right():
    found = {entry["backend"]: entry["result"] for entry in device_record.read()}
    assert [found[name] for name in backends.AUTO["cuda"] if name != "torch"] == ["right"]


def test_statuses_are_of_the_device_that_is_asked_for(monkeypatch):
    """A GPU that Triton is too new for, beside one that it compiles for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (9, 0))[device])
    triton._status.cache_clear()
    try:
        old, new, current = (triton.status(device) for device in (*(torch.device("cuda", k) for k in range(2)), None))
    finally:
        triton._status.cache_clear()
    assert not old[0] and "GPU 0 has compute capability 7.5" in old[1]
    assert new[0] and new == current


def test_describe_says_what_was_run_on_a_device():
    lines = {line.split()[0]: line for line in backends.describe().splitlines()}
    for entry in device_record.read():
        assert f"{entry['result']} on {entry['device']} at commit {entry['commit']}" in lines[entry["backend"]]
    assert "at commit" not in lines["torch"]


def test_a_missing_extension_says_why(monkeypatch):
    """The reason the build left behind, or what to run, and the import's own words."""
    monkeypatch.setattr(cpp.importlib, "import_module", _refuse)
    cpp._load.cache_clear()
    try:
        usable, note = cpp.status()
    finally:
        cpp._load.cache_clear()
    assert not usable and "no such symbol" in note and len(note) > len("(no such symbol)") + 10


def _refuse(name):
    raise ImportError("no such symbol")
