"""Parity over dtypes, mixtures of them, strides and storage offsets."""

import parity_suite
import pytest
from helpers import DTYPES, MODES, Case, assert_parity


class TestInputs(parity_suite.Inputs):
    """On every backend."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relations", MODES)
@pytest.mark.parametrize("shape", [(3, 5), (37, 61)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_parity_over_dtypes(backend, shape, relations, dtype):
    assert_parity(backend, Case(shape, relations=relations, seed=500), dtype)
