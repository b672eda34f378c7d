"""Relation matching inside other training loops. Each module imports its library, and only when imported itself:

- ``vrm_kernels.adapters.torchdistill`` registers the loss, a dataset wrapper and a collate function;
- ``vrm_kernels.adapters.mdistiller`` is a ``Distiller`` with mdistiller's methods (needs no library);
- ``vrm_kernels.adapters.lightning`` is a ``LightningModule``;
- ``vrm_kernels.adapters.timm`` splits the batches of timm's ``--aug-splits 2`` (needs no library).
"""
