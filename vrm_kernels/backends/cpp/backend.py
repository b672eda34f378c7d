"""The `cpp` backend: the fused C++ kernels of ``csrc/cpu``, loss and both gradients in one call."""

import torch

import vrm_kernels._C  # noqa: F401  registers the operators
from vrm_kernels import ops
from vrm_kernels.graph import pruning

_cpu = torch.ops.vrm_kernels
ENTROPY_PAD = 64  # csrc/cpu/relation_graph.h: whole panels are written
RECOMPUTES_ENTROPY = True  # entropy_of_logs of a block of rows has the bits of the whole's


def _threshold_rank(rows, columns, percentile, exclude_self, dtype) -> tuple[int, float]:
    return pruning.rank(percentile / 100, pruning.edge_count(rows, columns, exclude_self), dtype)


def relation_graph(a, b, teacher_a, teacher_b, probs, percentile, delta, exclude_self, need_grad):
    dtype = ops.compute_dtype(a, b, teacher_a, teacher_b)
    rank, weight = _threshold_rank(a.shape[0], b.shape[0], percentile, exclude_self, dtype)
    p, q = (None, None) if probs is None or percentile == 100 else probs
    loss, grad_a, grad_b, kept = _cpu.cpu_relation_graph(
        a, b, teacher_a, teacher_b, p, q, rank, weight, delta, exclude_self, need_grad
    )
    return loss, kept, grad_a, grad_b


def vrm_graphs(s, v, t, u, alpha, beta, percentile, delta, complete, need_grad):
    dtype = ops.compute_dtype(s, v, t, u)
    views = 2 if complete else 1
    ranks, weights = zip(
        *(_threshold_rank(views * n, views * n, percentile, complete, dtype) for n in s.shape), strict=True
    )
    keep_all = percentile == 100
    return _cpu.cpu_vrm_graphs(s, v, t, u, alpha, beta, ranks, weights, keep_all, delta, complete, need_grad)


def entropy_of_logs(probs_a, log_probs_b):
    """The same bits for any block of rows: a share too large to be stored is computed again."""
    return _cpu.cpu_joint_entropy(probs_a, log_probs_b)


def count_digits(x, prefixes, shift, bits):
    return _cpu.cpu_count_digits(x, prefixes, shift, bits)


def relation_share(
    a, b, teacher_a, teacher_b, probs, entropy, threshold, kept, edges, weight, delta, exclude_self, grads
):
    """The contract is written out in :mod:`vrm_kernels.distributed.loss`."""
    p, q = (None, None) if probs is None else probs
    need_grad = bool(grads)
    grad_a, grad_b = grads or (a.new_empty(0), a.new_empty(0))
    threshold, kept = float(threshold), int(kept)
    return _cpu.cpu_relation_share(
        a, b, teacher_a, teacher_b, p, q, entropy, grad_a, grad_b, threshold, kept, edges, weight, delta, exclude_self,
        need_grad,
    )  # fmt: skip


def quantile(x, below, weight):
    return _cpu.cpu_quantile(x, below, weight)


@torch.library.register_fake("vrm_kernels::cpu_relation_graph")
def _(a, b, teacher_a, teacher_b, probs_a, probs_b, rank, lerp_weight, delta, exclude_self, need_grad):
    return ops.relation_graph_fake(a, b, teacher_a, teacher_b, need_grad)


@torch.library.register_fake("vrm_kernels::cpu_vrm_graphs")
def _(s, v, t, u, alpha, beta, ranks, lerp_weights, keep_all, delta, complete, need_grad):
    return ops.vrm_graphs_fake(s, v, t, u, need_grad)


@torch.library.register_fake("vrm_kernels::cpu_joint_entropy")
def _(probs_a, log_probs_b):
    rows, columns = len(probs_a), len(log_probs_b)
    dtype = ops.compute_dtype(probs_a, log_probs_b)
    padded = probs_a.new_empty(rows + ENTROPY_PAD, -(-columns // ENTROPY_PAD) * ENTROPY_PAD, dtype=dtype)
    return padded[:rows, :columns]


@torch.library.register_fake("vrm_kernels::cpu_count_digits")
def _(x, prefixes, shift, bits):
    return prefixes.new_empty(len(prefixes), 2**bits)


@torch.library.register_fake("vrm_kernels::cpu_relation_share")
def _(a, b, teacher_a, teacher_b, probs_a, log_probs_b, entropy, grad_a, grad_b, *settings):
    return a.new_empty((), dtype=ops.compute_dtype(a, b, teacher_a, teacher_b))


@torch.library.register_fake("vrm_kernels::cpu_quantile")
def _(x, below, weight):
    return torch.empty_like(weight)
