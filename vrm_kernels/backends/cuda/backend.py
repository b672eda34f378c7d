"""The `cuda` backend: the kernels of ``csrc/cuda``, loss and both gradients queued on the current stream."""

from typing import NamedTuple

import torch

import vrm_kernels._cuda  # noqa: F401  registers the operators
from vrm_kernels import ops
from vrm_kernels.graph import pruning, selection

_cuda = torch.ops.vrm_kernels
MOST_BITS = 11  # of a digit; csrc/cuda/graph.h


class Tuning(NamedTuple):
    """How graphs are computed, see docs/cuda.md; changes speed and memory, and results by rounding only."""

    form: str = "auto"  # by sizes; or "one_launch", "launches", "tiles"
    tile_edge: int = 2048  # vertices of a side of a tile of a large graph
    stored_entropy_bytes: int = 256 << 20  # of one graph; beyond, entropies are recomputed


TUNING = Tuning()


def _threshold_rank(rows, columns, percentile, exclude_self, dtype) -> tuple[int, float]:
    return pruning.rank(percentile / 100, pruning.edge_count(rows, columns, exclude_self), dtype)


def relation_graph(a, b, teacher_a, teacher_b, probs, percentile, delta, exclude_self, need_grad):
    dtype = ops.compute_dtype(a, b, teacher_a, teacher_b)
    rank, weight = _threshold_rank(a.shape[0], b.shape[0], percentile, exclude_self, dtype)
    p, q = (None, None) if probs is None or percentile == 100 else probs
    loss, grad_a, grad_b, kept = _cuda.cuda_relation_graph(
        a, b, teacher_a, teacher_b, p, q, rank, weight, delta, exclude_self, need_grad, *TUNING
    )
    return loss, kept, grad_a, grad_b


def vrm_graphs(s, v, t, u, alpha, beta, percentile, delta, complete, need_grad):
    dtype = ops.compute_dtype(s, v, t, u)
    views = 2 if complete else 1
    ranks, weights = zip(
        *(_threshold_rank(views * n, views * n, percentile, complete, dtype) for n in s.shape), strict=True
    )
    keep_all = percentile == 100
    return _cuda.cuda_vrm_graphs(s, v, t, u, alpha, beta, ranks, weights, keep_all, delta, complete, need_grad, *TUNING)


entropy_of_logs = pruning.entropy_of_logs


def count_digits(x, prefixes, shift, bits):
    if bits > MOST_BITS or len(prefixes) != 2:  # asked for on the CPU alone
        return selection.count_digits(x, prefixes, shift, bits)
    return _cuda.cuda_count_digits(x, prefixes, shift, bits)


def relation_share(
    a, b, teacher_a, teacher_b, probs, entropy, threshold, kept, edges, weight, delta, exclude_self, grads
):
    """The contract is written out in :mod:`vrm_kernels.distributed.loss`."""
    grad_a, grad_b = grads or (a.new_empty(0), a.new_empty(0))
    return _cuda.cuda_relation_share(
        a, b, teacher_a, teacher_b, entropy, grad_a, grad_b, threshold, kept, weight, delta, exclude_self, bool(grads),
        TUNING.tile_edge,
    )  # fmt: skip


@torch.library.register_fake("vrm_kernels::cuda_relation_graph")
def _(a, b, teacher_a, teacher_b, probs_a, probs_b, rank, lerp_weight, delta, exclude_self, need_grad, *tuning):
    return ops.relation_graph_fake(a, b, teacher_a, teacher_b, need_grad)


@torch.library.register_fake("vrm_kernels::cuda_vrm_graphs")
def _(s, v, t, u, alpha, beta, ranks, lerp_weights, keep_all, delta, complete, need_grad, *tuning):
    return ops.vrm_graphs_fake(s, v, t, u, need_grad)


@torch.library.register_fake("vrm_kernels::cuda_count_digits")
def _(x, prefixes, shift, bits):
    return prefixes.new_empty(len(prefixes), 2**bits)


@torch.library.register_fake("vrm_kernels::cuda_relation_share")
def _(a, b, teacher_a, teacher_b, entropy, grad_a, grad_b, *settings):
    return a.new_empty(())
