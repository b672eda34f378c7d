"""The oracle itself: against Python loops over floats, finite differences, and torch's own gradient checks."""

import math

import pytest
import torch
from helpers import MODES, Case, evaluate, make_labels, make_logits, mask_is_settled, relative_error
from torch.autograd import gradcheck, gradgradcheck

import vrm_kernels.functional as VF

B, C = 4, 3
EPS = 1e-7


def literal_softmax(row):
    exps = [math.exp(x - max(row)) for x in row]
    return [x / sum(exps) for x in exps]


def literal_relation(x, y):
    difference = [p - q for p, q in zip(x, y, strict=True)]
    norm = math.sqrt(sum(d * d for d in difference))
    return [d / (norm + EPS) for d in difference]


def literal_huber(x, delta):
    return x * x / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2)


def literal_graph(a, b, ta, tb, p, q, percentile, delta, exclude_self):
    edges = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (exclude_self and i == j)]
    entropy = {(i, j): -sum(x * math.log(y + EPS) for x, y in zip(p[i], q[j], strict=True)) for i, j in edges}
    ordered = sorted(entropy.values())
    position = percentile / 100 * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    threshold = low + (high - low) * (position - math.floor(position))
    kept = [edge for edge in edges if entropy[edge] <= threshold]
    total = 0.0
    for i, j in kept:
        relations = zip(literal_relation(a[i], b[j]), literal_relation(ta[i], tb[j]), strict=True)
        total += sum(literal_huber(s - t, delta) for s, t in relations)
    return total / (len(kept) + EPS), len(kept)


def literal_loss(logits, labels, alpha, beta, percentile, delta, relations):
    s, v, t, u = (x.tolist() for x in logits)
    p, q = [literal_softmax(row) for row in s], [literal_softmax(row) for row in v]
    graphs = []
    for transpose in (False, True):
        sets = [[list(column) for column in zip(*x, strict=True)] if transpose else x for x in (s, v, t, u, p, q)]
        if relations == "complete":
            student, teacher, probs = (sets[k] + sets[k + 1] for k in (0, 2, 4))
            sets = [student, student, teacher, teacher, probs, probs]
        graphs.append(literal_graph(*sets, percentile, delta, relations == "complete"))
    ce = [-sum(math.log(rows[i][y]) for i, y in enumerate(labels.tolist())) / B for rows in (p, q)]
    (sample, kept_sample), (classes, kept_class) = graphs
    return sum(ce) + alpha * sample + beta * classes, (kept_sample, kept_class)


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("percentile", [0.0, 1.0, 30.0, 50.0, 100.0])
@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_reference_is_the_written_formula(relations, percentile, delta):
    logits = make_logits(Case((B, C)), torch.float64, seed=3)
    labels = make_labels(B, C)
    expected, kept = literal_loss(logits, labels, 2.0, 0.5, percentile, delta, relations)
    settings = {"unreliable_pruning_percentile": percentile, "delta": delta, "relations": relations}
    result = evaluate("reference", logits, labels, alpha=2.0, beta=0.5, ce=(True, True), **settings)
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    assert result.kept == kept

    for view in (0, 1):
        slopes = torch.zeros(B, C, dtype=torch.float64)
        for i, c in [(0, 0), (1, 2), (3, 1)]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = [x.clone() for x in logits]
                moved[view][i, c] += step
                ends.append(literal_loss(moved, labels, 2.0, 0.5, percentile, delta, relations)[0])
            slopes[i, c] = (ends[0] - ends[1]) / 2e-6
            assert float(result.grads[view][i, c]) == pytest.approx(float(slopes[i, c]), rel=1e-6, abs=1e-8)


def _settled(percentile, relations):
    for seed in range(100):
        logits = make_logits(Case((B, C)), torch.float64, seed)
        if mask_is_settled(logits, percentile, relations):
            return logits
    raise AssertionError("no settled mask")


@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("percentile", [30.0, 100.0])
def test_reference_gradcheck_and_gradgradcheck(relations, percentile):
    *students, teacher_real, teacher_virtual = _settled(percentile, relations)
    labels = make_labels(B, C)

    def loss(real, virtual):
        return VF.vrm_loss(
            real, virtual, teacher_real, teacher_virtual, labels, 2.0, 0.5, True, True, percentile,
            relations=relations, backend="reference",
        )  # fmt: skip

    students = [x.requires_grad_() for x in students]
    assert gradcheck(loss, students)
    assert gradgradcheck(loss, students)


def test_a_zero_difference_has_gradient_one_over_eps(any_backend):
    x = torch.tensor([[0.5, -1.0, 2.0]])
    teacher_b = torch.tensor([[1.0, 2.0, -2.0]])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = VF.relation_loss(a, b, torch.zeros(1, 3), teacher_b, backend=any_backend)
    loss.backward()
    teacher = -teacher_b / (3.0 + EPS)  # the teacher's relation: its difference has norm 3
    assert float(loss) == pytest.approx(0.5, rel=1e-6)
    assert relative_error(a.grad, -teacher / EPS) < 1e-5
    assert relative_error(b.grad, teacher / EPS) < 1e-5


def test_half_precision_is_computed_in_float32(any_backend):
    logits = make_logits(Case((5, 4)), torch.float16, seed=0)
    half = evaluate(any_backend, logits, unreliable_pruning_percentile=100.0)
    single = evaluate(any_backend, [x.float() for x in logits], unreliable_pruning_percentile=100.0)
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, single.loss)
    for grad, wide in zip(half.grads, single.grads, strict=True):
        assert torch.equal(grad, wide.half())
