"""The stages of docs/gpu.md in Triton's interpreter, both forms against the reference: run by test_interpreter.py.

Tiles are small, and shapes just large enough for several, ragged on each side.
"""

import itertools

import pytest
import torch
import triton_interpreter  # noqa: F401
from helpers import (
    DTYPES,
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    SETTINGS,
    Case,
    assert_close,
    assert_parity,
    compare,
    evaluate,
    evaluate_relation,
    expected_of,
    inputs,
    make_labels,
    make_logits,
    relative_error,
    settings_of,
)

from vrm_kernels import backends
from vrm_kernels.backends.contract import GraphSettings, Sides, Views
from vrm_kernels.backends.triton.staged import dense_launches, launches
from vrm_kernels.graph import forms

NAME = "triton-staged"
BACKEND = backends.REGISTRY[NAME].load()
SHAPE = (18, 7)
MIXED = {"unreliable_pruning_percentile": 100.0}


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    """Small tiles, and uninitialised memory that is NaN: reading an element that nothing wrote shows."""
    for module, name, sizes in (
        (launches, "PREPARE", {"BLOCK": 16}),
        (launches, "COUNT", {"BLOCK": 1024}),
        (launches, "EXACT", {"BLOCK": 1024}),
        (launches, "LITERAL", {"CHUNK": 16}),
        (launches, "DENSE", {"COLUMNS": 16}),
        (launches, "FINISH", {"BLOCK": 16}),
        (dense_launches, "MOMENTS", {"BLOCK": 16}),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) | sizes)
    monkeypatch.setattr(launches, "LITERAL_TILE", 64)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def choose(monkeypatch, form):
    """One form at every size; the dense one in several blocks of rows."""
    monkeypatch.setattr(forms, "LITERAL_INSTRUCTIONS", 2**60 if form == "literal" else 0)
    monkeypatch.setattr(dense_launches, "PRODUCT_BYTES", 0)
    monkeypatch.setattr(dense_launches, "PRODUCT_ROWS", 8)


@pytest.fixture(params=["literal", "dense"])
def form(request, monkeypatch):
    """It is what runs, in all its stages."""
    choose(monkeypatch, request.param)
    ran = []
    real = dense_launches.edges
    monkeypatch.setattr(dense_launches, "edges", lambda *args: ran.append(1) or real(*args))
    yield request.param
    assert bool(ran) == (request.param == "dense")


@pytest.fixture
def literal(monkeypatch):
    choose(monkeypatch, "literal")


def check(case, dtype=torch.float32, floors=FLOOR):
    """Both graphs in one call, weighted so that neither hides the other."""
    oracle, eager, uncancelled = expected_of(case, dtype, 2.0, 1.0)
    result = evaluate(NAME, list(inputs(case, dtype)), alpha=2.0, beta=1.0, **settings_of(case))
    assert_close(result, oracle, eager, floors[dtype], uncancelled)


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relations", MODES)
def test_shapes(form, relations):
    for shape in ((1, 1), (1, 7), (7, 1), (2, 2)):
        check(Case(shape, relations=relations))


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("shape", [SHAPE, (7, 18)], ids=str)
def test_each_graph_alone(form, shape, relations):
    assert_parity(NAME, Case(shape, relations=relations))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(form, dtype):
    floors = FLOOR | {torch.bfloat16: 5e-4} if form == "dense" else FLOOR  # of gradients that are rounded to 2^-9
    for relations in MODES:
        check(Case(SHAPE, relations=relations, seed=500), dtype, floors)


@pytest.mark.parametrize("percentile", [0.0, 99.5, 100.0])
def test_percentiles(form, percentile):
    for relations in MODES:
        check(Case((17, 5), percentile=percentile, relations=relations, seed=100))


def test_deltas(form):
    for delta in (0.05, 3.0):
        check(Case((17, 9), delta=delta, seed=200))


@pytest.mark.parametrize(
    ("kind", "percentile"),
    [("opposite", 30.0), ("collapsed", 100.0), ("duplicated_across", 100.0), ("duplicated_within", 29.5)],
)
def test_uncertified_and_cancelled_edges(form, kind, percentile):
    """No edge certified; no edge longer than zero; some of each."""
    for relations in MODES:
        check(Case((18, 5), kind=kind, relations=relations, percentile=percentile))


def test_near_convergence(form):
    for noise, dtype in itertools.product(("1e-2", "1e-3"), (torch.float32, torch.float64)):
        check(Case(SHAPE, kind=f"converged:{noise}", percentile=100.0), dtype, NEAR_CONVERGENCE_FLOOR)


def test_a_student_equal_to_its_teacher_up_to_a_factor(form):
    teacher = make_logits(Case((9, 17), kind="equal"), torch.float32, seed=0)
    random = evaluate("reference", make_logits(Case((9, 17)), torch.float32, seed=0), **MIXED)
    result = evaluate(NAME, [0.5 * teacher[0], 0.5 * teacher[1], *teacher[2:]], **MIXED)
    assert 0 <= float(result.loss) <= 1e-5 * float(random.loss)
    for grad, usual in zip(result.grads, random.grads, strict=True):
        assert float(grad.norm()) <= 1e-5 * float(usual.norm())


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_logits(form, scale):
    check(Case((9, 17), scale=scale, percentile=100.0))


@pytest.mark.parametrize("percentile", [49.0, 51.0])
def test_exact_ties(form, percentile):
    """Balanced one-hot predictions: in both graphs H takes two values, exact in any order."""
    classes = 4
    labels = torch.arange(2 * classes) % classes
    _, _, *teacher = make_logits(Case((2 * classes, classes)), torch.float32, seed=0)
    noise = make_logits(Case((2 * classes, classes)), torch.float32, seed=1)
    peaks = [400.0 * torch.nn.functional.one_hot(x, classes).float() for x in (labels, labels.flip(0))]
    logits = [peaks[0] + noise[0], peaks[1] + noise[1], *teacher]
    compare(NAME, logits, FLOOR[torch.float32], unreliable_pruning_percentile=percentile)


def test_layouts_and_mixed_dtypes(form):
    case = Case((9, 17), seed=700)
    layouts = (
        lambda x: x.t().contiguous().t(),
        lambda x: x.new_full((19, 53), torch.nan)[1::2, 2::3].copy_(x),
        lambda x: x.new_full((x.numel() + 3,), torch.nan)[3:].view(x.shape).copy_(x),
        lambda x: x,
    )
    compare(NAME, [f(x) for f, x in zip(layouts, inputs(case, torch.float32), strict=True)], FLOOR[torch.float32])
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float32)
    mixed = [x.to(dtype) for x, dtype in zip(inputs(case, torch.bfloat16), dtypes, strict=True)]
    assert [grad.dtype for grad in compare(NAME, mixed, FLOOR[torch.float32]).grads] == list(dtypes[:2])


@pytest.mark.parametrize("ranked", [False, True])
def test_relation_loss_of_unequal_sides(literal, ranked):
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(k, 7, generator=generator) for k in (18, 5, 18, 5)]
    probs = tuple((2 * torch.randn(k, 6, generator=generator)).softmax(1) for k in (18, 5)) if ranked else None
    compare(NAME, vectors, FLOOR[torch.float32], evaluate_relation, probs=probs, percentile=40.0)


def test_self_edges_of_one_set(literal):
    a, _, ta, _ = make_logits(Case((9, 6)), torch.float64, 0)
    for percentile in (30.0, 100.0):
        arguments = Sides(a, a, ta, ta), (a.softmax(1), a.softmax(1)), GraphSettings(percentile, 1.0, 1e-7, True), True
        result, expected = (backends.REGISTRY[name].load().relation_graph(*arguments) for name in (NAME, "torch"))
        for x, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropies(form, kind):
    """With smoothing, class weights, an ignored label, a larger eps; each view alone; labels of which none counts."""
    views = Views(*make_logits(Case(SHAPE), torch.float64, 0))
    labels = make_labels(*SHAPE, kind)
    labels = labels.double() if labels.is_floating_point() else labels.index_fill(0, torch.tensor([3]), -1)
    weight = torch.rand(SHAPE[1], dtype=torch.float64)
    for changes, class_weight in (
        ({"eps": 0.1, "ignore_index": -1}, weight),
        ({"ce_real": False, "ignore_index": -1}, None),
        ({"ce_virtual": False, "label_smoothing": 0.0, "ignore_index": -1}, weight),
    ):
        settings = SETTINGS._replace(**changes)
        result, expected = (
            backends.REGISTRY[name].load().vrm_loss(views, labels, class_weight, settings, True)
            for name in (NAME, "torch")
        )
        for x, wanted in zip(result, expected, strict=True):
            assert relative_error(x, wanted) < 1e-12
    if kind == "indices":
        none = torch.full_like(labels, -100)
        assert BACKEND.vrm_loss(views, none, None, SETTINGS, True).terms[:2].tolist() == [0, 0]
        unknown = labels.clamp(min=0).index_fill(0, torch.tensor([2]), SHAPE[1])
        assert BACKEND.vrm_loss(views, unknown, None, SETTINGS, True).loss.isnan()


def test_evaluation_gives_the_same_loss(form):
    views = Views(*make_logits(Case((18, 9), kind="opposite"), torch.float32, 0))
    labels = make_labels(18, 9)
    with_grad, without = (BACKEND.vrm_loss(views, labels, None, SETTINGS, need) for need in (True, False))
    assert torch.equal(with_grad.loss, without.loss) and without.grad_real.numel() == 0


def test_one_element_anywhere_poisons_loss_and_gradient(form):
    logits = make_logits(Case((5, 3)), torch.float32, seed=0)
    for tensor, value in zip(range(4), (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        bad = [x.clone() for x in logits]
        bad[tensor][4, 2] = value
        result = evaluate(NAME, bad, unreliable_pruning_percentile=0.0)
        assert result.loss.isnan() and all(grad.isnan().all() for grad in result.grads) and result.kept == (0, 0)


@pytest.mark.parametrize(("level", "floor"), [("highest", 1e-5), ("high", 1e-5), ("medium", 3e-3)])
def test_float32_products_follow_the_switch(monkeypatch, level, floor):
    """With every edge kept: gradients of what PyTorch documents for each level, float32's digits or 16 or 8 bits."""
    choose(monkeypatch, "dense")
    case = Case((20, 40), percentile=100.0, seed=500)
    oracle, _, _ = expected_of(case, torch.float32, 2.0, 1.0)
    torch.set_float32_matmul_precision(level)
    try:
        result = evaluate(NAME, list(inputs(case, torch.float32)), alpha=2.0, beta=1.0, **settings_of(case))
    finally:
        torch.set_float32_matmul_precision("highest")
    found = [relative_error(x, y) for x, y in zip(result.grads, oracle.grads, strict=True)]
    assert max(found) < floor and relative_error(result.loss, oracle.loss) < floor
    assert level == "highest" or min(found) > 1e-8  # another way of multiplying ran


# ---- the threshold --------------------------------------------------------------------------------------------------


def selected(monkeypatch, values, percentile, levels=0):
    """``(threshold, kept)`` of the entropies ``values [m, n]`` after that many brackets."""
    monkeypatch.setattr(forms, "levels", lambda edges: levels)
    (m, n), logits = values.shape, [values.new_zeros(k, 1) for k in (*values.shape, *values.shape)]
    sizes = ((m, n, 1),)
    problem = launches.Problem(logits, logits[:2], sizes, (1.0, 0.0), percentile, 1.0, 1e-7, False, False, False)
    call = launches.lay_out(problem)
    call.arrays.entropies[: m * n] = values.flatten()
    call.arrays.brackets.zero_()
    launches.select(call)
    return call.arrays.thresholds[0], int(call.arrays.kept[0])


def assert_selected(monkeypatch, values, percentile, levels):
    threshold, kept = selected(monkeypatch, values, percentile, levels)
    expected = torch.quantile(values.flatten(), percentile / 100)
    assert torch.equal(threshold, expected) and kept == int((values <= expected).sum())


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_is_torch_quantiles_to_the_bit(monkeypatch, dtype, levels):
    values = torch.randn(90, 300, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values[2:4] = values[2:4].round()
    values[4] *= 1e-30
    values[5, :4], values[5, 4:8] = 0.0, -0.0
    for percentile in (0.0, 1e-9, 30.0, 50.0, 99.9):
        assert_selected(monkeypatch, values, percentile, levels)


@pytest.mark.parametrize("levels", [1, 2])
def test_ties_at_the_ends_of_a_bracket(monkeypatch, levels):
    generator = torch.Generator().manual_seed(0)
    for values in (torch.full((90, 300), 1.5), torch.randint(0, 3, (90, 300), generator=generator).float()):
        for percentile in (30.0, 61.0):
            assert_selected(monkeypatch, values, percentile, levels)


def test_a_bracket_that_misses_and_one_that_overflows(monkeypatch):
    """The sampled entropies are larger than all others; or as if drawn from a much wider distribution."""
    generator = torch.Generator().manual_seed(0)
    sampled = torch.arange(forms.SAMPLE) * 2654435761 % 27000
    values = torch.rand(27000, generator=generator)
    values[sampled] += 5
    assert_selected(monkeypatch, values.view(90, 300), 30.0, 1)
    values = 0.3 + 0.01 * torch.rand(27000, generator=generator)
    values[sampled] = torch.rand(forms.SAMPLE, generator=generator)
    assert_selected(monkeypatch, values.view(90, 300), 30.0, 1)


def test_what_no_form_can_do_goes_to_the_present_kernels(monkeypatch):
    monkeypatch.setattr(launches, "LITERAL_BYTES", 16)
    ran = []
    monkeypatch.setattr(launches, "prepare", lambda *args: ran.append(1))
    check(Case((5, 3)))
    assert not ran
