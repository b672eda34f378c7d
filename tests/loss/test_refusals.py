"""Every row of the table of refusals in docs/api.md: a clear error, before any work, nothing changed."""

import pytest
import torch
from helpers import make_labels

import vrm_kernels
import vrm_kernels.functional as VF
from vrm_kernels import backends, ops

B, C = 4, 3
NAMES = ["logits_student_real", "logits_student_virtual", "logits_teacher_real", "logits_teacher_virtual"]


def logits(*shapes, dtypes=(torch.float32,) * 4, devices=("cpu",) * 4):
    shapes = shapes or ((B, C),) * 4
    return [
        torch.zeros(shape, dtype=dtype, device=device)
        for shape, dtype, device in zip(shapes, dtypes, devices, strict=True)
    ]


def one_odd(usual, odd, k):
    return [odd if k == other else usual for other in range(4)]


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch):
    """Any work at all fails the test: no graph, no cross-entropy, no random number."""

    def refuse(*args, **kwargs):
        raise AssertionError("work began before the refusal")

    monkeypatch.setattr(ops, "vrm_loss", refuse)
    monkeypatch.setattr(ops, "relation_graph", refuse)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def refused(error, match, four, labels="good", **settings):
    labels = make_labels(B, C) if isinstance(labels, str) else labels
    copies = [x.clone() if x.device.type == "cpu" else None for x in four]
    settings = {"alpha": 1.0, "beta": 1.0} | settings
    with pytest.raises(error, match=match):
        VF.vrm_loss(*four, labels, **settings)
    for x, copy in zip(four, copies, strict=True):
        assert x.grad is None and (copy is None or torch.equal(x, copy))


@pytest.mark.parametrize("k", range(4), ids=NAMES)
@pytest.mark.parametrize("odd", [(B, C + 1), (B + 1, C), (C, B), (B, C, 1), (B * C,), ()], ids=str)
def test_logits_of_different_shapes(k, odd):
    shapes = one_odd((B, C), odd, k)
    parts = [f"{name} {shape}" for name, shape in zip(NAMES, shapes, strict=True)]
    with pytest.raises(ValueError, match="2-D") as caught:
        VF.vrm_loss(*logits(*shapes), make_labels(B, C), 1.0, 1.0)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("shape", [(B,), (B, C, 2), ()], ids=str)
def test_logits_not_two_dimensional(shape):
    refused(ValueError, "must be 2-D", logits(*(shape,) * 4))


@pytest.mark.parametrize("shape", [(0, C), (B, 0), (0, 0)], ids=str)
def test_no_samples_or_no_classes(shape):
    refused(ValueError, "at least one sample and one class, got", logits(*(shape,) * 4))


@pytest.mark.parametrize("k", range(4), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_logits_that_are_not_floating(k, dtype):
    refused(TypeError, f"{NAMES[k]} must be floating .* got {dtype}", logits(dtypes=one_odd(torch.float32, dtype, k)))


@pytest.mark.parametrize("k", range(4), ids=NAMES)
def test_logits_of_a_dtype_that_does_not_promote(k):
    dtypes = one_odd(torch.float32, torch.float8_e4m3fn, k)
    refused(TypeError, f"do not promote.*{NAMES[k]} torch.float8_e4m3fn", logits(dtypes=dtypes))


@pytest.mark.parametrize("k", range(4), ids=NAMES)
def test_logits_on_different_devices(k):
    four = logits(devices=one_odd("cpu", "meta", k))
    refused(ValueError, f"one device: .*{NAMES[k]} on meta", four)


def test_logits_that_are_not_tensors():
    with pytest.raises(TypeError, match="logits_teacher_real must be a torch.Tensor, got list"):
        VF.vrm_loss(*logits()[:2], [[0.0] * C] * B, logits()[3], make_labels(B, C), 1.0, 1.0)


NAN = float("nan")
SETTINGS = [
    ("unreliable_pruning_percentile", [-0.1, 100.1, NAN, float("inf")], r"must be in \[0, 100\], got"),
    ("delta", [0.0, -1.0, NAN, float("inf")], "must be > 0 and finite, got"),
    ("alpha", [-1e-9, NAN, float("inf")], "must be >= 0 and finite, got"),
    ("beta", [-1.0, NAN, float("inf")], "must be >= 0 and finite, got"),
    ("label_smoothing", [-0.1, 1.1, NAN], r"must be in \[0, 1\], got"),
    ("relations", ["inter-view", "", None], "must be one of 'inter_view', 'complete', got"),
]
BAD_SETTINGS = [(name, value, match) for name, values, match in SETTINGS for value in values]


@pytest.mark.parametrize(("name", "value", "match"), BAD_SETTINGS)
def test_settings_out_of_range(name, value, match):
    refused(ValueError, f"{name} {match} {value!r}", logits(), **{name: value})
    with pytest.raises(ValueError, match=f"{name} {match} {value!r}"):
        vrm_kernels.VRMLoss(**({"alpha": 1.0, "beta": 1.0} | {name: value}))


@pytest.mark.parametrize("name", ["alpha", "beta", "delta", "unreliable_pruning_percentile", "label_smoothing"])
@pytest.mark.parametrize("value", ["1", None, True, 1j])
def test_settings_that_are_not_numbers(name, value):
    refused(TypeError, f"{name} must be a number, got {type(value).__name__}", logits(), **{name: value})


@pytest.mark.parametrize("labels", [(B - 1,), (B + 1,), (B, 1), (B, C), ()], ids=str)
def test_index_labels_of_the_wrong_shape(labels):
    match = rf"labels must be \[{B}\] class indices or \[{B}, {C}\] class probabilities, got"
    refused(ValueError, match, logits(), torch.zeros(labels, dtype=torch.int64))
    off = {"ce_loss_on_real": False, "ce_loss_on_virtual": False}
    refused(ValueError, match, logits(), torch.zeros(labels, dtype=torch.int64), **off)


@pytest.mark.parametrize("shape", [(B,), (B, C + 1), (B - 1, C)], ids=str)
def test_probability_labels_of_the_wrong_shape(shape):
    match = rf"floating labels are class probabilities: expected .*\[{B}, {C}\]"
    refused(ValueError, match, logits(), torch.zeros(shape))


def test_other_labels():
    refused(TypeError, "labels must be a tensor, .* got NoneType", logits(), None)
    refused(TypeError, "labels must be .* got dtype torch.bool", logits(), torch.zeros(B, dtype=torch.bool))
    meta = torch.zeros(B, dtype=torch.int64, device="meta")
    refused(ValueError, "labels are on meta and the logits on cpu", logits(), meta)


@pytest.mark.parametrize("name", ["nope", "", "Torch", "AUTO"])
def test_an_unknown_backend(name):
    names = ", ".join(map(repr, backends.REGISTRY))
    refused(ValueError, f"unknown backend {name!r}: choose 'auto' or one of {names}", logits(), backend=name)
    with pytest.raises(ValueError, match="unknown backend"):
        vrm_kernels.VRMLoss(1.0, 1.0, backend=name)


@pytest.mark.parametrize("name", [n for n, backend in backends.REGISTRY.items() if backend.devices])
def test_a_backend_on_a_device_it_does_not_run_on(name):
    where = " and ".join(backends.REGISTRY[name].devices)
    match = f"backend {name!r} runs on {where} tensors and these are on meta: move them, or use backend='auto'"
    labels = torch.zeros(B, dtype=torch.int64, device="meta")
    refused(RuntimeError, match, logits(devices=("meta",) * 4), labels, backend=name)


@pytest.mark.parametrize("name", list(backends.REGISTRY))
def test_a_backend_that_cannot_run_here_never_falls_back(name, monkeypatch):
    import dataclasses

    broken = dataclasses.replace(
        backends.REGISTRY[name], devices=(), status=lambda device=None: (False, "the moon is full")
    )
    monkeypatch.setitem(backends.REGISTRY, name, broken)
    match = f"backend {name!r} cannot run here: the moon is full. Use backend='auto'"
    refused(RuntimeError, match, logits(), backend=name)
    with pytest.raises(RuntimeError, match=match):
        VF.relation_loss(*logits(), backend=name)
