"""The triton backend against the reference, in Triton's interpreter: run by test_triton_interpreter.py, in a process of
its own, because Triton decides at its import whether its kernels are compiled or interpreted.

The interpreter takes milliseconds for what a GPU does in microseconds, so the tiles are small here, and the shapes just
large enough for several tiles, ragged on each side, and for several row blocks.
"""

import itertools

import pytest
import torch
import triton_interpreter  # noqa: F401
from helpers import (
    DTYPES,
    FLOOR,
    GRAPH_SETTINGS,
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
    modes,
    settings_of,
)
from process_group import launch
from share_checks import check_counts, check_group_of_one, check_shares, group_of_one
from triton_suite import OnAnyDevice

import vrm_kernels.functional as VF
from vrm_kernels import backends
from vrm_kernels.backends.contract import Sides
from vrm_kernels.backends.triton import large, plan, small, stages
from vrm_kernels.distributed import shares as share_module
from vrm_kernels.graph import pruning
from vrm_kernels.graph.constants import RELATION_EPS

BACKEND = backends.REGISTRY["triton"].load()
REGIMES = ("small", "large")
SHAPE = (18, 7)  # two tiles each way over samples, the second ragged, and one over classes
TURNED = (7, 18)


def check(case, dtype=torch.float32, floors=FLOOR):
    """Both graphs in one call, weighted so that neither hides the other."""
    oracle, eager, uncancelled = expected_of(case, dtype, 2.0, 1.0)
    result = evaluate("triton", list(inputs(case, dtype)), alpha=2.0, beta=1.0, **settings_of(case))
    assert_close(result, oracle, eager, floors[dtype], uncancelled)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    """Small tiles, and uninitialised memory that is NaN: reading an element that nothing wrote shows."""
    for name, sizes in {
        "PREPARE": {"ROWS": 16, "COLUMNS": 32},
        "PACK": {"ROWS": 16, "BLOCK": 32},
        "ENTROPY": {"BLOCK": 16, "DEPTH": 16},
        "EDGES": {"BLOCK": 16, "DEPTH": 16},
        "GRADIENTS": {"BLOCK": 16},
        "EPILOGUE": {"ROWS": 16, "COLUMNS": 16, "DEPTH": 16},
        "COMBINE": {"ROWS": 16, "BLOCK": 32},
        "HISTOGRAM": {"BLOCK": 1024},
    }.items():
        monkeypatch.setattr(plan, name, getattr(plan, name) | sizes)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def choose(monkeypatch, regime, blocks=True):
    """Several edge blocks in a gradient block, several of those, and no whole matrix of entropies."""
    if regime == "large":
        monkeypatch.setattr(plan, "FUSED_ELEMENTS", 0)
        if blocks:
            monkeypatch.setattr(plan, "EDGE_BLOCK_BYTES", 0)
            monkeypatch.setattr(plan, "EDGE_BLOCK_ROWS", 16)
            monkeypatch.setattr(plan, "GRADIENT_BLOCK_BYTES", 0)
            monkeypatch.setattr(plan, "ENTROPY_BYTES", 0)


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    choose(monkeypatch, request.param)
    return request.param


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)], ids=str)
def test_shapes(regime, shape, relations):
    check(Case(shape, relations=relations))


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("shape", [SHAPE, TURNED], ids=str)
def test_each_graph_alone(regime, shape, relations):
    assert_parity("triton", Case(dict(modes(shape))[relations], relations=relations))


def test_rows_longer_than_a_block(monkeypatch):
    monkeypatch.setitem(plan.PREPARE, "ROW_BLOCK", 16)
    check(Case((3, 45)))


@pytest.mark.parametrize("dtype", [x for x in DTYPES if x != torch.float32], ids=str)
def test_dtypes(regime, dtype):
    check(Case(SHAPE, seed=500), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_operands(monkeypatch, dtype):
    """What large bfloat16 logits get: one short number for one component, if that averages out over enough of them."""
    choose(monkeypatch, "large", blocks=False)
    monkeypatch.setattr(plan, "AVERAGING_COMPONENTS", 0)
    floors = dict.fromkeys(DTYPES, 3e-3)  # the loss: 2^-9 over the root of its 126 components; float16 has more terms
    check(Case(SHAPE, seed=500), dtype, floors=floors)


@pytest.mark.parametrize("percentile", [0.0, 99.5, 100.0])
def test_percentiles(regime, percentile):
    for relations, shape in modes((17, 5)):
        check(Case(shape, percentile=percentile, relations=relations, seed=100))


@pytest.mark.parametrize("delta", [0.05, 3.0])
def test_deltas(regime, delta):
    check(Case((17, 9), delta=delta, seed=200))


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize(
    ("kind", "percentile"),
    [("opposite", 30.0), ("collapsed", 100.0), ("duplicated_across", 100.0), ("duplicated_within", 29.5)],
)
def test_uncertified_and_cancelled_edges(regime, kind, percentile, relations):
    """No edge certified; no edge longer than zero; some of each."""
    check(Case(dict(modes((18, 5)))[relations], kind=kind, relations=relations, percentile=percentile))


def test_everything_uncertified_in_several_tiles(regime):
    check(Case(SHAPE, kind="opposite", percentile=100.0))


def test_tiles_of_edges_larger_than_those_of_gradients(monkeypatch):
    """As the kernels ship; a view of 18 samples ends within a tile of edges."""
    monkeypatch.setitem(plan.EDGES, "BLOCK", 32)
    check(Case((18, 2), kind="opposite", relations="complete"))
    check(Case((35, 2), kind="duplicated_across", percentile=100.0))


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_another_eps(regime, eps):
    """On certified edges, and on literal ones."""
    for kind in ("random", "opposite"):
        logits = inputs(Case((17, 9), kind=kind, percentile=100.0), torch.float32)
        compare("triton", logits, FLOOR[torch.float32], eps=eps, unreliable_pruning_percentile=100.0)


def test_near_convergence(regime):
    for noise, dtype in (("1e-2", torch.float32), ("1e-3", torch.float32), ("1e-3", torch.float64)):
        case = Case((9, 17), kind=f"converged:{noise}", percentile=100.0)
        check(case, dtype, floors=NEAR_CONVERGENCE_FLOOR)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_student_equal_to_its_teacher_up_to_a_factor(regime, factor):
    settings = {"unreliable_pruning_percentile": 100.0}
    teacher = make_logits(Case((9, 17), kind="equal"), torch.float32, seed=0)
    random = evaluate("reference", make_logits(Case((9, 17)), torch.float32, seed=0), **settings)
    result = evaluate("triton", [factor * teacher[0], factor * teacher[1], *teacher[2:]], **settings)
    assert 0 <= float(result.loss) <= 1e-5 * float(random.loss)
    for grad, usual in zip(result.grads, random.grads, strict=True):
        assert float(grad.norm()) <= 1e-5 * float(usual.norm())


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_logits(regime, scale):
    check(Case((9, 17), scale=scale, percentile=100.0))


@pytest.mark.parametrize("percentile", [49.0, 51.0])
def test_exact_ties(regime, percentile):
    """Balanced one-hot predictions: in both graphs H takes two values, exact in any order."""
    classes = 4
    labels = torch.arange(2 * classes) % classes
    _, _, *teacher = make_logits(Case((2 * classes, classes)), torch.float32, seed=0)
    noise = make_logits(Case((2 * classes, classes)), torch.float32, seed=1)
    peaks = [400.0 * torch.nn.functional.one_hot(x, classes).float() for x in (labels, labels.flip(0))]
    logits = [peaks[0] + noise[0], peaks[1] + noise[1], *teacher]
    compare("triton", logits, FLOOR[torch.float32], unreliable_pruning_percentile=percentile)


def test_layouts_and_mixed_dtypes(regime):
    case = Case((9, 17), seed=700)
    layouts = (
        lambda x: x.t().contiguous().t(),
        lambda x: x.new_full((19, 53), torch.nan)[1::2, 2::3].copy_(x),
        lambda x: x.new_full((x.numel() + 3,), torch.nan)[3:].view(x.shape).copy_(x),
        lambda x: x,
    )
    compare("triton", [f(x) for f, x in zip(layouts, inputs(case, torch.float32), strict=True)], FLOOR[torch.float32])
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float32)
    mixed = [x.to(dtype) for x, dtype in zip(inputs(case, torch.bfloat16), dtypes, strict=True)]
    result = compare("triton", mixed, FLOOR[torch.float32])
    assert [grad.dtype for grad in result.grads] == list(dtypes[:2])


@pytest.mark.parametrize("ranked", [False, True])
def test_relation_loss_of_unequal_sides(regime, ranked):
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(k, 7, generator=generator) for k in (18, 5, 18, 5)]
    probs = tuple((2 * torch.randn(k, 6, generator=generator)).softmax(1) for k in (18, 5)) if ranked else None
    compare("triton", vectors, FLOOR[torch.float32], evaluate_relation, probs=probs, percentile=40.0)
    compare("triton", [x.double() for x in vectors], FLOOR[torch.float64], evaluate_relation, percentile=40.0)


def test_self_edges_of_one_set(regime):
    """The operator's exclude_self: both sides are one vertex set."""
    a, _, ta, _ = make_logits(Case((9, 6)), torch.float32, 0)
    p = a.softmax(1)
    sides, settings = Sides(a, a.clone(), ta, ta.clone()), GRAPH_SETTINGS._replace(exclude_self=True)
    result, expected = (
        backends.REGISTRY[name].load().relation_graph(sides, (p, p.clone()), settings, True)
        for name in ("triton", "torch")
    )
    assert result.kept == expected.kept
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=0)
    for grad, wanted in zip(result[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


# ---- what is not a number ------------------------------------------------------------------------------------------


def test_one_element_anywhere_poisons_loss_and_gradient(regime):
    logits = make_logits(Case((5, 3)), torch.float32, seed=0)
    for tensor, value in zip(range(4), (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        bad = [x.clone() for x in logits]
        bad[tensor][4, 2] = value
        result = evaluate("triton", bad, unreliable_pruning_percentile=0.0)
        assert result.loss.isnan() and all(grad.isnan().all() for grad in result.grads)
    assert evaluate_relation("triton", bad, probs=None).loss.isnan()


def test_overflow_is_not_hidden(regime):
    """Squared norms that overflow: whatever the eager class says, never a wrong finite number."""
    logits = [1e25 * x for x in make_logits(Case((5, 3)), torch.float32, seed=0)]
    settings = {"unreliable_pruning_percentile": 100.0}
    loss, eager = evaluate("triton", logits, **settings).loss, evaluate("reference", logits, **settings).loss
    assert torch.equal(loss.isfinite(), eager.isfinite()) and (not eager.isfinite() or torch.allclose(loss, eager))


# ---- the threshold ----------------------------------------------------------------------------------------------


def _selected(values, percentile, exclude_self=False):
    """The threshold of entropies ``values [m, n]``, in row blocks of 3 and with the counting passes alone."""
    m, n = values.shape
    graph = stages.Graph(False, m, n, m, m + n, 4)
    sides = tuple(torch.zeros(k, 4, dtype=values.dtype) for k in (m, n, m, n))
    precision = plan.Precision(values.dtype, values.dtype)
    problem = stages.Problem(sides, (graph,), (1.0,), percentile, 1.0, RELATION_EPS, False, exclude_self, precision)
    prepared = stages.prepare(problem, softmax=False)
    selector = stages.Selector(problem, prepared, [problem.edge_count(graph)], prepared.histograms)
    for number in range(len(selector.digits)):
        for row in range(0, m, 3):
            block = values[row : row + 3].contiguous()
            selector.count(number, [stages.Block(block, len(block), n, n, row)])
    return selector.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("percentile", [0.0, 1e-9, 30.0, 50.0, 99.9, 100.0])
def test_the_threshold_is_torch_quantiles_to_the_bit(dtype, percentile):
    values = torch.randn(8, 40, dtype=dtype)
    values[2:4] = values[2:4].round()  # ties
    values[4] *= 1e-30
    values[5, :4], values[5, 4:8] = 0.0, -0.0
    selection = _selected(values, percentile)
    expected = torch.quantile(values.flatten(), percentile / 100)
    assert torch.equal(selection.threshold[0], expected)
    reached = bool(selection.threshold[0] >= selection.limits[1, 0])
    assert int(selection.counts[int(reached), 0]) == int((values <= expected).sum())


def test_self_edges_are_not_ranked():
    values = torch.randn(9, 9)
    values.fill_diagonal_(-torch.inf)
    ranked = values[~torch.eye(9, dtype=torch.bool)]
    assert torch.equal(_selected(values, 30.0, True).threshold[0], torch.quantile(ranked, 0.3))


def test_a_threshold_and_a_count_from_elsewhere(monkeypatch):
    """The stages after the selection take both as tensors, and follow them."""
    b, c = SHAPE
    logits = inputs(Case(SHAPE, seed=500), torch.float32)
    whole = evaluate("triton", logits, alpha=1.0, beta=0.0)
    graphs = (stages.Graph(False, b, b, b, 2 * b, c), stages.Graph(True, c, c, c, 2 * c, b))
    precision = plan.Precision(torch.float32, torch.float32)
    problem = stages.Problem(tuple(logits), graphs, (1.0, 0.0), 30.0, 1.0, RELATION_EPS, False, False, precision)
    for module in (small, large):
        prepared = stages.prepare(problem, softmax=True)
        prepared = stages.with_probs(prepared, prepared.probs, prepared.surprisals[b:])
        if module is large:
            entropies = [large.Entropies(problem, prepared, g) for g in graphs]
            selection = large.select(problem, prepared, entropies)
        else:
            selection, entropies = small.select(problem, prepared)
        doubled = torch.tensor([[2 * whole.kept[0], whole.kept[1]]] * 2)
        selection = selection._replace(counts=doubled)
        totals, grads = module.losses_and_gradients(problem, prepared, selection, entropies, True)
        assert totals.kept.tolist() == doubled[0].tolist()
        torch.testing.assert_close(totals.loss, whole.loss / 2, rtol=1e-5, atol=0)
        for grad, usual in zip(grads, whole.grads, strict=True):
            torch.testing.assert_close(grad, usual / 2, rtol=1e-4, atol=1e-7)


# ---- the rest of the contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("relations", MODES)
def test_evaluation_gives_the_same_loss(regime, relations):
    logits = inputs(Case(dict(modes((18, 5)))[relations], kind="opposite", relations=relations), torch.float32)
    loss = VF.vrm_loss(*logits, None, 1.0, 1.0, False, False, relations=relations, backend="triton")
    assert torch.equal(loss, evaluate("triton", logits, relations=relations).loss)


def test_operator(regime):
    logits = make_logits(Case((6, 5)), torch.float32, 0)
    for x in logits[:2]:
        x.requires_grad_()
    arguments = (*logits, make_labels(6, 5), None, None, *SETTINGS, False, True, "triton")
    torch.library.opcheck(torch.ops.vrm_kernels.vrm_loss, arguments)


def test_the_precision_switch_is_followed(monkeypatch):
    """TF32 operands are rounded to nearest, and the squared norms are those of what was rounded."""
    for regime in REGIMES:
        choose(monkeypatch, regime, blocks=False)
        logits = inputs(Case(SHAPE, seed=500), torch.float32)
        exact = evaluate("triton", logits)
        torch.set_float32_matmul_precision("high")
        try:
            rounded = evaluate("triton", logits)
        finally:
            torch.set_float32_matmul_precision("highest")
        error = float((rounded.grads[0] - exact.grads[0]).norm() / exact.grads[0].norm())
        assert 1e-5 < error < 2e-3 and abs(float(rounded.loss / exact.loss) - 1) < 2e-4


def test_auto_leaves_the_interpreter_alone():
    assert backends.resolve("triton", torch.device("cpu")) == "triton"
    assert backends.resolve("auto", torch.device("cpu")) != "triton"


class TestOnAnyDevice(OnAnyDevice):
    name, device, repeats, streams = "triton", "cpu", 1, 2
    kernels = {"small": (9, 5), "large": (9, 5)}  # noqa: RUF012
    own = {"small", "large"}  # noqa: RUF012

    @pytest.fixture(params=REGIMES)
    def kind(self, request, monkeypatch):
        choose(monkeypatch, request.param)
        return request.param


def test_the_kernels_are_what_ran(monkeypatch):
    calls = []
    real = BACKEND.vrm_loss
    monkeypatch.setattr(BACKEND, "vrm_loss", lambda *args: calls.append(args) or real(*args))
    evaluate("triton", make_logits(Case((5, 3)), torch.float32, 0))
    assert len(calls) == 1
    assert pruning.rank(0.3, 10, torch.float32)[0] == 2


# ---- shares of a graph, for several processes ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_counts_of_digits_are_torchs(dtype):
    check_counts(BACKEND, dtype)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("percentile", [30.0, 100.0])
def test_shares_add_up_to_the_whole_graph(regime, percentile, exclude_self):
    check_shares(BACKEND, torch.float32, percentile=percentile, exclude_self=exclude_self, sizes=(5, 13))


def test_shares_of_literal_edges_and_in_float64(regime):
    check_shares(BACKEND, torch.float32, kind="opposite", sizes=(5, 13))
    check_shares(BACKEND, torch.float64, sizes=(5, 13))


@pytest.mark.parametrize("relations", MODES)
def test_a_group_of_one_process(regime, relations, monkeypatch):
    """Entropies stored, and computed again a few rows at a time."""
    case = Case((12, 7), relations=relations)
    with group_of_one():
        check_group_of_one("triton", case, torch.float32)
        monkeypatch.setattr(share_module, "STORED_ENTROPY_BYTES", 256)
        check_group_of_one("triton", case, torch.float32)


def test_two_processes_are_one():
    cases = [
        ("triton", torch.float32, Case((9, 5), relations="complete"), [3, 6], False, {}),
        ("triton", torch.float64, Case((9, 5)), [0, 9], True, {}),
    ]
    for errors in itertools.chain(*launch(2, "parity", cases, timeout=120)):
        value = errors.pop("value")
        assert value > 0 and max(errors.values()) <= 1e-5, errors
