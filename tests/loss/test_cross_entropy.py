"""The cross-entropies are F.cross_entropy's, whatever their settings: values, gradients, refusals."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import MODES, Case, inputs, make_labels, relative_error
from torch._subclasses import FakeTensorMode

import vrm_kernels
import vrm_kernels.functional as VF

SHAPE = (11, 7)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.25])
IGNORED = 3


def labels_of(kind):
    labels = make_labels(*SHAPE, "probabilities" if kind == "probabilities" else "indices")
    if kind == "some ignored":
        labels[::3] = IGNORED
    return labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["indices", "some ignored", "probabilities"])
@pytest.mark.parametrize(("weight", "smoothing"), list(itertools.product([None, WEIGHT], [0.0, 0.1, 1.0])))
def test_values_and_gradients_are_torchs(any_backend, weight, smoothing, kind, dtype):
    """With the relations' weights 0; each view alone and both."""
    logits, labels = inputs(Case(SHAPE, seed=1000), dtype), labels_of(kind)
    compute = torch.promote_types(dtype, torch.float32)
    ignored = IGNORED if kind == "some ignored" else -100
    for ce in ((True, False), (False, True), (True, True)):
        students = [x.clone().requires_grad_() for x in logits[:2]]
        loss, terms = VF.vrm_loss(
            *students, *logits[2:], labels, 0.0, 0.0, *ce, label_smoothing=smoothing, class_weight=weight,
            ignore_index=ignored, backend=any_backend, return_terms=True,
        )  # fmt: skip
        twins = [x.to(compute).clone().requires_grad_() for x in logits[:2]]
        given = labels.to(compute) if kind == "probabilities" else labels
        settings = {"label_smoothing": smoothing, "ignore_index": ignored}
        expected = [
            F.cross_entropy(x, given, None if weight is None else weight.to(compute), **settings) * on
            for x, on in zip(twins, ce, strict=True)
        ]
        bound = 1e-12 if dtype == torch.float64 else 1e-6
        assert relative_error(loss.detach(), sum(expected).detach()) < bound
        assert relative_error(terms["ce_real"], expected[0].detach()) < bound
        assert relative_error(terms["ce_virtual"], expected[1].detach()) < bound
        grads = torch.autograd.grad(loss, students)
        for grad, wanted, x in zip(grads, torch.autograd.grad(sum(expected), twins), students, strict=True):
            assert grad.dtype == dtype
            assert relative_error(grad, wanted) < (4e-3 if dtype == torch.bfloat16 else 10 * bound), x.dtype


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_a_batch_that_is_all_ignored_keeps_its_relations(any_backend, weight, relations):
    logits = inputs(Case(SHAPE, seed=1000, relations=relations), torch.float32)
    students = [x.clone().requires_grad_() for x in logits[:2]]
    settings = {"relations": relations, "backend": any_backend}
    labels = torch.full((SHAPE[0],), -100)
    loss, terms = VF.vrm_loss(
        *students,
        *logits[2:],
        labels,
        2.0,
        0.5,
        class_weight=weight,
        label_smoothing=0.1,
        return_terms=True,
        **settings,
    )
    alone = VF.vrm_loss(*students, *logits[2:], None, 2.0, 0.5, False, False, **settings)
    assert float(terms["ce_real"]) == float(terms["ce_virtual"]) == 0 and loss > 0
    assert relative_error(loss.detach(), alone.detach()) < 1e-6
    for x, y in zip(torch.autograd.grad(loss, students), torch.autograd.grad(alone, students), strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_a_class_that_does_not_exist_is_refused(any_backend, label):
    labels = make_labels(*SHAPE)
    labels[4] = label
    with pytest.raises(IndexError, match="out of bounds"):
        VF.vrm_loss(*inputs(Case(SHAPE, seed=1000), torch.float32), labels, 1.0, 1.0, backend=any_backend)


def test_the_modules_weight_moves_with_it_and_is_not_saved():
    criterion = vrm_kernels.VRMLoss(1.0, 1.0, class_weight=WEIGHT, ignore_index=3, eps=1e-3)
    assert criterion.to(torch.float64).class_weight.dtype == torch.float64 and not criterion.state_dict()
    assert "eps=0.001, class_weight=[7], ignore_index=3" in repr(criterion)
    logits, labels = inputs(Case(SHAPE, seed=1000), torch.float64), labels_of("some ignored")
    settings = {"class_weight": WEIGHT, "ignore_index": 3, "eps": 1e-3}
    assert torch.equal(criterion(*logits, labels), VF.vrm_loss(*logits, labels, 1.0, 1.0, **settings))


@pytest.mark.parametrize(
    ("error", "settings"),
    [
        (r"class_weight must be \[7\], one weight a class, got \(3,\)", {"class_weight": torch.ones(3)}),
        (r"class_weight must be a floating tensor \[7\], got list", {"class_weight": [1.0] * 7}),
        (r"class_weight must be a floating tensor \[7\], got torch.int64", {"class_weight": torch.ones(7).long()}),
        ("class_weight is on meta, the logits are on cpu", {"class_weight": torch.ones(7, device="meta")}),
        ("ignore_index must be an integer, got 1.5", {"ignore_index": 1.5}),
        ("ignore_index=3 has no meaning for class probabilities", {"ignore_index": 3, "labels": "probabilities"}),
        ("eps must be > 0 and finite, got 0.0", {"eps": 0.0}),
        ("eps must be > 0 and finite, got nan", {"eps": float("nan")}),
    ],
)
def test_what_is_refused(error, settings):
    labels = labels_of(settings.pop("labels", "indices"))
    with pytest.raises((ValueError, TypeError), match=error):
        VF.vrm_loss(*inputs(Case(SHAPE, seed=1000), torch.float32), labels, 1.0, 1.0, **settings)


def test_a_teacher_or_labels_that_require_a_gradient_are_warned_of():
    logits = inputs(Case(SHAPE, seed=1000), torch.float32)
    wanted = [x.clone().requires_grad_() for x in logits]
    labels = labels_of("probabilities").requires_grad_()
    with pytest.warns(UserWarning) as record:
        VF.vrm_loss(*wanted, labels, 1.0, 1.0)
    told = [str(warning.message).split(" requires")[0] for warning in record]
    assert told == ["logits_teacher_real", "logits_teacher_virtual", "labels"]
    assert "give labels.detach()" in str(record[2].message) and record[0].filename == __file__


def test_labels_that_are_no_probabilities_are_warned_of():
    logits = inputs(Case(SHAPE, seed=1000), torch.float32)
    probabilities = labels_of("probabilities")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for labels in (probabilities, probabilities.bfloat16(), labels_of("indices"), probabilities.to("meta")):
            VF.vrm_loss(*(x.to(labels.device) for x in logits), labels, 1.0, 1.0)
    with pytest.warns(UserWarning, match=rf"these {SHAPE[0]} rows sum to {2 * SHAPE[0]}, not to {SHAPE[0]}") as record:
        VF.vrm_loss(*logits, 2 * probabilities, 1.0, 1.0)
    assert record[0].filename == __file__


def test_such_labels_are_not_read_where_that_is_impossible():
    logits, twice = inputs(Case(SHAPE, seed=1000), torch.float32), torch.full(SHAPE, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FakeTensorMode() as mode:
            VF.vrm_loss(*map(mode.from_tensor, (*logits, twice)), 1.0, 1.0)
        torch.func.vmap(lambda y: VF.vrm_loss(*logits, y, 1.0, 1.0))(torch.stack([twice, twice]))
