"""Which of two forms a GPU backend takes for a call, from sizes alone: one rule for both backends. See docs/gpu.md."""

from collections.abc import Iterable
from typing import Literal

Form = Literal["literal", "dense"]

# Instructions of a kept edge's component in the literal form, which visits it from either side; one more is its
# multiply-add in the entropy.
LITERAL_VISIT = 18
# Beyond, the dense form costs less by counting: about 40 microseconds of an H100's float32 units.
LITERAL_INSTRUCTIONS = 2**30
# Entropies of a graph that are stored; of more they are computed again, by blocks of rows of so many edges.
STORED_EDGES = 2**26
# Edges of a graph that one block ranks by itself; more are narrowed by brackets first.
SELECT_EDGES = 2**16
# The sample of a bracket: one of so many entropies, but no fewer and no more than these; and how many standard
# deviations of a sampled rank it reaches on either side.
EDGES_PER_SAMPLE, SMALLEST_SAMPLE, LARGEST_SAMPLE, DEVIATIONS = 2**10, 2**13, 2**20, 6


def form(graphs: Iterable[tuple[int, int, int]], percentile: float) -> Form:
    """The form for graphs of ``(vertices of side a, of side b, dimensions)``."""
    graphs = list(graphs)
    instructions = sum(m * n * dims for m, n, dims in graphs) * (1 + 2 * LITERAL_VISIT * percentile / 100)
    few = instructions <= LITERAL_INSTRUCTIONS and all(m * n <= STORED_EDGES for m, n, _ in graphs)
    return "literal" if few else "dense"


def sample(edges: int) -> int:
    """From how many of ``edges`` entropies the ends of a bracket come: a power of two."""
    size = 1 << max(0, edges // EDGES_PER_SAMPLE - 1).bit_length()
    return min(max(size, SMALLEST_SAMPLE), LARGEST_SAMPLE)


def candidates(edges: int) -> int:
    """How many of ``edges`` entropies a bracket leaves where its sample is as random as it should be."""
    return int(2 * DEVIATIONS * 0.5 / sample(edges) ** 0.5 * edges) + 1


def room(edges: int) -> int:
    """For how many there is room: half as many again, for samples that are less random; and whole chunks."""
    return (candidates(edges) * 3 // 2 + 1024 + 15) // 16 * 16


def reach(edges: int) -> int:
    """How many ranks of its sample a bracket reaches on either side, at most."""
    return int(DEVIATIONS * 0.5 * sample(edges) ** 0.5) + 2


def levels(edges: int) -> int:
    """How many brackets, each of what the one before left, until one block can rank what is left."""
    count = 0
    while edges > SELECT_EDGES:
        edges, count = candidates(edges), count + 1
    return count
