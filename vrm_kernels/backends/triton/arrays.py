"""What the present stages hand to each other, in the order in which kernels take it.

Vertices are numbered over both sides: vertex ``v`` of a graph over rows is row ``v`` of the stacked ``[views, B, C]``
logits, of a graph over columns column ``v % C`` of view ``v // C``.
"""

from typing import Any, NamedTuple

from torch import Tensor

# Sizes whose alignment buys nothing: a kernel is not compiled again for another batch size.
SIZES = (  # noqa: SIM905 (a list would take forty lines)
    "m n m_0 n_0 m_1 n_1 first_b first_b_0 first_b_1 vertices vertices_0 vertices_1 dims dims_0 dims_1 depth_0 "
    "depth_1 samples rows owns others own_base other_base split slab_rows slabs_a slabs first_row first_block_row "
    "block_rows gradient_rows tiles tiles_0 tiles_1 tiles_down tiles_stride sums_stride others_tiles flag_own "
    "flag_other own_stride other_stride literal_plane edges_0 edges_1 all_edges graph graphs columns_0 columns_1 "
    "count_0 count_1 jobs_0 low_rank_0 high_rank_0 low_rank_1 high_rank_1 "
).split()


class Logits(NamedTuple):
    student: Tensor  # [rows_a + rows_b, C]: of both views, one above the other
    teacher: Tensor


class Sizes(NamedTuple):
    """Of one graph: edge ``(i, j)`` is vertex ``i`` of ``m`` with vertex ``first_b + j``, ``j < n``, of ``vertices``.

    A kernel takes these one by one, because whole numbers in a structure would be specialised.
    """

    vertices: Any
    m: Any
    n: Any
    first_b: Any
    dims: Any
    width: Any  # components of an operand, zeros beyond ``dims``


class Found(NamedTuple):
    """What tiles of edges leave for the gradients."""

    coefficients: Tensor  # of certified edges, zero elsewhere
    literals: Tensor  # of the others, see literal.literal_tile
    flags: Tensor  # int32: whether a tile has literal edges


class Selection(NamedTuple):
    """Which edges are kept: ``entropy <= threshold``.

    With a threshold and kept counts from elsewhere, ``limits`` are any numbers and both rows of ``counts`` are the kept
    counts.
    """

    threshold: Tensor  # [graphs]
    limits: Tensor  # [2, graphs]: the order statistics between which the threshold lies
    counts: Tensor  # [2, graphs] int64: how many entropies are at or below each


class Totals(NamedTuple):
    loss: Tensor  # []
    terms: Tensor  # [graphs]
    kept: Tensor  # [graphs] int64
