"""Stage 2: the joint entropy of every edge, in the compute dtype at any setting; and what the dense form needs beside
the library's product, where a graph has more edges than are stored. See docs/gpu.md."""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.arrays import PADDING, SIZES, sizes_of
from vrm_kernels.backends.triton.counting import add_digits
from vrm_kernels.backends.triton.edge import wide
from vrm_kernels.backends.triton.select import HASH, to_key


@triton.jit
def _tile(
    left, right, i, j, own, m, n, depth, EXCLUDE_SELF: tl.constexpr, DEPTH: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """The product of rows that begin at ``left [:, None]`` and ``right [None]``; of a vertex with itself NaN."""
    total = tl.zeros([i.shape[0], j.shape[0]], T)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        p = tl.load(left + k[None], (i < m)[:, None] & (k < depth)[None], 0.0)
        s = tl.load(right + k[:, None], (j < n)[None] & (k < depth)[:, None], 0.0)
        total = tl.dot(p, s, total, input_precision="ieee")
    if EXCLUDE_SELF:  # beyond every other number in order
        total = tl.where(own[:, None] == j[None], float("nan"), total)
    return total


@triton.jit(do_not_specialize=[*SIZES, "depth_0", "depth_1"])
def entropy_kernel(
    arrays,
    rows_a, rows_b, classes,
    depth_0, depth_1,  # components of a row of probabilities, padded
    COMPLETE: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program a tile of BLOCK x BLOCK edges, those of graph 0 first."""
    T: tl.constexpr = arrays.loss.dtype.element_ty
    job = tl.program_id(0)
    m_0, n_0, _, _, _ = sizes_of(0, rows_a, rows_b, classes, COMPLETE)
    tiles = tl.cdiv(m_0, BLOCK) * tl.cdiv(n_0, BLOCK)
    graph = (job >= tiles).to(tl.int32)
    job -= graph * tiles
    m, n, _, _, _ = sizes_of(graph, rows_a, rows_b, classes, COMPLETE)
    depth = tl.multiple_of(tl.where(graph == 0, depth_0, depth_1), PADDING)
    across = tl.cdiv(n, BLOCK)
    i, j = (job // across) * BLOCK + tl.arange(0, BLOCK), (job % across) * BLOCK + tl.arange(0, BLOCK)
    probs = arrays.probs + graph * wide(m_0) * depth_0 + wide(i)[:, None] * depth
    surprisals = arrays.surprisals + graph * wide(n_0) * depth_0 + wide(j)[None] * depth
    total = _tile(probs, surprisals, i, j, i, m, n, depth, EXCLUDE_SELF, DEPTH, T)
    out = arrays.entropies + graph * wide(m_0) * n_0 + wide(i)[:, None] * n + j[None]
    tl.store(out, total, (i < m)[:, None] & (j < n)[None])


@triton.jit(do_not_specialize=["sample", "n", "edges", "depth"])
def sample_kernel(
    out,  # [sample]
    left, right,  # operands: [m, depth], [n, depth]
    sample, n, edges, depth,
    EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The entropies of a graph's hashed edges, those that a bracket would read if all were stored."""
    T: tl.constexpr = out.dtype.element_ty
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = k.to(tl.int64) * HASH % edges
    i, j = at // n, at % n
    total = tl.zeros([BLOCK, DEPTH], T)
    for start in range(0, depth, DEPTH):
        d = start + tl.arange(0, DEPTH)
        mask = (k < sample)[:, None] & (d < depth)[None]
        p = tl.load(left + i[:, None] * depth + d[None], mask, 0.0).to(T)
        total += p * tl.load(right + j[:, None] * depth + d[None], mask, 0.0).to(T)
    entropy = tl.sum(total, 1)
    if EXCLUDE_SELF:
        entropy = tl.where(i == j, float("nan"), entropy)
    tl.store(out + k, entropy, k < sample)


@triton.jit(do_not_specialize=["m", "n", "depth", "first_row"])
def missed_kernel(
    arrays,
    left, right,  # operands: [m, depth], [n, depth]
    prefixes, histograms,  # as of counting.digits_kernel; or none
    m, n, depth,
    first_row,  # of the graph
    GRAPH: tl.constexpr, EXCLUDE_SELF: tl.constexpr, LEADING: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Where a bracket missed the rank: entropies computed once more, by a tile of our own. They are counted by digits,
    or take the place of the library's. Else nothing."""
    T: tl.constexpr = arrays.loss.dtype.element_ty
    if tl.load(arrays.missed + GRAPH) > 0:
        across = tl.cdiv(n, BLOCK)
        for tile in range(tl.program_id(0), tl.cdiv(m, BLOCK) * across, tl.num_programs(0)):
            i, j = (tile // across) * BLOCK + tl.arange(0, BLOCK), (tile % across) * BLOCK + tl.arange(0, BLOCK)
            rows, columns = left + wide(i)[:, None] * depth, right + wide(j)[None] * depth
            entropy = _tile(rows, columns, i, j, first_row + i, m, n, depth, EXCLUDE_SELF, DEPTH, T)
            there = (i < m)[:, None] & (j < n)[None]
            if histograms is None:
                tl.store(arrays.entropies + wide(i)[:, None] * n + j[None], entropy, there)
            else:
                add_digits(histograms, to_key(entropy), there, prefixes, LEADING, SHIFT, BITS)
