"""Unsigned codes between a group's minimum and maximum: a page's channels for keys, parts of a row for values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Affine, Dtype, Rows, over, round_half_away, stored_as

SMALLEST_SCALE = 2.0**-24  # of float16


@dataclass(frozen=True)
class MinMax(Dtype):
    """Each group's range, from its minimum to its maximum, divided into 2^bits - 1 steps.

    Step and minimum are rounded to float16, to the nearest, before the codes are made with them, so that a code decodes
    to the nearest value there is. A group whose minimum or step is no float16 number decodes to NaN.
    """

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.float16

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        # the groups' members stand in dimension `along`
        groups, along = (x, -2) if self.page_tokens else (x.unflatten(-1, (-1, self.group_size)), -1)
        levels = (1 << self.code_bits) - 1
        low, high = groups.amin(along, keepdim=True), groups.amax(along, keepdim=True)
        low, scale = (y.to(torch.float16).to(torch.float32) for y in (low, over(high - low, levels)))
        scale = scale.clamp_min(SMALLEST_SCALE)
        whole = low.isfinite() & scale.isfinite()
        codes = round_half_away((groups - low) / scale).clamp(0, levels).masked_fill(~whole, 0)
        step = stored_as(torch.float16, scale, ~whole)
        stored = torch.stack([step, low.masked_fill(~whole, 0).to(torch.float16)], -1).squeeze(along - 1)
        return Rows(self.pack(codes.reshape(x.shape).to(torch.uint8)), stored)


_KIVI = "KIVI, https://arxiv.org/abs/2402.02750"

# keys: a channel of a page, for a few channels are far wider than the others
(
    uint4_per_channel_32,
    uint4_per_channel_64,
    uint4_per_channel_128,
    uint2_per_channel_32,
    uint2_per_channel_64,
    uint2_per_channel_128,
) = (
    MinMax(
        f"uint{bits}_per_channel_{tokens}",
        bits,
        Affine("minimum"),
        "per_channel",
        source=_KIVI + "; keys",
        page_tokens=tokens,
    )
    for bits in (4, 2)
    for tokens in (32, 64, 128)
)
# values: 32 channels of a row
uint4_per_group, uint2_per_group = (
    MinMax(f"uint{bits}_per_group", bits, Affine("minimum"), "per_group", _KIVI + "; values", group_size=32)
    for bits in (4, 2)
)
# the groups of other engines: a whole row where head_dim is the group's size
_LMDEPLOY = "LMDeploy's kv int4 (a head a group), https://github.com/InternLM/lmdeploy; MLX-LM's QuantizedKVCache (64)"
uint4_per_group_64, uint4_per_group_128 = (
    MinMax(f"uint4_per_group_{size}", 4, Affine("minimum"), "per_group", _LMDEPLOY, group_size=size)
    for size in (64, 128)
)
