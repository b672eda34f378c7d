"""The picture of the relations: its numbers are those of the loss, and it is written for many classes, too."""

import math

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import vrm_kernels.functional as VF
from vrm_distill import relations
from vrm_distill.data import open_dataset
from vrm_distill.models import create_model
from vrm_distill.settings import Settings

B, C = 12, 4
LABELS = torch.arange(B) * C // B


def _logits(seed, classes=C):
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(B, classes, generator=generator) for _ in range(2))


def _graph(by_class, percentile=30.0, kind="inter_view"):
    return relations.graph(_logits(0), _logits(1), _logits(2), LABELS, by_class, percentile, kind)


@pytest.mark.parametrize("by_class", [False, True])
def test_kept_losses_add_up_to_the_loss(by_class):
    """The mean mismatch of the kept edges is the loss's own term, and as many are kept."""
    graph = _graph(by_class)
    assert graph.classes == (list(range(C)) if by_class else LABELS.tolist())
    for look, student in ((graph.before, _logits(1)), (graph.after, _logits(2))):
        _, terms = VF.vrm_loss(*student, *_logits(0), LABELS, 1.0, 1.0, backend="reference", return_terms=True)
        name = "inter_class" if by_class else "inter_sample"
        assert int(look.kept.sum()) == int(terms[f"kept_{name}"])
        torch.testing.assert_close(look.loss[look.kept].mean(), terms[name])


def test_relations_are_cosines_with_the_own_class():
    sample, klass = _graph(False), _graph(True)
    s, v = _logits(2)
    t, u = _logits(0)
    for (real, virtual), of_samples, of_classes in (
        ((s, v), sample.after.relation, klass.after.relation),
        ((t, u), sample.teacher, klass.teacher),
    ):
        for i in range(B):
            for j in range(B):
                d = real[i] - virtual[j]
                assert float(of_samples[i, j]) == pytest.approx(float(d[LABELS[i]] / d.norm()), abs=1e-5)
        for k in range(C):
            for m in range(C):
                d = real[:, k] - virtual[:, m]
                mine = [i for i in range(B) if int(LABELS[i]) == k]
                own = float(d[mine].sum()) / math.sqrt(len(mine))
                assert float(of_classes[k, m]) == pytest.approx(own / float(d.norm()), abs=1e-5)


@pytest.mark.parametrize("by_class", [False, True])
def test_complete_edges_are_ranked_with_those_within_a_view(by_class):
    s, v = (x.softmax(1) for x in _logits(2))
    p = torch.cat((s.t(), v.t()) if by_class else (s, v))
    n = len(p)
    entropy = torch.tensor([[float(-(p[i] * (p[j] + 1e-7).log()).sum()) for j in range(n)] for i in range(n)])
    apart = ~torch.eye(n, dtype=torch.bool)
    kept = (entropy <= entropy[apart].quantile(0.3)) & apart
    assert torch.equal(_graph(by_class, kind="complete").after.kept, kept[: n // 2, n // 2 :])
    assert not torch.equal(_graph(by_class).after.kept, kept[: n // 2, n // 2 :])


def test_of_many_classes_those_of_the_images_are_shown(monkeypatch):
    """The edges shown are those of the whole graph, and where it is too large those among the classes shown."""
    logits = [_logits(seed, classes=300) for seed in range(3)]
    labels = 70 * LABELS
    graph = relations.graph(*logits, labels, True, 30.0, "inter_view")
    assert graph.classes == [0, 70, 140, 210]
    p, q = (x.softmax(1).t() for x in logits[2])
    entropy = -(p @ (q + 1e-7).log().t())
    torch.testing.assert_close(graph.after.kept, (entropy <= VF.quantile(entropy, 0.3))[::70, ::70][:4, :4])
    monkeypatch.setattr(relations, "RANKED", 299)
    few = relations.graph(*logits, labels, True, 30.0, "inter_view")
    entropy = entropy[::70, ::70][:4, :4].contiguous()
    assert torch.equal(few.after.kept, entropy <= VF.quantile(entropy, 0.3))
    assert torch.equal(few.after.loss, graph.after.loss)


def test_images_are_sorted_and_evenly_of_their_classes():
    labels = torch.arange(1000) % 7
    images, chosen = relations.pick(TensorDataset(torch.arange(1000), labels))
    assert torch.equal(labels[images], chosen) and torch.equal(chosen, chosen.sort().values)
    assert chosen.unique(return_counts=True)[1].tolist() == [relations.IMAGES // 7] * 7
    _, chosen = relations.pick(TensorDataset(torch.arange(1000), torch.arange(1000) % 100))
    assert len(chosen.unique()) == relations.CLASSES and len(chosen) <= relations.IMAGES
    _, chosen = relations.pick(TensorDataset(torch.arange(3), torch.tensor([2, 0, 1])))
    assert chosen.tolist() == [0, 1, 2]


def test_a_student_that_is_the_teacher_has_no_mismatch(tmp_path):
    data = open_dataset("digits", train_images=100)
    torch.manual_seed(0)
    teacher, other = (create_model("conv_8_16_16", 1, 10) for _ in range(2))
    assert any(isinstance(module, nn.BatchNorm2d) for module in other.modules())
    for _ in range(200):  # statistics for the teacher's batch norm
        teacher(data.normalized(data.train[torch.arange(100)][0]))
    found = relations.compare(teacher, other, teacher, data, Settings(), 0, torch.device("cpu"))
    for graph in (found.inter_sample, found.inter_class):
        assert float(graph.after.loss.max()) == 0 < float(graph.before.loss.mean())
        assert torch.equal(graph.after.relation, graph.teacher)
    relations.plot(tmp_path / "relations.png", Settings(), found)
    assert (tmp_path / "relations.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
