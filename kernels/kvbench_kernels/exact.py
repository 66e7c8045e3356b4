"""Tokens in 16 bits beside a packed history: the first ones and the newest, further splits of the same merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.layout import Layout, Side
from kvbench_kernels.three import stream_count, stream_words
from kvbench_kernels.tiles import NO_TOKEN, by_column, every_eighth
from kvbench_kernels.unpack import FLOAT, channels, exp2

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LOG2E = tl.constexpr(1.4426950408889634)
# exact tokens' sums become so many times larger before packed ones join them, whose weights include a scale that may
# be small: they keep their digits in 16 bits, down to scales of 2^-HEADROOM
HEADROOM = tl.constexpr(40)


@dataclass(frozen=True)
class Exact:
    """The second, exact copy of the tokens that a query reads in 16 bits, in the slots of the packed ones.

    A query at position i reads key j here if j < sinks or j >= max(0, (i // page - recent) * page), and packed if not;
    with recent None only if j < sinks.
    k, v: [P, HKV, S, D] fp16 or bf16, contiguous; turned, and keys centred, like the packed rows.
    """

    k: Tensor
    v: Tensor
    sinks: int
    recent: int | None
    page: int = 64

    def __post_init__(self) -> None:
        if min(self.sinks, self.recent or 0) < 0 or self.page < 1:
            raise ValueError(f"no window of {self.sinks} first tokens and {self.recent} pages of {self.page}")
        for name, x in (("k", self.k), ("v", self.v)):
            if x.dtype not in (torch.float16, torch.bfloat16) or not x.is_contiguous():
                raise ValueError(f"exact {name} are contiguous float16 or bfloat16, not {x.dtype}")

    def check(self, k: Side, head_dim: int) -> None:
        """Raises ValueError where this copy does not lie beside the packed keys."""
        want = [*k.codes.shape[:3], head_dim]
        for name, x in (("k", self.k), ("v", self.v)):
            if list(x.shape) != want:
                raise ValueError(f"exact {name} are {list(x.shape)}, not {want}: the packed cache's slots")

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys and values as a cache of 16-bit rows."""
        layout = Layout(FLOAT.value, 16)
        return Side(self.k, None, layout, self.k.dtype), Side(self.v, None, layout, self.v.dtype)

    @property
    def most_tokens(self) -> int:
        """Of one query, at most."""
        return self.sinks + (0 if self.recent is None else (self.recent + 1) * self.page)

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants SINKS, RECENT (-1: none, not even the query's own page) and WINDOW_PAGE."""
        return {
            "SINKS": self.sinks,
            "RECENT": -1 if self.recent is None else self.recent,
            "WINDOW_PAGE": self.page,
        }


@triton.jit
def exact_start(position, RECENT: tl.constexpr, PAGE: tl.constexpr):
    """From which token on queries at these positions read in 16 bits, the first tokens aside."""
    if RECENT < 0:
        return position + 1
    else:
        return tl.maximum((position // PAGE - RECENT) * PAGE, 0)


@triton.jit
def exact_bounds(length, first, SINKS: tl.constexpr, RECENT: tl.constexpr, PAGE: tl.constexpr):
    """(end of the exact first tokens, begin of the exact newest ones), between which the packed ones lie.

    For the query at the end of `length` tokens, which sees those from `first` on.
    """
    newest = tl.maximum(exact_start(tl.maximum(length - 1, 0), RECENT, PAGE), first)
    if RECENT < 0:
        newest = length
    return tl.maximum(tl.minimum(newest, SINKS), first), newest


@triton.jit
def split_bounds(
    length,
    first,
    split,
    SPLITS,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    WINDOW_PAGE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PACKED: tl.constexpr = 1,
):
    """Which tokens a split of decode reads, in whole tiles; first: the first that the query sees.

    EXACT, PACKED: what a tile in 16 bits and a packed one count for. EXACT 0: there are none in 16 bits.

    A tuple: packed ones from start to end; whether there are none at all; the first packed one and the first of the
    newest, as `exact_bounds` has them; and the exact ones from start to end, counted among themselves.
    """
    if EXACT == 0:
        first_tile = first // BLOCK_N
        tiles_each = tl.cdiv(tl.cdiv(length, BLOCK_N) - first_tile, SPLITS)
        start = (first_tile + split * tiles_each) * BLOCK_N
        end = tl.minimum(start + tiles_each * BLOCK_N, length)
        return start, end, start >= end, first, length, 0, 0
    else:
        # exact tiles come first, then packed ones; a split has its share of what they count for, whichever they are
        first_packed, newest = exact_bounds(length, first, SINKS, RECENT, WINDOW_PAGE)
        exact_tokens = first_packed - first + length - newest
        exact_tiles = tl.cdiv(exact_tokens, BLOCK_X)
        first_tile = first_packed // BLOCK_N
        tiles = tl.where(first_packed < newest, tl.cdiv(newest, BLOCK_N) - first_tile, 0)
        each = tl.cdiv(exact_tiles * EXACT + tiles * PACKED, SPLITS)
        exact_start = tl.minimum(tl.cdiv(split * each, EXACT), exact_tiles) * BLOCK_X
        exact_end = tl.minimum(tl.cdiv((split + 1) * each, EXACT) * BLOCK_X, exact_tokens)
        tile_0 = tl.cdiv(tl.maximum(split * each - exact_tiles * EXACT, 0), PACKED)
        start = (first_tile + tile_0) * BLOCK_N
        end = first_tile + tl.cdiv(tl.maximum((split + 1) * each - exact_tiles * EXACT, 0), PACKED)
        end = tl.minimum(end * BLOCK_N, newest)
        nothing = (start >= end) & (exact_start >= exact_end)
        return start, end, nothing, first_packed, newest, exact_start, exact_end


@triton.jit
def _pick(even, odd, own, ABREAST: tl.constexpr):
    """What belongs to tokens, by row and word: of a row's two tokens the one that the word is of."""
    if ABREAST == 1:
        return even
    else:
        return tl.where(own == 0, even, odd)


@triton.jit
def attend_exact(
    m,  # [COLUMNS] running maximum, sums of weights and streams of outputs so far: none
    l,
    acc,
    queries,  # a tuple of tiles [BLOCK_KW, COLUMNS] as the streams of a packed key have them, 16 bits
    k_ptr,  # [P, HKV, S, D] 16 bits; where packed codes have 8 bits, int32 words of two channels
    v_ptr,
    table,  # pointer to the sequence's pages
    kv_head,
    start,  # of the split, counted in exact tokens
    end,
    first,
    sinks_end,
    newest,
    length,
    score_scale,
    softcap,
    slope,  # [COLUMNS], or None
    center,  # [COLUMNS]: a part of every score, or None
    center_at,  # pointers [COLUMNS] to a part of the scores by page of positions, pages COLUMNS apart; or None
    HKV: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_TYPE: tl.constexpr,
    V_TYPE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CENTER_PAGE: tl.constexpr,
    ABREAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    K_PARTS: tl.constexpr = 1,
    V_PARTS: tl.constexpr = 1,
    FOLD: tl.constexpr = 1,
):
    """(running maximum, sums of weights, streams of outputs) of exact tokens, laid out like those of packed ones.

    Every stream of a packed row is a slice of an exact one, or at 8 bits every other channel. Where a row's words are
    cut into parts, so are the streams: those of the first part come first. Where packed tokens have FOLD columns of a
    head, exact ones have the first.
    """
    K_WORDS: tl.constexpr = stream_words(D, K_BITS)
    V_WORDS: tl.constexpr = stream_words(D, V_BITS)
    K_STREAMS: tl.constexpr = stream_count(K_BITS)
    V_STREAMS: tl.constexpr = stream_count(V_BITS)
    ROWS: tl.constexpr = BLOCK_X // ABREAST
    COLUMNS: tl.constexpr = BLOCK_G * ABREAST * FOLD
    x = tl.arange(0, BLOCK_X)
    kw = tl.arange(0, BLOCK_KW)
    vw = tl.arange(0, BLOCK_VW)
    k_own = (kw // K_WORDS)[None, :]
    v_own = (vw // V_WORDS)[:, None]
    sinks = sinks_end - first
    last = end - 1

    # what a tile has beyond the last token repeats it, so that nothing unwritten is read
    at = tl.minimum(start + x, last)
    next_token = tl.where(at < sinks, first + at, newest - sinks + at)
    page = tl.load(table + next_token // S)
    for tile in tl.range(start, end, BLOCK_X, num_stages=STAGES):
        visible = tile + x < end
        token = next_token
        row = (page.to(tl.int64) * HKV + kv_head) * S + token % S
        # the next pages are asked for one tile ahead
        at = tl.minimum(tile + BLOCK_X + x, last)
        next_token = tl.where(at < sinks, first + at, newest - sinks + at)
        page = tl.load(table + next_token // S)
        if ABREAST > 1:
            even, odd = tl.split(tl.reshape(row, [ROWS, ABREAST]))
        else:
            even, odd = row, row

        # scores
        k_row = _pick(even[:, None], odd[:, None], k_own, ABREAST)
        score = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in tl.static_range(K_PARTS):
            if K_BITS == 8:
                k_words = tl.load(k_ptr + k_row * (D // 2) + (kw % K_WORDS + part * BLOCK_KW)[None, :])
                for stream in tl.static_range(2):
                    k = (k_words >> (16 * stream)).to(tl.int16).to(K_TYPE, bitcast=True)
                    score = tl.dot(k, queries[part * 2 + stream], score)
            else:
                for stream in tl.static_range(K_STREAMS):
                    channel = channels(kw % K_WORDS + part * BLOCK_KW, stream, K_BITS, K_WORDS)
                    k = tl.load(k_ptr + k_row * D + channel[None, :])
                    score = tl.dot(k, queries[part * K_STREAMS + stream], score)
        score *= score_scale
        if center_at is not None:
            score += tl.load(center_at[None, :] + by_column(token // CENTER_PAGE, ABREAST, BLOCK_G) * COLUMNS)
        if center is not None:
            score += center[None, :]
        if HAS_SOFTCAP:
            score = softcap * (1 - 2 / (tl.exp2(score * (2 * _LOG2E / softcap)) + 1)) * _LOG2E
        if slope is not None:
            score += slope[None, :] * by_column((token - length + 1).to(tl.float32), ABREAST, BLOCK_G)
        score += by_column(tl.where(visible, 0.0, float("-inf")), ABREAST, BLOCK_G)
        if FOLD > 1:
            score = tl.where((tl.arange(0, COLUMNS) < BLOCK_G)[None, :], score, float("-inf"))

        # weights
        new_m = tl.maximum(m, tl.max(score, axis=0))  # [COLUMNS]
        new_m = tl.maximum(new_m, NO_TOKEN)
        decay = exp2(m - new_m, ASSEMBLY)[None, :]
        m = new_m
        weight = exp2(score - m[None, :], ASSEMBLY)
        l = l * decay + every_eighth(weight)
        weights = weight.to(V_TYPE)

        # outputs
        v_row = _pick(tl.trans(even[:, None]), tl.trans(odd[:, None]), v_own, ABREAST)
        new_acc = ()
        for part in tl.static_range(V_PARTS):
            if V_BITS == 8:
                v_words = tl.load(v_ptr + v_row * (D // 2) + (vw % V_WORDS + part * BLOCK_VW)[:, None])
                for stream in tl.static_range(2):
                    v = (v_words >> (16 * stream)).to(tl.int16).to(V_TYPE, bitcast=True)
                    new_acc = new_acc + (tl.dot(v, weights, acc[part * 2 + stream] * decay),)
            else:
                for stream in tl.static_range(V_STREAMS):
                    channel = channels(vw % V_WORDS + part * BLOCK_VW, stream, V_BITS, V_WORDS)
                    v = tl.load(v_ptr + v_row * D + channel[:, None])
                    new_acc = new_acc + (tl.dot(v, weights, acc[part * V_STREAMS + stream] * decay),)
        acc = new_acc
    return m, l, acc


@triton.jit
def attend_exact_rows(
    m,  # [BLOCK_M]: the rows' running maxima, sums of weights and of values so far
    l,
    acc,
    q,  # [BLOCK_M, BLOCK_KD] of the exact rows' type
    k_ptr,  # [P, HKV, S, D] 16 bits
    v_ptr,
    table,
    slope,
    bias_ptr,
    center,  # [BLOCK_M], or None
    center_at,  # pointers [BLOCK_M] to rows' products with the centre of page 0, pages center_rows apart; or None
    center_last,
    center_rows,
    kv_head,
    start,  # tokens that some row sees: from here on
    end,
    newest,  # from which on some row sees all in 16 bits
    starts,  # [BLOCK_M]: from which on each row does
    position,  # [BLOCK_M]
    query,
    is_row,
    length,
    queries,
    k_channel,
    is_k_channel,
    v_channel,
    is_v_channel,
    scale,
    softcap,
    window,
    stride_bias,
    HKV: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CENTER: tl.constexpr,
    CENTER_PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """(m, l, acc) after the tokens that rows see in 16 bits: tiles of first tokens, then those of the newest ones."""
    n = tl.arange(0, BLOCK_N)
    newest = tl.maximum(newest // BLOCK_N * BLOCK_N, start)
    sink_tiles = tl.cdiv(tl.maximum(tl.minimum(SINKS, newest) - start, 0), BLOCK_N)
    tiles = sink_tiles + tl.cdiv(end - newest, BLOCK_N)
    for i in tl.range(0, tiles, num_stages=STAGES):
        tile = tl.where(i < sink_tiles, start + i * BLOCK_N, newest + (i - sink_tiles) * BLOCK_N)
        token = tile + n
        inside = token < end
        # what lies beyond the last token repeats it, so that nothing unwritten is read
        read = tl.minimum(token, end - 1)
        row = (tl.load(table + read // S).to(tl.int64) * HKV + kv_head) * S + read % S
        k = tl.load(k_ptr + row[:, None] * D + k_channel[None, :], mask=is_k_channel[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k)) * scale
        if CENTER == 2:
            page = tl.minimum(tile // CENTER_PAGE, center_last).to(tl.int64)
            score += tl.load(center_at + page * center_rows, mask=is_row, other=0.0)[:, None]
        if center is not None:
            score += center[:, None]
        if HAS_SOFTCAP:
            score = softcap * (1 - 2 / (tl.exp2(score * (2 * _LOG2E / softcap)) + 1)) * _LOG2E
        if slope is not None:
            score += slope[:, None] * (token[None, :] - position[:, None]).to(tl.float32)
        if bias_ptr is not None:
            new = token - (length - queries)
            bias_at = bias_ptr + query[:, None] * stride_bias + new[None, :]
            is_new = (is_row & (query < queries))[:, None] & (inside & (new >= 0))[None, :]
            score += tl.load(bias_at, mask=is_new, other=0.0) * _LOG2E
        visible = inside[None, :] & (token[None, :] <= position[:, None])
        visible = visible & ((token < SINKS)[None, :] | (token[None, :] >= starts[:, None]))
        if HAS_WINDOW:
            visible = visible & (token[None, :] > position[:, None] - window)
        score = tl.where(visible, score, float("-inf"))

        new_m = tl.maximum(m, tl.max(score, axis=1))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = exp2(m - safe_m, ASSEMBLY)
        m = new_m
        weight = exp2(score - safe_m[:, None], ASSEMBLY)
        l = l * decay + tl.sum(weight, axis=1)
        v = tl.load(v_ptr + row[:, None] * D + v_channel[None, :], mask=is_v_channel[None, :], other=0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None])
    return m, l, acc
