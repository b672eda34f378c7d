"""The constants of the formulas (arXiv 2502.20760). csrc/edge.h repeats them, and a test compares."""

RELATION_EPS = 1e-7  # added to the length that a relation is divided by
ENTROPY_EPS = 1e-7  # added to a probability before its logarithm
COUNT_EPS = 1e-7  # added to the number of kept edges
