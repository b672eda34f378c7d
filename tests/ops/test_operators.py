"""The custom operators hold what PyTorch asks of an operator: schema, fake kernel, autograd, no aliasing."""

import parity_suite
import pytest
import torch
from helpers import DTYPES, GRAPH_SETTINGS, MODES, Case, make_labels, make_logits
from parity_suite import check_vrm_loss

import vrm_kernels.functional as VF
from vrm_kernels import backends
from vrm_kernels.backends.contract import compute_dtype
from vrm_kernels.distributed import loss as distributed  # noqa: F401  registers its operator

PUBLIC = {"vrm_loss", "relation_graph", "vrm_loss_distributed"}  # the last in test_distributed.py
CPP = {
    "cpu_vrm_loss",
    "cpu_relation_graph",
    "cpu_quantile",
    "cpu_joint_entropy",
    "cpu_count_digits",
    "cpu_split",
    "cpu_relation_share",
}
CUDA = {
    "cuda_vrm_loss", "cuda_relation_loss", "cuda_vrm_graphs", "cuda_relation_graph", "cuda_count_digits", "cuda_digits",
    "cuda_relation_share",
}  # fmt: skip
CUDA |= {"cuda_refusal"}  # takes no tensor; called in tests/backends/cuda/test_host.py
# Nothing to check: no fake kernel, no gradient.
WITHOUT_TENSORS = {
    "cpu_isa", "cpu_select_isa", "cpu_set_edges_form", "cpu_take_stage_seconds", "cpu_built_from",
    "cuda_built_from",
}  # fmt: skip


class TestOperators(parity_suite.Operators):
    """On every backend."""


def test_every_operator_is_checked_here(any_backend):
    VF.relation_loss(*make_logits(Case((4, 3)), torch.float32, 0), backend=any_backend)  # loads what registers late
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vrm_kernels::")}
    assert {f"vrm_kernels::{name}" for name in PUBLIC} <= registered
    assert registered <= {f"vrm_kernels::{name}" for name in PUBLIC | CPP | CUDA | WITHOUT_TENSORS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("need_grad", [False, True])
def test_opcheck_vrm_loss(backend, need_grad, relations, dtype):
    check_vrm_loss(backend, (6, 5), need_grad, relations, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize(("need_grad", "exclude_self"), [(False, False), (True, False), (True, True)])
def test_opcheck_relation_graph(backend, exclude_self, need_grad, ranked, dtype):
    a, b, teacher_a, teacher_b = make_logits(Case((6, 5)), dtype, 0)
    p, q = torch.rand(6, 4).softmax(1), torch.rand(6, 4).softmax(1)
    if exclude_self:
        b, teacher_b, q = a.clone(), teacher_a.clone(), p.clone()
    else:
        b, teacher_b, q = b[:4].clone(), teacher_b[:4], q[:4]
    a.requires_grad_(need_grad)
    b.requires_grad_(need_grad)
    probs = (p, q) if ranked else (None, None)
    arguments = (*GRAPH_SETTINGS._replace(exclude_self=exclude_self), need_grad, backend)
    torch.library.opcheck(torch.ops.vrm_kernels.relation_graph, (a, b, teacher_a, teacher_b, *probs, *arguments))


# ---- the compiled ones, which have no autograd of their own -------------------------------------------------------


@pytest.fixture
def cpp():
    usable, note = backends.REGISTRY["cpp"].status()
    if not usable:
        pytest.skip(note)
    backends.REGISTRY["cpp"].load()
    return torch.ops.vrm_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("need_grad", [False, True])
def test_opcheck_cpu_vrm_loss(cpp, need_grad, complete, dtype):
    logits = [x.t().contiguous().t() for x in make_logits(Case((6, 5)), dtype, 0)]
    weight = torch.rand(5, dtype=compute_dtype(*logits))
    for keep_all in (False, True):
        arguments = (2.0, 0.5, True, True, [9, 7], [0.5, 0.25], keep_all, 1.0, 1e-7, complete, 0.1, -100, need_grad)
        torch.library.opcheck(cpp.cpu_vrm_loss, (*logits, make_labels(6, 5), weight, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need_grad", [False, True])
def test_opcheck_cpu_relation_graph(cpp, need_grad, dtype):
    a, b, teacher_a, teacher_b = make_logits(Case((6, 5)), dtype, 0)
    for probs in ((torch.rand(6, 4).softmax(1), torch.rand(4, 4).softmax(1)), (None, None)):
        arguments = (7, 0.5, 1.0, 1e-7, False, need_grad)
        torch.library.opcheck(cpp.cpu_relation_graph, (a, b[:4], teacher_a, teacher_b[:4], *probs, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_opcheck_cpu_quantile(cpp, shape, dtype):
    below, weight = torch.full(shape, 4), torch.full(shape, 0.5, dtype=dtype)
    torch.library.opcheck(cpp.cpu_quantile, (torch.randn(11, dtype=dtype), below, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_cpu_operators_of_a_share(cpp, dtype):
    a, b, teacher_a, teacher_b = make_logits(Case((6, 5)), dtype, 0)
    p, q = a.softmax(1)[:4].t(), b.softmax(1).t()[:, :4]
    torch.library.opcheck(cpp.cpu_joint_entropy, (p, q))
    entropy = cpp.cpu_joint_entropy(p, q)
    torch.library.opcheck(cpp.cpu_count_digits, (entropy, torch.tensor([0, -3]), 8, 11))
    torch.library.opcheck(cpp.cpu_split, (entropy, 0.5, 1.5))
    for need_grad in (False, True):
        grads = [torch.zeros_like(x) if need_grad else x.new_empty(0) for x in (a.t(), b.t())]
        for ranked in ((p, q, None), (None, None, entropy), (None, None, None)):
            arguments = (
                *(x.t() for x in (a, b, teacher_a, teacher_b)),
                *ranked,
                *grads,
                1.5,
                7,
                25.0,
                2.0,
                1.0,
                1e-7,
                False,
            )
            torch.library.opcheck(cpp.cpu_relation_share, (*arguments, need_grad))


def test_a_share_takes_entropies_of_any_strides_and_refuses_other_shapes(cpp):
    a, b = torch.randn(5, 4), torch.randn(6, 4)
    entropy = cpp.cpu_joint_entropy(a.softmax(1), b.log_softmax(1))
    good = [a, b, a, b, None, None, entropy, a.clone(), b.clone(), 1.5, 7, 30.0, 2.0, 1.0, 1e-7, False, True]
    expected = cpp.cpu_relation_share(*good)
    for other in (entropy.contiguous(), entropy.t().contiguous().t()):  # without room behind their rows
        assert torch.equal(cpp.cpu_relation_share(*good[:6], other, *good[7:]), expected)
    for at, wrong, said in (
        (6, entropy[:, :3], r"entropy must be \[5, 6\] of Float, not \[5, 3\] of Float"),
        (6, entropy.double(), r"entropy must be \[5, 6\] of Float, not \[5, 6\] of Double"),
        (7, torch.zeros(2, 2), r"grad_a must be \[5, 4\] of Float, not \[2, 2\] of Float"),
        (8, torch.zeros(6, 4).half(), r"grad_b must be \[6, 4\] of Float, not \[6, 4\] of Half"),
    ):
        with pytest.raises(RuntimeError, match=said):
            cpp.cpu_relation_share(*good[:at], wrong, *good[at + 1 :])
