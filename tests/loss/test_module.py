"""VRMLoss, the module: its terms, its text, its copies, and that it keeps no state."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import MODES, Case, inputs, make_labels, relative_error

import vrm_kernels
import vrm_kernels.functional as VF

TERMS = ["ce_real", "ce_virtual", "inter_sample", "inter_class", "kept_inter_sample", "kept_inter_class"]
SETTINGS = {
    "ce_loss_on_real": True,
    "ce_loss_on_virtual": False,
    "unreliable_pruning_percentile": 50,
    "delta": 0.5,
    "relations": "complete",
    "label_smoothing": 0.1,
    "backend": "reference",
    "check_finite": True,
}


def batch(dtype=torch.float32):
    return *inputs(Case((11, 7), seed=1400), dtype), make_labels(11, 7)


def test_signature_is_the_documented_one():
    parameters = list(inspect.signature(vrm_kernels.VRMLoss).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "alpha", "beta", "ce_loss_on_real", "ce_loss_on_virtual", "unreliable_pruning_percentile",
    ]  # fmt: skip
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "delta": 1.0, "relations": "inter_view", "normalize": None, "eps": 1e-7, "label_smoothing": 0.0,
        "class_weight": None, "ignore_index": -100, "backend": "auto", "gather_distributed": False,
        "process_group": None, "check_finite": False,
    }  # fmt: skip
    function = inspect.signature(VF.vrm_loss).parameters
    for p in parameters:
        assert function[p.name].default == p.default and function[p.name].kind == p.kind


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("ce", [(True, True), (True, False), (False, True), (False, False)])
def test_terms_add_up_to_the_loss(any_backend, relations, ce):
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, *ce, relations=relations, backend=any_backend)
    logits, labels = batch(torch.float64)[:4], make_labels(11, 7)
    loss, terms = criterion(*logits, labels, return_terms=True)
    assert list(terms) == TERMS
    assert all(term.shape == () and not term.requires_grad for term in terms.values())
    assert all(terms[name].dtype == (torch.int64 if "kept" in name else torch.float64) for name in TERMS)
    total = terms["ce_real"] + terms["ce_virtual"] + 2.0 * terms["inter_sample"] + 0.5 * terms["inter_class"]
    assert relative_error(total, loss.detach()) < 1e-12
    for term, on, x in zip((terms["ce_real"], terms["ce_virtual"]), ce, logits, strict=False):
        assert relative_error(term, F.cross_entropy(x.detach(), labels) * on) < 1e-12
    assert torch.equal(criterion(*logits, labels), loss)


def test_terms_are_unweighted(any_backend):
    _, weighted = VF.vrm_loss(*batch(), 2.0, 0.5, backend=any_backend, return_terms=True)
    _, without = VF.vrm_loss(*batch(), 0.0, 0.0, backend=any_backend, return_terms=True)
    assert all(torch.equal(weighted[name], without[name]) for name in TERMS)
    assert float(without["inter_sample"]) > 0 and float(without["inter_class"]) > 0


def test_terms_do_not_hold_the_graph(any_backend):
    logits = [x.clone().requires_grad_(k < 2) for k, x in enumerate(batch()[:4])]
    loss, terms = VF.vrm_loss(*logits, make_labels(11, 7), 2.0, 0.5, backend=any_backend, return_terms=True)
    for term in terms.values():
        term += 1  # what the caller does to a term is the caller's business
    loss.backward()
    again = [x.detach().clone().requires_grad_(x.requires_grad) for x in logits]
    VF.vrm_loss(*again, make_labels(11, 7), 2.0, 0.5, backend=any_backend).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(logits[:2], again[:2], strict=True))


def test_repr_names_every_setting():
    text = repr(vrm_kernels.VRMLoss(2.0, 0.5, **SETTINGS))
    for name, value in ({"alpha": 2.0, "beta": 0.5} | SETTINGS).items():
        assert f"{name}={value!r}" in text
    assert "gather_distributed" not in text
    assert "gather_distributed=True" in repr(vrm_kernels.VRMLoss(1.0, 1.0, gather_distributed=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_compute_the_same(duplicate):
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, **SETTINGS)
    twin = duplicate(criterion)
    assert repr(twin) == repr(criterion)
    assert torch.equal(twin(*batch()), criterion(*batch()))


def test_it_keeps_no_state():
    criterion = vrm_kernels.VRMLoss(2.0, 0.5)
    assert not criterion.state_dict() and not list(criterion.parameters()) and not list(criterion.buffers())
    first = criterion(*batch())
    criterion.load_state_dict({})
    assert torch.equal(criterion.double().eval()(*batch()), first)


def test_module_and_function_agree(any_backend):
    settings = SETTINGS | {"backend": any_backend}
    module, function = vrm_kernels.VRMLoss(2.0, 0.5, **settings)(*batch()), VF.vrm_loss(*batch(), 2.0, 0.5, **settings)
    assert torch.equal(module, function)
    for name, other in [("delta", 1.0), ("relations", "inter_view"), ("label_smoothing", 0.0)]:
        assert not torch.equal(VF.vrm_loss(*batch(), 2.0, 0.5, **(settings | {name: other})), function)


def test_labels_may_be_none_without_cross_entropy(any_backend):
    *logits, labels = batch()
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, False, False, backend=any_backend)
    assert torch.equal(criterion(*logits, None), criterion(*logits, labels))
