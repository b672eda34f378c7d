"""The recipe's images: a split that cannot leak, and views that are augmented, normalised and repeatable."""

import pytest
import torch

from vrm_kernels.distill.data import digits, dual_view_loader, plain_loader

pytest.importorskip("kornia")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def data():
    return digits(300)


def _rows(dataset, mean=0.0, std=1.0):
    return {tuple((image * std + mean).mul(16).round().flatten().tolist()) for image in dataset.tensors[0]}


def test_split_is_fixed_stratified_and_disjoint(data):
    assert [len(part) for part in (data.train, data.validation, data.test)] == [300, 297, 600]
    for part in (data.train, data.validation, data.test):
        counts = part.tensors[1].bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.05 * len(part)
    parts = _rows(data.train), _rows(data.validation, data.mean, data.std), _rows(data.test, data.mean, data.std)
    # The images are all different, so that a shared row would be a shared image.
    assert [len(part) for part in parts] == [300, 297, 600]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    again = digits(900)
    assert torch.equal(again.test.tensors[1], data.test.tensors[1])
    assert parts[0] < _rows(again.train)


@pytest.mark.parametrize("count", [0, 19, 901])
def test_training_images_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match=f"20 to 900.*{count}"):
        digits(count)


@pytest.mark.parametrize("count", [20, 890, 891, 900])
def test_training_images_at_the_limits(count):
    assert len(digits(count).train) == count


def test_views_are_augmented_batches(data):
    torch.manual_seed(0)
    loader = dual_view_loader(data, 64, seed=0)
    batches = list(loader)
    assert len(batches) == len(loader) == 300 // 64
    real, virtual, labels = batches[0]
    assert real.shape == virtual.shape == (64, 1, 8, 8) and labels.shape == (64,)
    assert real.dtype == virtual.dtype == torch.float32
    assert not torch.allclose(real, virtual)
    # The virtual view is the stronger one, and both are normalised.
    clean = _clean(data, batches)
    distance = [(torch.cat([b[k] for b in batches]) - clean).square().mean() for k in (0, 1)]
    assert 0 < distance[0] < distance[1]
    assert abs(real.mean()) < 0.5 and 0.5 < real.std() < 1.5


def _clean(data, batches):
    """The images of the batches without augmentation, in their order: read from a loader with the same seed."""
    torch.manual_seed(0)
    loader = dual_view_loader(data, 64, seed=0)
    loader.dataset.transform_real = None
    images = torch.cat([real for real, _, _ in loader])
    return (images - data.mean) / data.std


def test_same_seed_same_batches_other_seed_others(data):
    def first(seed):
        torch.manual_seed(seed)
        return next(iter(dual_view_loader(data, 32, seed)))

    assert all(torch.equal(a, b) for a, b in zip(first(3), first(3), strict=True))
    assert not torch.equal(first(3)[2], first(4)[2])


def test_plain_loader_gives_everything_once_in_order(data):
    images, labels = (torch.cat(parts) for parts in zip(*plain_loader(data.test, 256), strict=True))
    assert torch.equal(images, data.test.tensors[0]) and torch.equal(labels, data.test.tensors[1])
