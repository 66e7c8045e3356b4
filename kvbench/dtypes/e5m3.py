"""Scales of 8 bits: five of exponent, three of mantissa."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BIAS = 21
NAN = 255  # the code
_ONE = 127  # a float32's exponent of 1


def decode(code: Tensor) -> Tensor:
    """[...] float32 of uint8: with e the upper five bits and m the lower three, 2^(e-21) (1 + m/8); 255 is NaN.

    Without a sign, a zero or subnormal numbers, so values rise with their codes: from 4.8e-7 to 1792.
    """
    bits = (code.to(torch.int32) << 20) + ((_ONE - BIAS) << 23)
    return bits.view(torch.float32).masked_fill(code == NAN, math.nan)


def floor(x: Tensor) -> Tensor:
    """[...] int32: the code of the largest number up to x (float32, from 0 on); 0 below the smallest, 254 above all."""
    code = (x.contiguous().view(torch.int32) >> 20) - ((_ONE - BIAS) << 3)
    return code.clamp(0, NAN - 1)
