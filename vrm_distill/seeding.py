"""Randomness as a function of where a run is, so that a resumed run draws what an undisturbed one would have drawn."""

import random

import numpy
import torch


def derived_seed(*numbers: int) -> int:
    """One 32-bit seed out of several non-negative numbers, unrelated for numbers that differ anywhere."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(device: torch.device, *numbers: int) -> None:
    """Seed Python's and NumPy's generators, and torch's of the CPU and of ``device``."""
    seed = derived_seed(*numbers)
    random.seed(seed)
    numpy.random.seed(seed)
    # torch.manual_seed would record a stack trace for every absent GPU, which takes longer than a small step.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
