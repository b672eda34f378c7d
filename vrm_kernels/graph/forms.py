"""Which of two forms a GPU backend takes for a call, from sizes alone: one rule for both backends. See docs/gpu.md."""

from collections.abc import Iterable
from typing import Literal

Form = Literal["literal", "dense"]

# Instructions of a kept edge's component in the literal form, which visits it from either side; one more is its
# multiply-add in the entropy.
LITERAL_VISIT = 18
# Beyond, the dense form costs less by counting: about 40 microseconds of an H100's float32 units.
LITERAL_INSTRUCTIONS = 2**30
# Edges of a graph that one block ranks by itself; more are narrowed by brackets first.
SELECT_EDGES = 2**15
# Entropies in the sample of a bracket, and how many standard deviations of a sampled rank it reaches on either side.
SAMPLE, DEVIATIONS = 2**13, 6


def form(graphs: Iterable[tuple[int, int, int]], percentile: float) -> Form:
    """The form for graphs of ``(vertices of side a, of side b, dimensions)``."""
    components = sum(m * n * dims for m, n, dims in graphs)
    instructions = components * (1 + 2 * LITERAL_VISIT * percentile / 100)
    return "literal" if instructions <= LITERAL_INSTRUCTIONS else "dense"


def candidates(edges: int) -> int:
    """How many of ``edges`` entropies a bracket leaves where its sample is as random as it should be."""
    return int(2 * DEVIATIONS * 0.5 / SAMPLE**0.5 * edges) + 1


def levels(edges: int) -> int:
    """How many brackets, each of what the one before left, until one block can rank what is left."""
    count = 0
    while edges > SELECT_EDGES:
        edges, count = candidates(edges), count + 1
    return count
