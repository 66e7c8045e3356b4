"""Tiles in registers: cut, joined, summed as far as a lane goes; and what a stored scale says of its row."""

import triton
import triton.language as tl

from kvbench_kernels.unpack import UNSIGNED

# the maximum of a column that has seen no token yet: below every score, and finite, for -inf less -inf is no number
NO_TOKEN = tl.constexpr(-1e30)


@triton.jit
def row_scale(stored, KIND: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr):
    """The scale of one stream unit and the zero-point in streams, both [N] float32, of the rows' stored scales.

    Scales of 8 bits are e5m3: five bits of exponent, three of mantissa, 255 for NaN.
    """
    if stored.dtype == tl.uint8:
        code = stored.to(tl.int32)
        stored = ((code + ((127 - 21) << 3)) << 20).to(tl.float32, bitcast=True)
        stored = tl.where(code == 255, float("nan"), stored)
    if KIND == UNSIGNED:
        bits = stored.to(tl.int32, bitcast=True)
        low: tl.constexpr = (1 << BITS) - 1
        return (bits & ~low).to(tl.float32, bitcast=True), ((bits & low) - (1 << (BITS - 1))).to(tl.float32)
    return stored * UNIT, stored


@triton.jit
def stored_scales(scale_ptr, row, base, visible, OTHER: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N] scales of rows as they are stored, OTHER where no row is visible.

    scale_ptr: of float32 or uint8; or of int32, four scales of 8 bits, where the rows follow each other from `base`
        on: a pipeline brings no less than four bytes at once, and a plain load is waited for.
    """
    if scale_ptr.dtype.element_ty == tl.int32:
        n = tl.arange(0, BLOCK_N)
        code = tl.load(scale_ptr + (base // 4 + n // 4)) >> 8 * (n % 4)
        return tl.where(visible, code, OTHER).to(tl.uint8)
    else:
        return tl.load(scale_ptr + row, mask=visible, other=OTHER)


@triton.jit
def row_offsets(page, head, token, HKV: tl.constexpr, S: tl.constexpr, ROW: tl.constexpr):
    """[...] int64, where rows of ROW elements begin: of these pages, one head and each page's token % S."""
    # the place in the page is multiplied apart. Triton takes the sum page * S + token % S for a multiple of S wherever
    # the pages are loaded, and would read rows of 24 bytes by 16
    return (page.to(tl.int64) * HKV + head) * (S * ROW) + token % S * ROW


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
def by_column(x, ABREAST: tl.constexpr, BLOCK_G: tl.constexpr, FOLD: tl.constexpr = 1):
    """What belongs to tokens, [N], where scores lie: [N, 1], or with columns apart [N / APART, APART * BLOCK_G]."""
    if ABREAST * FOLD == 1:
        return x[:, None]
    else:
        ROWS: tl.constexpr = x.shape[0] // (ABREAST * FOLD)
        if FOLD > 1:
            x = tl.trans(tl.reshape(x, [FOLD, ROWS]))
        x = tl.broadcast_to(tl.reshape(x, [ROWS, ABREAST * FOLD, 1]), [ROWS, ABREAST * FOLD, BLOCK_G])
        return tl.reshape(x, [ROWS, ABREAST * FOLD * BLOCK_G])


@triton.jit
def folded(x, own, FOLD: tl.constexpr):
    """[N, COLUMNS] to [N / FOLD, COLUMNS]: of each column the part of the rows that is its own."""
    parts = slices(x, x.shape[0] // FOLD)
    y = parts[0]
    for i in tl.static_range(1, FOLD):
        y = tl.where((own == i)[None, :], parts[i], y)
    return y


@triton.jit
def unfolded(tiles, own, FOLD: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The 16-bit slices of what `folded` gave, FOLD times: with zeros where a column's own part is another."""
    apart = ()
    for i in tl.static_range(FOLD):
        for j in tl.static_range(len(tiles)):
            if ASSEMBLY:
                mask = tl.broadcast_to(tl.where(own == i, -1, 0).to(tl.int16)[None, :], tiles[j].shape)
                one = tl.inline_asm_elementwise(
                    "and.b32 $0, $1, $2;", "=r,r,r", [tiles[j], mask], tiles[j].dtype, True, 2
                )
            else:
                one = tl.where((own == i)[None, :], tiles[j], 0.0)
            apart = apart + (one,)
    return apart


@triton.jit
def stack(tiles, N: tl.constexpr, W: tl.constexpr):
    """A tuple of 2^m tiles [N, W] to [N, 2^m, W]."""
    COUNT: tl.constexpr = len(tiles)
    if COUNT == 1:
        return tl.reshape(tiles[0], [N, 1, W])
    else:
        pair = tl.join(stack(tiles[0::2], N, W), stack(tiles[1::2], N, W))  # [N, COUNT / 2, W, 2]
        return tl.reshape(tl.permute(pair, (0, 1, 3, 2)), [N, COUNT, W])


@triton.jit
def nearest(x):
    """x rounded to whole numbers, halves to even, where it is within ±2^22: an addition leaves no bits below."""
    return (x + 1.5 * 2.0**23) - 1.5 * 2.0**23


@triton.jit
def sum_by_halves(tiles):
    """[R] of a tuple of [R, SPAN] tiles that follow each other along a row: the first half plus the second, and again.

    That is the definition's order of a sum, where a row is no power of two with zeros behind it.
    """
    for m in tl.static_range(9, -1, -1):
        if 1 << m < len(tiles):
            halved = ()
            for i in tl.static_range(1 << m):
                if i + (1 << m) < len(tiles):
                    halved = halved + (tiles[i] + tiles[i + (1 << m)],)
                else:
                    halved = halved + (tiles[i],)
            tiles = halved
    total = tiles[0]
    SPAN: tl.constexpr = tiles[0].shape[1]
    for m in tl.static_range(14, -1, -1):
        if 1 << m < SPAN:
            total = tl.sum(tl.reshape(total, [total.shape[0], 2, 1 << m]), axis=1)
    return tl.reshape(total, [total.shape[0]])
