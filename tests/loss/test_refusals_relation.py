"""What relation_loss and joint_entropy refuse."""

import pytest
import torch

import vrm_kernels.functional as VF

M, N, D, K = 4, 5, 3, 6
GOOD = [(M, D), (N, D), (M, D), (N, D)]


def tensors(shapes):
    return [torch.zeros(shape) for shape in shapes]


def probs(m=M, n=N, k=K, other_k=None):
    return torch.ones(m, k) / k, torch.ones(n, other_k or k) / k


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ([(M,), (N, D), (M, D), (N, D)], "every tensor must be 2-D, got a "),
        ([(M, D), (N, D, 1), (M, D), (N, D)], "every tensor must be 2-D, got a "),
        ([(M, D), (N, D), (M + 1, D), (N, D)], r"a and teacher_a must be \[M, D\].*a \(4, 3\).*teacher_a \(5, 3\)"),
        ([(M, D), (N, D), (M, D), (N - 1, D)], r"b and teacher_b \[N, D\], got .*teacher_b \(4, 3\)"),
        ([(M, D), (N, D + 1), (M, D), (N, D + 1)], r"must be \[M, D\]"),
        (
            [(M, D), (N, D), (M, D + 1), (N, D + 1)],
            r"must be \[M, D\].* component by component, which 3 and 4 dimensions do not allow. Project one of them",
        ),
        ([(0, D), (N, D), (0, D), (N, D)], "at least one vertex a side"),
        ([(M, D), (0, D), (M, D), (0, D)], "at least one vertex a side"),
        ([(M, 0), (N, 0), (M, 0), (N, 0)], "at least one vertex a side and one dimension"),
    ],
)
def test_shapes(shapes, match):
    with pytest.raises(ValueError, match=match):
        VF.relation_loss(*tensors(shapes))


@pytest.mark.parametrize(
    ("pair", "match"),
    [
        (probs(m=M + 1), r"probs must be \(\[M, K\], \[N, K\]\)"),
        (probs(n=N + 1), r"probs must be \(\[M, K\], \[N, K\]\)"),
        (probs(other_k=K + 1), r"probs must be \(\[M, K\], \[N, K\]\)"),
        ((torch.zeros(M, 0), torch.zeros(N, 0)), r"probs must be \(\[M, K\], \[N, K\]\)"),
        ((torch.zeros(M), torch.zeros(N)), "every tensor must be 2-D"),
        (torch.zeros(2, M, K), "probs must be a pair"),
        (probs() + probs(), "probs must be a pair"),
    ],
)
def test_probs(pair, match):
    with pytest.raises(ValueError, match=match):
        VF.relation_loss(*tensors(GOOD), probs=pair)


def test_probs_that_are_not_floating():
    with pytest.raises(TypeError, match=r"probs\[1\] must be floating .* got torch.int64"):
        VF.relation_loss(*tensors(GOOD), probs=(torch.zeros(M, K), torch.zeros(N, K, dtype=torch.int64)))


def test_devices_and_dtypes():
    a, b, teacher_a, teacher_b = tensors(GOOD)
    with pytest.raises(ValueError, match="one device: .*teacher_b on meta"):
        VF.relation_loss(a, b, teacher_a, teacher_b.to("meta"))
    with pytest.raises(TypeError, match="teacher_a must be floating .* got torch.int32"):
        VF.relation_loss(a, b, teacher_a.int(), teacher_b)
    with pytest.raises(TypeError, match="b must be a torch.Tensor, got NoneType"):
        VF.relation_loss(a, None, teacher_a, teacher_b)


@pytest.mark.parametrize("settings", [{"percentile": -1.0}, {"percentile": 101.0}, {"percentile": float("nan")}])
def test_percentile(settings):
    with pytest.raises(ValueError, match=r"percentile must be in \[0, 100\], got"):
        VF.relation_loss(*tensors(GOOD), **settings)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan"), float("inf")])
def test_delta(delta):
    with pytest.raises(ValueError, match="delta must be > 0 and finite, got"):
        VF.relation_loss(*tensors(GOOD), delta=delta)


def test_backend():
    with pytest.raises(ValueError, match="unknown backend 'nope'"):
        VF.relation_loss(*tensors(GOOD), backend="nope")


@pytest.mark.parametrize("shapes", [[(4,), (4,)], [(4, 3), (4, 2)], [(4, 3), (3,)]], ids=str)
def test_joint_entropy_shapes(shapes):
    with pytest.raises(ValueError, match=r"expected \[B, C\] and \[B', C\], got"):
        VF.joint_entropy(*tensors(shapes))


def test_joint_entropy_types_and_devices():
    with pytest.raises(TypeError, match="logits_real must be floating"):
        VF.joint_entropy(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="one device"):
        VF.joint_entropy(torch.zeros(3, 2), torch.zeros(3, 2, device="meta"))
