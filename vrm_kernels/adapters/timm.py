"""timm's ``--aug-splits 2``: its batches hold both views one after the other, ``[2B]``, the clean split first."""

from torch import Tensor


def split_views(batch: Tensor) -> tuple[Tensor, Tensor]:
    """``(real, virtual)`` of images, logits or labels ``[2B, ...]`` from a loader with ``num_aug_splits=2``.

    timm's collate function puts the first split of all samples before the second. The first is augmented lightly, as
    the real view should be, with ``--aug-splits 2``, and the second strongly (``--aa``). Labels come twice: take
    either half.

    Raises:
        ValueError: an odd number of rows, or none.
    """
    rows = batch.shape[0] if batch.dim() else 0
    if rows == 0 or rows % 2:
        raise ValueError(f"a batch of two splits has an even number of rows, got {rows}: is --aug-splits 2 on?")
    real, virtual = batch.chunk(2)
    return real, virtual
