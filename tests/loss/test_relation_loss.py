"""relation_loss: one graph over any vectors, M and N different, ranked by given probabilities or not at all."""

import pytest
import torch
from helpers import (
    DTYPES,
    FLOOR,
    NEAR_CONVERGENCE_FLOOR,
    Case,
    compare,
    evaluate_relation,
    inputs,
    probs_settle_mask,
    relative_error,
)

import vrm_kernels.functional as VF

SIZES = [(1, 1, 3), (1, 5, 4), (5, 1, 4), (3, 5, 2), (17, 29, 41), (61, 13, 7), (37, 70, 128)]


def draw(m, n, d, dtype, seed=0, noise=None):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    teacher = [torch.randn(k, d, generator=generator) * 2 + 1 for k in (m, n)]
    student = [torch.randn(k, d, generator=generator) for k in (m, n)]
    if noise is not None:
        student = [t + noise * s for s, t in zip(student, teacher, strict=True)]
    return [x.to(dtype) for x in (*student, *teacher)]


def draw_probs(m, n, k, percentile, dtype):
    for seed in range(2000):
        generator = torch.Generator(torch.get_default_device()).manual_seed(1000 + seed)
        probs = tuple((3 * torch.randn(x, k, generator=generator)).to(dtype).softmax(1) for x in (m, n))
        wide, single = (tuple(x.to(to) for x in probs) for to in (torch.float64, torch.float32))
        if probs_settle_mask(wide, single, percentile):
            return probs
    raise AssertionError("no seed separates the threshold")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_edge_counts_without_probs(backend, size, dtype):
    vectors = draw(*size, dtype)
    whole = compare(backend, vectors, FLOOR[dtype], evaluate_relation)
    assert torch.equal(whole.loss, evaluate_relation(backend, vectors, percentile=10.0).loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("percentile", [0.0, 30.0, 100.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_probs_rank_the_edges(backend, size, percentile, dtype):
    m, n, d = size
    probs = draw_probs(m, n, 6, percentile, dtype)
    compare(backend, draw(m, n, d, dtype), FLOOR[dtype], evaluate_relation, probs=probs, percentile=percentile)


@pytest.mark.parametrize("delta", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("noise", [None, 1e-1, 1e-2])
def test_deltas_and_convergence(backend, delta, noise):
    for dtype in (torch.float32, torch.float64):
        floors = FLOOR if noise is None else NEAR_CONVERGENCE_FLOOR
        compare(backend, draw(17, 29, 41, dtype, noise=noise), floors[dtype], evaluate_relation, delta=delta)


def test_probs_of_another_dtype_and_layout(backend):
    probs = draw_probs(17, 29, 6, 30.0, torch.float32)
    vectors = draw(17, 29, 41, torch.float32)
    expected = evaluate_relation(backend, vectors, probs=probs, percentile=30.0)
    laid = [x.t().contiguous().t() for x in probs]
    assert relative_error(evaluate_relation(backend, vectors, probs=laid, percentile=30.0).loss, expected.loss) < 1e-6
    wide = tuple(x.double() for x in probs)
    assert relative_error(evaluate_relation(backend, vectors, probs=wide, percentile=30.0).loss, expected.loss) < 1e-6


def test_only_the_student_gets_gradients(any_backend):
    vectors = [x.requires_grad_() for x in draw(5, 7, 3, torch.float32)]
    probs = [x.requires_grad_() for x in draw_probs(5, 7, 4, 50.0, torch.float32)]
    VF.relation_loss(*vectors, probs=probs, percentile=50.0, backend=any_backend).backward()
    assert all(x.grad is not None and x.grad.any() for x in vectors[:2])
    assert all(x.grad is None for x in (*vectors[2:], *probs))


def test_it_is_the_inter_sample_graph_of_the_loss(backend):
    logits = inputs(Case((17, 31)), torch.float32)
    probs = tuple(x.softmax(1) for x in logits[:2])
    graph = evaluate_relation(backend, logits, probs=probs, percentile=30.0)
    loss = VF.vrm_loss(*logits, None, 1.0, 0.0, False, False, 30.0, backend=backend)
    assert relative_error(graph.loss, loss) < 1e-6


def test_joint_entropy_is_the_ranking():
    real, virtual = inputs(Case((5, 4)), torch.float32)[:2]
    entropy = VF.joint_entropy(real.requires_grad_(), virtual)
    assert entropy.dtype == torch.float32 and entropy.shape == (5, 5) and not entropy.requires_grad
    p, q = real.detach().double().softmax(1), virtual.double().softmax(1)
    for i in range(5):
        for j in range(5):
            expected = -sum(float(p[i, c]) * float((q[j, c] + 1e-7).log()) for c in range(4))
            assert float(entropy[i, j]) == pytest.approx(expected, rel=1e-5)
    assert VF.joint_entropy(real.half(), virtual[:3].half()).dtype == torch.float32
    assert VF.joint_entropy(real.double(), virtual[:3]).shape == (5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(VF.joint_entropy(real, virtual), entropy)
