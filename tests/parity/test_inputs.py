"""Parity over dtypes, mixtures of them, strides and storage offsets."""

import pytest
import torch
from helpers import DTYPES, FLOOR, MODES, Case, assert_parity, compare, evaluate, inputs


def transposed(x):
    return x.t().contiguous().t()


def strided(x):
    """Every second row and third column of a tensor of NaN: reading a neighbour poisons the loss."""
    b, c = x.shape
    return x.new_full((2 * b + 1, 3 * c + 2), torch.nan)[1::2, 2::3].copy_(x)


def offset(x):
    return x.new_full((x.numel() + 3,), torch.nan)[3:].view(x.shape).copy_(x)


def padded_rows(x):
    return x.new_full((x.shape[0], x.shape[1] + 5), torch.nan)[:, :-5].copy_(x)


LAYOUTS = [transposed, strided, offset, padded_rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("shape", [(3, 5), (37, 61)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_parity_over_dtypes(backend, shape, relations, dtype):
    assert_parity(backend, Case(shape, relations=relations, seed=500), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_parity_over_layouts(backend, layout, dtype):
    x = torch.randn(37, 61)
    laid = layout(x)
    assert torch.equal(laid, x) and (not laid.is_contiguous() or laid.storage_offset() > 0)
    for relations in MODES:
        assert_parity(backend, Case((37, 61), relations=relations, seed=500), dtype, layout=layout)


def test_each_input_may_have_its_own_layout(backend):
    case = Case((37, 61), seed=500)
    logits = inputs(case, torch.float32)
    for turn in range(4):
        layouts = LAYOUTS[turn:] + LAYOUTS[:turn]
        mixed = [layout(x) for layout, x in zip(layouts, logits, strict=True)]
        compare(backend, mixed, FLOOR[torch.float32])


def test_expanded_inputs(backend):
    """Stride 0: a teacher whose rows are all one, and a student that is a broadcast of one row (its gradient sums)."""
    student_real, student_virtual, teacher_real, teacher_virtual = inputs(Case((9, 6), seed=600), torch.float32)
    logits = [student_real, student_virtual, teacher_real[:1].expand(9, 6), teacher_virtual]
    compare(backend, logits, FLOOR[torch.float32], unreliable_pruning_percentile=100.0)

    logits = [student_real[:1].expand(9, 6), student_virtual, teacher_real, teacher_virtual]
    compare(backend, logits, FLOOR[torch.float32], unreliable_pruning_percentile=100.0)


@pytest.mark.parametrize(
    ("dtypes", "loss_dtype"),
    [
        ((torch.float16, torch.float16, torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float32, torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.bfloat16, torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float32, torch.float64, torch.float64), torch.float64),
        ((torch.float64, torch.float16, torch.float32, torch.float32), torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("relations", MODES)
def test_mixed_dtypes_compute_in_what_they_promote_to(backend, dtypes, loss_dtype, relations):
    case = Case((17, 31), relations=relations, seed=700)
    logits = [x.to(dtype) for x, dtype in zip(inputs(case, torch.bfloat16), dtypes, strict=True)]
    result = compare(backend, logits, FLOOR[loss_dtype], alpha=2.0, beta=3.0, relations=relations)
    assert result.loss.dtype == loss_dtype
    assert [grad.dtype for grad in result.grads] == list(dtypes[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_left_as_they_were(any_backend, dtype):
    logits = [strided(x) for x in inputs(Case((17, 31), seed=800), dtype)]
    logits += [offset(logits[0])]
    before = [(x.clone(), x._version) for x in logits]
    evaluate(any_backend, logits[:4], relations="complete")
    evaluate(any_backend, [logits[4], *logits[1:4]])
    for x, (copy, version) in zip(logits, before, strict=True):
        assert torch.equal(x, copy) and x._version == version
