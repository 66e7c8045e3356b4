"""Tiles in registers: cut, joined, summed as far as a lane goes; and what a stored scale says of its row."""

import triton
import triton.language as tl

from kvbench_kernels.unpack import UNSIGNED


@triton.jit
def row_scale(stored, KIND: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr):
    """The scale of one stream unit and the zero-point in streams, both [N] float32, of the rows' stored scales."""
    if KIND == UNSIGNED:
        bits = stored.to(tl.int32, bitcast=True)
        low: tl.constexpr = (1 << BITS) - 1
        return (bits & ~low).to(tl.float32, bitcast=True), ((bits & low) - (1 << (BITS - 1))).to(tl.float32)
    return stored * UNIT, stored


@triton.jit
def prefetch(ptr, first, COUNT: tl.constexpr):
    """Asks for COUNT elements from `first` on, into the L2 cache."""
    LINE: tl.constexpr = 128 // (ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(COUNT, LINE))
    prefetch_at(ptr + (first + tl.minimum(tl.arange(0, LINES) * LINE, COUNT - 1)))


@triton.jit
def prefetch_at(at):
    """Asks for the lines of 128 bytes that these addresses lie in, into the L2 cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [at], tl.int32, False, 1)


@triton.jit
def together(tiles):
    """A tuple of 2^m tiles [W, G] as [W, G, 2^m]."""
    W: tl.constexpr = tiles[0].shape[0]
    G: tl.constexpr = tiles[0].shape[1]
    COUNT: tl.constexpr = len(tiles)
    if COUNT == 1:
        return tl.reshape(tiles[0], [W, G, 1])
    else:
        return tl.reshape(tl.join(together(tiles[0::2]), together(tiles[1::2])), [W, G, COUNT])


@triton.jit
def slices(x, N: tl.constexpr):
    """[M, G] as a tuple of tiles [N, G]: N rows each, in their order."""
    M: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    if M == N:
        return (x,)
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, [2, M // 2, G]), (1, 2, 0)))
        return slices(first, N) + slices(second, N)


@triton.jit
def every_eighth(x):
    """[N, G] to [8, G]: sums of every eighth row, which are one lane's where x comes from a product."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 8, 8, x.shape[1]]), axis=0)


@triton.jit
def by_column(x, ABREAST: tl.constexpr, BLOCK_G: tl.constexpr):
    """What belongs to tokens, [N], where scores lie: [N, 1], or [N / ABREAST, ABREAST * BLOCK_G]."""
    if ABREAST == 1:
        return x[:, None]
    else:
        ROWS: tl.constexpr = x.shape[0] // ABREAST
        x = tl.broadcast_to(tl.reshape(x, [ROWS, ABREAST, 1]), [ROWS, ABREAST, BLOCK_G])
        return tl.reshape(x, [ROWS, ABREAST * BLOCK_G])
