"""exllamav3's cache against a second derivation, a group at a time in plain Python with numpy's float32 and float16."""

import math
import struct

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from kvbench.dtypes import all_dtypes
from kvbench.transforms import all_rotations

F = np.float32


def group(values, bits):
    """Codes and the scale's two bytes of 32 float32 values."""
    scale = max(abs(v) for v in values) + F(1e-10)
    half = F(2 ** (bits - 1))
    inverse = F(1) / scale
    codes = [min(max(math.floor(float(v * inverse * half + half)), 0), 2**bits - 1) for v in values]
    return codes, np.float16(scale)


def planes(codes, bits):
    """Upper bits first: 4, then 2, then 1 of them, in words that hold channels j, j + W, j + 2W, ... ."""
    if bits == 8:
        return bytes(codes)
    packed, below = b"", bits
    for width in (4, 2, 1):
        if bits & width:
            below -= width
            words = len(codes) * width // 16
            for j in range(words):
                word = sum((codes[j + i * words] >> below & 2**width - 1) << i * width for i in range(16 // width))
                packed += struct.pack("<H", word)
    return packed


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_scales_are_those_of_the_definition(bits):
    """
    Every byte of rows of three groups, with magnitudes from 1e-12 to 1e2; and what is read is the middle of a cell.
    """
    dtype = all_dtypes()[f"exl3_{bits}bit"]
    x = torch.distributions.StudentT(2.0).sample((6, 96)) * torch.tensor([[1e-12], [1e-4], [1.0], [0.0], [3.0], [1e2]])
    rows = dtype.quantize(x)
    read = dtype.dequantize(rows, torch.float64)

    for i, row in enumerate(x.numpy()):
        found = [group(row[first : first + 32], bits) for first in (0, 32, 64)]
        codes = [code for own, _ in found for code in own]
        assert bytes(rows.codes[i].tolist()) == planes(codes, bits)
        assert rows.scale[i].tolist() == [float(scale) for _, scale in found]
        middles = [(2 * code + 1) / 2**bits - 1 for code in codes]
        assert read[i].tolist() == [m * float(found[c // 32][1]) for c, m in enumerate(middles)]


def test_bits_by_hand():
    """
    A float16 for 32 values is half a bit more.
    """
    assert [all_dtypes()[f"exl3_{bits}bit"].bits_per_value(128) for bits in range(2, 9)] == [
        b + 0.5 for b in range(2, 9)
    ]


def test_the_middle_of_a_cell_errs_less_than_a_rounded_grid():
    """
    exllamav3 says about 5 % of the squared error, against codes rounded to multiples of the step; for 2 bits of
    Gaussian rows it is more, for there the grid's upper end is missing.
    """
    dtype = all_dtypes()["exl3_4bit"]
    x = torch.randn(4000, 32)
    scale = x.abs().amax(-1, keepdim=True)
    grid = (x / scale * 8).round().clamp(-8, 7) / 8 * scale

    ratio = (dtype.dequantize(dtype.quantize(x)) - x).square().mean() / (grid - x).square().mean()

    assert 0.9 < ratio < 0.98


def test_a_group_beyond_float16_is_visibly_broken():
    """
    So is one with a NaN; the other groups of the row are as they were.
    """
    dtype = all_dtypes()["exl3_4bit"]
    x = torch.randn(2, 96)
    whole = dtype.dequantize(dtype.quantize(x))
    x[0, 40], x[1, 95] = 1e6, math.nan

    read = dtype.dequantize(dtype.quantize(x))

    assert read[0, 32:64].isnan().all()
    assert read[1, 64:].isnan().all()
    assert torch.equal(read[0, :32], whole[0, :32])
    assert torch.equal(read[1, :64], whole[1, :64])


@pytest.mark.parametrize(("head_dim", "block"), [(64, 32), (128, 32), (96, 32), (80, 16), (24, 8)])
def test_its_matrix_turns_32_channels_at_a_time(head_dim, block):
    """
    SciPy's Sylvester matrix for each group, up to a power of two.
    """
    rotation = all_rotations()["hadamard_32"]
    matrix = scipy.linalg.block_diag(*[scipy.linalg.hadamard(block)] * (head_dim // block))

    turned = rotation.rotate(torch.eye(head_dim, dtype=torch.float64)).T

    assert_close(turned * 2.0 ** rotation.exponent(head_dim), torch.from_numpy(matrix.astype(float)), rtol=0, atol=0)
