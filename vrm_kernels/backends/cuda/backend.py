"""The `cuda` backend: the kernels of ``csrc/cuda``, loss and both gradients queued on the current stream."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import vrm_kernels._cuda  # noqa: F401  registers the operators
from vrm_kernels.backends.contract import (
    Backend,
    GraphResult,
    GraphSettings,
    LossResult,
    LossSettings,
    Probs,
    ShareSettings,
    Sides,
    Views,
    compute_dtype,
    empty_graph_result,
    empty_loss_result,
    float32_products,
    graph_sizes,
    threshold_ranks,
    with_cross_entropies,
)
from vrm_kernels.graph import forms, pruning

_cuda = torch.ops.vrm_kernels
# Components of bfloat16 logits from which the roundings of single float16 operands average out: the loss is then within
# 1e-5, and the gradient ten times nearer than its own rounding to bfloat16. That to float16 is finer.
AVERAGING_COMPONENTS = 2**16
STAGED = ("staged", "literal", "dense")


class Tuning(NamedTuple):
    """How graphs are computed, see docs/cuda.md; changes speed and memory, and results by rounding only.

    ``form``: "auto" takes one of "one_launch", "launches" and "tiles", which a device has seen right, by sizes;
    "staged" takes "literal" or "dense" by :mod:`vrm_kernels.graph.forms`. Each may be named.
    """

    form: str = "auto"
    tile_edge: int = 2048  # vertices of a side of a tile of a large graph
    stored_entropy_bytes: int = 256 << 20  # of one graph; beyond, entropies are recomputed


TUNING = Tuning()


def _staged(vectors: Sequence[Tensor], graphs: Sequence[tuple[int, int, int]], percentile: float) -> tuple | None:
    """What the operators of the forms "literal" and "dense" are told; None: another form is asked for."""
    if TUNING.form not in STAGED:
        return None
    form = forms.form(graphs, percentile) if TUNING.form == "staged" else TUNING.form
    dense = form == "dense"
    return dense, _float16_level(vectors) if dense else 0, *TUNING[1:], *(_brackets(m * n) for m, n, _ in graphs)


def _brackets(edges: int) -> list[int]:
    """The sample, the reach and the room of each bracket of a selection, one after the other."""
    found = []
    for _ in range(forms.levels(edges)):
        found += [forms.sample(edges), forms.reach(edges), forms.room(edges)]
        edges = forms.room(edges)
    return found


def _float16_level(vectors: Sequence[Tensor]) -> int:
    """What operands of products are, csrc/cuda/forms.h: 0: as computed; 1: float16, sums of two for the entropies;
    2: sums of two for the edges as well; 3: and for the gradient."""
    dtypes = {x.dtype for x in vectors}
    if torch.float64 in dtypes or torch.backends.cuda.matmul.allow_fp16_accumulation:  # sums in float16 are too short
        return 0
    if torch.float32 in dtypes:
        return {"highest": 0, "high": 3, "medium": 1}[float32_products()]
    return 1 if dtypes == {torch.bfloat16} and vectors[0].numel() >= AVERAGING_COMPONENTS else 2


class CudaBackend(Backend):
    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        percentile, delta, eps, exclude_self = settings
        (m, dims), n = sides.a.shape, len(sides.b)
        rank, weight = pruning.threshold_rank(percentile, m, n, exclude_self, compute_dtype(*sides))
        p, q = (None, None) if probs is None else probs
        vectors, numbers = (*sides, p, q), (rank, weight, delta, eps, exclude_self, need_grad)
        if staged := _staged(sides, [(m, n, dims)], 100 if probs is None else percentile):
            return GraphResult(*_cuda.cuda_relation_loss(*vectors, None, None, None, *numbers, *staged))
        return GraphResult(*_cuda.cuda_relation_graph(*vectors, *numbers, *TUNING[:3]))

    def vrm_loss(
        self,
        views: Views,
        labels: Tensor | None,
        class_weight: Tensor | None,
        settings: LossSettings,
        need_grad: bool,
    ) -> LossResult:
        alpha, beta, ce_real, ce_virtual, percentile, delta, eps, complete, label_smoothing, ignore_index = settings
        ranks, weights = threshold_ranks(views, settings)
        if staged := _staged(views, graph_sizes(views, complete), percentile):
            return LossResult(
                *_cuda.cuda_vrm_loss(
                    *views, labels, class_weight, alpha, beta, ce_real, ce_virtual, ranks, weights, percentile == 100,
                    delta, eps, complete, label_smoothing, ignore_index, need_grad, *staged,
                )
            )  # fmt: skip
        relations = LossResult(
            *_cuda.cuda_vrm_graphs(
                *views, alpha, beta, ranks, weights, percentile == 100, delta, eps, complete, need_grad, *TUNING[:3]
            )
        )
        return with_cross_entropies(relations, views, labels, class_weight, settings, need_grad)

    def count_digits(self, entropy: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        count = _cuda.cuda_digits if TUNING.form in STAGED else _cuda.cuda_count_digits
        return count(entropy, prefixes, shift, bits)

    def relation_share(
        self,
        sides: Sides,
        probs: Probs | None,
        entropy: Tensor | None,
        settings: ShareSettings,
        grads: Sequence[Tensor],
    ) -> Tensor:
        threshold, kept, _, weight, delta, eps, exclude_self = settings
        (m, dims), n = sides.a.shape, len(sides.b)
        if staged := _staged(sides, [(m, n, dims)], 100):  # how many of its edges are kept is not known
            numbers = 0, 0.0, delta, eps, exclude_self, bool(grads)
            loss, *parts, _ = _cuda.cuda_relation_loss(
                *sides, None, None, entropy, threshold, kept, *numbers, *staged[:-1], []
            )
            for grad, part in zip(grads, parts, strict=False):
                grad.add_(part, alpha=weight)
            return loss
        grad_a, grad_b = grads or (sides.a.new_empty(0), sides.a.new_empty(0))
        return _cuda.cuda_relation_share(
            *sides, entropy, grad_a, grad_b, threshold, kept, weight, delta, eps, exclude_self,
            bool(grads), TUNING.tile_edge,
        )  # fmt: skip


@torch.library.register_fake("vrm_kernels::cuda_relation_graph")
def _(a, b, teacher_a, teacher_b, probs_a, probs_b, rank, lerp_weight, delta, eps, exclude_self, need_grad, *tuning):
    return tuple(empty_graph_result(Sides(a, b, teacher_a, teacher_b), need_grad))


@torch.library.register_fake("vrm_kernels::cuda_relation_loss")
def _(
    a, b, teacher_a, teacher_b, probs_a, probs_b, entropy, threshold, kept, rank, lerp_weight, delta, eps, exclude_self,
    need_grad, *tuning,
):  # fmt: skip
    return tuple(empty_graph_result(Sides(a, b, teacher_a, teacher_b), need_grad))


@torch.library.register_fake("vrm_kernels::cuda_vrm_loss")
def _(
    s, v, t, u, labels, class_weight, alpha, beta, ce_real, ce_virtual, ranks, lerp_weights, keep_all, delta, eps,
    complete, label_smoothing, ignore_index, need_grad, *tuning,
):  # fmt: skip
    return tuple(empty_loss_result(Views(s, v, t, u), need_grad))


@torch.library.register_fake("vrm_kernels::cuda_vrm_graphs")
def _(s, v, t, u, alpha, beta, ranks, lerp_weights, keep_all, delta, eps, complete, need_grad, *tuning):
    result = empty_loss_result(Views(s, v, t, u), need_grad)
    return *result[:3], result.terms[:2].clone(), result.kept


@torch.library.register_fake("vrm_kernels::cuda_count_digits")
@torch.library.register_fake("vrm_kernels::cuda_digits")
def _(x, prefixes, shift, bits):
    return prefixes.new_empty(len(prefixes), 2**bits)


@torch.library.register_fake("vrm_kernels::cuda_relation_share")
def _(a, b, teacher_a, teacher_b, entropy, grad_a, grad_b, *settings):
    return a.new_empty(())
