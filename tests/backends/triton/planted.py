"""Kernels with a fault each, which the interpreter runs as they were meant: the compiled form must give them away."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)


@triton.jit
def masked_histogram_of_reshapes(a, b, entropies, histogram, m, n, depth):
    """An entropy kernel that counts as it goes. Data in the layout of the product and mask in that of the store are
    each reordered, so that the mask hides other elements than it should: wrong on a GPU wherever a tile is ragged."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        p = tl.load(a + i[:, None] * depth + k[None], (i < m)[:, None] & (k < depth)[None], 0.0)
        s = tl.load(b + j[None] * depth + k[:, None], (j < n)[None] & (k < depth)[:, None], 0.0)
        total = tl.dot(p, s, total, input_precision="ieee")
    edge = (i < m)[:, None] & (j < n)[None]
    tl.store(entropies + i[:, None] * n + j[None], total, edge)
    digit = (total.to(tl.uint32, bitcast=True) >> 21).to(tl.int32)
    counts = tl.histogram(tl.reshape(digit, [BLOCK * BLOCK]), 2048, mask=tl.reshape(edge, [BLOCK * BLOCK]))
    tl.atomic_add(histogram + tl.arange(0, 2048), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def reordered_beside_another(a, b):
    i = tl.arange(0, BLOCK)
    x = tl.reshape(tl.load(a + i[:, None] * BLOCK + i[None]), [BLOCK * BLOCK], can_reorder=True)
    tl.store(b + tl.arange(0, BLOCK * BLOCK), x)


@triton.jit
def sums_of_floats_by_arrival(a, b):
    tl.atomic_add(b, tl.sum(tl.load(a + tl.arange(0, BLOCK)), 0))


@triton.jit
def product_in_the_default_precision(a, b):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None]
    x = tl.load(a + at)
    tl.store(b + at, tl.dot(x, x))


@triton.jit
def read_of_what_was_stored(a, b):
    i = tl.arange(0, BLOCK)
    tl.store(b + i, tl.load(a + i))
    tl.store(a + i, tl.load(b + (BLOCK - 1 - i)))


@triton.jit
def read_of_what_the_last_turn_stored(a, b, n):
    i = tl.arange(0, BLOCK)
    for _ in range(n):
        x = tl.load(b + (BLOCK - 1 - i))
        tl.store(b + i, x + 1)


@triton.jit
def condition_that_is_a_number(a, b):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i)
    tl.store(b + i, tl.where((x > 0).to(tl.int8), x, 0.0))


@triton.jit
def offset_in_32_bits(a, b, n):
    """A row of 65536 elements, of 65536 rows."""
    i = tl.arange(0, BLOCK)
    tl.store(b + i, tl.load(a + tl.program_id(0) * n + i))


@triton.jit
def offset_in_32_bits_in_a_loop(a, b, n):
    i = tl.arange(0, BLOCK)
    for row in range(n):
        tl.store(b + i, tl.load(a + row * n + i))


# ---- near misses, which are right ---------------------------------------------------------------------------------


@triton.jit
def histogram_of_a_reshape(a, histogram):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i[:, None] * BLOCK + i[None]).to(tl.int32)
    tl.store(histogram + i, tl.histogram(tl.reshape(x, [BLOCK * BLOCK]), BLOCK))


@triton.jit
def read_behind_a_barrier(a, b):
    i = tl.arange(0, BLOCK)
    tl.store(b + i, tl.load(a + i))
    tl.debug_barrier()
    tl.store(a + i, tl.load(b + (BLOCK - 1 - i)))


@triton.jit
def each_branch_its_own(a, b, n):
    i = tl.arange(0, BLOCK)
    if n > 0:
        tl.store(b + i, tl.load(a + i))
    else:
        tl.store(a + i, tl.load(b + i))


@triton.jit
def offset_in_64_bits(a, b, n):
    i = tl.arange(0, BLOCK)
    tl.store(b + i, tl.load(a + tl.program_id(0).to(tl.int64) * n + i))


BOUNDS = {"n": 65536, "x": 65535, "m": 32, "depth": 64}
FAULTY = {
    masked_histogram_of_reshapes: "reorder",
    reordered_beside_another: "reorder",
    sums_of_floats_by_arrival: "order of arrival",
    product_in_the_default_precision: "tf32",
    read_of_what_was_stored: "no barrier",
    read_of_what_the_last_turn_stored: "no barrier",
    condition_that_is_a_number: "boolean",
    offset_in_32_bits: "32-bit integer",
    offset_in_32_bits_in_a_loop: "32-bit integer",
}
RIGHT = (histogram_of_a_reshape, read_behind_a_barrier, each_branch_its_own, offset_in_64_bits)
# Nothing the compiler makes today has this: a masked histogram whose operands lie in two layouts.
MISLAID = """
  tt.func public @k(%x: !tt.ptr<i32>) {
    %d = tt.load %0 : tensor<1024x!tt.ptr<i32>, #blocked>
    %e = arith.cmpi slt, %1, %2 : tensor<1024xi32, #blocked1>
    %c = tt.histogram %d, %e : tensor<1024xi32, #blocked> -> tensor<2048xi32, #blocked>
"""
