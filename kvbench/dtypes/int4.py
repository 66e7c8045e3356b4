"""Asymmetric 4-bit integers, one scale a row with the zero-point hidden in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Affine, Dtype, Rows, mark_broken, round_half_away

SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Int4PerTokenHead(Dtype):
    """Each row's range, from its minimum to its maximum, divided into 15 steps.

    The zero-point is an integer from 0 to 15, so a row of one sign does not reach its far end: (max-min)/15 steps
    from a clamped zero. It takes the place of the low four bits of the scale. The codes are made with the scale as
    it was before (relative difference below 2e-6).
    """

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        low, high = x.amin(-1), x.amax(-1)
        scale = ((high - low) / 15).clamp_min(SMALLEST_SCALE)
        zero = round_half_away(-low / scale).clamp(0, 15)
        codes = round_half_away(x / scale.unsqueeze(-1) + zero.unsqueeze(-1)).clamp(0, 15)
        codes, scale = mark_broken(codes, scale)
        zero = zero.nan_to_num(0)
        hidden = (scale.view(torch.int32) & ~15) | zero.to(torch.int32)
        return Rows(self.pack(codes.to(torch.uint8)), hidden.view(torch.float32))


int4_per_token_head = Int4PerTokenHead(
    "int4_per_token_head",
    4,
    Affine("in_scale"),
    "per_token_head",
    default_rotation="randomized_hadamard",
    source="vLLM's int4 per-token-head KV cache, https://github.com/vllm-project/vllm/pull/39074 and 40835",
)
