"""What the parity tests share: the inputs of a case, one evaluation of it, and the comparator."""

import functools
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

import vrm_kernels.functional as VF
from vrm_kernels import backends, checks
from vrm_kernels.backends import contract, reference
from vrm_kernels.backends.contract import GraphSettings, LossSettings, Views, both_graphs
from vrm_kernels.graph import pruning
from vrm_kernels.graph.constants import RELATION_EPS

# The suite runs on the CPU; `make gpu-check` runs it again on a GPU, as torch's default device.
DEVICE = torch.get_default_device().type
ALL_BACKENDS = tuple(name for name, backend in backends.REGISTRY.items() if backend.runs_on(DEVICE))
# Every backend that is not the oracle itself: a new one joins all the tests by being registered.
BACKENDS = tuple(name for name in ALL_BACKENDS if name != "reference")
MODES = checks.RELATIONS
DTYPES = contract.DTYPES
# A backend's relative error may be this, or twice the eager class's own in the same dtype, whichever is larger.
FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
NEAR_CONVERGENCE_FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# Units in the last place of the terms that cancel in a gradient, see assert_close.
ROUNDINGS = 16
GRAPH_WEIGHTS = ((1.0, 0.0), (0.0, 1.0))
SETTINGS = LossSettings(2.0, 0.5, True, True, 30.0, 1.0, RELATION_EPS, False, 0.1, -100)
GRAPH_SETTINGS = GraphSettings(30.0, 1.0, RELATION_EPS, False)
BAD = [torch.nan, torch.inf, -torch.inf]


class Result(NamedTuple):
    loss: torch.Tensor
    grads: tuple[torch.Tensor, ...]
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One loss to compute; hashable, so that its oracle is computed once for all backends."""

    shape: tuple[int, int]
    kind: str = "random"
    scale: float = 1.0
    percentile: float = 30.0
    relations: str = "inter_view"
    delta: float = 1.0
    seed: int = 0


def make_logits(case: Case, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Student real and virtual, teacher real and virtual: drawn in float32 whatever ``dtype``, then rounded to it."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    b, c = case.shape

    def draw(spread):
        return torch.randn(b, c, generator=generator) * spread

    teacher_real = draw(3.0)
    teacher_virtual = teacher_real + draw(1.0)
    kind, _, noise = case.kind.partition(":")
    if kind == "random":
        student = [draw(2.0), draw(2.0)]
    elif kind == "converged":
        student = [teacher + draw(3.0 * float(noise)) for teacher in (teacher_real, teacher_virtual)]
    elif kind == "equal":
        student = [teacher_real.clone(), teacher_virtual.clone()]
    elif kind == "opposite":
        student = [-teacher_real, -teacher_virtual]
    elif kind == "collapsed":
        student = [draw(2.0)[:1].expand(b, c).clone()] * 2
    elif kind == "duplicated_within":  # in each view each row twice, never across the views
        student = [draw(2.0)[torch.arange(b) // 2], draw(2.0)[torch.arange(b) // 2]]
    elif kind == "duplicated_across":  # half of the virtual rows are rows of the real view
        real = draw(2.0)
        student = [real, torch.where(torch.arange(b)[:, None] % 2 == 0, real.flip(0), draw(2.0))]
    else:
        raise ValueError(kind)
    return [(x * case.scale).to(dtype) for x in (*student, teacher_real, teacher_virtual)]


@functools.lru_cache(maxsize=512)
def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The logits of ``case``, of the first seed whose pruning mask rounding cannot flip."""
    for seed in range(case.seed, case.seed + 500):
        logits = make_logits(case, dtype, seed)
        if mask_is_settled(logits, case.percentile, case.relations):
            return tuple(logits)
    raise AssertionError(f"no seed separates the threshold of {case}")


def mask_is_settled(logits, percentile: float, relations: str) -> bool:
    """Whether float32 and float64 keep the same edges, with room for rounding on both sides of the threshold."""
    complete = relations == "complete"
    graphs = [both_graphs(Views(*(x.to(dtype) for x in logits)), complete) for dtype in (torch.float64, torch.float32)]
    return all(
        probs_settle_mask(probs64, probs32, percentile, complete)
        for (_, probs64), (_, probs32) in zip(*graphs, strict=True)
    )


def probs_settle_mask(probs64, probs32, percentile: float, exclude_self: bool = False) -> bool:
    entropies = [pruning.joint_entropy(*probs) for probs in (probs64, probs32)]
    if exclude_self:
        entropies = [x[~torch.eye(len(x), dtype=torch.bool)] for x in entropies]
    entropy64, entropy32 = (x.flatten() for x in entropies)
    n = entropy32.numel()
    (below64, weight64), (below32, weight32) = (
        pruning.rank(percentile / 100, n, dtype) for dtype in (torch.float64, torch.float32)
    )
    if below32 == n - 1 or all(bool((x == x[0]).all()) for x in (entropy64, entropy32)):
        return below64 == below32 or below32 != n - 1  # every edge is kept
    rounding = float((entropy64 - entropy32).abs().max()) + 1e-7
    low, high = (entropy32.kthvalue(k).values for k in (below32 + 1, below32 + 2))
    above = min(1 - weight64, 1 - weight32) * float(high - low)  # from the threshold to the next value
    return below64 == below32 and bool(high - low > 10 * rounding) and above > 3 * rounding


def evaluate(backend: str, logits, labels=None, *, alpha=1.0, beta=1.0, ce=(False, False), scale=1.0, **settings):
    """Loss, gradients of ``scale * loss`` and kept counts. The cross-entropies are off: they would drown the graphs."""
    students = [x.detach().requires_grad_() for x in logits[:2]]
    loss, terms = VF.vrm_loss(
        *students, *logits[2:], labels, alpha, beta, *ce, backend=backend, return_terms=True, **settings
    )
    grads = torch.autograd.grad(loss * scale, students)
    return Result(loss.detach(), grads, (int(terms["kept_inter_sample"]), int(terms["kept_inter_class"])))


def evaluate_relation(backend: str, vectors, **settings) -> Result:
    students = [x.detach().requires_grad_() for x in vectors[:2]]
    loss = VF.relation_loss(*students, *vectors[2:], backend=backend, **settings)
    return Result(loss.detach(), torch.autograd.grad(loss, students))


def relative_error(x: torch.Tensor, oracle: torch.Tensor) -> float:
    """``||x - oracle|| / ||oracle||`` in float64; infinite where the oracle is zero and ``x`` is not, or on NaN."""
    difference, size = float((x.double() - oracle.double()).norm()), float(oracle.double().norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and difference == difference else float("inf")


def errors(result: Result, oracle: Result) -> dict[str, float]:
    named = {"loss": (result.loss, oracle.loss)}
    named |= {f"grad {k}": pair for k, pair in enumerate(zip(result.grads, oracle.grads, strict=True))}
    return {name: relative_error(*pair) for name, pair in named.items()}


def assert_close(result: Result, oracle: Result, eager: Result, floor: float, uncancelled=None) -> None:
    """The comparator: each error within twice the eager class's own or ``floor``; the kept edges the same.

    A gradient is orthogonal to its edge, and where it is next to nothing (one dimension; a student opposite to its
    teacher) all that is left in any arithmetic is what its terms cancelled to: ``uncancelled()`` gives their size, of
    which a few roundings are then allowed. The loss is half the square of residuals that are differences of relations,
    of length 1: a rounding of those is allowed too, and is more than ``floor`` where the residuals are next to nothing.
    """
    assert result.kept == oracle.kept, f"kept {result.kept} edges, the oracle {oracle.kept}"
    allowed = errors(eager, oracle)
    for k, (name, error) in enumerate(errors(result, oracle).items()):
        bound = max(2 * allowed[name], floor)
        if k == 0 and 0 < float(oracle.loss) < 1:
            bound += ROUNDINGS * torch.finfo(result.loss.dtype).eps / float(oracle.loss) ** 0.5
        if error > bound and uncancelled is not None and k > 0:
            size = float(oracle.grads[k - 1].norm())
            bound += ROUNDINGS * torch.finfo(result.loss.dtype).eps * float(uncancelled().grads[k - 1].norm()) / size
        assert error <= bound, f"{name}: relative error {error:.2e} over {bound:.2e} (eager {allowed[name]:.2e})"


def _relations_of_fixed_length(a, b, eps, exclude_self=False):
    # A vertex's difference to itself is zero, and so is this.
    difference = a[:, None] - b[None]
    return difference / (difference.detach().norm(dim=-1, keepdim=True) + eps)


def expected(tensors, run=evaluate, **settings):
    """What :func:`assert_close` needs: the oracle in float64, the eager class in the dtype at hand, and the terms."""
    wide = [x.double() for x in tensors]
    wide_settings = dict(settings)
    if settings.get("probs") is not None:
        wide_settings["probs"] = tuple(x.double() for x in settings["probs"])

    def uncancelled():
        with mock.patch.object(reference, "relations", _relations_of_fixed_length):
            return run("reference", wide, **wide_settings)

    return run("reference", wide, **wide_settings), run("reference", tensors, **settings), uncancelled


def compare(backend: str, tensors, floor: float, run=evaluate, **settings) -> Result:
    """Run the backend and judge it."""
    oracle, eager, uncancelled = expected(tensors, run, **settings)
    result = run(backend, tensors, **settings)
    assert_close(result, oracle, eager, floor, uncancelled)
    return result


@functools.lru_cache(maxsize=512)
def expected_of(case: Case, dtype: torch.dtype, alpha: float, beta: float):
    return expected(inputs(case, dtype), alpha=alpha, beta=beta, **settings_of(case))


def settings_of(case: Case) -> dict:
    return {"unreliable_pruning_percentile": case.percentile, "relations": case.relations, "delta": case.delta}


def assert_parity(backend: str, case: Case, dtype=torch.float32, floors=FLOOR, layout=lambda x: x) -> None:
    """Each graph alone, so that neither hides the other's error; ``layout`` re-lays the logits, values unchanged."""
    for alpha, beta in GRAPH_WEIGHTS:
        oracle, eager, uncancelled = expected_of(case, dtype, alpha, beta)
        logits = [layout(x) for x in inputs(case, dtype)]
        result = evaluate(backend, logits, alpha=alpha, beta=beta, **settings_of(case))
        assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(grad.dtype == dtype and grad.shape == case.shape for grad in result.grads)
        assert_close(result, oracle, eager, floors[dtype], uncancelled)


def modes(shape: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
    """Both kinds of graph. Complete ones have the vertices of both views on either side: half of the samples, or of the
    classes where those are more, make as many."""
    b, c = shape
    return [("inter_view", shape), ("complete", ((b + 1) // 2, c) if b > c else (b, (c + 1) // 2))]


def make_labels(b: int, c: int, kind: str = "indices", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    if kind == "probabilities":
        return F.softmax(torch.randn(b, c, generator=generator), 1)
    return torch.randint(c, (b,), generator=generator)


def poisoned(logits, tensor, index, value):
    logits = [x.clone() for x in logits]
    logits[tensor].view(-1)[index] = value
    return logits
