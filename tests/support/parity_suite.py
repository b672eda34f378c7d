"""The tests that every backend takes, as classes. A subclass named Test... runs them with its module's fixtures
``backend`` and ``any_backend``."""

import pytest
import torch
from helpers import (
    BAD,
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
    expected,
    inputs,
    make_labels,
    make_logits,
    relative_error,
    settings_of,
)

from vrm_kernels.backends import reference
from vrm_kernels.backends.contract import compute_dtype
from vrm_kernels.graph import pruning

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
BOTH_MODES = pytest.mark.parametrize("relations", MODES)
PERCENTILES = [0.0, 1.0, 30.0, 50.0, 99.0, 100.0]
RAGGED = (37, 61)  # more than a tile, a block or a register on both sides; a subclass whose backend is slow has its own


class Extremes:
    """Where the formulas are delicate: convergence, collapse, saturation, duplicates, ties, no number at all."""

    shape = RAGGED

    @FLOATS
    @BOTH_MODES
    @pytest.mark.parametrize("noise", ["1e-2", "1e-3"])
    @pytest.mark.parametrize("percentile", [30.0, 100.0])
    def test_parity_near_convergence(self, backend, noise, relations, percentile, dtype):
        case = Case(self.shape, kind=f"converged:{noise}", relations=relations, percentile=percentile)
        assert_parity(backend, case, dtype, floors=NEAR_CONVERGENCE_FLOOR)

    @FLOATS
    @BOTH_MODES
    @pytest.mark.parametrize("factor", [1.0, 0.5])
    def test_a_student_that_equals_its_teacher_up_to_a_factor_has_no_loss(self, backend, relations, dtype, factor):
        """Relations do not depend on length. Zero, measured against what a random student gets."""
        settings = {"relations": relations, "unreliable_pruning_percentile": 100.0}
        teacher = make_logits(Case((17, 31), kind="equal"), dtype, seed=0)
        random = evaluate("reference", make_logits(Case((17, 31)), dtype, seed=0), **settings)
        result = evaluate(backend, [factor * teacher[0], factor * teacher[1], *teacher[2:]], **settings)
        tiny = 1e-5 if dtype == torch.float32 else 1e-10
        assert 0 <= float(result.loss) <= tiny * float(random.loss)
        for grad, usual in zip(result.grads, random.grads, strict=True):
            assert float(grad.norm()) <= tiny * float(usual.norm())

    @FLOATS
    @BOTH_MODES
    def test_parity_of_a_student_opposite_to_its_teacher(self, backend, relations, dtype):
        """Every relation reversed: no edge is certified."""
        assert_parity(backend, Case(self.shape, kind="opposite", relations=relations), dtype)

    @FLOATS
    @BOTH_MODES
    def test_parity_of_a_collapsed_student(self, backend, relations, dtype):
        """All rows equal: zero differences, gradients of 1/eps."""
        case = Case((17, 31), kind="collapsed", relations=relations, percentile=100.0)
        assert_parity(backend, case, dtype)
        result = evaluate(
            backend, inputs(case, dtype), beta=0.0, relations=relations, unreliable_pruning_percentile=100.0
        )
        assert float(result.grads[0].norm()) > 1e4

    @FLOATS
    @BOTH_MODES
    @pytest.mark.parametrize("kind", ["duplicated_within", "duplicated_across"])
    @pytest.mark.parametrize("percentile", [29.5, 100.0])  # 29.5: between two groups of tied edges, not inside one
    def test_parity_with_duplicated_rows(self, backend, kind, relations, percentile, dtype):
        assert_parity(backend, Case((18, 23), kind=kind, relations=relations, percentile=percentile), dtype)

    @FLOATS
    @pytest.mark.parametrize(("scale", "relations"), [(1e4, "complete"), (1e-4, "inter_view")])
    def test_parity_of_huge_and_tiny_logits_unpruned(self, backend, scale, relations, dtype):
        assert_parity(backend, Case(self.shape, scale=scale, relations=relations, percentile=100.0), dtype)

    @FLOATS
    @pytest.mark.parametrize("scale", [1e4, 1e-4])
    @pytest.mark.parametrize("kind", ["random", "converged:1e-2", "opposite"])
    def test_parity_of_huge_and_tiny_vectors_pruned(self, backend, scale, kind, dtype):
        """The mask from well separated probabilities: at these scales the logits' own would be decided by rounding."""
        probs = tuple(x.softmax(1) for x in inputs(Case(self.shape), dtype)[:2])
        vectors = make_logits(Case(self.shape, kind=kind, scale=scale), dtype, seed=0)
        floor = NEAR_CONVERGENCE_FLOOR if kind.startswith("converged") else FLOOR
        compare(backend, vectors, floor[dtype], evaluate_relation, probs=probs, percentile=30.0)

    @FLOATS
    def test_parity_of_saturated_logits_pruned(self, backend, dtype):
        """At 1e4 the softmax is one-hot: H takes two values, and all the edges tied at the threshold are kept."""
        logits = make_logits(Case((24, 10), scale=1e4), dtype, seed=0)
        same_class = logits[0].argmax(1)[:, None] == logits[1].argmax(1)[None]
        share = 100 * float(same_class.double().mean())
        for percentile, kept in ((share / 2, int(same_class.sum())), (share + 5, 24 * 24)):
            settings = {"alpha": 1.0, "beta": 0.0, "unreliable_pruning_percentile": percentile}
            oracle, eager, uncancelled = expected(logits, **settings)
            result = evaluate(backend, logits, **settings)
            assert oracle.kept[0] == kept
            # The inter-class sums of tied values do round differently, and have weight 0 here.
            result, oracle, eager = (x._replace(kept=x.kept[:1]) for x in (result, oracle, eager))
            assert_close(result, oracle, eager, FLOOR[dtype], uncancelled)

    @FLOATS
    @BOTH_MODES
    @pytest.mark.parametrize("percentile", [0.0, 10.0, 49.0, 51.0, 90.0, 100.0])
    def test_parity_with_exact_ties(self, backend, percentile, relations, dtype):
        """Balanced one-hot predictions, two samples a class: in both graphs H takes two values, exact in any order."""
        classes = 5
        labels = torch.arange(2 * classes) % classes
        _, _, *teacher = make_logits(Case((2 * classes, classes)), dtype, seed=0)
        noise = make_logits(Case((2 * classes, classes)), dtype, seed=1)
        peaks = [400.0 * torch.nn.functional.one_hot(x, classes).to(dtype) for x in (labels, labels.flip(0))]
        logits = [peaks[0] + noise[0], peaks[1] + noise[1], *teacher]
        settings = {"alpha": 2.0, "beta": 3.0, "relations": relations, "unreliable_pruning_percentile": percentile}
        compare(backend, logits, FLOOR[dtype], **settings)

    def test_near_zero_differences_feel_the_eps(self, backend):
        """Differences of 1e-9 to 1e-5, where ||d|| + 1e-7 is far from ||d||."""
        for exponent in range(-9, -4):
            vectors = [x * 10.0**exponent for x in make_logits(Case((6, 4)), torch.float32, seed=exponent + 20)]
            vectors[2:] = make_logits(Case((6, 4)), torch.float32, seed=0)[2:]
            compare(backend, vectors, FLOOR[torch.float32], evaluate_relation)

    def test_no_finite_tensor_at_all(self, any_backend):
        for value in BAD:
            logits = [torch.full((6, 5), value)] * 4
            assert evaluate(any_backend, logits).loss.isnan()


def transposed(x):
    return x.t().contiguous().t()


def strided(x):
    """Every second row and third column of a tensor of NaN: reading a neighbour poisons the loss."""
    b, c = x.shape
    return x.new_full((2 * b + 1, 3 * c + 2), torch.nan)[1::2, 2::3].copy_(x)


def offset(x):
    return x.new_full((x.numel() + 3,), torch.nan)[3:].view(x.shape).copy_(x)


def padded_rows(x):
    return x.new_full((x.shape[0], x.shape[1] + 5), torch.nan)[:, :-5].copy_(x)


LAYOUTS = [transposed, strided, offset, padded_rows]


class Inputs:
    """Mixtures of dtypes, strides and storage offsets."""

    shape = RAGGED

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
    def test_parity_over_layouts(self, backend, layout, dtype):
        x = torch.randn(self.shape)
        laid = layout(x)
        assert torch.equal(laid, x) and (not laid.is_contiguous() or laid.storage_offset() > 0)
        for relations in MODES:
            assert_parity(backend, Case(self.shape, relations=relations, seed=500), dtype, layout=layout)

    def test_each_input_may_have_its_own_layout(self, backend):
        case = Case(self.shape, seed=500)
        logits = inputs(case, torch.float32)
        for turn in range(4):
            layouts = LAYOUTS[turn:] + LAYOUTS[:turn]
            mixed = [layout(x) for layout, x in zip(layouts, logits, strict=True)]
            compare(backend, mixed, FLOOR[torch.float32])

    def test_expanded_inputs(self, backend):
        """Stride 0: a teacher whose rows are all one, and a student that is a broadcast of one row (gradients sum)."""
        student_real, student_virtual, teacher_real, teacher_virtual = inputs(Case((9, 6), seed=600), torch.float32)
        logits = [student_real, student_virtual, teacher_real[:1].expand(9, 6), teacher_virtual]
        compare(backend, logits, FLOOR[torch.float32], unreliable_pruning_percentile=100.0)

        logits = [student_real[:1].expand(9, 6), student_virtual, teacher_real, teacher_virtual]
        compare(backend, logits, FLOOR[torch.float32], unreliable_pruning_percentile=100.0)

    @pytest.mark.parametrize(
        ("dtypes", "loss_dtype"),
        [
            ((torch.float16, torch.float16, torch.float32, torch.float32), torch.float32),
            ((torch.bfloat16, torch.float32, torch.bfloat16, torch.float32), torch.float32),
            ((torch.float16, torch.bfloat16, torch.float16, torch.bfloat16), torch.float32),
            ((torch.float32, torch.float32, torch.float64, torch.float64), torch.float64),
            ((torch.float64, torch.float16, torch.float32, torch.float32), torch.float64),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("relations", MODES)
    def test_mixed_dtypes_compute_in_what_they_promote_to(self, backend, dtypes, loss_dtype, relations):
        case = Case((17, 31), relations=relations, seed=700)
        logits = [x.to(dtype) for x, dtype in zip(inputs(case, torch.bfloat16), dtypes, strict=True)]
        result = compare(backend, logits, FLOOR[loss_dtype], alpha=2.0, beta=3.0, relations=relations)
        assert result.loss.dtype == loss_dtype
        assert [grad.dtype for grad in result.grads] == list(dtypes[:2])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_inputs_are_left_as_they_were(self, any_backend, dtype):
        logits = [strided(x) for x in inputs(Case((17, 31), seed=800), dtype)]
        logits += [offset(logits[0])]
        before = [(x.clone(), x._version) for x in logits]
        evaluate(any_backend, logits[:4], relations="complete")
        evaluate(any_backend, [logits[4], *logits[1:4]])
        for x, (copy, version) in zip(logits, before, strict=True):
            assert torch.equal(x, copy) and x._version == version


class Mask:
    """Which edges count: exactly the reference's away from the threshold; at it, flips counted and bounded."""

    @pytest.mark.parametrize("relations", MODES)
    @pytest.mark.parametrize("percentile", PERCENTILES)
    def test_kept_counts_are_the_references_in_every_dtype(self, backend, percentile, relations):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            case = Case((23, 19), percentile=percentile, relations=relations, seed=900)
            logits = inputs(case, dtype)
            oracle = evaluate("reference", [x.double() for x in logits], **settings_of(case))
            assert evaluate(backend, logits, **settings_of(case)).kept == oracle.kept

    @pytest.mark.parametrize("relations", MODES)
    @pytest.mark.parametrize("percentile", [1e-9, 99.9, 100 - 1e-9])
    def test_percentiles_next_to_the_ends(self, backend, percentile, relations):
        """In float32 the last is 100 %: the rank is whole and the value after it, a self-edge's, is infinite."""
        for dtype in (torch.float32, torch.float64):
            logits = make_logits(Case((8, 6)), dtype, seed=1)
            settings = {"unreliable_pruning_percentile": percentile, "relations": relations}
            result, eager = evaluate(backend, logits, **settings), evaluate("reference", logits, **settings)
            assert result.kept == eager.kept
            assert result.loss.isfinite() and relative_error(result.loss, eager.loss) < 1e-5

    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("percentile", PERCENTILES)
    def test_the_kept_edges_are_the_references_one_by_one(self, backend, side, percentile):
        """With one vertex on one side, every vertex of the other is one edge: its gradient shows if it was kept."""
        generator = torch.Generator(torch.get_default_device()).manual_seed(2)
        sizes = (1, 400) if side == 1 else (400, 1)
        vectors = [torch.randn(k, 8, generator=generator) for k in sizes * 2]
        probs = tuple((2 * torch.randn(k, 10, generator=generator)).softmax(1) for k in sizes)
        result = evaluate_relation(backend, vectors, probs=probs, percentile=percentile)
        seen = result.grads[side].abs().sum(1) > 0

        wide = tuple(x.double() for x in probs)
        expected = reference.kept_edges(wide, *sizes, percentile, False).flatten()
        entropy = pruning.joint_entropy(*wide).flatten()
        threshold = pruning.quantile_sorted(entropy, percentile / 100)
        band = (entropy - threshold).abs() <= 1e-6 * entropy.abs().max()
        assert torch.equal(seen[~band], expected[~band])
        assert int(band.sum()) <= 2


def check_vrm_loss(backend, shape, need_grad, relations, dtype):
    logits = make_logits(Case(shape), dtype, 0)
    for x in logits[:2]:
        x.requires_grad_(need_grad)
    settings = SETTINGS._replace(complete=relations == "complete")
    weight = torch.ones(shape[1], dtype=compute_dtype(*logits))
    arguments = (*logits, make_labels(*shape), weight, None, *settings, False, need_grad, backend)
    torch.library.opcheck(torch.ops.vrm_kernels.vrm_loss, arguments)


class Operators:
    """The loss's operator is what PyTorch asks of one, and what eager mode computes."""

    @pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)], ids=str)
    def test_opcheck_vrm_loss_of_one_row_or_column(self, backend, shape):
        check_vrm_loss(backend, shape, True, "complete", torch.float32)

    def test_opcheck_on_strided_logits(self, backend):
        logits = [x.t().contiguous().t() for x in make_logits(Case((6, 5)), torch.float32, 0)]
        logits[1] = torch.randn(12, 15)[::2, ::3]
        for x in logits[:2]:
            x.requires_grad_()
        arguments = (*logits, make_labels(6, 5, "probabilities"), None, None, *SETTINGS, False, True, backend)
        torch.library.opcheck(torch.ops.vrm_kernels.vrm_loss, arguments)

    def test_without_gradients_none_are_computed(self, backend):
        """need_grad is what spares evaluation the gradient's work: the operator then returns empty ones."""
        logits = make_logits(Case((6, 5)), torch.float32, 0)
        for complete in (False, True):
            settings = SETTINGS._replace(complete=complete)
            outputs = torch.ops.vrm_kernels.vrm_loss(
                *logits, make_labels(6, 5), None, None, *settings, False, False, backend
            )
            assert outputs[1].numel() == outputs[2].numel() == 0
            outputs = torch.ops.vrm_kernels.relation_graph(*logits, None, None, *GRAPH_SETTINGS, False, backend)
            assert outputs[1].numel() == outputs[2].numel() == 0

    @pytest.mark.parametrize("relations", MODES)
    def test_the_operator_is_what_eager_mode_computes(self, backend, relations):
        """Eager calls skip the dispatcher: the same bits, gradients and refusal of second derivatives with it."""
        logits = make_logits(Case((17, 13)), torch.float32, 0)
        labels = make_labels(17, 13)
        eager = evaluate(
            backend, logits, labels, alpha=2.0, beta=0.5, ce=(True, True), label_smoothing=0.1, relations=relations
        )
        students = [x.clone().requires_grad_() for x in logits[:2]]
        settings = SETTINGS._replace(complete=relations == "complete")
        loss, *_, kept = torch.ops.vrm_kernels.vrm_loss(
            *students, *logits[2:], labels, None, None, *settings, False, True, backend
        )
        grads = torch.autograd.grad(loss, students, create_graph=True)
        assert torch.equal(loss.detach(), eager.loss) and tuple(kept.tolist()) == eager.kept
        assert all(torch.equal(x, y) for x, y in zip(grads, eager.grads, strict=True))
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(grads[0].square().sum(), students)


class Settings:
    """The percentiles, deltas and weights."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("relations", MODES)
    @pytest.mark.parametrize("percentile", [0.0, 1.0, 30.0, 50.0, 99.5, 100.0])
    @pytest.mark.parametrize("shape", [(17, 31), (41, 23)], ids=lambda s: f"{s[0]}x{s[1]}")
    def test_parity_over_percentiles(self, backend, shape, percentile, relations, dtype):
        assert_parity(backend, Case(shape, percentile=percentile, relations=relations, seed=100), dtype)

    @pytest.mark.parametrize("relations", MODES)
    @pytest.mark.parametrize("delta", [0.05, 0.5, 1.0, 3.0])
    def test_parity_over_deltas(self, backend, delta, relations):
        for dtype in (torch.float32, torch.float64):
            assert_parity(backend, Case((19, 23), delta=delta, relations=relations, seed=200), dtype)

    @pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (0.0, 3.0), (3.0, 0.0), (0.0, 0.0), (16, 8)])
    @pytest.mark.parametrize("relations", MODES)
    def test_parity_over_weights(self, backend, alpha, beta, relations):
        logits = inputs(Case((19, 23), relations=relations, seed=300), torch.float32)
        result = compare(backend, logits, FLOOR[torch.float32], alpha=alpha, beta=beta, relations=relations)
        if alpha == beta == 0:
            assert float(result.loss) == 0 and not any(grad.any() for grad in result.grads)
