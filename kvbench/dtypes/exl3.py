"""exllamav3's quantized cache: 32 channels share a scale, and a Hadamard matrix of 32 turns just these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Codebook
from kvbench.dtypes.blocks import Blocks

GROUP = 32
SMALLEST = 1e-10  # added to a group's largest magnitude


@dataclass(frozen=True)
class MidpointPerGroup(Blocks):
    """Each group's range, from minus to plus its largest magnitude, in 2^bits equal cells; a code is a cell's middle.

    Codes are made with the largest magnitude as it is, and it is stored as the nearest float16, as exllamav3 does.
    """

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        scale = blocks.abs().amax(-1) + SMALLEST
        half = 1 << (self.code_bits - 1)
        # a power of two: the product is exact, so the sum is rounded once, as a fused one is
        cells = (blocks * (1 / scale).unsqueeze(-1) * half + half).floor().clamp(0, 2 * half - 1)
        return cells.to(torch.uint8), scale


def _exl3(bits: int) -> MidpointPerGroup:
    cells = 1 << bits
    return MidpointPerGroup(
        f"exl3_{bits}bit",
        bits,
        Codebook(tuple((2 * code + 1) / cells - 1 for code in range(cells))),
        "per_group",
        "exllamav3's quantized cache, https://github.com/turboderp-org/exllamav3, cache/q_cache_kernels.cuh",
        default_rotation="hadamard_32",
        group_size=GROUP,
    )


exl3_2bit, exl3_3bit, exl3_4bit, exl3_5bit, exl3_6bit, exl3_7bit, exl3_8bit = map(_exl3, range(2, 9))
