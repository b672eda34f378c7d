"""Parity where the formulas are delicate: convergence, collapse, saturation, duplicates and ties."""

import pytest
import torch
from helpers import (
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    Case,
    assert_close,
    assert_parity,
    compare,
    evaluate,
    evaluate_relation,
    expected,
    inputs,
    make_logits,
)

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
BOTH_MODES = pytest.mark.parametrize("relations", MODES)


@FLOATS
@BOTH_MODES
@pytest.mark.parametrize("noise", ["1e-2", "1e-3"])
@pytest.mark.parametrize("percentile", [30.0, 100.0])
def test_parity_near_convergence(backend, noise, relations, percentile, dtype):
    case = Case((37, 61), kind=f"converged:{noise}", relations=relations, percentile=percentile)
    assert_parity(backend, case, dtype, floors=NEAR_CONVERGENCE_FLOOR)


@FLOATS
@BOTH_MODES
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_student_that_equals_its_teacher_up_to_a_factor_has_no_loss(backend, relations, dtype, factor):
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
def test_parity_of_a_student_opposite_to_its_teacher(backend, relations, dtype):
    """Every relation reversed: no edge is certified."""
    assert_parity(backend, Case((37, 61), kind="opposite", relations=relations), dtype)


@FLOATS
@BOTH_MODES
def test_parity_of_a_collapsed_student(backend, relations, dtype):
    """All rows equal: zero differences, gradients of 1/eps."""
    case = Case((17, 31), kind="collapsed", relations=relations, percentile=100.0)
    assert_parity(backend, case, dtype)
    result = evaluate(backend, inputs(case, dtype), beta=0.0, relations=relations, unreliable_pruning_percentile=100.0)
    assert float(result.grads[0].norm()) > 1e4


@FLOATS
@BOTH_MODES
@pytest.mark.parametrize("kind", ["duplicated_within", "duplicated_across"])
@pytest.mark.parametrize("percentile", [29.5, 100.0])  # 29.5: between two groups of tied edges, not inside one
def test_parity_with_duplicated_rows(backend, kind, relations, percentile, dtype):
    assert_parity(backend, Case((18, 23), kind=kind, relations=relations, percentile=percentile), dtype)


@FLOATS
@pytest.mark.parametrize(("scale", "relations"), [(1e4, "complete"), (1e-4, "inter_view")])
def test_parity_of_huge_and_tiny_logits_unpruned(backend, scale, relations, dtype):
    assert_parity(backend, Case((37, 41), scale=scale, relations=relations, percentile=100.0), dtype)


@FLOATS
@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("kind", ["random", "converged:1e-2", "opposite"])
def test_parity_of_huge_and_tiny_vectors_pruned(backend, scale, kind, dtype):
    """The mask from well separated probabilities: at these scales the logits' own would be decided by rounding."""
    probs = tuple(x.softmax(1) for x in inputs(Case((37, 61)), dtype)[:2])
    vectors = make_logits(Case((37, 61), kind=kind, scale=scale), dtype, seed=0)
    floor = NEAR_CONVERGENCE_FLOOR if kind.startswith("converged") else FLOOR
    compare(backend, vectors, floor[dtype], evaluate_relation, probs=probs, percentile=30.0)


@FLOATS
def test_parity_of_saturated_logits_pruned(backend, dtype):
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
def test_parity_with_exact_ties(backend, percentile, relations, dtype):
    """Balanced one-hot predictions, two samples a class: in both graphs H takes two values, exact in any order."""
    classes = 5
    labels = torch.arange(2 * classes) % classes
    _, _, *teacher = make_logits(Case((2 * classes, classes)), dtype, seed=0)
    noise = make_logits(Case((2 * classes, classes)), dtype, seed=1)
    peaks = [400.0 * torch.nn.functional.one_hot(x, classes).to(dtype) for x in (labels, labels.flip(0))]
    logits = [peaks[0] + noise[0], peaks[1] + noise[1], *teacher]
    settings = {"alpha": 2.0, "beta": 3.0, "relations": relations, "unreliable_pruning_percentile": percentile}
    compare(backend, logits, FLOOR[dtype], **settings)


def test_near_zero_differences_feel_the_eps(backend):
    """Differences of 1e-9 to 1e-5, where ||d|| + 1e-7 is far from ||d||."""
    for exponent in range(-9, -4):
        vectors = [x * 10.0**exponent for x in make_logits(Case((6, 4)), torch.float32, seed=exponent + 20)]
        vectors[2:] = make_logits(Case((6, 4)), torch.float32, seed=0)[2:]
        compare(backend, vectors, FLOOR[torch.float32], evaluate_relation)
