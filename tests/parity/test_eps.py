"""The relation's eps is a setting: the formula with it, on every backend, and what it does for a collapsed student."""

import pytest
import torch
from helpers import FLOOR, MODES, ROUNDINGS, Case, compare, evaluate, evaluate_relation, inputs, relative_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5, 20.0])
def test_the_formula_with_another_eps(backend, eps, relations, dtype):
    logits = inputs(Case((33, 18), relations=relations), dtype)
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
        compare(backend, logits, FLOOR[dtype], alpha=alpha, beta=beta, eps=eps, relations=relations)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_one_graph_with_another_eps(backend, eps):
    compare(backend, inputs(Case((13, 9)), torch.float32), FLOOR[torch.float32], run=evaluate_relation, eps=eps)


def test_a_student_whose_logits_are_equal_gets_a_gradient_of_one_over_eps(any_backend):
    _, _, *teacher = inputs(Case((17, 12)), torch.float64)
    zeros = [torch.zeros(17, 12, dtype=torch.float64)] * 2
    sizes = [
        float(evaluate(any_backend, [*zeros, *teacher], eps=eps, unreliable_pruning_percentile=100.0).grads[0].norm())
        for eps in (1e-7, 1e-2)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(1e5, rel=1e-2) and sizes[0] > 1e5


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (0.0, 1.0)])
def test_one_tensor_as_both_views(any_backend, alpha, beta):
    """Every sample's gradient of 1 / eps is in both views' with opposite signs: what they add up to is off by what they
    are rounded by, each of them being right."""
    student, _, *teacher = inputs(Case((17, 12)), torch.float64)

    def gradients(dtype, eps):
        logits = [x.to(dtype) for x in (student, student, *teacher)]
        settings = dict(alpha=alpha, beta=beta, eps=eps, unreliable_pruning_percentile=100.0)
        return [x.double() for x in evaluate(any_backend, logits, **settings).grads]

    for eps, least in ((1e-7, 1e4), (1e-3, 1.0)):
        exact, single = gradients(torch.float64, eps), gradients(torch.float32, eps)
        assert all(relative_error(x, y) < FLOOR[torch.float32] for x, y in zip(single, exact, strict=True))
        views, both = float(exact[0].abs().max()), exact[0] + exact[1]
        assert views > least * float(both.abs().max())
        error = float((single[0] + single[1] - both).abs().max())
        assert error <= ROUNDINGS * torch.finfo(torch.float32).eps * views
    assert error < 1e-3 * float(both.abs().max())
