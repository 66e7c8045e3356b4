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

    block_n: tokens of a part.  parts: parts of a tile, each with a warp of its own.
    stages: depth of the software pipeline.
    programs: how many programs a multiprocessor holds at once; splits fill these places once.
    least: tokens of a split, at least.
    registers: of a thread, at most; None leaves it to the compiler.
    """

    block_n: int
    parts: int
    stages: int
    programs: int
    least: int = 256
    registers: int | None = None

    @property
    def tile(self) -> int:
        """Tokens a tile."""
        return self.block_n * self.parts

    def splits(self, pairs: int, tokens: int) -> int:
        """Splits of each (sequence, KV head): all programs run at once, and none is too short for the merge to pay."""
        fill = multiprocessors() * self.programs // pairs
        # the merge reads every split, so there are no more warps than 64, or than long contexts pay for
        worth = max(64 // self.parts, 3 * math.isqrt(tokens // self.block_n) // 2)
        return max(1, min(tokens // self.least, fill, worth))


# tokens of all (sequence, KV head) pairs below which the length of a program counts, not its throughput
FEW = 1 << 19


def choose_tuning(k: Layout, v: Layout, head_dim: int, tokens: int) -> Tuning:
    """Measured on an H100 with 32/8 heads and head_dim 128; wider rows get shorter tiles.

    tokens: of all (sequence, KV head) pairs together.
    """
    if INTERPRETED:
        return Tuning(16, 2, 3, 4, least=32)
    block_n = max(16, 64 * 128 // max(128, triton.next_power_of_2(head_dim)))
    bits = max(k.bits, v.bits)
    if bits == 16:
        return Tuning(max(16, block_n // 2), 1, 3, 2)
    if bits == 8:
        return Tuning(block_n, 1, 3, 3)
    if bits == 4 and tokens >= FEW:
        return Tuning(block_n, 2, 3, 2, registers=255)
    return Tuning(block_n, 1, 3, 8, registers=255)


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
    if head_dim <= 128:
        return PrefillTuning(64, 64, 4, 3)
    return PrefillTuning(64, 64 if head_dim <= 256 else 32, 8, 2)


@cache
def multiprocessors() -> int:
    """Of the current GPU; in the interpreter 2, so that tests merge splits."""
    if INTERPRETED or not torch.cuda.is_available():
        return 2
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
