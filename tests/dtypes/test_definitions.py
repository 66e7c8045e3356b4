"""Each dtype against a second derivation of its definition: a value at a time, in Python, without torch.

Nothing here is shared with kvbench/dtypes. A number is rounded to float32 where the definition rounds it.
"""

import bisect
import itertools
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, partial

import numpy as np
import pytest
import torch

from kvbench.dtypes import Rows, all_dtypes

F = np.float32
Row = Sequence[np.float32]

HEAD_DIMS = [64, 80, 96, 128, 256]


# ---- the definitions


def half_away(x: np.float32) -> int:
    """The nearest integer, halves away from zero."""
    return int(math.copysign(math.floor(abs(float(x)) + 0.5), float(x)))


def clamp(x: int, low: int, high: int) -> int:
    return max(low, min(high, x))


def float_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def stored_scale(rows: Rows, i: int) -> bytes:
    """The bytes of a row's scale."""
    return b"" if rows.scale is None else bytes(rows.scale[i].reshape(1).view(torch.uint8).tolist())


def scale_bytes(scale: float) -> bytes:
    return struct.pack("<f", scale)


def words(codes: Sequence[int], bits: int, word_bits: int = 16) -> bytes:
    """Word j holds the codes of channels j, j+W, j+2W, ... from its low bits up; words are little-endian."""
    per_word = word_bits // bits
    count = len(codes) // per_word
    packed = b""
    for j in range(count):
        word = 0
        for stream in range(per_word):
            word |= codes[j + stream * count] << (stream * bits)
        packed += word.to_bytes(word_bits // 8, "little")
    return packed


def auto(x: Row) -> tuple[bytes, bytes]:
    return b"".join(struct.pack("<f", v) for v in x), b""


def fp16(x: Row) -> tuple[bytes, bytes]:
    def half(v: float) -> bytes:
        try:
            return struct.pack("<e", v)  # to nearest even
        except OverflowError:
            return struct.pack("<e", math.copysign(math.inf, v))

    return b"".join(half(float(v)) for v in x), b""


def bf16(x: Row) -> tuple[bytes, bytes]:
    def upper_half(v: float) -> int:
        bits = float_bits(v)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even

    return b"".join(upper_half(v).to_bytes(2, "little") for v in x), b""


def e4m3_value(code: int) -> float:
    """S.EEEE.MMM with bias 7, no infinity; 0x7f is NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if code & 0x80 else magnitude


E4M3 = [e4m3_value(code) for code in range(0x7F)]  # ascending, 0 to 448


def e4m3(v: np.float32) -> int:
    """The code of the nearest value, ties to the even code; beyond 448 it saturates."""
    magnitude = min(abs(float(v)), 448.0)
    above = bisect.bisect_left(E4M3, magnitude)
    below = max(above - 1, 0)
    if E4M3[above] - magnitude == magnitude - E4M3[below]:
        code = above if above % 2 == 0 else below
    else:
        code = above if E4M3[above] - magnitude < magnitude - E4M3[below] else below
    return code | (0x80 if math.copysign(1, float(v)) < 0 else 0)


def fp8_per_tensor(x: Row) -> tuple[bytes, bytes]:
    return bytes(e4m3(v) for v in x), b""


def fp8_per_token_head(x: Row) -> tuple[bytes, bytes]:
    scale = max(max(abs(v) for v in x) / F(448), F(1e-6))
    inverse = F(1) / scale
    return bytes(e4m3(v * inverse) for v in x), scale_bytes(scale)


def int8_per_token_head(x: Row) -> tuple[bytes, bytes]:
    scale = max(max(abs(v) for v in x) / F(127), F(1e-6))
    inverse = F(1) / scale
    return bytes(clamp(half_away(v * inverse), -128, 127) & 0xFF for v in x), scale_bytes(scale)


def int4_per_token_head(x: Row) -> tuple[bytes, bytes]:
    scale = max((max(x) - min(x)) / F(15), F(1e-6))
    zero = clamp(half_away(-min(x) / scale), 0, 15)
    codes = [clamp(half_away(v / scale + F(zero)), 0, 15) for v in x]
    return words(codes, 4), scale_bytes(float_of(float_bits(scale) & ~15 | zero))


def sum_by_halves(values: list[np.float32]) -> np.float32:
    """The first half plus the second, again and again; the length is a power of two."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return sum_by_halves([a + b for a, b in zip(values[:half], values[half:], strict=True)])


def int2_per_token_head(x: Row) -> tuple[bytes, bytes]:
    return int2_of(x, large=max(abs(v) for v in x) >= 2.0**58)


def int2_of(x: Row, large: bool) -> tuple[bytes, bytes]:
    x = [v * F(2.0**-72) for v in x] if large else x
    squares = [v * v for v in x]
    while len(squares) & (len(squares) - 1):
        squares.append(F(0))
    norm = np.sqrt(sum_by_halves(squares) + F(0 if large else 1e-12))
    root = F(math.sqrt(len(x)))
    factor = root / norm

    def code(z: np.float32) -> int:
        if z < 0:
            return 0 if z <= F(-0.9816) else 1
        return 3 if z > F(0.9816) else 2

    scale = norm / root
    if large:
        scale = min(scale * F(2.0**72), np.finfo(F).max)
    return words([code(v * factor) for v in x], 2), scale_bytes(scale)


# of each width: multiplier, exponents and coefficients of the curve
CURVES = {
    1: (323, {0: 41, 6: 24}),
    2: (275, {0: 46, 6: 34}),
    3: (263, {0: 46, 2: 17, 16: 36}),
    4: (1295, {0: 48, 2: 16, 16: 41}),
}
# of each dtype: bits, eighths of the channels and weight of its parts
PARTS = {
    "tcq2": [(2, 8, 1)],
    "tcq3": [(3, 8, 1)],
    "tcq4": [(4, 8, 1)],
    "tcq421": [(4, 2, 32), (2, 4, 4), (1, 2, 1)],
    "tcq4321": [(4, 1, 32), (3, 1, 16), (2, 3, 4), (1, 3, 1)],
}


@cache
def tcq_values(bits: int) -> list[int]:
    """What each of the 256 windows of 8 bits decodes to."""
    multiplier, curve = CURVES[bits]
    levels = 2 ** (8 + bits)
    found = []
    for window in range(256):
        level = Fraction(2 * (multiplier * window % levels) + 1, levels) - 1
        value = sum(c * level * abs(level) ** exponent for exponent, c in curve.items())
        found.append(int(math.copysign(math.floor(abs(value) + Fraction(1, 2)), value)))
    return found


def tcq_steps(name: str, dim: int) -> list[tuple[int, int, int]]:
    """Channel, bits and weight of each step, in the order of a row's bits."""
    found = []
    first = 0
    for bits, eighths, weight in PARTS[name]:
        count = dim * eighths // 8
        places = math.gcd(count, {1: 16, 2: 8, 3: 16, 4: 4}[bits])  # codes of a word, or of three
        stride = count // places
        found += [(first + place * stride + word, bits, weight) for word in range(stride) for place in range(places)]
        first += count
    return found


def tcq(name: str, x: Row) -> tuple[bytes, bytes]:
    """The path in units of the root mean square, its scale, and with parts the path again in units of that."""
    starts = len(PARTS[name]) == 1
    steps = tcq_steps(name, len(x))
    x = [min(max(v, F(-(2.0**40))), F(2.0**40)) for v in x]
    squares = [v * v for v in x]
    while len(squares) & (len(squares) - 1):
        squares.append(F(0))
    norm = np.sqrt(sum_by_halves(squares))
    step = norm / F(512 * math.sqrt(len(x)))
    inverse = F(1) / step if norm >= 2.0**-40 else F(0)
    z = [round(float(x[channel] * inverse)) for channel, _, _ in steps]  # halves to even

    path = tcq_path(z, steps, starts)
    chosen = [tcq_values(bits)[state] for state, (_, bits, _) in zip(path, steps, strict=True)]
    weights = [weight for _, _, weight in steps]
    above = F(sum(w * a * b for w, a, b in zip(weights, z, chosen, strict=True)))
    below = F(sum(w * v * v for w, v in zip(weights, chosen, strict=True)))
    scale = float(step * (above / below)) if below else 0.0
    first = steps[0][1]
    if starts:
        word = (tcq_scale(scale, 6, 2 + first, 40) << 8 - first | path[0] >> first).to_bytes(2, "little")
    else:
        code = tcq_scale(32 * scale, 5, 3, 21)
        word = bytes([code])
        inverse = F(1) / (F(e5m3_value(code)) / F(512))
        path = tcq_path([round(float(x[channel] * inverse)) for channel, _, _ in steps], steps, starts)
    codes = "".join(format(state & (2**bits - 1), f"0{bits}b") for state, (_, bits, _) in zip(path, steps, strict=True))
    codes += "0" * (-len(codes) % 16)
    return b"".join(int(codes[i : i + 16], 2).to_bytes(2, "little") for i in range(0, len(codes), 16)), word


def tcq_path(z: Sequence[int], steps: Sequence[tuple[int, int, int]], starts: bool) -> list[int]:
    """All paths by dynamic programming from the first code on, each state knowing its whole cheapest path's cost."""
    states = np.arange(256)
    before = np.zeros((len(z), 256), dtype=np.int64)
    cost = np.zeros(256, dtype=np.int64)
    if not starts:
        cost[1 << steps[0][1] :] = 1 << 60
    for t, (_, bits, weight) in enumerate(steps):
        if t:
            # predecessors of a state: its upper bits below each of 2^k others, the first of equal ones
            candidates = np.stack([(states >> bits) + (upper << 8 - bits) for upper in range(2**bits)])
            before[t] = candidates[cost[candidates].argmin(0), states]
            cost = cost[before[t]]
        values = np.array(tcq_values(bits), dtype=np.int64)
        cost = cost + weight * (8 * values**2 - values * clamp(z[t], -4095, 4095))
    path = [int(cost.argmin())]
    for t in range(len(z) - 1, 0, -1):
        path.insert(0, int(before[t][path[0]]))
    return path


def tcq_scale(scale: float, exponent_bits: int, mantissa_bits: int, bias: int) -> int:
    """The code of the nearest number of so many bits of exponent e and of mantissa m, 2^(e - bias) (1 + m)."""
    if scale <= 0:
        return 0
    fraction, exponent = math.frexp(scale)  # of [0.5, 1)
    code = math.floor(((exponent - 1 + bias) + (2 * fraction - 1)) * 2**mantissa_bits + 0.5)
    return clamp(code, 0, 2 ** (exponent_bits + mantissa_bits) - 2)


def e5m3_value(code: int) -> np.float32:
    return F((1 + code % 8 / 8) * 2.0 ** (code // 8 - 21))


def half_to_even(x: np.float32) -> int:
    return round(float(x))  # as Python rounds


def searched(x: Row, widths: Sequence[int], steps: Sequence[float]) -> tuple[list[int], int]:
    """Codes, channel by channel, and the scale's code."""
    y = [v * F(1 / step) for v, step in zip(x, steps, strict=True)]
    squares = [v * v for v in x]
    squares += [F(0)] * ((1 << (len(x) - 1).bit_length()) - len(x))
    root = np.sqrt(sum_by_halves(squares) * F(1 / len(x)))
    middle = max((code for code in range(255) if e5m3_value(code) <= root), default=0)

    def codes(scale: np.float32) -> tuple[list[int], np.float32]:
        inverse = F(1) / scale
        z = [v * inverse - F(0.5) for v in y]
        found = [
            half_to_even(min(max(v, F(-(2 ** (w - 1)))), F(2 ** (w - 1) - 1))) for v, w in zip(z, widths, strict=True)
        ]
        left = [v - F(c) for v, c in zip(z, found, strict=True)]
        left = [v * v for v in left] + [F(0)] * (len(squares) - len(x))
        return [c + 2 ** (w - 1) for c, w in zip(found, widths, strict=True)], sum_by_halves(left) * (scale * scale)

    best, chosen = F(math.inf), middle
    for tried in range(middle - 3, middle + 8):
        tried = clamp(tried, 0, 254)
        error = codes(e5m3_value(tried))[1]
        if error < best:
            best, chosen = error, tried
    return codes(e5m3_value(chosen))[0], chosen


def midrise2_per_token_head(x: Row) -> tuple[bytes, bytes]:
    codes, scale = searched(x, [2] * len(x), [1.0] * len(x))
    return words(codes, 2), bytes([scale])


STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}
TIERS = {"421": (4, 4, 2, 2, 2, 2, 1, 1), "4321": (4, 4, 3, 3, 2, 2, 1, 1), "42": (4, 4, 2, 2, 2, 2, 2, 2)}
# of each word from its low bits up, and of what follows the words: (slice, lowest bit, bits)
FIELDS = {
    "421": (((0, 0, 4), (1, 0, 4), (2, 0, 2), (3, 0, 2), (4, 0, 2), (5, 0, 2)), ((6, 0), (7, 0))),
    "4321": (
        ((0, 0, 4), (1, 0, 4), (2, 0, 2), (3, 0, 2), (4, 0, 2), (5, 0, 2)),
        ((2, 2), (3, 2), (6, 0), (7, 0)),
    ),
    "42": (
        ((0, 0, 4), (1, 0, 4), (2, 0, 2), (3, 0, 2), (4, 0, 2), (5, 0, 2)),
        ((6, 0), (6, 1), (7, 0), (7, 1)),
    ),
}


def tiers(kind: str, x: Row) -> tuple[bytes, bytes]:
    width = len(x) // 8
    widths = [bits for bits in TIERS[kind] for _ in range(width)]
    codes, scale = searched(x, widths, [STEPS[bits] for bits in widths])
    in_words, behind = FIELDS[kind]
    packed = b""
    for j in range(width):
        word = place = 0
        for part, low, bits in in_words:
            word |= (codes[part * width + j] >> low & (1 << bits) - 1) << place
            place += bits
        packed += word.to_bytes(2, "little")
    single = [codes[part * width + j] >> low & 1 for part, low in behind for j in range(width)]
    single += [0] * (-len(single) % 16)
    return packed + words(single, 1), bytes([scale])


def tiers421_per_token_head(x: Row) -> tuple[bytes, bytes]:
    return tiers("421", x)


def tiers4321_per_token_head(x: Row) -> tuple[bytes, bytes]:
    return tiers("4321", x)


def tiers42_per_token_head(x: Row) -> tuple[bytes, bytes]:
    return tiers("42", x)


DEFINITIONS = {
    f.__name__: f
    for f in (
        auto,
        fp16,
        bf16,
        fp8_per_tensor,
        fp8_per_token_head,
        int8_per_token_head,
        int4_per_token_head,
        int2_per_token_head,
        midrise2_per_token_head,
        tiers421_per_token_head,
        tiers4321_per_token_head,
        tiers42_per_token_head,
    )
} | {name: partial(tcq, name) for name in PARTS}


# ---- what is quantized


def halves(head_dim: int) -> torch.Tensor:
    """Values midway between the codes of int8 (with a scale of exactly 1), and of int4 (with one of exactly 2)."""
    int8 = torch.arange(head_dim) % 200 - 99.5
    int8[0] = 127.0
    int4 = (torch.arange(head_dim) % 30 - 14).float()
    int4[:2] = torch.tensor([-14.0, 16.0])
    return torch.stack([int8, int4, -int8])


INPUTS = {
    "normal": lambda d: torch.randn(7, d),
    "heavy tails": lambda d: torch.distributions.StudentT(1.5).sample((7, d)),
    "outlier channel": lambda d: torch.randn(3, d) * torch.where(torch.arange(d) == 5, 80.0, 1.0),
    "equal values": lambda d: torch.tensor([[3.7], [-2.5], [1e-8], [1.0]]).expand(4, d),
    "zeros": lambda d: torch.zeros(2, d),
    "negative zeros": lambda d: -torch.zeros(1, d),
    "positive": lambda d: torch.rand(3, d) + 0.5,
    "negative": lambda d: -torch.rand(3, d) - 0.5,
    "far from zero": lambda d: torch.rand(3, d) + torch.tensor([[100.0], [-100.0], [3.0]]),
    "huge": lambda d: torch.randn(3, d) * 1e15,
    "squares overflow": lambda d: torch.randn(4, d) * torch.tensor([[1e17], [1e19], [1e20], [1e36]]),
    "largest": lambda d: torch.where(torch.arange(d) % 2 == 0, 1.0, 0.25).unsqueeze(0) * torch.finfo(torch.float32).max,
    "tiny": lambda d: torch.randn(5, d) * torch.tensor([[1e-5], [1e-7], [1e-12], [1e-30], [1e-41]]),
    "halves": halves,
    "one value": lambda d: torch.where(torch.arange(d) == 11, 6.5, 0.0).unsqueeze(0),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("kind", INPUTS)
def test_codes_and_scales_are_those_of_the_definition(name, kind):
    """
    Every byte of every row is what the definition says.
    """
    for head_dim in HEAD_DIMS:
        x = INPUTS[kind](head_dim)

        rows = all_dtypes()[name].quantize(x)

        for i, row in enumerate(x.numpy()):
            with np.errstate(over="ignore", under="ignore"):
                codes, scale = DEFINITIONS[name](list(row))
            assert bytes(rows.codes[i].tolist()) == codes
            assert stored_scale(rows, i) == scale


@pytest.mark.parametrize("kind", INPUTS)
def test_fp8_with_a_tensor_scale_divides_by_it(kind):
    """
    fp8_per_tensor codes x / scale; calibration maps the largest magnitude to 448.
    """
    dtype = all_dtypes()["fp8_per_tensor"]
    x = INPUTS[kind](96)
    scale = dtype.calibrate(x)

    rows = dtype.quantize(x, scale)

    assert scale == max(F(x.abs().max()) / F(448), F(1e-6))
    assert rows.scale is None
    for i, row in enumerate(x.numpy()):
        assert bytes(rows.codes[i].tolist()) == bytes(e4m3(v / F(scale)) for v in row)


@pytest.mark.parametrize("scale", [0.3, 0.7, 1.1, 1e-3])
def test_fp8_divides_and_does_not_multiply(scale):
    """
    x / scale, rounded once: halfway between two codes, a product with 1 / scale falls to the other side.
    """
    midpoints = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(E4M3)])
    scale = torch.tensor(scale)
    x = midpoints * scale

    rows = all_dtypes()["fp8_per_tensor"].quantize(x, scale)

    assert bytes(rows.codes.tolist()) == bytes(e4m3(v / F(scale)) for v in x.numpy())


# ---- reading back


def decoded(name: str, codes: bytes, scale: bytes) -> list[float]:
    """The values of a stored row, by the table of definitions, in float64."""
    if name.startswith("tcq"):
        return tcq_decoded(name, codes, int.from_bytes(scale, "little"))
    if name.startswith("tiers"):
        return decoded_tiers(name.removeprefix("tiers").removesuffix("_per_token_head"), codes, scale)
    if name == "midrise2_per_token_head":
        stored = [int.from_bytes(codes[i : i + 2], "little") for i in range(0, len(codes), 2)]
        step = float(e5m3_value(scale[0]))
        return [((word >> shift & 3) - 1.5) * step for shift in range(0, 16, 2) for word in stored]
    s = struct.unpack("<f", scale)[0] if scale else 1.0
    if name == "auto":
        return list(struct.unpack(f"<{len(codes) // 4}f", codes))
    if name == "fp16":
        return list(struct.unpack(f"<{len(codes) // 2}e", codes))
    if name == "bf16":
        return [float_of(int.from_bytes(codes[i : i + 2], "little") << 16) for i in range(0, len(codes), 2)]
    if name.startswith("fp8"):
        return [e4m3_value(code) * s for code in codes]
    if name == "int8_per_token_head":
        return [(code - 256 if code > 127 else code) * s for code in codes]
    bits = 4 if name == "int4_per_token_head" else 2
    stored = [int.from_bytes(codes[i : i + 2], "little") for i in range(0, len(codes), 2)]
    in_order = [word >> shift & (1 << bits) - 1 for shift in range(0, 16, bits) for word in stored]
    if bits == 4:
        zero, clean = float_bits(s) & 15, float_of(float_bits(s) & ~15)
        return [(code - zero) * clean for code in in_order]
    return [(-1.5104, -0.4528, 0.4528, 1.5104)[code] * s for code in in_order]


def decoded_tiers(kind: str, codes: bytes, scale: bytes) -> list[float]:
    in_words, behind = FIELDS[kind]
    words_and_rest = [int.from_bytes(codes[i : i + 2], "little") for i in range(0, len(codes), 2)]
    width = next(w for w in range(len(codes)) if w + -(-len(behind) * w // 16) == len(words_and_rest))
    stored, rest = words_and_rest[:width], words_and_rest[width:]
    found = [[0] * width for _ in range(8)]
    place = 0
    for part, low, bits in in_words:
        for j, word in enumerate(stored):
            found[part][j] |= (word >> place & (1 << bits) - 1) << low
        place += bits
    single = [word >> shift & 1 for shift in range(16) for word in rest]
    for n, (part, low) in enumerate(behind):
        for j in range(width):
            found[part][j] |= single[n * width + j] << low
    gain = float(e5m3_value(scale[0]))
    return [
        (code - 2 ** (bits - 1) + 0.5) * gain * STEPS[bits]
        for slice_codes, bits in zip(found, TIERS[kind], strict=True)
        for code in slice_codes
    ]


def tcq_decoded(name: str, codes: bytes, word: int) -> list[float]:
    """The values of the windows of one string of bits, each times the scale."""
    eighths = sum(bits * eighths for bits, eighths, _ in PARTS[name])
    starts = len(PARTS[name]) == 1
    dim = 64 * len(codes) // eighths
    steps = tcq_steps(name, dim if starts else dim // 16 * 16)  # a row of parts is filled up to a word
    start_bits = 8 - steps[0][1]
    if starts:
        start, code, mantissa_bits, bias = word & (2**start_bits - 1), word >> start_bits, 10 - start_bits, 40
    else:
        start, code, mantissa_bits, bias = 0, word, 3, 26
    exponent, mantissa = divmod(code, 2**mantissa_bits)
    scale = 0.0 if starts and code == 0 else 2.0 ** (exponent - bias) * (1 + mantissa / 2**mantissa_bits)
    string = format(start, f"0{start_bits}b")
    string += "".join(format(codes[i] | codes[i + 1] << 8, "016b") for i in range(0, len(codes), 2))
    found = [0.0] * len(steps)
    end = start_bits
    for channel, bits, _ in steps:
        end += bits
        found[channel] = tcq_values(bits)[int(string[end - 8 : end], 2)] * scale
    return found


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "positive", "tiny"])
def test_reading_follows_the_definition(name, kind):
    """
    In float64 the values read back are exactly those of the stored bytes.
    """
    dtype = all_dtypes()[name].resolve(torch.float32)
    for head_dim in HEAD_DIMS:
        rows = dtype.quantize(INPUTS[kind](head_dim))

        values = dtype.dequantize(rows, torch.float64)

        for i in range(len(values)):
            assert values[i].tolist() == decoded(name, bytes(rows.codes[i].tolist()), stored_scale(rows, i))


# ---- examples small enough for a pencil


def test_int8_by_hand():
    """
    A row whose largest magnitude is 127 has the scale 1, and its halves round away from zero.
    """
    x = torch.tensor([127.0, 0.5, -0.5, 1.5, -1.5, 0.4, -126.5, 2.49])

    rows = all_dtypes()["int8_per_token_head"].quantize(x)

    assert rows.scale == 1
    assert rows.codes.view(torch.int8).tolist() == [127, 1, -1, 2, -2, 0, -127, 2]


def test_int4_by_hand():
    """
    From -5 to 10 there are fifteen steps of 1; zero is code 5, and 5 stands in the scale's low four bits.
    """
    x = torch.tensor([-5.0, 10.0, 0.0, 0.5, -0.4, 3.0, 9.4, -1.0])
    dtype = all_dtypes()["int4_per_token_head"]

    rows = dtype.quantize(x)

    # W = 2 words: the first holds channels 0, 2, 4, 6 and the second 1, 3, 5, 7
    assert rows.codes.tolist() == [0x50, 0xE5, 0x6F, 0x48]
    assert float_bits(rows.scale) == 0x3F800000 | 5
    assert dtype.dequantize(rows).tolist() == [-5, 10, 0, 1, 0, 3, 9, -1]


def test_int2_by_hand():
    """
    A row of unit variance is cut at -0.9816, 0 and 0.9816, and its scale is 1.
    """
    x = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.5, -1.5, math.sqrt(0.5), -math.sqrt(0.5)])
    x = x * (8 / x.square().sum()).sqrt()
    dtype = all_dtypes()["int2_per_token_head"]

    rows = dtype.quantize(x)

    # codes 3 0 2 1 3 0 2 1 from the low bits up
    assert rows.codes.tolist() == [0b01_10_00_11, 0b01_10_00_11]
    assert rows.scale.item() == pytest.approx(1, rel=2**-22)


def test_int2_of_a_row_whose_squares_overflow():
    """
    A finite row is never NaN: at 1e19 it has the codes of the row at 1, and that row's scale times the power of two.
    """
    dtype = all_dtypes()["int2_per_token_head"]
    x = torch.randn(64)

    small, large = dtype.quantize(x), dtype.quantize(x * 2.0**63)

    assert (x * 2.0**63).square().sum().isinf()
    assert torch.equal(small.codes, large.codes)
    assert torch.equal(small.scale * 2.0**63, large.scale)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_int2_of_large_rows_is_that_of_the_plain_formula(head_dim):
    """
    Where the squares do not overflow, shrinking changes no bit, on either side of 2^58.
    """
    dtype = all_dtypes()["int2_per_token_head"]
    for x in torch.randn(16, head_dim) * torch.exp2(torch.arange(44, 60)).unsqueeze(-1):
        rows = dtype.quantize(x)
        assert (bytes(rows.codes.tolist()), scale_bytes(rows.scale)) == int2_of(list(x.numpy()), large=False)


def test_e4m3_by_hand():
    """
    Ties go to the even code, and 448 is the end.
    """
    x = torch.tensor([1.0625, 1.1875, 500.0, -1e9, 2.0**-10, 3 * 2.0**-10, 0.3, -0.0])

    rows = all_dtypes()["fp8_per_tensor"].quantize(x)

    assert rows.codes.tolist() == [0x38, 0x3A, 0x7E, 0xFE, 0x00, 0x02, 0x2A, 0x80]


def test_the_codebook_is_lloyd_and_max_s():
    """
    Each centroid is a unit Gaussian's mean over its cell, and each threshold is midway between two centroids.
    """
    from scipy.stats import norm

    from kvbench.dtypes.int2 import CENTROIDS, THRESHOLD

    edges = [-math.inf, -THRESHOLD, 0, THRESHOLD, math.inf]
    for low, high, centroid in zip(edges, edges[1:], CENTROIDS, strict=False):
        mean = (norm.pdf(low) - norm.pdf(high)) / (norm.cdf(high) - norm.cdf(low))
        assert centroid == pytest.approx(mean, abs=5e-5)  # four decimals
    assert pytest.approx((CENTROIDS[2] + CENTROIDS[3]) / 2, abs=5e-5) == THRESHOLD
