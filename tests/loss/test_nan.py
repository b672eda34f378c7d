"""A non-finite logit anywhere makes the loss NaN, on every backend; check_finite says where it was."""

import itertools

import pytest
import torch
from helpers import BAD, MODES, Case, evaluate, evaluate_relation, make_labels, make_logits, poisoned

import vrm_kernels.functional as VF

NAMES = ["logits_student_real", "logits_student_virtual", "logits_teacher_real", "logits_teacher_virtual"]


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("percentile", [0.0, 30.0])
def test_one_element_anywhere_poisons_the_loss(any_backend, percentile, relations):
    """At percentile 0 one edge is kept in each graph: nearly every element has all its edges pruned."""
    shape = (4, 3)
    logits = make_logits(Case(shape), torch.float32, seed=0)
    settings = {"unreliable_pruning_percentile": percentile, "relations": relations}
    assert evaluate(any_backend, logits, **settings).loss.isfinite()
    for tensor, index, value in itertools.product(range(4), range(12), BAD):
        bad = poisoned(logits, tensor, index, value)
        loss = VF.vrm_loss(*bad, None, 1.0, 1.0, False, False, backend=any_backend, **settings)
        assert loss.isnan(), (NAMES[tensor], divmod(index, shape[1]), value)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_whatever_the_weights_and_dtype(any_backend, weights, dtype):
    logits = make_logits(Case((5, 7)), dtype, seed=0)
    settings = {"alpha": weights[0], "beta": weights[1], "unreliable_pruning_percentile": 0.0}
    assert evaluate(any_backend, logits, **settings).loss.isfinite()
    for tensor, index, value in itertools.product(range(4), (0, 17, 34), BAD):
        assert evaluate(any_backend, poisoned(logits, tensor, index, value), **settings).loss.isnan()


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (67, 101), (129, 33)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("relations", MODES)
def test_whatever_the_shape_with_and_without_gradients(backend, shape, relations):
    logits = make_logits(Case(shape), torch.float32, seed=0)
    settings = {"unreliable_pruning_percentile": 1.0, "relations": relations, "backend": backend}
    assert VF.vrm_loss(*logits, None, 1.0, 1.0, False, False, **settings).isfinite()
    last = logits[0].numel() - 1
    for tensor, (value, index) in itertools.product(range(4), zip(BAD, (0, last // 2, last), strict=True)):
        bad = poisoned(logits, tensor, index, value)
        assert VF.vrm_loss(*bad, None, 1.0, 1.0, False, False, **settings).isnan()
        bad[0].requires_grad_()
        assert VF.vrm_loss(*bad, None, 1.0, 1.0, False, False, **settings).isnan()


@pytest.mark.parametrize("percentile", [0.0, 100.0])
@pytest.mark.parametrize("ranked", [False, True])
def test_relation_loss_too(any_backend, ranked, percentile):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    vectors = [torch.randn(k, 3, generator=generator) for k in (4, 5, 4, 5)]
    probs = tuple(torch.rand(k, 6, generator=generator).softmax(1) for k in (4, 5)) if ranked else None
    settings = {"probs": probs, "percentile": percentile}
    assert evaluate_relation(any_backend, vectors, **settings).loss.isfinite()
    for tensor, value in itertools.product(range(4), BAD):
        for index in range(vectors[tensor].numel()):
            assert evaluate_relation(any_backend, poisoned(vectors, tensor, index, value), **settings).loss.isnan()


@pytest.mark.parametrize(("name", "tensor"), [(name, k) for k, name in enumerate(NAMES)])
@pytest.mark.parametrize("value", BAD)
def test_check_finite_names_the_tensor(any_backend, name, tensor, value):
    labels = make_labels(4, 3)
    logits = make_logits(Case((4, 3)), torch.float32, seed=0)
    settings = {"backend": any_backend, "check_finite": True}
    assert VF.vrm_loss(*logits, labels, 1.0, 1.0, **settings).isfinite()
    with pytest.raises(ValueError, match=f"{name} has 1 non-finite values of 12"):
        VF.vrm_loss(*poisoned(logits, tensor, 5, value), labels, 1.0, 1.0, **settings)
