"""Parity as a property: Hypothesis draws the shapes, the values and the settings."""

import pytest
import torch
from helpers import (
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    Case,
    compare,
    evaluate,
    evaluate_relation,
    make_logits,
    mask_is_settled,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

KINDS = ["random", "random", "opposite", "duplicated_within", "duplicated_across", "converged:1e-1", "converged:1e-2"]
HERE = settings(suppress_health_check=list(HealthCheck))  # the backend fixture is one value for all examples


@HERE
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([0.5, 1.0, 3.0]),
    percentile=st.one_of(st.sampled_from([0.0, 1.0, 30.0, 50.0, 100.0]), st.floats(0.0, 100.0)),
    delta=st.one_of(st.just(1.0), st.floats(0.05, 3.0)),
    relations=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (2.0, 0.5)]),
    seed=st.integers(0, 2**31),
)
def test_parity(backend, shape, kind, scale, percentile, delta, relations, dtype, weights, seed):
    logits = make_logits(Case(shape, kind=kind, scale=scale), dtype, seed)
    # Quadratic throughout, an opposite student's loss is at its top: no gradient to compare.
    assume(kind != "opposite" or delta < 1.9)
    assume(mask_is_settled(logits, percentile, relations))
    chosen = {"unreliable_pruning_percentile": percentile, "delta": delta, "relations": relations}
    chosen |= {"alpha": weights[0], "beta": weights[1]}
    floors = NEAR_CONVERGENCE_FLOOR if kind.startswith("converged") else FLOOR
    compare(backend, logits, floors[dtype], **chosen)


@st.composite
def coarse_vectors(draw):
    """Vertices on a grid: equal rows, zero differences in student or teacher or both, ties in every component."""
    m, n, d = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    values = st.integers(-2, 2).map(lambda k: k / 2)
    rows = st.lists(st.lists(values, min_size=d, max_size=d), min_size=m + n, max_size=m + n)
    student, teacher = torch.tensor(draw(rows)), torch.tensor(draw(rows))
    return [student[:m], student[m:], teacher[:m], teacher[m:]]


@HERE
@given(vectors=coarse_vectors(), delta=st.sampled_from([0.05, 0.5, 1.0, 3.0]))
def test_parity_of_coincident_vertices(backend, vectors, delta):
    for dtype in (torch.float32, torch.float64):
        vectors = [x.to(dtype) for x in vectors]
        compare(backend, vectors, FLOOR[dtype], evaluate_relation, delta=delta)


@pytest.mark.parametrize("relations", MODES)
def test_loss_is_invariant_to_what_the_formula_is_invariant_to(backend, relations):
    """A common shift of all logits of a network, and the order of the samples."""
    logits = make_logits(Case((12, 9)), torch.float64, seed=5)
    order = torch.randperm(12)
    settings = {"relations": relations, "alpha": 2.0, "beta": 0.5}
    plain = evaluate(backend, logits, **settings)
    shifted = evaluate(backend, [logits[0] + 7.0, logits[1] + 7.0, logits[2] - 3.0, logits[3] - 3.0], **settings)
    shuffled = evaluate(backend, [x[order] for x in logits], **settings)
    assert plain.kept == shifted.kept == shuffled.kept
    torch.testing.assert_close(shifted.loss, plain.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(shuffled.loss, plain.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(shuffled.grads[0], plain.grads[0][order], rtol=1e-7, atol=1e-12)
