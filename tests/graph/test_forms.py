"""Which form a GPU backend takes, and how many brackets narrow a selection: from sizes alone."""

import pytest

from vrm_kernels.graph import forms


@pytest.mark.parametrize(
    ("batch", "classes", "percentile", "expected"),
    [(64, 100, 100, "literal"), (512, 200, 30, "literal"), (512, 200, 100, "dense"), (1024, 100, 30, "dense")],
)
def test_the_form_follows_sizes_and_percentile(batch, classes, percentile, expected):
    assert forms.form([(batch, batch, classes), (classes, classes, batch)], percentile) == expected


def test_a_graph_whose_entropies_are_not_stored_is_dense():
    assert forms.form([(2**13, 2**13, 1)], 0) == "literal" and forms.form([(2**13 + 1, 2**13, 1)], 0) == "dense"


def test_brackets_narrow_until_one_block_can_rank_the_rest():
    for edges, levels in ((1, 0), (2**16, 0), (2**16 + 1, 1), (512 * 512, 1), (4096 * 4096, 2), (2**32, 3)):
        assert forms.levels(edges) == levels
    assert [forms.sample(edges) for edges in (1, 2**23, 2**23 + 2**11, 2**24, 2**40)] == [
        2**13,
        2**13,
        2**14,
        2**14,
        2**20,
    ]
    assert 2**17 < forms.candidates(2**24) < forms.room(2**24) < 2**21 and forms.room(2**32) < 2**32 / 100
