"""The triton backend on a GPU: what the interpreter cannot show. Skipped, by name, where there is none."""

import pytest
import torch
from device import beyond_rounding, kernels_of, on_cpu
from helpers import (
    DTYPES,
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

import vrm_kernels
import vrm_kernels.functional as VF
from benchmarks.gpu.warm import FLOAT64, LARGE, RAGGED, SMALL
from vrm_kernels import backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHAPES = pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])


def on_gpu(case: Case, dtype=torch.float32):
    return [x.cuda() for x in inputs(case, dtype)]


def fresh(shape, seed, dtype=torch.float32):
    return [x.cuda() for x in make_logits(Case(shape), dtype, seed)]


def same_bits(x, y):
    return torch.equal(x.loss, y.loss) and x.kept == y.kept and all(map(torch.equal, x.grads, y.grads))


def agree(x, y, shape):
    """Our kernels give the same bits anywhere; the library may choose another product under capture, or on a stream."""
    return torch.equal(x, y) if shape == SMALL else relative_error(x, y) < 1e-5


def test_the_backend_is_usable():
    assert backends.resolve("triton", torch.device("cuda")) == "triton", backends.describe()


def test_each_shape_takes_its_regime():
    """What the tests below say of regimes is said of these kernels."""
    for shape, dtype, own in (
        (SMALL, torch.float32, True),
        (LARGE, torch.float32, False),
        (FLOAT64, torch.float64, False),
    ):
        logits = fresh(shape, 0, dtype)
        names = kernels_of(lambda logits=logits: evaluate("triton", logits))
        assert ("edges_kernel" in names) == own and ("epilogue_kernel" in names) != own, names


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for dtype in DTYPES for shape in RAGGED if dtype != torch.float64 or shape == FLOAT64],
    ids=str,
)
def test_parity_with_the_reference_on_the_cpu(shape, relations, dtype):
    for kind, percentile in (("random", 30.0), ("opposite", 100.0), ("converged:1e-2", 100.0)):
        if shape == (1, 1) and kind != "random":
            continue
        case = Case(shape, kind=kind, relations=relations, percentile=percentile)
        floors = NEAR_CONVERGENCE_FLOOR if kind.startswith("converged") else FLOOR
        for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
            oracle, eager, uncancelled = expected_of(case, dtype, alpha, beta)
            result = on_cpu(evaluate("triton", on_gpu(case, dtype), alpha=alpha, beta=beta, **settings_of(case)))
            assert_close(result, oracle, eager, floors[dtype], uncancelled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_large_regime_follows_the_torch_backend_in_float64(dtype):
    """Where the reference would take too much; few of 490000 edges may fall on the other side of the threshold."""
    logits = fresh(LARGE, 0, dtype)
    for relations, percentile in (("inter_view", 30.0), ("complete", 100.0)):
        settings = {"relations": relations, "unreliable_pruning_percentile": percentile}
        oracle = evaluate("torch", [x.double() for x in logits], **settings)
        result = evaluate("triton", logits, **settings)
        assert errors(result, oracle)["loss"] < 1e-4
        # At these sizes a gradient is 1e-5: float16 keeps one digit or two of it.
        bound = 5e-3 if dtype == torch.bfloat16 else 1e-3
        assert max(map(beyond_rounding, result.grads, oracle.grads)) < bound
        assert all(abs(x - y) <= 4 for x, y in zip(result.kept, oracle.kept, strict=True))


@SHAPES
def test_a_hundred_repeats_give_the_same_bits(shape):
    logits = fresh(shape, 0)
    first = evaluate("triton", logits)
    for _ in range(100):
        assert same_bits(evaluate("triton", logits), first)


@SHAPES
def test_nothing_waits_for_the_device(shape):
    logits = fresh(shape, 0)
    students = [x.requires_grad_() for x in logits[:2]]
    labels = torch.zeros(shape[0], dtype=torch.long, device="cuda")
    criterion = vrm_kernels.VRMLoss(16.0, 8.0, backend="triton")
    criterion(*logits, labels).backward()  # compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(*logits, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad is not None for x in students)


@SHAPES
@pytest.mark.parametrize("kinds", [("random", "opposite"), ("opposite", "random")])
def test_a_captured_graph_is_replayed_on_other_inputs(shape, kinds):
    """Captured where no edge is literal and replayed where all are, and the other way round."""
    criterion = vrm_kernels.VRMLoss(16.0, 8.0, backend="triton", unreliable_pruning_percentile=30)
    labels = torch.randint(shape[1], (shape[0],), device="cuda")
    first, second = ([x.cuda() for x in make_logits(Case(shape, kind=k), torch.float32, 7)] for k in kinds)
    static = [x.clone().requires_grad_(k < 2) for k, x in enumerate(first)]

    def step():
        for x in static[:2]:
            x.grad = None
        loss = criterion(*static, labels)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    grads = [x.grad for x in static[:2]]
    for batch in (second, first, second):
        with torch.no_grad():
            for x, new in zip(static, batch, strict=True):
                x.copy_(new)
        for x in (loss, *grads):
            x.detach().fill_(torch.nan)  # poisoned: what replay does not write shows
        graph.replay()
        eager = [x.clone().requires_grad_(k < 2) for k, x in enumerate(batch)]
        expected = criterion(*eager, labels)
        expected.backward()
        assert agree(loss, expected, shape)
        assert all(agree(x, y.grad, shape) for x, y in zip(grads, eager[:2], strict=True))


@SHAPES
def test_other_streams(shape):
    batches = [fresh(shape, seed) for seed in range(4)]
    alone = [evaluate("triton", batch) for batch in batches]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in batches], []
    for stream, batch in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            students = [x.detach().requires_grad_() for x in batch[:2]]
            loss = VF.vrm_loss(*students, *batch[2:], None, 1.0, 1.0, False, False, backend="triton")
            results.append((loss.detach(), torch.autograd.grad(loss, students)))
    torch.cuda.synchronize()
    for (loss, grads), expected in zip(results, alone, strict=True):
        assert agree(loss, expected.loss, shape)
        assert all(agree(x, y, shape) for x, y in zip(grads, expected.grads, strict=True))


@SHAPES
@pytest.mark.parametrize("kind", ["random", "opposite"])
def test_nothing_uninitialised_is_read(shape, kind, monkeypatch):
    """torch fills fresh memory with NaN when asked to be deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    logits = [x.cuda() for x in make_logits(Case(shape, kind=kind), torch.float32, 0)]
    usual = evaluate("triton", logits)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = evaluate("triton", logits)
    finally:
        torch.use_deterministic_algorithms(False)
    assert poisoned.loss.isfinite() and max(errors(poisoned, usual).values()) < 1e-5


def test_a_second_device_is_used_where_the_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    logits = [x.to("cuda:1") for x in make_logits(Case(SMALL), torch.float32, 0)]
    assert evaluate("triton", logits).loss.device == torch.device("cuda:1")


def test_more_edges_than_32_bits_count():
    """50000 x 50000 edges, whose entropies are computed again in every pass. Labels apart, all rows are random."""
    if torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GB of GPU memory")
    logits = fresh((50_000, 16), 0)
    result = evaluate("triton", logits, beta=0.0)
    edges = 50_000**2
    assert abs(result.kept[0] - 0.3 * edges) < 1e-4 * edges
    assert result.loss.isfinite() and all(g.isfinite().all() for g in result.grads)


# ---- shares of a graph, for several processes ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shares_on_the_device(dtype):
    check_shares_on_a_gpu("triton", dtype)


@pytest.mark.parametrize("relations", MODES)
def test_a_group_of_one_process(relations, monkeypatch):
    check_group_on_a_gpu("triton", relations, monkeypatch)
