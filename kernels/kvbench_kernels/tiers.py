"""Rows in tiers: eight slices of D/8 channels with codes of their own width, in the order of their channels' weight.

A row is W = D/8 words of 16 bits, word j with codes of the channels j, j+W, j+2W, ... from its low bits up, of three
bits the lower two; the bits that then have no place, one a channel, follow in words of their own, packed as codes of
one bit. So slice s is stream s of 2-bit codes, with other places and widths, and what is multiplied are **fields**:
some bits of a slice's codes that lie side by side. A code is the sum of its fields, each times a power of two.

A layout's `codebook` is one number whose eight digits are the widths, and then the steps of 1, 2, 3 and 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.tiles import nearest, stack, sum_by_halves

LOWERED = tl.constexpr(2.0**-12)  # what `tier_queries` makes of scores, so that they fit into 16 bits
_E5M3_ONE = tl.constexpr((127 - 21) << 3)  # of a float32's bits, without the lowest twenty, what code 0 is
SEARCHED = tl.constexpr(11)  # scales that are tried, and how many of them lie below the first guess
_BELOW = tl.constexpr(3)


@dataclass(frozen=True)
class Rank:
    """Key channels in another order, each divided by its spread: a row x is stored as x[order] / spread.

    order: [HKV, D] int32.  spread, inverse: [HKV, D] float32, of the sorted channels.
    """

    order: Tensor
    spread: Tensor
    inverse: Tensor

    @classmethod
    def make(cls, order: Tensor, spread: Tensor) -> Rank:
        """The channels' order, and what the sorted ones are divided by."""
        spread = spread.to(torch.float32).contiguous()
        return cls(order.to(torch.int32).contiguous(), spread, 1 / spread)

    def rows(self, x: Tensor) -> Tensor:
        """[N, HKV, D] float32 rows x as they are stored."""
        return x.gather(-1, self.order.long().expand(x.shape)) * self.inverse


# ---- the layout, from the widths


@triton.constexpr_function
def _fields(widths):
    """(slice, lowest bit of the code, bits, place, whether it follows the words) of each field.

    Its place is in a word, or its number among the fields that follow.
    """
    found, rest, place = [], [], 0
    for index, digit in enumerate(str(widths)):
        width = int(digit)
        inside = min(width - width % 2 if width > 1 else 1, 16 - place)
        if inside:
            found.append((index, 0, inside, place, False))
        place += inside
        rest += [(index, bit) for bit in range(inside, width)]
    return found + [(index, bit, 1, number, True) for number, (index, bit) in enumerate(rest)]


@triton.constexpr_function
def _start(widths, i):
    """Of a field that follows the words, in them: the bit of its first channel; W / rest_words channels share one."""
    found = _fields(widths)
    return found[i][3] * 16 // sum(field[4] for field in found)


def rest_words(widths: int, head_dim: int) -> int:
    """Words of 16 bits that follow a row's words.

    Raises:
        ValueError: rows of another length than kernels take.
    """
    if head_dim < 64 or head_dim & (head_dim - 1):
        raise ValueError(f"kernels read tiers of 64, 128, 256, ... channels, not {head_dim}; the reference reads any")
    return int(sum(field[4] for field in _fields(widths))) * head_dim // 128


@cache
def rest_bits(widths: int, head_dim: int, device: torch.device) -> Tensor:
    """[words] int16 of a row's words and as many beyond: the bit of its channel in the first field that follows.

    In memory, for only what comes from there is laid out as the products of decode ask for without a detour.
    """
    words = head_dim // 8
    i = torch.arange(max(16, 2 * words), device=device) % words
    return (1 << i // rest_words(widths, head_dim)).to(torch.int16)


@triton.constexpr_function
def fields(widths):
    """How many fields a row has."""
    return len(_fields(widths))


@triton.constexpr_function
def field_slice(widths, i):
    """Which slice's codes it is of."""
    return _fields(widths)[i][0]


@triton.constexpr_function
def field_bit(widths, i):
    """Its lowest bit in a code."""
    return _fields(widths)[i][1]


@triton.constexpr_function
def field_bits(widths, i):
    """How many bits it has."""
    return _fields(widths)[i][2]


@triton.constexpr_function
def field_place(widths, i):
    """The lowest bit in a word; of a field that follows them, that of its first channels."""
    return _start(widths, i) if _fields(widths)[i][4] else _fields(widths)[i][3]


@triton.constexpr_function
def field_follows(widths, i):
    """Whether it lies in the words that follow."""
    return _fields(widths)[i][4]


@triton.constexpr_function
def slice_bits(widths, s):
    """Bits of a slice's codes."""
    return int(str(widths)[s])


@triton.constexpr_function
def rest_count(widths, words):
    """Words that follow a row of so many."""
    return sum(field[4] for field in _fields(widths)) * words // 16


@triton.constexpr_function
def _down(widths, i):
    """By how much words are shifted down before a field is masked: it then lies within an fp16 number's mantissa."""
    _, _, bits, place, follows = _fields(widths)[i]
    if follows:
        return _start(widths, i) // 8 * 8
    return 0 if place + bits <= 10 else 6


@triton.constexpr_function
def _masked_assembly(shift):
    word, first = ("t", f"shr.b32 t, $1, {shift};") if shift else ("$1", "")
    return f"{{\n.reg .b32 t;\n{first}\nand.b32 $0, {word}, $2;\n}}"


# ---- reading


@triton.jit
def tier_bits(kw, I: tl.constexpr, TIERS: tl.constexpr, WORDS: tl.constexpr):
    """[BLOCK_KW] int32: the lowest bit of field I where `tier_field` has masked it, for the channels of these words."""
    place: tl.constexpr = field_place(TIERS, I) - _down(TIERS, I)
    if field_follows(TIERS, I):
        return place + kw % WORDS // rest_count(TIERS, WORDS)
    else:
        return place + kw * 0


@triton.jit
def tier_field(words, rest, bit, I: tl.constexpr, TIERS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Field I of a tile of words [N, BLOCK_KW], fp16: its bits under a mask, a subnormal number.

    rest: [N, BLOCK_KW], the following word that each channel's bits are in.  bit: [BLOCK_KW], `rest_bits` of the words.
    """
    shift: tl.constexpr = _down(TIERS, I)
    low: tl.constexpr = field_place(TIERS, I) - shift
    if field_follows(TIERS, I):
        source = rest
        mask = (bit << low)[None, :]
    else:
        source = words
        mask = tl.full([1, words.shape[1]], ((1 << field_bits(TIERS, I)) - 1) << low, tl.int16)
    mask = tl.broadcast_to(mask, source.shape)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_masked_assembly(shift), "=r,r,r", [source, mask], tl.float16, True, 2)
    else:
        bits = (source.to(tl.int32) >> shift) & mask.to(tl.int32)
        return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def tier_queries(turned, factor, kw, CODEBOOK: tl.constexpr, WORDS: tl.constexpr):
    """Of each field the queries that it is multiplied with, fp16, and what the fields' middles add to every score.

    Returns a tuple of tiles [BLOCK_KW, COLUMNS], and [COLUMNS]. All scores are LOWERED times what they are.
    turned: a tuple of tiles [COLUMNS, BLOCK_KW], one a slice, times factor about 1.
    """
    TIERS: tl.constexpr = CODEBOOK[0]
    queries = ()
    middle = turned[0] * 0.0
    for i in tl.static_range(fields(TIERS)):
        step = CODEBOOK[slice_bits(TIERS, field_slice(TIERS, i))] * (1 << field_bit(TIERS, i))
        low = tier_bits(kw, i, TIERS, WORDS)
        # over the unit 2^(low - 24) of the field's bits
        enlarged = ((127 + 12 - low) << 23).to(tl.float32, bitcast=True)[None, :]
        q = (turned[field_slice(TIERS, i)] * (factor * step) * enlarged).to(tl.float16)
        unit = ((127 - 24 + low) << 23).to(tl.float32, bitcast=True)[None, :]
        middle -= q.to(tl.float32) * (unit * (((1 << field_bits(TIERS, i)) - 1) / 2))
        queries = queries + (tl.trans(q),)
    return queries, tl.sum(middle, axis=1)


@triton.jit
def tier_rows(words, rest, kw, CODEBOOK: tl.constexpr, WORDS: tl.constexpr):
    """[N, 8 * BLOCK_KW] fp16: codes less their middles, slice after slice, of words and rest [N, BLOCK_KW]."""
    TIERS: tl.constexpr = CODEBOOK[0]
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    slices = ()
    for s in tl.static_range(8):
        code = words.to(tl.int32) * 0
        for i in tl.static_range(fields(TIERS)):
            if field_slice(TIERS, i) == s:
                place = field_place(TIERS, i) + kw * 0
                source = words
                if field_follows(TIERS, i):
                    place += kw % WORDS // rest_count(TIERS, WORDS)
                    source = rest
                bits = (source.to(tl.int32) >> place[None, :]) & ((1 << field_bits(TIERS, i)) - 1)
                code += bits << field_bit(TIERS, i)
        slices = slices + ((code.to(tl.float32) - ((1 << slice_bits(TIERS, s)) - 1) / 2).to(tl.float16),)
    return tl.reshape(stack(slices, N, W), [N, W * 8])


@triton.jit
def tier_steps(s, CODEBOOK: tl.constexpr):
    """The steps of these slices, float32."""
    TIERS: tl.constexpr = CODEBOOK[0]
    step = s * 0.0 + CODEBOOK[slice_bits(TIERS, 0)]
    for i in tl.static_range(1, 8):
        step = tl.where(s == i, CODEBOOK[slice_bits(TIERS, i)], step)
    return step


# ---- writing


@triton.jit
def _scale_of(code):
    """The e5m3 number of a code from 0 to 254."""
    return ((code + _E5M3_ONE) << 20).to(tl.float32, bitcast=True)


@triton.jit
def search(x, CODEBOOK: tl.constexpr, D: tl.constexpr):
    """Codes of a row's tiles [R, SPAN], int32 from 0 on, and [R] its e5m3 scale: the definition's search.

    A row with NaN or ±inf gets codes 0 and the scale 255.
    """
    TIERS: tl.constexpr = CODEBOOK[0]
    SPAN: tl.constexpr = x[0].shape[1]
    bad = tl.where(tl.abs(x[0]) < float("inf"), 0, 1)
    squares = (x[0] * x[0],)
    y = (x[0] * (1 / CODEBOOK[slice_bits(TIERS, 0)]),)
    for i in tl.static_range(1, len(x)):
        bad |= tl.where(tl.abs(x[i]) < float("inf"), 0, 1)
        squares = squares + (x[i] * x[i],)
        y = y + (x[i] * (1 / CODEBOOK[slice_bits(TIERS, i * SPAN * 8 // D)]),)
    whole = tl.max(bad, axis=1) == 0
    root = tl.sqrt_rn(sum_by_halves(squares) * (1 / D))
    first = (root.to(tl.int32, bitcast=True) >> 20) - _E5M3_ONE
    first = tl.minimum(tl.maximum(first, 0), 254)
    chosen = first
    least = tl.full(root.shape, float("inf"), tl.float32)
    for step in tl.range(SEARCHED):
        tried = tl.minimum(tl.maximum(first + (step - _BELOW), 0), 254)
        scale = _scale_of(tried)
        inverse = tl.div_rn(scale * 0 + 1.0, scale)[:, None]
        left = ()
        for i in tl.static_range(len(y)):
            z = y[i] * inverse - 0.5
            z -= _rounded(z, slice_bits(TIERS, i * SPAN * 8 // D))
            left = left + (z * z,)
        error = sum_by_halves(left) * (scale * scale)
        better = error < least
        least = tl.where(better, error, least)
        chosen = tl.where(better, tried, chosen)
    scale = _scale_of(chosen)
    inverse = tl.div_rn(scale * 0 + 1.0, scale)[:, None]
    codes = ()
    for i in tl.static_range(len(y)):
        code = _rounded(y[i] * inverse - 0.5, slice_bits(TIERS, i * SPAN * 8 // D)).to(tl.int32)
        code += 1 << (slice_bits(TIERS, i * SPAN * 8 // D) - 1)
        codes = codes + (tl.where(whole[:, None], code, 0),)
    return codes, tl.where(whole, chosen, 255)


@triton.jit
def _rounded(z, BITS: tl.constexpr):
    """z within the codes of so many bits, less the half of their number, as a whole number."""
    half: tl.constexpr = 2.0 ** (BITS - 1)
    return nearest(tl.minimum(tl.maximum(z, -half), half - 1))


@triton.jit
def store_tiers(codes, words_ptr, rest_ptr, to, CODEBOOK: tl.constexpr, WORDS: tl.constexpr):
    """Packs a row's tiles of codes [R, SPAN] into the cache's rows `to`, those at -1 skipped."""
    TIERS: tl.constexpr = CODEBOOK[0]
    SPAN: tl.constexpr = codes[0].shape[1]
    TILES: tl.constexpr = WORDS // SPAN  # of a slice
    REST: tl.constexpr = rest_count(TIERS, WORDS)
    R: tl.constexpr = codes[0].shape[0]
    d = tl.arange(0, SPAN)[None, :]
    inside = (to >= 0)[:, None]
    for t in tl.static_range(TILES):
        word = codes[0] * 0
        for i in tl.static_range(fields(TIERS)):
            if not field_follows(TIERS, i):
                part = codes[field_slice(TIERS, i) * TILES + t] >> field_bit(TIERS, i)
                word |= (part & ((1 << field_bits(TIERS, i)) - 1)) << field_place(TIERS, i)
        tl.store(words_ptr + (to * WORDS)[:, None] + t * SPAN + d, word.to(tl.int16), mask=inside)
    rest = tl.zeros([R, REST], tl.int32)
    for i in tl.static_range(fields(TIERS)):
        if field_follows(TIERS, i):
            for t in tl.static_range(TILES):
                bit = (codes[field_slice(TIERS, i) * TILES + t] >> field_bit(TIERS, i)) & 1
                # channel kw's bit is in word kw % REST, at place + kw // REST
                place = field_place(TIERS, i) + t * (SPAN // REST) + tl.arange(0, SPAN // REST)
                rest += tl.sum(tl.reshape(bit, [R, SPAN // REST, REST]) << place[None, :, None], axis=1)
    tl.store(rest_ptr + (to * REST)[:, None] + tl.arange(0, REST)[None, :], rest.to(tl.int16), mask=inside)
