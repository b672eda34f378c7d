"""The stages from the host's side: sizes, arrays, and the launches of each stage, in their order."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vrm_kernels.backends.contract import LossSettings, Probs, compute_dtype
from vrm_kernels.backends.triton.operands import FUSED_MULTIPLY_ADD, parts
from vrm_kernels.backends.triton.staged.arrays import PADDING, Arrays
from vrm_kernels.backends.triton.staged.entropy import entropy_kernel
from vrm_kernels.backends.triton.staged.finish import finish_kernel
from vrm_kernels.backends.triton.staged.literal import literal_kernel
from vrm_kernels.backends.triton.staged.prepare import CLASS_INDICES, NO_TARGET, PROBABILITIES, Targets, prepare_kernel
from vrm_kernels.backends.triton.staged.select import FIELDS, bracket_kernel, count_kernel, exact_kernel
from vrm_kernels.graph import forms, pruning

# Meta-parameters of each kernel.
PREPARE = {"BLOCK": 1024, "num_warps": 4}
ENTROPY = {"BLOCK": 32, "DEPTH": 16, "num_warps": 4}
# Smaller tiles where there are few, so that most multiprocessors have one.
FEW_EDGES, ENTROPY_FEW = 2**16, {"BLOCK": 16, "DEPTH": 32, "num_warps": 4}
BRACKET = {"BLOCK": 8192, "num_warps": 16}
COUNT = {"BLOCK": 4096, "num_warps": 8}
EXACT = {"BLOCK": 4096, "num_warps": 16}
LITERAL = {"CHUNK": 128, "num_warps": 8}
LITERAL_TILE = 2048  # components of a tile, in float32
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
    tiles: tuple[int, ...]  # of edges, of each graph, in the dense form; else 0
    depths: tuple[int, ...]  # of a row of probabilities, padded
    sources: tuple[
        tuple[int, ...], ...
    ]  # of each bracket, and of what the last one left: how many may be in each graph
    capacity: int  # of a vertex' list of edges
    floats: dict[str, int]  # elements of the arrays of floating-point numbers, padded
    integers: dict[str, int]  # of 32 bits


@dataclass(frozen=True)
class Call:
    """A problem laid out: its arrays, and what every kernel is told."""

    problem: Problem
    layout: Layout
    logits: tuple[Tensor, ...]
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
    complete: bool, exclude_self: bool, ranked: bool, dense: bool, need_grad: bool,
) -> Layout:  # fmt: skip
    """``depth`` is that of given probabilities; ``ranked`` says whether edges are pruned at all."""
    rows = padded(max(rows_a, rows_b))
    vertices = (rows_a + rows_b, 2 * classes)[: len(sizes)]
    tiles = tuple(dense * blocks(m, DENSE["ROWS"]) * blocks(n, DENSE["COLUMNS"]) for m, n, _ in sizes)
    edges = [m * n for m, n, _ in sizes]
    levels = max(map(forms.levels, edges)) if ranked else 0
    depths = tuple(padded(depth or dims) for _, _, dims in sizes)
    sources = [tuple(edges)]
    for _ in range(levels):
        sources.append(tuple(map(forms.room, sources[-1])))
    capacity = max(m + n if complete else max(m, n) for m, n, _ in sizes)
    matrix = sum(v * padded(dims) for v, (_, _, dims) in zip(vertices, sizes, strict=True))
    ranking = sum(v * depth for v, depth in zip(vertices, depths, strict=True))
    floats = {
        "vertices": 2 * matrix,
        "probs": ranking,
        "surprisals": ranking,
        "cross_entropy": 4 * rows,
        "entropies": sum(edges) if ranked or dense else 0,
        "collected": sum(map(forms.sample, edges)) + sum(map(sum, sources[1:])) if levels else 0,
        "thresholds": 2,
        "losses": sum(vertices),
        "partial": matrix if need_grad else 0,
        "summary": 4,
        "tile_losses": sum(tiles),
    }
    integers = {"lists": sum(vertices) * capacity, "finite": 4 * rows, "flags": sum(tiles)}
    return Layout(
        rows, vertices, tuple(pruning.edge_count(m, n, exclude_self) for m, n, _ in sizes), tiles, depths,
        tuple(sources), capacity, *({name: padded(count) for name, count in x.items()} for x in (floats, integers)),
    )  # fmt: skip


def lay_out(problem: Problem, given: Given | None = None) -> Call:
    dtype = compute_dtype(*problem.logits)
    mixed = len({x.dtype for x in problem.logits}) > 1
    logits = tuple((x.to(dtype) if mixed else x).contiguous() for x in problem.logits)
    (rows_a, classes), rows_b = logits[0].shape, len(logits[1])
    depth = None if problem.probs is None else problem.probs[0].shape[1]
    ranked, dense = problem.percentile < 100 and given is None, problem.form == "dense"
    plan = layout(
        problem.sizes, rows_a, rows_b, classes, depth, problem.complete, problem.exclude_self,
        ranked, dense, problem.need_grad,
    )  # fmt: skip
    # One allocation of each type for all that nobody keeps, cut up where 16 bytes begin.
    new = functools.partial(torch.empty, device=logits[0].device)
    arrays = Arrays(
        **_cut(new, plan.floats, dtype),
        **_cut(new, plan.integers, torch.int32),
        brackets=new((len(plan.sources) - 1) * 2 * FIELDS.value, dtype=torch.int64),
        kept=new(2, dtype=torch.int64),
        grads=new((rows_a + rows_b, classes) if problem.need_grad else 0, dtype=dtype),
        loss=new((), dtype=dtype),
        terms=new(4, dtype=dtype),
    )
    # Copies, since a kernel is compiled apart for numbers that do not lie on 16 bytes, and one writes entropies.
    if given is not None:
        entropies = arrays.entropies[: given.entropy.numel()].view_as(given.entropy) if dense else None
        arrays = arrays._replace(
            entropies=given.entropy.contiguous() if entropies is None else entropies.copy_(given.entropy),
            thresholds=given.threshold.repeat(2),
            kept=given.kept.repeat(2),
        )
    common = {
        "arrays": arrays, "rows_a": rows_a, "rows_b": rows_b, "classes": classes, "COMPLETE": problem.complete,
        **FUSED_MULTIPLY_ADD,
    }  # fmt: skip
    return Call(problem, plan, logits, arrays, common)


def _cut(new: Callable, counts: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    lengths = list(counts.values())
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
    p, q = (x.to(call.arrays.probs.dtype) for x in probs)
    call.arrays.finite[:1].logical_and_((p.sum() + q.sum()).isfinite())
    for out, x, first in ((call.arrays.probs, p, 0), (call.arrays.surprisals, -pruning.log_probs(q), len(p))):
        out = out[: (len(p) + len(q)) * call.layout.depths[0]].view(-1, call.layout.depths[0])[first : first + len(x)]
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


def select(call: Call) -> None:
    """One launch, and two more for each bracket."""
    sources, dtype = call.layout.sources, call.dtype
    levels, graphs = len(sources) - 1, len(call.problem.sizes)
    ranks, weights = zip(
        *(pruning.rank(call.problem.percentile / 100, count, dtype) for count in call.layout.edges), strict=True
    )
    all_entropies = common = {"arrays": call.arrays, **FUSED_MULTIPLY_ADD, **_of_graphs("from", (0, sources[0][0]))}
    end = sum(map(forms.sample, sources[0]))  # of what is in use of the room for what brackets leave
    for level, (counts, rooms) in enumerate(itertools.pairwise(sources)):
        counted = common | _of_graphs("count", counts)
        bracket_kernel[(graphs,)](
            **counted, **_of_graphs("rank", ranks), **_of_graphs("sample", tuple(map(forms.sample, counts))),
            LEVEL=level, **BRACKET,
        )  # fmt: skip
        jobs = [blocks(count, COUNT["BLOCK"]) for count in counts]
        to = end, end + rooms[0]
        count_kernel[(sum(jobs),)](
            **counted, **_of_graphs("to", to), **_of_graphs("room", rooms), jobs_0=jobs[0], LEVEL=level,
            **wider(COUNT, dtype),
        )  # fmt: skip
        common = common | _of_graphs("from", to)
        end += sum(rooms)
    block = min(EXACT["BLOCK"], power_of_two(max(sources[-1])))
    exact_kernel[(graphs,)](
        **all_entropies, **_of_graphs("count", sources[0]), **_of_graphs("rank", ranks),
        **_of_graphs("to", (common["from_0"], common["from_1"])), **_of_graphs("room", sources[-1]),
        weights=tuple(map(parts, _of_both(weights))), LEVELS=levels, **EXACT | {"BLOCK": block},
    )  # fmt: skip


def _of_both(values: tuple) -> tuple:
    """Of a graph alone, twice."""
    return values[0], values[-1]


def _of_graphs(name: str, values: tuple) -> dict:
    """A kernel's arguments ``name_0`` and ``name_1``."""
    return {f"{name}_0": values[0], f"{name}_1": values[-1]}


def literal(call: Call, targets: Targets) -> None:
    problem, edges, dense = call.problem, call.layout.edges, call.problem.form == "dense"
    shapes = [_literal_shape(padded(dims), call.dtype.itemsize) for _, _, dims in problem.sizes]
    (width_0, parts_0, others_0), (width_1, parts_1, others_1) = shapes[0], shapes[-1]
    jobs, most = 1 + sum(call.layout.vertices_of), max(parts_0, parts_1)
    literal_kernel[(jobs, most) if most > 1 else (jobs,)](
        **call.common, rows=call.layout.rows, capacity=call.layout.capacity,
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
        **call.common, tiles_0=call.layout.tiles[0], tiles_1=call.layout.tiles[-1], weights=call.weights,
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
