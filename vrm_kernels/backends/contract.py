"""What a backend computes: arguments and results by name, in one order everywhere.

A backend subclasses :class:`Backend` and gives ``relation_graph`` and ``relation_share``; the whole loss is then
composed of the first and torch's cross-entropy. One that fuses more overrides ``vrm_loss``.

Inputs have any strides and any of ``DTYPES``, mixed. Everything is computed, and results come, in the *compute dtype*:
float64 if any input is, else float32. A gradient is that of the loss, which is a scalar: autograd only scales it. Where
``need_grad`` is false gradients are empty, ``[0]``. A number in any of the vectors that is not finite, or is beyond
:data:`vrm_kernels.graph.constants.LARGEST`, or one in ``probs`` that is not finite, makes the loss and the gradients
NaN, and the kept counts 0. No method reads a device.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.backends.cross_entropy import mean_cross_entropy
from vrm_kernels.graph import pruning, selection
from vrm_kernels.graph.constants import LARGEST

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Views(NamedTuple):
    """Logits ``[B, C]`` each."""

    student_real: Tensor
    student_virtual: Tensor
    teacher_real: Tensor
    teacher_virtual: Tensor


class LossSettings(NamedTuple):
    alpha: float  # weight of the inter-sample graph
    beta: float  # weight of the inter-class graph
    ce_real: bool  # whether the cross-entropy of the real view counts
    ce_virtual: bool
    percentile: float  # edges of at most this percentile of joint entropy are kept; 100: all of them
    delta: float  # Huber's, on a component of a difference of relations
    eps: float  # added to the length that a relation is divided by
    complete: bool  # whether both views are one vertex set: edge (i, i) then does not exist
    label_smoothing: float
    ignore_index: int  # label of samples without cross-entropy


class LossResult(NamedTuple):
    loss: Tensor  # []
    grad_real: Tensor  # [B, C], of the student's views
    grad_virtual: Tensor
    terms: Tensor  # [4], unweighted: ce_real, ce_virtual, inter_sample, inter_class; a cross-entropy that is off is 0
    kept: Tensor  # [2] int64: edges of inter_sample, inter_class that passed the pruning


class Sides(NamedTuple):
    """The vertices of one graph: the student's ``a [M, D]``, ``b [N, D]`` and the teacher's."""

    a: Tensor
    b: Tensor
    teacher_a: Tensor
    teacher_b: Tensor


class GraphSettings(NamedTuple):
    percentile: float
    delta: float
    eps: float
    exclude_self: bool  # both sides are one vertex set, whose M edges (i, i) do not exist


class GraphResult(NamedTuple):
    loss: Tensor  # []
    grad_a: Tensor  # [M, D]
    grad_b: Tensor  # [N, D]
    kept: Tensor  # [] int64


class ShareSettings(NamedTuple):
    """What a process knows of the whole graph, beside its share of the edges."""

    threshold: Tensor  # [], compute dtype: of the joint entropies
    kept: Tensor  # [] int64
    edges: int
    weight: float  # of the gradients
    delta: float
    eps: float
    exclude_self: bool


Probs = tuple[Tensor, Tensor]  # (P [M, K], P' [N, K]): rank the edges


class Backend(ABC):
    """One implementation of the loss. It has no state: one object serves every call of every thread."""

    recomputes_entropy = False
    """Whether relation_share takes ``probs`` in the place of entropies: entropy_of_logs then gives the same bits for
    any block of rows."""

    carries_tangents = False
    """Whether forward-mode derivatives pass through the loss."""

    @abstractmethod
    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        """The loss of one graph. Without ``probs`` every edge is kept; at percentile 100 there are none."""

    def vrm_loss(
        self,
        views: Views,
        labels: Tensor | None,
        class_weight: Tensor | None,
        settings: LossSettings,
        need_grad: bool,
    ) -> LossResult:
        """The whole loss.

        Args:
            labels: ``[B]`` int64 class indices or ``[B, C]`` class probabilities of the compute dtype; ``None`` where
                neither cross-entropy is on. An index outside of [0, C) that is not ``ignore_index`` is an IndexError on
                the CPU; on a device, which is not read, a NaN or torch's own assertion.
            class_weight: ``[C]``, compute dtype.
        """
        dtype = compute_dtype(*views)
        graph = GraphSettings(settings.percentile, settings.delta, settings.eps, settings.complete)
        results = []
        for sides, probs in both_graphs(Views(*(x.to(dtype) for x in views)), settings.complete):
            ranked = probs if settings.percentile < 100 else None
            results.append(self.relation_graph(sides, ranked, graph, need_grad))
        samples, classes = results
        real, virtual = (views.student_real.new_empty(0, dtype=dtype) for _ in range(2))
        if need_grad:
            weighted = zip(_by_view(samples, settings), _by_view(classes, settings), strict=True)
            real, virtual = (settings.alpha * x + settings.beta * y.t() for x, y in weighted)
        terms = torch.stack((samples.loss, classes.loss))
        loss = settings.alpha * samples.loss + settings.beta * classes.loss
        relations = LossResult(loss, real, virtual, terms, torch.stack((samples.kept, classes.kept)))
        return with_cross_entropies(relations, views, labels, class_weight, settings, need_grad)

    # ---- for process groups: see vrm_kernels.distributed.loss --------------------------------------------------------

    def entropy_of_logs(self, probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
        """Joint entropies ``[m, N]`` from ``P [m, K]`` and ``log(P' + 1e-7) [N, K]``, to be given to the next two."""
        return pruning.entropy_of_logs(probs_a, log_probs_b)

    def count_digits(self, entropy: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        """As :func:`vrm_kernels.graph.selection.count_digits`, behind two prefixes."""
        return selection.count_digits(entropy, prefixes, shift, bits)

    def split(self, entropy: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """As :func:`vrm_kernels.graph.selection.split`; asked for on the CPU alone, because its sizes follow from the
        numbers."""
        return selection.split(entropy, low, high)

    @abstractmethod
    def relation_share(
        self,
        sides: Sides,
        probs: Probs | None,
        entropy: Tensor | None,
        settings: ShareSettings,
        grads: Sequence[Tensor],
    ) -> Tensor:
        """The part ``[]`` of a graph's loss that a share of its edges has: their sum, over the whole graph's ``kept``.

        Args:
            sides: of one dtype, float32 or float64.
            probs: ``(P, log(P' + 1e-7))`` if entropies are to be computed again: see ``recomputes_entropy``.
            entropy: ``[M, N]``, infinite where an edge does not exist. Where it and ``probs`` are ``None`` every edge
                is kept, but for the edges (i, i) with ``exclude_self``.
            grads: ``weight`` times the gradients of ``a`` and ``b`` is added to these, of any strides; or none.
        """


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: half precision is read, never accumulated in."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        return torch.float64
    return torch.float32


def float32_products() -> str:
    """How torch multiplies float32 on a GPU: "highest", "high" or "medium", as ``torch.get_float32_matmul_precision()``
    has it. torch's newer switch, ``torch.backends.cuda.matmul.fp32_precision``, goes before it: set to "ieee" it
    overrules the older one, and beside "tf32" that may refuse to answer."""
    if torch.backends.cuda.matmul.fp32_precision == "ieee":
        return "highest"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high"


def all_sound(sides: Sides, probs: Probs | None) -> Tensor:
    """``[]`` bool: whether the loss is a number."""
    limit = LARGEST[sides.a.dtype]
    checks = [(x.abs() <= limit).all() for x in sides] + [x.isfinite().all() for x in probs or ()]
    return torch.stack(checks).all()


def both_graphs(views: Views, complete: bool) -> Iterator[tuple[Sides, Probs]]:
    """The inter-sample and the inter-class graph: vertices and what ranks the edges of each."""
    probs = views.student_real.detach().softmax(1), views.student_virtual.detach().softmax(1)
    for transpose in (False, True):
        a, b, ta, tb = (x.t() if transpose else x for x in views)
        p, q = (x.t() if transpose else x for x in probs)
        if complete:  # one vertex set on both sides
            a, ta, p = torch.cat((a, b)), torch.cat((ta, tb)), torch.cat((p, q))
            b, tb, q = a, ta, p
        yield Sides(a, b, ta, tb), (p, q)


def graph_sizes(views: Views, complete: bool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """``(m, n, dims)`` of the inter-sample and the inter-class graph: vertices of either side, and their components."""
    b, c = views.student_real.shape
    sides = 2 if complete else 1
    return (sides * b, sides * b, c), (sides * c, sides * c, b)


def threshold_ranks(views: Views, settings: LossSettings) -> tuple[tuple[int, int], tuple[float, float]]:
    """:func:`vrm_kernels.graph.pruning.threshold_rank` of both graphs: the two ranks, the two weights."""
    dtype = compute_dtype(*views)
    (rank_0, weight_0), (rank_1, weight_1) = (
        pruning.threshold_rank(settings.percentile, m, n, settings.complete, dtype)
        for m, n, _ in graph_sizes(views, settings.complete)
    )
    return (rank_0, rank_1), (weight_0, weight_1)


def _by_view(result: GraphResult, settings: LossSettings) -> tuple[Tensor, Tensor]:
    if not settings.complete:
        return result.grad_a, result.grad_b
    # The vertex set stood on both sides: add the sides, then cut it into its two views.
    first, second = (result.grad_a + result.grad_b).chunk(2)
    return first, second


def with_cross_entropies(
    relations: LossResult,
    views: Views,
    labels: Tensor | None,
    class_weight: Tensor | None,
    settings: LossSettings,
    need_grad: bool,
) -> LossResult:
    """The whole loss from the relations' part of it, whose terms are ``[2]``; its gradients are added to in place."""
    loss, grads = relations.loss, (relations.grad_real, relations.grad_virtual)
    off = torch.zeros_like(loss)
    terms = []
    how = settings.label_smoothing, settings.ignore_index, need_grad
    for x, wanted, grad in zip(views[:2], (settings.ce_real, settings.ce_virtual), grads, strict=True):
        if not wanted or labels is None:
            terms.append(off)
            continue
        term, part = mean_cross_entropy(x.to(loss.dtype), labels, class_weight, *how)
        if need_grad:
            grad.add_(part)
        loss = loss + term
        terms.append(term)
    return LossResult(loss, *grads, torch.cat((torch.stack(terms), relations.terms)), relations.kept)


def empty_loss_result(views: Views, need_grad: bool) -> LossResult:
    """A result of the right shapes: what a compiler needs to know of an operator."""
    x, dtype = views.student_real, compute_dtype(*views)
    real, virtual = (x.new_empty(y.shape if need_grad else (0,), dtype=dtype) for y in views[:2])
    kept = x.new_empty((2,), dtype=torch.int64)
    return LossResult(x.new_empty((), dtype=dtype), real, virtual, x.new_empty((4,), dtype=dtype), kept)


def empty_graph_result(sides: Sides, need_grad: bool) -> GraphResult:
    """As :func:`empty_loss_result`."""
    x, dtype = sides.a, compute_dtype(*sides)
    a, b = (x.new_empty(y.shape if need_grad else (0,), dtype=dtype) for y in sides[:2])
    return GraphResult(x.new_empty((), dtype=dtype), a, b, x.new_empty((), dtype=torch.int64))
