"""Locations of dense predictions: the same of every view, drawn by a seed, ignored ones never."""

import pytest
import torch

from vrm_kernels import VRMLoss
from vrm_kernels.dense import sample_locations

B, C, H, W = 2, 3, 4, 5


def dense(count=4):
    return [torch.randn(B, C, H, W) for _ in range(count)]


def marked():
    """Logits that say where they are: channel 0 is the image, 1 the row, 2 the column."""
    grid = torch.meshgrid(torch.arange(B), torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack(grid, 1).float()


def labels():
    return torch.arange(B * H * W).reshape(B, H, W) % C


def test_rows_and_labels_are_of_the_same_locations():
    target = labels()
    (first, second), picked = sample_locations((marked(), marked() + 100), target, 7, seed=3)
    assert first.shape == (7, C) and torch.equal(first + 100, second)
    image, row, column = first.long().unbind(1)
    assert torch.equal(picked, target[image, row, column])
    assert len({tuple(x) for x in first.tolist()}) == 7  # without replacement


def test_the_seed_decides():
    draw = [sample_locations((marked(),), labels(), 6, seed=seed)[0][0] for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    state = torch.get_rng_state()
    sample_locations((marked(),), labels(), 6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_ignored_locations_are_never_drawn():
    target = labels()
    target[:, 1:] = 255
    rows, picked = sample_locations((marked(),), target, 1000, seed=0, ignore_index=255)
    assert len(picked) == B * W and (picked != 255).all() and (rows[0][:, 1] == 0).all()


def test_without_labels_every_location_counts():
    (rows,), picked = sample_locations((marked(),), None, 1000, seed=0)
    assert picked is None and len(rows) == B * H * W


def test_the_loss_trains_through_it():
    views = dense()
    for x in views[:2]:
        x.requires_grad_()
    rows, picked = sample_locations(views, labels(), 9, seed=0)
    VRMLoss(1.0, 1.0)(*rows, picked).backward()
    touched = views[0].grad.abs().sum(1) > 0
    assert 0 < touched.sum() <= 9


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (((torch.zeros(2, 3),), None, 5), r"\[B, C, \*places\]"),
        (([*dense(1), torch.zeros(B, C, H, W + 1)], None, 5), "of one shape"),
        ((dense(1), torch.zeros(B, H, W + 1), 5), r"labels must be \[2, 4, 5\]"),
        ((dense(1), labels(), 0), "at least 1, got 0"),
        ((dense(1), torch.full((B, H, W), -100), 5), "no location counts"),
        (((), None, 5), "at least one tensor"),
    ],
)
def test_refusals(arguments, match):
    with pytest.raises(ValueError, match=match):
        sample_locations(*arguments, seed=0)
