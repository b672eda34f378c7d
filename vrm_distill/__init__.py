"""The training recipe and its command, ``vrm-distill``.

The pieces here need torch alone; the data, the report and the command need the extra: ``pip install
'.[distill]'`` in a clone.
"""

from vrm_distill.checkpoint import load_checkpoint, save_checkpoint
from vrm_distill.engine import train_alone_one_epoch, train_one_epoch, validate
from vrm_distill.models import MODELS, create_model

__all__ = [
    "MODELS",
    "create_model",
    "load_checkpoint",
    "save_checkpoint",
    "train_alone_one_epoch",
    "train_one_epoch",
    "validate",
]
