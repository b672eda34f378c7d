"""A ``Distiller`` with the methods that mdistiller's trainer calls; its models return ``(logits, features)``."""

from typing import Any

import torch
from torch import Tensor, nn

from vrm_kernels.data import both_views
from vrm_kernels.loss import VRMLoss


class VRM(nn.Module):
    """Virtual Relation Matching as mdistiller's trainer expects a method.

    Its loader must give two views: either ``image`` is a pair ``(real, virtual)`` or a tensor ``[B, 2, C, H, W]``.

    Args:
        student, teacher: return logits ``[B, C]``, or a tuple whose first entry they are.
        loss_fn: by default ``VRMLoss(800, 400)``, the weights of the CIFAR-100 preset of ``vrm-distill``.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, loss_fn: VRMLoss | None = None) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.loss_fn = loss_fn or VRMLoss(800.0, 400.0)

    def train(self, mode: bool = True) -> "VRM":
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        return 0

    def forward_train(self, image: Any, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits of the real view, and the loss under the one name that the trainer adds up.

        Raises:
            ValueError: ``image`` is one view.
        """
        if isinstance(image, Tensor):
            if image.dim() != 5 or image.shape[1] != 2:
                raise ValueError(
                    f"VRM needs two views of each image, [B, 2, C, H, W] or a pair, got {list(image.shape)}: "
                    f"let the training set give both, for instance by vrm_kernels.DualViewDataset"
                )
            image = image.unbind(1)
        real, virtual = image
        with torch.no_grad():
            teacher = both_views(_logits_of(self.teacher), real, virtual)
        student = both_views(_logits_of(self.student), real, virtual)
        return student[0], {"loss_vrm": self.loss_fn(*student, *teacher, target)}

    def forward_test(self, image: Tensor) -> Tensor:
        return _logits_of(self.student)(image)

    def forward(self, **kwargs: Any) -> Any:
        return self.forward_train(**kwargs) if self.training else self.forward_test(kwargs["image"])


def _logits_of(model: nn.Module):
    def logits(images: Tensor) -> Tensor:
        output = model(images)
        return output[0] if isinstance(output, tuple) else output

    return logits
