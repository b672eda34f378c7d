"""The method's options: several virtual views, KD's term beside the relations, z-scores of the logits."""

import pytest
import torch
from distill_helpers import QUICK, SHORT, read_log, train

from vrm_distill import cli
from vrm_distill.data import Views, mixup, open_dataset
from vrm_distill.engine import cross_entropy_loss, distillation_loss, hinton_divergence
from vrm_distill.models import create_model
from vrm_kernels import VRMLoss
from vrm_kernels.data import both_views

B, VIRTUAL = 12, 3


@pytest.fixture(scope="module")
def data():
    return open_dataset("digits", train_images=128)


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [create_model(name, 1, 10).eval() for name in ("conv_8_16_16", "conv_3_6_6")]


def _draw(views, images):
    torch.manual_seed(3)
    return views(images)


def test_more_virtual_views_leave_the_first_ones_as_they_are(data):
    images, _ = data.train[torch.arange(B)]
    real, virtual = _draw(Views(data), images)
    same_real, many = _draw(Views(data, virtual_views=VIRTUAL), images)
    assert torch.equal(real, same_real) and many.shape == (VIRTUAL * B, *images.shape[1:])
    first, second, third = many.chunk(VIRTUAL)
    assert torch.equal(first, virtual) and not torch.equal(second, third) and not torch.equal(first, second)


def test_the_loss_is_the_mean_over_the_virtual_views_with_kd_for_each(data, models):
    images, labels = data.train[torch.arange(B)]
    real, virtual = _draw(Views(data, virtual_views=VIRTUAL), images)
    teacher, student = models
    vrm = VRMLoss(4.0, 2.0)
    loss, terms = distillation_loss(teacher, student, real, virtual, labels, vrm, kd_weight=0.5)
    pairs = [(both_views(student, real, v), both_views(teacher, real, v)) for v in virtual.chunk(VIRTUAL)]
    singles = [vrm(*s, *t, labels, return_terms=True) for s, t in pairs]
    divergences = [hinton_divergence(pairs[0][0][0], pairs[0][1][0])]
    divergences += [sum(hinton_divergence(s[1], t[1]) for s, t in pairs) / VIRTUAL]
    expected = sum(single for single, _ in singles) / VIRTUAL + 0.5 * sum(divergences)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["kd"], sum(divergences).detach())
    for name in ("ce_real", "ce_virtual", "inter_sample", "inter_class"):
        torch.testing.assert_close(terms[name], sum(t[name] for _, t in singles) / VIRTUAL)
    torch.testing.assert_close(
        terms["kept_inter_sample"], sum(t["kept_inter_sample"] for _, t in singles) / VIRTUAL / B**2
    )
    alone, alone_terms = cross_entropy_loss(student, real, virtual, labels, "both")
    torch.testing.assert_close(alone_terms["ce_virtual"], terms["ce_virtual"])
    torch.testing.assert_close(alone.detach(), terms["ce_real"] + terms["ce_virtual"])


def test_kd_is_off_by_default(data, models):
    images, labels = data.train[torch.arange(B)]
    real, virtual = _draw(Views(data), images)
    vrm = VRMLoss(4.0, 2.0)
    teacher, student = models
    loss, terms = distillation_loss(teacher, student, real, virtual, labels, vrm)
    assert torch.equal(loss, vrm(*both_views(student, real, virtual), *both_views(teacher, real, virtual), labels))
    assert "kd" not in terms


def test_mixup_mixes_every_virtual_view_with_the_same_partners():
    real, labels = torch.rand(B, 1, 2, 2), torch.arange(B) % 10
    torch.manual_seed(1)
    one = mixup(real, real, labels, 10, 0.5)
    torch.manual_seed(1)
    mixed, virtual, targets = mixup(real, torch.cat((real, 2 * real)), labels, 10, 0.5)
    assert torch.equal(mixed, one[0]) and torch.equal(targets, one[2])
    torch.testing.assert_close(virtual, torch.cat((mixed, 2 * mixed)))


def test_a_run_with_all_of_them(tmp_path):
    options = ["--virtual-views=2", "--kd-weight=1", "--normalize=zscore", "--mixup=0.2", "--seeds=1"]
    assert train(*QUICK, *SHORT, *options, "--output-dir", tmp_path / "run") == 0
    rows = read_log(tmp_path / "run")
    distilled = [row for row in rows if row["method"] == "distilled"]
    assert distilled and all(float(row["kd"]) > 0 for row in distilled)
    assert all(row["kd"] == "" for row in rows if row["method"] != "distilled")


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("--virtual-views=0", "--virtual-views: must be at least 1"),
        ("--kd-weight=-1", "--kd-weight: must be >= 0"),
        ("--normalize=l2", "--normalize: invalid choice"),
    ],
)
def test_what_is_out_of_range_is_refused(option, wanted, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main([option, "--output-dir", str(tmp_path / "run")])
    assert wanted in capsys.readouterr().err
