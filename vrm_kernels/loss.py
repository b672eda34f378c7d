"""VRMLoss: the functional loss with its settings remembered."""

import torch
from torch import Tensor, nn

from vrm_kernels import checks
from vrm_kernels import functional as VF
from vrm_kernels.backends.contract import LossSettings


class VRMLoss(nn.Module):
    r"""Virtual Relation Matching loss (arXiv 2502.20760).

    .. math:: L = CE(S, y) + CE(S', y) + \alpha L_{inter-sample} + \beta L_{inter-class}

    Args:
        alpha: weight of the inter-sample graph, >= 0. A weight that changes from step to step under ``torch.compile``
            is a 0-D tensor on the CPU (``loss_fn.alpha = torch.tensor(4.0)``): a number is compiled in, and each new
            one compiles again.
        beta: weight of the inter-class graph, >= 0.
        ce_loss_on_real: add the cross-entropy of the real view.
        ce_loss_on_virtual: add the cross-entropy of the virtual view.
        unreliable_pruning_percentile: keep the edges whose joint entropy is at or below this percentile, in [0, 100];
            100 keeps them all.
        delta: Huber threshold on a component of the relation difference, > 0.
        relations: ``"inter_view"`` (edges between a real and a virtual view) or ``"complete"`` (both views in one
            vertex set, so that real-real and virtual-virtual edges count too).
        normalize: ``"zscore"`` gives both graphs, pruning included, each sample's logits with mean 0 and standard
            deviation 1 (as arXiv 2403.01803 does for KD); the cross-entropies see the logits. ``None``: the logits.
        eps: added to the length that a relation is divided by, > 0. A student whose logits are all equal, as those of a
            zero-initialised head are, gets a gradient of the size 1 / eps, from which training does not recover: give
            such a head a small random start, or a larger eps, say 1e-2. A sample whose two views have the same logits
            gives each view such a gradient, too, with opposite signs: where both views come from the same weights the
            two cancel, but for their rounding, which in float32 can be as large as what is left; eps=1e-3 leaves 1e-4.
        label_smoothing: of the cross-entropies, in [0, 1].
        class_weight: ``[C]``, of the cross-entropies, as ``torch.nn.CrossEntropyLoss``'s ``weight``; moves with the
            module, and is no part of its ``state_dict``.
        ignore_index: the label of samples that have no cross-entropy; where all have it, the cross-entropies are 0.
            Their relations count. Samples that should count nowhere are left out before the call:
            ``loss_fn(*(x[keep] for x in logits), labels[keep])``.
        backend: ``"auto"`` or a name that :func:`vrm_kernels.backends.describe` lists.
        gather_distributed: compute the loss of the global batch over ``process_group``, the same on every process. Its
            gradient is multiplied by the number of processes, because DistributedDataParallel and FSDP average
            gradients: nothing is to be rescaled, and a step is that of one process on the concatenated batch. Local
            batches may differ in size, or be empty. Where no group is initialised, the batch is this process's own.
        process_group: the group to gather over, or its name; ``None`` is the default group. A copied or pickled loss
            has its name.
        check_finite: refuse non-finite logits with a ``ValueError`` that names the tensor. Reads the device.

    Raises:
        ValueError, TypeError: a setting out of its range, with its value.

    :meth:`forward` takes logits ``[B, C]`` (student real, student virtual, teacher real, teacher virtual) and labels,
    ``[B]`` class indices or ``[B, C]`` class probabilities; see :func:`vrm_kernels.functional.vrm_loss`.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        alpha: float | Tensor,
        beta: float | Tensor,
        ce_loss_on_real: bool = True,
        ce_loss_on_virtual: bool = True,
        unreliable_pruning_percentile: float = VF.DEFAULT_PERCENTILE,
        *,
        delta: float = VF.DEFAULT_DELTA,
        relations: str = VF.DEFAULT_RELATIONS,
        normalize: str | None = None,
        eps: float = VF.DEFAULT_EPS,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = VF.DEFAULT_IGNORE_INDEX,
        backend: str = "auto",
        gather_distributed: bool = False,
        process_group: "torch.distributed.ProcessGroup | str | None" = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.ce_loss_on_real = ce_loss_on_real
        self.ce_loss_on_virtual = ce_loss_on_virtual
        self.unreliable_pruning_percentile = unreliable_pruning_percentile
        self.delta = delta
        self.relations = relations
        self.normalize = normalize
        self.eps = eps
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.ignore_index = ignore_index
        self.backend = backend
        self.gather_distributed = gather_distributed
        self.process_group = process_group
        self.check_finite = check_finite
        settings = LossSettings(
            *checks.check_weights(alpha, beta)[:2],
            ce_loss_on_real,
            ce_loss_on_virtual,
            unreliable_pruning_percentile,
            delta,
            eps,
            relations == "complete",
            label_smoothing,
            ignore_index,
        )
        checks.check_settings(settings, relations, normalize, backend)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if state["process_group"] is not None and not isinstance(state["process_group"], str):
            state["process_group"] = state["process_group"].group_name
        return state

    def forward(
        self,
        logits_student_real: Tensor,
        logits_student_virtual: Tensor,
        logits_teacher_real: Tensor,
        logits_teacher_virtual: Tensor,
        labels: Tensor,
        *,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        return VF.vrm_loss(
            logits_student_real,
            logits_student_virtual,
            logits_teacher_real,
            logits_teacher_virtual,
            labels,
            self.alpha,
            self.beta,
            self.ce_loss_on_real,
            self.ce_loss_on_virtual,
            self.unreliable_pruning_percentile,
            delta=self.delta,
            relations=self.relations,
            normalize=self.normalize,
            eps=self.eps,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            backend=self.backend,
            gather_distributed=self.gather_distributed,
            process_group=self.process_group,
            check_finite=self.check_finite,
            return_terms=return_terms,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, ce_loss_on_real={self.ce_loss_on_real}, "
            f"ce_loss_on_virtual={self.ce_loss_on_virtual}, "
            f"unreliable_pruning_percentile={self.unreliable_pruning_percentile}, delta={self.delta}, "
            f"relations={self.relations!r}, label_smoothing={self.label_smoothing}, backend={self.backend!r}"
            + (f", normalize={self.normalize!r}" if self.normalize else "")
            + (f", eps={self.eps}" if self.eps != VF.DEFAULT_EPS else "")
            + (f", class_weight=[{len(self.class_weight)}]" if self.class_weight is not None else "")
            + (f", ignore_index={self.ignore_index}" if self.ignore_index != VF.DEFAULT_IGNORE_INDEX else "")
            + (", gather_distributed=True" if self.gather_distributed else "")
            + (", check_finite=True" if self.check_finite else "")
        )
