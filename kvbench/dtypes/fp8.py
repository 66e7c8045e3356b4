"""FP8 (e4m3) caches, with one scale a tensor or one a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Cast, Dtype, Rows, mark_broken, over

E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-6


def e4m3(x: Tensor) -> Tensor:
    """[...] float8_e4m3fn of x, to the nearest, ties to even; ±448 for what lies beyond, NaN for NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Fp8PerTensor(Dtype):
    """x / scale, saturated at ±448 and rounded to the nearest even e4m3. ±inf saturates, NaN stays NaN."""

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        if tensor_scale is not None:
            x = x / tensor_scale
        return Rows(e4m3(x).view(torch.uint8), None)

    def calibrate(self, x: Tensor) -> Tensor:
        """The scalar float32 scale that maps the largest magnitude of x to 448."""
        return over(x.to(torch.float32).abs().amax(), E4M3_MAX).clamp_min(SMALLEST_SCALE)


@dataclass(frozen=True)
class Fp8PerTokenHead(Dtype):
    """Each row scaled so that its largest magnitude is 448, then rounded to the nearest even e4m3."""

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        scale = over(x.abs().amax(-1), E4M3_MAX).clamp_min(SMALLEST_SCALE)
        scaled = (x * (1 / scale).unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
        scaled, scale = mark_broken(scaled, scale)
        return Rows(scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale)


_SOURCE = "vLLM's fp8 KV cache; e4m3 of https://arxiv.org/abs/2209.05433"
fp8_per_tensor = Fp8PerTensor("fp8_per_tensor", 8, Cast(torch.float8_e4m3fn), "per_tensor", _SOURCE)
fp8_per_token_head = Fp8PerTokenHead("fp8_per_token_head", 8, Cast(torch.float8_e4m3fn), "per_token_head", _SOURCE)
