"""The stages that both regimes share, each a launch or a few: prepare, pack, select, total.

They can be called one by one: a process that computes a share of a graph gives the stages after the selection a
:class:`Selection` of its own, see :mod:`shares`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vrm_kernels.backends.triton import plan
from vrm_kernels.backends.triton.arrays import Logits, Selection, Totals
from vrm_kernels.backends.triton.fused import total_kernel
from vrm_kernels.backends.triton.operands import parts
from vrm_kernels.backends.triton.prepare import pack_kernel, prepare_kernel
from vrm_kernels.backends.triton.select import DIGITS, finish_kernel, histogram_kernel
from vrm_kernels.graph import pruning


@dataclass(frozen=True)
class Graph:
    """One graph: vertex ``i`` of side a with vertex ``first_b + j`` of side b, of the ``vertices`` of both sides."""

    by_class: bool
    m: int
    n: int
    first_b: int
    vertices: int
    dims: int
    whole_edges: int | None = None  # of the whole graph, if this is a share of one

    @property
    def width(self) -> int:
        """Components of an operand, zeros beyond ``dims``."""
        return plan.padded(self.dims, plan.WIDTH_MULTIPLE)


@dataclass(frozen=True)
class Problem:
    """The vectors of one call, and the graphs over them.

    ``sides`` are the student's two sides and the teacher's, ``[rows_a, C]`` and ``[rows_b, C]``. ``samples`` are the
    rows of a view. ``complete`` graphs have all vertices on both sides; ``exclude_self`` leaves edges (i, i) out.
    """

    sides: tuple[Tensor, Tensor, Tensor, Tensor]
    graphs: tuple[Graph, ...]
    weights: tuple[float, ...]
    percentile: float
    delta: float
    eps: float
    complete: bool
    exclude_self: bool
    precision: plan.Precision

    @property
    def rows(self) -> tuple[int, int]:
        return self.sides[0].shape[0], self.sides[1].shape[0]

    @property
    def classes(self) -> int:
        return self.sides[0].shape[1]

    @property
    def samples(self) -> int:
        return self.rows[0]

    @property
    def device(self) -> torch.device:
        return self.sides[0].device

    @property
    def weight_parts(self) -> tuple[tuple[float, float], ...]:
        """Of two graphs, as kernels take numbers."""
        return parts(self.weights[0]), parts(self.weights[-1])

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.precision.compute, device=self.device)

    def edge_count(self, graph: Graph) -> int:
        if graph.whole_edges is not None:
            return graph.whole_edges
        return pruning.edge_count(graph.m, graph.n, self.exclude_self)


@dataclass(frozen=True)
class Prepared:
    """The logits of both views stacked, and what the stages after need of them."""

    logits: Logits
    probs: Tensor | None  # [rows_a + rows_b, C], or of side a [M, K]
    surprisals: Tensor | None  # -log(P + 1e-7): of side a on [rows_a + rows_b, C], or of side b [N, K]
    moments: tuple[Tensor, Tensor]  # [4, slabs, dims] of each graph
    slabs: tuple[int, int, int]  # rows a slab, slabs of side a, slabs
    bad: Tensor  # [1] int32: 1 if anything is not finite
    histograms: Tensor  # [graphs, passes, 2, 2048] int64, zeros


def prepare(problem: Problem, softmax: bool) -> Prepared:
    """One launch over the logits (and one to clear the counters). ``softmax`` also takes that of each row."""
    (m, n), classes = problem.rows, problem.classes
    slab_rows = max(256, triton.cdiv(max(m, n), 16))
    slabs_a = triton.cdiv(m, slab_rows)
    slabs = slabs_a + triton.cdiv(n, slab_rows)
    logits = Logits(problem.new(m + n, classes), problem.new(m + n, classes))
    probs, surprisals = (problem.new(m + n, classes) if softmax else logits.student for _ in range(2))
    row_moments, column_moments = problem.new(4, 2, (m + n) // 2 if softmax else 0), problem.new(4, slabs, classes)
    passes = len(DIGITS[problem.precision.compute.itemsize * 8])
    zeros = torch.zeros(len(problem.graphs) * passes * 2 * 2048 + 1, dtype=torch.int64, device=problem.device)
    bad = zeros[-1:].view(torch.int32)
    grid = (m + n + triton.cdiv(classes, plan.PREPARE["COLUMNS"]) * slabs,)
    meta = dict(plan.PREPARE)
    meta["ROW_BLOCK"] = min(meta["ROW_BLOCK"], max(32, triton.next_power_of_2(classes)))
    prepare_kernel[grid](
        sides=tuple(problem.sides), strides=tuple(x.stride() for x in problem.sides), logits=logits, probs=probs,
        surprisals=surprisals, row_moments=row_moments, column_moments=column_moments, bad=bad,
        m=m, n=n, classes=classes, slab_rows=slab_rows, slabs_a=slabs_a, slabs=slabs, SOFTMAX=softmax, **meta,
    )  # fmt: skip
    return Prepared(
        logits,
        probs if softmax else None,
        surprisals if softmax else None,
        (column_moments, row_moments),
        (slab_rows, slabs_a, slabs),
        bad,
        zeros[:-1].view(len(problem.graphs), passes, 2, 2048),
    )


def with_probs(prepared: Prepared, probs: Tensor | None, surprisals: Tensor | None) -> Prepared:
    """With other probabilities: of side a on, and their surprisals of side b on; or without."""
    return replace(prepared, probs=probs, surprisals=surprisals)


def pack(problem: Problem, prepared: Prepared, graphs: Sequence[Graph]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``(packed, stats)`` of the ``graphs``, one or both, and the scale ``[2]`` of each; one launch."""
    precision = problem.precision
    roles = 1 if precision.terms == 1 else 2
    packed = [problem.new(roles, 3, g.vertices, precision.terms * g.width, dtype=precision.operand) for g in graphs]
    stats = [problem.new(5, g.vertices) for g in graphs]
    scale = problem.new(2)
    tiles = [triton.cdiv(g.vertices, plan.PACK["ROWS"]) for g in graphs]
    first, last = graphs[0], graphs[-1]
    tiles_0 = 0 if first.by_class else tiles[0]
    slab_rows, slabs_a, slabs = prepared.slabs
    pack_kernel[(sum(tiles),)](
        logits=prepared.logits, moments=prepared.moments, packed=(packed[0], packed[-1]), stats=(stats[0], stats[-1]),
        scale=scale, vertices_0=first.vertices, vertices_1=last.vertices, dims_0=first.dims, dims_1=last.dims,
        width_0=first.width, width_1=last.width, samples=problem.samples, classes=problem.classes,
        m=problem.rows[0], n=problem.rows[1], slab_rows=slab_rows, slabs_a=slabs_a, slabs=slabs, tiles_0=tiles_0,
        TERMS=precision.terms, ROUND_TF32=precision.round_tf32, **plan.PACK,
    )  # fmt: skip
    return packed, stats, scale


class Block(NamedTuple):
    """Entropies of some rows of a graph, ``[rows, stride]``, of which the first ``columns`` of each row are edges."""

    values: Tensor
    rows: int
    columns: int
    stride: int
    first_row: int = 0


class Selector:
    """The thresholds of some graphs, in passes: ``count`` them all, for each pass all blocks of the graphs."""

    def __init__(self, problem: Problem, prepared: Prepared, edges: Sequence[int], histograms: Tensor) -> None:
        compute = problem.precision.compute
        self.problem, self.bad, self.histograms = problem, prepared.bad, histograms
        self.digits = DIGITS[compute.itemsize * 8]
        self.state = problem.new(len(edges), len(self.digits), 2, 3, dtype=torch.int64)
        ranks = [pruning.rank(problem.percentile / 100, count, compute) for count in edges]
        # As torch.quantile: a rank that is whole does not look at the next value.
        self.ranks = [(below, below + (weight > 0)) for below, weight in (ranks[0], ranks[-1])]
        self.weights = tuple(parts(weight) for _, weight in (ranks[0], ranks[-1]))

    def count(self, number: int, blocks: Sequence[Block], graph: int = 0) -> None:
        """Pass ``number`` over one block of each graph, or of ``graph``; one launch."""
        shift, width = self.digits[number]
        first, last = blocks[0], blocks[-1]
        jobs = [triton.cdiv(x.rows * x.columns, plan.HISTOGRAM["BLOCK"]) for x in blocks]
        histogram_kernel[(sum(jobs),)](
            values=(first.values, last.values), columns_0=first.columns, columns_1=last.columns,
            count_0=first.rows * first.columns, count_1=last.rows * last.columns,
            row_strides=(first.stride, last.stride), first_row=first.first_row,
            histograms=self.histograms[graph:], state=self.state[graph:],
            **_ranks(self.ranks[graph], self.ranks[1]), jobs_0=jobs[0],
            PASS=number, PASSES=len(self.digits), SHIFT=shift, WIDTH=width,
            PREVIOUS=self.digits[max(0, number - 1)][0], EXCLUDE_SELF=self.problem.exclude_self, **plan.HISTOGRAM,
        )  # fmt: skip

    def finish(self) -> Selection:
        """After the last pass; two launches. The interpolation is torch's own, as torch.quantile's is."""
        graphs = len(self.histograms)
        limits, counts = self.problem.new(3, graphs), self.problem.new(2, graphs, dtype=torch.int64)
        finish_kernel[(graphs,)](
            histograms=self.histograms, state=self.state, bad=self.bad, limits=limits, counts=counts,
            **_ranks(*self.ranks), weights=self.weights, graphs=graphs, PASSES=len(self.digits), **plan.FINISH,
        )  # fmt: skip
        return Selection(torch.lerp(*limits), limits, counts)


def _ranks(first: tuple[int, int], last: tuple[int, int]) -> dict[str, int]:
    return {"low_rank_0": first[0], "high_rank_0": first[1], "low_rank_1": last[0], "high_rank_1": last[1]}


def total(
    problem: Problem, prepared: Prepared, losses: Tensor, tiles: Sequence[int], selection: Selection | None
) -> Totals:
    """The tiles' shares of the loss, those of each graph together, summed in one order; one launch."""
    graphs = problem.graphs
    out = Totals(problem.new(), problem.new(len(graphs)), problem.new(len(graphs), dtype=torch.int64))
    edges = [problem.edge_count(g) for g in graphs]
    total_kernel[(1,)](
        losses=losses, selection=or_stand_ins(selection, losses, prepared.bad), bad=prepared.bad, totals=out,
        tiles_0=tiles[0], tiles_1=tiles[-1], weights=problem.weight_parts, edges_0=edges[0], edges_1=edges[-1],
        GRAPHS=len(graphs), KEEP_ALL=selection is None, **plan.TOTAL,
    )  # fmt: skip
    return out


def or_stand_ins(selection: Selection | None, floats: Tensor, integers: Tensor) -> Selection:
    """The selection, or what stands for it where every edge is kept and nothing is read."""
    return Selection(floats, floats, integers) if selection is None else selection
