"""What the processes of test_distributed.py run. Each function gets ``(rank, world, *args)`` in a process of its own
with a gloo group; what it returns is pickled for the test."""

import contextlib
import datetime
import os
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers import SETTINGS, Case, inputs, make_labels, make_logits, relative_error
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vrm_kernels.functional as VF
from vrm_kernels import VRMLoss, backends
from vrm_kernels.distributed import collectives
from vrm_kernels.distributed import loss as distributed  # noqa: F401  registers its operator

TIMEOUT = 6.0  # seconds of the groups whose processes die or stall


def main(rank: int, world: int, folder: str, timeout: float, name: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        result = globals()[name](rank, world, *args)
    except Exception:
        result = AssertionError(traceback.format_exc())
    torch.save(result, Path(folder, f"result{rank}"))
    # Leaving the group can wait for processes that are gone.
    os._exit(0)


def rows_of(rank: int, sizes) -> slice:
    begin = sum(sizes[:rank])
    return slice(begin, begin + sizes[rank])


def leaves(logits, rows=slice(None)):
    return [x.detach()[rows].clone().requires_grad_(k < 2) for k, x in enumerate(logits)]


def both(rank: int, world: int, logits, labels, sizes, **settings) -> dict:
    """The loss of the global batch in one process, and in many: the relative errors of this rank's part."""
    whole, part, rows = leaves(logits), leaves(logits, rows_of(rank, sizes)), rows_of(rank, sizes)
    expected, expected_terms = VF.vrm_loss(*whole, labels, return_terms=True, **settings)
    expected.backward()
    labels = None if labels is None else labels[rows]
    loss, terms = VF.vrm_loss(*part, labels, return_terms=True, gather_distributed=True, **settings)
    loss.backward()
    errors = {"loss": relative_error(loss.detach(), expected.detach())}
    for name in ("ce_real", "ce_virtual", "inter_sample", "inter_class"):
        errors[name] = relative_error(terms[name], expected_terms[name])
    for name in ("kept_inter_sample", "kept_inter_class"):
        errors[name] = abs(int(terms[name]) - int(expected_terms[name]))
    for k in (0, 1):
        wanted = whole[k].grad[rows].double()
        assert part[k].grad.dtype == whole[k].grad.dtype and part[k].grad.shape == wanted.shape
        # Relative to the gradient of all rows: a rank's own may be nothing.
        difference = part[k].grad.double() / world - wanted
        errors[f"grad {k}"] = float(difference.norm() / whole[k].grad.double().norm())
    return errors | {"value": float(loss.detach())}


def far_sample(share) -> torch.Tensor:
    """In the place of :meth:`vrm_kernels.distributed.shares.Share.sample`: no entropy is near."""
    return torch.full((9000,), 1e6, dtype=share.probs[0].dtype)


def parity(rank: int, world: int, cases) -> list[dict]:
    """Each case: ``(backend, dtype, Case, sizes, ce, patches)``."""
    results = []
    for backend, dtype, case, sizes, ce, patches in cases:
        with contextlib.ExitStack() as stack:
            for name, value in patches.items():
                stack.enter_context(mock.patch(f"vrm_kernels.distributed.{name}", value))
            labels = make_labels(*case.shape)
            labels[0] = VF.DEFAULT_IGNORE_INDEX
            results.append(
                both(
                    rank,
                    world,
                    inputs(case, dtype),
                    labels,
                    sizes,
                    alpha=2.0,
                    beta=3.0,
                    ce_loss_on_real=ce,
                    ce_loss_on_virtual=ce,
                    unreliable_pruning_percentile=case.percentile,
                    relations=case.relations,
                    delta=case.delta,
                    label_smoothing=0.1,
                    backend=backend,
                )
            )
    return results


def half_types(rank: int, world: int) -> list[dict]:
    """Half-precision students beside a float32 teacher, class probabilities for labels."""
    results = []
    for dtype in (torch.bfloat16, torch.float16):
        logits = [x.to(dtype) if k < 2 else x for k, x in enumerate(inputs(Case((7, 5)), torch.float32))]
        labels = make_labels(7, 5, "probabilities")
        results.append(
            both(rank, world, logits, labels, [3, 4], alpha=1.0, beta=1.0, unreliable_pruning_percentile=100)
        )
    return results


class Student(nn.Module):
    """Two views in, two matrices of logits out, in one pass: DistributedDataParallel wants one forward a step."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, 5, dtype=dtype))

    def forward(self, real, virtual):
        return self.layers(real), self.layers(virtual)


def batches(steps: int, n: int, dtype) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 2
    made = []
    for _ in range(steps):
        real, noise = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
        virtual = real + 0.1 * noise
        views = (real, virtual, real @ weights, virtual @ weights)
        made.append([*(x.to(dtype) for x in views), (real @ weights).argmax(1)])
    return made


def train(model, loss_fn, steps, dtype, rows=slice(None), accumulate: int = 1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    n = 12
    for step, (real, virtual, *rest) in enumerate(batches(steps, n, dtype), start=1):
        last = step % accumulate == 0
        quiet = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with quiet:
            loss = loss_fn(*model(real[rows], virtual[rows]), *(x[rows] for x in rest))
            loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def weights(model) -> torch.Tensor:
    parameters = [p.detach() for p in model.parameters()]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in parameters])


def training(rank: int, world: int, cases) -> list[float]:
    """Each case ``(dtype, relations, sizes, kind)``: how far 20 steps end from one process's 20 steps."""
    errors = []
    for dtype, relations, sizes, kind in cases:
        alone = Student(dtype)
        accumulate = 4 if kind == "accumulated" else 1
        expected = train(alone, VRMLoss(2.0, 1.0, relations=relations), 20, dtype, accumulate=accumulate)
        loss_fn = VRMLoss(2.0, 1.0, relations=relations, gather_distributed=True)
        model = Student(dtype)
        if kind == "checkpointed":
            layers = model.layers

            def forward(real, virtual, layers=layers):
                return tuple(torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False) for x in (real, virtual))

            model.forward = forward
        if kind == "sharded":
            from torch.distributed.fsdp import fully_shard

            model = fully_shard(model)
        else:
            model = DistributedDataParallel(model)
        if kind == "compiled":
            model = torch.compile(model, backend="aot_eager")
            loss_fn = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        result = train(model, loss_fn, 20, dtype, rows_of(rank, sizes), accumulate)
        assert relative_error(weights(Student(dtype)), expected) > 0.05  # it did train
        errors.append(relative_error(result, expected))
    return errors


def shares(rank: int, world: int, relations: str, sizes, classes: int) -> list[tuple[int, int]]:
    """``(rows, columns)`` of the graphs that this process computed."""
    seen = []
    chosen = backends.REGISTRY["torch"].load()
    whole = chosen.relation_share

    def counted(sides, *rest):
        seen.append((len(sides.a), len(sides.b)))
        return whole(sides, *rest)

    logits = [x[rows_of(rank, sizes)] for x in inputs(Case((sum(sizes), classes)), torch.float64)]
    with mock.patch.object(chosen, "relation_share", counted):
        VF.vrm_loss(
            *logits, None, 1.0, 1.0, False, False, relations=relations, backend="torch", gather_distributed=True
        )
    return seen


def traffic(rank: int, world: int, batch: int, classes: int, relations: str) -> dict[str, int]:
    """Bytes that this process receives in a step with gradients and in one without, by kind of exchange."""
    received = {}

    def counting(kind, function, size):
        def call(out, *args, **kwargs):
            received[kind] = received.get(kind, 0) + size(out, *args)
            return function(out, *args, **kwargs)

        return call

    def size_of(x):
        return x.numel() * x.element_size()

    logits = [x[rank * batch : (rank + 1) * batch] for x in torch.randn(4, world * batch, classes)]
    labels = torch.zeros(batch, dtype=torch.long)
    patches = (
        mock.patch.object(
            collectives,
            "_all_gather",
            counting("gather", collectives._all_gather, lambda out, x: size_of(out) - size_of(x)),
        ),
        mock.patch.object(
            dist,
            "all_to_all_single",
            counting("swap", dist.all_to_all_single, lambda out, x, receive, send: size_of(out) - receive[rank]),
        ),
        mock.patch.object(dist, "all_reduce", counting("reduce", dist.all_reduce, lambda x: size_of(x))),
    )
    results = []
    for grad in (True, False):
        received.clear()
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            VF.vrm_loss(
                *(x.clone().requires_grad_(grad and k < 2) for k, x in enumerate(logits)), labels, 1.0, 1.0,
                relations=relations, gather_distributed=True,
            )  # fmt: skip
        results.append(dict(received))
    return results


def not_a_number(rank: int, world: int) -> list[bool]:
    """A NaN in one logit of the last process: whether all is NaN here, for each of the four matrices."""
    seen = []
    for k in range(4):
        logits = leaves(inputs(Case((8, 5)), torch.float32), rows_of(rank, [4, 4]))
        if rank == world - 1:
            with torch.no_grad():
                logits[k][1, 2] = torch.nan
        loss = VF.vrm_loss(*logits, None, 1.0, 1.0, False, False, gather_distributed=True)
        loss.backward()
        seen.append(bool(loss.isnan()) and all(bool(x.grad.isnan().all()) for x in logits[:2]))
    return seen


def subgroups(rank: int, world: int) -> list[float]:
    """Two groups of two: each the loss of its own half."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = groups[rank // 2]
    logits = [x[6 * (rank // 2) : 6 * (rank // 2) + 6] for x in inputs(Case((12, 5)), torch.float64)]
    expected = VF.vrm_loss(*logits, None, 1.0, 1.0, False, False)
    part = [x[3 * (rank % 2) : 3 * (rank % 2) + 3] for x in logits]
    loss_fn = VRMLoss(1.0, 1.0, False, False, gather_distributed=True, process_group=own)
    error = relative_error(loss_fn(*part, None), expected)
    try:
        VF.vrm_loss(*part, None, 1.0, 1.0, False, False, gather_distributed=True, process_group=groups[1 - rank // 2])
    except ValueError as refusal:
        return error, str(refusal)


MISMATCHES = {
    "number of classes": {"classes": 6},
    "dtype of logits_student_virtual": {"dtype": torch.float64},
    "alpha": {"alpha": 2.0},
    "unreliable_pruning_percentile": {"percentile": 40.0},
    "relations='complete'": {"relations": "complete"},
    "gradients enabled": {"grad": False},
    "label_smoothing": {"label_smoothing": 0.2},
    "ce_loss_on_virtual": {"ce_loss_on_virtual": False},
}


def mismatch(rank: int, world: int) -> dict[str, str]:
    """What each mismatch of the last process is answered with; afterwards the group still works."""
    said = {}
    for name, change in MISMATCHES.items():
        settings = {"classes": 5, "dtype": torch.float32, "alpha": 1.0, "percentile": 30.0, "relations": "inter_view"}
        settings |= {"grad": True, "label_smoothing": 0.1, "ce_loss_on_virtual": True}
        if rank == world - 1:
            settings |= change
        logits = [torch.randn(4, settings["classes"]) for _ in range(4)]
        logits[1] = logits[1].to(settings["dtype"])
        logits[0].requires_grad_(settings["grad"])
        try:
            VF.vrm_loss(
                *logits, make_labels(4, 5), settings["alpha"], 1.0, True, settings["ce_loss_on_virtual"],
                settings["percentile"], relations=settings["relations"], label_smoothing=settings["label_smoothing"],
                gather_distributed=True,
            )  # fmt: skip
        except ValueError as error:
            said[name] = str(error)
    empty = [torch.zeros(0, 5) for _ in range(4)]
    try:
        VF.vrm_loss(*empty, make_labels(0, 5), 1.0, 1.0, gather_distributed=True)
    except ValueError as error:
        said["empty"] = str(error)
    logits = [x[:4] for x in inputs(Case((8, 5)), torch.float32)]
    assert torch.isfinite(VF.vrm_loss(*logits, make_labels(4, 5), 1.0, 1.0, gather_distributed=True))
    return said


def lost(rank: int, world: int, how: str) -> tuple[str, float]:
    """The last process dies, or stalls, in the second step: what the others are told, and after how many seconds."""
    logits = [torch.randn(4, 5) for _ in range(4)]
    labels = make_labels(4, 5)
    VF.vrm_loss(*logits, labels, 1.0, 1.0, gather_distributed=True)
    if rank == world - 1:
        if how == "dies":
            os._exit(1)
        time.sleep(3 * TIMEOUT)
        return "", 0.0
    start = time.monotonic()
    try:
        VF.vrm_loss(*logits, labels, 1.0, 1.0, gather_distributed=True)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


def deterministic(rank: int, world: int) -> bool:
    """The same bits, twice; and the same loss on every process."""
    logits = inputs(Case((12, 7)), torch.float32)
    runs = []
    for _ in range(2):
        part = leaves(logits, rows_of(rank, [4] * world))
        loss = VF.vrm_loss(*part, None, 1.0, 1.0, False, False, gather_distributed=True)
        loss.backward()
        runs.append((loss.detach(), part[0].grad, part[1].grad))
    losses = torch.zeros(world)
    losses[rank] = runs[0][0]
    dist.all_reduce(losses)
    return all(torch.equal(x, y) for x, y in zip(*runs, strict=True)) and bool((losses == losses[0]).all())


def unreduced_rule(rank: int, world: int) -> float:
    """The scaling rule, without DistributedDataParallel: the mean over the processes is the global gradient."""
    model = Student(torch.float64)
    real, virtual, *rest = batches(1, 8, torch.float64)[0]
    VRMLoss(1.0, 1.0)(*model(real, virtual), *rest).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    rows = rows_of(rank, [4] * world)
    VRMLoss(1.0, 1.0, gather_distributed=True)(*model(real[rows], virtual[rows]), *(x[rows] for x in rest)).backward()
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(grad)
    return relative_error(grad / world, expected)


def opcheck(rank: int, world: int) -> bool:
    """The operator holds what PyTorch asks of one."""
    for need_grad in (True, False):
        logits = [x[4 * rank : 4 * rank + 4] for x in make_logits(Case((8, 5)), torch.float32, 0)]
        for x in logits[:2]:
            x.requires_grad_(need_grad)
        labels, weight = torch.tensor([0, 4, 2, 1]), torch.rand(5)
        arguments = (*logits, labels, weight, None, *SETTINGS._replace(complete=True), True, need_grad, "torch")
        group = dist.group.WORLD.group_name
        torch.library.opcheck(torch.ops.vrm_kernels.vrm_loss_distributed, (*arguments, group))
    return True
