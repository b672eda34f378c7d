"""The threshold of entropies that lie in several shares is torch.quantile's of all of them, bit for bit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vrm_kernels import backends
from vrm_kernels.distributed import threshold
from vrm_kernels.distributed.shares import Share
from vrm_kernels.graph import forms, pruning, selection

VERTICES, CLASSES = 60, 8
USABLE = [name for name in ("torch", "cpp") if backends.REGISTRY[name].status()[0]]
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Together:
    """What a process group does for threads in the place of processes."""

    def __init__(self, world: int):
        self.world, self.barrier, self.given = world, threading.Barrier(world, timeout=20), {}

    def sum(self, x: torch.Tensor, what: str) -> torch.Tensor:
        self.given[threading.get_ident()] = x
        self.barrier.wait()
        total = sum(self.given.values())
        self.barrier.wait()
        return x.copy_(total)


@pytest.fixture
def missed(monkeypatch):
    """Brackets are taken for any graph, of samples smaller than it; the number of times that one missed."""
    passes = []
    by_digits = threshold._by_digits
    monkeypatch.setattr(threshold, "_by_digits", lambda *a: passes.append(1) or by_digits(*a))
    monkeypatch.setattr(threshold, "BRACKETED_EDGES", 0)
    monkeypatch.setattr(forms, "SMALLEST_SAMPLE", 512)
    return passes


def entropies(kind: str, dtype: torch.dtype, sizes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(VERTICES, VERTICES, generator=generator, dtype=dtype) * 4
    if kind == "ties":
        return (4 * h).round()
    if kind == "mostly one value":
        return torch.where(torch.rand(h.shape, generator=generator) < 0.9, 16.118, h)
    if kind == "equal":
        return torch.full_like(h, 2.3)
    if kind == "around zero":
        return (h - 1) * 1e-6
    if kind == "planted":  # the sample sees the largest alone
        first = 0
        for rows in sizes:
            size = forms.sample(VERTICES**2)
            slots = slice(size * first // VERTICES, size * (first + rows) // VERTICES)
            i, j = selection.places(slots, rows, VERTICES) if rows else (slice(0, 0), slice(0, 0))
            h[first : first + rows][i, j] += 10
            first += rows
    return h


def limits(sizes, wholes, percentile: float, exclude_self: bool, name: str):
    """Of two graphs, whose rows are cut into shares of the given sizes."""
    backend, dtype = backends.REGISTRY[name].load(), wholes[0].dtype
    group = Together(len(sizes))
    ranking = torch.ones(VERTICES, 1, dtype=dtype)

    def of_process(rank: int):
        first, rows = sum(sizes[:rank]), sizes[rank]
        shares = []
        for whole in wholes:
            shares.append(Share(backend, rows, first, VERTICES, (ranking[:rows], ranking), exclude_self))
            if rows:
                shares[-1].entropy.copy_(whole[first : first + rows])
        return threshold.limits(group, shares, percentile, dtype, torch.device("cpu"))

    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(of_process, range(len(sizes))))


@pytest.mark.parametrize("name", USABLE)
@FLOATS
@pytest.mark.parametrize(
    ("kind", "misses"),
    [("random", 0), ("ties", 0), ("mostly one value", 0), ("equal", 0), ("around zero", 0), ("planted", 1)],
)
@pytest.mark.parametrize("sizes", [(60,), (17, 43), (20, 0, 40)])
def test_threshold_is_torchs_quantile(sizes, kind, misses, dtype, name, missed):
    for percentile, exclude_self in ((30.0, False), (30.0, True), (0.0, False), (1e-3, True), (99.9, False)):
        missed.clear()
        wholes = [entropies(kind, dtype, sizes), entropies("random", dtype, sizes)]
        ranked = ~torch.eye(VERTICES, dtype=torch.bool) if exclude_self else slice(None)
        if exclude_self:
            for whole in wholes:
                whole.fill_diagonal_(torch.inf)
        results = limits(sizes, wholes, percentile, exclude_self, name)
        expected = torch.stack([torch.quantile(x[ranked].flatten(), percentile / 100) for x in wholes])
        for thresholds, kept in results:
            assert torch.equal(thresholds, expected), (percentile, exclude_self)
            assert kept.tolist() == [int((x <= t).sum()) for x, t in zip(wholes, expected, strict=True)]
        if percentile == 30.0:  # all processes take the same way
            assert len(missed) == misses * len(sizes)


@pytest.mark.parametrize("name", USABLE)
def test_not_a_number_takes_every_process_the_same_way(name, missed):
    wholes = [entropies("random", torch.float32, ())] * 2
    for nan in (wholes[0] > 3.99, wholes[0] > -1):
        results = limits((17, 43), [wholes[0].masked_fill(nan, torch.nan), wholes[1]], 30.0, False, name)
        assert torch.equal(results[0].thresholds, results[1].thresholds) or bool(results[0].thresholds.isnan().any())
        assert len(missed) in (0, 2)
        missed.clear()


@pytest.mark.parametrize("name", USABLE)
@FLOATS
@pytest.mark.parametrize("exclude_self", [False, True])
def test_entropies_that_are_computed_again(exclude_self, dtype, name, missed, monkeypatch):
    """They are computed once where the bracket holds; once more for each digit where there was no room."""
    backend = backends.REGISTRY[name].load()
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, VERTICES, CLASSES, generator=generator, dtype=dtype).softmax(-1)
    probs = p, pruning.log_probs(q)
    monkeypatch.setattr("vrm_kernels.distributed.shares.STORED_ENTROPY_BYTES", 3000)
    share = Share(backend, VERTICES, 0, VERTICES, probs, exclude_self)
    whole = torch.cat([h for _, h in share._blocks()])
    blocks = list(share._blocks())
    assert share.entropy is None and len(blocks) > 3
    ranked = whole[~torch.eye(VERTICES, dtype=torch.bool)] if exclude_self else whole.flatten()
    expected = torch.quantile(ranked, 0.3)
    calls = []
    inner = Share._entropies
    monkeypatch.setattr(Share, "_entropies", lambda *a: calls.append(1) or inner(*a))
    for room, passes in ((forms.room(VERTICES**2), 1), (10, 1 + len(selection.digits(torch.finfo(dtype).bits)))):
        calls.clear(), missed.clear()
        monkeypatch.setattr(forms, "room", lambda edges, room=room: room)
        thresholds, kept = threshold.limits(Together(1), [share], 30.0, dtype, torch.device("cpu"))
        assert torch.equal(thresholds[0], expected) and int(kept[0]) == int((whole <= expected).sum())
        assert len(calls) == passes * len(blocks) and len(missed) == (passes > 1)
