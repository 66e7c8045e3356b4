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

SHARED_BYTES = 200 * 1024  # of a multiprocessor, for the pipeline


@dataclass(frozen=True)
class Tuning:
    """How decode attention is cut up.

    block_n: tokens of a part.  parts: parts of a tile, each with a warp of its own.
    stages: depth of the software pipeline.
    programs: how many programs a multiprocessor holds at once; splits fill these places once.
    merge_here: the last split to finish merges them all; False: a second launch does; None: whichever is faster.
    turn_here: each program turns its queries; otherwise a launch before does.
    """

    block_n: int
    parts: int
    stages: int
    programs: int
    merge_here: bool | None = None
    turn_here: bool = True

    @property
    def tile(self) -> int:
        """Tokens a tile."""
        return self.block_n * self.parts

    def splits(self, pairs: int, tokens: int) -> int:
        """Splits of each (sequence, KV head): all programs run at once, and none is too short for the merge to pay."""
        tiles = -(-tokens // self.tile)
        fill = multiprocessors() * self.programs // pairs
        return max(1, min(tiles, fill, 3 * math.isqrt(tiles * self.parts)))


def choose_tuning(k: Layout, v: Layout, head_dim: int) -> Tuning:
    """Measured on an H100 with 32/8 heads and head_dim 128; wider rows get shorter tiles."""
    if INTERPRETED:
        return Tuning(16, 2, 3, 4)
    bits = max(k.bits, v.bits)
    width = max(128, triton.next_power_of_2(head_dim))
    block_n = max(16, (32 if bits == 16 else 64) * 128 // width)
    stage = block_n * head_dim * (k.bits + v.bits) // 8  # bytes of a part's tile
    stages, parts = 3, 4
    while (stages - 1) * parts * stage > SHARED_BYTES:
        parts //= 2
    return Tuning(block_n, parts, stages, 1 if bits >= 8 else 2)


@dataclass(frozen=True)
class PrefillTuning:
    """How prefill attention is cut up.

    block_m: rows, query heads times query tokens, of a program.  block_n: tokens a tile.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose_prefill_tuning(head_dim: int) -> PrefillTuning:
    """Measured on an H100 with 32/8 heads and head_dim 128."""
    if INTERPRETED:
        return PrefillTuning(32, 64, 8, 2)
    return PrefillTuning(128 if head_dim <= 128 else 64, 64 if head_dim <= 256 else 32, 8, 3 if head_dim <= 128 else 2)


@cache
def multiprocessors() -> int:
    """Of the current GPU; in the interpreter 2, so that tests merge splits."""
    if INTERPRETED or not torch.cuda.is_available():
        return 2
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
