"""The backend asked for is the one that ran, and no other."""

import sys

import pytest
import torch
from helpers import ALL_BACKENDS, Case, inputs, make_labels
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import vrm_kernels
import vrm_kernels.functional as VF
from vrm_kernels import backends

ENTRY_POINTS = ("relation_graph", "vrm_loss")


class Operators(TorchDispatchMode):
    """Records our operators and the backend each was told to use."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vrm_kernels":
            self.seen.append((func._opname, args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def entered(monkeypatch):
    """The names of the backends whose code was entered, in order."""
    names = []

    def spy(name, function):
        return lambda *args, **kwargs: names.append(name) or function(*args, **kwargs)

    for name in ALL_BACKENDS:
        if not backends.REGISTRY[name].status()[0]:
            continue
        chosen = backends.REGISTRY[name].load()
        for entry in ENTRY_POINTS:
            monkeypatch.setattr(chosen, entry, spy(name, getattr(chosen, entry)))
    return names


def run(backend):
    logits = [x.clone().requires_grad_() for x in inputs(Case((11, 7), seed=1400), torch.float32)]
    vrm_kernels.VRMLoss(2.0, 0.5, backend=backend)(*logits, make_labels(11, 7)).backward()


def test_the_named_backend_runs_and_no_other(any_backend, entered):
    run(any_backend)
    assert entered and set(entered) == {any_backend}
    entered.clear()
    VF.relation_loss(*inputs(Case((11, 7), seed=1400), torch.float32), backend=any_backend)
    assert entered == [any_backend]


def test_the_operator_is_told_its_backend(backend):
    with Operators() as operators:
        run(backend)
        VF.relation_loss(*inputs(Case((11, 7), seed=1400), torch.float32), backend=backend)
    assert operators.seen == [("vrm_loss", backend), ("relation_graph", backend)]


def test_auto_takes_the_first_usable_in_its_order(entered):
    expected = next(name for name in backends.AUTO["cpu"] if backends.REGISTRY[name].status()[0])
    assert backends.resolve("auto", torch.device("cpu")) == expected
    run("auto")
    assert set(entered) == {expected}


def test_cpp_runs_compiled_code(monkeypatch):
    usable, note = backends.REGISTRY["cpp"].status()
    if not usable:
        pytest.skip(note)
    run("cpp")
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run("cpp")
    names = {event.name for event in trace.events()}
    outer = {"vrm_kernels::vrm_loss", "vrm_kernels::relation_graph"}
    assert {name for name in names if name.startswith("vrm_kernels")} - outer, names
    assert "vrm_kernels._C" in sys.modules
    # its work is not PyTorch's: no product of matrices, no norm, no sort
    assert not names & {"aten::mm", "aten::bmm", "aten::addmm", "aten::norm", "aten::linalg_vector_norm", "aten::sort"}
