"""For torchdistill's YAML: importing this module registers what ``examples/torchdistill.yaml`` names.

- the mid-level loss ``VRMLoss``;
- the dataset wrapper ``DualViewWrapper``, which draws both views of a sample;
- the collate function ``dual_view_collate``, which puts a batch's virtual views after its real ones, so that any model
  serves unchanged and one forward pass gives the logits of both views.
"""

from typing import Any

import torch

# First of all: torchdistill's registry looks the module up among those imported, and fails where it is not (1.1.5).
import torchvision.datasets  # noqa: F401
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchdistill.datasets.registry import register_collate_func, register_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchdistill.losses.registry import register_mid_level_loss

from vrm_kernels.data import DualViewDataset
from vrm_kernels.loss import VRMLoss


@register_dataset_wrapper
class DualViewWrapper(BaseDatasetWrapper):
    """Items ``((real, virtual), label, {})`` of a dataset with items ``(image, label)``."""

    def __init__(self, org_dataset: Dataset, transform_real: Any = None, transform_virtual: Any = None) -> None:
        super().__init__(org_dataset)
        self.views = DualViewDataset(org_dataset, transform_real, transform_virtual)

    def __getitem__(self, index: int) -> tuple[tuple[Any, Any], Any, dict]:
        real, virtual, label = self.views[index]
        return (real, virtual), label, {}


@register_collate_func
def dual_view_collate(items: list) -> tuple[Tensor, Tensor, dict]:
    """``(images [2B, ...], labels [B], {})`` of :class:`DualViewWrapper`'s items, all real views first."""
    (real, virtual), labels, _ = default_collate(items)
    return torch.cat((real, virtual)), labels, {}


@register_mid_level_loss(key="VRMLoss")
class TorchdistillVRMLoss(nn.Module):
    """:class:`vrm_kernels.VRMLoss` of what two modules put out for a batch of :func:`dual_view_collate`.

    Args:
        student_module_path, student_module_io, teacher_module_path, teacher_module_io: where the logits ``[2B, C]``
            are, as in torchdistill's own losses; by default what the models return.
        settings: of :class:`vrm_kernels.VRMLoss`.
    """

    def __init__(
        self,
        student_module_path: str = ".",
        student_module_io: str = "output",
        teacher_module_path: str = ".",
        teacher_module_io: str = "output",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.student = (student_module_path, student_module_io)
        self.teacher = (teacher_module_path, teacher_module_io)
        self.loss_fn = VRMLoss(**settings)

    def forward(self, student_io_dict: dict, teacher_io_dict: dict, targets: Tensor, *_: Any, **__: Any) -> Tensor:
        student, teacher = (
            io_dict[path][io].chunk(2)
            for io_dict, (path, io) in ((student_io_dict, self.student), (teacher_io_dict, self.teacher))
        )
        return self.loss_fn(*student, *teacher, targets)
