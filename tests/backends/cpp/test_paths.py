"""The compiled backend takes one of many paths: every instruction set, form and memory regime gives the same loss."""

import pytest
import torch
from helpers import (
    FLOOR,
    MODES,
    NEAR_CONVERGENCE_FLOOR,
    Case,
    assert_close,
    assert_parity,
    compare,
    errors,
    evaluate,
    evaluate_relation,
    make_logits,
)

import vrm_kernels.functional as VF
from vrm_kernels import backends

ISAS = ("avx512", "avx2", "portable")
FORMS = ("measured", "kept_only", "dense")
CASES = [
    Case((3, 5)),
    Case((1, 6), relations="complete"),
    Case((33, 17), percentile=100.0, seed=10),
    Case((37, 61), relations="complete", seed=20),
    Case((20, 300), kind="opposite", seed=30),
    Case((300, 20), kind="converged:1e-2", percentile=50.0, seed=40),
    Case((150, 140), percentile=100.0, relations="complete", seed=50),
    Case((41, 23), kind="collapsed", percentile=100.0),
    Case((67, 101), percentile=0.0, delta=0.05, seed=60),
]


@pytest.fixture
def cpp():
    usable, note = backends.REGISTRY["cpp"].status()
    if not usable:
        pytest.skip(note)
    operators = torch.ops.vrm_kernels
    yield operators
    operators.cpu_select_isa("")
    operators.cpu_set_edges_form("measured")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def choose(operators, isa):
    try:
        operators.cpu_select_isa(isa)
    except ValueError as error:
        assert isa != "portable", "the portable kernels run everywhere"
        pytest.skip(str(error))
    assert operators.cpu_isa() == isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shape}-{case.kind}-{case.relations}")
def test_parity_on_every_path(cpp, isa, form, case):
    choose(cpp, isa)
    cpp.cpu_set_edges_form(form)
    floors = NEAR_CONVERGENCE_FLOOR if case.kind.startswith("converged") else FLOOR
    for dtype in (torch.float32, torch.float64):
        assert_parity("cpp", case, dtype, floors=floors)


@pytest.mark.parametrize("isa", ISAS)
def test_quantile_on_every_instruction_set(cpp, isa):
    choose(cpp, isa)
    for n in (1, 7, 1000, 70_001):
        x = torch.randn(n).round(decimals=2)
        for q in (0.0, 0.3, 0.999, 1.0):
            assert torch.equal(VF.quantile(x, q), torch.quantile(x, q))


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parity_when_entropies_are_recomputed(cpp, relations, form, count, threads):
    """H of ten million float64 edges is not stored. The judge is the torch backend: the reference would take 20 GB."""
    threads(count)
    cpp.cpu_set_edges_form(form)
    b = 3300 if relations == "inter_view" else 1650
    logits = make_logits(Case((b, 4)), torch.float64, seed=0)
    oracle = recomputed_oracle(b, relations)
    result = evaluate("cpp", logits, beta=0.0, unreliable_pruning_percentile=1.0, relations=relations)
    edges = 3300**2 - (3300 if relations == "complete" else 0)
    assert result.kept[0] == int(0.01 * (edges - 1)) + 1
    assert_close(result, oracle, oracle, FLOOR[torch.float64])


_ORACLES = {}


def recomputed_oracle(b, relations):
    if relations not in _ORACLES:
        logits = make_logits(Case((b, 4)), torch.float64, seed=0)
        _ORACLES[relations] = evaluate(
            "torch", logits, beta=0.0, unreliable_pruning_percentile=1.0, relations=relations
        )
    return _ORACLES[relations]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.9])
def test_ties_that_overflow_every_bracket(cpp, share):
    """One-hot probabilities: tens of thousands of edges tied at each of two values of H."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    labels = [torch.randint(8, (400,), generator=generator) for _ in range(2)]
    probs = tuple(torch.nn.functional.one_hot(x, 8).float() for x in labels)
    vectors = [torch.randn(400, 5, generator=generator) for _ in range(4)]
    compare("cpp", vectors, FLOOR[torch.float32], evaluate_relation, probs=probs, percentile=100 * share)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_forms_and_threads_agree(cpp, form, count, threads):
    logits = make_logits(Case((230, 110)), torch.float64, seed=0)
    settings = {"alpha": 2.0, "beta": 0.5, "unreliable_pruning_percentile": 70.0}
    plain = evaluate("cpp", logits, **settings)
    threads(count)
    cpp.cpu_set_edges_form(form)
    result = evaluate("cpp", logits, **settings)
    assert result.kept == plain.kept and max(errors(result, plain).values()) < 1e-10


def test_unknown_paths_are_refused(cpp):
    with pytest.raises(ValueError, match="sse9"):
        cpp.cpu_select_isa("sse9")
    with pytest.raises(ValueError, match="'measured', 'kept_only' or 'dense', not 'sparse'"):
        cpp.cpu_set_edges_form("sparse")


@pytest.mark.parametrize("rank", [-1, 20])
def test_a_rank_that_is_no_edges_is_refused(cpp, rank):
    a, b, p, q = torch.randn(4, 3), torch.randn(5, 3), torch.ones(4, 2), torch.ones(5, 2)
    with pytest.raises(RuntimeError, match=f"rank of a threshold among 20 entropies is {rank}"):
        cpp.cpu_relation_graph(a, b, a, b, p, q, rank, 0.5, 1.0, 1e-7, False, True)
