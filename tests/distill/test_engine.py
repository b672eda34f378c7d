"""train_one_epoch and validate: any loader of (real, virtual, labels), any model, any loss of VRMLoss's signature."""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vrm_distill import recipe, train_alone_one_epoch, train_one_epoch, validate
from vrm_kernels import DualViewDataset, VRMLoss

CLASSES, FEATURES = 4, 6
TERMS = {"ce_real", "ce_virtual", "inter_sample", "inter_class", "kept_inter_sample", "kept_inter_class"}


def _loader(batch_size=16, samples=72):
    """Noisy one-hot blobs; the last batch is smaller than the others."""
    labels = torch.arange(samples) % CLASSES
    images = F.one_hot(labels, FEATURES) + 0.4 * torch.randn(samples, FEATURES)
    views = DualViewDataset(TensorDataset(images, labels), None, lambda x: x + 0.1 * torch.randn_like(x))
    return DataLoader(views, batch_size=batch_size, shuffle=True)


def _model(width=8):
    return nn.Sequential(nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, CLASSES))


def _teacher(loader):
    teacher = _model(32)
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for _ in range(10):
        train_alone_one_epoch(teacher, loader, optimizer, "cpu")
    return teacher


def test_student_learns_and_teacher_does_not_change():
    loader = _loader()
    teacher, student = _teacher(loader), _model()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    for p in teacher.parameters():
        p.grad = None
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    start = validate(student, loader, "cpu")
    losses = [train_one_epoch(teacher, student, loader, VRMLoss(4.0, 2.0), optimizer, "cpu")["loss"] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    assert validate(student, loader, "cpu") > max(0.9, start)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_returns_sample_weighted_means():
    loader = list(_loader())
    assert loader[-1][2].shape[0] < loader[0][2].shape[0]
    teacher, student = _model(), nn.Linear(FEATURES, CLASSES)
    loss_fn = VRMLoss(3.0, 5.0)
    means = train_one_epoch(teacher, student, loader, loss_fn, torch.optim.SGD(student.parameters(), lr=0.0), "cpu")
    assert set(means) == TERMS | {"loss"}
    expected, samples = 0.0, 0
    with torch.no_grad():
        for real, virtual, labels in loader:
            loss = loss_fn(student(real), student(virtual), teacher(real), teacher(virtual), labels)
            expected, samples = expected + loss.item() * len(labels), samples + len(labels)
    assert means["loss"] == pytest.approx(expected / samples, rel=1e-3)
    total = means["ce_real"] + means["ce_virtual"] + 3 * means["inter_sample"] + 5 * means["inter_class"]
    assert means["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("relations", ["inter_view", "complete"])
def test_kept_terms_are_fractions_of_the_edges(relations):
    loader, teacher, student = _loader(samples=64), _model(), _model()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)

    def kept(percentile):
        loss_fn = VRMLoss(1.0, 1.0, unreliable_pruning_percentile=percentile, relations=relations)
        means = train_one_epoch(teacher, student, loader, loss_fn, optimizer, "cpu")
        return means["kept_inter_sample"], means["kept_inter_class"]

    assert kept(100) == (1.0, 1.0)
    sample, classes = kept(25)
    assert sample == pytest.approx(0.25, abs=0.01)
    assert 0 < classes < 0.5


def test_any_loss_with_that_signature():
    loader, teacher, student = _loader(), _model(), _model()

    def loss_fn(student_real, student_virtual, teacher_real, teacher_virtual, labels):
        return F.cross_entropy(student_real, labels) + F.mse_loss(student_virtual, teacher_virtual)

    means = train_one_epoch(teacher, student, loader, loss_fn, torch.optim.SGD(student.parameters(), 0.1), "cpu")
    assert set(means) == {"loss"}


def test_views_of_different_shapes():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, CLASSES))
    batch = torch.rand(8, 1, 6, 6), torch.rand(8, 1, 4, 4), torch.arange(8) % CLASSES
    means = train_one_epoch(pool, pool, [batch], VRMLoss(1.0, 1.0), torch.optim.SGD(pool.parameters(), 0.1), "cpu")
    assert means["loss"] > 0


def test_no_relations_is_cross_entropy_alone_on_both_views():
    loader, teacher = list(_loader()), _model()
    torch.manual_seed(1)
    distilled = _model()
    torch.manual_seed(1)
    alone = _model()
    train_one_epoch(teacher, distilled, loader, VRMLoss(0.0, 0.0), torch.optim.SGD(distilled.parameters(), 0.1), "cpu")
    train_alone_one_epoch(alone, loader, torch.optim.SGD(alone.parameters(), 0.1), "cpu")
    for a, b in zip(distilled.state_dict().values(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_real_view_alone_never_sees_the_virtual_view():
    batches = [(real, torch.full_like(real, torch.nan), labels) for real, _, labels in _loader()]
    model = _model()
    means = train_alone_one_epoch(model, batches, torch.optim.SGD(model.parameters(), 0.1), "cpu", views="real")
    assert set(means) == {"loss", "ce_real"}
    assert all(torch.isfinite(x).all() for x in model.state_dict().values())


def test_validate_judges_the_real_view_and_keeps_the_mode():
    real, labels = torch.eye(CLASSES), torch.arange(CLASSES)
    student = nn.Identity().train()
    assert validate(student, [(real, labels)], "cpu") == 1.0
    assert validate(student, [(real, real.flip(0), labels)], "cpu") == 1.0
    assert validate(student, [(real.flip(0), real, labels)], "cpu") == 0.0
    assert validate(student, [(real, labels), (real[:2].flip(0), labels[:2])], "cpu") == pytest.approx(4 / 6)
    assert student.training


def test_empty_loader_and_unknown_views_are_refused():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="no batch"):
        train_one_epoch(model, model, [], VRMLoss(1.0, 1.0), optimizer, "cpu")
    with pytest.raises(ValueError, match="no batch"):
        train_alone_one_epoch(model, [], optimizer, "cpu")
    with pytest.raises(ValueError, match="no sample"):
        validate(model, [], "cpu")
    with pytest.raises(ValueError, match="'virtual'"):
        train_alone_one_epoch(model, _loader(), optimizer, "cpu", views="virtual")


class Picks(nn.Module):
    def __init__(self, pick):
        super().__init__()
        self.inner, self.pick = _model(), pick

    def forward(self, x):
        return self.pick(self.inner(x))


def test_loaders_and_models_of_another_form_are_told_what_is_expected():
    model, loss_fn = _model(), VRMLoss(1.0, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = torch.randn(8, FEATURES), torch.arange(8) % CLASSES

    def train(batch, student=model):
        for run in (
            lambda: train_one_epoch(model, student, [batch], loss_fn, optimizer, "cpu"),
            lambda: train_alone_one_epoch(student, [batch], optimizer, "cpu"),
        ):
            with pytest.raises(TypeError) as error:
                run()
        return str(error.value)

    assert "expected batches (real, virtual, labels) of tensors, the loader gives a tuple of 2" in train(
        (images, labels)
    )
    said = train({"image": images, "label": labels})
    assert "the loader gives a dict of image, label: load from a vrm_kernels.DualViewDataset" in said
    batch = (images, images, labels)
    assert "it returns a dict of logits" in train(batch, Picks(lambda x: {"logits": x}))
    assert "it returns a tuple of 2: Tensor, Tensor" in train(batch, Picks(lambda x: (x, x)))
    with pytest.raises(TypeError, match="it returns a dict of logits"):
        validate(Picks(lambda x: {"logits": x}), [batch], "cpu")
    with pytest.raises(TypeError, match=r"expected batches \(images, ..., labels\), the loader gives a dict"):
        validate(model, [{"image": images}], "cpu")


def test_items_of_another_form_are_told_what_is_expected():
    for item, wanted in (({"image": 1, "label": 2}, "gives a dict of image, label"), (3, "gives a int")):
        with pytest.raises(TypeError, match=rf"needs items \(image, label\), this dataset {wanted}"):
            DualViewDataset([item], None, None)[0]


def test_last_batch_of_one_image():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = (torch.randn(1, FEATURES), torch.randn(1, FEATURES), torch.tensor([0]))
    with pytest.raises(ValueError, match="cannot normalise a batch of 1 in training.*drop_last=True"):
        train_alone_one_epoch(model, [batch], optimizer, "cpu", views="real")
    assert train_alone_one_epoch(model, [batch], optimizer, "cpu")["loss"] > 0  # both views are two rows


def test_objects_that_the_caller_froze_stay_frozen(monkeypatch):
    during = []
    monkeypatch.setattr(
        recipe, "_Run", lambda *arguments: SimpleNamespace(run=lambda: during.append(gc.get_freeze_count()))
    )
    try:
        recipe.run(None, None, None, None)
        assert during[0] > 0 and gc.get_freeze_count() == 0
        gc.freeze()
        recipe.run(None, None, None, None)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
