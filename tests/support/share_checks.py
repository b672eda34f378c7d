"""What every backend's share of a graph is judged by: counts are torch's, and shares add up to the whole."""

import contextlib
import itertools
from unittest import mock

import torch
import torch.distributed as dist
from helpers import Case, errors, evaluate, inputs

import vrm_kernels.functional as VF
from vrm_kernels import backends
from vrm_kernels.backends import Backend, reference
from vrm_kernels.backends.contract import ShareSettings, Sides
from vrm_kernels.distributed import collectives
from vrm_kernels.distributed import shares as share_module
from vrm_kernels.graph import pruning, selection
from vrm_kernels.graph.constants import RELATION_EPS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check_counts(chosen: Backend, dtype: torch.dtype, device="cpu") -> None:
    """Every digit, behind one prefix and behind two, of numbers of every sign and size."""
    generator = torch.Generator().manual_seed(0)
    # Rows are apart, as those of a backend's entropies may be.
    values = torch.full((23, 64), torch.nan, dtype=dtype)[:, :57]
    values.copy_(torch.randn(values.shape, generator=generator))
    values[2:4] = values[2:4].round()
    values[4] *= 1e-30
    values[5, :4], values[5, 4:8], values[6, :2] = 0.0, -0.0, torch.tensor([torch.inf, -torch.inf])
    keys = selection.keys(values).flatten()
    for shift, bits in selection.digits(8 * dtype.itemsize):
        for low, high in ((keys[0], keys[0]), (keys.min(), keys[300])):
            prefixes = torch.stack((low, high)) >> (shift + bits)
            expected = selection.count_digits(values, prefixes, shift, bits)
            on_device = values.to(device).new_full((23, 64), torch.nan)[:, :57].copy_(values)
            counts = chosen.count_digits(on_device, prefixes.to(device), shift, bits)
            assert torch.equal(counts.cpu(), expected) and expected.sum() > 0


def check_shares(
    chosen: Backend,
    dtype,
    *,
    exclude_self=False,
    percentile=30.0,
    sizes=(17, 24),
    classes=7,
    kind="random",
    device="cpu",
) -> None:
    """The shares of one graph, computed one after the other, against the reference's whole graph."""
    n, weight, delta = sum(sizes), 3.0, 0.5
    generator = torch.Generator().manual_seed(0)
    a, b, teacher_a, teacher_b = (2 * torch.randn(n, classes, generator=generator, dtype=dtype) for _ in range(4))
    if kind == "opposite":
        teacher_a, teacher_b = -a, -b
    if exclude_self:
        b, teacher_b = a, teacher_a
    probs, logs = a.softmax(1), pruning.log_probs(b.softmax(1))
    entropy = pruning.entropy_of_logs(probs, logs)
    values = (entropy[~torch.eye(n, dtype=torch.bool)] if exclude_self else entropy.flatten()).sort().values
    edges = pruning.edge_count(n, n, exclude_self)
    kept, threshold = edges, torch.full((), torch.inf, dtype=dtype)
    if percentile < 100:
        kept = max(1, int(edges * percentile / 100))
        while values[kept] - values[kept - 1] < 1e-4:  # rounding must not flip an edge
            kept += 1
        threshold = (values[kept - 1] + values[kept]) / 2
    students = [x.clone().requires_grad_() for x in (a, b)]
    mask = entropy <= threshold
    if exclude_self:
        mask &= ~torch.eye(n, dtype=torch.bool)
    sides = Sides(*students, teacher_a, teacher_b)
    whole = reference.masked_loss(sides, mask, torch.tensor(kept), delta, RELATION_EPS, exclude_self)
    expected = [whole.detach(), *(weight * x for x in torch.autograd.grad(whole, students))]

    a, b, teacher_a, teacher_b, probs, logs, threshold = (
        x.to(device) for x in (a, b, teacher_a, teacher_b, probs, logs, threshold)
    )
    count = torch.tensor(kept, device=device)
    total, before = torch.zeros((), dtype=dtype, device=device), 1.0
    # Not zero before, and not contiguous.
    grads = [torch.full((classes, n), before, dtype=dtype, device=device).t() for _ in range(2)]
    begin = 0
    for size in sizes:
        own = slice(begin, begin + size)
        order = torch.cat((torch.arange(n)[own], torch.arange(begin), torch.arange(begin + size, n)))
        if not exclude_self:
            order = torch.arange(n)
        share = Sides(a[own], b[order], teacher_a[own], teacher_b[order])
        own_entropy = None
        if percentile < 100:
            own_entropy = chosen.entropy_of_logs(probs[own], logs[order])
            if exclude_self:
                own_entropy.diagonal().fill_(torch.inf)
        into = [torch.zeros_like(x) for x in share[:2]] if exclude_self else [grads[0][own], grads[1]]
        alone = exclude_self and percentile == 100
        settings = ShareSettings(threshold, count, edges, weight, delta, RELATION_EPS, alone)
        loss = chosen.relation_share(share, None, own_entropy, settings, into)
        # Without gradients it may be another program, which a GPU's compiler fuses in another way.
        roundings = 0.0 if device == "cpu" else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            chosen.relation_share(share, None, own_entropy, settings, ()), loss, rtol=roundings, atol=0.0
        )
        total += loss
        if exclude_self:
            grads[0][own] += into[0]
            grads[1][order] += into[1]
        begin += size
    for name, got, wanted in zip(("loss", "grad a", "grad b"), (total, *(x - before for x in grads)), expected,
                                 strict=True):  # fmt: skip
        error = float((got.cpu() - wanted).norm() / wanted.norm())
        # A gradient that was added to one is rounded as one is.
        rounded = (
            torch.finfo(dtype).eps * before * wanted.numel() ** 0.5 / float(wanted.norm()) if name != "loss" else 0
        )
        assert error <= 5 * TOLERANCE[dtype] + rounded, (name, error)


@contextlib.contextmanager
def group_of_one(library: str = "gloo"):
    """A process group of this process alone."""
    dist.init_process_group(library, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_group_of_one(backend: str, case: Case, dtype: torch.dtype, device="cpu") -> None:
    """All of the way, but for what is exchanged: as without a group."""
    logits = [x.to(device) for x in inputs(case, dtype)]
    settings = {"unreliable_pruning_percentile": case.percentile, "relations": case.relations, "delta": case.delta}
    settings |= {"alpha": 2.0, "beta": 3.0}
    alone = evaluate(backend, logits, **settings)
    assert backends.resolve(backend, logits[0].device) == backend
    result = evaluate(backend, logits, gather_distributed=True, **settings)
    assert result.kept == alone.kept
    for name, error in errors(result, alone).items():
        assert error <= TOLERANCE[dtype], (name, error)


def check_no_synchronisation(backend: str, case: Case) -> None:
    """On a GPU the loss of a group waits for the device in one place alone, where it learns the batch sizes."""
    logits = [x.cuda().requires_grad_(k < 2) for k, x in enumerate(inputs(case, torch.float32))]
    labels = torch.zeros(case.shape[0], dtype=torch.long, device="cuda")
    exchange = collectives.Group.exchange

    def waiting(self, *args):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return exchange(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def step():
        loss = VF.vrm_loss(
            *logits, labels, 1.0, 1.0, relations=case.relations, backend=backend, gather_distributed=True
        )
        loss.backward()

    step()
    torch.cuda.synchronize()
    with mock.patch.object(collectives.Group, "exchange", waiting):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_shares_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    chosen = backends.REGISTRY[name].load()
    check_counts(chosen, dtype, "cuda")
    for exclude_self, percentile, kind in itertools.product((False, True), (30.0, 100.0), ("random", "opposite")):
        settings = {"exclude_self": exclude_self, "percentile": percentile, "kind": kind}
        check_shares(chosen, dtype, **settings, sizes=(57, 40), classes=33, device="cuda")


def check_group_on_a_gpu(name: str, relations: str, monkeypatch) -> None:
    """Entropies stored, and computed again; nothing waits for the device."""
    case = Case((67, 101), relations=relations, seed=20)
    with group_of_one("nccl"):
        check_group_of_one(name, case, torch.float32, "cuda")
        check_no_synchronisation(name, case)
        monkeypatch.setattr(share_module, "STORED_ENTROPY_BYTES_GPU", 4096)
        check_group_of_one(name, case, torch.float32, "cuda")
        check_no_synchronisation(name, case)
