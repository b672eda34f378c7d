"""Which form a GPU backend takes, and how many brackets narrow a selection: from sizes alone."""

import pytest

from vrm_kernels.graph import forms


@pytest.mark.parametrize(
    ("batch", "classes", "percentile", "expected"),
    [(64, 100, 100, "literal"), (512, 200, 30, "literal"), (512, 200, 100, "dense"), (1024, 100, 30, "dense")],
)
def test_the_form_follows_sizes_and_percentile(batch, classes, percentile, expected):
    assert forms.form([(batch, batch, classes), (classes, classes, batch)], percentile) == expected


def test_brackets_narrow_until_one_block_can_rank_the_rest():
    for edges, levels in ((1, 0), (2**15, 0), (2**15 + 1, 1), (512 * 512, 1), (4096 * 4096, 3)):
        assert forms.levels(edges) == levels
    assert forms.candidates(10**6) < 10**5
