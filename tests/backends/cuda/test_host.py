"""Every kernel of the `cuda` backend run on the host, thread by thread, and put through the parity suite.

tests/backends/cuda/shim checks each access to memory on the way: bounds, initialisation, races between barriers. The
order in which threads and blocks run is shuffled.
"""

import contextlib
import ctypes
import itertools
import shutil
import sys
import types

import cuda_host
import parity_suite
import pytest
import torch
from cuda_resources import FLOAT32_ALONE, KERNELS, STEPS
from helpers import (
    BAD,
    FLOOR,
    GRAPH_SETTINGS,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    SETTINGS,
    Case,
    assert_parity,
    compare,
    evaluate,
    evaluate_relation,
    inputs,
    make_logits,
    poisoned,
    relative_error,
)
from share_checks import check_counts, check_group_of_one, check_shares, group_of_one

import vrm_kernels.functional as VF
from vrm_kernels import backends
from vrm_kernels.backends.contract import LossResult, Sides, Views
from vrm_kernels.distributed import shares as share_module
from vrm_kernels.graph import forms, pruning, selection

# Tiles as small as they get, so that small graphs have many, and border on every side.
FORMS = {
    "one_launch": ("one_launch", 32, 0),
    "tiles": ("tiles", 32, 0),
    "launches": ("launches", 32, 0),
    "tiles, entropies stored": ("tiles", 64, 1 << 20),
    "literal": ("literal",),
    "literal, by brackets": ("literal",),
    "dense": ("dense", 32, 0),
    "dense, entropies stored": ("dense", 64, 1 << 20),
    "dense, ranked by one block": ("dense", 64, 0),
}
IN_ONE_BLOCK = ("literal", "dense, ranked by one block")  # the other new forms narrow small graphs as well
TWO_TILES = (33, 34)  # of 32 vertices, on either side of either graph
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture
def host(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to compile the CUDA sources for the host with")
    if backends.REGISTRY["cuda"].status()[0]:
        pytest.skip("the CUDA extension is usable here: test_device.py runs the kernels on the device")
    library = cuda_host.load()
    monkeypatch.setitem(backends.REGISTRY, cuda_host.NAME, cuda_host.backend())
    library.cuda_shim_set_order(1)
    # The emulation has one thread and torch's products here are tiny: where cores are few, waiting for torch's other
    # threads takes longer than the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield library
    torch.set_num_threads(threads)
    library.cuda_shim_set_checks(1)


def set_form(monkeypatch, form):
    from vrm_kernels.backends.cuda import backend as cuda_backend

    monkeypatch.setattr(cuda_backend, "TUNING", cuda_backend.Tuning(*FORMS[form]))
    monkeypatch.setattr(forms, "SELECT_EDGES", 2**16 if form in IN_ONE_BLOCK else 256)
    monkeypatch.setattr(forms, "SMALLEST_SAMPLE", 256)


# Of the parity suite's tests, those about what the forms have in common run in the faster one alone.
IN_ONE_FORM = {
    "test_parity_over_percentiles",
    "test_parity_over_layouts",
    "test_mixed_dtypes_compute_in_what_they_promote_to",
    "test_inputs_are_left_as_they_were",
    "test_opcheck_on_strided_logits",
    "test_opcheck_vrm_loss_of_one_row_or_column",
    "test_the_operator_is_what_eager_mode_computes",
    "test_without_gradients_none_are_computed",
    "test_kept_counts_are_the_references_in_every_dtype",
}


def pytest_generate_tests(metafunc):
    """The parity suite takes its fixture ``backend`` or ``any_backend`` from here."""
    forms = ["literal"] if metafunc.function.__name__ in IN_ONE_FORM else ["tiles", "literal", "dense"]
    for name in {"backend", "any_backend"} & set(metafunc.fixturenames):
        metafunc.parametrize(name, forms, indirect=True)


def _backend_in_form(host, monkeypatch, request):
    """Two forms go unchecked here, to save minutes: the tests below check all of them."""
    set_form(monkeypatch, request.param)
    host.cuda_shim_set_checks(request.param == "literal")
    return cuda_host.NAME


@pytest.fixture
def backend(host, monkeypatch, request):
    return _backend_in_form(host, monkeypatch, request)


@pytest.fixture
def any_backend(host, monkeypatch, request):
    return _backend_in_form(host, monkeypatch, request)


class TestExtremes(parity_suite.Extremes):
    """In this backend's forms."""

    shape = TWO_TILES


class TestInputs(parity_suite.Inputs):
    """In this backend's forms."""

    shape = TWO_TILES


class TestMask(parity_suite.Mask):
    """In this backend's forms."""


class TestOperators(parity_suite.Operators):
    """In this backend's forms."""


class TestSettings(parity_suite.Settings):
    """In this backend's forms."""


# ---- shapes, forms and kernels ---------------------------------------------------------------------------------------

# Three tiles: 33 vertices of two views in a complete graph, else 66 classes, whose entropies are two strips besides.
CASES = [
    *itertools.product([(1, 1), (1, 7), (7, 1), (3, 5), (33, 17)], MODES, [torch.float32]),
    *itertools.product([(7, 1), (33, 17)], MODES, [torch.float64]),
    ((3, 66), "inter_view", torch.float32),
]


@pytest.mark.parametrize(("shape", "relations", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity_over_shapes_in_every_form(host, monkeypatch, form, shape, relations, dtype):
    set_form(monkeypatch, form)
    assert_parity(cuda_host.NAME, Case(shape, relations=relations), dtype)


@pytest.mark.parametrize(
    ("shape", "relations", "tiles"),
    [(TWO_TILES, "inter_view", 4 + 4), ((3, 66), "inter_view", 1 + 9), ((33, 17), "complete", 9 + 4)],
)
def test_these_shapes_have_that_many_tiles(host, monkeypatch, shape, relations, tiles):
    host.cuda_shim_set_checks(0)
    set_form(monkeypatch, "dense")
    host.cuda_shim_forget_kernels()
    evaluate(cuda_host.NAME, make_logits(Case(shape), torch.float32, 0), relations=relations)
    assert sum("dense_kernel<float>" in name for name in cuda_host.launches_run(host)) == tiles


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        Case((17, 9), percentile=100.0, relations="complete", seed=10),
        Case((9, 35), kind="opposite", seed=30),
        Case((35, 9), kind="converged:1e-2", percentile=50.0, seed=40),
        Case((33, 9), kind="collapsed", percentile=100.0),
        Case(TWO_TILES, percentile=0.0, delta=0.05, seed=60),
        Case((3, 18), kind="opposite", relations="complete", percentile=100.0),
    ],
    ids=lambda case: f"{case.shape}-{case.kind}-{case.relations}",
)
def test_parity_in_every_form(host, monkeypatch, form, case):
    set_form(monkeypatch, form)
    floors = NEAR_CONVERGENCE_FLOOR if case.kind.startswith("converged") else FLOOR
    for dtype in (torch.float32, torch.float64):
        assert_parity(cuda_host.NAME, case, dtype, floors=floors)


def test_small_graphs_take_one_launch_and_large_ones_tiles(host):
    """The default, by sizes: 1100 x 1000 edges are more than one kernel is given, and so is a block's share of a few
    edges of many dimensions. One edge is kept."""
    host.cuda_shim_set_checks(0)
    for m, n, dims, one in [(8, 6, 4, True), (1100, 1000, 4, False), (8, 6, 4096, True), (8, 6, 4097, False)]:
        a, b, teacher_a, teacher_b = (torch.randn(k, dims) for k in (m, n) * 2)
        p, q = (torch.randn(k, 4) for k in (m, n))
        host.cuda_shim_forget_kernels()
        settings = {"probs": (p.softmax(1), q.softmax(1)), "percentile": 0.0, "backend": cuda_host.NAME}
        assert VF.relation_loss(a, b, teacher_a, teacher_b, **settings).isfinite()
        names = cuda_host.kernels_run(host)
        assert (len(names) == 1 and "one_launch_kernel<float>" in names.pop()) == one


def test_every_kernel_is_run(host, monkeypatch):
    host.cuda_shim_forget_kernels()
    for form, dtype in itertools.product(FORMS, (torch.float32, torch.float64)):
        set_form(monkeypatch, form)
        evaluate(cuda_host.NAME, make_logits(Case((20, 6)), dtype, seed=0))
    evaluate(cuda_host.NAME, make_logits(Case((20, 6)), torch.bfloat16, seed=0))  # in the form dense
    for dtype in (torch.float32, torch.float64):  # for process groups
        digit = selection.digits(torch.finfo(dtype).bits)[0]
        torch.ops.vrm_kernels.cuda_digits(torch.rand(3, 4, dtype=dtype), torch.zeros(2, dtype=torch.int64), *digit)
    names = cuda_host.kernels_run(host)
    steps = [f"steps::step_kernel<{{}}, (vrm::cuda::steps::Step){k}>" for k in range(len(STEPS))]
    new = [f"{name}_kernel<{{}}>" for name in KERNELS]
    for dtype, name in itertools.product(("float", "double"), [*steps, "steps::one_launch_kernel<{}>", *new]):
        runs = any(f"vrm::cuda::{name.format(dtype)}" in kernel for kernel in names)
        assert runs != (dtype == "double" and name.startswith(FLOAT32_ALONE)), (name, dtype, names)


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("percentile", [0.0, 100.0])
@pytest.mark.parametrize("form", ["one_launch", "tiles", "literal", "dense"])
def test_one_element_poisons_loss_and_gradients(host, monkeypatch, form, percentile, relations):
    """At percentile 0 one edge is kept in each graph: nearly every element has all its edges pruned."""
    set_form(monkeypatch, form)
    logits = make_logits(Case((4, 3)), torch.float32, seed=0)
    settings = {"unreliable_pruning_percentile": percentile, "relations": relations}
    assert evaluate(cuda_host.NAME, logits, **settings).loss.isfinite()
    for tensor, (value, index) in itertools.product(range(4), zip(BAD, (0, 5, 11), strict=True)):
        result = evaluate(cuda_host.NAME, poisoned(logits, tensor, index, value), **settings)
        assert result.loss.isnan() and all(grad.isnan().all() for grad in result.grads)


@pytest.mark.parametrize("form", FORMS)
def test_both_sides_of_one_vertex_set_get_their_gradients(host, monkeypatch, form):
    """The contract's exclude_self: one set on both sides, whose two gradients the caller adds."""
    set_form(monkeypatch, form)
    x, teacher = torch.randn(2, 35, 6, dtype=torch.float64)
    probs = torch.randn(35, 4, dtype=torch.float64).softmax(1)
    arguments = Sides(x, x, teacher, teacher), (probs, probs), GRAPH_SETTINGS._replace(exclude_self=True), True
    expected, result = (backends.REGISTRY[n].load().relation_graph(*arguments) for n in ("reference", cuda_host.NAME))
    assert int(result.kept) == int(expected.kept)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-10, atol=0)
    for grad, wanted in zip(result[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


@FLOATS
def test_one_vertex_on_both_sides_has_no_edges(host, dtype):
    x, teacher, probs = torch.randn(1, 6, dtype=dtype), torch.randn(1, 6, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    arguments = Sides(x, x, teacher, teacher), (probs, probs), GRAPH_SETTINGS._replace(exclude_self=True), True
    for name in ("reference", cuda_host.NAME):
        loss, *grads, kept = backends.REGISTRY[name].load().relation_graph(*arguments)
        assert float(loss) == int(kept) == 0
        assert all(torch.equal(grad, torch.zeros_like(x)) for grad in grads)


def test_a_device_that_the_kernels_are_not_built_for_is_refused(host, monkeypatch):
    """A GPU older than the targets: "auto" must go on to the next backend instead of failing at the first launch."""
    from vrm_kernels.backends import build_record, cuda

    monkeypatch.setattr(build_record, "why_left_out", lambda backend: "")
    monkeypatch.setitem(sys.modules, "vrm_kernels._cuda", types.ModuleType("vrm_kernels._cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    status = cuda._load.__wrapped__
    assert status(0)[0]
    host.cuda_shim_set_known_device(0)
    try:
        usable, note = status(0)
    finally:
        host.cuda_shim_set_known_device(1)
    assert not usable and "not built for Old GPU" in note and "TORCH_CUDA_ARCH_LIST=7.0" in note


@pytest.mark.parametrize(
    ("own", "forms"),
    [(False, ["one_launch", "launches", "literal", "tiles", "dense"]), (True, ["one_launch", "launches", "literal"])],
)
def test_what_the_sanitizer_watches_takes_the_forms_it_says(host, monkeypatch, own, forms):
    """benchmarks/gpu/sanitize.py, which a GPU is needed to run as it is."""
    from vrm_kernels.backends.cuda import backend as cuda_backend

    sanitize = pytest.importorskip("benchmarks.gpu.sanitize")
    host.cuda_shim_set_checks(0)
    monkeypatch.setattr(cuda_backend, "TUNING", cuda_backend.TUNING)
    taken, results = [], []
    for name, take in sanitize.paths("cuda", own):
        take()
        torch.manual_seed(0)
        host.cuda_shim_forget_kernels()
        results.append(list(sanitize.losses(cuda_host.NAME, "cpu")))
        one = any("one_launch_kernel" in kernel for kernel in cuda_host.kernels_run(host))
        assert one == (name == "one_launch") and cuda_backend.TUNING.form == name
        taken.append(name)
    assert taken == forms
    for first, other in itertools.product(results[:1], results[1:]):
        for (_, *wanted), (_, *got) in zip(first, other, strict=True):
            assert got == pytest.approx(wanted, rel=1e-4) and all(x > 0 for x in got)


# ---- order, races, the same bits -------------------------------------------------------------------------------------


@FLOATS
@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_threads_changes_no_bit(host, monkeypatch, form, dtype):
    set_form(monkeypatch, form)
    logits = make_logits(Case((18, 17), kind="opposite"), dtype, seed=0)  # two tiles a side
    host.cuda_shim_set_order(0)
    plain = evaluate(cuda_host.NAME, logits, relations="complete")
    for seed in (2, 3):
        host.cuda_shim_set_order(seed)
        other = evaluate(cuda_host.NAME, logits, relations="complete")
        assert torch.equal(plain.loss, other.loss) and plain.kept == other.kept
        assert all(map(torch.equal, plain.grads, other.grads))


FAULTS = {  # see planted.cu
    1: "race: read after another thread's write|memory that nothing has written",
    2: "write of 4 bytes outside of every array",
    3: "write of 4 bytes outside of every array",
    4: "read of memory that nothing has written",
    5: "deadlock|race|memory that nothing has written",
    6: "race: .* after another thread's",
    7: "race|memory that nothing has written",
    8: "part of a warp",
    9: "read of 4 bytes outside of every array",
    10: "race: write after another thread's read|race: read after another thread's write",
    11: "1 words of the outputs were not written",
    12: "race: (read|write) after another thread's (write|read)",
    13: "race: write after another thread's write|memory that nothing has written",
    14: "race: write after another thread's read|race: read after another thread's write",
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("fault", [0, *FAULTS])
def test_the_emulation_finds_planted_faults(host, fault, order):
    import re

    x, message = (ctypes.c_float * 64)(), ctypes.create_string_buffer(256)
    host.cuda_shim_set_order(order)
    failed = host.cuda_shim_planted(fault, x, message)
    if fault == 0:
        assert not failed, message.value
        assert list(x) == [62.0 + 3, 63.0 + 64, *(63.0 - (k ^ 1) for k in range(2, 64))]
        return
    found = message.value.decode()
    assert failed and re.search(FAULTS[fault], found), found
    assert fault == 11 or ("planted::" in found and "thread" in found)


@pytest.mark.parametrize("form", ["launches", "literal"])
def test_a_fault_reaches_the_caller(host, monkeypatch, form):
    """A launch that a kernel of another device refuses raises, and the next call is sound again."""
    set_form(monkeypatch, form)
    logits = make_logits(Case((9, 6)), torch.float32, seed=0)
    expected = evaluate(cuda_host.NAME, logits).loss
    host.cuda_shim_set_known_device(0)
    try:
        with pytest.raises(RuntimeError, match="CUDA could not launch a kernel: refused by the host emulation"):
            evaluate(cuda_host.NAME, logits)
    finally:
        host.cuda_shim_set_known_device(1)
    assert torch.equal(evaluate(cuda_host.NAME, logits).loss, expected)


def test_an_unknown_form_is_refused(host, monkeypatch):
    from vrm_kernels.backends.cuda import backend as cuda_backend

    logits = inputs(Case((9, 6)), torch.float32)
    monkeypatch.setattr(cuda_backend, "TUNING", cuda_backend.Tuning(form="sideways"))
    with pytest.raises(ValueError, match="'auto', 'one_launch', 'launches' or 'tiles', not 'sideways'"):
        evaluate(cuda_host.NAME, logits)


def _given_entropies(entropy_of, rank, weight):
    """How many of -log(q + 1e-7) are kept, on the operators themselves: with one class and P = 1 that is an entropy."""
    from vrm_kernels.backends.cuda import backend as cuda_backend

    ones, x = torch.ones(1, 1, dtype=entropy_of.dtype), torch.randn(len(entropy_of), 1, dtype=entropy_of.dtype)
    arguments = ones, x, ones, x, ones, entropy_of[:, None], rank, weight, 1.0, 1e-7, False, False
    form, *sizes = cuda_backend.TUNING
    if form == "tiles":
        return int(torch.ops.vrm_kernels.cuda_relation_graph(*arguments, form, *sizes)[-1])
    new = form == "dense", 0, *sizes, cuda_backend._brackets(len(x))
    return int(torch.ops.vrm_kernels.cuda_relation_loss(*arguments[:6], None, None, None, *arguments[6:], *new)[-1])


def _assert_kept(q, percentile):
    entropy = -pruning.log_probs(q)
    rank, weight = pruning.rank(percentile / 100, q.numel(), q.dtype)
    expected = entropy <= torch.quantile(entropy, torch.tensor(percentile / 100, dtype=q.dtype))
    assert _given_entropies(q, rank, weight) == int(expected.sum())


NEW_SELECTIONS = ["literal", "literal, by brackets", "dense", "dense, entropies stored", "dense, ranked by one block"]
SELECTIONS = pytest.mark.parametrize("form", ["tiles", *NEW_SELECTIONS])


@FLOATS
@SELECTIONS
def test_the_kept_edges_are_those_below_torchs_quantile(host, monkeypatch, form, dtype):
    set_form(monkeypatch, form)
    q = torch.cat([torch.rand(400), torch.rand(50).round(), torch.zeros(30), 1e-7 * torch.rand(20)]).to(dtype)
    for percentile in (0.0, 0.1, 30.0, 50.0, 77.7, 99.9, 100.0):
        _assert_kept(q, percentile)


@SELECTIONS
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_entropies_that_are_nearly_equal(host, monkeypatch, form, spread):
    """An untrained student's."""
    set_form(monkeypatch, form)
    host.cuda_shim_set_checks(0)
    _assert_kept(0.01 * (1 + spread * torch.rand(3_000)), 30.0)


@FLOATS
@pytest.mark.parametrize("plant", ["missed", "too many", "second missed"])
@pytest.mark.parametrize("form", ["literal, by brackets", "dense", "dense, entropies stored"])
def test_a_bracket_that_misses_and_one_that_overflows(host, monkeypatch, form, plant, dtype):
    """The sampled entropies are larger than all others, or as if drawn from a much wider distribution."""
    set_form(monkeypatch, form)
    n = 1500
    if plant == "too many":
        monkeypatch.setattr(forms, "room", lambda edges: 300)
    sampled = torch.arange(256) * 2654435761 % n
    q = 0.3 + 0.01 * torch.rand(n, dtype=dtype)
    q[sampled] = torch.rand(256, dtype=dtype) if plant == "too many" else q[sampled]
    if plant == "missed":
        q[sampled] /= 2
    elif plant == "second missed":  # its source lies in no order that is known: too many of the same
        q[torch.randperm(n)[: n // 2]] = 0.305
    for percentile in (30.0, 61.0):
        _assert_kept(q, percentile)


@FLOATS
def test_entropies_that_only_differ_by_rounding(host, monkeypatch, dtype):
    """Those of a student without a preference. Where they are not stored, the products round them in another way than
    the sample. As many are kept as should be, and as are equal to the threshold."""
    set_form(monkeypatch, "dense")
    host.cuda_shim_set_checks(0)
    views = make_logits(Case((64, 160)), dtype, seed=0)
    views[:2] = [x * (1e-4 if dtype == torch.float32 else 2e-8) for x in views[:2]]
    result = backends.REGISTRY[cuda_host.NAME].load().vrm_loss(Views(*views), None, None, RELATIONS_ALONE, True)
    for kept, edges in zip(result.kept.tolist(), (64**2, 160**2), strict=True):
        assert 0.3 * edges <= kept < 0.38 * edges


def test_a_device_that_the_binary_was_built_for_is_not_refused(module):
    assert torch.ops.vrm_kernels.cuda_refusal() == ""


# ---- what the forms literal and dense compute beside the relations --------------------------------------------------

NEW_FORMS = pytest.mark.parametrize("form", ["literal", "dense"])


def compare_losses(views, labels, class_weight, settings, bound, grad_bound=None):
    """Every result of the contract beside the reference's in float64; returns this backend's."""
    result, expected = (
        backends.REGISTRY[name].load().vrm_loss(Views(*four), y, w, settings, True)
        for name, four, y, w in (
            (cuda_host.NAME, views, labels, class_weight),
            ("reference", *((x.double() for x in views),), double(labels), double(class_weight)),
        )
    )
    assert torch.equal(result.kept, expected.kept)
    for name, x, wanted in zip(LossResult._fields, result, expected, strict=True):
        if name != "kept":
            most = grad_bound if grad_bound is not None and name.startswith("grad") else bound
            assert relative_error(x, wanted) < most, name
    return result


def double(x):
    return x if x is None or x.dtype == torch.int64 else x.double()


@NEW_FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropies(host, monkeypatch, form, dtype, probabilities, weighted):
    set_form(monkeypatch, form)
    views, compute = inputs(Case((21, 10), seed=5), dtype), torch.promote_types(dtype, torch.float32)
    labels = torch.randint(10, (21,))
    labels[::4] = 3  # to be ignored
    if probabilities:
        labels = torch.rand(10, 21, dtype=compute).softmax(0).t()
    weight = torch.rand(10, dtype=compute) if weighted else None
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for ce_real, ce_virtual, smoothing in ((True, True, 0.1), (True, False, 0.0), (False, True, 0.3)):
        settings = SETTINGS._replace(ce_real=ce_real, ce_virtual=ce_virtual, label_smoothing=smoothing)
        settings = settings._replace(ignore_index=-100 if probabilities else 3, complete=smoothing > 0)
        compare_losses(views, labels, weight, settings, bound, 1e-4 if dtype.itemsize == 2 else bound)


@NEW_FORMS
@pytest.mark.parametrize("percentile", [30.0, 100.0])
def test_labels_that_are_all_ignored_or_none(host, monkeypatch, form, percentile):
    set_form(monkeypatch, form)
    views = inputs(Case((7, 5)), torch.float32)
    settings = SETTINGS._replace(ignore_index=2, percentile=percentile)
    result = compare_losses(views, torch.full((7,), 2), None, settings, 1e-6)
    assert result.terms[:2].tolist() == [0, 0]
    compare_losses(views, None, None, settings._replace(ce_real=False, ce_virtual=False), 1e-6)


@NEW_FORMS
@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_that_is_no_class_poisons_the_loss(host, monkeypatch, form, label):
    """The device is not read: nothing can be raised."""
    set_form(monkeypatch, form)
    views, labels = Views(*inputs(Case((7, 5)), torch.float32)), torch.zeros(7, dtype=torch.int64)
    labels[6] = label
    result = backends.REGISTRY[cuda_host.NAME].load().vrm_loss(views, labels, None, SETTINGS, True)
    assert result.loss.isnan() and result.grad_real.isnan().all() and result.kept.tolist() == [0, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", [1e-7, 1e-2, 3.0])
def test_the_eps_of_a_relation(host, monkeypatch, form, eps):
    set_form(monkeypatch, form)
    settings = SETTINGS._replace(eps=eps, ce_real=False, ce_virtual=False, percentile=60.0)
    views = inputs(Case((12, 9), kind="opposite"), torch.float32)
    compare_losses([views[0], 0.01 * views[1], *views[2:]], None, None, settings, 1e-5)


RELATIONS_ALONE = SETTINGS._replace(ce_real=False, ce_virtual=False)


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize(
    ("dtype", "kind", "loss_bound", "grad_bound"),
    [
        (torch.float16, "random", 1e-6, 2.5e-4),
        (torch.float16, "converged:1e-3", 1e-5, 1e-4),
        (torch.bfloat16, "random", 5e-5, 2.5e-4),
        (torch.bfloat16, "converged:1e-1", 5e-5, 2.5e-4),
        (torch.bfloat16, "converged:1e-2", 2e-4, 3e-3),
    ],
)
def test_operands_in_float16(host, monkeypatch, dtype, kind, loss_bound, grad_bound, relations):
    """Before gradients are rounded to the logits' dtype, which costs 2.1e-4 (float16) and 1.7e-3 (bfloat16). Operands
    are sums of two for float16 logits; single for bfloat16, where so few components would be given sums as well."""
    from vrm_kernels.backends.cuda import backend as cuda_backend

    set_form(monkeypatch, "dense")
    monkeypatch.setattr(cuda_backend, "AVERAGING_COMPONENTS", 0)
    views = make_logits(Case((33, 70), kind=kind), dtype, seed=7)
    settings = RELATIONS_ALONE._replace(complete=relations == "complete", percentile=100.0)
    compare_losses(views, None, None, settings, loss_bound, grad_bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parity_of_half_precision_in_the_form_dense(host, monkeypatch, dtype):
    set_form(monkeypatch, "dense")
    for relations in MODES:
        assert_parity(cuda_host.NAME, Case(TWO_TILES, relations=relations), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_edges_that_float16_cannot_hold(host, monkeypatch, dtype):
    """One vertex far from all others and two that nearly coincide: their edges are left to the literal stage."""
    set_form(monkeypatch, "dense")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    views = make_logits(Case((33, 40)), dtype, seed=3)
    for x in views:
        x[5] *= 2000
        x[8] = x[7] + 2**-8
    compare_losses(views, None, None, RELATIONS_ALONE._replace(percentile=100.0), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_vertex_that_float16_cannot_hold(host, monkeypatch, dtype):
    """Three hundred times as far from the mean as others. Nothing of it may reach the other vertices' gradients."""
    from vrm_kernels.backends.cuda import backend as cuda_backend

    set_form(monkeypatch, "dense, entropies stored")
    monkeypatch.setattr(cuda_backend, "AVERAGING_COMPONENTS", 0)
    host.cuda_shim_set_checks(0)
    views = make_logits(Case((150, 5)), dtype, seed=3)
    for x in views[1::2]:
        x[5] = torch.tensor([40000.0, 0, 0, 0, 0])
    compare_losses(views, None, None, RELATIONS_ALONE, 1e-3)


@pytest.mark.parametrize(
    ("level", "kind", "bound"),
    [
        ("highest", "random", 1e-6),
        ("high", "random", 1e-6),
        ("high", "converged:1e-2", 1e-5),
        ("high", "opposite", 1e-4),  # as "highest": edges are ill-conditioned
        ("medium", "random", 3e-4),
    ],
)
def test_products_of_float32_follow_torchs_switch(host, monkeypatch, level, kind, bound):
    """ "high" is sums of two float16, "medium" single ones."""
    set_form(monkeypatch, "dense")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: level)
    compare_losses(make_logits(Case((33, 70), kind=kind), torch.float32, seed=7), None, None, RELATIONS_ALONE, bound)


@pytest.mark.parametrize(
    ("logits", "dtype", "level"),
    [
        ("f32", torch.float32, "highest"),
        ("f32 high", torch.float32, "high"),
        ("f32 medium", torch.float32, "medium"),
        ("f16", torch.float16, "highest"),
        ("bf16", torch.bfloat16, "highest"),
    ],
)
def test_products_are_as_many_as_the_roofline_counts(host, monkeypatch, logits, dtype, level):
    """And of float16 but for float32 at "highest": torch's own products at "high" would be TF32."""
    from benchmarks.gpu.roofline import PRODUCTS
    from vrm_kernels.backends.cuda import backend as cuda_backend

    set_form(monkeypatch, "dense, entropies stored")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: level)
    monkeypatch.setattr(cuda_backend, "AVERAGING_COMPONENTS", 0)
    host.cuda_shim_set_checks(0)
    size = 126  # and two columns of ones: no padding
    views = make_logits(Case((size, size)), dtype, seed=7)
    before = [host.cuda_shim_multiply_adds(half) for half in (0, 1)]
    backends.REGISTRY[cuda_host.NAME].load().vrm_loss(Views(*views), None, None, RELATIONS_ALONE, True)
    units = [(host.cuda_shim_multiply_adds(half) - before[half]) / (2 * size**3) for half in (0, 1)]
    assert units[logits != "f32"] == pytest.approx(sum(PRODUCTS[logits]), rel=0.02)
    assert units[logits == "f32"] == 0


def test_float16_sums_that_the_user_allowed_are_not_taken(host, monkeypatch):
    set_form(monkeypatch, "dense")
    before = host.cuda_shim_multiply_adds(1)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        assert_parity(cuda_host.NAME, Case((35, 6)), torch.float16)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert host.cuda_shim_multiply_adds(1) == before


@pytest.mark.parametrize("size", [1e-6, 1e3, 1e30])
def test_what_is_given_for_probabilities_may_be_of_any_size(host, monkeypatch, size):
    """float16 operands would overflow from 4 on if they were scaled for a softmax."""
    set_form(monkeypatch, "dense")
    x, teacher, y, teacher_y = torch.randn(4, 35, 6).to(torch.float16)
    probs = size * torch.randn(35, 4).softmax(1), size * torch.randn(35, 4).softmax(1)
    expected, result = (
        backends.REGISTRY[name].load().relation_graph(Sides(*sides), given, GRAPH_SETTINGS, True)
        for name, sides, given in (
            ("reference", [v.double() for v in (x, y, teacher, teacher_y)], [v.double() for v in probs]),
            (cuda_host.NAME, (x, y, teacher, teacher_y), probs),
        )
    )
    assert int(result.kept) == int(expected.kept)
    assert relative_error(result.loss, expected.loss) < 1e-6


def test_a_gradient_of_more_components_than_are_multiplied_at_a_time(host, monkeypatch):
    set_form(monkeypatch, "dense")
    host.cuda_shim_set_checks(0)
    vectors = [torch.randn(k, 4200) for k in (3, 2, 3, 2)]
    host.cuda_shim_forget_kernels()
    compare(cuda_host.NAME, vectors, FLOOR[torch.float32], evaluate_relation)
    assert sum("add_kernel" in name for name in cuda_host.launches_run(host)) == 2 * 2


@pytest.mark.parametrize(("half_level", "gigabytes"), [(0, 4.9), (1, 2.8), (2, 5.2), (3, 5.2)])
def test_working_memory_of_65536_by_1000(host, half_level, gigabytes):
    """What docs/cuda.md says, counted by the layout itself."""
    from vrm_kernels.backends.cuda import backend as cuda_backend

    brackets = cuda_backend._brackets(65536**2)
    numbers = (ctypes.c_int64 * len(brackets))(*brackets)
    sizes = True, half_level, *cuda_backend.TUNING[1:]
    used = host.cuda_shim_workspace(65536, 1000, *sizes, numbers, len(brackets) // 3)
    assert used == pytest.approx(gigabytes * 1e9, rel=0.01)
    page = (cuda_host.ROOT / "docs" / "cuda.md").read_text()
    assert f"{gigabytes} GB" in page[page.index("**Memory** of dense") : page.index("**The threshold**")]


def test_the_rule_chooses_between_the_forms(host, monkeypatch):
    from vrm_kernels.backends.cuda import backend as cuda_backend
    from vrm_kernels.graph import forms

    monkeypatch.setattr(cuda_backend, "TUNING", cuda_backend.Tuning("staged"))
    logits = make_logits(Case((9, 6)), torch.float32, seed=0)
    for limit, kernel, other in ((2**30, "entropy_kernel", "dense_kernel"), (0, "dense_kernel", "entropy_kernel")):
        monkeypatch.setattr(forms, "LITERAL_INSTRUCTIONS", limit)
        host.cuda_shim_forget_kernels()
        evaluate(cuda_host.NAME, logits)
        names = " ".join(cuda_host.kernels_run(host))
        assert f"vrm::cuda::{kernel}<float>" in names and other not in names


def test_a_loss_of_the_literal_form_is_five_launches(host, monkeypatch):
    set_form(monkeypatch, "literal")
    logits = make_logits(Case((9, 6)), torch.float32, seed=0)
    before = host.cuda_shim_launches()
    evaluate(cuda_host.NAME, logits)
    assert host.cuda_shim_launches() - before == 5


BAD_ARGUMENTS = [
    ({"student_virtual": torch.zeros(3, 5)}, r"student_virtual must be \[4, 5\], not \[3, 5\]"),
    ({"teacher_real": torch.zeros(4, 5, 1)}, r"teacher_real must be \[4, 5\], not \[4, 5, 1\]"),
    (
        {"teacher_virtual": torch.zeros(4, 5, dtype=torch.int64)},
        "teacher_virtual must be float64.* or float16, not Long",
    ),
    ({"student_real": torch.zeros(0, 5)}, "logits must be"),
    ({"labels": None}, "a cross-entropy needs labels"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[4\], not \[3\]"),
    (
        {"labels": torch.zeros(4, dtype=torch.int32)},
        r"labels must be \[4\] class indices in int64, .* not \[4\] in Int",
    ),
    ({"labels": torch.zeros(4, 6)}, r"labels must be \[4, 5\], not \[4, 6\]"),
    ({"class_weight": torch.zeros(4)}, r"class_weight must be \[5\], not \[4\]"),
    ({"class_weight": torch.zeros(5, dtype=torch.int64)}, "class_weight must be float64.*, not Long"),
    ({"delta": 0.0}, "delta must be positive, not 0"),
    ({"eps": 0.0}, "eps must be positive, not 0"),
    ({"ranks": [16, 0]}, "rank of a threshold among 16 entropies is 16"),
    ({"ranks": [0]}, "a rank and a weight for each of two graphs, not 1 and 2"),
    ({"tile_edge": 0}, "edge of a tile must be positive, not 0"),
    ({"brackets_1": [64, 20]}, "brackets are up to 6 times three positive numbers"),
    ({"brackets_0": 7 * [64, 20, 30]}, "brackets are up to 6 times three positive numbers"),
    ({"brackets_0": [64, 20, 0]}, "brackets are up to 6 times three positive numbers"),
    ({"half_level": 4, "dense": True}, "form dense in Float have a level of float16 from 0 to 3, not 4"),
    ({"half_level": 1}, "form literal in Float have a level of float16 from 0 to 0, not 1"),
    (
        {"half_level": 1, "dense": True, "student_real": torch.zeros(4, 5).double()},
        "form dense in Double have a level of float16 from 0 to 0, not 1",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "message"), BAD_ARGUMENTS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_the_operator_refuses(host, wrong, message):
    arguments = {name: torch.zeros(4, 5) for name in Views._fields} | {
        "labels": torch.zeros(4, dtype=torch.int64), "class_weight": None, "alpha": 1.0, "beta": 1.0, "ce_real": True,
        "ce_virtual": True, "ranks": [4, 4], "lerp_weights": [0.0, 0.0], "keep_all": False, "delta": 1.0, "eps": 1e-7,
        "complete": False, "label_smoothing": 0.0, "ignore_index": -100, "need_grad": True, "dense": False,
        "half_level": 0, "tile_edge": 32, "stored_entropy_bytes": 0, "brackets_0": [], "brackets_1": [],
    }  # fmt: skip
    torch.ops.vrm_kernels.cuda_vrm_loss(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vrm_kernels.cuda_vrm_loss(**arguments | wrong)


def refuses(operator, good, wrong, error=RuntimeError):
    """``wrong`` are triples: the place of an argument, what stands there instead, what is said of it."""
    operator(*good)
    for k, instead, message in wrong:
        with pytest.raises(error, match=message):
            operator(*good[:k], instead, *good[k + 1 :])


GRAPH = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, 3), torch.zeros(5, 3), torch.ones(4, 2), torch.ones(5, 2)
NOT_A_GRAPH = [
    (0, torch.zeros(4), r"a and b must be \[M, D\] and \[N, D\], not \[4\] and \[5, 3\]"),
    (0, torch.zeros(4, 3, dtype=torch.int64), "a must be float64, float32, bfloat16 or float16, not Long"),
    (1, torch.zeros(5, 2), r"b must be \[5, 3\], not \[5, 2\]"),
    (2, torch.zeros(5, 3), r"teacher_a must be \[4, 3\], not \[5, 3\]"),
    (3, torch.zeros(4, 3), r"teacher_b must be \[5, 3\], not \[4, 3\]"),
    (4, torch.ones(4), r"probs_a must be \[4, K\], not \[4\]"),
    (5, torch.ones(4, 2), r"probs_b must be \[5, 2\], not \[4, 2\]"),
    (5, None, "probs are given for both sides or for none"),
    (6, 20, "rank of a threshold among 20 entropies is 20"),
    (7, 1.5, "with the weight 1.5"),
    (8, -1.0, "delta must be positive, not -1"),
    (9, 0.0, "eps must be positive, not 0"),
    (10, True, "one vertex set on both sides has one size, not 4 and 5"),
]


@pytest.mark.parametrize(
    ("name", "tuning"), [("cuda_relation_loss", (False, 0, 32, 0, [])), ("cuda_relation_graph", ("tiles", 32, 0))]
)
def test_the_operators_of_one_graph_refuse(host, name, tuning):
    new = name == "cuda_relation_loss"
    operator, given = getattr(torch.ops.vrm_kernels, name), (None, None, None) if new else ()
    good = (*GRAPH, *given, 2, 0.0, 1.0, 1e-7, False, True, *tuning)
    wrong = [(k + len(given) * (k > 5), *rest) for k, *rest in NOT_A_GRAPH]
    tile_edge = good.index(32, 12)
    refuses(operator, good, [*wrong, (tile_edge, 0, "the edge of a tile must be positive, not 0")])
    with pytest.raises(RuntimeError, match=r"a and b must not be empty: they are \[0, 3\] and \[5, 3\]"):
        operator(torch.zeros(0, 3), GRAPH[1], torch.zeros(0, 3), *good[3:])


def test_a_share_refuses(host):
    operator, settings = torch.ops.vrm_kernels.cuda_relation_loss, (0, 0.0, 1.0, 1e-7, False, True, False, 0, 32, 0, [])
    given = torch.zeros(4, 5), torch.tensor(1.0), torch.tensor(2)
    wrong = [
        (6, torch.zeros(5, 4), r"entropy must be \[4, 5\], not \[5, 4\]"),
        (6, torch.zeros(4, 5).double(), "entropy must be Float, not Double"),
        (7, None, "a threshold and a kept count are given both or neither"),
        (7, torch.zeros(2), r"threshold must be one number, not \[2\]"),
        (7, torch.tensor(1.0).double(), "threshold must be Float, not Double"),
        (8, torch.tensor(2.0), "kept must be Long, not Float"),
    ]
    refuses(operator, (*GRAPH[:4], None, None, *given, *settings), wrong)
    with pytest.raises(RuntimeError, match="entropies are given with a threshold and a kept count"):
        operator(*GRAPH[:4], None, None, given[0], None, None, *settings)
    with pytest.raises(RuntimeError, match="a threshold is given for a share: not both"):
        operator(*GRAPH, *given, *settings)


def test_the_operators_of_the_present_forms_refuse(host):
    ops, x, whole, half = torch.ops.vrm_kernels, torch.zeros(4, 5), torch.zeros(2, dtype=torch.int64), torch.float16
    good = x, x, x, x, 1.0, 1.0, [4, 4], [0.0, 0.0], False, 1.0, 1e-7, False, True, "tiles", 32, 0
    wrong = [
        (0, torch.zeros(0, 5), "logits must be .* and not empty"),
        (1, torch.zeros(3, 5), r"student_virtual must be \[4, 5\], not \[3, 5\]"),
        (3, x.long(), "teacher_virtual must be float64.*, not Long"),
        (6, [16, 0], "rank of a threshold among 16 entropies is 16"),
        (7, [0.0], "a rank and a weight for each of two graphs, not 2 and 1"),
        (9, 0.0, "delta must be positive, not 0"),
        (10, 0.0, "eps must be positive, not 0"),
        (14, 0, "the edge of a tile must be positive, not 0"),
    ]
    refuses(ops.cuda_vrm_graphs, good, wrong)
    wrong = [
        (0, torch.zeros(4), r"the entropies must be \[m, n\], not \[4\]"),
        (0, x.to(half), "the entropies must be float32 or float64, not Half"),
        (0, x.t(), "the entropies must have dense rows, not a stride of 5"),
        (1, whole[:1], r"prefixes must be \[2\], not \[1\]"),
        (1, whole.int(), "prefixes must be Long, not Int"),
    ]
    for count in (ops.cuda_count_digits, ops.cuda_digits):
        refuses(count, (x, whole, 21, 11), wrong)
    for shift, bits in ((20, 11), (10, 10), (0, 11), (-1, 11), (21, 12)):
        with pytest.raises(RuntimeError, match=f"no round counts {bits} bits from bit {shift} on"):
            ops.cuda_digits(x, whole, shift, bits)
    a, b = torch.zeros(4, 3), torch.zeros(5, 3)
    numbers = torch.tensor(1.0), torch.tensor(2)
    good = (a, b, a, b, x, a.clone(), b.clone(), *numbers, 1.0, 1.0, 1e-7, False, True, 32)
    wrong = [
        (0, a.to(half), "a must be float32 or float64, not Half"),
        (1, b.double(), "b must be Float, not Double"),
        (2, b, r"teacher_a must be \[4, 3\], not \[5, 3\]"),
        (4, b, r"entropy must be \[4, 5\], not \[5, 3\]"),
        (4, torch.zeros(5, 4).t(), "entropy must have dense rows, not a stride of 4"),
        (5, b, r"grad_a must be \[4, 3\], not \[5, 3\]"),
        (6, b.double(), "grad_b must be Float, not Double"),
        (7, torch.zeros(2), r"threshold must be one number, not \[2\]"),
        (8, torch.tensor(2.0), "kept must be Long, not Float"),
        (10, 0.0, "delta must be positive, not 0"),
        (14, 0, "the edge of a tile must be positive, not 0"),
    ]
    refuses(ops.cuda_relation_share, good, wrong)


# ---- shares of a graph, for several processes ------------------------------------------------------------------------


@pytest.fixture
def module(host, monkeypatch):
    set_form(monkeypatch, "tiles")
    return backends.REGISTRY[cuda_host.NAME].load()


@pytest.fixture(params=["tiles", "literal", "dense"])
def sharing(host, monkeypatch, request):
    set_form(monkeypatch, request.param)
    return backends.REGISTRY[cuda_host.NAME].load()


@FLOATS
def test_counts_of_digits_are_torchs(sharing, dtype):
    check_counts(sharing, dtype)


@FLOATS
def test_opcheck_operators_of_a_share(module, dtype):
    op = torch.ops.vrm_kernels
    a, b, teacher_a, teacher_b = make_logits(Case((6, 5)), dtype, 0)
    entropy = module.entropy_of_logs(a.softmax(1), b.log_softmax(1))
    shift = 8 * dtype.itemsize
    for bits in (11, 11):
        shift -= bits
        for count in (op.cuda_count_digits, op.cuda_digits):
            torch.library.opcheck(count, (entropy, torch.tensor([0, -3]), shift, bits))
    numbers = torch.tensor(1.5, dtype=dtype), torch.tensor(7)
    for need_grad, given in itertools.product((False, True), (entropy, None)):
        grads = [torch.zeros_like(x) if need_grad else x.new_empty(0) for x in (a, b)]
        arguments = (a, b, teacher_a, teacher_b, given, *grads, *numbers, 2.0, 1.0, 1e-7, given is None, need_grad, 32)
        torch.library.opcheck(op.cuda_relation_share, arguments)


def test_digits_that_no_pass_counts_are_refused(module):
    with pytest.raises(ValueError, match="no pass of a selection of float32 counts 11 bits from bit 20"):
        module.count_digits(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), 20, 11)


@FLOATS
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("percentile", [0.0, 30.0, 100.0])
def test_shares_add_up_to_the_whole_graph(sharing, percentile, exclude_self, dtype):
    check_shares(sharing, dtype, percentile=percentile, exclude_self=exclude_self, sizes=(17, 24))


def test_shares_of_literal_edges(sharing):
    check_shares(sharing, torch.float32, kind="opposite", sizes=(33, 2))


@pytest.mark.parametrize("relations", MODES)
def test_a_group_of_one_process(sharing, relations, monkeypatch):
    """Entropies stored, and computed again a few rows at a time."""
    case = Case((12, 7), relations=relations)
    with group_of_one():
        check_group_of_one(cuda_host.NAME, case, torch.float32)
        monkeypatch.setattr(share_module, "STORED_ENTROPY_BYTES", 256)
        check_group_of_one(cuda_host.NAME, case, torch.float32)
        check_group_of_one(cuda_host.NAME, case, torch.float64)
