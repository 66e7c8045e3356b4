"""Codes of three bits: the upper two in a row's first words, the lowest ones in half as many that follow.

Both are words of 32 bits, each with the codes of channels that lie as far apart as the row has such words. In words of
16 bits that is: word i of W has the upper bits of channels i // 2 + W / 2 · (8 (i % 2) + s) for s = 0, 1, ..., 7 from
its low bits up, which is stream s; and their lowest bits are in the word i % (W / 2) that follows, at 2 s + 2 i // W.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.unpack import masked, masked_unit

BITS = tl.constexpr(3)


@triton.constexpr_function
def stream_count(bits):
    """Streams of a row's words."""
    return 8 if bits == 3 else 16 // bits


@triton.constexpr_function
def stream_words(head_dim, bits):
    """Words of a row that streams are of."""
    return head_dim // 8 if bits == 3 else head_dim * bits // 16


@cache
def lowest_bits(head_dim: int, device: torch.device) -> Tensor:
    """[words] int16 of a row's words and as many beyond: 1, or 2 for those of the second half.

    In memory, for only what comes from there is laid out as the products of decode ask for without a detour.
    """
    words = stream_words(head_dim, 3)
    i = torch.arange(max(16, 2 * words), device=device) % words
    return (1 + (i >= words // 2).to(torch.int16)).to(torch.int16)


@triton.constexpr_function
def _lowest_assembly(stream):
    word, first = ("t", "shr.b32 t, $1, 8;") if stream >= 4 else ("$1", "")
    return f"{{\n.reg .b32 t;\n{first}\nand.b32 $0, {word}, $2;\n}}"


@triton.jit
def lowest_place(i, STREAM: tl.constexpr, WORDS: tl.constexpr):
    """[...] int32: the lowest bit of a code of stream STREAM in what `lowest` gives beside words i."""
    return 2 * (STREAM % 4) + i % WORDS // (WORDS // 2)


@triton.jit
def lowest(rest, bit, STREAM: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The lowest bits of stream STREAM's codes, fp16: a bit under a mask is a subnormal number, as in `masked`.

    rest: the word i % (WORDS / 2) that follows beside each word i. bit: int16, `lowest_bits` of i; broadcast to rest.
    The upper bits are codes of 2 bits, and `masked` reads them.
    """
    mask = tl.broadcast_to(bit << 2 * (STREAM % 4), rest.shape)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_lowest_assembly(STREAM), "=r,r,r", [rest, mask], tl.float16, True, 2)
    else:
        bits = (rest.to(tl.int32) >> STREAM // 4 * 8) & mask.to(tl.int32)
        return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def power(exponent):
    """2^exponent, float32."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def three_codes(words, rest, bit, STREAM: tl.constexpr, ASSEMBLY: tl.constexpr):
    """[...] float32 codes of stream STREAM."""
    upper = masked(words, STREAM, 2, False, ASSEMBLY).to(tl.float32) * (2 / masked_unit(2, STREAM))
    unit = 4.0 ** (STREAM % 4) * 2.0**-24
    return upper + lowest(rest, bit, STREAM, ASSEMBLY).to(tl.float32) / (bit.to(tl.float32) * unit)


@triton.constexpr_function
def _wide(count, span):
    """Of so many words the columns that are computed side by side."""
    return count if count % span == 0 else span


@triton.jit
def _store_plane(codes, at, to, COUNT: tl.constexpr, LOWEST: tl.constexpr):
    """COUNT words of 32 bits a row to addresses [R, 1], but those of rows -1: codes' lowest bits, or the others."""
    R: tl.constexpr = codes[0].shape[0]
    SPAN: tl.constexpr = codes[0].shape[1]
    WIDE: tl.constexpr = _wide(COUNT, SPAN)
    d = tl.arange(0, SPAN)[None, :]
    # what lies COUNT channels apart shares a word: first over tiles, then within one
    for w in tl.static_range(WIDE // SPAN):
        word = tl.zeros([R, SPAN], tl.int32)
        for i in tl.static_range(w, len(codes), WIDE // SPAN):
            place = (i * SPAN + d) // COUNT
            if LOWEST:
                word |= (codes[i] & 1) << place
            else:
                word |= (codes[i] >> 1) << 2 * place
        if WIDE == COUNT:
            tl.store(at + w * SPAN + d, word, mask=(to >= 0)[:, None])
        else:
            word = tl.sum(tl.reshape(word, [R, SPAN // COUNT, COUNT]), axis=1)
            tl.store(at + tl.arange(0, COUNT)[None, :], word, mask=(to >= 0)[:, None])


@triton.jit
def store_three(codes, codes_ptr, to, D: tl.constexpr):
    """Rows of codes, a tuple of tiles [R, SPAN] that follow each other, into the cache's rows `to`, but those at -1.

    codes_ptr: [..., 3 D / 32] words of 32 bits.
    """
    at = codes_ptr + (to * (3 * D // 32))[:, None]
    _store_plane(codes, at, to, D // 16, False)
    _store_plane(codes, at + D // 16, to, D // 32, True)
