"""The transforms people use: each gives what plain autograd does."""

import copy
import pickle

import pytest
import torch
from helpers import Case, inputs, make_labels, relative_error

import vrm_kernels
import vrm_kernels.functional as VF

SHAPE = (11, 7)


@pytest.fixture
def problem():
    return inputs(Case(SHAPE, seed=1000), torch.float64), make_labels(*SHAPE)


def gradient(criterion, student, views, labels):
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(criterion(leaf, *views[1:], labels), leaf)[0]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_func_grad_and_jacrev(any_backend, problem, transform):
    views, labels = problem
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=any_backend)
    result = transform(lambda x: criterion(x, *views[1:], labels))(views[0])
    assert relative_error(result, gradient(criterion, views[0], views, labels)) < 1e-12


def test_an_ensemble_of_students(backend, problem):
    views, labels = problem
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=backend)
    students = torch.stack([views[0], views[0].flip(0), 2 * views[1]])

    def loss(x):
        return criterion(x, *views[1:], labels)

    assert torch.equal(torch.func.vmap(loss)(students), torch.stack([loss(x) for x in students]))
    grads = torch.func.vmap(torch.func.grad(loss))(students)
    for grad, student in zip(grads, students, strict=True):
        assert relative_error(grad, gradient(criterion, student, views, labels)) < 1e-12


def test_second_derivatives_by_transforms_are_refused(backend, problem):
    views, labels = problem
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=backend)
    first = torch.func.grad(lambda x: criterion(x, *views[1:], labels))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(lambda x: first(x).square().sum())(views[0])


class Student(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.head = torch.nn.Linear(4, SHAPE[1])
        self.criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=backend, class_weight=torch.rand(SHAPE[1]))

    def forward(self, real, virtual, teacher_real, teacher_virtual, labels):
        return self.criterion(self.head(real), self.head(virtual), teacher_real, teacher_virtual, labels)


def test_functional_call_and_export(any_backend):
    model = Student(any_backend)
    batch = (*(torch.randn(SHAPE[0], n) for n in (4, 4, 7, 7)), make_labels(*SHAPE))
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, batch))(parameters)
    model(*batch).backward()
    for name, x in model.named_parameters():
        assert relative_error(grads[name], x.grad) < 1e-5
    with torch.no_grad():
        exported = torch.export.export(model, batch).module()
        assert relative_error(exported(*batch), model(*batch)) < 1e-6


def test_copies_and_pickles(problem):
    views, labels = problem
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, eps=1e-3, class_weight=torch.rand(SHAPE[1]))
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(*views, labels), criterion(*views, labels)) and repr(other) == repr(criterion)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_teacher_and_labels_of_inference_mode(any_backend, problem, kind):
    views, _ = problem
    with torch.inference_mode():
        teacher, labels = [x.clone() for x in views[2:]], make_labels(*SHAPE, kind)
    student = views[0].clone().requires_grad_()
    VF.vrm_loss(student, views[1], *teacher, labels, 1.0, 1.0, backend=any_backend).backward()
    assert student.grad.any()


def test_meta_tensors_have_shapes():
    views = [torch.empty(SHAPE, device="meta", requires_grad=k < 2) for k in range(4)]
    loss = VF.vrm_loss(*views, torch.empty(SHAPE[0], dtype=torch.long, device="meta"), 1.0, 1.0)
    loss.backward()
    assert loss.is_meta and views[0].grad.shape == SHAPE
