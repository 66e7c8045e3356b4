"""Codes between a minimum and a maximum, and what holds for every dtype that quantizes whole pages."""

import math
from fractions import Fraction

import pytest
import torch

from kvbench.dtypes import Affine, Rows, all_dtypes
from kvbench.dtypes.min_max import MinMax

MINIMUM = [dtype for dtype in all_dtypes().values() if dtype.decode == Affine("minimum")]
MIN_MAX = [dtype for dtype in MINIMUM if isinstance(dtype, MinMax)]
PAGED = [dtype for dtype in all_dtypes().values() if dtype.page_tokens]
HEAD_DIMS = [64, 96, 128, 256]

every_one = pytest.mark.parametrize("dtype", MINIMUM, ids=lambda dtype: dtype.name)
every_paged = pytest.mark.parametrize("dtype", PAGED, ids=lambda dtype: dtype.name)
either = pytest.mark.parametrize("dtype", dict.fromkeys([*MINIMUM, *PAGED]), ids=lambda dtype: dtype.name)


def drawn(dtype, pages=2, heads=3, head_dim=None):
    """Heavy-tailed rows [pages, heads, S, D], a few channels of which are far from zero."""
    head_dim = head_dim or max(64, dtype.group_size)
    x = torch.distributions.StudentT(2.0).sample((pages, heads, dtype.page_tokens or 5, head_dim))
    x[..., ::7] += 50
    return x


def groups(dtype, x):
    """[groups, members] of x [..., S, D]: what shares a scale, by hand."""
    if dtype.page_tokens:
        return x.transpose(-1, -2).reshape(-1, dtype.page_tokens)
    return x.reshape(-1, dtype.group_size)


def half(value):
    """The nearest float16, as an exact number."""
    return Fraction(torch.tensor(float(value)).to(torch.float16).item())


@pytest.mark.parametrize("dtype", MIN_MAX, ids=lambda dtype: dtype.name)
def test_a_group_is_its_minimum_and_equal_steps(dtype):
    """
    By hand: step = (max - min) / (2^b - 1) and minimum, as float16, and each value at the nearest of their codes.
    """
    x = drawn(dtype, pages=1, heads=1)
    read = groups(dtype, dtype.dequantize(dtype.quantize(x), torch.float64))
    levels = 2**dtype.code_bits - 1

    for members, got in list(zip(groups(dtype, x).tolist(), read.tolist(), strict=True))[:20]:
        low = half(min(members))
        # the range is a float32 difference, and a float32 quotient
        step = half((torch.tensor(max(members)) - torch.tensor(min(members))) / levels)
        grid = [low + step * code for code in range(levels + 1)]
        for value, decoded in zip(members, got, strict=True):
            nearest = min(abs(Fraction(value) - point) for point in grid)
            assert Fraction(decoded) in grid
            assert abs(Fraction(value) - Fraction(decoded)) <= nearest + step / 1000


@either
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_byte_is_counted(dtype, head_dim):
    """
    8 * nbytes == values * bits_per_value, exactly; a page's scales are shared by its tokens.
    """
    if head_dim % dtype.head_dim_multiple:
        return
    x = drawn(dtype, head_dim=head_dim)

    rows = dtype.quantize(x)

    assert 8 * (rows.codes.nbytes + rows.scale.nbytes) / x.numel() == dtype.bits_per_value(head_dim)
    assert rows.codes.shape == (*x.shape[:-1], dtype.code_bytes(head_dim))
    assert rows.scale.shape == (*x.shape[: 2 if dtype.page_tokens else 3], *dtype.scales_shape(head_dim))
    assert rows.scale.dtype == dtype.scale_storage


@either
def test_pages_stand_alone(dtype):
    """
    A batch of pages or rows is each alone, to the bit, wherever it lies in memory; no page is no byte.
    """
    x = drawn(dtype)

    rows = dtype.quantize(x)
    strided = dtype.quantize(x.transpose(0, 1).contiguous().transpose(0, 1))
    empty = dtype.quantize(x[:0])

    assert torch.equal(strided.codes, rows.codes)
    for i in range(len(x)):
        alone = dtype.quantize(x[i])
        assert torch.equal(alone.codes, rows.codes[i])
        assert torch.equal(alone.scale, rows.scale[i])
    assert dtype.dequantize(empty).shape == x[:0].shape


@every_paged
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_value_stays_visible(dtype, bad):
    """
    What shares its scale reads as NaN, throughout, and nothing else does.
    """
    x = drawn(dtype)
    whole = dtype.dequantize(dtype.quantize(x))
    x[1, 2, 3, 4] = bad

    read = dtype.dequantize(dtype.quantize(x))

    broken = read.isnan()
    assert broken[1, 2, :, 4].all()
    others = torch.ones_like(broken)
    others[1, 2] = False
    assert torch.equal(read[others], whole[others])


@every_one
def test_equal_values_and_zeros_come_back(dtype):
    """
    A range of nothing is its minimum, within a step of the smallest scale.
    """
    x = torch.full((1, 1, dtype.page_tokens or 3, max(64, dtype.group_size)), -0.5)

    for value in (x, x * 0):
        read = dtype.dequantize(dtype.quantize(value), torch.float64)
        assert (read - value).abs().max() <= 2.0**-24 * 2**dtype.code_bits


@either
def test_more_channels_far_away_cost_nothing_by_channel(dtype):
    """
    By channel of a page, a channel that is wide or far from zero leaves the others as they are.
    """
    if dtype.granularity != "per_channel":
        return
    x = torch.randn(1, 1, dtype.page_tokens, 64)
    far = x.clone()
    far[..., 3] += 300

    plain, moved = (dtype.dequantize(dtype.quantize(y)) for y in (x, far))

    others = torch.arange(64) != 3
    assert torch.equal(plain[..., others], moved[..., others])


@every_one
def test_reading_in_float64_loses_nothing(dtype):
    """
    float32 reads are the float64 reads, but for the rounding of a product and a sum.
    """
    rows = dtype.quantize(drawn(dtype))
    exact, read = dtype.dequantize(rows, torch.float64), dtype.dequantize(rows, torch.float32)

    largest = exact.abs() + 2**dtype.code_bits * rows.scale[..., 0].double().max()
    assert ((read.double() - exact).abs() <= 2.0**-22 * largest).all()


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("uint2_per_channel_128", 2.25),
        ("uint2_per_channel_64", 2.5),
        ("uint2_per_channel_32", 3),
        ("uint4_per_group", 5),
        ("uint2_per_group", 3),
    ],
)
def test_bits_by_hand(name, bits):
    """
    Two float16 are 32 bits more for each channel of a page, or for 32 channels of a row.
    """
    assert all_dtypes()[name].bits_per_value(128) == bits


@every_paged
@pytest.mark.parametrize("tokens", [0, 40, 128, 300])
def test_a_sequence_is_stored_page_by_page(dtype, tokens):
    """
    Whole pages of a head as they are read back, what is left over as it is.
    """
    x = torch.randn(tokens, 2, 64)

    read = dtype.stored(x)

    for head in range(2):
        for first in range(0, tokens, dtype.page_tokens):
            page = x[first : first + dtype.page_tokens, head]
            want = dtype.dequantize(dtype.quantize(page)) if len(page) == dtype.page_tokens else page
            assert torch.equal(read[first : first + dtype.page_tokens, head], want)


def test_rows_cut_out_of_pages_read_alike():
    """
    Codes and scales that are parts of larger tensors decode like their copies.
    """
    dtype = all_dtypes()["uint2_per_channel_64"]
    rows = dtype.quantize(drawn(dtype))
    wide = torch.stack([rows.codes, rows.codes], -1)[..., 0], torch.stack([rows.scale, rows.scale], -1)[..., 0]

    assert torch.equal(dtype.dequantize(Rows(*wide)), dtype.dequantize(rows))
