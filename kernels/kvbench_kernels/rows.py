"""Rows on their way into the cache: turned, rounded, and their codes packed."""

import triton
import triton.language as tl

from kvbench_kernels.hadamard import butterfly


@triton.jit
def own_rows(HKV: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program's head and its tokens [BLOCK_R] int64."""
    return tl.program_id(0) % HKV, (tl.program_id(0) // HKV).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def offset_pages(positions_ptr, token, tokens, last, PAGE: tl.constexpr):
    """[BLOCK_R] int32, which offset each token's key is centred by; loaded beside the slots, or later loads wait."""
    page = tl.load(positions_ptr + token, mask=token < tokens, other=0) // PAGE
    return tl.minimum(page, last).to(tl.int32)


@triton.jit
def cache_rows(slots_ptr, token, tokens, head, HKV: tl.constexpr, S: tl.constexpr):
    """[BLOCK_R] int64, the cache's row of each token and this head, -1 where it goes nowhere."""
    slot = tl.load(slots_ptr + token, mask=token < tokens, other=-1)
    return tl.where(slot >= 0, (slot // S * HKV + head) * S + slot % S, -1)


@triton.jit
def turned_rows(
    x_ptr,
    signs_ptr,
    offset_ptr,
    order_ptr,  # [HKV, D] int32: which channel comes at each place, and one over its spread; or None
    inverse_ptr,
    page,  # [BLOCK_R], which offset is subtracted from each row; or None: the first
    exact_ptr,
    token,
    head,
    to,
    stride_t,
    stride_h,
    stride_d,
    factor,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Rows of x, of one head, as they are rounded: a tuple of tiles [BLOCK_R, SPAN]; also written in 16 bits, if asked.

    What goes to the cache's row -1 is 0.
    """
    COUNT: tl.constexpr = D // SPAN
    inside = to >= 0
    d = tl.arange(0, SPAN)[None, :]
    if offset_ptr is not None:
        offset_at = offset_ptr + head * D
        if page is not None:
            offset_at += (page * (HKV * D))[:, None]
    at = x_ptr + (token * stride_t + head * stride_h)[:, None]
    x = ()
    for i in tl.static_range(COUNT):
        channel = i * SPAN + d
        if order_ptr is not None:
            channel = tl.load(order_ptr + head * D + channel)
        tile = tl.load(at + channel * stride_d, mask=inside[:, None], other=0.0).to(tl.float32)
        if offset_ptr is not None:
            tile -= tl.load(offset_at + channel)
        if order_ptr is not None:
            tile *= tl.load(inverse_ptr + head * D + i * SPAN + d)
        if signs_ptr is not None:
            tile *= tl.load(signs_ptr + i * SPAN + d)
        x = x + (tile,)  # [BLOCK_R, SPAN]
    if BLOCK > 1:
        turned = ()
        x = butterfly(x, BLOCK)
        for i in tl.static_range(COUNT):
            turned = turned + (x[i] * factor,)
        x = turned
    if exact_ptr is not None:
        for i in tl.static_range(COUNT):
            exact_at = exact_ptr + (to * D)[:, None] + i * SPAN + d
            tl.store(exact_at, x[i].to(exact_ptr.dtype.element_ty), mask=inside[:, None])
    return x


@triton.jit
def half_away(x):
    """The nearest whole numbers, halves away from zero."""
    return tl.where(x < 0, -tl.floor(tl.abs(x) + 0.5), tl.floor(tl.abs(x) + 0.5))


@triton.jit
def to_e4m3(x):
    """The e4m3 codes (int32) of x within ±448, to the nearest even; NaN becomes 0x7F.

    In integers, since the interpreter's own cast truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # 2^14 has the smallest e4m3 step, 2^-9, as its last bit: the addition rounds
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(x == x, code, 0x7F)


@triton.jit
def clamp(x, LIMIT: tl.constexpr):
    """x within ±LIMIT; NaN stays NaN."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def store_words(codes, codes_ptr, to, D: tl.constexpr, BITS: tl.constexpr):
    """Word j of W takes the codes of channels j, j+W, j+2W, ..., and goes to the cache's rows `to`, but those at -1."""
    SPAN: tl.constexpr = codes[0].shape[1]
    WORDS: tl.constexpr = D * BITS // 16
    if WORDS // SPAN * SPAN == WORDS:
        d = tl.arange(0, SPAN)[None, :]
        for i in tl.static_range(WORDS // SPAN):
            word = codes[i]
            for stream in tl.static_range(1, 16 // BITS):
                word = word | (codes[i + stream * (WORDS // SPAN)] << (stream * BITS))
            tl.store(codes_ptr + (to * WORDS)[:, None] + i * SPAN + d, word.to(tl.int16), mask=(to >= 0)[:, None])
    else:
        # streams begin anywhere in a tile: all tiles' codes at a place become one number, where words look theirs up
        kind: tl.constexpr = tl.int32 if D // SPAN * BITS <= 31 else tl.int64
        places = codes[0].to(kind)
        for i in tl.static_range(1, D // SPAN):
            places = places | (codes[i].to(kind) << (i * BITS))
        w = tl.arange(0, triton.next_power_of_2(WORDS))[None, :]
        word = tl.zeros([codes[0].shape[0], w.shape[1]], kind)
        for stream in tl.static_range(16 // BITS):
            channel = tl.broadcast_to(tl.minimum(w + stream * WORDS, D - 1), word.shape)
            code = tl.gather(places, channel % SPAN, axis=1) >> (channel // SPAN * BITS)
            word = word | ((code & ((1 << BITS) - 1)) << (stream * BITS))
        tl.store(codes_ptr + (to * WORDS)[:, None] + w, word.to(tl.int16), mask=(to >= 0)[:, None] & (w < WORDS))
