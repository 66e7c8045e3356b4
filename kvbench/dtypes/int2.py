"""Lloyd-Max 2-bit codes for a unit Gaussian, one scale a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Codebook, Dtype, Rows, mark_broken, over

THRESHOLD = 0.9816
CENTROIDS = (-1.5104, -0.4528, 0.4528, 1.5104)
# rows with a value of this size or more are shrunk by a power of two: their squares would overflow float32
LARGE, SHRINK = 2.0**58, 2.0**-72


def sum_by_halves(x: Tensor) -> Tensor:
    """[...] sums of x [..., D] float32, by halving (x[:n/2] + x[n/2:]) after padding D to a power of two.

    The order is part of definitions: it makes a sum, and so a scale, the same bits on every machine.
    """
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x.squeeze(-1)


def sum_of_squares(x: Tensor) -> Tensor:
    """[...] of x [..., D] float32, as `sum_by_halves` adds."""
    return sum_by_halves(x * x)


@dataclass(frozen=True)
class Int2PerTokenHead(Dtype):
    """Each row scaled to unit variance by its norm, then cut at the Lloyd-Max thresholds of a unit Gaussian.

    A zero has the code 2. The 1e-12 under the root is for rows of zeros; it is below the last bit of a large row's sum.
    """

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        large = x.abs().amax(-1) >= LARGE
        shrink = torch.where(large, SHRINK, 1.0)
        x = x * shrink.unsqueeze(-1)
        # by way of float64, since torch's float32 square root on CPUs is not always the nearest value
        norm = (sum_of_squares(x) + torch.where(large, 0.0, 1e-12)).double().sqrt().float()
        root = math.sqrt(x.shape[-1])
        z = x * (root / norm).unsqueeze(-1)
        codes = (z > -THRESHOLD).to(torch.uint8) + (z >= 0) + (z > THRESHOLD)
        codes, scale = mark_broken(codes, over(norm, root))
        # computed, NaN has other bits on a GPU
        stored = (scale / shrink).clamp(max=torch.finfo(torch.float32).max).masked_fill(scale.isnan(), math.nan)
        return Rows(self.pack(codes), stored)


int2_per_token_head = Int2PerTokenHead(
    "int2_per_token_head",
    2,
    Codebook(CENTROIDS),
    "per_token_head",
    default_rotation="hadamard",
    source="int2 per-token-head KV cache, https://github.com/vllm-project/vllm/pull/40633; Lloyd 1982, Max 1960",
)
