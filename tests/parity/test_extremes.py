"""Parity where the formulas are delicate: convergence, collapse, saturation, duplicates and ties."""

import parity_suite


class TestExtremes(parity_suite.Extremes):
    """On every backend."""
