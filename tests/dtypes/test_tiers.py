"""Tiers and their scales: what generic tests of dtypes cannot ask."""

import pytest
import torch

from kvbench.dtypes import Tiers, all_dtypes, e5m3

TIERS = [dtype for dtype in all_dtypes().values() if isinstance(dtype.decode, Tiers)]
every_tiers = pytest.mark.parametrize("dtype", TIERS, ids=lambda dtype: dtype.name)
# the mean square error of Max's uniform codes of a unit Gaussian
MAX = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


def test_e5m3_is_what_its_bits_say():
    """
    All 255 numbers, rising, and NaN; the largest up to a number is found from it and from just below the next.
    """
    codes = torch.arange(255, dtype=torch.uint8)
    values = e5m3.decode(codes)

    assert values.tolist() == [2.0 ** (c // 8 - 21) * (1 + c % 8 / 8) for c in range(255)]
    assert e5m3.decode(torch.tensor([255], dtype=torch.uint8)).isnan()
    assert torch.equal(e5m3.floor(values), codes.int())
    below = torch.nextafter(values, torch.zeros(()))
    assert torch.equal(e5m3.floor(below[1:]), codes[:-1].int())
    ends = torch.tensor([0.0, 1e-30, 3e38, torch.inf])
    assert e5m3.floor(ends).tolist() == [0, 0, 254, 254]


@every_tiers
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 256])
def test_codes_come_back_and_own_every_bit(dtype, head_dim):
    """
    Any codes come back from their bytes, and each bit of a code moves one bit of the row, another one each.
    """
    widths = dtype.tiers.by_channel(head_dim)
    codes = torch.stack([torch.randint(0, 1 << bits, (5, 3)) for bits in widths], dim=-1)
    assert torch.equal(dtype.unpack(dtype.pack(codes)), codes.int())

    bits = [(channel, bit) for channel, width in enumerate(widths) for bit in range(width)]
    one = torch.zeros(len(bits), head_dim, dtype=torch.int64)
    for row, (channel, bit) in enumerate(bits):
        one[row, channel] = 1 << bit
    packed = dtype.pack(one)
    assert packed.shape == (len(bits), dtype.code_bytes(head_dim))
    each = ((packed.unsqueeze(-1) >> torch.arange(8)) & 1).flatten(1)
    assert (each.sum(1) == 1).all()
    assert (each.sum(0) <= 1).all()
    padding = 8 * dtype.code_bytes(head_dim) - len(bits)
    assert 0 <= padding < 16


@every_tiers
def test_the_words_hold_what_the_rest_does_not(dtype):
    """
    At head_dim 128 no bit is lost: 16 words of 16 bits, and a multiple of 32 bits behind them.
    """
    assert 8 * dtype.code_bytes(128) == sum(dtype.tiers.by_channel(128))
    assert dtype.word_bytes(128) == 32


@pytest.mark.parametrize("dtype", [one for one in TIERS if not one.page_tokens], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_gaussian_rows_err_as_max_says(dtype, spread):
    """
    Each slice errs as the uniform code of its bits that suits a Gaussian best, within what a gain a row gives or takes.
    """
    x = torch.randn(4000, 256) * spread
    error = ((dtype.dequantize(dtype.quantize(x)) - x) / spread).square().unflatten(-1, (8, 32)).mean((0, 2))

    for found, bits in zip(error.tolist(), dtype.decode.widths, strict=True):
        # a gain that suits the wide codes best may not suit the others: within an eighth or so
        assert found == pytest.approx(MAX[bits], rel=0.15)


def test_the_search_is_the_best_of_its_scales():
    """
    No other scale among the eleven leaves less error in steps, on heavy-tailed rows, and it beats the first guess.
    """
    dtype = all_dtypes()["midrise2_per_token_head"]
    x = torch.distributions.StudentT(3.0).sample((500, 128))
    rows = dtype.quantize(x)
    first = e5m3.floor(x.square().mean(-1).sqrt())

    def left(codes):
        scale = e5m3.decode(codes.to(torch.uint8)).unsqueeze(-1).double()
        return (((x / scale - 0.5).clamp(-2, 1).round() + 0.5) * scale - x).square().sum(-1)

    found = left(rows.scale)
    tried = torch.stack([left((first + step).clamp(0, 254)) for step in range(-3, 8)])
    assert (found <= tried.amin(0) * (1 + 1e-6)).all()
    assert found.sum() < 0.97 * left(first).sum()


def test_tiers_that_do_not_fill_words_are_refused():
    """
    Eight widths whose codes fill 16 bits and more.
    """
    with pytest.raises(ValueError, match="do not fill words of 16 bits"):
        _ = Tiers((2, 2, 2, 2, 1, 1, 1, 1)).fields
    with pytest.raises(ValueError, match="do not fill words of 16 bits"):
        _ = Tiers((4, 4, 4, 4)).fields
