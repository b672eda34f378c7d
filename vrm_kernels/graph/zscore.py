"""Logits with mean 0 and standard deviation 1 in each row, and the gradient's way back from them."""

from torch import Tensor

from vrm_kernels.graph.constants import RELATION_EPS


def zscore(logits: Tensor) -> Tensor:
    """``(x - mean) / (deviation + 1e-7)`` of each row of ``[B, C]``."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, correction=0, keepdim=True) + RELATION_EPS)


def zscore_backward(grad: Tensor, logits: Tensor) -> Tensor:
    """The gradient with respect to the logits, from the gradient with respect to their :func:`zscore`. Where a row's
    deviation is 0, so is the derivative of the deviation, as in torch."""
    centred = logits - logits.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    size = deviation + RELATION_EPS
    along = (grad * centred).mean(1, keepdim=True) / (size * deviation)
    grad = (grad - centred * along.masked_fill(deviation == 0, 0)) / size
    return grad - grad.mean(1, keepdim=True)
