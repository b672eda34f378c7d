"""Parity over the percentiles, deltas, weights, cross-entropies and kinds of labels."""

import parity_suite
import pytest
import torch
import torch.nn.functional as F
from helpers import Case, Result, evaluate, inputs, make_labels, relative_error


class TestSettings(parity_suite.Settings):
    """On every backend."""


def _cross_entropy(logits, labels, smoothing, ce) -> Result:
    students = [x.detach().requires_grad_() for x in logits[:2]]
    loss = sum(F.cross_entropy(x, labels, label_smoothing=smoothing) for x, on in zip(students, ce, strict=True) if on)
    grads = torch.autograd.grad(loss, students, allow_unused=True)
    return Result(loss.detach(), tuple(torch.zeros_like(students[0]) if g is None else g for g in grads))


@pytest.mark.parametrize("ce", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropy_is_torchs(any_backend, ce, smoothing, kind):
    """Without graphs the loss is F.cross_entropy of the chosen views; with them, it adds to them."""
    logits = inputs(Case((11, 7), seed=400), torch.float64)
    labels = make_labels(11, 7, kind)
    expected = _cross_entropy(logits, labels.double() if kind == "probabilities" else labels, smoothing, ce)
    alone = evaluate(any_backend, logits, labels, alpha=0.0, beta=0.0, ce=ce, label_smoothing=smoothing)
    graphs = evaluate(any_backend, logits, alpha=2.0, beta=3.0)
    both = evaluate(any_backend, logits, labels, alpha=2.0, beta=3.0, ce=ce, label_smoothing=smoothing)
    assert relative_error(alone.loss, expected.loss) < 1e-12
    assert relative_error(both.loss, expected.loss + graphs.loss) < 1e-12
    for k in (0, 1):
        assert relative_error(alone.grads[k], expected.grads[k]) < 1e-12
        assert relative_error(both.grads[k], expected.grads[k] + graphs.grads[k]) < 1e-12


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type(label_dtype):
    logits = inputs(Case((11, 7), seed=400), torch.float32)
    labels = make_labels(11, 7)
    expected = evaluate("auto", logits, labels, ce=(True, True))
    assert torch.equal(evaluate("auto", logits, labels.to(label_dtype), ce=(True, True)).loss, expected.loss)


def test_defaults_are_the_eager_classes():
    """Both cross-entropies, percentile 30, delta 1, edges between the views, no smoothing."""
    import vrm_kernels

    logits = inputs(Case((11, 7), seed=400), torch.float32)
    labels = make_labels(11, 7)
    spelled = evaluate(
        "auto", logits, labels, alpha=2.0, beta=3.0, ce=(True, True), unreliable_pruning_percentile=30,
        delta=1.0, relations="inter_view", label_smoothing=0.0,
    )  # fmt: skip
    assert torch.equal(vrm_kernels.VRMLoss(2.0, 3.0)(*logits, labels), spelled.loss)
