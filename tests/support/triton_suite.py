"""What a Triton backend must do on any device: on a GPU, and on the CPU in the interpreter. That runs the same tests at
smaller sizes, so that a GPU is not where they are first tried.

A subclass named Test... gives the sizes. What only a device has, streams, graphs and waiting, :mod:`device` makes up on
the CPU.
"""

import pytest
import torch
from device import beyond_rounding, captured, nothing_waits, on_cpu, on_streams
from helpers import (
    DTYPES,
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    Case,
    assert_close,
    errors,
    evaluate,
    expected_of,
    inputs,
    make_labels,
    make_logits,
    modes,
    relative_error,
    settings_of,
)

import vrm_kernels
from vrm_kernels import backends
from vrm_kernels.backends.contract import GraphSettings, Sides
from vrm_kernels.backends.triton import dense_launches, launches
from vrm_kernels.graph import forms
from vrm_kernels.graph.constants import RELATION_EPS


def same_bits(x, y) -> bool:
    return torch.equal(x.loss, y.loss) and x.kept == y.kept and all(map(torch.equal, x.grads, y.grads))


class OnAnyDevice:
    """``kernels`` are the shapes of the tests by what computes them, ``own`` those whose every product is ours: the
    library may choose another one under capture, or on another stream."""

    name: str
    device = "cuda"
    kernels: dict[str, tuple[int, int]]
    own: set[str]
    repeats = 100
    streams = 4

    @pytest.fixture
    def shape(self, kind) -> tuple[int, int]:
        return self.kernels[kind]

    def logits(self, case: Case, dtype=torch.float32, seed=0) -> list[torch.Tensor]:
        return [x.to(self.device) for x in make_logits(case, dtype, seed)]

    def agree(self, x, y, kind) -> bool:
        return torch.equal(x, y) if kind in self.own else relative_error(x, y) < 1e-5

    def test_it_is_usable(self):
        assert backends.resolve(self.name, torch.device(self.device)) == self.name, backends.describe()

    def test_repeats_give_the_same_bits(self, kind, shape):
        logits = self.logits(Case(shape))
        first = evaluate(self.name, logits)
        for _ in range(self.repeats):
            assert same_bits(evaluate(self.name, logits), first)

    def test_nothing_waits_for_the_device(self, kind, shape):
        logits = self.logits(Case(shape))
        students = [x.requires_grad_() for x in logits[:2]]
        labels = torch.zeros(shape[0], dtype=torch.long, device=self.device)
        criterion = vrm_kernels.VRMLoss(16.0, 8.0, backend=self.name)
        criterion(*logits, labels).backward()  # compiles, which may wait
        with nothing_waits(self.device):
            criterion(*logits, labels).backward()
        assert all(x.grad is not None for x in students)

    @pytest.mark.parametrize("kinds", [("random", "opposite"), ("opposite", "random")], ids="-".join)
    def test_a_captured_graph_is_replayed_on_other_inputs(self, kind, shape, kinds):
        """Captured where no edge is literal and replayed where all are, and the other way round."""
        criterion = vrm_kernels.VRMLoss(16.0, 8.0, backend=self.name, unreliable_pruning_percentile=30)
        labels = make_labels(*shape).to(self.device)
        first, second = (self.logits(Case(shape, kind=k), seed=7) for k in kinds)
        static = [x.clone().requires_grad_(k < 2) for k, x in enumerate(first)]

        def step(logits=static):
            for x in logits[:2]:
                x.grad = None
            loss = criterion(*logits, labels)
            loss.backward()
            return [loss.detach(), *(x.grad for x in logits[:2])]

        results, replay = captured(step, self.device)
        for batch in (second, first, second):
            with torch.no_grad():
                for x, new in zip(static, batch, strict=True):
                    x.copy_(new)
            for x in results:
                x.fill_(torch.nan)  # poisoned: what replay does not write shows
            replay()
            expected = step([x.clone().requires_grad_(k < 2) for k, x in enumerate(batch)])
            assert all(self.agree(x, y, kind) for x, y in zip(results, expected, strict=True))

    def test_other_streams(self, kind, shape):
        batches = [self.logits(Case(shape), seed=seed) for seed in range(self.streams)]
        alone = [evaluate(self.name, batch) for batch in batches]

        def each(batch):  # without the counts, which are read from the device
            students = [x.detach().requires_grad_() for x in batch[:2]]
            criterion = vrm_kernels.VRMLoss(
                1.0, 1.0, ce_loss_on_real=False, ce_loss_on_virtual=False, backend=self.name
            )
            loss = criterion(*students, *batch[2:], torch.zeros(shape[0], dtype=torch.long, device=self.device))
            return [loss.detach(), *torch.autograd.grad(loss, students)]

        for found, expected in zip(on_streams(each, batches, self.device), alone, strict=True):
            for x, y in zip(found, (expected.loss, *expected.grads), strict=True):
                assert self.agree(x, y, kind)

    @pytest.mark.parametrize("inputs_kind", ["random", "opposite"])
    def test_nothing_uninitialised_is_read(self, shape, inputs_kind, monkeypatch):
        """torch fills fresh memory with NaN when asked to be deterministic."""
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        logits = self.logits(Case(shape, kind=inputs_kind))
        results = []
        for deterministic in (False, True):
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(deterministic)
            try:
                results.append(evaluate(self.name, logits))
            finally:
                torch.use_deterministic_algorithms(before)
        usual, poisoned = results
        assert poisoned.loss.isfinite() and max(errors(poisoned, usual).values()) < 1e-5


def check_against_torch(name: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Against the torch backend in float64, where the reference would take too much. A few of many edges may fall on
    the other side of the threshold."""
    logits = [x.to(device) for x in make_logits(Case(shape), dtype, 0)]
    for relations, percentile in (("inter_view", 30.0), ("complete", 100.0)):
        settings = {"relations": relations, "unreliable_pruning_percentile": percentile}
        oracle = evaluate("torch", [x.double() for x in logits], **settings)
        result = evaluate(name, logits, **settings)
        assert errors(result, oracle)["loss"] < 1e-4
        # Of large logits a gradient is 1e-5: float16 keeps one digit or two of it.
        bound = 5e-3 if dtype == torch.bfloat16 else 1e-3
        assert max(map(beyond_rounding, result.grads, oracle.grads)) < bound
        assert all(abs(x - y) <= 4 for x, y in zip(result.kept, oracle.kept, strict=True))


def choose(monkeypatch, form: str) -> None:
    """One form at every size; the dense one in several products, `blocks` with entropies that are computed again."""
    monkeypatch.setattr(forms, "LITERAL_INSTRUCTIONS", 2**60 if form == "literal" else 0)
    monkeypatch.setattr(forms, "STORED_EDGES", 16 if form == "blocks" else 2**26)
    launches.layout.cache_clear()
    monkeypatch.setattr(dense_launches, "PRODUCT_BYTES", 0)
    monkeypatch.setattr(dense_launches, "PRODUCT_ROWS", 8)


# Also with entropies that are computed again, by blocks of rows.
BLOCKS_TOO = pytest.mark.parametrize("form", ["literal", "dense", "blocks"], indirect=True)


class Forms:
    """Both forms against the reference in float64. What runs is asserted: the stages of the form, and no others."""

    name = "triton"
    device = "cuda"
    shape: tuple[int, int]  # several tiles each way over samples, ragged
    shapes: tuple[tuple[int, int], ...]  # others, from nothing on
    float64_shape: tuple[int, int]

    @pytest.fixture(params=["literal", "dense"])
    def form(self, request, monkeypatch):
        choose(monkeypatch, request.param)
        ran = []
        real = dense_launches.edges
        monkeypatch.setattr(dense_launches, "edges", lambda *args: ran.append(1) or real(*args))
        yield request.param
        assert bool(ran) == (request.param != "literal")

    def check(self, case: Case, dtype=torch.float32, floors=FLOOR) -> None:
        """Both graphs in one call, weighted so that neither hides the other."""
        oracle, eager, uncancelled = expected_of(case, dtype, 2.0, 1.0)
        logits = [x.to(self.device) for x in inputs(case, dtype)]
        result = on_cpu(evaluate(self.name, logits, alpha=2.0, beta=1.0, **settings_of(case)))
        assert_close(result, oracle, eager, floors[dtype], uncancelled)

    @BLOCKS_TOO
    def test_shapes(self, form):
        for shape, relations in ((shape, relations) for shape in self.shapes for relations in MODES):
            self.check(Case(shape, relations=relations, seed=20))

    @BLOCKS_TOO
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, form, dtype):
        floors = FLOOR | {torch.bfloat16: 5e-4} if form != "literal" else FLOOR  # of gradients that are rounded to 2^-9
        shape = self.float64_shape if dtype == torch.float64 else self.shape
        self.check(Case(shape, seed=500), dtype, floors)

    @BLOCKS_TOO
    @pytest.mark.parametrize(
        ("kind", "percentile"),
        [("opposite", 30.0), ("collapsed", 100.0), ("duplicated_across", 100.0), ("duplicated_within", 29.5)],
    )
    def test_uncertified_and_cancelled_edges(self, form, kind, percentile):
        """No edge certified; no edge longer than zero; some of each."""
        for relations, shape in modes(self.shape):
            self.check(Case(shape, kind=kind, relations=relations, percentile=percentile))

    def test_vertices_in_several_parts(self, form, monkeypatch):
        """Where registers would not hold one."""
        monkeypatch.setattr(launches, "LITERAL_BYTES", 64)
        assert all(launches._literal_shape(launches.padded(max(x)), 4)[1] > 1 for x in (self.shape, (17, 3)))
        for kind in ("random", "opposite"):
            self.check(Case(self.shape, kind=kind, percentile=100.0))

    def test_near_convergence(self, form):
        for noise in ("1e-2", "1e-3"):
            case = Case(self.shape, kind=f"converged:{noise}", percentile=100.0)
            self.check(case, floors=NEAR_CONVERGENCE_FLOOR)

    @pytest.mark.parametrize(("level", "floor"), [("highest", 1e-5), ("high", 1e-5), ("medium", 3e-3)])
    def test_float32_products_follow_the_switch(self, monkeypatch, level, floor):
        """With every edge kept: gradients of what PyTorch documents of each level, float32's digits or 16 or 8 bits."""
        choose(monkeypatch, "dense")
        case = Case(self.shape, percentile=100.0, seed=500)
        oracle, _, _ = expected_of(case, torch.float32, 2.0, 1.0)
        logits = [x.to(self.device) for x in inputs(case, torch.float32)]
        torch.set_float32_matmul_precision(level)
        try:
            result = on_cpu(evaluate(self.name, logits, alpha=2.0, beta=1.0, **settings_of(case)))
        finally:
            torch.set_float32_matmul_precision("highest")
        found = [relative_error(x, y) for x, y in zip(result.grads, oracle.grads, strict=True)]
        assert max(found) < floor and relative_error(result.loss, oracle.loss) < floor
        assert level == "highest" or min(found) > 1e-8  # another way of multiplying ran


class Blocks:
    """Entropies that are not stored: thresholds and kept edges where the bracket holds the rank, misses it, or leaves
    more than there is room for."""

    name = "triton"
    device = "cuda"

    @pytest.mark.parametrize("exclude_self", [False, True])
    @pytest.mark.parametrize(("plan", "missed"), [("held", 0), ("missed", 1), ("overflowed", 1), ("equal", 0)])
    def test_any_order_of_entropies(self, monkeypatch, plan, missed, exclude_self):
        """One-hot probabilities give each edge the entropy that is planned, exact in any order of summation."""
        choose(monkeypatch, "blocks")
        monkeypatch.setattr(forms, "sample", lambda edges: 64)
        m, n, generator = 20, 20 if exclude_self else 18, torch.Generator().manual_seed(0)
        entropies = 1 + torch.rand(m * n, generator=generator)
        if plan == "missed":  # what is sampled is larger than all others
            entropies[torch.arange(64) * 2654435761 % (m * n)] += 5
        if plan == "overflowed":
            monkeypatch.setattr(forms, "room", lambda edges: 16)
        if plan == "equal":
            entropies.fill_(1.5)
        probs = torch.eye(m), (-entropies.view(m, n).t()).exp().contiguous() - 1e-7
        a, b, ta, tb = (torch.randn(k, 7, generator=generator) for k in (m, n, m, n))
        sides = Sides(a, a, ta, ta) if exclude_self else Sides(a, b, ta, tb)
        seen = []
        real = dense_launches.edges
        monkeypatch.setattr(dense_launches, "edges", lambda *args: seen.append(args[0].arrays) or real(*args))
        settings = GraphSettings(75.0, 1.0, RELATION_EPS, exclude_self)
        found = (
            backends.REGISTRY[self.name]
            .load()
            .relation_graph(
                Sides(*(x.to(self.device) for x in sides)), tuple(x.to(self.device) for x in probs), settings, True
            )
        )
        expected = backends.REGISTRY["torch"].load().relation_graph(sides, probs, settings, True)
        assert int(seen[0].missed[0]) == missed and int(found.kept) == int(expected.kept)
        for x, wanted in zip(found[:3], expected[:3], strict=True):
            assert relative_error(x.cpu(), wanted) < 1e-5


class Thresholds:
    """``torch.quantile``'s to the bit, and how many entropies are at or below, after any number of brackets."""

    device = "cuda"

    def assert_selected(self, monkeypatch, values, percentile, levels):
        monkeypatch.setattr(forms, "levels", lambda edges: levels)
        launches.layout.cache_clear()
        values = values.to(self.device)
        (m, n), logits = values.shape, [values.new_zeros(k, 1) for k in (*values.shape, *values.shape)]
        problem = launches.Problem(
            logits, logits[:2], ((m, n, 1),), (1.0, 0.0), percentile, 1.0, RELATION_EPS, False, False, False
        )
        call = launches.lay_out(problem)
        assert len(call.layout.sources) == levels + 1
        call.arrays.entropies[: m * n] = values.flatten()
        call.arrays.brackets.zero_()
        launches.select(call)
        expected = torch.quantile(values.flatten(), percentile / 100)
        assert torch.equal(call.arrays.thresholds[0], expected)
        assert int(call.arrays.kept[0]) == int((values <= expected).sum())

    @pytest.mark.parametrize("levels", [0, 1, 2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_the_threshold_is_torch_quantiles_to_the_bit(self, monkeypatch, dtype, levels):
        values = torch.randn(90, 300, dtype=dtype, generator=torch.Generator().manual_seed(0))
        values[2:4] = values[2:4].round()
        values[4] *= 1e-30
        values[5, :4], values[5, 4:8] = 0.0, -0.0
        for percentile in (0.0, 1e-9, 30.0, 50.0, 99.9):
            self.assert_selected(monkeypatch, values, percentile, levels)

    @pytest.mark.parametrize("levels", [1, 2])
    def test_ties_at_the_ends_of_a_bracket(self, monkeypatch, levels):
        generator = torch.Generator().manual_seed(0)
        for values in (torch.full((90, 300), 1.5), torch.randint(0, 3, (90, 300), generator=generator).float()):
            for percentile in (30.0, 61.0):
                self.assert_selected(monkeypatch, values, percentile, levels)

    def test_a_bracket_that_misses_and_one_that_overflows(self, monkeypatch):
        """The sampled entropies are larger than all others; or as if drawn from a much wider distribution."""
        generator = torch.Generator().manual_seed(0)
        sampled = torch.arange(forms.sample(27000)) * 2654435761 % 27000
        values = torch.rand(27000, generator=generator)
        values[sampled] += 5
        self.assert_selected(monkeypatch, values.view(90, 300), 30.0, 1)
        values = 0.3 + 0.01 * torch.rand(27000, generator=generator)
        values[sampled] = torch.rand(forms.sample(27000), generator=generator)
        self.assert_selected(monkeypatch, values.view(90, 300), 30.0, 1)
