"""The stages of docs/gpu.md in Triton's interpreter, both forms against the reference: run by test_interpreter.py.

Tiles are small, and shapes just large enough for several, ragged on each side.
"""

import itertools

import pytest
import torch
import triton_interpreter  # noqa: F401
from helpers import (
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    SETTINGS,
    Case,
    assert_parity,
    compare,
    evaluate,
    evaluate_relation,
    inputs,
    make_labels,
    make_logits,
    modes,
    relative_error,
)
from process_group import launch
from share_checks import check_counts, check_group_of_one, check_shares, group_of_one
from triton_suite import (
    BLOCKS_TOO,
    Blocks,
    Forms,
    OnAnyDevice,
    Thresholds,
    check_against_torch,
    choose,
)

from benchmarks.gpu import sanitize, warm
from vrm_kernels import backends
from vrm_kernels.backends.contract import GraphSettings, Sides, Views
from vrm_kernels.backends.triton import dense_launches, launches
from vrm_kernels.distributed import shares as share_module
from vrm_kernels.graph import forms

NAME = "triton"
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
        (launches, "LITERAL", {"CHUNK": 16, "SUMMARY": 16}),
        (launches, "DENSE", {"COLUMNS": 16}),
        (launches, "FINISH", {"BLOCK": 16}),
        (dense_launches, "MOMENTS", {"BLOCK": 16}),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) | sizes)
    monkeypatch.setattr(launches, "LITERAL_TILE", 64)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class TestForms(Forms):
    device = "cpu"
    shape, shapes, float64_shape = SHAPE, ((1, 1), (1, 7), (7, 1), (2, 2)), (9, 17)

    @pytest.mark.parametrize("relations", MODES)
    def test_each_graph_alone(self, form, relations):
        assert_parity(NAME, Case(dict(modes(SHAPE))[relations], relations=relations))

    def test_near_convergence_in_float64(self, form):
        for noise in ("1e-2", "1e-3"):
            self.check(
                Case((9, 17), kind=f"converged:{noise}", percentile=100.0), torch.float64, NEAR_CONVERGENCE_FLOOR
            )

    @BLOCKS_TOO
    @pytest.mark.parametrize("percentile", [0.0, 99.5, 100.0])
    def test_percentiles(self, form, percentile):
        for relations, shape in modes((17, 5)):
            self.check(Case(shape, percentile=percentile, relations=relations, seed=100))

    def test_deltas(self, form):
        for delta in (0.05, 3.0):
            self.check(Case((17, 9), delta=delta, seed=200))

    def test_a_student_equal_to_its_teacher_up_to_a_factor(self, form):
        teacher = make_logits(Case((9, 17), kind="equal"), torch.float32, seed=0)
        random = evaluate("reference", make_logits(Case((9, 17)), torch.float32, seed=0), **MIXED)
        result = evaluate(NAME, [0.5 * teacher[0], 0.5 * teacher[1], *teacher[2:]], **MIXED)
        assert 0 <= float(result.loss) <= 1e-5 * float(random.loss)
        for grad, usual in zip(result.grads, random.grads, strict=True):
            assert float(grad.norm()) <= 1e-5 * float(usual.norm())

    @pytest.mark.parametrize("scale", [1e4, 1e-4])
    def test_huge_and_tiny_logits(self, form, scale):
        self.check(Case((9, 17), scale=scale, percentile=100.0))

    @pytest.mark.parametrize("percentile", [49.0, 51.0])
    def test_exact_ties(self, form, percentile):
        """Balanced one-hot predictions: in both graphs H takes two values, exact in any order."""
        classes = 4
        labels = torch.arange(2 * classes) % classes
        _, _, *teacher = make_logits(Case((2 * classes, classes)), torch.float32, seed=0)
        noise = make_logits(Case((2 * classes, classes)), torch.float32, seed=1)
        peaks = [400.0 * torch.nn.functional.one_hot(x, classes).float() for x in (labels, labels.flip(0))]
        logits = [peaks[0] + noise[0], peaks[1] + noise[1], *teacher]
        compare(NAME, logits, FLOOR[torch.float32], unreliable_pruning_percentile=percentile)

    def test_layouts_and_mixed_dtypes(self, form):
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
    def test_relation_loss_of_unequal_sides(self, form, ranked):
        generator = torch.Generator().manual_seed(3)
        vectors = [torch.randn(k, 7, generator=generator) for k in (18, 5, 18, 5)]
        probs = tuple((2 * torch.randn(k, 6, generator=generator)).softmax(1) for k in (18, 5)) if ranked else None
        compare(NAME, vectors, FLOOR[torch.float32], evaluate_relation, probs=probs, percentile=40.0)

    def test_self_edges_of_one_set(self, form):
        a, _, ta, _ = make_logits(Case((9, 6)), torch.float64, 0)
        for percentile in (30.0, 100.0):
            arguments = (
                Sides(a, a, ta, ta),
                (a.softmax(1), a.softmax(1)),
                GraphSettings(percentile, 1.0, 1e-7, True),
                True,
            )
            result, expected = (backends.REGISTRY[name].load().relation_graph(*arguments) for name in (NAME, "torch"))
            for x, wanted in zip(result, expected, strict=True):
                torch.testing.assert_close(x, wanted)

    @pytest.mark.parametrize("kind", ["indices", "probabilities"])
    def test_cross_entropies(self, form, kind):
        """With smoothing, class weights, an ignored label, a larger eps; each view alone; labels that do not count."""
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

    @BLOCKS_TOO
    def test_evaluation_gives_the_same_loss(self, form):
        views = Views(*make_logits(Case((18, 9), kind="opposite"), torch.float32, 0))
        labels = make_labels(18, 9)
        with_grad, without = (BACKEND.vrm_loss(views, labels, None, SETTINGS, need) for need in (True, False))
        assert torch.equal(with_grad.loss, without.loss) and without.grad_real.numel() == 0

    @BLOCKS_TOO
    def test_one_element_anywhere_poisons_loss_and_gradient(self, form):
        logits = make_logits(Case((5, 3)), torch.float32, seed=0)
        for tensor, value in zip(range(4), (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
            bad = [x.clone() for x in logits]
            bad[tensor][4, 2] = value
            result = evaluate(NAME, bad, unreliable_pruning_percentile=0.0)
            assert result.loss.isnan() and all(grad.isnan().all() for grad in result.grads) and result.kept == (0, 0)

    def test_one_vertex_on_both_sides_has_no_edges(self, form):
        x, teacher, probs = torch.randn(1, 6), torch.randn(1, 6), torch.ones(1, 1)
        settings = GraphSettings(30.0, 1.0, 1e-7, True)
        result = BACKEND.relation_graph(Sides(x, x, teacher, teacher), (probs, probs), settings, True)
        assert float(result.loss) == 0 and int(result.kept) == 0 and not result.grad_a.any()

    @BLOCKS_TOO
    @pytest.mark.parametrize("exclude_self", [False, True])
    @pytest.mark.parametrize("percentile", [30.0, 100.0])
    def test_shares_add_up_to_the_whole_graph(self, form, percentile, exclude_self):
        check_shares(BACKEND, torch.float32, percentile=percentile, exclude_self=exclude_self, sizes=(5, 13))

    def test_shares_of_literal_edges_and_in_float64(self, form):
        check_shares(BACKEND, torch.float32, kind="opposite", sizes=(5, 13))
        check_shares(BACKEND, torch.float64, sizes=(5, 13))

    def test_a_group_of_one_process(self, form, monkeypatch):
        """Entropies stored, and computed again a few rows at a time."""
        case = Case((12, 7), relations="complete")
        with group_of_one():
            check_group_of_one(NAME, case, torch.float32)
            monkeypatch.setattr(share_module, "STORED_ENTROPY_BYTES", 256)
            check_group_of_one(NAME, case, torch.float32)

    def test_another_eps(self, form):
        """On certified edges, and on literal ones."""
        for eps, kind in ((1e-3, "random"), (0.5, "opposite")):
            logits = inputs(Case((17, 9), kind=kind, percentile=100.0), torch.float32)
            compare(NAME, logits, FLOOR[torch.float32], eps=eps, **MIXED)

    def test_overflow_is_not_hidden(self, form):
        """Squared norms that overflow: whatever the eager class says, never a wrong finite number."""
        logits = [1e25 * x for x in make_logits(Case((5, 3)), torch.float32, seed=0)]
        loss, eager = (evaluate(name, logits, **MIXED).loss for name in (NAME, "reference"))
        assert torch.equal(loss.isfinite(), eager.isfinite()) and (not eager.isfinite() or torch.allclose(loss, eager))

    def test_operator(self, form):
        logits = make_logits(Case((6, 5)), torch.float32, 0)
        for x in logits[:2]:
            x.requires_grad_()
        arguments = (*logits, make_labels(6, 5), None, None, *SETTINGS, False, True, NAME)
        torch.library.opcheck(torch.ops.vrm_kernels.vrm_loss, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_counts_of_digits_are_torchs(dtype):
    check_counts(BACKEND, dtype)


def test_two_processes_are_one():
    cases = [
        (NAME, torch.float32, Case((9, 5), relations="complete"), [3, 6], False, {}),
        (NAME, torch.float64, Case((9, 5)), [0, 9], True, {}),
    ]
    for errors in itertools.chain(*launch(2, "parity", cases, timeout=120)):
        value = errors.pop("value")
        assert value > 0 and max(errors.values()) <= 1e-5, errors


def test_auto_leaves_the_interpreter_alone():
    assert backends.resolve(NAME, torch.device("cpu")) == NAME
    assert backends.resolve("auto", torch.device("cpu")) != NAME


class TestOnAnyDevice(OnAnyDevice):
    name, device, repeats, streams = NAME, "cpu", 1, 2
    kernels = {"literal": (9, 5), "dense": (9, 5)}  # noqa: RUF012
    own = {"literal", "dense"}  # noqa: RUF012

    @pytest.fixture(params=["literal", "dense"])
    def kind(self, request, monkeypatch):
        choose(monkeypatch, request.param)
        return request.param


class TestBlocks(Blocks):
    device = "cpu"


class TestThresholds(Thresholds):
    device = "cpu"


def test_the_comparison_for_large_sizes(monkeypatch):
    choose(monkeypatch, "dense")
    check_against_torch(NAME, SHAPE, torch.bfloat16, "cpu")


@pytest.mark.parametrize("form", ["literal", "dense"])
def test_what_compiles_the_variants_and_what_watches_them_take_each_form(monkeypatch, form):
    """benchmarks/gpu/warm.py and sanitize.py, which need a GPU to run as they are."""
    ran = []
    real = dense_launches.edges
    monkeypatch.setattr(dense_launches, "edges", lambda *args: ran.append(1) or real(*args))
    warm.call(warm.Call(NAME, "float32", (5, 3), form=form), "cpu")
    assert bool(ran) == (form == "dense")
    monkeypatch.setattr(forms, "LITERAL_INSTRUCTIONS", 1)
    dict(sanitize.paths(NAME, own=False))[form]()
    assert (forms.form([(5, 5, 3)], 30.0) == form) and dict(sanitize.paths(NAME, own=True)).keys() == {"literal"}
