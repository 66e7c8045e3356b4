"""Unsigned codes between a group's ends, both drawn in by a factor that is searched, with parameters of 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Affine, Dtype, Rows, constant, over
from kvbench.dtypes.fp8 import e4m3
from kvbench.dtypes.int2 import sum_of_squares

FACTORS = tuple(1 - step / 20 for step in range(11))  # of a group's ends, 1 to 0.5
SMALLEST_STEP = 2.0**-9  # of e4m3


@dataclass(frozen=True)
class ClippedPerGroup(Dtype):
    """Each group's minimum and maximum times a factor, and 2^bits - 1 steps between them; both as e4m3.

    The factor with the smallest squared error of the 11 is taken, of equal ones the largest. Codes are the nearest
    ones with minimum and step as they are stored, halves to even. SKVQ learns a factor from a text, one for all groups
    in its code; a search needs none, and stores none. A group with NaN or ±inf decodes to NaN, as one whose
    squared errors exceed float32.
    """

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        groups = x.to(torch.float32).unflatten(-1, (-1, self.group_size))
        whole = groups.isfinite().all(-1, keepdim=True)
        groups = groups.masked_fill(~whole, 0)
        levels = (1 << self.code_bits) - 1
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        # of all factors at once, for these are few beside the values
        factors = constant(FACTORS, torch.float32, x.device)
        minima = e4m3(low * factors).to(torch.float32)
        steps = e4m3(over((high - low) * factors, levels).clamp_min(SMALLEST_STEP)).to(torch.float32)
        best = torch.full_like(low, torch.inf)
        codes, which = groups, torch.zeros_like(low, dtype=torch.int64)
        for i, (minimum, step) in enumerate(zip(minima.split(1, -1), steps.split(1, -1), strict=True)):
            tried = ((groups - minimum) / step).round().clamp(0, levels)
            error = sum_of_squares(groups - (tried * step + minimum)).unsqueeze(-1)
            better = error < best
            best = torch.where(better, error, best)
            codes = torch.where(better, tried, codes)
            which = which.masked_fill(better, i)
        stored = torch.cat([steps.gather(-1, which), minima.gather(-1, which)], -1)
        whole = whole & best.isfinite()
        broken = constant((math.nan, 0.0), torch.float32, x.device)
        return Rows(
            self.pack(codes.masked_fill(~whole, 0).to(torch.uint8).flatten(-2)),
            torch.where(whole, stored, broken).to(torch.float8_e4m3fn),
        )


clipped2_per_group, clipped3_per_group, clipped4_per_group = (
    ClippedPerGroup(
        f"clipped{bits}_per_group",
        bits,
        Affine("minimum"),
        "per_group",
        "SKVQ, https://arxiv.org/abs/2405.06219, its clipped dynamic quantization",
        group_size=32,
    )
    for bits in (2, 3, 4)
)
