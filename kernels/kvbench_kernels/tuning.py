"""Tile sizes and the number of splits: measured choices, in one place."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache

import torch
import triton

from kvbench_kernels.layout import Layout
from kvbench_kernels.unpack import SYMMETRIC4

# Triton decides this when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def rows_a_program(compiled: int) -> int:
    """Rows of a program: many in the interpreter, where an operation takes its time however wide it is."""
    return 128 if INTERPRETED else compiled


LONG = 16  # tiles of a split over which its beginning and end weigh little


@dataclass(frozen=True)
class Tuning:
    """How decode attention is cut up.

    block_n: tokens of a tile.  stages: depth of the software pipeline.
    programs: how many programs, of one warp each, a multiprocessor holds at once; splits fill these places once.
    least: tokens of a split, at least.
    registers: of a thread, at most; None leaves it to the compiler.
    crowded: programs instead where each split then still has LONG tiles; 0: never more.
    """

    block_n: int
    stages: int
    programs: int
    least: int = 256
    registers: int | None = None
    crowded: int = 0

    def splits(self, pairs: int, tokens: int, further: int = 0, heads: int = 1) -> int:
        """Splits of each (sequence, KV head): all programs run at once, and none is too short for the merge to pay.

        further: tiles beside the tokens'; they get splits of their own where there is room for these.
        heads: query heads of a program.
        """
        fill = multiprocessors() * self.programs // pairs
        crowded = multiprocessors() * self.crowded // pairs
        # tiles in 16 bits leave no memory for as many programs, and more heads no registers to gain by them
        if crowded and not further and heads <= 8 and tokens >= LONG * self.block_n * crowded:
            fill = crowded
        # the merge reads every split, so there are no more than 64, or than long contexts pay for
        worth = max(64, 3 * math.isqrt(tokens // self.block_n) // 2)
        splits = max(1, min(tokens // self.least, fill, worth))
        each = -(-tokens // (self.block_n * splits))  # tiles of a split
        return max(splits, min(splits + -(-further // each), fill))


def choose_tuning(k: Layout, v: Layout, head_dim: int, heads: int, plain: bool) -> Tuning:
    """Measured on an H100 with 32/8 heads and head_dim 128; wider rows get shorter tiles.

    heads: query heads of a program.  plain: whether no token is read in 16 bits and no centre by page added.

    A multiprocessor has four schedulers. One warp for each is best while memory is what is waited for; at 2 bits
    a second one adds a third to what it does. At 4 bits it adds 3 % where splits are long, 12 at head_dim 64 (H200).
    A third one, for which int2's registers suffice up to four heads, makes it 2 to 3 % faster (H200), but slower with
    centres by page, and keys in tiers by 4 %.
    """
    if INTERPRETED:
        return Tuning(32, 3, 4, least=32)
    block_n = max(16, 64 * 128 // max(128, triton.next_power_of_2(head_dim)))
    bits = max(k.bits, v.bits)
    if bits == 16:
        return Tuning(max(16, block_n // 2), 3, 4)
    if bits == 8:
        return Tuning(block_n, 3, 4)
    if bits == 4:
        return Tuning(block_n, 3, 4, registers=255, crowded=8)
    if k.kind == SYMMETRIC4.value and heads <= 4 and head_dim <= 128 and plain:
        return Tuning(block_n, 3, 8, registers=168, crowded=12)
    return Tuning(block_n, 3, 8, registers=255)


def choose_block_tuning(k: Layout, v: Layout, head_dim: int) -> Tuning:
    """The same for rows in blocks: short tiles and a second warp on a scheduler below 8 bits, where more is decoded."""
    if INTERPRETED:
        return Tuning(32, 3, 4, least=32)
    narrow = max(k.bits, v.bits) < 8
    block_n = max(16, (32 if narrow else 64) * 128 // max(128, triton.next_power_of_2(head_dim)))
    return Tuning(block_n, 3, 8 if narrow else 4, registers=255)


def exact_tile(packed_bits: int, block_n: int) -> tuple[int, int, int]:
    """Of a tile in 16 bits the tokens, what it counts for, and what a packed tile of block_n tokens counts for.

    As many bytes, or at 4 bits twice as many. Measured on an H100; tiles of 2 bits take longer than their bytes.
    """
    block_x = max(16, block_n // {16: 1, 8: 2, 4: 2}.get(packed_bits, 4))
    return (block_x, 1, 3) if packed_bits == 2 else (block_x, 2 if packed_bits == 4 else 1, 1)


@dataclass(frozen=True)
class PrefillTuning:
    """How prefill attention is cut up.

    block_m: rows, query heads times query tokens, of a program.  block_n: tokens a tile.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


SHORT = 256  # tokens of a context that a few tiles hold
# for many short contexts, by the bits of a stored number; 0: of a copy in 16 bits
SHORT_TILES = {
    0: PrefillTuning(32, 32, 1, 2),
    16: PrefillTuning(32, 16, 1, 2),
    8: PrefillTuning(16, 32, 1, 2),
    4: PrefillTuning(16, 32, 1, 2),
    2: PrefillTuning(32, 16, 1, 2),
}


def choose_prefill_tuning(head_dim: int, pairs: int = 0, reach: int = 0, bits: int = 0) -> PrefillTuning:
    """Measured on an H100 with 32/8 heads and head_dim 128, many short contexts on an H200 with 9/3 and 64.

    pairs: of a sequence and a KV head, and reach: tokens of the longest context; 0 where they are not short and plain.
    bits: of a number, as SHORT_TILES has them.
    """
    if INTERPRETED:
        return PrefillTuning(32, 64, 8, 2)
    if head_dim <= 64 and 0 < reach <= SHORT and pairs >= 8 * multiprocessors():
        return SHORT_TILES[bits]
    if head_dim <= 128:
        return PrefillTuning(64, 64, 4, 3)
    return PrefillTuning(64, 64 if head_dim <= 256 else 32, 8, 2)


@cache
def multiprocessors() -> int:
    """Of the current GPU; in the interpreter 2, so that tests merge splits."""
    if INTERPRETED or not torch.cuda.is_available():
        return 2
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
