"""What is decided before anything is launched, from sizes and dtypes alone: regime, precision and meta-parameters."""

from dataclasses import dataclass

import torch
import triton

from vrm_kernels.backends.contract import float32_products
from vrm_kernels.backends.triton.operands import AVERAGING_COMPONENTS, FUSED_MULTIPLY_ADD

# Multiply-adds of one product of both graphs, up to which launches cost more than arithmetic: see docs/triton.md.
FUSED_ELEMENTS = 2**27
# A whole matrix of entropies is kept up to this size, and computed again, block by block, beyond.
ENTROPY_BYTES = 2**30
# Of the products of an edge block, which an epilogue reads back from the second-level cache (50 MB on an H100).
EDGE_BLOCK_BYTES = 24 * 2**20
# But never fewer rows than a product needs to be efficient.
EDGE_BLOCK_ROWS = 256
# Of the coefficients of a gradient block, and what the literal edges in it need.
GRADIENT_BLOCK_BYTES = 2**28

# Meta-parameters: the constants of each kernel, and how many warps and stages it is compiled for.
PREPARE = {"ROW_BLOCK": 1024, "ROWS": 64, "COLUMNS": 32, "num_warps": 4, **FUSED_MULTIPLY_ADD}
PACK = {"ROWS": 16, "BLOCK": 64, "num_warps": 4, **FUSED_MULTIPLY_ADD}
SPLIT = {"ROWS": 32, "BLOCK": 64, "num_warps": 4, **FUSED_MULTIPLY_ADD}
ENTROPY = {"BLOCK": 32, "DEPTH": 32, "num_warps": 4, **FUSED_MULTIPLY_ADD}
HISTOGRAM = {"BLOCK": 4096, "num_warps": 8, **FUSED_MULTIPLY_ADD}
FINISH = {"num_warps": 8, **FUSED_MULTIPLY_ADD}
EDGES = {"BLOCK": 32, "DEPTH": 32, "num_warps": 8, "num_stages": 1, **FUSED_MULTIPLY_ADD}
GRADIENTS = {"BLOCK": 16, "num_warps": 4, **FUSED_MULTIPLY_ADD}
TOTAL = {"BLOCK": 1024, "num_warps": 4, **FUSED_MULTIPLY_ADD}
EPILOGUE = {"ROWS": 16, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, **FUSED_MULTIPLY_ADD}
COMBINE = {"ROWS": 32, "BLOCK": 64, "num_warps": 8, **FUSED_MULTIPLY_ADD}
WIDTH_MULTIPLE = 32  # of the operands' components: of every DEPTH of a product


@dataclass(frozen=True)
class Precision:
    """How products are computed.

    Their operands are numbers of the dtype ``operand``, sums of ``terms`` of which stand for a component (see
    ``operands.store_operand``); ``dot`` is what ``tl.dot`` is told. The entropies rank edges, so theirs are sums of
    more; the gradient is rounded to the logits' dtype, so its are sums of fewer.
    """

    compute: torch.dtype
    operand: torch.dtype
    dot: str = "ieee"
    round_tf32: bool = False
    terms: int = 1
    entropy_terms: int = 1
    gradient_terms: int = 1


def on_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def precision(dtypes: set[torch.dtype], compute: torch.dtype, components: int, fused: bool, device) -> Precision:
    """Of logits of ``dtypes``, ``components`` of them in a view.

    float32 follows PyTorch's own switch. bfloat16 and float16 logits use the matrix units: TF32 three times over in the
    small regime, bfloat16 operands in the large one (float16's range would not hold the gradient's coefficients).
    """
    if compute == torch.float64:
        return Precision(compute, compute)
    half = not dtypes & {torch.float32}
    nvidia = on_nvidia(device) or device.type == "cpu"  # the interpreter stands for the first
    if not half:
        tf32 = float32_products() != "highest" and nvidia
        return Precision(compute, compute, "tf32" if tf32 else "ieee", tf32)
    if fused or not nvidia:  # AMD's matrix units take float32 as it is
        return Precision(compute, compute, "tf32x3" if nvidia else "ieee")
    large, bits_11 = components >= AVERAGING_COMPONENTS, torch.float16 in dtypes
    return Precision(
        compute,
        torch.bfloat16,
        terms=1 if large and not bits_11 else 3,
        entropy_terms=3 if large else 6,
        gradient_terms=3 if bits_11 else 1,
    )


def use_fused(compute: torch.dtype, elements: int) -> bool:
    """Whether the small regime computes a loss of ``elements`` components of relations."""
    return compute == torch.float32 and elements <= FUSED_ELEMENTS


@dataclass(frozen=True)
class Blocks:
    """Rows of a graph that are taken together, for the edges and for the gradients' products."""

    edges: int
    gradients: int
    stride: int  # of the pairwise buffers' rows
    whole_entropy: bool

    def starts(self, m: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """``(first row of a gradient block, [(first row, rows) of each edge block in it])``."""
        return [
            (
                first,
                [(row, min(self.edges, m - row)) for row in range(first, min(first + self.gradients, m), self.edges)],
            )
            for first in range(0, m, self.gradients)
        ]


def row_stride(n: int) -> int:
    """Of pairwise buffers of the large regime."""
    return padded(n, 16)


def blocks(m: int, n: int, precision: Precision) -> Blocks:
    stride, size = row_stride(n), precision.compute.itemsize
    rows = max(EDGE_BLOCK_ROWS, EDGE_BLOCK_BYTES // (3 * stride * size) // 128 * 128)
    rows = min(rows, padded(m, EPILOGUE["ROWS"]))
    parts = 2 if precision.gradient_terms == 3 else 1
    edge_bytes = 2 * parts * precision.operand.itemsize + 3 * size
    gradients = max(1, GRADIENT_BLOCK_BYTES // (stride * edge_bytes * rows)) * rows
    return Blocks(rows, min(gradients, padded(m, rows)), stride, m * stride * size <= ENTROPY_BYTES)


def padded(n: int, multiple: int) -> int:
    return triton.cdiv(n, multiple) * multiple
