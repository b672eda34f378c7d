"""The constants that two languages need have one value."""

import re
from pathlib import Path

import torch

from vrm_kernels.graph import constants

ROOT = Path(__file__).parents[2]


def test_edge_h_repeats_the_constants():
    text = (ROOT / "csrc" / "edge.h").read_text()
    names = {"kRelationEps": "RELATION_EPS", "kEntropyEps": "ENTROPY_EPS", "kCountEps": "COUNT_EPS"}
    values = {name: float(re.search(rf"constexpr double {name} = ([^;]+);", text)[1]) for name in names}
    assert values == {name: getattr(constants, other) for name, other in names.items()}


def test_edge_h_repeats_the_largest_component():
    text = (ROOT / "csrc" / "edge.h").read_text()
    values = {name: float(re.search(rf"{name} largest = ([0-9e]+)", text)[1]) for name in ("float", "double")}
    assert values == {"float": constants.LARGEST[torch.float32], "double": constants.LARGEST[torch.float64]}
