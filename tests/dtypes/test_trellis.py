"""Trellis-coded rows: the path is the cheapest, the code is good, bytes are the same everywhere."""

import math

import pytest
import torch

from kvbench.dtypes import Part, Rows, Trellis, all_dtypes
from kvbench.dtypes.trellis import cheapest_paths

ALL = [dtype for dtype in all_dtypes().values() if isinstance(dtype.decode, Trellis)]
TCQ = [dtype for dtype in ALL if len(dtype.trellis.parts) == 1]
every_tcq = pytest.mark.parametrize("dtype", TCQ, ids=lambda dtype: dtype.name)


def db(x, y):
    return -10 * math.log10((x - y).square().sum() / x.square().sum())


def test_the_path_is_the_cheapest_of_all():
    """
    On a trellis of 16 states and rows of 8 values, no other string of bits costs less.
    """
    trellis = Trellis(4, (Part(2, 27, ((0, 46), (6, 36))),))
    values = trellis.parts[0].values(4)
    z = (torch.randn(20, 8) * 512).round().to(torch.int32)

    found = cheapest_paths(z, trellis)

    strings = torch.arange(2**18)[:, None]
    windows = (strings >> torch.arange(14, -1, -2)) & 15  # [2^18, 8]
    value = torch.tensor(values)[windows]
    for row, states in zip(z, found, strict=True):
        cost = 8 * torch.tensor(values)[states] ** 2 - torch.tensor(values)[states] * row
        assert cost.sum() == (8 * value**2 - value * row).sum(-1).min()


def test_of_equal_paths_the_first_bits_decide():
    """
    Where all states have one value all paths cost the same, and the path of zeros is taken.
    """
    trellis = Trellis(8, (Part(2, 0, ((0, 0),)),))

    paths = cheapest_paths(torch.randint(-900, 900, (5, 64), dtype=torch.int32), trellis)

    assert not paths.any()


@pytest.mark.parametrize(("bits", "least"), [(2, 11.0), (3, 16.6), (4, 22.2)])
def test_gaussian_rows_are_nearer_than_scalar_codes_come(bits, least):
    """
    In decibels at head_dim 256, where scale and first state weigh little: Lloyd and Max's codes have 9.30, 14.62 and
    20.22 at best, and no code more than 6.02 a bit.
    """
    dtype = all_dtypes()[f"tcq{bits}"]
    x = torch.randn(400, 256)

    found = db(x, dtype.dequantize(dtype.quantize(x)))

    assert least < found < 6.03 * dtype.bits_per_value(256)


@every_tcq
@pytest.mark.parametrize("head_dim", [64, 80])
def test_no_code_near_the_values_is_random(dtype, head_dim):
    """
    The values of a code's successors lie evenly: their spread around a state's mean is that of the whole code.
    """
    values = torch.tensor(dtype.trellis.parts[0].values(8), dtype=torch.float64)
    of_a_state = values.view(-1, 1 << dtype.code_bits)  # a state's successors: all codes below the same bits

    assert of_a_state.mean(1).std() < 0.35 * values.std()
    assert int(values.abs().max()) <= 127
    x = torch.randn(64, head_dim)
    assert db(x, dtype.dequantize(dtype.quantize(x))) > 6.02 * dtype.code_bits - 2.5


@pytest.mark.parametrize("dtype", ALL, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_codes_of_any_width_come_back(dtype, head_dim):
    """
    Unpacking undoes packing, and every byte is counted.
    """
    widths = [part.bits for part in dtype.trellis.parts for _ in range(part.eighths * head_dim // 8)]
    codes = torch.randint(0, 16, (5, 3, head_dim)) & ((1 << torch.tensor(widths)) - 1)

    packed = dtype.pack(codes.to(torch.uint8))

    assert packed.shape == (5, 3, dtype.code_bytes(head_dim))
    assert 0 <= 8 * dtype.code_bytes(head_dim) - sum(widths) < 16
    assert torch.equal(dtype.unpack(packed), codes.to(torch.int32))


def test_channels_of_more_bits_are_nearer():
    """
    In each part of a row of three an error is near that of a row with so many bits everywhere, and not of another.
    """
    dtype = all_dtypes()["tcq421"]
    x = torch.randn(1000, 64)
    values = dtype.dequantize(dtype.quantize(x))

    for part, (first, last), least in zip(
        dtype.trellis.parts, ((0, 16), (16, 48), (48, 64)), (20, 10.8, 5.2), strict=True
    ):
        assert least < db(x[:, first:last], values[:, first:last]) < 6.02 * part.bits + 0.5


@every_tcq
def test_the_scale_fits_the_path(dtype):
    """
    Any other scale that the row could store leaves a larger error.
    """
    x = torch.randn(200, 96)
    rows = dtype.quantize(x)
    best = (dtype.dequantize(rows) - x).square().sum(-1)

    for by in (-1, 1):
        moved = Rows(rows.codes, (rows.scale.int() + (by << dtype.start_bits)).to(torch.int16))
        assert ((dtype.dequantize(moved) - x).square().sum(-1) >= best * (1 - 1e-3)).all()


@every_tcq
@pytest.mark.parametrize("size", [1e-12, 1e-9, 1.0, 1e8, 1e12, 1e37])
def test_rows_of_any_size_stay_finite(dtype, size):
    """
    Rows below 2^-40 are zeros, rows beyond 2^28 as large as a scale can make them.
    """
    x = torch.randn(50, 64) * size
    values = dtype.dequantize(dtype.quantize(x))

    assert values.isfinite().all()
    if 1e-10 < size < 1e8:
        assert db(x, values) > 6.02 * dtype.code_bits - 2.5
    if size < 1e-10:
        assert not values.any()


@every_tcq
def test_heavy_tails_lose_less_rotated(dtype):
    """
    The median row of Student's t with 2 degrees is a decibel worse than a Gaussian one, but not where it is rotated.
    """
    from kvbench.transforms import all_rotations

    rotation = all_rotations()[dtype.default_rotation]
    x = torch.distributions.StudentT(2.0).sample((500, 128))

    def median(values):
        return float(-10 * ((values - x).square().sum(-1) / x.square().sum(-1)).log10().median())

    plain = median(dtype.dequantize(dtype.quantize(x)))
    turned = median(rotation.unrotate(dtype.dequantize(dtype.quantize(rotation.rotate(x)))))
    gaussian = torch.randn(500, 128)

    assert turned > db(gaussian, dtype.dequantize(dtype.quantize(gaussian))) - 0.3
    assert turned > plain + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with a CPU")
@pytest.mark.parametrize("dtype", ALL, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_gpu_writes_the_same_bytes(dtype, head_dim):
    """
    The search is in integers, so a row is the same bytes on every machine.
    """
    x = torch.cat([torch.randn(500, head_dim), torch.distributions.StudentT(2.0).sample((100, head_dim))])
    x = torch.cat([x, torch.zeros(1, head_dim), torch.full((1, head_dim), 3.0), torch.full((1, head_dim), math.nan)])

    here, there = dtype.quantize(x), dtype.quantize(x.cuda())

    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scale, there.scale.cpu())
    values = [dtype.dequantize(rows).cpu() for rows in (here, there)]
    assert torch.equal(*(v.nan_to_num(12345.0) for v in values))
