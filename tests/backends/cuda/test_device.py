"""The `cuda` backend on a device. `make gpu-check` runs these; elsewhere they are skipped by name."""

import os

import pytest
import torch
from device import captured, kernels_of, on_cpu
from helpers import (
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    Case,
    assert_close,
    errors,
    evaluate,
    expected_of,
    inputs,
    make_logits,
    relative_error,
    settings_of,
)
from share_checks import check_group_on_a_gpu, check_shares_on_a_gpu

from vrm_kernels import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FORMS = {
    "one_launch": ("one_launch", 2048, 0),
    "launches": ("launches", 2048, 0),
    "tiles": ("tiles", 64, 0),
    "literal": ("literal",),
    "literal, ranked by all blocks": ("literal", 2048, 0, 0),
    "dense": ("dense", 64, 0),
    "dense, entropies stored": ("dense", 2048, 1 << 28),
}
LIBRARYS_PRODUCTS = {"tiles", "dense", "dense, entropies stored"}
LIBRARY = ("gemm", "cutlass", "xmma", "nvjet")  # in the names of its products
CASES = [
    Case((1, 1)),
    Case((3, 5), relations="complete"),
    Case((33, 17), percentile=100.0, seed=10),
    Case((67, 101), relations="complete", seed=20),
    Case((64, 100), seed=20),
    Case((20, 300), kind="opposite", seed=30),
    Case((300, 20), kind="converged:1e-2", percentile=50.0, seed=40),
    Case((41, 23), kind="collapsed", percentile=100.0),
    Case((67, 101), percentile=0.0, delta=0.05, seed=60),
]
BOTH_FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def cuda():
    usable, note = backends.REGISTRY["cuda"].status()
    if not usable:
        pytest.skip(note)
    from vrm_kernels.backends.cuda import backend as cuda_backend

    return cuda_backend


def on_device(logits):
    return [x.cuda() for x in logits]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_what_it_is_named(form):
    batch = on_device(make_logits(Case((64, 60)), torch.float32, seed=0))
    names = kernels_of(lambda: call(batch, form))
    kinds = {
        "one_launch_kernel": ["one_launch"],
        "step_kernel": ["launches", "tiles"],
        "literal_kernel": ["literal", "dense"],
    }
    for kind, named in kinds.items():
        assert any(kind in name for name in names) == (FORMS[form][0] in named), names
    products = [name for name in names if any(word in name.lower() for word in LIBRARY)]
    assert bool(products) == (form in LIBRARYS_PRODUCTS), names


@BOTH_FLOATS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shape}-{case.kind}-{case.relations}")
def test_parity_on_the_device(cuda, monkeypatch, case, form, dtype):
    monkeypatch.setattr(cuda, "TUNING", cuda.Tuning(*FORMS[form]))
    floors = NEAR_CONVERGENCE_FLOOR if case.kind.startswith("converged") else FLOOR
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
        oracle, eager, uncancelled = expected_of(case, dtype, alpha, beta)
        result = evaluate("cuda", on_device(inputs(case, dtype)), alpha=alpha, beta=beta, **settings_of(case))
        assert_close(on_cpu(result), oracle, eager, floors[dtype], uncancelled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype):
    case = Case((37, 61), seed=500)
    oracle, eager, uncancelled = expected_of(case, dtype, 1.0, 0.0)
    result = evaluate("cuda", on_device(inputs(case, dtype)), alpha=1.0, beta=0.0, **settings_of(case))
    assert_close(on_cpu(result), oracle, eager, FLOOR[dtype], uncancelled)


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_operands_in_float16(cuda, monkeypatch, dtype, bound, relations):
    """Single ones and sums of two. The gradient is rounded to the logits' dtype, by 1.7e-3 and by 2.1e-4."""
    monkeypatch.setattr(cuda, "TUNING", cuda.Tuning("dense"))
    logits = on_device(make_logits(Case((1100, 1000)), dtype, seed=3))
    settings = {"alpha": 1.0, "beta": 1.0, "relations": relations}
    result = evaluate("cuda", logits, **settings)
    expected = evaluate("cuda", [x.float() for x in logits], **settings)  # in float32
    assert result.kept == expected.kept and max(errors(result, expected).values()) < bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relations", MODES)
def test_a_hundred_repeats_give_the_same_bits(cuda, monkeypatch, form, relations):
    monkeypatch.setattr(cuda, "TUNING", cuda.Tuning(*FORMS[form]))
    logits = on_device(make_logits(Case((113, 97), kind="opposite"), torch.float32, seed=0))
    first = evaluate("cuda", logits, relations=relations)
    for _ in range(100):
        torch.full((1 << 20,), torch.nan, device="cuda")  # what the caching allocator hands out next is poisoned
        again = evaluate("cuda", logits, relations=relations)
        assert torch.equal(again.loss, first.loss) and again.kept == first.kept
        assert all(map(torch.equal, again.grads, first.grads))


def call(operator_inputs, form):
    ranks, weights = [1200, 1100], [0.25, 0.5]
    name, *tuning = FORMS[form]
    if name in ("literal", "dense"):
        settings = ranks, weights, False, 1.0, 1e-7, False, 0.1, -100, True
        tuning = name == "dense", False, *(tuning + [2048, 0, 2**18][len(tuning) :])
        labels = torch.arange(len(operator_inputs[0]), device="cuda") % operator_inputs[0].shape[1]
        return torch.ops.vrm_kernels.cuda_vrm_loss(
            *operator_inputs, labels, None, 2.0, 0.5, True, True, *settings, *tuning
        )
    arguments = (2.0, 0.5, ranks, weights, False, 1.0, 1e-7, False, True, *FORMS[form])
    return torch.ops.vrm_kernels.cuda_vrm_graphs(*operator_inputs, *arguments)


@pytest.mark.parametrize("form", FORMS)
def test_graph_capture_and_replay_on_changed_inputs(form):
    """With a host synchronisation capture would fail. Threshold, counts and literal edges change with the inputs."""
    batches = [on_device(make_logits(Case((64, 60), kind=kind), torch.float32, seed=k)) for k, kind in
               enumerate(("random", "opposite", "converged:1e-2"))]  # fmt: skip
    static = [x.clone() for x in batches[0]]
    results, replay = captured(lambda: call(static, form), "cuda")
    for batch in (*batches, batches[0]):
        for to, x in zip(static, batch, strict=True):
            to.copy_(x)
        for x in results:
            x.fill_(-1)
        replay()
        for got, wanted in zip(results, call(batch, form), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_the_current_stream_is_used(form):
    """Inputs written late on a side stream: a kernel on another stream would read them too early."""
    batch = on_device(make_logits(Case((64, 60)), torch.float32, seed=0))
    wanted = call(batch, form)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = [torch.full_like(x, torch.nan) for x in batch]
        torch.cuda._sleep(50_000_000)
        for to, x in zip(late, batch, strict=True):
            to.copy_(x)
        got = call(late, form)
    side.synchronize()
    assert all(map(torch.equal, got, wanted))


def test_no_host_synchronisation():
    batch = on_device(make_logits(Case((64, 60)), torch.float32, seed=0))
    for form in FORMS:
        call(batch, form)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(batch, form)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_algorithms_change_nothing(form):
    if form in LIBRARYS_PRODUCTS and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        pytest.skip("torch refuses its products in this mode without CUBLAS_WORKSPACE_CONFIG")
    batch = on_device(make_logits(Case((64, 60)), torch.float32, seed=0))
    wanted = call(batch, form)
    torch.use_deterministic_algorithms(True)
    try:
        got = call(batch, form)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, wanted))


def test_large_graphs_obey_the_switch_of_float32_products():
    """Our own products are always in full float32; torch's are TF32, those of the form dense sums of two float16."""
    batch = on_device(make_logits(Case((160, 256)), torch.float32, seed=0))
    wanted = {form: call(batch, form) for form in FORMS}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got = {form: call(batch, form) for form in FORMS}
    finally:
        torch.set_float32_matmul_precision(before)
    for form in FORMS.keys() - LIBRARYS_PRODUCTS:
        assert all(map(torch.equal, got[form], wanted[form]))
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not any(torch.equal(got[form][1], wanted[form][1]) for form in LIBRARYS_PRODUCTS)
    assert relative_error(got["dense"][1], wanted["dense"][1]) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_inputs_device_is_used():
    batch = make_logits(Case((64, 60)), torch.float32, seed=0)
    wanted = call([x.to("cuda:0") for x in batch], "one_launch")
    got = call([x.to("cuda:1") for x in batch], "one_launch")
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, wanted, strict=True))


@pytest.mark.parametrize("seed", range(32))
def test_triton_agrees_on_random_problems(cuda, monkeypatch, seed):
    """The second opinion: two backends with nothing in common but the formulas. Every form of this one in turn."""
    monkeypatch.setattr(
        cuda, "TUNING", (cuda.Tuning(), *(cuda.Tuning(*form) for form in FORMS.values()))[seed // 4 % (1 + len(FORMS))]
    )
    triton = backends.REGISTRY.get("triton")
    if triton is None or not triton.status()[0] or not triton.runs_on("cuda"):
        pytest.skip("backend 'triton' is not usable here")
    generator = torch.Generator().manual_seed(seed)
    b, c = (int(torch.randint(1, 300, (), generator=generator)) for _ in range(2))
    relations = MODES[seed % 2]
    case = Case((b, c), percentile=(0.0, 30.0, 50.0, 100.0)[seed % 4], relations=relations, seed=seed)
    logits = on_device(inputs(case, torch.float32))
    results = [evaluate(name, logits, **settings_of(case)) for name in ("cuda", "triton")]
    assert results[0].kept == results[1].kept
    assert max(errors(*results).values()) < 1e-4


# ---- shares of a graph, for several processes ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shares_on_the_device(dtype):
    check_shares_on_a_gpu("cuda", dtype)


@pytest.mark.parametrize("relations", MODES)
def test_a_group_of_one_process(relations, monkeypatch):
    check_group_on_a_gpu("cuda", relations, monkeypatch)
