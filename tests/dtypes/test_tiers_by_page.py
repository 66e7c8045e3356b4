"""Tiers whose channels have a scale and a zero a page: the definition, a channel at a time, in float64."""

import math

import pytest
import torch

from kvbench.dtypes import all_dtypes, e5m3

DTYPE = all_dtypes()["tiers421_per_channel_128"]
SCALES = [2.0 ** ((code >> 3) - 21) * (1 + (code & 7) / 8) for code in range(255)]


def levels(bits, scale, zero):
    return [(code - 2 ** (bits - 1) + 0.5 + zero / 8) * scale for code in range(2**bits)]


def tried(values, bits):
    """The (scale, zero) pairs that may be chosen, in their order."""
    middle = (min(values) + max(values)) / 2 if bits > 2 else math.fsum(values) / len(values)
    reach = max(abs(value - middle) for value in values) / 2 ** (bits - 1)
    first = max((code for code in range(255) if SCALES[code] <= reach), default=0)
    least = max((code for code in range(255) if SCALES[code] <= abs(middle) * 8 / 127), default=0) + 1
    pairs = []
    for code in range(first, first - 18, -2):
        scale = SCALES[min(max(code, least, 0), 254)]
        pairs.append((scale, max(-127, min(127, round(8 * middle / scale)))))
    return pairs


@pytest.mark.parametrize("tails", [False, True], ids=["normal", "heavy tails"])
def test_a_channel_has_the_best_of_nine_scales(tails):
    """
    No pair of a scale and its zero leaves a smaller error, each value has its nearest code, and 4, 2 and 1 bits are in
    the first quarter of the channels, the middle half and the last quarter.
    """
    x = torch.distributions.StudentT(3.0).sample((128, 32)) if tails else torch.randn(128, 32)
    x = x + torch.linspace(-2, 3, 32)
    rows = DTYPE.quantize(x)
    read = DTYPE.dequantize(rows, torch.float64)

    for channel, bits in enumerate([4] * 8 + [2] * 16 + [1] * 8):
        values = x[:, channel].tolist()
        scale, zero = SCALES[rows.scale[channel, 0]], int(rows.scale[channel, 1].view(torch.int8))
        pairs = tried(values, bits)
        assert (scale, zero) in pairs
        own = levels(bits, scale, zero)
        for value, decoded in zip(values, read[:, channel].tolist(), strict=True):
            assert decoded in own
            assert abs(value - decoded) <= min(abs(value - level) for level in own) + 1e-6 * scale
        error = sum(min((value - level) ** 2 for level in own) for value in values)
        others = [sum(min((v - level) ** 2 for level in levels(bits, *pair)) for v in values) for pair in pairs]
        assert error <= min(others) * (1 + 1e-5)


@pytest.mark.parametrize("value", [-0.5, 0.0, 300.0, 1e-5])
def test_a_channel_of_one_value_is_read_nearly(value):
    """
    A zero of 127 eighths reaches as far as 15.9 steps, so a step is a sixteenth of what it must reach, and half of one
    is lost.
    """
    x = torch.full((128, 32), value)

    read = DTYPE.dequantize(DTYPE.quantize(x))

    assert ((read - x).abs() <= abs(value) * 8 / 127 * 1.13 * 0.57 + SCALES[0]).all()


def test_codes_and_scales_are_counted():
    """
    (2·4 + 4·2 + 2·1) / 8 bits of codes, and 16 bits a channel for 128 tokens.
    """
    assert DTYPE.bits_per_value(128) == 2.25 + 16 / 128
    assert e5m3.decode(torch.arange(255, dtype=torch.uint8)).tolist() == SCALES
