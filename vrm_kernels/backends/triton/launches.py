"""The stages from the host's side: sizes, arrays, and the launches of each stage, in their order."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.backends.contract import LossSettings, Probs, compute_dtype
from vrm_kernels.backends.triton.arrays import PADDING, Arrays
from vrm_kernels.backends.triton.entropy import entropy_kernel
from vrm_kernels.backends.triton.finish import finish_kernel
from vrm_kernels.backends.triton.literal import literal_kernel
from vrm_kernels.backends.triton.operands import FUSED_MULTIPLY_ADD, parts
from vrm_kernels.backends.triton.prepare import CLASS_INDICES, NO_TARGET, PROBABILITIES, Targets, prepare_kernel
from vrm_kernels.backends.triton.select import FIELDS, bracket_kernel, count_kernel, exact_kernel
from vrm_kernels.graph import forms, pruning

# Meta-parameters of each kernel.
PREPARE = {"BLOCK": 1024, "num_warps": 4}
ENTROPY = {"BLOCK": 32, "DEPTH": 16, "num_warps": 4}
# Smaller tiles where there are few, so that most multiprocessors have one.
FEW_EDGES, ENTROPY_FEW = 2**16, {"BLOCK": 16, "DEPTH": 32, "num_warps": 4}
BRACKET = {"BLOCK": 8192, "num_warps": 16}
COUNT = {"BLOCK": 4096, "num_warps": 8}
EXACT = {"BLOCK": 4096, "num_warps": 16}
LITERAL = {"CHUNK": 128, "SUMMARY": 2048, "num_warps": 8}
LITERAL_TILE = 4096  # components of a tile, in float32: of smaller ones ptxas spills a few words
LITERAL_BYTES = 2**14  # of a vertex, or a part of it, in registers of one block
DENSE = {"ROWS": 8, "COLUMNS": 128, "num_warps": 8}
FINISH = {"BLOCK": 32, "num_warps": 4}


class Problem(NamedTuple):
    """The graphs of one call: ``sizes`` are ``(m, n, dims)`` of each. ``probs`` rank the edges of a graph alone, else
    the logits do; without either all are kept."""

    logits: tuple[Tensor, Tensor, Tensor, Tensor]
    probs: Probs | None
    sizes: tuple[tuple[int, int, int], ...]
    weights: tuple[float, float]
    percentile: float
    delta: float
    eps: float
    complete: bool
    exclude_self: bool
    need_grad: bool
    form: forms.Form = "literal"
    whole_edges: int | None = None  # of the graph that this is a share of


class Given(NamedTuple):
    """The selection of a graph, in the place of a percentile."""

    entropy: Tensor  # [m, n]
    threshold: Tensor  # []
    kept: Tensor  # [] int64


class Layout(NamedTuple):
    """What follows from the sizes of a call alone."""

    rows: int  # of a view of logits, padded
    vertices_of: tuple[int, ...]  # each graph
    edges: tuple[int, ...]  # that exist, of each graph
    block_rows: tuple[int, ...]  # of the edges of each graph that are taken together
    entropies: tuple[int, ...]  # where those of each graph begin
    depths: tuple[int, ...]  # of a row of probabilities, padded
    ranking: tuple[int, int]  # elements of the probabilities, and of the surprisals
    # Of each bracket, and of what the last one left: how many there may be in each graph.
    sources: tuple[tuple[int, ...], ...]
    matrix: int  # elements of the vertices of all graphs
    floats: dict[str, int]  # elements of the arrays of floating-point numbers
    integers: dict[str, int]  # of 32 bits


@dataclass(frozen=True)
class Call:
    """A problem laid out: its arrays, and what every kernel is told."""

    problem: Problem
    layout: Layout
    logits: tuple[Tensor, ...]  # of one dtype
    arrays: Arrays
    common: dict

    @property
    def dtype(self) -> torch.dtype:
        return self.arrays.loss.dtype

    @property
    def weights(self) -> tuple[tuple[float, float], ...]:
        return tuple(map(parts, self.problem.weights))


@functools.lru_cache(maxsize=64)
def layout(
    sizes: tuple[tuple[int, int, int], ...], rows_a: int, rows_b: int, classes: int, depth: int | None,
    exclude_self: bool, ranked: bool, dense: bool, need_grad: bool,
) -> Layout:  # fmt: skip
    """``depth`` is that of given probabilities; ``ranked`` says whether edges are pruned at all."""
    rows = padded(max(rows_a, rows_b))
    vertices = (rows_a + rows_b, 2 * classes)[: len(sizes)]
    edges = [m * n for m, n, _ in sizes]
    block_rows = tuple(rows_of_block(m, n) if dense else m for m, n, _ in sizes)
    blocks_of = [padded(taken * n) if dense else taken * n for taken, (_, n, _) in zip(block_rows, sizes, strict=True)]
    sources = [tuple(edges)]
    recomputed = any(taken < m for taken, (m, _, _) in zip(block_rows, sizes, strict=True))
    for _ in range(max(recomputed, *map(forms.levels, edges)) if ranked else 0):
        sources.append(tuple(map(forms.room, sources[-1])))
    depths = tuple(padded(depth or dims) for _, _, dims in sizes)
    of_a, of_b = (sum(x[side] * d for x, d in zip(sizes, depths, strict=True)) for side in (0, 1))
    matrix = sum(v * padded(dims) for v, (_, _, dims) in zip(vertices, sizes, strict=True))
    tiles = [
        dense * blocks(taken, DENSE["ROWS"]) * blocks(n, DENSE["COLUMNS"])
        for taken, (_, n, _) in zip(block_rows, sizes, strict=True)
    ]
    floats = {
        "cross_entropy": 4 * rows,
        "entropies": sum(blocks_of) if ranked or dense else 0,
        "samples": sum(map(forms.sample, edges)) if len(sources) > 1 else 0,
        "collected": sum(map(sum, sources[1:])),
        "thresholds": 2,
        "losses": sum(vertices),
        "partial": max(matrix * need_grad, of_a + of_b),
        "summary": 4,
        "tile_losses": max(tiles),
    }
    integers = {"lists": 2 * (max if dense else sum)(blocks_of), "finite": 4 * rows, "flags": max(tiles), "missed": 2}
    return Layout(
        rows, vertices, tuple(pruning.edge_count(m, n, exclude_self) for m, n, _ in sizes), block_rows,
        (0, blocks_of[0]), depths, (of_a, of_b), tuple(sources), 2 * matrix, floats, integers,
    )  # fmt: skip


def rows_of_block(m: int, n: int) -> int:
    """How many rows of edges the dense form takes together: all whose entropies are stored."""
    whole = m * n <= forms.STORED_EDGES
    return m if whole else min(m, max(1, forms.STORED_EDGES // (n * DENSE["ROWS"])) * DENSE["ROWS"])


def lay_out(problem: Problem, given: Given | None = None) -> Call:
    dtype = compute_dtype(*problem.logits)
    mixed = len({x.dtype for x in problem.logits}) > 1
    logits = tuple((x.to(dtype) if mixed else x).contiguous() for x in problem.logits)
    (rows_a, classes), rows_b = logits[0].shape, len(logits[1])
    depth = None if problem.probs is None else problem.probs[0].shape[1]
    ranked, dense = problem.percentile < 100 and given is None, problem.form == "dense"
    plan = layout(
        problem.sizes, rows_a, rows_b, classes, depth, problem.exclude_self, ranked, dense, problem.need_grad
    )  # fmt: skip
    # One allocation of each type for all that nobody keeps, cut up where 16 bytes begin.
    new = functools.partial(torch.empty, device=logits[0].device)
    floats = _cut(new, plan.floats, dtype)
    # What ranks the edges is read before a gradient is written, which may take its place.
    probs, surprisals = floats["partial"][: sum(plan.ranking)].split(plan.ranking)
    arrays = Arrays(
        **floats,
        **_cut(new, plan.integers, torch.int32),
        vertices=new(plan.matrix, dtype=logits[0].dtype),
        probs=probs,
        surprisals=surprisals,
        brackets=new((len(plan.sources) - 1) * 2 * FIELDS.value, dtype=torch.int64),
        kept=new(2, dtype=torch.int64),
        grad_a=new((rows_a, classes) if problem.need_grad else 0, dtype=dtype),
        grad_b=new((rows_b, classes) if problem.need_grad else 0, dtype=dtype),
        loss=new((), dtype=dtype),
        terms=new(4, dtype=dtype),
    )
    if given is not None:
        # Copies, since a kernel is compiled apart for numbers that do not lie on 16 bytes.
        arrays = arrays._replace(thresholds=given.threshold.repeat(2), kept=given.kept.repeat(2))
        if not dense:
            arrays = arrays._replace(entropies=given.entropy.contiguous())
    common = {
        "arrays": arrays, "rows_a": rows_a, "rows_b": rows_b, "classes": classes, "COMPLETE": problem.complete,
        **FUSED_MULTIPLY_ADD,
    }  # fmt: skip
    return Call(problem, plan, logits, arrays, common)


def _cut(new: Callable, counts: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    lengths = list(map(padded, counts.values()))
    return dict(zip(counts, new(sum(lengths), dtype=dtype).split(lengths), strict=True))


def prepare(call: Call, targets: Targets, settings: LossSettings | None) -> None:
    both = len(call.problem.sizes) == 2
    prepare_kernel[(4 * call.layout.rows,)](
        logits=call.logits, targets=targets, **call.common, counters=call.arrays.brackets.numel(),
        ignore_index=settings.ignore_index if settings else 0,
        smoothing=parts(settings.label_smoothing if settings else 0.0),
        BOTH_GRAPHS=both, SOFTMAX=both, TARGET=kind(targets), NEED_GRAD=call.problem.need_grad,
        **wider(PREPARE | {"BLOCK": min(PREPARE["BLOCK"], power_of_two(call.common["classes"]))}, call.dtype),
    )  # fmt: skip
    if call.problem.probs is not None:
        _use(call, call.problem.probs)


def _use(call: Call, probs: Probs) -> None:
    """Lay out probabilities of the caller's as those of the logits would be."""
    p, q = (x.to(call.dtype) for x in probs)
    call.arrays.finite[:1].logical_and_((p.sum() + q.sum()).isfinite())
    for out, x in ((call.arrays.probs, p), (call.arrays.surprisals, -pruning.log_probs(q))):
        out = out.view(len(x), -1)
        out.zero_()
        out[:, : x.shape[1]] = x


def entropy(call: Call) -> None:
    meta = ENTROPY_FEW if sum(call.layout.edges) < FEW_EDGES else ENTROPY
    tiles = sum(blocks(m, meta["BLOCK"]) * blocks(n, meta["BLOCK"]) for m, n, _ in call.problem.sizes)
    entropy_kernel[(tiles,)](
        **call.common,
        depth_0=call.layout.depths[0],
        depth_1=call.layout.depths[-1],
        EXCLUDE_SELF=call.problem.exclude_self,
        **meta,
    )


def select(call: Call, blocks_of: Callable[[], Iterable[tuple[int, int]]] | None = None) -> None:
    """One launch, and two more for each bracket.

    ``blocks_of``: the graphs' blocks, ``(graph, entropies)``, each of which is counted before the next takes its place.
    """
    sources, dtype, graphs = call.layout.sources, call.dtype, len(call.problem.sizes)
    stored = [rows == m for rows, (m, _, _) in zip(call.layout.block_rows, call.problem.sizes, strict=True)]
    ranks, weights = zip(
        *(pruning.rank(call.problem.percentile / 100, count, dtype) for count in call.layout.edges), strict=True
    )
    common = {"arrays": call.arrays, **FUSED_MULTIPLY_ADD}
    begin = call.layout.entropies
    end = 0  # of what is in use of the room for what brackets leave
    source = begin
    sampled = tuple(at if whole else -1 for at, whole in zip(begin, stored, strict=False))
    for level, (counts, rooms) in enumerate(itertools.pairwise(sources)):
        bracket_kernel[(graphs,)](
            **common, **_of_graphs("from", source if level else sampled), **_of_graphs("count", counts),
            **_of_graphs("rank", ranks), **_of_graphs("sample", tuple(map(forms.sample, counts))),
            LEVEL=level, **BRACKET,
        )  # fmt: skip
        to = end, end + rooms[0]
        for counted in [counts] if level or blocks_of is None else _counts(blocks_of()):
            jobs = [blocks(count, COUNT["BLOCK"]) for count in counted]
            count_kernel[(sum(jobs),)](
                **common, **_of_graphs("from", source), **_of_graphs("count", counted), **_of_graphs("to", to),
                **_of_graphs("room", rooms), jobs_0=jobs[0], LEVEL=level, **wider(COUNT, dtype),
            )  # fmt: skip
        source = to
        end += sum(rooms)
    block = min(EXACT["BLOCK"], power_of_two(max(sources[-1])))
    counts = tuple(count * whole for count, whole in zip(sources[0], stored, strict=True))
    exact_kernel[(graphs,)](
        **common, **_of_graphs("from", begin), **_of_graphs("count", counts), **_of_graphs("rank", ranks),
        **_of_graphs("to", source), **_of_graphs("room", sources[-1]),
        weights=tuple(parts(weights[k]) for k in (0, -1)), LEVELS=len(sources) - 1, **EXACT | {"BLOCK": block},
    )  # fmt: skip


def _counts(blocks_of: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Of a launch for one graph alone."""
    for graph, entropies in blocks_of:
        yield (0, entropies) if graph else (entropies, 0)


def _of_graphs(name: str, values: tuple) -> dict:
    """A kernel's arguments ``name_0`` and ``name_1``."""
    return {f"{name}_0": values[0], f"{name}_1": values[-1]}


def literal(
    call: Call, targets: Targets, graph: int | None = None, first_job: int = 0, jobs: int | None = None, **block
) -> None:
    """Of all edges that are kept; in the dense form of a ``block`` of rows of ``graph``, those that ``dense`` left."""
    problem, edges, dense = call.problem, call.layout.edges, call.problem.form == "dense"
    shapes = [_literal_shape(padded(dims), call.dtype.itemsize) for _, _, dims in problem.sizes]
    (width_0, parts_0, others_0), (width_1, parts_1, others_1) = shapes[0], shapes[-1]
    jobs = jobs or 1 + sum(call.layout.vertices_of)
    most = max(parts_0, parts_1) if graph is None else shapes[graph][1]
    literal_kernel[(jobs, most) if most > 1 else (jobs,)](
        **call.common | {"first_row": 0, "block_rows": 0} | block, rows=call.layout.rows, first_job=first_job,
        edges_0=problem.whole_edges or edges[0], edges_1=edges[-1],
        weights=call.weights, delta=parts(problem.delta), eps=parts(problem.eps),
        EXCLUDE_SELF=problem.exclude_self, KEEP_ALL=problem.percentile >= 100, NEED_GRAD=problem.need_grad,
        TARGET=kind(targets), TILE_ROWS=dense * DENSE["ROWS"], TILE_COLUMNS=dense * DENSE["COLUMNS"],
        WIDTH_0=width_0, PARTS_0=parts_0, OTHERS_0=others_0, WIDTH_1=width_1, PARTS_1=parts_1, OTHERS_1=others_1,
        **wider(LITERAL, call.dtype),
    )  # fmt: skip


def _literal_shape(width: int, itemsize: int) -> tuple[int, int, int]:
    """``(components of a part of a vertex, parts, edges of a tile)``."""
    part = power_of_two(width)
    if part * itemsize > LITERAL_BYTES:  # a part takes more registers than a whole, for its loops
        part = LITERAL_BYTES // itemsize // 2
    return part, blocks(width, part), max(1, 4 * LITERAL_TILE // itemsize // part)


def finish(call: Call, targets: Targets, settings: LossSettings | None) -> None:
    rows_a, rows_b, classes = (call.common[name] for name in ("rows_a", "rows_b", "classes"))
    tiles = (blocks(rows_a, FINISH["BLOCK"]) + blocks(rows_b, FINISH["BLOCK"])) * blocks(classes, FINISH["BLOCK"])
    counted = settings if targets.labels is not None else None
    finish_kernel[(1 + tiles * call.problem.need_grad,)](
        **call.common, weights=call.weights,
        BOTH_GRAPHS=len(call.problem.sizes) == 2,
        CE_REAL=counted is not None and counted.ce_real,
        CE_VIRTUAL=counted is not None and counted.ce_virtual, **FINISH,
    )  # fmt: skip


def kind(targets: Targets) -> int:
    if targets.labels is None:
        return NO_TARGET.value
    return PROBABILITIES.value if targets.labels.dtype.is_floating_point else CLASS_INDICES.value


def padded(n: int) -> int:
    return blocks(n, PADDING.value) * PADDING.value


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The one at or above ``n``; at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def wider(meta: dict, dtype: torch.dtype) -> dict:
    """A kernel's meta-parameters with twice the threads for float64, which takes two registers a number."""
    return meta | {"num_warps": meta["num_warps"] * dtype.itemsize // 4}
