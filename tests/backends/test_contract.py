"""What every backend returns, by name: one contract, checked on each backend itself, below operators and autograd."""

import inspect
import typing

import pytest
import torch
import torch.nn.functional as F
from helpers import GRAPH_SETTINGS, SETTINGS, Case, inputs, make_labels, relative_error

from vrm_kernels import backends
from vrm_kernels.backends import contract
from vrm_kernels.backends.contract import Backend, GraphResult, LossResult, Sides, Views, compute_dtype

SHAPE = (11, 7)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture
def chosen(any_backend) -> Backend:
    return backends.REGISTRY[any_backend].load()


def views(dtype) -> Views:
    return Views(*inputs(Case(SHAPE, seed=1000), dtype))


def test_methods_have_the_contracts_arguments(chosen):
    for name, method in inspect.getmembers(Backend, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(type(chosen), name)) == inspect.signature(method), name
            assert typing.get_type_hints(getattr(type(chosen), name)) == typing.get_type_hints(method), name


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_its_terms(chosen, dtype, need_grad):
    four, labels = views(dtype), make_labels(*SHAPE)
    compute = compute_dtype(*four)
    weight = torch.rand(SHAPE[1], dtype=compute)
    result = chosen.vrm_loss(four, labels, weight, SETTINGS, need_grad)
    assert type(result) is LossResult
    expected = contract.empty_loss_result(four, need_grad)
    for name, x, like in zip(LossResult._fields, result, expected, strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype), name
        assert not x.requires_grad
    weights = torch.tensor([1.0, 1.0, SETTINGS.alpha, SETTINGS.beta], dtype=compute)
    assert relative_error(result.loss, result.terms @ weights) < 1e-6
    for view, term in zip(four[:2], result.terms, strict=False):
        cross_entropy = F.cross_entropy(view.to(compute), labels, weight, label_smoothing=SETTINGS.label_smoothing)
        assert relative_error(term, cross_entropy) < 1e-6


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_graph(chosen, dtype, need_grad):
    a, b, teacher_a, teacher_b = views(dtype)
    sides = Sides(a, b[:5], teacher_a, teacher_b[:5])
    result = chosen.relation_graph(sides, (a.float().softmax(1), b[:5].float().softmax(1)), GRAPH_SETTINGS, need_grad)
    assert type(result) is GraphResult
    for name, x, like in zip(GraphResult._fields, result, contract.empty_graph_result(sides, need_grad), strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype), name
    assert 0 < int(result.kept) < 55


def test_results_are_the_callers_own(chosen):
    """No result is a view of another or of an input, and a second call leaves the first's alone."""
    four, labels = views(torch.float32), make_labels(*SHAPE)
    first = chosen.vrm_loss(four, labels, None, SETTINGS, True)
    copies = [x.clone() for x in first]
    chosen.vrm_loss(Views(*(2 * x for x in four)), labels, None, SETTINGS, True)
    assert all(map(torch.equal, first, copies))
    storages = {x.untyped_storage().data_ptr() for x in (*first, *four)}
    assert len(storages) == len(first) + len(four)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, 1e16, -1e30])
@pytest.mark.parametrize("percentile", [30.0, 100.0])
def test_what_is_not_finite_or_too_large_makes_nan_and_keeps_nothing(chosen, percentile, value):
    settings = SETTINGS._replace(percentile=percentile)
    for tensor in range(4):
        four = [x.clone() for x in views(torch.float32)]
        four[tensor][3, 2] = value
        result = chosen.vrm_loss(Views(*four), make_labels(*SHAPE), None, settings, True)
        assert result.loss.isnan() and result.kept.tolist() == [0, 0]
        assert result.grad_real.isnan().all() and result.grad_virtual.isnan().all()


def test_a_nan_in_probs_is_a_nan_in_the_loss(chosen):
    sides = Sides(*views(torch.float32))
    probs = [x.softmax(1) for x in sides[:2]]
    probs[1][4, 1] = torch.nan
    result = chosen.relation_graph(sides, (probs[0], probs[1]), GRAPH_SETTINGS, True)
    assert result.loss.isnan() and int(result.kept) == 0
    assert result.grad_a.isnan().all() and result.grad_b.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_vertex_on_both_sides_has_no_edges(chosen, dtype):
    x, teacher, probs = torch.randn(1, 6, dtype=dtype), torch.randn(1, 6, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    settings = GRAPH_SETTINGS._replace(exclude_self=True)
    loss, *grads, kept = chosen.relation_graph(Sides(x, x, teacher, teacher), (probs, probs), settings, True)
    assert float(loss) == int(kept) == 0
    assert all(torch.equal(grad, torch.zeros_like(x)) for grad in grads)


@pytest.mark.parametrize("older", ["highest", "high"])
@pytest.mark.parametrize(("newer", "level"), [("tf32", "high"), ("ieee", "highest"), (None, None)])
def test_either_switch_of_torchs_says_how_float32_is_multiplied(older, newer, level):
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        torch.set_float32_matmul_precision(older)
        if newer is not None:
            switch.fp32_precision = newer
        assert contract.float32_products() == (level or older)
    finally:
        switch.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
