"""Stage 2: the joint entropy of every edge, in the compute dtype at any setting. See docs/gpu.md."""

import triton
import triton.language as tl

from vrm_kernels.backends.triton.edge import wide
from vrm_kernels.backends.triton.staged.arrays import PADDING, SIZES, sizes_of


@triton.jit(do_not_specialize=[*SIZES, "depth_0", "depth_1"])
def entropy_kernel(
    arrays,
    rows_a, rows_b, classes,
    depth_0, depth_1,  # components of a row of probabilities, padded
    COMPLETE: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program a tile of BLOCK x BLOCK edges, those of graph 0 first."""
    T: tl.constexpr = arrays.entropies.dtype.element_ty
    job = tl.program_id(0)
    m_0, n_0, _, vertices_0, _ = sizes_of(0, rows_a, rows_b, classes, COMPLETE)
    tiles = tl.cdiv(m_0, BLOCK) * tl.cdiv(n_0, BLOCK)
    graph = (job >= tiles).to(tl.int32)
    job -= graph * tiles
    m, n, first_b, _, _ = sizes_of(graph, rows_a, rows_b, classes, COMPLETE)
    depth = tl.multiple_of(tl.where(graph == 0, depth_0, depth_1), PADDING)
    across = tl.cdiv(n, BLOCK)
    i, j = (job // across) * BLOCK + tl.arange(0, BLOCK), (job % across) * BLOCK + tl.arange(0, BLOCK)
    base = graph * wide(vertices_0) * depth_0
    probs = arrays.probs + base + wide(i)[:, None] * depth
    surprisals = arrays.surprisals + base + wide(first_b + j)[None] * depth
    total = tl.zeros([BLOCK, BLOCK], T)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        p = tl.load(probs + k[None], (i < m)[:, None] & (k < depth)[None], 0.0)
        s = tl.load(surprisals + k[:, None], (j < n)[None] & (k < depth)[:, None], 0.0)
        total = tl.dot(p, s, total, input_precision="ieee")
    if EXCLUDE_SELF:  # beyond every other number in order
        total = tl.where(i[:, None] == j[None], float("nan"), total)
    out = arrays.entropies + graph * wide(m_0) * n_0 + wide(i)[:, None] * n + j[None]
    tl.store(out, total, (i < m)[:, None] & (j < n)[None])
