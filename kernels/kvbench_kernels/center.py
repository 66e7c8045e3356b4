"""Centred keys: what was subtracted before they were turned, and the share of the scores that this took away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.hadamard import Turn, rotate
from kvbench_kernels.layout import Side
from kvbench_kernels.three import stream_count, stream_words
from kvbench_kernels.tiers import Rank
from kvbench_kernels.tuning import INTERPRETED
from kvbench_kernels.unpack import channels

# what a query keeps beyond its first 16 bits, times this: neither part is then a subnormal number
LOWER = tl.constexpr(2048.0)
LARGEST = 60000.0  # of an offset, turned or not: it is multiplied in fp16


@dataclass(frozen=True)
class Center:
    """What was subtracted from keys: a vector a KV head for all positions, or one for each page of positions.

    offset: [N, HKV, D] float32, contiguous. Position i has offset[min(i // page, N - 1)]; N is 1 for all alike.
    parts: [N, HKV, 2, D] float16: the same rows, turned as keys are and rounded, and 2048 times what that took away.
        What is left of the scores lies in turned queries times these.
    """

    offset: Tensor
    parts: Tensor
    page: int = 64

    @classmethod
    def make(cls, offset: Tensor, turn: Turn | None = None, page: int = 64, rank: Rank | None = None) -> Center:
        """The offsets, and how they look to queries turned by `turn`, or sorted by `rank`.

        Raises:
            ValueError: offsets of another shape, or that fp16 can't hold.
        """
        if offset.dim() != 3:
            raise ValueError(f"an offset is [pages or 1, KV heads, head_dim], not {list(offset.shape)}")
        offset = turned = offset.to(torch.float32).contiguous()
        if turn is not None and turn.block > 1:
            turned = rotate(offset, turn) * (turn.write_factor / turn.read_factor)
        if rank is not None:
            turned = rank.rows(offset)
        largest = float(torch.maximum(offset.abs().amax(), turned.abs().amax()))
        if not largest <= LARGEST:
            raise ValueError(
                f"an offset of {largest:.3g} is beyond what is multiplied in 16 bits: {LARGEST:.0f} at most"
            )
        upper = turned.to(torch.float16)
        return cls(offset, torch.stack([upper, ((turned - upper) * LOWER.value).to(torch.float16)], 2), page)

    def check(self, k: Side, head_dim: int, block_n: int = 1) -> None:
        """Raises ValueError where these are not the offsets of such keys, or pages no whole tiles of block_n tokens."""
        want = [k.codes.shape[1], head_dim]
        if list(self.offset.shape[1:]) != want:
            raise ValueError(f"offsets are {list(self.offset.shape)}, not [pages or 1, {want[0]}, {want[1]}]")
        if self.last and self.page % block_n:
            raise ValueError(f"pages of {self.page} positions are not whole tiles of {block_n} tokens")

    @property
    def turned(self) -> Center:
        """The same for rows that stay turned."""
        upper, lower = self.parts.to(torch.float32).unbind(2)
        return Center((upper + lower / LOWER.value).contiguous(), self.parts, self.page)

    @property
    def last(self) -> int:
        """The last page that has an offset of its own."""
        return self.offset.shape[0] - 1


@triton.jit(do_not_specialize=["rows", "pages"])
def _page_scores_kernel(
    q_ptr,  # [T, HQ, D] any float, any strides
    offset_ptr,  # [N, HKV, D] float32
    scores_ptr,  # [HKV, pages, rows] float32
    rows,  # T * GROUP
    pages,
    factor,
    stride_qt,
    stride_qh,
    stride_qd,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_P pages' offsets times BLOCK_R queries of one KV head."""
    page = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    kv_head = tl.program_id(2).to(tl.int64)
    is_page = page < pages
    is_row = row < rows
    offset_at = offset_ptr + (page.to(tl.int64) * HKV + kv_head)[:, None] * D
    q_at = q_ptr + ((row // GROUP).to(tl.int64) * stride_qt + (kv_head * GROUP + row % GROUP) * stride_qh)[None, :]
    score = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        offset = tl.load(offset_at + d[None, :], mask=is_page[:, None] & (d < D)[None, :], other=0.0)
        q = tl.load(q_at + (d * stride_qd)[:, None], mask=(d < D)[:, None] & is_row[None, :], other=0.0).to(tl.float32)
        if q_ptr.dtype.element_ty.primitive_bitwidth == 16:
            # queries are what they are in tf32; offsets are in two parts, about 22 bits
            upper = (offset.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            score = tl.dot(upper, q, score, input_precision="tf32")
            score = tl.dot(offset - upper, q, score, input_precision="tf32")
        else:
            score = tl.dot(offset, q, score, input_precision="tf32x3")
    at = scores_ptr + (kv_head * pages + page)[:, None] * rows + row[None, :]
    tl.store(at, score * factor, mask=is_page[:, None] & is_row[None, :])


def scores_by_page(q: Tensor, center: Center, tokens: int, *, scale: float, softcap: float) -> Tensor:
    """[HKV, N, T, GROUP] float32: queries, not turned, times the offsets of N pages, as attention adds them.

    N: the pages that have an offset and that `tokens` positions reach. Scaled, and in base 2 without a softcap.

    A launch before, since a product of 16 columns in prefill's loop put its tiles into two matrix layouts at once, and
    the compiled loop was wrong.
    """
    pages = min(center.last + 1, -(-tokens // center.page))
    kv_heads, head_dim = center.offset.shape[1:]
    group = q.shape[1] // kv_heads
    rows = q.shape[0] * group
    scores = torch.empty(kv_heads, pages, q.shape[0], group, dtype=torch.float32, device=q.device)
    block_p, block_r = 32, 32 if rows <= 512 and not INTERPRETED else 64
    _page_scores_kernel[(triton.cdiv(pages, block_p), triton.cdiv(rows, block_r), kv_heads)](
        q,
        center.offset,
        scores,
        rows,
        pages,
        scale if softcap else scale * math.log2(math.e),
        *q.stride(),
        kv_heads,
        group,
        head_dim,
        BLOCK_P=block_p,
        BLOCK_R=block_r,
        BLOCK_D=max(16, min(64, triton.next_power_of_2(head_dim))),
        num_warps=4,
    )
    return scores


@triton.jit
def upper_and_lower(x):
    """x as two fp16 tiles: rounded, and what that took away, enlarged."""
    upper = x.to(tl.float16)
    return upper, ((x - upper.to(tl.float32)) * LOWER).to(tl.float16)


@triton.jit
def two_parts(x):
    """x [M, N] as two fp16 tiles [N, M]: rounded, and what that took away, enlarged."""
    upper, lower = upper_and_lower(x)
    return tl.trans(upper), tl.trans(lower)


@triton.jit
def center_scores(
    parts_ptr,  # [N, HKV, 2, D] fp16; where codes have 8 bits, int32 words of two channels
    page,  # [16, 1]
    kv_head,
    kw,  # [BLOCK_KW]
    q_upper,  # queries in two parts, each a tuple of tiles [BLOCK_KW, COLUMNS] as the streams of a key have them
    q_lower,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr = 1,
):
    """[16, COLUMNS] float32: each query times the offset of each page, to about 22 bits.

    PARTS: that a row's words are cut into, each of BLOCK_KW; the streams of the first come first.
    """
    WORDS: tl.constexpr = stream_words(D, BITS)
    STREAMS: tl.constexpr = stream_count(BITS)
    STEP: tl.constexpr = WORDS // 2 if BITS == 3 else WORDS  # channels from a stream to the next
    # beyond a row's words queries are 0
    word = (kw if kw.shape[0] == WORDS else kw % WORDS)[None, :]
    score = tl.zeros([page.shape[0], q_upper[0].shape[1]], tl.float32)
    rest = tl.zeros([page.shape[0], q_upper[0].shape[1]], tl.float32)
    for part in tl.static_range(PARTS):
        of_part = word + part * kw.shape[0]
        if BITS == 8:
            at = parts_ptr + (page * HKV + kv_head) * D + of_part
            first_words = tl.load(at)
            second_words = tl.load(at + D // 2)
        else:
            at = parts_ptr + (page * HKV + kv_head) * (2 * D) + channels(of_part, 0, BITS, WORDS)
        for stream in tl.static_range(STREAMS):
            if BITS == 8:
                first = (first_words >> (16 * stream)).to(tl.int16).to(tl.float16, bitcast=True)
                second = (second_words >> (16 * stream)).to(tl.int16).to(tl.float16, bitcast=True)
            else:
                first = tl.load(at + stream * STEP)
                second = tl.load(at + (stream * STEP + D))
            score = tl.dot(first, q_upper[part * STREAMS + stream], score)
            rest = tl.dot(first, q_lower[part * STREAMS + stream], rest)
            rest = tl.dot(second, q_upper[part * STREAMS + stream], rest)
    return score + rest * (1 / LOWER)


@triton.jit
def split_center_scores(
    center_at,  # [COLUMNS], where those of the sequence's first page go
    parts_ptr,
    kv_head,
    kw,
    q_upper,
    q_lower,
    scale,
    start,  # this and what follows as `split_bounds` has them
    end,
    first_exact,
    first,
    newest,
    length,
    exact_start,
    exact_end,
    last,  # offset
    COLUMNS: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr = 1,
):
    """Stores `center_scores`, times scale, of all pages that a split of decode reads, sixteen at a time."""
    page_0 = start // PAGE
    pages = tl.maximum(tl.cdiv(end, PAGE) - page_0, 0)
    count = pages
    before = 0
    if EXACT > 0:
        # pages of exact first tokens, of packed ones, and of the exact newest
        is_exact = exact_start < exact_end
        sinks_0 = first_exact // PAGE
        before = tl.where(is_exact & (first > first_exact), tl.cdiv(first, PAGE) - sinks_0, 0)
        newest_0 = newest // PAGE
        count = before + pages + tl.where(is_exact, tl.cdiv(length, PAGE) - newest_0, 0)
    for some in tl.range(0, count, 16, num_stages=STAGES):
        nth = some + tl.arange(0, 16)[:, None]
        own_page = page_0 + nth - before
        if EXACT > 0:
            own_page = tl.where(nth < before, sinks_0 + nth, own_page)
            own_page = tl.where(nth < before + pages, own_page, newest_0 + nth - before - pages)
        with_offset = tl.minimum(own_page, last)
        scores = center_scores(parts_ptr, with_offset, kv_head, kw, q_upper, q_lower, HKV, D, BITS, PARTS)
        tl.store(center_at[None, :] + own_page * COLUMNS, scores * scale, mask=nth < count)


@triton.jit
def row_center_scores(
    parts_ptr,  # [1, HKV, 2, D] fp16
    kv_head,
    channel,  # [BLOCK_KD], of each column of the queries
    is_channel,
    q_upper,  # [M, BLOCK_KD] fp16, and what rounding took away, enlarged
    q_lower,
    D: tl.constexpr,
):
    """[M] float32: each row of queries times the offset, to about 22 bits."""
    # a product has 16 columns at least: the first is the offset, the second what rounding took from it
    column = tl.arange(0, 16)[None, :]
    at = parts_ptr + kv_head * (2 * D) + channel[:, None] + column * D
    both = tl.load(at, mask=is_channel[:, None] & (column < 2), other=0.0)
    score = tl.dot(q_upper, both)
    rest = tl.dot(q_lower, both)
    score = tl.where(column == 0, score + rest * (1 / LOWER), tl.where(column == 1, score * (1 / LOWER), 0.0))
    return tl.sum(score, axis=1)
