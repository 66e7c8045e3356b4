"""From 16-bit words of packed codes to fp16 values, in registers.

A tile of words is decoded into **streams**: the codes at one bit position of all words, as tiles of the same shape. A
value of the cache is `(stream - zero) * scale`; `zero` and `scale` stay outside the dot products. One stream is
unpacked at a time, just before it is multiplied: all at once would take twice the registers.

Each decoding is written twice. Plain Triton says what it means, and is what the interpreter runs. Inline assembly does
two words at a time and gives the same bits. Its trick: masked into the mantissa of the fp16 number 2^n, a code c makes
2^n + c; one addition takes 2^n away and leaves an exact number. That is about one instruction for each value.

Decode attention does with multiples of the codes, which are half an instruction each: see `masked`.
"""

import struct

import triton
import triton.language as tl

# how the bits of a word become values
FLOAT = tl.constexpr(0)  # the values themselves, 16 bits each: one stream, no words
E4M3 = tl.constexpr(1)  # two fp8 values
SIGNED = tl.constexpr(2)  # two signed bytes
UNSIGNED = tl.constexpr(3)  # unsigned codes of 2 or 4 bits, each row with a zero-point
SYMMETRIC4 = tl.constexpr(4)  # 2-bit indices of four values that lie symmetrically about 0
TABLE = tl.constexpr(5)  # indices of any other codebook
TIERS = tl.constexpr(6)  # slices of channels with codes of their own width: see tiers.py
BLOCK_E2M1 = tl.constexpr(7)  # 4-bit floats, a scale a block: see blocks.py
BLOCK_MIDDLE = tl.constexpr(8)  # unsigned codes of 4 bits less 8, a scale a block
THREE = tl.constexpr(9)  # unsigned codes of 3 bits, each row with a zero-point: see three.py

# how the scale of a block becomes a number
SCALE_F16 = tl.constexpr(0)
SCALE_E4M3 = tl.constexpr(1)
SCALE_E8M0 = tl.constexpr(2)
SCALE_ROW = tl.constexpr(3)  # float32, one a row, whose low bits are its zero-point
E2M1_UNIT = tl.constexpr(2.0**-14)  # what a stream of BLOCK_E2M1 has for 1


def _pair(value: float) -> str:
    """Two fp16 numbers of this value as a 32-bit literal."""
    half = int(struct.unpack("<H", struct.pack("<e", value))[0])
    return f"0x{half:04x}{half:04x}"


def _place(bits: int, stream: int) -> tuple[int, int, float]:
    """By how much a word is shifted to the left, where the stream's codes then begin, and the 2^n around them."""
    # codes come to lie within the mantissa; those of 2 bits at 4, 6 or 8, where 2^n is small
    shift = {4: (0, 0, -8, -8), 2: (4, 4, 0, 0, 0, -6, -6, -6)}[bits][stream]
    place = bits * stream + shift
    return shift, place, 2.0 ** (10 - place)


def _field(bits: int, stream: int, word: str, steps: list[str]) -> str:
    """Assembly: t = 2^n + code of the two words in register `word`, and then `steps`."""
    shift, place, base = _place(bits, stream)
    mask = ((1 << bits) - 1) << place
    first = f"{'shl' if shift > 0 else 'shr'}.b32 t, {word}, {abs(shift)};" if shift else f"mov.b32 t, {word};"
    extract = f"lop3.b32 t, t, 0x{mask:04x}{mask:04x}, {_pair(base)}, 0xea;"  # (a & b) | c
    return "\n".join(["{", ".reg .b32 t, k;", first, extract, *steps, "}"])


def _centred(bits: int, stream: int, centre: float) -> str:
    """code - centre."""
    base = _place(bits, stream)[2]
    return _field(bits, stream, "$1", [f"mov.b32 k, {_pair(-base - centre)};", "add.rn.f16x2 $0, t, k;"])


def _symmetric(stream: int) -> str:
    """code - 1.5, and the operand `step` added with the sign of 1.5 - code."""
    base = _place(2, stream)[2]
    steps = [
        f"mov.b32 k, {_pair(-base - 1.5)};",
        "add.rn.f16x2 t, t, k;",
        "lop3.b32 k, t, 0x80008000, $2, 0xa6;",  # (~a & b) ^ c
        "add.rn.f16x2 $0, t, k;",
    ]
    return _field(2, stream, "$1", steps)


def _e4m3(stream: int) -> str:
    return (
        "{\n.reg .b32 t;\n.reg .b16 pair, none;\n"
        f"prmt.b32 t, $1, 0, {('0x4420', '0x4431')[stream]};\n"
        "mov.b32 {pair, none}, t;\ncvt.rn.f16x2.e4m3x2 $0, pair;\n}"
    )


def _signed(stream: int) -> str:
    # with its sign bit flipped a byte is 128 more; as the mantissa of 1024.0, 1152 more
    word, shift = ("t", "shr.b32 t, $1, 8;") if stream else ("$1", "")
    return (
        f"{{\n.reg .b32 t, k;\n{shift}\nlop3.b32 t, {word}, 0x00ff00ff, 0x64806480, 0x6a;\n"  # (a & b) ^ c
        f"mov.b32 k, {_pair(-1152)};\nadd.rn.f16x2 $0, t, k;\n}}"
    )


def _e2m1(stream: int) -> str:
    """Sign, exponent and mantissa of a code at the places where fp16 has a sign and its lowest exponents."""
    if stream == 3:
        return (
            "{\n.reg .b32 t;\nshr.b32 t, $1, 3;\nand.b32 t, t, 0x0e000e00;\n"
            "lop3.b32 $0, $1, 0x80008000, t, 0xea;\n}"  # (a & b) | c
        )
    # 2^9 + 2^12 times a code has exponent and mantissa in place. The bits above them are 9 sign + magnitude, and with
    # 15 more the highest one is the sign; of a zero it is set
    return (
        f"{{\n.reg .b32 t;\nand.b32 t, $1, 0x{0x000F000F << 4 * stream:08x};\n"
        f"mad.lo.u32 t, t, 0x{0x1200 >> 4 * stream:x}, 0xf000f000;\nand.b32 $0, t, 0x8e008e00;\n}}"
    )


_E2M1 = tl.constexpr(tuple(map(_e2m1, range(4))))
_E4M3 = tl.constexpr(tuple(map(_e4m3, range(2))))
_SIGNED = tl.constexpr(tuple(map(_signed, range(2))))
_UNSIGNED4 = tl.constexpr(tuple(_centred(4, stream, 8.0) for stream in range(4)))
_UNSIGNED2 = tl.constexpr(tuple(_centred(2, stream, 2.0) for stream in range(8)))
_SYMMETRIC4 = tl.constexpr(tuple(map(_symmetric, range(8))))


@triton.jit
def channels(words, STREAM: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The channels whose codes are stream STREAM: bytes lie one after the other, smaller codes WORDS channels apart.

    Codes of 3 bits lie as three.py says.
    """
    if BITS == 8:
        return words * 2 + STREAM
    elif BITS == 3:
        return words // 2 + (words % 2 * 8 + STREAM) * (WORDS // 2)
    return words + STREAM * WORDS


@triton.jit
def unpack(
    words,
    step,
    STREAM: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Stream STREAM of a tile of int16 words, in fp16.

    FLOAT: the tile itself. E4M3, SIGNED: the values. UNSIGNED: code - 2^(BITS-1). TABLE: CODEBOOK[code].
    SYMMETRIC4: code - 1.5, and `step` (fp16) with the sign of 1.5 - code. BLOCK_E2M1: the value times E2M1_UNIT.
    BLOCK_MIDDLE: code - 8.
    """
    if KIND == FLOAT:
        return words
    elif KIND == TABLE or not ASSEMBLY:
        return _unpack_plain(words, step, STREAM, KIND, BITS, CODEBOOK)
    elif KIND == E4M3:
        return tl.inline_asm_elementwise(_E4M3[STREAM], "=&r,r", [words], tl.float16, True, 2)
    elif KIND == SIGNED:
        return tl.inline_asm_elementwise(_SIGNED[STREAM], "=&r,r", [words], tl.float16, True, 2)
    elif KIND == SYMMETRIC4:
        return tl.inline_asm_elementwise(_SYMMETRIC4[STREAM], "=&r,r,r", [words, step], tl.float16, True, 2)
    elif KIND == BLOCK_E2M1:
        return tl.inline_asm_elementwise(_E2M1[STREAM], "=&r,r", [words], tl.float16, True, 2)
    elif BITS == 4:
        return tl.inline_asm_elementwise(_UNSIGNED4[STREAM], "=&r,r", [words], tl.float16, True, 2)
    else:
        return tl.inline_asm_elementwise(_UNSIGNED2[STREAM], "=&r,r", [words], tl.float16, True, 2)


@triton.jit
def _unpack_plain(words, step, STREAM: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, CODEBOOK: tl.constexpr):
    code = (words.to(tl.int32) >> (STREAM * BITS)) & ((1 << BITS) - 1)
    if KIND == E4M3:
        # sign and magnitude at fp16's places are 2^-8 times the value
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    elif KIND == SIGNED:
        value = ((code ^ 0x80) - 0x80).to(tl.float32)
    elif KIND == BLOCK_E2M1:
        value = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)
    elif KIND == UNSIGNED or KIND == BLOCK_MIDDLE:
        value = (code - (1 << (BITS - 1))).to(tl.float32)
    elif KIND == SYMMETRIC4:
        value = code.to(tl.float32) - 1.5
        value += tl.where(code < 2, step.to(tl.float32), -step.to(tl.float32))
    else:
        value = tl.full(code.shape, CODEBOOK[0], tl.float32)
        for index in tl.static_range(1, 1 << BITS):
            value = tl.where(code == index, CODEBOOK[index], value)
    return value.to(tl.float16)


@triton.constexpr_function
def _masked_place(bits, stream):
    """The lowest bit of a stream's codes where `masked` reads them."""
    # all bits of a code are among the ten of a mantissa; the streams above those are shifted down, together
    return {4: (0, 4, 0, 4), 2: (0, 2, 4, 6, 8, 4, 6, 8)}[bits][stream]


@triton.constexpr_function
def _masked_shift(bits, stream):
    return bits * stream - _masked_place(bits, stream)


@triton.constexpr_function
def _masked_bits(bits, stream, upper):
    return (2 if upper else (1 << bits) - 1) << _masked_place(bits, stream)


@triton.constexpr_function
def _masked_assembly(bits, stream, upper):
    shift, mask = _masked_shift(bits, stream), _masked_bits(bits, stream, upper)
    # equal shifts of the same words are made once
    word, first = ("t", f"shr.b32 t, $1, {shift};") if shift else ("$1", "")
    return f"{{\n.reg .b32 t;\n{first}\nand.b32 $0, {word}, 0x{mask:04x}{mask:04x};\n}}"


@triton.constexpr_function
def masked_unit(bits, stream):
    """What a code of 1 is in a stream of `masked`."""
    return 2.0 ** (_masked_place(bits, stream) - 24)


@triton.jit
def masked(words, STREAM: tl.constexpr, BITS: tl.constexpr, UPPER: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Stream STREAM of 4- or 2-bit codes times `masked_unit`, fp16; UPPER: of 2-bit codes without their lower bit.

    Bits under a mask are a subnormal fp16 number, which a matrix product takes exactly: one instruction for two values.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_masked_assembly(BITS, STREAM, UPPER), "=r,r", [words], tl.float16, True, 2)
    else:
        bits = (words.to(tl.int32) >> _masked_shift(BITS, STREAM)) & _masked_bits(BITS, STREAM, UPPER)
        return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def exp2(x, ASSEMBLY: tl.constexpr):
    """2^x, results below 2^-126 flushed to 0: one instruction, where tl.exp2 takes four to keep them."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def log2(x, ASSEMBLY: tl.constexpr):
    """Base-2 logarithm, -inf below 2^-126: one instruction."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return tl.log2(x)
