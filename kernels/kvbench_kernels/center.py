"""Centred keys: what was subtracted before they were turned, and the share of the scores that this took away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.hadamard import Turn, rotate
from kvbench_kernels.layout import Side
from kvbench_kernels.unpack import channels

# what a query keeps beyond its first 16 bits, times this: neither part is then a subnormal number
_LOWER = tl.constexpr(2048.0)
LARGEST = 60000.0  # of an offset, turned or not: it is multiplied in fp16


@dataclass(frozen=True)
class Center:
    """What was subtracted from keys: a vector a KV head for all positions, or one for each page of positions.

    offset: [N, HKV, D] float32, contiguous. Position i has offset[min(i // page, N - 1)]; N is 1 for all alike.
    turned: the same rows, turned as keys are: what is left of the scores lies in turned queries times these.
    """

    offset: Tensor
    turned: Tensor
    page: int = 64

    @classmethod
    def make(cls, offset: Tensor, turn: Turn | None = None, page: int = 64) -> Center:
        """The offsets, and how they look to queries turned by `turn`.

        Raises:
            ValueError: offsets of another shape, or that fp16 can't hold.
        """
        if offset.dim() != 3:
            raise ValueError(f"an offset is [pages or 1, KV heads, head_dim], not {list(offset.shape)}")
        offset = turned = offset.to(torch.float32).contiguous()
        if turn is not None and turn.block > 1:
            turned = rotate(offset, turn) * (turn.write_factor / turn.read_factor)
        largest = float(torch.maximum(offset.abs().amax(), turned.abs().amax()))
        if not largest <= LARGEST:
            raise ValueError(
                f"an offset of {largest:.3g} is beyond what is multiplied in 16 bits: {LARGEST:.0f} at most"
            )
        return cls(offset, turned, page)

    def check(self, k: Side, head_dim: int, block_n: int = 1) -> None:
        """Raises ValueError where these are not the offsets of such keys, or pages no whole tiles of block_n tokens."""
        want = [k.codes.shape[1], head_dim]
        if list(self.offset.shape[1:]) != want:
            raise ValueError(f"offsets are {list(self.offset.shape)}, not [pages or 1, {want[0]}, {want[1]}]")
        if self.last and self.page % block_n:
            raise ValueError(f"pages of {self.page} positions are not whole tiles of {block_n} tokens")

    @property
    def last(self) -> int:
        """The last page that has an offset of its own."""
        return self.offset.shape[0] - 1


def scores_by_page(q: Tensor, center: Center, tokens: int) -> Tensor:
    """[HKV, N, T, GROUP] float32: queries, not turned, times the offsets of the N pages that `tokens` positions reach.

    Before the kernel, not in its loop over tiles: with a product of 16 columns beside those of 64 the compiled loop
    gave wrong outputs or read what is not there. In float64, which no setting of the process makes less exact.
    """
    offset = center.offset[: -(-tokens // center.page)]
    pages, kv_heads, head_dim = offset.shape
    rows = q.reshape(q.shape[0], kv_heads, -1, head_dim)
    scores = torch.empty(kv_heads, pages, *rows.shape[:1], rows.shape[2], dtype=torch.float32, device=q.device)
    for head in range(kv_heads):  # one at a time: less memory
        of_head = rows[:, head].reshape(-1, head_dim).double()
        scores[head] = (offset[:, head].double() @ of_head.T).view(scores.shape[1:])
    return scores


@triton.jit
def upper_and_lower(x):
    """x as two fp16 tiles: rounded, and what that took away, enlarged."""
    upper = x.to(tl.float16)
    return upper, ((x - upper.to(tl.float32)) * _LOWER).to(tl.float16)


@triton.jit
def two_parts(x):
    """x [M, N] as two fp16 tiles [N, M]: rounded, and what that took away, enlarged."""
    upper, lower = upper_and_lower(x)
    return tl.trans(upper), tl.trans(lower)


@triton.jit
def center_scores(
    turned_ptr,  # [N, HKV, D] float32
    page,  # [M, 1]
    kv_head,
    kw,  # [BLOCK_KW]
    q_upper,  # queries in two parts, each a tuple of tiles [BLOCK_KW, COLUMNS] as the streams of a key have them
    q_lower,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
):
    """[M, COLUMNS] float32: each query times the offset of each page, to about 22 bits."""
    WORDS: tl.constexpr = D * BITS // 16
    at = turned_ptr + (page * HKV + kv_head) * D
    score = tl.zeros([page.shape[0], q_upper[0].shape[1]], tl.float32)
    rest = tl.zeros([page.shape[0], q_upper[0].shape[1]], tl.float32)
    for stream in tl.static_range(16 // BITS):
        # beyond a row's words queries are 0
        offset = tl.load(at + channels((kw % WORDS)[None, :], stream, BITS, WORDS))
        first = offset.to(tl.float16)
        second = ((offset - first.to(tl.float32)) * _LOWER).to(tl.float16)
        score = tl.dot(first, q_upper[stream], score)
        rest = tl.dot(first, q_lower[stream], rest)
        rest = tl.dot(second, q_upper[stream], rest)
    return score + rest * (1 / _LOWER)


@triton.jit
def row_center_scores(
    turned_ptr,  # [N, HKV, D] float32
    page,
    kv_head,
    channel,  # [BLOCK_KD], of each column of the queries
    is_channel,
    q_upper,  # [M, BLOCK_KD] fp16, and what rounding took away, enlarged
    q_lower,
    HKV: tl.constexpr,
    D: tl.constexpr,
):
    """[M] float32: each row of queries times one page's offset, to about 22 bits."""
    offset = tl.load(turned_ptr + (page * HKV + kv_head) * D + channel, mask=is_channel, other=0.0)
    first = offset.to(tl.float16)
    second = ((offset - first.to(tl.float32)) * _LOWER).to(tl.float16)
    # a product has 16 columns at least: the first is the offset, the second what rounding took from it
    column = tl.arange(0, 16)[None, :]
    both = tl.where(column == 0, first[:, None], tl.where(column == 1, second[:, None], 0.0)).to(tl.float16)
    score = tl.dot(q_upper, both)
    rest = tl.dot(q_lower, both)
    score = tl.where(column == 0, score + rest * (1 / _LOWER), tl.where(column == 1, score * (1 / _LOWER), 0.0))
    return tl.sum(score, axis=1)


@triton.jit
def keep_center_scores(
    kept_at,  # pointers [COLUMNS] to the scores of page 0; those of a page are COLUMNS apart
    turned_ptr,
    own_page,  # [M, 1]
    wanted,  # [M, 1]: which of them
    last,
    scale,
    kv_head,
    kw,
    q_upper,
    q_lower,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
):
    """Keeps the scores of some pages in memory, for loops that read them after a barrier."""
    scores = center_scores(turned_ptr, tl.minimum(own_page, last), kv_head, kw, q_upper, q_lower, HKV, D, BITS)
    tl.store(kept_at[None, :] + own_page * kept_at.shape[0], scores * scale, mask=wanted)
