"""Cross-entropy and its gradient, by torch's own operators: exactly ``F.cross_entropy``, except that a batch whose
labels are all ignored has the value 0."""

import torch
import torch.nn.functional as F
from torch import Tensor


def summed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(sum, divisor, gradient of the sum)``. The mean is sum / divisor, and 0 where the divisor is 0.

    Args:
        logits: ``[B, C]``, float32 or float64.
        labels: ``[B]`` int64 class indices or ``[B, C]`` class probabilities of the logits' dtype.
        class_weight: ``[C]``, the logits' dtype.
    """
    total = F.cross_entropy(
        logits, labels, class_weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    classes = logits.shape[1]
    if labels.dtype.is_floating_point:
        counted, target = logits.new_ones(len(logits)), labels
        divisor = counted.sum()
    else:
        labels, keep = labels.where(labels != ignore_index, 0), labels != ignore_index
        counted = keep.to(logits.dtype)
        target = F.one_hot(labels, classes).to(logits.dtype) if need_grad else logits
        divisor = (counted if class_weight is None else counted * class_weight[labels]).sum()
    if not need_grad:
        return total, divisor, logits.new_empty(0)
    target = (target * (1 - label_smoothing) + label_smoothing / classes) * counted[:, None]
    if class_weight is not None:
        target = target * class_weight
    return total, divisor, logits.softmax(1).mul_(target.sum(1, keepdim=True)).sub_(target)


def mean_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``(mean, its gradient)``; arguments as of :func:`summed_cross_entropy`."""
    total, divisor, grad = summed_cross_entropy(logits, labels, class_weight, label_smoothing, ignore_index, need_grad)
    divisor = torch.where(divisor == 0, 1, divisor)  # a batch that counts nothing has the sum 0
    return total / divisor, grad / divisor if need_grad else grad
