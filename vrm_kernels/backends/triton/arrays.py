"""What the stages hand to each other: one structure of arrays, and where the vertices of a graph lie in them.

Graph 0 is the one over rows of logits, graph 1 that over columns. Its vertices are those of both sides, a vertex a row:
row ``v`` of graph 0 is row ``v`` of the stacked views, of graph 1 column ``v % C`` of view ``v // C``. Rows are padded
with zeros to a multiple of 16, so that they can be read in wide words. Arrays of both graphs hold graph 0 first.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vrm_kernels.backends.triton.edge import wide

PADDING = tl.constexpr(16)
# The sizes of a call: a kernel is not compiled again for another batch.
SIZES = ("rows_a", "rows_b", "classes")


class Arrays(NamedTuple):
    """``V`` vertices of ``W`` padded components, of each graph; ``R`` rows of logits in the longer view, padded."""

    vertices: Tensor  # [2, V, W]: student, teacher, in the logits' dtype
    probs: Tensor  # [m, W], of side a
    surprisals: Tensor  # [n, W]: -log(P + 1e-7), of side b
    finite: Tensor  # [4, R] int32: whether a row of logits is finite
    cross_entropy: Tensor  # [2, 2, R]: of each row of a view its cross-entropy, and what it counts in the mean
    entropies: Tensor  # [m, n], or a block of rows; of the edge of a vertex with itself NaN
    brackets: Tensor  # [levels, 2, 8] int64, see select.py
    samples: Tensor  # of each graph's bracket
    collected: Tensor  # what lies in the brackets
    thresholds: Tensor  # [2]
    kept: Tensor  # [2] int64
    missed: Tensor  # [2] int32: whether a bracket missed the rank, where not all entropies are stored
    lists: Tensor  # [2 m n] int32: the vertices at the other end of a vertex' edges; of a block of rows of edges
    losses: Tensor  # [V], of side a
    flags: Tensor  # [tiles down, tiles across] int32, of a block in the dense form: whether a tile has literal edges
    tile_losses: Tensor  # of the same tiles
    partial: Tensor  # [V, W]: the graph's gradient, weighted; where probabilities and surprisals were
    summary: Tensor  # [4]: cross-entropies of both views, 1 / their divisor, NaN if anything was not finite, else 0
    grad_a: Tensor  # [rows_a, C]: of the cross-entropies' sums, then of the loss
    grad_b: Tensor  # [rows_b, C]
    loss: Tensor  # []
    terms: Tensor  # [4]


@triton.jit
def padded(n):
    return (n + PADDING - 1) // PADDING * PADDING


@triton.jit
def sizes_of(graph, rows_a, rows_b, classes, COMPLETE: tl.constexpr):
    """``(m, n, first_b, vertices, width)`` of a graph: edge ``(i, j)`` is vertex ``i`` with vertex ``first_b + j``."""
    a, b = tl.where(graph == 0, rows_a, classes), tl.where(graph == 0, rows_b, classes)
    width = padded(tl.where(graph == 0, classes, rows_a))
    if COMPLETE:
        m, n, first_b = a + b, a + b, 0 * a
    else:
        m, n, first_b = a, b, a
    return m, n, first_b, a + b, tl.multiple_of(width, PADDING)


@triton.jit
def matrix_size(rows_a, rows_b, classes):
    """Elements of graph 0's ``[V, W]``."""
    return wide(rows_a + rows_b) * padded(classes)
