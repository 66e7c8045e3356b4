"""Asymmetric integers of 4 and 3 bits, one scale a row with the zero-point hidden in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Affine, Dtype, Rows, mark_broken, over, round_half_away

SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class IntPerTokenHead(Dtype):
    """Each row's range, from its minimum to its maximum, divided into 2^bits - 1 steps.

    The zero-point is a code too, so a row of one sign does not reach its far end: so many steps from a clamped zero. It
    takes the place of the low bits of the scale. The codes are made with the scale as it was before (relative
    difference below 2e-6).
    """

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        low, high = x.amin(-1), x.amax(-1)
        levels = (1 << self.code_bits) - 1
        scale = over(high - low, levels).clamp_min(SMALLEST_SCALE)
        zero = round_half_away(-low / scale).clamp(0, levels)
        codes = round_half_away(x / scale.unsqueeze(-1) + zero.unsqueeze(-1)).clamp(0, levels)
        codes, scale = mark_broken(codes, scale)
        zero = zero.nan_to_num(0)
        hidden = (scale.view(torch.int32) & ~levels) | zero.to(torch.int32)
        return Rows(self.pack(codes.to(torch.uint8)), hidden.view(torch.float32))


int4_per_token_head = IntPerTokenHead(
    "int4_per_token_head",
    4,
    Affine("in_scale"),
    "per_token_head",
    default_rotation="randomized_hadamard",
    source="vLLM's int4 per-token-head KV cache, https://github.com/vllm-project/vllm/pull/39074 and 40835",
)
# 32 codes fill three words of 32 bits
int3_per_token_head = IntPerTokenHead(
    "int3_per_token_head",
    3,
    Affine("in_scale"),
    "per_token_head",
    default_rotation="randomized_hadamard",
    source="kvbench: int4_per_token_head with a bit less",
    word_bits=32,
)
