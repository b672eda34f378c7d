"""``normalize="zscore"``: both graphs see logits of mean 0 and deviation 1 in each row, the cross-entropies do not."""

import pytest
import torch
import torch.nn.functional as F

from vrm_kernels import VRMLoss, backends

B, C = 9, 6
ON_CPU = ("reference", "torch", "cpp")


def _logits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    views = [3 * torch.randn(B, C, generator=generator, dtype=torch.float64) + i for i in range(4)]
    return [x.to(dtype) for x in views], torch.arange(B) % C


def _rowwise(x):
    return torch.stack([(row - row.mean()) / (row - row.mean()).square().mean().sqrt() for row in x])


def _expected(views, labels, **settings):
    graphs = VRMLoss(4.0, 2.0, ce_loss_on_real=False, ce_loss_on_virtual=False, backend="reference", **settings)
    return sum(F.cross_entropy(x, labels) for x in views[:2]) + graphs(*map(_rowwise, views), labels)


@pytest.mark.parametrize("relations", ["inter_view", "complete"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_value_and_gradients_are_those_of_normalised_graphs(backend, relations):
    if not backends.REGISTRY[backend].status()[0]:
        pytest.skip(f"{backend} cannot run here")
    views, labels = _logits()
    leaves = [x.clone().requires_grad_() for x in views[:2]]
    loss = VRMLoss(4.0, 2.0, relations=relations, normalize="zscore", backend=backend)(*leaves, *views[2:], labels)
    others = [x.clone().requires_grad_() for x in views[:2]]
    expected = _expected([*others, *views[2:]], labels, relations=relations)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for mine, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, others), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)


def test_relations_do_not_change_with_scale_and_shift_of_a_sample():
    views, labels = _logits()
    loss_fn = VRMLoss(4.0, 2.0, ce_loss_on_real=False, ce_loss_on_virtual=False, normalize="zscore")
    scale, shift = torch.rand(2, B, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(
        loss_fn(*views, labels), loss_fn(*(scale * x + shift for x in views), labels), rtol=1e-6, atol=0
    )


def test_equal_logits_and_one_class_stay_finite():
    for shape in ((4, 3), (4, 1)):
        logits = torch.zeros(shape, requires_grad=True)
        labels = torch.zeros(4, dtype=torch.int64)
        loss = VRMLoss(4.0, 2.0, normalize="zscore")(logits, logits + 0, torch.randn(shape), torch.randn(shape), labels)
        loss.backward()
        assert loss.isfinite()


def test_half_logits_are_normalised_in_float32():
    views, labels = _logits(torch.float16)
    loss = VRMLoss(4.0, 2.0, normalize="zscore")(*views, labels)
    torch.testing.assert_close(loss, _expected([x.float() for x in views], labels), rtol=1e-5, atol=0)


def test_another_normalisation_is_refused():
    with pytest.raises(ValueError, match="normalize must be one of None, 'zscore', got 'l2'"):
        VRMLoss(4.0, 2.0, normalize="l2")


def test_it_is_shown():
    assert "normalize='zscore'" in repr(VRMLoss(1.0, 1.0, normalize="zscore")) and "norm" not in repr(VRMLoss(1.0, 1.0))
