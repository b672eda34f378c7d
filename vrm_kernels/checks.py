"""What the public functions refuse, before any work: every check of an argument stands here."""

import math
import warnings

import torch
from torch import Tensor

from vrm_kernels import backends
from vrm_kernels.backends.contract import DTYPES, LossSettings

RELATIONS = ("inter_view", "complete")
NORMALIZATIONS = (None, "zscore")


def check_weights(alpha: float | Tensor, beta: float | Tensor) -> tuple[float, float, Tensor | None]:
    """The weights of the two graphs as plain numbers. Where a tensor is one of them and the call is being compiled, its
    value is not there to be read: zeros then, and both weights in a float64 tensor ``[2]``."""
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if isinstance(weight, Tensor) and (weight.dim() > 0 or weight.requires_grad or weight.device.type != "cpu"):
            raise ValueError(
                f"{name} as a tensor must be 0-D, on the CPU (its value is read) and need no gradient, got shape "
                f"{tuple(weight.shape)} on {weight.device}, requires_grad={weight.requires_grad}"
            )
    if torch.compiler.is_compiling() and (isinstance(alpha, Tensor) or isinstance(beta, Tensor)):
        return 0.0, 0.0, torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in (alpha, beta)])
    alpha, beta = (x.item() if isinstance(x, Tensor) else x for x in (alpha, beta))
    check_range("alpha", alpha, 0.0, math.inf)
    check_range("beta", beta, 0.0, math.inf)
    return float(alpha), float(beta), None


def check_settings(settings: LossSettings, relations: str, normalize: str | None, backend: str) -> LossSettings:
    """Refuse a setting of :func:`vrm_loss` that is out of its range, before any work; else give plain numbers. The
    weights are :func:`check_weights`'s."""
    check_range("unreliable_pruning_percentile", settings.percentile, 0.0, 100.0)
    check_positive("delta", settings.delta)
    check_positive("eps", settings.eps)
    check_range("label_smoothing", settings.label_smoothing, 0.0, 1.0)
    if isinstance(settings.ignore_index, bool) or not isinstance(settings.ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {settings.ignore_index!r}")
    if relations not in RELATIONS:
        raise ValueError(f"relations must be one of {', '.join(map(repr, RELATIONS))}, got {relations!r}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(map(repr, NORMALIZATIONS))}, got {normalize!r}")
    backends.check_name(backend)
    return LossSettings(
        settings.alpha,
        settings.beta,
        bool(settings.ce_real),
        bool(settings.ce_virtual),
        float(settings.percentile),
        float(settings.delta),
        float(settings.eps),
        settings.complete,
        float(settings.label_smoothing),
        settings.ignore_index,
    )


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool | Tensor) or not (isinstance(value, int | float) or hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    check_number(name, value)
    # Written so that NaN fails; an infinite weight would turn a zero term into NaN.
    if not (low <= value <= high and value < math.inf):
        bounds = f">= {low:g} and finite" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")


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


# What to write for logits of other dimensions.
_INSTEAD = {
    1: ": a batch of one sample is logits[None]",
    3: ": a graph's samples are its rows. Give the tokens of a sequence [B, T, C] as logits.flatten(0, 1), those that "
    "count as logits[mask], with their labels likewise",
    4: ": a graph's samples are its rows. Of dense logits [B, C, H, W] pick locations with "
    "vrm_kernels.dense.sample_locations",
}


def why_not_comparable(student: Tensor, teacher: Tensor) -> str:
    """Of 2-D vertices: what to write where the two networks' have different widths, else nothing."""
    d, e = student.shape[1], teacher.shape[1]
    if d == e:
        return ""
    return (
        f": Huber compares the relations of student and teacher component by component, which {d} and {e} dimensions "
        "do not allow. Project one of them to the other's first, as with torch.nn.Linear"
    )


def check_logits(named: dict[str, Tensor], may_be_empty: bool) -> torch.dtype:
    dtype = check_floating(named)
    check_one_device(named)
    shape = next(iter(named.values())).shape
    if any(x.shape != shape for x in named.values()):
        other_classes = any(x.shape[1:] != shape[1:] for x in named.values())
        why = ". Student and teacher need the same classes: take those that both have, as in logits[:, classes]"
        raise ValueError(
            f"the four logits must be 2-D [B, C] and of one shape, got {shapes(named)}{why if other_classes else ''}"
        )
    if len(shape) != 2:
        raise ValueError(f"the four logits must be 2-D [B, C], got {shapes(named)}{_INSTEAD.get(len(shape), '')}")
    if shape[1] == 0 or (shape[0] == 0 and not may_be_empty):
        raise ValueError(f"logits [B, C] need at least one sample and one class, got {tuple(shape)}")
    return dtype


def check_labels(labels: Tensor | None, logits: Tensor, dtype: torch.dtype, ignore_index: int) -> Tensor:
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
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} has no meaning for class probabilities: leave the rows out that should "
                "not count"
            )
        return labels.detach().to(dtype)
    if labels.dtype == torch.bool or labels.dtype.is_complex:
        raise TypeError(f"labels must be {wanted()}, got dtype {labels.dtype}")
    if labels.shape != (b,):
        raise ValueError(f"labels must be {wanted()}, got {tuple(labels.shape)}")
    return labels.long()


def check_class_weight(weight: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor | None:
    if weight is None:
        return None
    c = logits.shape[1]
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"class_weight must be a floating tensor [{c}], got {got}")
    if weight.shape != (c,):
        raise ValueError(f"class_weight must be [{c}], one weight a class, got {tuple(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(
            f"class_weight is on {weight.device}, the logits are on {logits.device}: put them on one device"
        )
    return weight.detach().to(dtype)


def warn_of_lost_gradients(**named: Tensor | None) -> None:
    """Of tensors that require a gradient, and get none."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for name, x in named.items():
        if isinstance(x, Tensor) and x.requires_grad:
            warnings.warn(
                f"{name} requires a gradient and gets none: the loss takes it for a constant. Compute it under "
                f"torch.no_grad(), or give {name}.detach()",
                stacklevel=3,
            )


def warn_of_labels_that_are_no_probabilities(labels: Tensor) -> None:
    """Of floating labels whose rows do not sum to 1, judged by the sum of all of them, which takes 2 us at 64x100. Only
    where the numbers are at hand: on the CPU, where nothing traces or batches."""
    if (
        torch.compiler.is_compiling()
        or not labels.dtype.is_floating_point
        or type(labels) is not Tensor
        or labels.device.type != "cpu"
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.utils._python_dispatch._get_current_dispatch_mode() is not None
    ):
        return
    rows, total = len(labels), labels.sum().item()
    if abs(total - rows) > 1e-2 * rows:  # bfloat16 rounds by less
        warnings.warn(
            f"floating labels are class probabilities, but these {rows} rows sum to {total:.6g}, not to {rows}: the "
            "cross-entropy weighs each row by its sum. Divide multi-hot labels by labels.sum(1, keepdim=True), and "
            "leave rows out that should not count",
            stacklevel=3,
        )


def check_finite(named: dict[str, Tensor]) -> None:
    for name, x in named.items():
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"{name} has {bad} non-finite values of {x.numel()}")
