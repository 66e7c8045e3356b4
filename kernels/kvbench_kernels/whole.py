"""Keys as whole numbers of 8 bits, and queries in two such parts, for exact integer products.

Signed bytes are such numbers as they lie. The values of int2 are to each other as 10 to 3, to fp16's rounding. So a
table lookup makes four of them at once, and one product of whole numbers does for what takes two of fp16. A query has
15 bits and a sign, relative to the largest number of its group: upper and lower byte are multiplied apart, and 256
times the first sum joins the second exactly.
"""

import triton
import triton.language as tl

from kvbench_kernels.tiles import nearest, together
from kvbench_kernels.unpack import SIGNED, SYMMETRIC4

# a query's part of its group's power of two in whole numbers: below 2 they are within two bytes
WHOLE_ONE = tl.constexpr(127.0 * 128)


def in_bytes(kind: int, head_dim: int) -> bool:
    """Whether keys of a kind are multiplied as whole numbers: 512 products of two bytes, times 256, are below 2^31."""
    return kind == SYMMETRIC4.value or (kind == SIGNED.value and head_dim <= 512)


@triton.constexpr_function
def whole_values(codebook):
    """(outer, inner): the smallest whole numbers in the ratio of four symmetric values, or None.

    Each value is met to 2^-11 of itself at least, as fp16 would round it.
    """
    if len(codebook) != 4 or codebook[3] != -codebook[0] or codebook[2] != -codebook[1]:
        return None
    ratio = codebook[3] / codebook[2]
    for inner in range(1, 128):
        outer = round(inner * ratio)
        if outer > 127:
            break
        if abs(outer / (inner * ratio) - 1) < 2.0**-10:
            return outer, inner
    return None


@triton.constexpr_function
def whole_unit(codebook):
    """What 1 of the whole numbers is, between what it is to the outer and to the inner values."""
    outer, inner = whole_values(codebook)
    return (codebook[3] / outer * codebook[2] / inner) ** 0.5


@triton.constexpr_function
def in_upper_bytes(codebook):
    """Whether fp16 holds the whole numbers in its upper byte, with two bits of the mantissa."""
    return all(n >> max(n.bit_length() - 3, 0) << max(n.bit_length() - 3, 0) == n for n in whole_values(codebook))


@triton.constexpr_function
def _upper_byte(n):
    """The upper byte of fp16's n, for whole numbers of three bits and zeros behind them."""
    exponent = abs(n).bit_length() - 1
    return (n < 0) << 7 | (exponent + 15) << 2 | ((abs(n) << 2 >> exponent) & 3)


@triton.constexpr_function
def _half_assembly(codebook, stream):
    outer, inner = whole_values(codebook)
    table = 0
    for place, n in enumerate((-outer, -inner, inner, outer)):
        table |= _upper_byte(n) << 8 * place
    # a selector's nibbles are codes of two words, of this stream and of the second next or the second last one, which
    # the assembler finds is the same lookup. The table is the second operand, and so there is a 4 beside each code: a
    # first operand is moved into a register again before each lookup
    shift = 2 * (stream % 2) + 16 * (stream // 4)
    move = f"shr.b32 both, both, {shift};" if shift else ""
    take = "prmt.b32 $0, both, zeros, 0x2404;" if stream % 4 < 2 else "and.b32 $0, both, 0xFF00FF00;"
    return f"""{{
.reg .b32 both, mask, table, second, zeros;
prmt.b32 both, $1, $1, 0x3120;
{move}
mov.b32 mask, 0x3333;
mov.b32 second, 0x4444;
lop3.b32 both, both, mask, second, 0xea;
mov.b32 table, {table};
mov.b32 zeros, 0;
prmt.b32 both, zeros, table, both;
{take}
}}"""


@triton.jit
def whole_halves(words, STREAM: tl.constexpr, CODEBOOK: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Stream STREAM of a tile of int16 words as whole numbers in fp16; see `in_upper_bytes`."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_half_assembly(CODEBOOK, STREAM), "=r,r", [words], tl.float16, True, 2)
    else:
        return _of_codes((words.to(tl.int32) >> (2 * STREAM)) & 3, CODEBOOK).to(tl.float16)


@triton.jit
def _of_codes(code, CODEBOOK: tl.constexpr):
    """The whole numbers of codes, int32."""
    values: tl.constexpr = whole_values(CODEBOOK)
    inner = tl.where(code == 1, -values[1], values[1])
    return tl.where(code == 0, -values[0], tl.where(code == 3, values[0], inner))


@triton.constexpr_function
def _assembly(codebook):
    outer, inner = whole_values(codebook)
    table = (-outer & 255) | (-inner & 255) << 8 | inner << 16 | outer << 24
    # a selector's nibbles are codes, and 4 as the table is the second operand (see `_half_assembly`): those at even
    # places of two words, then those at odd ones
    return f"""{{
.reg .b32 even, odd, mask, second, table, zeros;
mov.b32 mask, 0x33333333;
mov.b32 second, 0x44444444;
mov.b32 table, {table};
mov.b32 zeros, 0;
lop3.b32 even, $4, mask, second, 0xea;
shr.u32 odd, $4, 2;
lop3.b32 odd, odd, mask, second, 0xea;
prmt.b32 $0, zeros, table, even;
prmt.b32 $1, zeros, table, odd;
shr.u32 even, even, 16;
shr.u32 odd, odd, 16;
prmt.b32 $2, zeros, table, even;
prmt.b32 $3, zeros, table, odd;
}}"""


@triton.jit
def whole(rows, CODEBOOK: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Four tiles [N, K] int8 of rows' bytes [N, K]: tile 2·p + s has, at 4·j + i, stream 2·i + s of word 2·j + p."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            _assembly(CODEBOOK), "=&r,=&r,=&r,=&r,r", [rows], (tl.int8, tl.int8, tl.int8, tl.int8), True, 4
        )
    else:
        N: tl.constexpr = rows.shape[0]
        K: tl.constexpr = rows.shape[1]
        first, second = tl.split(tl.permute(tl.reshape(rows, [N, K // 4, 2, 2]), (0, 1, 3, 2)))  # [N, K / 4, 2]
        return (
            _streams(first, 0, CODEBOOK),
            _streams(first, 2, CODEBOOK),
            _streams(second, 0, CODEBOOK),
            _streams(second, 2, CODEBOOK),
        )


@triton.jit
def _streams(words, PLACE: tl.constexpr, CODEBOOK: tl.constexpr):
    """[N, 4 J] int8: the codes at PLACE and four bits above it in each byte of words [N, J, 2 bytes]."""
    N: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1]
    words = tl.broadcast_to(tl.reshape(words.to(tl.int32), [N, J, 2, 1]), [N, J, 2, 2])
    code = (words >> (PLACE + 4 * tl.arange(0, 2))[None, None, None, :]) & 3
    return tl.reshape(_of_codes(code, CODEBOOK).to(tl.int8), [N, 4 * J])


@triton.jit
def whole_words(word):
    """Which word of a row each column of `whole_queries`' tiles is: the four that a lane gets follow each other."""
    return word // 16 * 16 + word % 8 // 2 * 4 + word % 16 // 8 * 2 + word % 2


@triton.jit
def whole_queries(turned, q_inverse, LANES: tl.constexpr):
    """Four pairs of tiles [K, COLUMNS] int8, upper and lower part, as `whole` has the keys.

    turned: eight streams [COLUMNS, W] of queries, times q_inverse below 2; LANES: their words in the order of
        `whole_words`.
    """
    even = _in_order(together((turned[0], turned[2], turned[4], turned[6])), LANES)
    odd = _in_order(together((turned[1], turned[3], turned[5], turned[7])), LANES)
    return (
        _two_bytes(even[0], q_inverse, LANES),
        _two_bytes(odd[0], q_inverse, LANES),
        _two_bytes(even[1], q_inverse, LANES),
        _two_bytes(odd[1], q_inverse, LANES),
    )


@triton.jit
def byte_queries(turned, q_inverse):
    """A pair of tiles [2 W, COLUMNS] int8, upper and lower part, as signed bytes lie: of each word both streams."""
    # not joined: Triton takes what was for codes of half as many bits, and loads their tiles in an order to be undone
    first = tl.arange(0, 2)[None, None, :] == 0
    return (_two_bytes(tl.where(first, turned[0][:, :, None], turned[1][:, :, None]), q_inverse, False),)


@triton.jit
def _in_order(x, LANES: tl.constexpr):
    """[COLUMNS, W, 4] to the even words' and the odd words' [COLUMNS, W / 2, 4]."""
    COLUMNS: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if LANES:
        x = tl.permute(tl.reshape(x, [COLUMNS, W // 16, 2, 4, 2, 4]), (0, 1, 3, 2, 5, 4))
    else:
        x = tl.permute(tl.reshape(x, [COLUMNS, W // 2, 2, 4]), (0, 1, 3, 2))
    return tl.split(tl.reshape(x, [COLUMNS, W // 2, 4, 2]))


@triton.jit
def _two_bytes(x, q_inverse, LANES: tl.constexpr):
    q = tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]])
    if LANES:
        # the addition of 1.5·2^23 rounds
        q = tl.trans(q) * (q_inverse * WHOLE_ONE)
        q = (q + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        upper = (q + 128) >> 8
        return upper.to(tl.int8), (q - (upper << 8)).to(tl.int8)
    else:
        # these pass through shared memory, in which a lane's bytes then lie side by side; and where a byte of a sum's
        # bits is stored there, ptxas converts the sum: every lower part would be 255
        q = nearest(q * (q_inverse * WHOLE_ONE)).to(tl.int32)
        upper = (q + 128) >> 8
        return tl.trans(upper.to(tl.int8)), tl.trans((q - (upper << 8)).to(tl.int8))


@triton.jit
def whole_scores(rows, queries, CODEBOOK: tl.constexpr, ASSEMBLY: tl.constexpr):
    """[N, COLUMNS] float32: rows of bytes [N, K] times queries, in units of `whole_unit` / WHOLE_ONE.

    CODEBOOK: of codes of 2 bits; () of signed bytes, in units of 1 / WHOLE_ONE.
    """
    keys = whole(rows, CODEBOOK, ASSEMBLY) if len(CODEBOOK) else (rows,)
    sums = tl.zeros([rows.shape[0], queries[0][0].shape[1]], tl.int32)
    for i in tl.static_range(len(queries)):
        sums = tl.dot(keys[i], queries[i][0], sums, out_dtype=tl.int32)
    sums = sums << 8
    for i in tl.static_range(len(queries)):
        sums = tl.dot(keys[i], queries[i][1], sums, out_dtype=tl.int32)
    return sums.to(tl.float32)
