"""The memory that a call of the staged Triton kernels takes, counted: nothing is allocated."""

import pytest

pytest.importorskip("triton")

from vrm_kernels.backends.triton.staged import launches
from vrm_kernels.graph import forms


@pytest.mark.parametrize(
    ("batch", "classes", "form", "megabytes"),
    [(64, 100, "literal", 1), (512, 200, "literal", 13), (1024, 1000, "dense", 108), (4096, 1000, "dense", 573)],
)
def test_the_workspace_is_as_large_as_the_page_on_gpus_says(batch, classes, form, megabytes):
    sizes = ((batch, batch, classes), (classes, classes, batch))
    assert forms.form(sizes, 30.0) == form
    layout = launches.layout(sizes, batch, batch, classes, None, False, False, True, form == "dense", True)
    used = 4 * (sum(layout.floats.values()) + sum(layout.integers.values()))
    assert round(used / 1e6) == megabytes
