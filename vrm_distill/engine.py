"""One epoch of training, and validation: any model, any loader, any optimizer.

The loss of one batch is defined here, for the loops below, which are for your own script, and for the command's
``Trainer``, which adds what a long run needs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm_kernels.data import both_views, output_of, views_of
from vrm_kernels.graph.pruning import edge_count
from vrm_kernels.loss import VRMLoss

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


def train_one_epoch(
    teacher: nn.Module,
    student: nn.Module,
    loader: Batches,
    loss_fn: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
) -> dict[str, float]:
    """Distil ``teacher`` into ``student`` for one pass over ``loader``.

    Args:
        teacher: gives logits ``[B, C]``; put in evaluation mode, gets no gradient.
        student: gives logits ``[B, C]``; put in training mode. Both models must be on ``device``.
        loader: batches ``(real, virtual, labels)``, as a loader over a ``DualViewDataset`` gives; labels ``[B]`` class
            indices or ``[B, C]`` class probabilities.
        loss_fn: called as ``loss_fn(student_real, student_virtual, teacher_real, teacher_virtual, labels)``.

    Returns:
        Means over the samples: ``loss``, and with a :class:`vrm_kernels.VRMLoss` also its unweighted terms ``ce_real,
        ce_virtual, inter_sample, inter_class`` and ``kept_inter_sample, kept_inter_class``, the fraction of the
        edges that passed the pruning. The device is read once, after the last batch.

    Raises:
        TypeError: the loader gives other batches, or a model something else than a tensor, saying what.
        ValueError: the loader gave no batch, or one that batch norm cannot normalise.
    """
    teacher.eval()
    student.train()
    means = Means()
    for batch in loader:
        real, virtual, labels = (x.to(device, non_blocking=True) for x in views_of(batch))
        loss, terms = distillation_loss(teacher, student, real, virtual, labels, loss_fn)
        _step(loss, optimizer)
        means.add({"loss": loss, **terms}, labels.shape[0])
    return means.read()


def train_alone_one_epoch(
    model: nn.Module,
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    *,
    views: str = "both",
) -> dict[str, float]:
    """Cross-entropy alone for one pass over ``loader``: a teacher, or a student to compare a distilled one with.

    Args:
        model: gives logits ``[B, C]``; put in training mode.
        loader: as for :func:`train_one_epoch`.
        views: ``"both"`` trains on ``CE(S, y) + CE(S', y)``, the cross-entropy part of ``VRMLoss``; ``"real"`` on the
            first alone, and the model never sees the virtual view.

    Returns:
        Means over the samples: ``loss``, ``ce_real`` and, with both views, ``ce_virtual``.

    Raises:
        ValueError: another ``views``, or the loader gave no batch.
    """
    if views not in ("real", "both"):
        raise ValueError(f"views must be 'real' or 'both', got {views!r}")
    model.train()
    means = Means()
    for batch in loader:
        real, virtual, labels = (x.to(device, non_blocking=True) for x in views_of(batch))
        loss, terms = cross_entropy_loss(model, real, virtual, labels, views)
        _step(loss, optimizer)
        means.add({"loss": loss, **terms}, labels.shape[0])
    return means.read()


def distillation_loss(
    teacher: nn.Module,
    student: nn.Module,
    real: Tensor,
    virtual: Tensor,
    labels: Tensor,
    loss_fn: Callable[..., Tensor],
    kd_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, and of a ``VRMLoss`` its terms and the kept fractions, detached; arguments as above.

    Args:
        virtual: of several virtual views one after the other, ``[V * B, ...]``; the loss is the mean over them.
        kd_weight: of :func:`hinton_divergence` at temperature 4, added for each view (the mean over the virtual ones)
            and told as the term ``kd``.
    """
    with torch.no_grad():
        teacher_logits = both_views(teacher, real, virtual)
    return loss_of_logits(both_views(student, real, virtual), teacher_logits, labels, loss_fn, kd_weight)


def loss_of_logits(
    logits: tuple[Tensor, Tensor],
    teacher_logits: tuple[Tensor, Tensor],
    labels: Tensor,
    loss_fn: Callable[..., Tensor],
    kd_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As :func:`distillation_loss`, of the logits of real and virtual views."""
    real, teacher_real = logits[0], teacher_logits[0]
    virtual, teacher_virtual = (x.split(len(real)) for x in (logits[1], teacher_logits[1]))
    told = {"return_terms": True} if isinstance(loss_fn, VRMLoss) else {}
    results = [loss_fn(real, s, teacher_real, t, labels, **told) for s, t in zip(virtual, teacher_virtual, strict=True)]
    if not told:
        loss, terms = sum(results) / len(results), {}
    else:
        loss = sum(loss for loss, _ in results) / len(results)
        samples, classes = real.shape
        if loss_fn.gather_distributed and torch.distributed.is_initialized():
            samples *= torch.distributed.get_world_size(loss_fn.process_group)
        terms = {name: sum(terms[name] for _, terms in results) / len(results) for name in results[0][1]}
        terms = _kept_fractions(terms, samples, classes, loss_fn.relations == "complete")
    if kd_weight:
        divergence = sum(hinton_divergence(s, t) for s, t in zip(logits, teacher_logits, strict=True))
        loss, terms = loss + kd_weight * divergence, {**terms, "kd": divergence.detach()}
    return loss, terms


def hinton_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` of logits ``[B, C]``, the mean over B (Hinton et al.,
    arXiv 1503.02531)."""
    p, q = (
        (x.to(torch.promote_types(x.dtype, torch.float32)) / temperature).log_softmax(1) for x in (student, teacher)
    )
    return F.kl_div(p, q, reduction="batchmean", log_target=True) * temperature**2


def cross_entropy_loss(
    model: nn.Module, real: Tensor, virtual: Tensor, labels: Tensor, views: str, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-entropy of one batch and its terms, detached; arguments as for :func:`train_alone_one_epoch`."""
    logits = (output_of(model, real),) if views == "real" else both_views(model, real, virtual)
    terms = {
        # Several virtual views have the same labels, one after the other.
        name: F.cross_entropy(x.float(), torch.cat([labels] * (len(x) // len(labels))), label_smoothing=label_smoothing)
        # zip leaves out ce_virtual where there is one view.
        for name, x in zip(("ce_real", "ce_virtual"), logits, strict=False)
    }
    return sum(terms.values()), {name: x.detach() for name, x in terms.items()}


@torch.no_grad()
def validate(model: nn.Module, loader: Iterable[tuple[Tensor, ...]], device: torch.device | str) -> float:
    """The accuracy of ``model``, in [0, 1]; the model is left in the mode it was in.

    Args:
        model: gives logits ``[B, C]``; evaluated in evaluation mode.
        loader: batches whose first tensor is the images and whose last is the labels ``[B]``: ``(images, labels)``,
            or ``(real, virtual, labels)``, of which the real view is judged.

    Raises:
        ValueError: the loader gave no sample.
    """
    correct, seen = count_correct(model, loader, device)
    if seen == 0:
        raise ValueError("validate: the loader gave no sample")
    return correct.item() / seen


@torch.no_grad()
def count_correct(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, ...]],
    device: torch.device | str,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[Tensor, int]:
    """How many of the loader's samples ``model`` gets right (a scalar on ``device``), and how many there are.

    ``prepare`` is applied to the images on the device; otherwise as :func:`validate`.
    """
    was_training = model.training
    model.eval()
    correct, seen = torch.zeros((), dtype=torch.int64, device=device), 0
    for batch in loader:
        if not isinstance(batch, (tuple, list)):
            raise TypeError(f"expected batches (images, ..., labels), the loader gives a {type(batch).__name__}")
        images, labels = batch[0].to(device, non_blocking=True), batch[-1].to(device, non_blocking=True)
        correct += (output_of(model, prepare(images)).argmax(1) == labels).sum()
        seen += labels.shape[0]
    model.train(was_training)
    return correct, seen


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _kept_fractions(terms: dict[str, Tensor], samples: int, classes: int, complete: bool) -> dict[str, Tensor]:
    fractions = {}
    for name, n in (("kept_inter_sample", samples), ("kept_inter_class", classes)):
        vertices = 2 * n if complete else n
        fractions[name] = terms[name] / max(1, edge_count(vertices, vertices, complete))
    return {**terms, **fractions}


class Means:
    """Sample-weighted means of scalars that stay on their device until they are read."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, scalars: dict[str, Tensor], samples: int) -> Tensor:
        """Count these scalars for so many samples; the scalars in one float64 tensor."""
        self.names = list(scalars)
        values = torch.stack([x.detach().double() for x in scalars.values()])
        self.total = values * samples if self.total is None else self.total + values * samples
        self.samples += samples
        return values

    def state(self) -> dict[str, Any]:
        """What :meth:`of` makes the same sums of."""
        return {"names": self.names, "total": self.total, "samples": self.samples}

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device, *, empty: bool = False) -> "Means":
        """The sums of a :meth:`state`; ``empty`` gives zeros in their place."""
        means = cls()
        if state["total"] is not None:
            means.names, total = list(state["names"]), state["total"].to(device)
            means.total = torch.zeros_like(total) if empty else total
            means.samples = 0 if empty else state["samples"]
        return means

    def read(self) -> dict[str, float]:
        if self.total is None:
            raise ValueError("the loader gave no batch: is the batch size larger than the dataset, with drop_last?")
        return dict(zip(self.names, (self.total / self.samples).tolist(), strict=True))
