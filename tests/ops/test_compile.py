"""torch.compile(loss, fullgraph=True): really compiled, really called, and equal to the eager call."""

import pytest
import torch
from helpers import MODES, Case, inputs, make_labels, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

import vrm_kernels
import vrm_kernels.functional as VF


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(criterion, logits, labels):
    students = [x.detach().clone().requires_grad_() for x in logits[:2]]
    loss = criterion(*students, *logits[2:], labels)
    loss.backward()
    return loss.detach(), *(x.grad for x in students)


def assert_same(compiled, eager, bound=1e-5):
    for x, y in zip(compiled, eager, strict=True):
        assert x.dtype == y.dtype and relative_error(x, y) < bound


def called_operators(counter):
    return {str(node.target) for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("relations", MODES)
def test_whole_loss_is_one_graph(any_backend, relations):
    """With the graph itself looked at: the backend's operator is in it, and it ran."""
    counter = CompileCounterWithBackend("aot_eager")
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, relations=relations, backend=any_backend)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    labels = make_labels(11, 7)
    for seed in (1400, 1500):
        logits = inputs(Case((11, 7), relations=relations, seed=seed), torch.float32)
        assert_same(step(compiled, logits, labels), step(criterion, logits, labels))
    assert counter.frame_count == 1
    if any_backend != "reference":
        assert "vrm_kernels.vrm_loss" in called_operators(counter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_changing_shapes(backend, dtype):
    """No more than one recompilation, to dynamic shapes; the numbers are right at each shape."""
    counter = CompileCounterWithBackend("aot_eager")
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=backend)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for b, c in [(11, 7), (16, 7), (5, 9), (23, 13), (8, 8)]:
        logits = inputs(Case((b, c), seed=1600), dtype)
        assert_same(step(compiled, logits, make_labels(b, c)), step(criterion, logits, make_labels(b, c)))
    assert counter.frame_count <= 3


def test_weights_that_change_are_not_compiled_in(backend):
    """A warm-up over 8 steps and as many batch sizes: one graph, and one for dynamic shapes."""
    counter = CompileCounterWithBackend("aot_eager")
    criterion = vrm_kernels.VRMLoss(torch.tensor(0.0), 0.5, backend=backend)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for k in range(8):
        criterion.alpha = torch.tensor(0.5 * k)
        logits, labels = inputs(Case((8 + k, 7), seed=1700), torch.float32), make_labels(8 + k, 7)
        eager = vrm_kernels.VRMLoss(0.5 * k, 0.5, backend=backend)
        assert_same(step(compiled, logits, labels), step(eager, logits, labels))
    assert counter.frame_count <= 2


def test_a_weight_out_of_range_is_refused_when_the_compiled_loss_runs(backend):
    criterion = vrm_kernels.VRMLoss(torch.tensor(1.0), 0.5, backend=backend)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    logits, labels = inputs(Case((8, 7), seed=1700), torch.float32), make_labels(8, 7)
    compiled(*logits, labels)
    criterion.alpha = torch.tensor(-1.0)
    with pytest.raises(ValueError, match=r"alpha must be >= 0 and finite, got -1.0"):
        compiled(*logits, labels)
    with pytest.raises(ValueError, match=r"alpha must be >= 0 and finite, got -1"):
        criterion(*logits, labels)


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones((), device="meta"), torch.ones((), requires_grad=True)])
def test_a_weight_must_be_a_plain_number(weight):
    with pytest.raises(ValueError, match="beta as a tensor must be 0-D, on the CPU"):
        vrm_kernels.VRMLoss(1.0, weight)


def test_inductor(backend):
    """The default compiler, with a model in front, and dynamic batch sizes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 7)
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=backend)

    def training_step(real, virtual, teacher, labels):
        return criterion(model(real), model(virtual), teacher, teacher, labels)

    compiled = torch.compile(training_step, fullgraph=True, dynamic=True)
    for b in (9, 14):
        batch = torch.randn(b, 12), torch.randn(b, 12), torch.randn(b, 7), make_labels(b, 7)
        results = []
        for function in (compiled, training_step):
            model.zero_grad()
            loss = function(*batch)
            loss.backward()
            results.append((loss.detach(), model.weight.grad.clone()))
        assert_same(*results)


def test_functions_compile_too(backend):
    logits = inputs(Case((11, 7), seed=1400), torch.float32)
    probs = tuple(x.softmax(1) for x in logits[:2])

    def relation(a, b, ta, tb, p, q):
        return VF.relation_loss(a, b, ta, tb, probs=(p, q), percentile=30.0, backend=backend)

    def with_terms(*views):
        return VF.vrm_loss(*views, None, 2.0, 0.5, False, False, backend=backend, return_terms=True)

    compiled = torch.compile(relation, fullgraph=True, backend="aot_eager")
    assert_same((compiled(*logits, *probs),), (relation(*logits, *probs),))
    (loss, terms), (eager_loss, eager_terms) = (
        f(*logits) for f in (torch.compile(with_terms, fullgraph=True, backend="aot_eager"), with_terms)
    )
    assert_same((loss, *terms.values()), (eager_loss, *eager_terms.values()))


def test_no_grad_and_autocast_inside_the_compiled_function(backend):
    logits = inputs(Case((11, 7), seed=1400), torch.bfloat16)
    criterion = vrm_kernels.VRMLoss(2.0, 0.5, backend=backend)
    labels = make_labels(11, 7)

    def evaluation(*views):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return criterion(*views, labels)

    loss = torch.compile(evaluation, fullgraph=True, backend="aot_eager")(*logits)
    assert not loss.requires_grad and loss.dtype == torch.float32
    assert_same((loss,), (evaluation(*logits),))


def test_backend_auto_compiles():
    criterion = vrm_kernels.VRMLoss(2.0, 0.5)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    logits = inputs(Case((11, 7), seed=1400), torch.float32)
    assert_same(step(compiled, logits, make_labels(11, 7)), step(criterion, logits, make_labels(11, 7)))


def test_changing_shapes_of_relation_loss(backend):
    counter = CompileCounterWithBackend("aot_eager")
    relation = torch.compile(lambda *x: VF.relation_loss(*x, backend=backend), fullgraph=True, backend=counter)
    for m, n, d in [(4, 5, 3), (6, 9, 8), (7, 10, 12), (9, 4, 11)]:
        vectors = [torch.randn(k, d) for k in (m, n, m, n)]
        assert_same((relation(*vectors),), (VF.relation_loss(*vectors, backend=backend),))
    assert counter.frame_count <= 2
