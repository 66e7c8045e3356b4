"""The seed's byte layout, against a packer written from its description.

The seed turns rows with the ±1 matrix, without a factor. Rows here are small integers, so that every sum is exact in
float32 whatever its order, and the bytes have nothing to hide behind.
"""

import bisect
import math
import struct

import numpy as np
import pytest
import scipy.linalg
import torch

from kvbench.dtypes import all_dtypes
from kvbench.dtypes.seed import export_rows, import_rows
from kvbench.transforms import all_rotations

F = np.float32

SEED_DTYPES = ["fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "int2_per_token_head"]
every_dtype = pytest.mark.parametrize("name", SEED_DTYPES)
every_rotation = pytest.mark.parametrize("rotation", ["none", "hadamard", "randomized_hadamard"])


def turned(x: list[float], rotation: str) -> list[float]:
    """H · (signs ∘ x) with the ±1 Sylvester matrix, in float64; the seed reshapes a row to [D / b, b] first."""
    if rotation == "none":
        return x
    block = len(x) & -len(x)
    values = np.array(x).reshape(-1, block)
    if rotation == "randomized_hadamard":
        generator = torch.Generator("cpu").manual_seed(0x9E3779B9)
        values = values * (2 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1).double().numpy()
    return np.concatenate([scipy.linalg.hadamard(block) @ part for part in values]).tolist()


def half_away(v: float) -> int:
    return int(math.copysign(math.floor(abs(v) + 0.5), v))


def seed_int8(y: list[float]) -> bytes:
    scale = max(F(max(map(abs, y))) / F(127), F(1e-6))
    codes = [min(max(half_away(float(F(v) * (F(1) / scale))), -128), 127) for v in y]
    return struct.pack(f"<{len(y)}bf", *codes, scale)


# of codes 0 to 126: subnormals of 2^-9, then three bits of mantissa; 127 is NaN
E4M3 = [2 ** max(code // 8 - 7, -6) * ((code >= 8) + code % 8 / 8) for code in range(127)]


def e4m3(v: float) -> int:
    """The nearest code, the even one of two as near; the sign is the highest bit."""
    above = min(bisect.bisect_left(E4M3, abs(v)), 126)
    code = min((max(above - 1, 0), above), key=lambda code: (abs(E4M3[code] - abs(v)), code % 2))
    return code | (128 if math.copysign(1, v) < 0 else 0)


def seed_fp8(y: list[float]) -> bytes:
    scale = max(F(max(map(abs, y))) / F(448), F(1e-6))
    return bytes(e4m3(float(F(v) * (F(1) / scale))) for v in y) + struct.pack("<f", scale)


def seed_int4(y: list[float]) -> bytes:
    """Byte i is channel 2i in the low nibble and 2i+1 in the high one; the zero-point is the scale's low four bits."""
    scale = max((F(max(y)) - F(min(y))) / F(15), F(1e-6))
    zero = min(max(half_away(float(F(-min(y)) / scale)), 0), 15)
    codes = [min(max(half_away(float(F(v) / scale + F(zero))), 0), 15) for v in y]
    packed = bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))
    (bits,) = struct.unpack("<i", struct.pack("<f", scale))
    return packed + struct.pack("<i", bits & ~15 | zero)


def seed_int2(y: list[float], block: int) -> bytes:
    """Byte i is channels 4i to 4i+3 from the low bits up; the stored scale has the 1/D of turning back in it."""
    norm = F(math.sqrt(float(F(sum(v * v for v in y)) + F(1e-12))))
    root = F(math.sqrt(len(y)))
    z = [float(F(v) * (root / norm)) for v in y]
    codes = [(0 if v <= -0.9816 else 1) if v < 0 else (3 if v > 0.9816 else 2) for v in z]
    quads = zip(*(codes[i::4] for i in range(4)), strict=True)
    return bytes(a | b << 2 | c << 4 | d << 6 for a, b, c, d in quads) + struct.pack("<f", norm / root / F(block))


def seed_row(name: str, x: list[float], rotation: str) -> bytes:
    y = turned(x, rotation)
    if name == "int8_per_token_head":
        return seed_int8(y)
    if name == "fp8_per_token_head":
        return seed_fp8(y)
    if name == "int4_per_token_head":
        return seed_int4(y)
    return seed_int2(y, 1 if rotation == "none" else len(x) & -len(x))


def integer_rows(head_dim: int) -> torch.Tensor:
    """Gaussian rows (with zeros), rows with one large channel, a row of one sign: integers of at most 200."""
    rows = (4 * torch.randn(9, head_dim)).round()
    rows[3:5, 7] = torch.tensor([100.0, -200.0])
    rows[5] = rows[5].abs() + 1
    rows[6] = 3.0
    return rows


@every_dtype
@every_rotation
@pytest.mark.parametrize("head_dim", [64, 128, 256, 96, 80])
def test_exported_bytes_are_the_seed_s(name, rotation, head_dim):
    """
    Each byte of each row, scale and hidden zero-point included, is the seed's.
    """
    dtype, turn = all_dtypes()[name], all_rotations()[rotation]
    x = integer_rows(head_dim)

    stored = export_rows(dtype.quantize(turn.rotate(x)), dtype, turn, head_dim)

    assert stored.shape == (9, dtype.row_bytes(head_dim))
    assert stored.dtype == torch.uint8
    for row, given in zip(stored, x.tolist(), strict=True):
        assert bytes(row.tolist()) == seed_row(name, given, rotation)


@every_dtype
@every_rotation
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 2)])
def test_imported_rows_are_ours(name, rotation, head_dim, shape):
    """
    Import undoes export, to the bit.
    """
    dtype, turn = all_dtypes()[name], all_rotations()[rotation]
    rows = dtype.quantize(turn.rotate(torch.distributions.StudentT(2.0).sample((*shape, head_dim))))

    again = import_rows(export_rows(rows, dtype, turn, head_dim), dtype, turn, head_dim)

    assert torch.equal(again.codes, rows.codes)
    assert torch.equal(again.scale.view(torch.int32), rows.scale.view(torch.int32))


@every_dtype
@every_rotation
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_seed_s_reader_sees_our_values(name, rotation, head_dim):
    """
    What the seed decodes from the exported bytes, turned back as the seed does, is what we read.

    The seed multiplies all but int2's outputs with the matrix and then by 1/D; int2's scale has the 1/D already.
    """
    dtype, turn = all_dtypes()[name], all_rotations()[rotation]
    rows = dtype.quantize(turn.rotate(torch.randn(5, head_dim)))
    ours = turn.unrotate(dtype.dequantize(rows, torch.float64))

    code_bytes = dtype.code_bytes(head_dim)
    for stored, expected in zip(export_rows(rows, dtype, turn, head_dim), ours, strict=True):
        raw = bytes(stored.tolist())
        (scale,) = struct.unpack("<f", raw[code_bytes:])
        if name == "int8_per_token_head":
            y = [code * scale for code in struct.unpack(f"<{head_dim}b", raw[:code_bytes])]
        elif name == "fp8_per_token_head":
            y = [math.copysign(E4M3[byte & 127], 64 - (byte & 128)) * scale for byte in raw[:code_bytes]]
        elif name == "int4_per_token_head":
            (bits,) = struct.unpack("<i", raw[code_bytes:])
            (clean,) = struct.unpack("<f", struct.pack("<i", bits & ~15))
            y = [(code - (bits & 15)) * clean for byte in raw[:code_bytes] for code in (byte & 15, byte >> 4)]
        else:
            centroids = (-1.5104, -0.4528, 0.4528, 1.5104)
            y = [centroids[byte >> shift & 3] * scale for byte in raw[:code_bytes] for shift in (0, 2, 4, 6)]
        block = 1 if rotation == "none" else head_dim & -head_dim
        back = np.array(y)
        if rotation != "none":
            back = np.concatenate([scipy.linalg.hadamard(block).T @ part for part in back.reshape(-1, block)])
            if name != "int2_per_token_head":
                back = back / block
        if rotation == "randomized_hadamard":
            back = back * turn.signs(head_dim).double().numpy()
        np.testing.assert_allclose(back, expected.numpy(), rtol=0, atol=1e-13)


@every_dtype
def test_a_row_of_the_wrong_size_is_refused(name):
    """
    The message names the dtype, the head_dim and both sizes.
    """
    dtype, turn = all_dtypes()[name], all_rotations()["none"]
    size = dtype.row_bytes(64)

    with pytest.raises(ValueError, match=f"a row of {name} at head_dim 64 has {size} bytes, not {size + 1}"):
        import_rows(torch.zeros(2, size + 1, dtype=torch.uint8), dtype, turn, 64)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_per_tensor"])
def test_what_the_seed_does_not_store_is_refused(name):
    """
    Only per-token-head rows have a layout of the seed's.
    """
    dtype, turn = all_dtypes()[name], all_rotations()["none"]

    with pytest.raises(ValueError, match=f"per-token-head caches, not for {name}"):
        export_rows(dtype.quantize(torch.randn(2, 64)), dtype, turn, 64)


@every_dtype
@every_rotation
def test_a_row_of_zeros_differs_in_its_scale_alone(name, rotation):
    """
    The smallest scale is that of a row as it is stored, so for rows of next to nothing (a range below 1.5e-5 times the
    rotation's power of two) ours is not the seed's; the codes of zeros are.
    """
    dtype, turn = all_dtypes()[name], all_rotations()[rotation]

    stored = export_rows(dtype.quantize(turn.rotate(torch.zeros(64))), dtype, turn, 64)

    seed = seed_row(name, [0.0] * 64, rotation)
    assert bytes(stored[:-4].tolist()) == seed[:-4]
    ours, theirs = struct.unpack("<f", bytes(stored[-4:].tolist()))[0], struct.unpack("<f", seed[-4:])[0]
    assert ours == theirs * 2 ** turn.exponent(64)


def test_a_row_of_zeros_in_int2_is_0xaa():
    """
    An exact zero is code 2: the seed asks whether z < 0.
    """
    dtype, turn = all_dtypes()["int2_per_token_head"], all_rotations()["none"]

    stored = export_rows(dtype.quantize(torch.tensor([0.0, -0.0] * 32)), dtype, turn, 64)

    assert stored[:-4].tolist() == [0xAA] * 16


@pytest.mark.parametrize("head_dim", [80, 96, 192])
def test_a_row_of_equal_blocks_has_equal_codes(head_dim):
    """
    The blocks of a row share their signs, so that equal blocks are equal bytes.
    """
    dtype, turn = all_dtypes()["int4_per_token_head"], all_rotations()["randomized_hadamard"]
    block = head_dim & -head_dim
    x = torch.randn(block).repeat(head_dim // block)

    stored = export_rows(dtype.quantize(turn.rotate(x)), dtype, turn, head_dim)

    assert len({bytes(part.tolist()) for part in stored[:-4].split(block // 2)}) == 1
