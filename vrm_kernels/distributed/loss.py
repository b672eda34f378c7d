r"""The loss of the global batch of a process group (arXiv 2502.20760 has one process; this is the same function of the
concatenated batches).

Every process receives what it needs of the others' logits, computes a *share* of each graph, and gets back the gradient
of its own rows:

- which edges a share has, and what it needs for them: :mod:`vrm_kernels.distributed.shares`;
- the threshold is the exact quantile over the global graph: :mod:`vrm_kernels.distributed.threshold`;
- gradients of the other processes' rows are summed over the processes on the way back.

The gradient is multiplied by the number of processes, because DistributedDataParallel and FSDP average gradients over
the processes, and averaging the share that each process's rows have in the global loss would divide it by that number.

A backend gives this the methods for process groups of :class:`vrm_kernels.backends.contract.Backend`.

Where the entropies are too many to be stored, they are computed again, a block of rows at a time. The calls are the
same, so that the bits are the same, and relation_share is called for each block. A backend whose ``recomputes_entropy``
is true does so itself, and is called once. Only the batch sizes are waited for on a GPU.
"""

import torch
from torch import Tensor

from vrm_kernels import backends, ops
from vrm_kernels.backends.contract import DTYPES, LossResult, LossSettings, Views, compute_dtype, empty_loss_result
from vrm_kernels.backends.cross_entropy import summed_cross_entropy
from vrm_kernels.distributed import threshold
from vrm_kernels.distributed.collectives import Group, tensor_on
from vrm_kernels.distributed.shares import Complete, InterView
from vrm_kernels.graph import zscore as zscores

# Users know these settings by other names.
PUBLIC_NAMES = {
    "ce_real": "ce_loss_on_real",
    "ce_virtual": "ce_loss_on_virtual",
    "percentile": "unreliable_pruning_percentile",
    "complete": "relations='complete'",
}

ops.define(f"vrm_loss_distributed({ops.LOSS_ARGUMENTS}, str group) -> {ops.LOSS_RESULTS}")


def vrm_loss(
    views: Views,
    labels: Tensor | None,
    class_weight: Tensor | None,
    weights: Tensor | None,
    settings: LossSettings,
    zscore: bool,
    backend: str,
    group: str,
) -> LossResult:
    """The loss of the global batch, as :func:`vrm_kernels.ops.vrm_loss` gives that of one process; the same on every
    process of the group of this name."""
    real, virtual, teacher_real, teacher_virtual = views
    views = Views(real, virtual, teacher_real.detach(), teacher_virtual.detach())
    arguments = *views, labels, class_weight, weights, *settings, zscore, ops.needs_grad(real, virtual), backend, group
    return LossResult(*ops.call(torch.ops.vrm_kernels.vrm_loss_distributed, _vrm_loss, None, arguments))


def _vrm_loss(real, virtual, teacher_real, teacher_virtual, labels, class_weight, weights, *rest):
    *values, zscore, need_grad, backend_name, group_name = rest
    settings = ops.settings_of(weights, values)
    group = Group(group_name)
    backend = backends.REGISTRY[backend_name].load()
    views = Views(*(x.detach() for x in (real, virtual, teacher_real, teacher_virtual)))
    dtype = compute_dtype(*views)
    modes = {"normalize": zscore, "gradients enabled": need_grad, "class_weight": class_weight is not None}
    _agree(group, views, settings, modes)

    with torch.no_grad(), ops.without_autocast(real.device.type):
        related = Views(*(zscores.zscore(x.to(dtype)) for x in views)) if zscore else views
        graphs = (Complete if settings.complete else InterView)(
            group, backend, related, dtype, ranked=settings.percentile != 100
        )
        limits = threshold.limits(group, graphs.shares, settings.percentile, dtype, real.device)
        losses, wait_for_gradients = graphs.losses(limits, settings, need_grad)
        ce, divisor, ce_grads = _own_cross_entropies(views, labels, class_weight, settings, dtype, need_grad)
        sums = group.sum(torch.stack([x.double() for x in (*ce, *losses, divisor)]), "sum of the loss")
        divisor = torch.where(sums[4] == 0, 1, sums[4])
        terms = torch.cat((sums[:2] / divisor, sums[2:4]))
        weights = tensor_on(
            real.device, [settings.ce_real, settings.ce_virtual, settings.alpha, settings.beta], torch.float64
        )
        loss = (terms @ weights).to(dtype)
        # A process that saw a number that is not finite poisons the gradients, and the counts, of all.
        factor = group.world + loss * 0
        grads = [x.mul_(factor) for x in wait_for_gradients()] or [loss.new_empty(0), loss.new_empty(0)]
        if zscore and need_grad:
            grads = [zscores.zscore_backward(grad, x.to(dtype)) for grad, x in zip(grads, views[:2], strict=True)]
        for grad, part in zip(grads, ce_grads, strict=True):
            if part is not None:
                grad.addcmul_(part, (group.world / divisor).to(dtype))
        return loss, *grads, terms.to(dtype), torch.where(loss.isnan(), 0, limits.kept)


def _own_cross_entropies(views: Views, labels, class_weight, settings: LossSettings, dtype, need_grad: bool):
    """``([sum of each view], divisor, [gradient of each sum, or None])`` of this process's samples."""
    zero = torch.zeros((), dtype=dtype, device=views.student_real.device)
    sums, divisor = [zero, zero], zero
    grads: list[Tensor | None] = [None, None]
    how = settings.label_smoothing, settings.ignore_index, need_grad
    for k, wanted in enumerate((settings.ce_real, settings.ce_virtual)):
        if wanted:
            sums[k], divisor, grad = summed_cross_entropy(views[k].to(dtype), labels, class_weight, *how)
            grads[k] = grad if need_grad else None
    return sums, divisor, grads


def _agree(group: Group, views: Views, settings: LossSettings, modes: dict[str, bool]) -> None:
    """Learns the batch sizes.

    Raises:
        ValueError: the processes differ in anything but the size of their batches, or all batches are empty. Every
            process raises it.
    """
    dtypes = {f"dtype of logits_{name}": DTYPES.index(x.dtype) for name, x in views._asdict().items()}
    batch, classes = views.student_real.shape
    named = {PUBLIC_NAMES.get(name, name): value for name, value in settings._asdict().items()}
    agreed = {"number of classes": classes, **dtypes, **named, **modes}
    values = group.exchange([batch, *map(float, agreed.values())], views.student_real.device)
    for k, name in enumerate(agreed, start=1):
        of = [row[k] for row in values]
        other = next((r for r, x in enumerate(of) if x != of[0]), None)
        if other is not None:
            shown = [DTYPES[int(x)] if name in dtypes else f"{x:g}" for x in (of[0], of[other])]
            raise ValueError(
                f"gather_distributed=True: the processes of the group differ in {name}: rank 0 has {shown[0]}, rank "
                f"{other} has {shown[1]}. All must give logits of the same classes and dtypes and the same settings"
            )
    group.sizes = [int(row[0]) for row in values]
    if sum(group.sizes) == 0:
        raise ValueError("gather_distributed=True: the batch of every process of the group is empty")


ops.register(
    "vrm_loss_distributed",
    _vrm_loss,
    lambda s, v, t, u, labels, weight, *rest: tuple(empty_loss_result(Views(s, v, t, u), need_grad=rest[-3])),
)
