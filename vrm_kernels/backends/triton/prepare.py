"""Stage 1: all that follows from a row of logits alone. See docs/gpu.md."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vrm_kernels.backends.triton.arrays import SIZES, matrix_size, padded
from vrm_kernels.backends.triton.edge import can_be_squared, exponential, number, wide
from vrm_kernels.graph import constants

ENTROPY_EPS = tl.constexpr(constants.ENTROPY_EPS)
NO_TARGET, CLASS_INDICES, PROBABILITIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Targets(NamedTuple):
    """What the cross-entropies compare with; ``None`` where it is not given."""

    labels: Tensor | None  # [B] int64 or [B, C]
    class_weight: Tensor | None  # [C]


@triton.jit
def _target_weights(targets, row, c, there, label, counts, classes, smoothing, KIND: tl.constexpr, T: tl.constexpr):
    """``q_c`` of one row: its cross-entropy is ``-sum_c q_c log P_c``."""
    weight = tl.full([c.shape[0]], 1.0, T)
    if targets.class_weight is not None:
        weight = tl.load(targets.class_weight + c, there, 0.0)
    if KIND == CLASS_INDICES:
        target = (c == label).to(T)
    else:
        target = tl.load(targets.labels + wide(row) * classes + c, there, 0.0)
    q = tl.where(there, weight * (target * (1.0 - smoothing) + smoothing / classes), 0.0)
    return tl.where(counts, q, 0.0)


@triton.jit(do_not_specialize=[*SIZES, "ignore_index", "counters"])
def prepare_kernel(
    logits,  # student a and b, teacher a and b: [rows, C] each, of one dtype
    targets,
    arrays,
    rows_a, rows_b, classes, ignore_index, counters,
    smoothing,  # of labels: a number in two parts
    BOTH_GRAPHS: tl.constexpr, COMPLETE: tl.constexpr, SOFTMAX: tl.constexpr, TARGET: tl.constexpr,
    NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row of one of the four tensors; rows beyond a view pad the columns' vertices with zeros."""
    T: tl.constexpr = arrays.loss.dtype.element_ty
    job = tl.program_id(0)
    rows = tl.num_programs(0) // 4
    tensor, row = job // rows, job % rows
    role, view = tensor // 2, tensor % 2
    x = logits[0]
    if tensor == 1:
        x = logits[1]
    if tensor == 2:
        x = logits[2]
    if tensor == 3:
        x = logits[3]
    x += wide(row) * classes
    inside = row < tl.where(view == 0, rows_a, rows_b)
    columns = tl.where(inside, classes, 0)  # that exist
    vertex = view * rows_a + row
    size, width, column_width = matrix_size(rows_a, rows_b, classes), padded(classes), padded(rows_a)
    filled = tl.where(inside, width, 0)
    to_row = arrays.vertices + role * size + wide(vertex) * width
    to_column = arrays.vertices + 2 * size + (role * 2 + view) * wide(classes) * column_width + row
    fine = tl.full([BLOCK], 1, tl.int32)
    highest = tl.full([BLOCK], float("-inf"), T)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < columns
        z = tl.load(x + c, there, 0.0)
        tl.store(to_row + c, z, c < filled)
        if BOTH_GRAPHS:
            tl.store(to_column + wide(c) * column_width, z, c < classes)
        z = z.to(T)
        fine = tl.minimum(fine, can_be_squared(z).to(tl.int32))
        highest = tl.maximum(highest, tl.where(there, z, float("-inf")))
    tl.store(arrays.finite + job, tl.min(fine, 0))
    if job == 0:  # the counters of the selection, without a launch of their own
        k = tl.arange(0, BLOCK)
        for start in range(0, counters, BLOCK):
            tl.store(arrays.brackets + start + k, tl.zeros([BLOCK], tl.int64), start + k < counters)
    if SOFTMAX and role == 0:
        peak = tl.where(inside, tl.max(highest, 0), 0.0)
        label, counts = tl.full([], 0, tl.int64), inside
        weight = tl.full([], 1.0, T)
        rate = number(smoothing, T)
        if TARGET == CLASS_INDICES:
            label = tl.load(targets.labels + row, inside, 0)
            counts = inside & (label != ignore_index)
            known = (label >= 0) & (label < classes)
            if targets.class_weight is not None:
                weight = tl.load(targets.class_weight + label, inside & known, 0.0)
            # A label that is neither a class nor ignored makes the mean NaN.
            weight = tl.where(counts & ~known, float("nan"), weight)
        totals, targeted, along = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            there = c < columns
            z = tl.load(x + c, there, 0.0).to(T) - peak
            totals += tl.where(there, exponential(z), 0.0)
            if TARGET != NO_TARGET:
                q = _target_weights(targets, row, c, there, label, counts, classes, rate, TARGET, T)
                targeted += q
                along += tl.where(q != 0, q * z, 0.0)
        total, target_sum = tl.where(inside, tl.sum(totals, 0), 1.0), tl.sum(targeted, 0)
        if TARGET != NO_TARGET:
            at = arrays.cross_entropy + view * rows + row
            tl.store(at, target_sum * tl.log(total) - tl.sum(along, 0))
            tl.store(at + 2 * rows, tl.where(counts, weight, 0.0))
        grad = arrays.grad_a
        if view == 1:
            grad = arrays.grad_b
        if COMPLETE:  # both views are on either side
            in_row, in_column, side = wide(vertex) * width, wide(view * classes) * column_width + row, size
        else:
            in_row, in_column, side = wide(row) * width, wide(row), wide(rows_a) * width
        for start in range(0, width, BLOCK):
            c = start + tl.arange(0, BLOCK)
            there = c < columns
            p = exponential(tl.load(x + c, there, 0.0).to(T) - peak) / total
            surprisal = tl.where(there, -tl.log(p + ENTROPY_EPS), 0.0)
            p = tl.where(there, p, 0.0)
            if COMPLETE or view == 0:
                tl.store(arrays.probs + in_row + c, p, c < filled)
                tl.store(arrays.probs + side + in_column + wide(c) * column_width, p, c < classes)
            if COMPLETE or view == 1:
                tl.store(arrays.surprisals + in_row + c, surprisal, c < filled)
                tl.store(arrays.surprisals + side + in_column + wide(c) * column_width, surprisal, c < classes)
            if NEED_GRAD and TARGET != NO_TARGET:
                q = _target_weights(targets, row, c, there, label, counts, classes, rate, TARGET, T)
                tl.store(grad + wide(row) * classes + c, p * target_sum - q, there)
