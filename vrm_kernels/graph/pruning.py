"""Which edges of a relation graph count: the joint entropy and the threshold, in PyTorch. Compiled backends give the
same threshold of their entropies, to the bit."""

import ctypes
import functools
import math

import torch

from vrm_kernels.graph.constants import ENTROPY_EPS

# torch.quantile rounds q to the dtype of its input and multiplies it by n - 1 in float64. Before torch 2.14 it rounds
# the product to float32 as well, and refuses more elements than this.
ROUNDED_UP_TO = 2**24 if torch.__version__ < "2.14" else 0  # compared as versions


@functools.lru_cache(maxsize=1024)
def rank(q: float, n: int, dtype: torch.dtype) -> tuple[int, float]:
    """Where the q-quantile of ``n`` sorted values lies: ``(below, weight)``. The value is
    ``lerp(sorted[below], sorted[below + 1 if weight > 0 else below], weight)``. As in torch.quantile, a rank that is
    whole does not look at the next value, which may be infinite.

    The double product of two 24-bit significands is exact, so that rounding it is what float32 arithmetic gives.
    """
    if dtype == torch.float32:
        q = ctypes.c_float(q).value
    position = q * (n - 1)
    if _is_rounded(n, dtype):
        position = ctypes.c_float(position).value
    below = min(math.floor(position), n - 1)
    return below, position - below


def _is_rounded(n: int, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and n <= ROUNDED_UP_TO


def edge_count(m: int, n: int, exclude_self: bool) -> int:
    """How many edges an ``m x n`` graph ranks; ``exclude_self`` leaves out the ``m`` edges of a vertex with itself."""
    return m * n - (m if exclude_self else 0)


def threshold_rank(percentile: float, m: int, n: int, exclude_self: bool, dtype: torch.dtype) -> tuple[int, float]:
    """:func:`rank` of the threshold among the entropies of an ``m x n`` graph."""
    return rank(percentile / 100, edge_count(m, n, exclude_self), dtype)


def log_probs(probs: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """``log(P' + 1e-7)``, the second factor of the joint entropy; with ``inplace`` it overwrites ``probs``."""
    return (probs.add_(ENTROPY_EPS) if inplace else probs + ENTROPY_EPS).log_()


def joint_entropy(probs_a: torch.Tensor, probs_b: torch.Tensor) -> torch.Tensor:
    """``H[i, j] = -sum_k P[i, k] log(P'[j, k] + 1e-7)`` for ``[M, K]`` and ``[N, K]``: ``[M, N]``."""
    return entropy_of_logs(probs_a, log_probs(probs_b))


def entropy_of_logs(probs_a: torch.Tensor, log_probs_b: torch.Tensor) -> torch.Tensor:
    """:func:`joint_entropy` of ``P`` and of :func:`log_probs` of ``P'``."""
    return (probs_a @ log_probs_b.t()).neg_()


def ranks(q: float | torch.Tensor, n: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rank` as tensors ``(below int64, weight)`` on the device of ``x``; ``q`` may itself be a tensor."""
    rounded = _is_rounded(n, x.dtype)
    if n > 0 and not (rounded or isinstance(q, torch.Tensor) or torch.compiler.is_compiling()):
        whole, rest = rank(q, n, x.dtype)  # on the host: not every device has float64
        return x.new_full((), whole, dtype=torch.int64), x.new_full((), rest)
    q = q.detach().to(x.dtype) if isinstance(q, torch.Tensor) else torch.full((), q, dtype=x.dtype, device=x.device)
    position = (q if rounded else q.double()) * (n - 1)
    # A q outside [0, 1] is only known on the device: NaN, not an index out of bounds.
    position = torch.where((position >= 0) & (position <= n - 1), position, torch.nan)
    below = position.nan_to_num(0.0).floor().long()
    return below, (position - below).to(x.dtype)


def quantile_sorted(x: torch.Tensor, q: float | torch.Tensor, n: int | None = None) -> torch.Tensor:
    """Exact q-quantile of the ``n`` smallest elements (default: all) of 1-D ``x``, by sorting; NaN if any is NaN."""
    n = x.numel() if n is None else n
    below, weight = ranks(q, n, x)
    ordered = x.sort().values
    # gather, not indexing: a 0-D index would be read by the host
    low, high = (ordered.gather(0, k.reshape(-1)).reshape(k.shape) for k in (below, below + (weight > 0)))
    return torch.where(ordered[-1].isnan(), torch.nan, low.lerp(high, weight))
