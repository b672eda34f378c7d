r"""The loss of the global batch of a process group (arXiv 2502.20760 has one process; this is the same function of the
concatenated batches).

Every process receives what it needs of the others' logits, computes a *share* of each graph, and gets back the gradient
of its own rows:

- which edges a share has, and what it needs for them: :mod:`vrm_kernels.distributed.shares`;
- the threshold is the exact quantile over the global graph, from summed counts of digits:
  :mod:`vrm_kernels.graph.selection`;
- gradients of the other processes' rows are summed over the processes on the way back.

The gradient is multiplied by the number of processes, because DistributedDataParallel and FSDP average gradients over
the processes, and averaging the share that each process's rows have in the global loss would divide it by that number.

What a backend module gives for this, beside :mod:`vrm_kernels.ops`'s contract::

    entropy_of_logs(P [m, K], L' [N, K]) -> [m, N]              as vrm_kernels.graph.pruning.entropy_of_logs
    count_digits(entropy [m, N], prefixes, shift, bits)         as vrm_kernels.graph.selection.count_digits
    relation_share(a [m, D], b [N, D], teacher_a, teacher_b, probs | None, entropy | None, threshold, kept, edges,
                   weight, delta, exclude_self, grads) -> loss []

The loss is the sum over the share's edges at or below ``threshold``, over ``kept``, both of the whole graph (of so
many ``edges``) and on the device; ``weight`` times its gradients is added to ``grads``, two matrices of any strides or
none. ``entropy`` is what entropy_of_logs gave, infinite where an edge does not exist; where it is ``None``, every edge
is kept, but for the edges (i, i) with ``exclude_self``. All matrices have one dtype, float32 or float64.

Entropies that are too many to be stored are computed again, a block of rows at a time: by the same calls, so that they
are the same bits, and relation_share is called for each block. A module whose ``RECOMPUTES_ENTROPY`` is true does so
itself, because its entropy_of_logs gives the same bits for any block of rows: relation_share is called once, with
``probs``, (P, L'), and without ``entropy``. Nothing here waits for a GPU, but for the batch sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vrm_kernels import backends, ops
from vrm_kernels.distributed import shares
from vrm_kernels.distributed.collectives import Group, tensor_on
from vrm_kernels.distributed.shares import Complete, InterView, Share
from vrm_kernels.graph import pruning, selection

RELATION_TERMS = 2

ops.define(
    "vrm_graphs_distributed(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
    "Tensor local_sums, float alpha, float beta, float percentile, float delta, bool complete, bool need_grad, "
    "str backend, str group, str[] setting_names, float[] settings) "
    "-> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept, Tensor global_sums)"
)


def vrm_graphs(
    student_real, student_virtual, teacher_real, teacher_virtual, local_sums, *, alpha, beta, percentile, delta,
    complete, backend, group, settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(alpha L_inter_sample + beta L_inter_class, the two terms [2], the two kept counts [2], global_sums)`` of the
    global batch; the same on every process.

    Args:
        local_sums: float64 ``[K]``, to be summed over the processes.
        group: name of the process group.
        settings: further numbers in which the processes must agree, by name.
    """
    views = (student_real, student_virtual, teacher_real.detach(), teacher_virtual.detach())
    need_grad = torch.is_grad_enabled() and (student_real.requires_grad or student_virtual.requires_grad)
    arguments = (
        *views, local_sums, alpha, beta, percentile, delta, complete, need_grad, backend, group, list(settings),
        [float(x) for x in settings.values()],
    )  # fmt: skip
    loss, _, _, terms, kept, sums = ops.call(torch.ops.vrm_kernels.vrm_graphs_distributed, _implementation, *arguments)
    return loss, terms, kept, sums


def _implementation(
    s, v, t, u, local_sums, alpha, beta, percentile, delta, complete, need_grad, backend, group_name, names, settings
):  # fmt: skip
    group = Group(group_name)
    module = backends.REGISTRY[backend].load()
    dtype = ops.compute_dtype(s, v, t, u)
    settings = dict(zip(names, settings, strict=True))
    settings |= {"alpha": alpha, "beta": beta, "unreliable_pruning_percentile": percentile, "delta": delta}
    settings |= {"relations='complete'": complete, "gradients enabled": need_grad}
    _agree(group, (s, v, t, u), settings)

    with torch.no_grad(), ops.without_autocast(s.device.type):
        graphs = (Complete if complete else InterView)(
            group, module, [x.detach() for x in (s, v, t, u)], dtype, ranked=percentile != 100
        )
        thresholds, kept = _thresholds(group, graphs.shares, percentile, dtype, s.device)
        losses, wait_for_gradients = graphs.losses(thresholds, kept, (alpha, beta), delta, need_grad)
        sums = group.sum(torch.cat((torch.stack(losses).double(), local_sums)), "sum of the loss")
        terms, global_sums = sums.split((RELATION_TERMS, len(local_sums)))
        loss = (alpha * terms[0] + beta * terms[1]).to(dtype)
        # A process that saw a number that is not finite poisons the gradients of all.
        factor = group.world + loss * 0
        grads = [x.mul_(factor) for x in wait_for_gradients()] or [loss.new_empty(0), loss.new_empty(0)]
        return loss, *grads, terms.to(dtype, copy=True), kept, global_sums.clone()


def _agree(group: Group, views: tuple[Tensor, ...], settings: dict[str, float]) -> None:
    """Learns the batch sizes.

    Raises:
        ValueError: on every process, if they differ in anything but their batch's size, or all batches are empty.
    """
    names = ("student_real", "student_virtual", "teacher_real", "teacher_virtual")
    dtypes = {f"dtype of logits_{name}": ops.DTYPES.index(x.dtype) for name, x in zip(names, views, strict=True)}
    batch, classes = views[0].shape
    settings = {"number of classes": classes, **dtypes, **settings}
    values = group.exchange([batch, *map(float, settings.values())], views[0].device)
    for k, name in enumerate(settings, start=1):
        of = [row[k] for row in values]
        other = next((r for r, x in enumerate(of) if x != of[0]), None)
        if other is not None:
            shown = [ops.DTYPES[int(x)] if name in dtypes else f"{x:g}" for x in (of[0], of[other])]
            raise ValueError(
                f"gather_distributed=True: the processes of the group differ in {name}: rank 0 has {shown[0]}, rank "
                f"{other} has {shown[1]}. All must give logits of the same classes and dtypes and the same settings"
            )
    group.sizes = [int(row[0]) for row in values]
    if sum(group.sizes) == 0:
        raise ValueError("gather_distributed=True: the batch of every process of the group is empty")


def _thresholds(
    group: Group, graphs: Sequence[Share], percentile: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``(thresholds, kept)`` of the global graphs: the exact quantiles of their joint entropies, and how many edges are
    at or below them."""
    if percentile == 100:
        kept = tensor_on(device, [share.edges for share in graphs], torch.int64)
        return torch.full((len(graphs),), torch.inf, dtype=dtype, device=device), kept
    positions = [pruning.rank(percentile / 100, share.edges, dtype) for share in graphs]
    # A rank that is whole does not look at the next value, which may be infinite.
    ranks = tensor_on(device, [[below, below + (weight > 0)] for below, weight in positions], torch.int64)
    weights = tensor_on(device, [weight for _, weight in positions], dtype)

    def count(prefixes: Tensor, shift: int, bits: int) -> Tensor:
        counts = torch.stack([share.count_digits(p, shift, bits) for share, p in zip(graphs, prefixes, strict=True)])
        return group.sum(counts, "sum of the counts of entropies")

    largest = max(share.edges for share in graphs) * torch.finfo(dtype).bits // 8 // group.world
    # The kernels of GPUs count narrow digits alone.
    wide = device.type == "cpu" and largest > shares.STORED_ENTROPY_BYTES
    values, at_most = selection.order_statistics(count, ranks, dtype, wide_digits=wide)
    low, high = values.unbind(1)
    threshold = low.lerp(high, weights)
    return threshold, torch.where(threshold >= high, at_most[:, 1], at_most[:, 0])


def _fake(s, v, t, u, local_sums, need_grad):
    return *ops.vrm_graphs_fake(s, v, t, u, need_grad), torch.empty_like(local_sums)


ops.register(
    "vrm_graphs_distributed",
    _implementation,
    lambda s, v, t, u, sums, alpha, beta, percentile, delta, complete, need_grad, backend, group, names, settings: (
        _fake(s, v, t, u, sums, need_grad)
    ),
)
