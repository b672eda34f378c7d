"""The loss as functions; what they refuse stands in :mod:`vrm_kernels.checks`."""

from typing import Any

import torch
from torch import Tensor

from vrm_kernels import backends, checks, ops
from vrm_kernels.backends.contract import GraphSettings, LossSettings, Sides, Views
from vrm_kernels.graph import pruning
from vrm_kernels.graph.constants import RELATION_EPS

DEFAULT_PERCENTILE = 30.0
DEFAULT_DELTA = 1.0
DEFAULT_RELATIONS = "inter_view"
DEFAULT_EPS = RELATION_EPS
DEFAULT_IGNORE_INDEX = -100  # torch's
TERM_NAMES = ("ce_real", "ce_virtual", "inter_sample", "inter_class", "kept_inter_sample", "kept_inter_class")


def vrm_loss(
    logits_student_real: Tensor,
    logits_student_virtual: Tensor,
    logits_teacher_real: Tensor,
    logits_teacher_virtual: Tensor,
    labels: Tensor | None,
    alpha: float | Tensor,
    beta: float | Tensor,
    ce_loss_on_real: bool = True,
    ce_loss_on_virtual: bool = True,
    unreliable_pruning_percentile: float = DEFAULT_PERCENTILE,
    *,
    delta: float = DEFAULT_DELTA,
    relations: str = DEFAULT_RELATIONS,
    normalize: str | None = None,
    eps: float = DEFAULT_EPS,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    backend: str = "auto",
    gather_distributed: bool = False,
    process_group: Any = None,
    check_finite: bool = False,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Virtual Relation Matching loss (arXiv 2502.20760) of a batch seen in two views.

    ``L = [real] CE(S, y) + [virtual] CE(S', y) + alpha L_inter_sample + beta L_inter_class``; see
    :class:`vrm_kernels.VRMLoss` for the settings, all of which have the same names here.

    Args:
        logits_student_real, logits_student_virtual: ``[B, C]``, floating, any strides; receive gradients.
        logits_teacher_real, logits_teacher_virtual: ``[B, C]``, floating; receive none.
        labels: ``[B]`` class indices or ``[B, C]`` class probabilities, whose rows sum to 1 (on the CPU, labels whose
            sum is not ``B`` are warned of; a device is not read); ``None`` if neither cross-entropy is on.
        alpha, beta: numbers, or 0-D tensors on the CPU.
        class_weight: ``[C]``, floating.
        return_terms: also return the terms, detached.

    Returns:
        The loss, a scalar: float64 if any logits are float64, else float32. With ``return_terms``, also a dict of
        scalars ``ce_real, ce_virtual, inter_sample, inter_class`` (unweighted; a cross-entropy that is off is 0) and
        int64 ``kept_inter_sample, kept_inter_class`` (edges that passed the pruning). Reading one synchronises.
        The loss is NaN if any logit is not finite, or beyond 1e15 (float64: 1e150), whose squares cannot be summed; the
        kept counts are then 0. Gradients come in each input's own dtype.

    Raises:
        ValueError, TypeError: bad shapes, dtypes, devices or settings, before any work.
        RuntimeError: a backend, asked for by name, that cannot run here; a second derivative through a backend other
            than ``reference``.
    """
    alpha, beta, weights = checks.check_weights(alpha, beta)
    settings = LossSettings(
        alpha,
        beta,
        ce_loss_on_real,
        ce_loss_on_virtual,
        unreliable_pruning_percentile,
        delta,
        eps,
        relations == "complete",
        label_smoothing,
        ignore_index,
    )
    settings = checks.check_settings(settings, relations, normalize, backend)
    named = {
        "logits_student_real": logits_student_real,
        "logits_student_virtual": logits_student_virtual,
        "logits_teacher_real": logits_teacher_real,
        "logits_teacher_virtual": logits_teacher_virtual,
    }
    group = _global_group(process_group) if gather_distributed else None
    dtype = checks.check_logits(named, may_be_empty=group is not None)
    checks.warn_of_lost_gradients(
        logits_teacher_real=logits_teacher_real, logits_teacher_virtual=logits_teacher_virtual, labels=labels
    )
    if labels is not None or ce_loss_on_real or ce_loss_on_virtual:
        labels = checks.check_labels(labels, logits_student_real, dtype, ignore_index)
        checks.warn_of_labels_that_are_no_probabilities(labels)
    class_weight = checks.check_class_weight(class_weight, logits_student_real, dtype)
    chosen = backends.resolve(backend, logits_student_real.device)
    if check_finite:
        checks.check_finite(named)

    views = Views(*named.values())
    zscore = normalize == "zscore"
    if group is None:
        result = ops.vrm_loss(views, labels, class_weight, weights, settings, zscore, chosen)
    else:
        from vrm_kernels.distributed import loss as distributed  # needs a torch that was built with torch.distributed

        result = distributed.vrm_loss(views, labels, class_weight, weights, settings, zscore, chosen, group.group_name)
    if not return_terms:
        return result.loss
    terms = *result.terms.detach().unbind(), *result.kept.unbind()
    return result.loss, dict(zip(TERM_NAMES, terms, strict=True))


def relation_loss(
    a: Tensor,
    b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    *,
    probs: tuple[Tensor, Tensor] | None = None,
    percentile: float = 100.0,
    delta: float = DEFAULT_DELTA,
    eps: float = DEFAULT_EPS,
    backend: str = "auto",
) -> Tensor:
    """One relation graph over any vectors: features as well as logits.

    ``sum over kept edges (i, j) of sum_c huber_delta(eS_ijc - eT_ijc) / (#kept + 1e-7)``, where
    ``e_ij = d_ij / (||d_ij|| + eps)`` and ``d_ij = a_i - b_j`` (arXiv 2502.20760, the normalised difference graph).

    Args:
        a, b: the student's vertices, ``[M, D]`` and ``[N, D]``, floating, any strides; receive gradients.
        teacher_a, teacher_b: the teacher's, ``[M, D]`` and ``[N, D]``. Huber compares relations component by component,
            so both networks need one D: project the features of one to the other's first, with a linear layer.
        probs: ``(P [M, K], P' [N, K])``, non-negative, finite; ranks the edges by ``-sum_k P_ik log(P'_jk + 1e-7)``.
            They carry no gradient. ``None`` keeps every edge, whatever the percentile.
        percentile: keep the edges at or below this percentile of that ranking, in [0, 100].

    Returns:
        A scalar: float64 if any vectors are float64, else float32; NaN if any vector is not finite, or beyond
        1e15 (float64: 1e150).

    Raises:
        ValueError, TypeError: bad shapes, dtypes, devices or settings, before any work.
        RuntimeError: as :func:`vrm_loss`.
    """
    checks.check_range("percentile", percentile, 0.0, 100.0)
    checks.check_positive("delta", delta)
    checks.check_positive("eps", eps)
    backends.check_name(backend)
    named = {"a": a, "b": b, "teacher_a": teacher_a, "teacher_b": teacher_b}
    checks.warn_of_lost_gradients(teacher_a=teacher_a, teacher_b=teacher_b)
    if probs is not None:
        if not (isinstance(probs, tuple | list) and len(probs) == 2):
            raise ValueError("probs must be a pair (P [M, K], P' [N, K]) or None")
        named |= {"probs[0]": probs[0], "probs[1]": probs[1]}
    dtype = checks.check_floating(named)
    checks.check_one_device(named)
    if any(x.dim() != 2 for x in named.values()):
        raise ValueError(f"every tensor must be 2-D, got {checks.shapes(named)}")
    if a.shape != teacher_a.shape or b.shape != teacher_b.shape or a.shape[1] != b.shape[1]:
        why = checks.why_not_comparable(a, teacher_a)
        raise ValueError(f"a and teacher_a must be [M, D], b and teacher_b [N, D], got {checks.shapes(named)}{why}")
    if 0 in a.shape or 0 in b.shape:
        raise ValueError(f"a graph needs at least one vertex a side and one dimension, got {checks.shapes(named)}")
    if probs is not None:
        p, q = probs
        if p.shape[0] != a.shape[0] or q.shape[0] != b.shape[0] or p.shape[1] != q.shape[1] or p.shape[1] == 0:
            raise ValueError(f"probs must be ([M, K], [N, K]) for a [M, D] and b [N, D], got {checks.shapes(named)}")
        probs = (p.detach().to(dtype), q.detach().to(dtype))
    chosen = backends.resolve(backend, a.device)
    settings = GraphSettings(float(percentile), float(delta), float(eps), False)
    return ops.relation_graph(Sides(a, b, teacher_a, teacher_b), probs, settings, chosen)


def joint_entropy(logits_real: Tensor, logits_virtual: Tensor) -> Tensor:
    """The joint entropy that ranks the inter-sample edges: ``H[i, j] = -sum_c P_ic log(P'_jc + 1e-7)``.

    Args:
        logits_real, logits_virtual: ``[B, C]`` and ``[B', C]``, floating.

    Returns:
        ``[B, B']``, float64 for float64 logits, else float32; no gradient.

    Raises:
        ValueError, TypeError: as :func:`vrm_loss`.
    """
    named = {"logits_real": logits_real, "logits_virtual": logits_virtual}
    dtype = checks.check_floating(named)
    checks.check_one_device(named)
    if logits_real.dim() != 2 or logits_virtual.dim() != 2 or logits_real.shape[1] != logits_virtual.shape[1]:
        raise ValueError(
            f"expected [B, C] and [B', C], got {tuple(logits_real.shape)} and {tuple(logits_virtual.shape)}"
        )
    with torch.no_grad(), ops.without_autocast(logits_real.device.type):
        return pruning.joint_entropy(*(x.to(dtype).softmax(1) for x in named.values()))


def quantile(x: Tensor, q: float | Tensor) -> Tensor:
    """The exact q-quantile of all elements of ``x``, of any size, without a host synchronisation.

    Linear interpolation between order statistics, bit for bit what the installed ``torch.quantile(x.flatten(), q)``
    gives where that works (before torch 2.14 up to 2**24 elements). NaN anywhere in ``x`` gives NaN.

    Args:
        x: floating, any shape, at least one element. float16 and bfloat16 are ranked exactly and interpolated in
            float32, the result in float32.
        q: a float, or a 0-D or 1-D floating tensor on the device of ``x``, in [0, 1].

    Returns:
        The shape of ``q`` (0-D for a float), float64 for float64 input, else float32; no gradient.

    Raises:
        ValueError: an empty ``x``, or q outside [0, 1] (a float q, or a q tensor on the CPU: a q tensor on another
            device is not read, and gives NaN there).
        TypeError: ``x`` or ``q`` not floating.
    """
    dtype = checks.check_floating({"x": x})
    if x.numel() == 0:
        raise ValueError("x must have at least one element")
    if isinstance(q, Tensor):
        checks.check_floating({"q": q})
        if q.dim() > 1:
            raise ValueError(f"q must be a float, or a 0-D or 1-D tensor, got shape {tuple(q.shape)}")
        if q.device != x.device:
            raise ValueError(f"q is on {q.device} and x on {x.device}: put them on one device")
        if q.device.type == "cpu" and not bool(((q >= 0) & (q <= 1)).all()):
            raise ValueError(f"q must be in [0, 1], got {q.tolist()}")
    else:
        checks.check_range("q", q, 0.0, 1.0)
    with torch.no_grad():
        return ops.quantile(x.detach().to(dtype).flatten(), q)


def _global_group(process_group: Any) -> Any:
    """The process group to gather over, or None where there is nobody else."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if isinstance(group, str):
        group = _group_of_name(group)
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of process_group: only its members can compute its loss")
    return group if dist.get_world_size(group) > 1 else None


def _group_of_name(name: str) -> Any:
    try:
        return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"process_group={name!r} names no process group of this process: make it with torch.distributed.new_group "
            f"in the same order as where this loss comes from, or give the group itself ({error})"
        ) from error
