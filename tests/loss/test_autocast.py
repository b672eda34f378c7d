"""Mixed precision: autocast, a half-precision student, and a loss scale that keeps its gradients alive."""

import pytest
import torch
from helpers import MODES, Case, evaluate, inputs, make_labels, relative_error

import vrm_kernels
import vrm_kernels.functional as VF

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALVES
def test_a_linear_model_under_autocast(any_backend, dtype):
    """Logits come out in half; the loss is what it is in float32 on those logits, inside the region and outside."""
    torch.manual_seed(3)
    model = torch.nn.Linear(12, 7)
    real, virtual, teacher = torch.randn(9, 12), torch.randn(9, 12), torch.randn(9, 7)
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=any_backend)
    labels = make_labels(9, 7)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(real), model(virtual)
        assert logits[0].dtype == dtype
        inside = criterion(*logits, teacher, teacher, labels)
    assert inside.dtype == torch.float32
    inside.backward()
    assert model.weight.grad.dtype == torch.float32 and model.weight.grad.any()
    outside = criterion(*(x.detach() for x in logits), teacher, teacher, labels)
    assert torch.equal(inside.detach(), outside)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("relations", MODES)
def test_autocast_changes_no_bit_of_the_loss(any_backend, relations, input_dtype):
    logits = inputs(Case((17, 13), relations=relations, seed=1100), torch.bfloat16)
    logits = [x.to(input_dtype) for x in logits]
    settings = {"alpha": 2.0, "beta": 0.5, "ce": (True, True), "relations": relations}
    plain = evaluate(any_backend, logits, make_labels(17, 13), **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = evaluate(any_backend, logits, make_labels(17, 13), **settings)
        relation = VF.relation_loss(*logits, backend=any_backend)
    assert cast.loss.dtype == (torch.float64 if input_dtype == torch.float64 else torch.float32)
    assert torch.equal(cast.loss, plain.loss) and cast.kept == plain.kept
    assert torch.equal(relation, VF.relation_loss(*logits, backend=any_backend))
    for grad, expected in zip(cast.grads, plain.grads, strict=True):
        assert grad.dtype == input_dtype and torch.equal(grad, expected)


@HALVES
def test_backward_under_autocast(any_backend, dtype):
    logits = [x.clone() for x in inputs(Case((17, 13), seed=1100), torch.float32)]
    logits[0].requires_grad_()
    loss = VF.vrm_loss(*logits, None, 2.0, 0.5, False, False, backend=any_backend)
    (plain,) = torch.autograd.grad(loss, logits[0], retain_graph=True)
    with torch.autocast("cpu", dtype=dtype):
        (cast,) = torch.autograd.grad(loss, logits[0])
    assert torch.equal(cast, plain)


def test_a_loss_scale_saves_float16_gradients_from_underflow(any_backend):
    """Small weights: unscaled, float16 gradients vanish; scaled by 65536 they keep float16's eleven bits."""
    logits = inputs(Case((37, 31), seed=1200), torch.float16)
    settings = {"alpha": 1e-4, "beta": 1e-4}
    oracle = evaluate("reference", [x.double() for x in logits], **settings)
    scaled = evaluate(any_backend, logits, scale=65536.0, **settings)
    unscaled = evaluate(any_backend, logits, **settings)
    for k in (0, 1):
        assert scaled.grads[k].dtype == torch.float16
        assert relative_error(scaled.grads[k].double() / 65536, oracle.grads[k]) < 2**-11
        assert relative_error(unscaled.grads[k], oracle.grads[k]) > 0.05


def test_float16_at_its_largest_finite_value(any_backend):
    """Squares and sums of 65504 overflow float16: nothing may be accumulated in it."""
    logits = [x.clone() for x in inputs(Case((9, 6), seed=1300), torch.float16)]
    for x in logits:
        x[0, 0], x[1, 1] = 65504.0, -65504.0
    settings = {"unreliable_pruning_percentile": 100.0}
    oracle = evaluate("reference", [x.double() for x in logits], **settings)
    result = evaluate(any_backend, logits, **settings)
    assert relative_error(result.loss, oracle.loss) < 1e-5
    assert all(relative_error(x, y) < 2e-3 for x, y in zip(result.grads, oracle.grads, strict=True))
