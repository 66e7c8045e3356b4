"""Block formats against their definitions: llama.cpp's own Python package, and derivations in plain Python."""

import bisect
import itertools
import math
from fractions import Fraction

import gguf
import numpy as np
import pytest
import torch

from kvbench.attention import choose, kernels_lack
from kvbench.cache import PagedCache
from kvbench.dtypes import all_dtypes
from kvbench.dtypes.blocks import Blocks, e2m1
from kvbench.schemes import Scheme

F = np.float32
BLOCKS = [name for name, dtype in all_dtypes().items() if type(dtype).__module__ == Blocks.__module__]
GGML = [name for name in BLOCKS if hasattr(gguf.GGMLQuantizationType, name.upper())]  # gguf reads them
INTEGERS = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]  # and writes these, byte for byte

every_block = pytest.mark.parametrize("name", BLOCKS)


def rows_of_all_kinds(head_dim: int = 128) -> torch.Tensor:
    """[rows, head_dim] float32: normal, heavy tails, constant, zero, one sign, ties of magnitude, large and tiny."""
    ties = torch.tensor([1.0, -3.0, 3.0, 0.25, -0.75, 1.25, -1.75, 2.5]).repeat(head_dim // 8)
    return torch.cat(
        [
            torch.randn(4, head_dim),
            torch.distributions.StudentT(1.5).sample((4, head_dim)),
            torch.tensor([3.7, -2.5, 1e-7, 0.0, -0.0]).unsqueeze(-1).expand(5, head_dim),
            torch.rand(1, head_dim) + 100,
            -torch.rand(1, head_dim) - 3,
            torch.stack([ties, -ties, 2 * ties]),
            torch.randn(1, head_dim) * 1e4,
            torch.randn(3, head_dim) * torch.tensor([[1e-3], [1e-6], [1e-9]]),
        ]
    )


# ---- llama.cpp's own package


def ggml_bytes(name: str, codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """[rows, bytes]: codes [rows, blocks, n] and stored scales [rows, blocks, …] as a GGUF file has them."""
    numbers = scale.contiguous().view(torch.uint8).reshape(*codes.shape[:2], -1).numpy()  # scale, and minimum
    numbers, codes = numbers.copy(), codes.numpy()
    half = codes.shape[-1] // 2
    low = (codes[..., :half] & 15 | (codes[..., half:] & 15) << 4).astype(np.uint8)  # of a block's halves side by side
    if name == "q8_0":
        parts = [numbers, codes.astype(np.int8).view(np.uint8)]
    elif name in ("q5_1", "q5_0"):
        parts = [numbers, np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little"), low]
    elif name == "nvfp4":  # four blocks together, their scales first
        parts = [x.reshape(len(codes), -1, 4 * x.shape[-1]) for x in (numbers, low)]
    else:
        parts = [numbers, low]
    return np.concatenate(parts, -1).reshape(len(codes), -1)


def stored(name: str, x: torch.Tensor) -> np.ndarray:
    """What x becomes, as a GGUF file has it."""
    dtype = all_dtypes()[name]
    rows = dtype.quantize(x)
    return ggml_bytes(name, dtype.unpack(rows.codes).unflatten(-1, (-1, dtype.group_size)), rows.scale)


@pytest.mark.parametrize("name", INTEGERS)
def test_blocks_of_integers_are_llama_cpp_s_byte_for_byte(name):
    """
    A row written as a GGUF file has it is what the package gguf writes.
    """
    x = rows_of_all_kinds()

    written = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name.upper()])

    assert np.array_equal(stored(name, x), written)


def test_mxfp4_is_llama_cpp_s_but_for_ties_and_the_sign_of_zero():
    """
    Scales are equal, and codes too where no value lies midway between two and none becomes zero.
    """
    x = torch.randn(50, 128) * torch.randn(50, 1).exp()
    read = gguf.GGMLQuantizationType.MXFP4
    scales, theirs = np.split(gguf.quants.quantize(x.numpy(), read).reshape(-1, 17), [1], -1)
    dtype = all_dtypes()["mxfp4"]
    rows = dtype.quantize(x)
    ours = stored("mxfp4", x).reshape(-1, 17)[:, 1:]

    assert np.array_equal(rows.scale.numpy().ravel(), scales.ravel())
    for shift in (0, 4):
        a, b = (codes >> shift & 15 for codes in (ours, theirs))
        assert np.array_equal(np.where(a == 8, 0, a), b)


@pytest.mark.parametrize("name", GGML)
def test_llama_cpp_reads_what_is_stored(name):
    """
    The package gguf decodes the stored bytes to the values that are read here, to the bit.
    """
    dtype = all_dtypes()[name]
    x = rows_of_all_kinds()

    theirs = gguf.quants.dequantize(stored(name, x), gguf.GGMLQuantizationType[name.upper()])

    assert np.array_equal(theirs, dtype.dequantize(dtype.quantize(x)).numpy())


# ---- the definitions, a block at a time, without torch


def e4m3(code: int) -> Fraction:
    """S.EEEE.MMM with bias 7, without the sign."""
    exponent, mantissa = code >> 3, code & 7
    return Fraction(mantissa if exponent == 0 else 8 + mantissa) * Fraction(2) ** (max(exponent, 1) - 10)


E4M3 = [e4m3(code) for code in range(0x7F)]  # to 448
E2M1 = [Fraction(value) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def nearest(size: Fraction, values: list[Fraction]) -> int:
    """The index of the nearest of these, ties to the even one; the last beyond it."""
    above = min(bisect.bisect_left(values, size), len(values) - 1)
    below = max(above - 1, 0)
    distances = abs(values[below] - size), abs(values[above] - size)
    if distances[0] == distances[1]:
        return above if above % 2 == 0 else below
    return below if distances[0] < distances[1] else above


def signed(x: np.float32, size: Fraction, values: list[Fraction], sign: int) -> int:
    return nearest(size, values) + (sign if math.copysign(1, x) < 0 else 0)


def mx(block: list[np.float32], values: list[Fraction], sign: int, emax: int) -> tuple[list[int], bytes]:
    """OCP MX 1.0, 6.3: the shared exponent is that of the largest magnitude less emax."""
    largest = float(max(abs(v) for v in block))
    exponent = max(math.frexp(largest)[1] - 1 - emax, -127) if largest else -127
    scale = Fraction(2) ** exponent
    return [signed(v, abs(Fraction(float(v))) / scale, values, sign) for v in block], bytes([exponent + 127])


def mxfp4(block: list[np.float32]) -> tuple[list[int], bytes]:
    return mx(block, E2M1, 8, 2)


def mxfp8(block: list[np.float32]) -> tuple[list[int], bytes]:
    return mx(block, E4M3, 128, 8)


def nvfp4(block: list[np.float32]) -> tuple[list[int], bytes]:
    """The scale is the nearest e4m3 to a sixth of the largest magnitude; elements are divided by what is stored."""
    code = nearest(Fraction(float(max(abs(v) for v in block) / F(6))), E4M3)
    if code == 0:
        return [0] * len(block), b"\0"
    scale = F(float(E4M3[code]))
    return [signed(v, abs(Fraction(float(v / scale))), E2M1, 8) for v in block], bytes([code])


def by_halves(values: list[np.float32]) -> np.float32:
    half = len(values) // 2
    return values[0] if not half else by_halves([a + b for a, b in zip(values[:half], values[half:], strict=True)])


def iq4_nl(block: list[np.float32]) -> tuple[list[int], bytes]:
    """ggml-quants.c's quantize_row_iq4_nl_impl without an importance matrix and without further trials."""
    far = max(block, key=abs)
    if abs(far) < 1e-15:
        return [0] * len(block), b"\0\0"
    inverse = F(1) / (far / F(-127))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(IQ4_NL)]
    codes = [bisect.bisect_right(middles, float(v * inverse)) for v in block]
    levels = [F(IQ4_NL[code]) for code in codes]
    above = by_halves([v * v * q * v for v, q in zip(block, levels, strict=True)])
    below = by_halves([v * v * q * q for v, q in zip(block, levels, strict=True)])
    return codes, np.float16(above / below).tobytes()


@pytest.mark.parametrize("definition", [mxfp8, mxfp4, nvfp4, iq4_nl], ids=lambda f: f.__name__)
def test_codes_and_scales_are_those_of_the_definition(definition):
    """
    Every byte of every block is what the definition says.
    """
    dtype = all_dtypes()[definition.__name__]
    x = rows_of_all_kinds(64)

    rows = dtype.quantize(x)

    codes = rows.codes.int() if dtype.code_bits == 8 else dtype.unpack(rows.codes)
    scales = rows.scale.unsqueeze(-1).view(torch.uint8)
    for row, got, stored_scales in zip(x.numpy(), codes.tolist(), scales.tolist(), strict=True):
        for i, scale in enumerate(stored_scales):
            block = slice(i * dtype.group_size, (i + 1) * dtype.group_size)
            assert (got[block], bytes(scale)) == definition(list(row[block]))


def test_e2m1_by_hand():
    """
    Ties go to the even code, beyond 6 it saturates, and a negative zero stays one.
    """
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 100.0])

    assert e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7]
    assert e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14, 15, 15]


# ---- sizes


@pytest.mark.parametrize(
    ("name", "bits", "multiple"),
    [
        ("mxfp8", 8 + 8 / 32, 32),
        ("mxfp4", 4 + 8 / 32, 32),
        ("nvfp4", 4 + 8 / 16, 16),
        ("q8_0", 8 + 16 / 32, 32),
        ("q5_1", 5 + 32 / 32, 32),
        ("q5_0", 5 + 16 / 32, 32),
        ("q4_1", 4 + 32 / 32, 32),
        ("q4_0", 4 + 16 / 32, 32),
        ("iq4_nl", 4 + 16 / 32, 32),
        ("uint4_per_group_64", 4 + 32 / 64, 64),
        ("uint4_per_group_128", 4 + 32 / 128, 128),
        ("int3_per_token_head", 3 + 32 / 128, 32),
    ],
)
def test_bits_and_head_dims_by_hand(name, bits, multiple):
    """
    Bits of a code and of its share of the scales; a head_dim that leaves a part of a block is refused by name.
    """
    dtype = all_dtypes()[name]

    assert dtype.bits_per_value(128) == bits
    for head_dim in (64, 80, 96, 256):
        if head_dim % multiple == 0:
            assert dtype.code_bytes(head_dim) == head_dim * dtype.code_bits // 8
        else:
            with pytest.raises(ValueError, match=f"head_dim {head_dim} does not fit {name}: it needs a multiple of"):
                dtype.code_bytes(head_dim)


def test_nvfp4_s_scale_of_a_tensor_is_counted_and_multiplies():
    """
    Four bytes a layer's K and its V; with t the rows are those of x / t, times t.
    """
    dtype = all_dtypes()["nvfp4"]
    cache = PagedCache([(2, 64)] * 3, Scheme.parse("nvfp4"), pages=2, page_size=4)
    x, t = torch.randn(5, 64), torch.tensor(0.25)

    rows, plain = dtype.quantize(x, t), dtype.quantize(x / t)

    assert 8 * (cache.nbytes - 4 * 2 * 3) == 4.5 * 3 * 2 * 2 * 4 * 2 * 64
    assert torch.equal(rows.codes, plain.codes)
    assert torch.equal(rows.scale, plain.scale)
    assert torch.equal(dtype.dequantize(rows, tensor_scale=t), t * dtype.dequantize(plain))


# ---- what does not fit


@every_block
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_block_stays_visible(name, bad):
    """
    One NaN or infinity makes its block NaN, and no other.
    """
    dtype = all_dtypes()[name]
    x = torch.randn(3, 128)
    whole = dtype.dequantize(dtype.quantize(x))
    x[1, 40] = bad

    values = dtype.dequantize(dtype.quantize(x))

    broken = torch.zeros(3, 128, dtype=torch.bool)
    first = 40 // dtype.group_size * dtype.group_size
    broken[1, first : first + dtype.group_size] = True
    assert torch.equal(values.isnan(), broken)
    assert torch.equal(values[~broken], whole[~broken])


@every_block
def test_a_scale_beyond_its_type_is_said_or_saturates(name):
    """
    Where float16 ends a block is NaN; e8m0 reaches all of float32; an e4m3 scale ends at 448, so nvfp4 at 2688.
    """
    dtype = all_dtypes()[name]
    x = torch.randn(2, 64)
    x[0, :32] *= 1e30

    values = dtype.dequantize(dtype.quantize(x))

    assert values[:, 32:].isfinite().all()
    if dtype.scale_storage == torch.float16:
        assert values[0, :32].isnan().all()
    elif name == "nvfp4":
        assert torch.equal(values[0, :32], 2688 * x[0, :32].sign())
    else:
        assert ((values - x)[0, :32].double().norm() / x[0, :32].double().norm()) < 0.2


@every_block
@pytest.mark.parametrize("value", [0.0, 5.0, -0.3])
def test_a_constant_block_comes_back(name, value):
    """
    A block of one value is it, but for the rounding of an element and a scale; zeros are zeros.
    """
    dtype = all_dtypes()[name]
    x = torch.full((2, 64), value)

    values = dtype.dequantize(dtype.quantize(x))

    # half a step of e2m1 is up to a sixth of its value, and up to a quarter is cut off above 6 (mxfp4)
    assert (values - x).abs().max() <= abs(value) * (1 / 4 if name == "mxfp4" else 1 / 16)


# ---- kernels


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, f"no kernel decodes {name}, which has a scale every") for name in ("q5_1", "q4_1", "iq4_nl")),
        ("uint4_per_group_64", "no kernel decodes uint4_per_group_64, which has a scale every 64 channels"),
    ],
)
def test_the_reference_computes_them_and_says_why(monkeypatch, name, reason):
    """
    On a GPU `attention: auto` takes the reference for them, with the reason; `triton` reads them in a 16-bit copy.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, scheme = torch.device("cuda"), Scheme.parse(name, "none")

    assert choose("auto", scheme, torch.float16, gpu) == "reference"
    assert kernels_lack(scheme, torch.float16, gpu).startswith(reason)
    assert choose("triton", scheme, torch.float16, gpu) == "triton"


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q4_1", "q4_0", "iq4_nl"])
@pytest.mark.parametrize(("head_dim", "keys", "values"), [(64, 64, 64), (128, 128, 64), (192, 64, 64), (256, 256, 64)])
def test_presets_turn_as_llama_cpp_does(name, head_dim, keys, values):
    """
    Keys in blocks of the largest power of two that divides head_dim, values in blocks of 64.
    """
    scheme = Scheme.parse(f"llama_cpp_{name}")

    for side, block in zip(scheme.sides, (keys, values), strict=True):
        assert side.dtype.name == name
        assert [one.block(head_dim) for one in side.transforms] == [block]


def test_rotated_and_not():
    """
    Any of them goes with a Hadamard rotation, which spreads an outlier over its block's neighbours.
    """
    x = torch.randn(200, 128)
    x[:, 5] *= 60

    def error(name: str, rotation: str) -> float:
        side = Scheme.parse(name, rotation).key
        read = side.undo(side.dtype.dequantize(side.dtype.quantize(side.apply(x))))
        return ((read - x)[:, 6:32].norm() / x[:, 6:32].norm()).item()

    for name in ("q4_0", "mxfp4", "uint4_per_group_128"):
        assert error(name, "hadamard") < error(name, "none")
