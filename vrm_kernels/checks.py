"""What the public functions refuse, before any work: every check of an argument stands here."""

import math

import torch
from torch import Tensor

from vrm_kernels import backends
from vrm_kernels.backends.contract import DTYPES

RELATIONS = ("inter_view", "complete")
NORMALIZATIONS = (None, "zscore")


def check_settings(
    alpha: float,
    beta: float,
    percentile: float,
    delta: float,
    relations: str,
    normalize: str | None,
    label_smoothing: float,
    backend: str,
) -> None:
    """Refuse a setting of :func:`vrm_loss` that is out of its range, before any work."""
    check_range("alpha", alpha, 0.0, math.inf)
    check_range("beta", beta, 0.0, math.inf)
    check_range("unreliable_pruning_percentile", percentile, 0.0, 100.0)
    check_delta(delta)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    if relations not in RELATIONS:
        raise ValueError(f"relations must be one of {', '.join(map(repr, RELATIONS))}, got {relations!r}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(map(repr, NORMALIZATIONS))}, got {normalize!r}")
    backends.check_name(backend)


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool | Tensor) or not (isinstance(value, int | float) or hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    check_number(name, value)
    # Written so that NaN fails; an infinite weight would turn a zero term into NaN.
    if not (low <= value <= high and value < math.inf):
        bounds = f">= {low:g} and finite" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def check_delta(delta: float) -> None:
    check_number("delta", delta)
    if not 0 < delta < math.inf:
        raise ValueError(f"delta must be > 0 and finite, got {delta}")


def check_floating(named: dict[str, Tensor]) -> torch.dtype:
    """The dtype to compute in: what the inputs promote to, and float32 at least."""
    dtype = torch.float32
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating (float64, float32, bfloat16 or float16), got {x.dtype}")
        if x.dtype not in DTYPES:
            dtypes = ", ".join(f"{other} {y.dtype}" for other, y in named.items() if isinstance(y, Tensor))
            raise TypeError(f"dtypes that do not promote to float32 or float64: {dtypes}; convert {name} first")
        if x.dtype == torch.float64:
            dtype = torch.float64
    return dtype


def check_one_device(named: dict[str, Tensor]) -> None:
    device = next(iter(named.values())).device
    for x in named.values():
        if x.device != device:
            places = ", ".join(f"{name} on {y.device}" for name, y in named.items())
            raise ValueError(f"all tensors must be on one device: {places}")


def shapes(named: dict[str, Tensor]) -> str:
    # Called only to refuse: a compiler takes a formatted size for a constant.
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())


def check_logits(named: dict[str, Tensor], may_be_empty: bool) -> torch.dtype:
    dtype = check_floating(named)
    check_one_device(named)
    shape = next(iter(named.values())).shape
    if len(shape) != 2 or any(x.shape != shape for x in named.values()):
        raise ValueError(f"the four logits must be 2-D [B, C] and of one shape, got {shapes(named)}")
    if shape[1] == 0 or (shape[0] == 0 and not may_be_empty):
        raise ValueError(f"logits [B, C] need at least one sample and one class, got {tuple(shape)}")
    return dtype


def check_labels(labels: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor:
    b, c = logits.shape

    def wanted():  # as shapes
        return f"[{b}] class indices or [{b}, {c}] class probabilities"

    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, {wanted()}, got {type(labels).__name__}")
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device} and the logits on {logits.device}: put them on one device")
    if labels.dtype.is_floating_point:
        if labels.shape != logits.shape:
            raise ValueError(f"floating labels are class probabilities: expected {wanted()}, got {tuple(labels.shape)}")
        return labels.to(dtype)
    if labels.dtype == torch.bool or labels.dtype.is_complex:
        raise TypeError(f"labels must be {wanted()}, got dtype {labels.dtype}")
    if labels.shape != (b,):
        raise ValueError(f"labels must be {wanted()}, got {tuple(labels.shape)}")
    return labels.long()


def check_finite(named: dict[str, Tensor]) -> None:
    for name, x in named.items():
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"{name} has {bad} non-finite values of {x.numel()}")
