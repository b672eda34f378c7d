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
    threshold_ranks,
    with_cross_entropies,
)
from vrm_kernels.graph import pruning, selection

_cuda = torch.ops.vrm_kernels
MOST_BITS = 11  # of a digit; csrc/cuda/graph.h


class Tuning(NamedTuple):
    """How graphs are computed, see docs/cuda.md; changes speed and memory, and results by rounding only."""

    form: str = "auto"  # by sizes; or "one_launch", "launches", "tiles"
    tile_edge: int = 2048  # vertices of a side of a tile of a large graph
    stored_entropy_bytes: int = 256 << 20  # of one graph; beyond, entropies are recomputed


TUNING = Tuning()


class CudaBackend(Backend):
    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        percentile, delta, _, exclude_self = settings
        dtype = compute_dtype(*sides)
        rank, weight = pruning.threshold_rank(percentile, len(sides.a), len(sides.b), exclude_self, dtype)
        p, q = (None, None) if probs is None else probs
        return GraphResult(
            *_cuda.cuda_relation_graph(*sides, p, q, rank, weight, delta, exclude_self, need_grad, *TUNING)
        )

    def vrm_loss(
        self,
        views: Views,
        labels: Tensor | None,
        class_weight: Tensor | None,
        settings: LossSettings,
        need_grad: bool,
    ) -> LossResult:
        ranks, weights = threshold_ranks(views, settings)
        relations = LossResult(
            *_cuda.cuda_vrm_graphs(
                *views, settings.alpha, settings.beta, ranks, weights, settings.percentile == 100, settings.delta,
                settings.complete, need_grad, *TUNING,
            )
        )  # fmt: skip
        return with_cross_entropies(relations, views, labels, class_weight, settings, need_grad)

    def count_digits(self, entropy: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        if bits > MOST_BITS or len(prefixes) != 2:  # asked for on the CPU alone
            return selection.count_digits(entropy, prefixes, shift, bits)
        return _cuda.cuda_count_digits(entropy, prefixes, shift, bits)

    def relation_share(
        self,
        sides: Sides,
        probs: Probs | None,
        entropy: Tensor | None,
        settings: ShareSettings,
        grads: Sequence[Tensor],
    ) -> Tensor:
        threshold, kept, _, weight, delta, _, exclude_self = settings
        grad_a, grad_b = grads or (sides.a.new_empty(0), sides.a.new_empty(0))
        return _cuda.cuda_relation_share(
            *sides, entropy, grad_a, grad_b, threshold, kept, weight, delta, exclude_self, bool(grads),
            TUNING.tile_edge,
        )  # fmt: skip


@torch.library.register_fake("vrm_kernels::cuda_relation_graph")
def _(a, b, teacher_a, teacher_b, probs_a, probs_b, rank, lerp_weight, delta, exclude_self, need_grad, *tuning):
    return tuple(empty_graph_result(Sides(a, b, teacher_a, teacher_b), need_grad))


@torch.library.register_fake("vrm_kernels::cuda_vrm_graphs")
def _(s, v, t, u, alpha, beta, ranks, lerp_weights, keep_all, delta, complete, need_grad, *tuning):
    result = empty_loss_result(Views(s, v, t, u), need_grad)
    return *result[:3], result.terms[:2].clone(), result.kept


@torch.library.register_fake("vrm_kernels::cuda_count_digits")
def _(x, prefixes, shift, bits):
    return prefixes.new_empty(len(prefixes), 2**bits)


@torch.library.register_fake("vrm_kernels::cuda_relation_share")
def _(a, b, teacher_a, teacher_b, entropy, grad_a, grad_b, *settings):
    return a.new_empty(())
