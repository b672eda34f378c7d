"""The torch backend as it is on a device, on the CPU: what it waits for, and that both of its forms are right there."""

import pytest
import torch
from helpers import FLOOR, GRAPH_SETTINGS, MODES, Case, assert_parity, evaluate, inputs, make_logits
from torch.utils._python_dispatch import TorchDispatchMode

import vrm_kernels.functional as VF
from vrm_kernels.backends import torch as torch_backend
from vrm_kernels.backends.contract import Sides
from vrm_kernels.graph import pruning

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::unique_consecutive"}


class Device(TorchDispatchMode):
    """Counts what makes the host wait for a device, and refuses float64, which not every device has."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        indices = [x for x in args[1] if x is not None] if name in ("aten::index", "aten::index_put") else []
        self.waits += name in READS or any(x.dtype == torch.bool for x in indices)
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in results), name
        return result


@pytest.fixture(params=["literal", "products"])
def form(request, monkeypatch):
    """Off the CPU: small graphs, and large ones in several blocks."""
    monkeypatch.setattr(torch_backend, "_is_cpu", lambda device: False)
    if request.param == "literal":
        monkeypatch.setattr(torch_backend, "LITERAL_BLOCK", 1000)
    else:
        monkeypatch.setattr(torch_backend, "LITERAL_ELEMENTS", 0)
        monkeypatch.setattr(torch_backend, "_block_elements", lambda device: 200)
    return request.param


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("kind", ["random", "opposite", "collapsed", "duplicated_across"])
def test_parity(form, kind, relations):
    percentile = 30.0 if kind == "random" else 100.0
    assert_parity("torch", Case((18, 7), kind=kind, relations=relations, percentile=percentile))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_few_vertices(form, shape):
    assert_parity("torch", Case(shape), floors=FLOOR)


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_what_is_waited_for(form, exclude_self, need_grad):
    """Nothing for a small graph, so that a CUDA graph can capture it; once for a large one."""
    a, b, ta, tb = make_logits(Case((18, 7), kind="opposite"), torch.float32, 0)
    sides = Sides(a, a.clone(), ta, ta.clone()) if exclude_self else Sides(a, b, ta, tb)
    probs = sides.a.softmax(1), sides.b.softmax(1)
    settings = GRAPH_SETTINGS._replace(percentile=30.0, exclude_self=exclude_self)
    for ranked in (probs, None):
        with Device() as device:
            torch_backend.TorchBackend().relation_graph(sides, ranked, settings, need_grad)
        assert device.waits == (0 if form == "literal" else 1)


def test_the_counter_counts():
    x = torch.ones(3)
    for read in (lambda: x[0].item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x.any())):
        with Device() as device:
            read()
        assert device.waits > 0
    with pytest.raises(AssertionError), Device():
        x.double()


@pytest.mark.parametrize("shape", [(64, 100), (512, 200)], ids=str)
def test_small_losses_need_no_numbers_at_all(shape):
    """On tensors without data reading one is an error: so is reading one while a CUDA graph is captured."""
    logits = [torch.randn(shape, device="meta").requires_grad_(k < 2) for k in range(4)]
    loss = VF.vrm_loss(*logits, None, 16.0, 8.0, False, False, backend="torch")
    loss.backward()
    assert logits[0].grad.shape == shape
    assert torch_backend.is_literal(shape[0], *shape) and torch_backend.is_literal(shape[1], *reversed(shape))


def test_large_losses_take_products():
    assert not torch_backend.is_literal(1024, 1024, 1000)
    with pytest.raises(NotImplementedError, match="nonzero"):
        logits = [torch.randn(1024, 1000, device="meta") for _ in range(4)]
        VF.vrm_loss(*logits, None, 16.0, 8.0, False, False, backend="torch")


def test_forms_agree(monkeypatch):
    logits = inputs(Case((33, 17), seed=500), torch.float32)
    usual = evaluate("torch", logits)
    monkeypatch.setattr(torch_backend, "_is_cpu", lambda device: False)
    literal = evaluate("torch", logits)
    torch.testing.assert_close(literal.loss, usual.loss, rtol=1e-5, atol=0)
    for grad, expected in zip(literal.grads, usual.grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


def test_ranks_beyond_torch_quantile_need_no_float64_on_the_device():
    """2^24 edges and more: the rank is a float64's, formed on the host."""
    n = 2**24 + 10
    with Device():
        below, weight = pruning.ranks(0.3, n, torch.empty(1))
    assert (int(below), float(weight)) == pytest.approx(pruning.rank(0.3, n, torch.float32))
