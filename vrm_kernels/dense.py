"""Dense predictions: which locations of ``[B, C, H, W]`` logits are a graph's samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vrm_kernels import checks


def sample_locations(
    logits: Sequence[Tensor], labels: Tensor | None, budget: int, *, seed: int, ignore_index: int = -100
) -> tuple[list[Tensor], Tensor | None]:
    """Draw locations of a dense prediction, the same ones of every view: rows and labels for a ``VRMLoss``.

    ``rows, picked = sample_locations((s_real, s_virtual, t_real, t_virtual), labels, 1024, seed=step)``, then
    ``loss_fn(*rows, picked)``. The relations' cost grows with the square of the budget. A location must mean the same
    place in both views: let the virtual view change colours, or move the labels and the other view along.

    Args:
        logits: each ``[B, C, *places]``, of one shape; ``[B, C, H, W]`` for instance.
        labels: ``[B, *places]`` class indices; ``None`` makes every location count.
        budget: how many locations at most, >= 1, drawn without replacement from those that count.
        seed: of the draw; the same seed, sizes, labels and device draw the same locations. A step's number will do.
        ignore_index: the label of locations that do not count.

    Returns:
        The rows ``[N, C]`` of each of ``logits``, differentiable, and the labels ``[N]`` (``None`` without labels);
        N is the budget or, if fewer count, their number. The device is read once, for that number.

    Raises:
        ValueError: bad shapes or budget, or no location counts.
        TypeError: ``logits`` that are not floating tensors.
    """
    named = {f"logits[{k}]": x for k, x in enumerate(logits)}
    if not named:
        raise ValueError("logits must hold at least one tensor")
    checks.check_floating(named)
    shape = logits[0].shape
    if len(shape) < 3 or any(x.shape != shape for x in logits):
        raise ValueError(f"logits must be [B, C, *places] and of one shape, got {checks.shapes(named)}")
    places = (shape[0], *shape[2:])
    if labels is not None and tuple(labels.shape) != places:
        raise ValueError(f"labels must be {list(places)}, the logits without their classes, got {list(labels.shape)}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    device = logits[0].device
    if labels is None:
        counting = torch.arange(shape[0] * shape[2:].numel(), device=device)
    else:
        counting = (labels.flatten() != ignore_index).nonzero().squeeze(1)
    if counting.numel() == 0:
        raise ValueError(f"no location counts: every label is {ignore_index}, the ignore_index, or there is none")
    generator = torch.Generator(device).manual_seed(seed)
    drawn = counting[torch.randperm(counting.numel(), generator=generator, device=device)[:budget]]
    picked = None if labels is None else labels.flatten()[drawn]
    return [x.movedim(1, -1).flatten(0, -2)[drawn] for x in logits], picked
