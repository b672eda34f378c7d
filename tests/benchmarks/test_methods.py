"""The comparison's losses are their papers' formulas, and its batches those of the recipe."""

import math

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from benchmarks.methods import bank, losses, student
from benchmarks.methods.losses import Outputs
from benchmarks.methods.methods import BATCH, METHODS, QUESTIONS
from vrm_distill import create_model
from vrm_distill.data import open_dataset
from vrm_distill.settings import Settings
from vrm_distill.trainer import Trainer
from vrm_kernels import VRMLoss

B, C, T = 7, 5, 4.0
TERMS = {
    "kd": losses.kd(), "lskd": losses.lskd(), "dkd": losses.dkd(), "dist": losses.dist(), "rkd": losses.rkd(),
    "cc": losses.cc(), "at": losses.at(),
}  # fmt: skip


def _view(seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits, embedding, maps = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, C), (B, 6), (B, 3, 2, 2))
    )
    return Outputs(logits, embedding, losses.attention_of(maps))


@pytest.fixture
def views():
    return _view(0), _view(1), torch.arange(B) % C


def test_kd_is_hintons(views):
    (s, *_), (t, *_), _ = views
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    expected = sum(q[i, c] * math.log(q[i, c] / p[i, c]) for i in range(B) for c in range(C)) / B * T**2
    assert float(losses.kd(3.0)(*views)) == pytest.approx(3 * float(expected), rel=1e-10)


def test_lskd_is_kd_of_standardised_logits(views):
    def standardised(x):
        return torch.stack([(row - row.mean()) / row.std() for row in x.logits])

    s, t, y = views
    p, q = ((standardised(x) / 2).softmax(1) for x in (s, t))
    expected = 9 * 4 * (q * (q / p).log()).sum() / B
    assert float(losses.lskd()(s, t, y)) == pytest.approx(float(expected), rel=1e-6)


def test_dkd_is_the_papers_and_adds_up_to_kd(views):
    """Equation 6: KD = TCKD + (1 - p_t of the teacher) NCKD, in each sample."""
    (s, *_), (t, *_), y = views
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    tckd, nckd, total = 0.0, 0.0, 0.0
    for i in range(B):
        pt, qt = p[i, y[i]], q[i, y[i]]
        target = qt * math.log(qt / pt) + (1 - qt) * math.log((1 - qt) / (1 - pt))
        others = [c for c in range(C) if c != y[i]]
        rest = sum(q[i, c] / (1 - qt) * math.log(q[i, c] / (1 - qt) / (p[i, c] / (1 - pt))) for c in others)
        tckd, nckd, total = tckd + target / B, nckd + rest / B, total + (target + (1 - qt) * rest) / B
    expected = float(T**2 * (1 * tckd + 8 * nckd))
    assert float(losses.dkd()(*views)) == pytest.approx(expected, rel=1e-10)
    assert float(T**2 * total) == pytest.approx(float(losses.kd()(*views)), rel=1e-10)


def test_dkd_of_two_classes_is_refused(views):
    s, t, y = (x._replace(logits=x.logits[:, :2]) if isinstance(x, Outputs) else x % 2 for x in views)
    with pytest.raises(ValueError, match="2 are too few: use kd"):
        losses.dkd()(s, t, y)


def test_dist_is_the_papers(views):
    (s, *_), (t, *_), _ = views
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    rows = sum(1 - torch.corrcoef(torch.stack((p[i], q[i])))[0, 1] for i in range(B)) / B
    columns = sum(1 - torch.corrcoef(torch.stack((p[:, c], q[:, c])))[0, 1] for c in range(C)) / C
    assert float(losses.dist()(*views)) == pytest.approx(float(T**2 * (2 * rows + 2 * columns)), rel=1e-9)


def test_rkd_is_the_papers(views):
    (_, s, _), (_, t, _), _ = views

    def distances(x):
        d = torch.tensor([[float((x[i] - x[j]).norm()) for j in range(B)] for i in range(B)], dtype=torch.float64)
        return d / (d.sum() / (B * (B - 1)))

    def angles(x):
        a = torch.zeros(B, B, B, dtype=torch.float64)
        for j in range(B):
            for i in range(B):
                for k in range(B):
                    if i != j and k != j:
                        a[j, i, k] = F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0)
        return a

    expected = 25 * F.smooth_l1_loss(distances(s), distances(t)) + 50 * F.smooth_l1_loss(angles(s), angles(t))
    assert float(losses.rkd()(*views)) == pytest.approx(float(expected), rel=1e-8)


def test_cc_is_the_mean_square_difference_of_gaussian_kernels(views):
    (_, s, _), (_, t, _), _ = views

    def kernel(x, i, j):
        return math.exp(-0.4 * float((x[i] / x[i].norm() - x[j] / x[j].norm()).square().sum()))

    expected = sum((kernel(s, i, j) - kernel(t, i, j)) ** 2 for i in range(B) for j in range(B)) / B**2
    assert float(losses.cc(10.0)(*views)) == pytest.approx(10 * expected, rel=1e-9)


def test_attention_is_the_mean_square_over_channels_of_unit_length():
    maps = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for sample, told in zip(maps, losses.attention_of(maps), strict=True):
        energy = torch.stack([(sample[:, i, j] ** 2).mean() for i in range(2) for j in range(2)])
        torch.testing.assert_close(told, energy / energy.norm())


@pytest.mark.parametrize("name", TERMS)
def test_terms_vanish_at_the_teacher_and_have_gradients(name, views):
    s, t, y = views
    assert float(TERMS[name](t, t, y)) == pytest.approx(0, abs=1e-9)
    leaves = [x.requires_grad_() for x in s]
    assert torch.autograd.gradcheck(lambda *x: TERMS[name](Outputs(*x), t, y), leaves)


def test_a_model_gives_what_its_classifier_sees():
    model = create_model("conv_3_6_6", 1, 10).eval()
    images = torch.randn(4, 1, 8, 8)
    told = losses.outputs(model, images)
    torch.testing.assert_close(told.logits, model(images))
    torch.testing.assert_close(told.embedding, model.embed(images))


def test_a_term_is_added_for_each_view(views):
    s, t, y = views
    loss = losses.per_view(losses.kd(3.0))([s, t], [t, s], y)
    expected = sum(F.cross_entropy(x.logits, y) for x in (s, t)) + losses.kd(3.0)(s, t, y) + losses.kd(3.0)(t, s, y)
    torch.testing.assert_close(loss, expected)


def test_relation_matching_is_the_mean_over_its_virtual_views_with_kd_for_each():
    s, t, y = [_view(i) for i in range(3)], [_view(i) for i in range(3, 6)], torch.arange(B) % C
    vrm = VRMLoss(4.0, 2.0)

    def both(i):
        return vrm(s[0].logits, s[i].logits, t[0].logits, t[i].logits, y)

    settings = {"alpha": 4.0, "beta": 2.0}
    torch.testing.assert_close(losses.relation_matching(**settings)(s[:1], t[:1], y), both(0))
    torch.testing.assert_close(losses.relation_matching(**settings)(s[:2], t[:2], y), both(1))
    torch.testing.assert_close(losses.relation_matching(**settings)(s, t, y), (both(1) + both(2)) / 2)
    kd = losses.kd(3.0)
    expected = (both(1) + both(2)) / 2 + kd(s[0], t[0], y) + (kd(s[1], t[1], y) + kd(s[2], t[2], y)) / 2
    torch.testing.assert_close(losses.relation_matching(3.0, **settings)(s, t, y), expected)


def test_every_method_trains_on_its_views():
    data = open_dataset("digits", train_images=100)
    teacher = student.new_model("conv_8_16_16", data, 0).eval()
    batches = bank.make(data, 0, 1, teacher)
    for method in METHODS.values():
        training = student.Training(student.new_model("conv_3_6_6", data, 0), method, method.trials(1)[0])
        before = [p.clone() for p in training.model.parameters()]
        assert training.step(*batches.batch(0, 0, method.views)).isfinite()
        assert all(not torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))


def test_every_trial_of_every_method_has_the_same_learning_rate_and_stays_between_its_bounds():
    rates = {tuple(trial["lr"] for trial in method.trials(10)) for method in METHODS.values()}
    assert len(rates) == 1 and len(set(*rates)) == 10
    for method in METHODS.values():
        first, *drawn = method.trials(10)
        assert first == {"lr": 0.01} | {knob.name: knob.published for knob in method.knobs}
        for knob in method.knobs:
            assert all(knob.low <= trial[knob.name] <= knob.high for trial in drawn)
            assert len({trial[knob.name] for trial in drawn}) == 9
    assert all(name in METHODS for pair in QUESTIONS.values() for name in pair)


def test_the_batches_are_those_that_the_recipe_draws(tmp_path):
    """Two epochs, seen through a trainer's objective; what the teacher says is of the same images; saved and read."""
    data = open_dataset("digits", train_images=130)
    seen = []

    def objective(model, real, virtual, labels, _):
        seen.append((real, virtual, labels))
        return F.cross_entropy(model(real), labels), {}

    model = student.new_model("conv_3_6_6", data, 5)
    settings = Settings(batch_size=BATCH)
    trainer = Trainer(Accelerator(cpu=True), model, data, settings, objective, epochs=2, lr=0.01, seed=5)
    while not trainer.finished:
        trainer.epoch()
        trainer.next_epoch()
    trainer.close()
    teacher = student.new_model("conv_8_16_16", data, 0).eval()
    made = bank.make(data, 5, 2, teacher)
    made.save(tmp_path / "bank.pt")
    read = bank.Bank.load(tmp_path / "bank.pt")
    assert (read.epochs, read.steps) == (2, 2)
    for number, (real, virtual, labels) in enumerate(seen):
        epoch, step = divmod(number, 2)
        for batches in (made, read):
            images, _, found = batches.batch(epoch, step, 2)
            torch.testing.assert_close(images, torch.cat((real, virtual)).half().float(), rtol=0, atol=0)
            assert torch.equal(found, labels)
        first = losses.outputs(teacher, batches.batch(epoch, step, 3)[0])
        for view, told in enumerate(batches.batch(epoch, step, 3)[1]):
            for x, y in zip(student.split(first, 3)[view], told, strict=True):
                torch.testing.assert_close(x, y)
