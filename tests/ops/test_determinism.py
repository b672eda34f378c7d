"""The same bits run to run, the same numbers whatever the threads, and torch's own switch honoured."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import MODES, Case, errors, evaluate, inputs, make_logits


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same_bits(x, y):
    return torch.equal(x.loss, y.loss) and x.kept == y.kept and all(map(torch.equal, x.grads, y.grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_same_inputs_same_bits(backend, relations, dtype, count, threads):
    threads(count)
    logits = make_logits(Case((113, 97)), dtype, seed=0)
    first = evaluate(backend, logits, relations=relations)
    for _ in range(3):
        copies = [torch.empty_like(x).copy_(x) for x in logits]  # the same values elsewhere in memory
        assert same_bits(evaluate(backend, copies, relations=relations), first)


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("shape", [(1, 5), (67, 101), (190, 75)], ids=str)
def test_thread_counts_agree_to_rounding(backend, shape, relations, threads):
    logits = inputs(Case(shape, relations=relations, seed=1800), torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(evaluate(backend, logits, relations=relations))
    for result in results[1:]:
        assert result.kept == results[0].kept
        assert max(errors(result, results[0]).values()) < 3e-6


@pytest.mark.parametrize("relations", MODES)
def test_deterministic_algorithms_are_honoured(any_backend, relations):
    logits = make_logits(Case((37, 61)), torch.float32, seed=0)
    free = evaluate(any_backend, logits, relations=relations)
    torch.use_deterministic_algorithms(True)
    try:
        strict = evaluate(any_backend, logits, relations=relations)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(strict, evaluate(any_backend, logits, relations=relations))
    assert max(errors(strict, free).values()) < 3e-6


def test_calls_leave_nothing_behind(any_backend):
    """Memory is used again: neither NaN nor another shape's numbers may come back."""
    logits = make_logits(Case((37, 61)), torch.float32, seed=0)
    first = evaluate(any_backend, logits, relations="complete")
    evaluate(any_backend, [torch.full((90, 70), torch.nan)] * 4)
    evaluate(any_backend, make_logits(Case((50, 120), scale=1e4), torch.float64, seed=1))
    evaluate(any_backend, [torch.full((5, 3), torch.inf)] * 4, relations="complete")
    assert same_bits(evaluate(any_backend, logits, relations="complete"), first)


def test_concurrent_calls_do_not_mix(backend):
    """Two Python threads in the loss at once, each with its own inputs."""
    batches = [make_logits(Case(shape), torch.float32, seed=0) for shape in [(67, 101), (113, 97), (20, 30)]] * 6
    alone = [evaluate(backend, logits) for logits in batches]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda logits: evaluate(backend, logits), batches))
    for x, y in zip(together, alone, strict=True):
        assert x.kept == y.kept and max(errors(x, y).values()) < 3e-6


def test_it_draws_no_random_numbers(any_backend):
    """A sampled threshold may not touch the caller's generator."""
    before = torch.get_rng_state()
    evaluate(any_backend, make_logits(Case((67, 101)), torch.float32, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
