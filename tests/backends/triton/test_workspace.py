"""The memory that a call of the Triton kernels takes, beside inputs and gradients: its real allocations, counted
on tensors without data."""

from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from vrm_kernels.backends.contract import LossSettings, Views
from vrm_kernels.backends.triton.backend import TritonBackend
from vrm_kernels.graph import forms


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it have taken at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize(
    ("batch", "classes", "dtype", "form", "megabytes"),
    [
        (64, 100, torch.float32, "literal", 0.5),
        (512, 200, torch.float32, "literal", 8.9),
        (1024, 1000, torch.float32, "dense", 131.1),
        (4096, 1000, torch.bfloat16, "dense", 570.8),
        (65536, 1000, torch.bfloat16, "dense", 5781.2),
    ],
)
def test_the_workspace_is_as_large_as_the_page_on_gpus_says(batch, classes, dtype, form, megabytes):
    assert forms.form(((batch, batch, classes), (classes, classes, batch)), 30.0) == form
    logits = Views(*(torch.empty(batch, classes, dtype=dtype, device="meta") for _ in range(4)))
    labels = torch.empty(batch, dtype=torch.int64, device="meta")
    settings = LossSettings(16.0, 8.0, True, True, 30.0, 1.0, 1e-7, False, 0.1, -100)
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **options: None), Peak() as peak:
        TritonBackend().vrm_loss(logits, labels, None, settings, True)
    gradients = 2 * batch * classes * 4
    assert round((peak.most - gradients) / 1e6, 1) == megabytes
