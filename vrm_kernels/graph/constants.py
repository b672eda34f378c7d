"""The constants of the formulas (arXiv 2502.20760). csrc/edge.h repeats them, and a test compares."""

import torch

RELATION_EPS = 1e-7  # added to the length that a relation is divided by
ENTROPY_EPS = 1e-7  # added to a probability before its logarithm
COUNT_EPS = 1e-7  # added to the number of kept edges
# The largest component, by the dtype computed in, whose squares can be summed. Beyond it the loss is NaN.
LARGEST = {torch.float32: 1e15, torch.float64: 1e150}
