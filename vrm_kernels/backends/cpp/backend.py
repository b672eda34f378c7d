"""The `cpp` backend: the fused C++ kernels of ``csrc/cpu``, loss and both gradients in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

import vrm_kernels._C  # noqa: F401  registers the operators
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
)
from vrm_kernels.graph import pruning

_cpu = torch.ops.vrm_kernels
ENTROPY_PAD = 64  # csrc/cpu/relation_graph.h: whole panels are written


class CppBackend(Backend):
    recomputes_entropy = True

    def relation_graph(
        self, sides: Sides, probs: Probs | None, settings: GraphSettings, need_grad: bool
    ) -> GraphResult:
        percentile, delta, eps, exclude_self = settings
        dtype = compute_dtype(*sides)
        rank, weight = pruning.threshold_rank(percentile, len(sides.a), len(sides.b), exclude_self, dtype)
        p, q = (None, None) if probs is None else probs
        settled = rank, weight, delta, eps, exclude_self, need_grad
        return GraphResult(*_cpu.cpu_relation_graph.default(*sides, p, q, *settled))

    def vrm_loss(
        self,
        views: Views,
        labels: Tensor | None,
        class_weight: Tensor | None,
        settings: LossSettings,
        need_grad: bool,
    ) -> LossResult:
        ranks, weights = threshold_ranks(views, settings)
        alpha, beta, ce_real, ce_virtual, percentile, delta, eps, complete, smoothing, ignored = settings
        return LossResult(
            *_cpu.cpu_vrm_loss.default(
                *views, labels, class_weight, alpha, beta, ce_real, ce_virtual, ranks, weights,
                percentile == 100, delta, eps, complete, smoothing, ignored, need_grad,
            )
        )  # fmt: skip

    def entropy_of_logs(self, probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
        return _cpu.cpu_joint_entropy.default(probs_a, log_probs_b)

    def count_digits(self, entropy: Tensor, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        return _cpu.cpu_count_digits.default(entropy, prefixes, shift, bits)

    def split(self, entropy: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        return _cpu.cpu_split.default(entropy, low, high)

    def relation_share(
        self,
        sides: Sides,
        probs: Probs | None,
        entropy: Tensor | None,
        settings: ShareSettings,
        grads: Sequence[Tensor],
    ) -> Tensor:
        threshold, kept, edges, weight, delta, eps, exclude_self = settings
        p, q = (None, None) if probs is None else probs
        grad_a, grad_b = grads or (sides.a.new_empty(0), sides.a.new_empty(0))
        return _cpu.cpu_relation_share.default(
            *sides, p, q, entropy, grad_a, grad_b, float(threshold), int(kept), edges, weight, delta, eps, exclude_self,
            bool(grads),
        )  # fmt: skip


def quantile(x, below, weight):
    return _cpu.cpu_quantile.default(x, below, weight)


@torch.library.register_fake("vrm_kernels::cpu_relation_graph")
def _(a, b, teacher_a, teacher_b, probs_a, probs_b, rank, lerp_weight, delta, eps, exclude_self, need_grad):
    return tuple(empty_graph_result(Sides(a, b, teacher_a, teacher_b), need_grad))


@torch.library.register_fake("vrm_kernels::cpu_vrm_loss")
def _(student_real, student_virtual, teacher_real, teacher_virtual, labels, class_weight, *settings):
    views = Views(student_real, student_virtual, teacher_real, teacher_virtual)
    return tuple(empty_loss_result(views, need_grad=settings[-1]))


@torch.library.register_fake("vrm_kernels::cpu_joint_entropy")
def _(probs_a, log_probs_b):
    rows, columns = len(probs_a), len(log_probs_b)
    dtype = compute_dtype(probs_a, log_probs_b)
    padded = probs_a.new_empty(rows + ENTROPY_PAD, -(-columns // ENTROPY_PAD) * ENTROPY_PAD, dtype=dtype)
    return padded[:rows, :columns]


@torch.library.register_fake("vrm_kernels::cpu_count_digits")
def _(x, prefixes, shift, bits):
    return prefixes.new_empty(len(prefixes), 2**bits)


@torch.library.register_fake("vrm_kernels::cpu_split")
def _(x, low, high):
    inside = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(3, dtype=torch.int64), x.new_empty(inside)


@torch.library.register_fake("vrm_kernels::cpu_relation_share")
def _(a, b, teacher_a, teacher_b, probs_a, log_probs_b, entropy, grad_a, grad_b, *settings):
    return a.new_empty((), dtype=compute_dtype(a, b, teacher_a, teacher_b))


@torch.library.register_fake("vrm_kernels::cpu_quantile")
def _(x, below, weight):
    return torch.empty_like(weight)
