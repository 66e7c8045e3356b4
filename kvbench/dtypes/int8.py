"""Symmetric 8-bit integers, one scale a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Affine, Dtype, Rows, mark_broken, over, round_half_away

SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Int8PerTokenHead(Dtype):
    """Each row scaled so that its largest magnitude is 127; halves round away from zero."""

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        scale = over(x.abs().amax(-1), 127).clamp_min(SMALLEST_SCALE)
        codes = round_half_away(x * (1 / scale).unsqueeze(-1)).clamp(-128, 127)
        codes, scale = mark_broken(codes, scale)
        return Rows(self.pack(codes.to(torch.int8)), scale)


int8_per_token_head = Int8PerTokenHead(
    "int8_per_token_head",
    8,
    Affine("none"),
    "per_token_head",
    source="vLLM's int8 per-token-head KV cache",
)
