"""Several teachers as one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Joins the names of the networks of an ensemble.
JOINT = "+"


class Ensemble(nn.Module):
    """The mean of the logits of ``members``, each of which gives ``[B, classes]`` for the same images."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members]).mean(0)
