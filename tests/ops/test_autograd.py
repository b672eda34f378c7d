"""The one autograd rule: accumulation, repetition, scaling, who gets a gradient, and no second derivative."""

import pytest
import torch
from helpers import MODES, Case, evaluate, inputs, make_labels, relative_error

import vrm_kernels
import vrm_kernels.functional as VF
from vrm_kernels import backends, ops

CASE = Case((11, 7), seed=1000)


def four(dtype=torch.float32):
    logits = [x.clone() for x in inputs(CASE, dtype)]
    for x in logits[:2]:
        x.requires_grad_()
    return logits


def loss_of(logits, backend, **settings):
    return VF.vrm_loss(*logits, make_labels(11, 7), 2.0, 0.5, backend=backend, **settings)


def test_gradients_accumulate_into_grad(any_backend):
    logits = four()
    loss_of(logits, any_backend).backward()
    once = [x.grad.clone() for x in logits[:2]]
    loss_of(logits, any_backend).backward()
    for x, grad in zip(logits, once, strict=False):
        assert grad.any() and torch.equal(x.grad, 2 * grad)


def test_retained_graph_gives_the_same_twice(any_backend):
    logits = four()
    loss = loss_of(logits, any_backend)
    first = torch.autograd.grad(loss, logits[:2], retain_graph=True)
    second = torch.autograd.grad(loss, logits[:2], retain_graph=True)
    third = torch.autograd.grad(loss, logits[:2])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(first, second, third, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits[:2])


@pytest.mark.parametrize("factor", [-3.0, 0.0, 65536.0])
def test_the_upstream_gradient_scales(any_backend, factor):
    logits = inputs(CASE, torch.float32)
    plain = evaluate(any_backend, logits, alpha=2.0, beta=0.5)
    scaled = evaluate(any_backend, logits, alpha=2.0, beta=0.5, scale=factor)
    for x, y in zip(scaled.grads, plain.grads, strict=True):
        assert relative_error(x, factor * y) < 1e-6


@pytest.mark.parametrize("k", [0, 1])
def test_one_view_alone_may_require_a_gradient(any_backend, k):
    both, one = four(), four()
    one[1 - k].requires_grad_(False)
    loss_of(both, any_backend).backward()
    loss_of(one, any_backend).backward()
    assert torch.equal(one[k].grad, both[k].grad)
    assert one[1 - k].grad is None


def test_one_tensor_as_both_views(any_backend):
    """The same leaf twice: its gradient is the sum of the two, whose parts of 1/eps cancel."""
    x, _, *teacher = inputs(CASE, torch.float64)
    settings = {"backend": any_backend, "unreliable_pruning_percentile": 100.0}
    views = [x.clone().requires_grad_() for _ in range(2)]
    VF.vrm_loss(*views, *teacher, None, 2.0, 0.5, False, False, **settings).backward()
    leaf = x.clone().requires_grad_()
    VF.vrm_loss(leaf, leaf, *teacher, None, 2.0, 0.5, False, False, **settings).backward()
    difference = leaf.grad - (views[0].grad + views[1].grad)
    assert float(difference.norm()) < 1e-12 * float(views[0].grad.norm())
    assert leaf.grad.any()


def test_the_teacher_gets_none(any_backend):
    logits = four()
    for x in logits[2:]:
        x.requires_grad_()
    with pytest.warns(UserWarning, match="requires a gradient and gets none"):
        loss_of(logits, any_backend).backward()
    assert all(x.grad is None for x in logits[2:])
    assert all(x.grad is not None for x in logits[:2])


def test_nothing_requires_a_gradient(any_backend):
    loss = loss_of(inputs(CASE, torch.float32), any_backend)
    assert not loss.requires_grad
    assert relative_error(loss, loss_of(four(), any_backend).detach()) < 1e-6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("relations", MODES)
def test_evaluation_gives_the_same_loss(any_backend, context, relations):
    with_gradients = loss_of(four(), any_backend, relations=relations)
    with context():
        loss, terms = loss_of(four(), any_backend, relations=relations, return_terms=True)
    assert not loss.requires_grad and with_gradients.requires_grad
    assert relative_error(loss, with_gradients.detach()) < 1e-6
    assert int(terms["kept_inter_sample"]) > 0


def test_evaluation_skips_the_gradients_work(backend, monkeypatch):
    """What reaches the backend says need_grad, its last argument, only where a gradient can be asked for."""
    seen = []
    chosen = backends.REGISTRY[backend].load()
    real = chosen.vrm_loss
    monkeypatch.setattr(chosen, "vrm_loss", lambda *args: seen.append(args[-1]) or real(*args))

    def saw():
        flags = set(seen)
        seen.clear()
        return flags

    loss_of(four(), backend)
    assert saw() == {True}
    with torch.no_grad():
        loss_of(four(), backend)
    assert saw() == {False}
    loss_of(inputs(CASE, torch.float32), backend)
    assert saw() == {False}


# ---- second derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vrm_loss", "relation_loss"])
def test_a_second_derivative_is_refused_where_it_is_taken(backend, name):
    logits = four()
    if name == "vrm_loss":
        loss = loss_of(logits, backend)
    else:
        loss = VF.relation_loss(*logits, backend=backend)
    plain = torch.autograd.grad(loss, logits[:2], retain_graph=True)
    grads = torch.autograd.grad(loss, logits[:2], create_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(plain, grads, strict=True))
    penalty = sum(grad.square().sum() for grad in grads)
    assert penalty.isfinite() and penalty > 0
    with pytest.raises(RuntimeError, match="second derivatives .* not supported by this backend.*backend='reference'"):
        torch.autograd.grad(penalty, logits[:2])
    assert ops.NO_DOUBLE_BACKWARD.startswith("second derivatives")


def test_a_second_derivative_is_not_silently_zero(backend):
    """Of one view alone, and through a gradient that only rides along."""
    logits = four()
    logits[1].requires_grad_(False)
    (grad,) = torch.autograd.grad(loss_of(logits, backend), logits[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (grad.sum() + logits[0].square().sum()).backward()


def test_the_reference_takes_second_derivatives():
    logits = four(torch.float64)
    grads = torch.autograd.grad(loss_of(logits, "reference"), logits[:2], create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), logits[:2])
    assert all(grad.isfinite().all() and grad.any() for grad in second)


# ---- in a training step ------------------------------------------------------------------------------------------


def test_a_few_steps_of_training_follow_the_reference(backend):
    """The same weights after five steps of SGD through a linear student, as with the oracle in float64."""
    trained = []
    for chosen, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        student = torch.nn.Linear(12, 7).to(dtype)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=chosen, unreliable_pruning_percentile=100)
        x, virtual, teacher = (torch.randn(11, k).to(dtype) for k in (12, 12, 7))
        for _ in range(5):
            optimizer.zero_grad()
            criterion(student(x), student(virtual), teacher, teacher, make_labels(11, 7)).backward()
            optimizer.step()
        trained.append(student.weight.detach())
    assert relative_error(*trained) < 1e-5


# ---- forward mode -----------------------------------------------------------------------------------------------


def test_forward_mode_is_right_or_refused(any_backend):
    s, v, t, u = inputs(Case((8, 5)), torch.float64)
    direction = torch.randn_like(s)

    def loss(x):
        return VF.vrm_loss(x, v, t, u, None, 1.0, 1.0, False, False, backend=any_backend)

    if any_backend in ("reference", "torch"):
        leaf = s.clone().requires_grad_()
        loss(leaf).backward()
        tangent = torch.func.jvp(loss, (s,), (direction,))[1]
        assert float(tangent) == pytest.approx(float((leaf.grad * direction).sum()), rel=1e-9)
    else:
        with pytest.raises(RuntimeError, match="forward-mode .* backend='reference'"):
            torch.func.jvp(loss, (s,), (direction,))
    torch.func.jvp(lambda x: loss(s) + x.sum(), (s,), (direction,))  # a tangent that does not pass through the loss
