"""A ``LightningModule`` that distils: ``Trainer().fit(Distillation(teacher, student), loader)``."""

from collections.abc import Callable, Iterable
from functools import partial

import lightning
import torch
from torch import Tensor, nn

from vrm_kernels.data import both_views
from vrm_kernels.loss import VRMLoss


class Distillation(lightning.LightningModule):
    """Distil ``teacher`` into ``student`` on batches ``(real, virtual, labels)``, as ``DualViewDataset`` gives them.

    Validation batches are ``(images, ..., labels)``. Logged are the means over an epoch of the loss and of its terms
    (the kept edges as numbers a batch), and ``validation_accuracy``. The teacher stays in evaluation mode, gets no
    gradient, and is in no checkpoint.

    Args:
        loss_fn: by default ``VRMLoss(16, 8)``.
        make_optimizer: called with the student's parameters; by default AdamW at 1e-3.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        loss_fn: VRMLoss | None = None,
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss_fn = loss_fn or VRMLoss(16.0, 8.0)
        self.make_optimizer = make_optimizer or partial(torch.optim.AdamW, lr=1e-3)
        # In a list, so that it is no submodule: not trained, not saved, not put in training mode.
        self._teacher = [teacher.eval().requires_grad_(False)]

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)

    def on_train_start(self) -> None:
        # The student is of the Trainer's precision by here: "bf16-true" and "64-true" convert it, and the images.
        self._teacher[0].to(self.device, next(self.student.parameters()).dtype)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        real, virtual, labels = batch
        with torch.no_grad():
            teacher = both_views(self._teacher[0], real, virtual)
        student = both_views(self.student, real, virtual)
        loss, terms = self.loss_fn(*student, *teacher, labels, return_terms=True)
        logged = {"loss": loss.detach(), **{name: term.float() for name, term in terms.items()}}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=labels.shape[0])
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], _: int) -> None:
        right = (self.student(batch[0]).argmax(1) == batch[-1]).float().mean()
        self.log("validation_accuracy", right, batch_size=batch[-1].shape[0], sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.student.parameters())
