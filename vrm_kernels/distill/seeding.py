"""Randomness as a function of where a run is, so that a resumed run draws what an undisturbed one would have drawn."""

import random

import numpy
import torch


def derived_seed(*numbers: int) -> int:
    """One 32-bit seed out of several non-negative numbers, unrelated for numbers that differ anywhere."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators (torch's of every device)."""
    seed = derived_seed(*numbers)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
