"""Tile sizes and the number of splits: measured choices, in one place."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache

import torch
import triton

from kvbench_kernels.layout import Layout

# Triton decides this when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Tuning:
    """How decode attention is cut up.

    block_n: tokens a tile.  stages: depth of the software pipeline.
    programs: how many programs a multiprocessor holds at once; splits fill these places once.
    """

    block_n: int
    warps: int
    stages: int
    programs: int

    def splits(self, pairs: int, tokens: int) -> int:
        """Splits of each (sequence, KV head): all programs run at once, and none is too short for the merge to pay."""
        tiles = -(-tokens // self.block_n)
        fill = multiprocessors() * self.programs // pairs
        return max(1, min(tiles, fill, 3 * math.isqrt(tiles)))


def choose_tuning(k: Layout, v: Layout, head_dim: int, group: int) -> Tuning:
    """Measured on an H100 with 32/8 heads and head_dim 128; wider rows and larger groups get more warps.

    One warp works on a tile alone: no barrier, and no channel is split among warps. The registers of eight such
    programs fill a multiprocessor.
    """
    bits = min(k.bits, v.bits)
    columns = max(1, triton.next_power_of_2(group) // 8)  # of 8 query heads
    wide = max(1, triton.next_power_of_2(head_dim + 1) // 256)  # 128 channels each, rounded down to a power of two
    # at 2 bits a stream has too few channels for a second warp
    warps = min(8, wide * (columns if bits > 2 else max(1, columns // 2)))
    programs = max(1, min(8, {16: 2, 8: 3, 4: 4}.get(bits, 8) * columns) // warps)
    return Tuning(32 if bits == 16 else 64, warps, 3, programs)


@cache
def multiprocessors() -> int:
    """Of the current GPU; in the interpreter 2, so that tests merge splits."""
    if INTERPRETED or not torch.cuda.is_available():
        return 2
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
