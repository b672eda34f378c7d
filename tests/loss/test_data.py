"""DualViewDataset: each image in two views, with its label."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from vrm_kernels import DualViewDataset


class Counted(Dataset):
    def __init__(self):
        self.reads = []

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.reads.append(index)
        return torch.full((2,), float(index)), index % 3, "dropped"


def test_an_item_is_two_views_and_a_label():
    data = Counted()
    views = DualViewDataset(data, lambda x: x + 10, lambda x: x + 20)
    assert len(views) == 5
    real, virtual, label = views[4]
    assert real.tolist() == [14.0, 14.0] and virtual.tolist() == [24.0, 24.0] and label == 1
    assert data.reads == [4]


def test_no_transform_passes_the_image_through():
    data = Counted()
    real, virtual, _ = DualViewDataset(data, None, lambda x: -x)[2]
    assert real.tolist() == [2.0, 2.0] and virtual.tolist() == [-2.0, -2.0]
    real, virtual, _ = DualViewDataset(data, lambda x: -x, None)[2]
    assert real.tolist() == [-2.0, -2.0] and virtual.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_collates_in_a_loader(workers):
    images, labels = torch.randn(6, 1, 4, 4), torch.arange(6)
    views = DualViewDataset(TensorDataset(images, labels), torch.neg, torch.abs)
    real, virtual, y = next(iter(DataLoader(views, batch_size=6, num_workers=workers)))
    assert torch.equal(real, -images) and torch.equal(virtual, images.abs()) and torch.equal(y, labels)


def test_iteration_ends_with_the_dataset():
    assert [label for _, _, label in (DualViewDataset(Counted(), None, None)[k] for k in range(5))] == [0, 1, 2, 0, 1]


def test_refusals():
    with pytest.raises(TypeError, match="map-style dataset with a length, got generator"):
        DualViewDataset((x for x in range(3)), None, None)
    with pytest.raises(TypeError, match="transform_real must be callable or None, got int"):
        DualViewDataset(Counted(), 3, None)
    with pytest.raises(TypeError, match="transform_virtual must be callable or None, got str"):
        DualViewDataset(Counted(), None, "flip")
