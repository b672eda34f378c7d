"""Every backend computes the reference's loss and gradients, whatever the shape."""

import pytest
import torch
from helpers import MODES, Case, assert_parity

TINY = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 7), (7, 1), (3, 5)]
UNEVEN = [(17, 31), (31, 17), (37, 61), (64, 100), (67, 101), (129, 33)]
LARGE = [(300, 130), (257, 10), (16, 259)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("shape", TINY + UNEVEN, ids=lambda s: f"{s[0]}x{s[1]}")
def test_parity_over_shapes(backend, shape, relations, dtype):
    assert_parity(backend, Case(shape, relations=relations), dtype)


@pytest.mark.parametrize("percentile", [30.0, 100.0])
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: f"{s[0]}x{s[1]}")
def test_parity_at_larger_shapes(backend, shape, percentile):
    assert_parity(backend, Case(shape, percentile=percentile))
