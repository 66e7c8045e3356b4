"""Attention of one query token a sequence over the packed, paged cache: split over the context, merged afterwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.blocks import decode_blocks
from kvbench_kernels.center import Center, center_scores, split_center_scores, two_parts
from kvbench_kernels.exact import HEADROOM, TYPES, Exact, attend_exact, split_bounds
from kvbench_kernels.hadamard import Turn, butterfly, butterfly_across, span
from kvbench_kernels.layout import Side, check
from kvbench_kernels.merge import merge
from kvbench_kernels.tiers import LOWERED, Rank, fields, rest_bits, rest_count, tier_field, tier_queries
from kvbench_kernels.tiles import (
    NO_TOKEN,
    by_column,
    every_eighth,
    folded,
    prefetch,
    row_scale,
    slices,
    stored_scales,
    together,
    unfolded,
)
from kvbench_kernels.tuning import INTERPRETED, Tuning, choose_tuning, exact_tile, multiprocessors
from kvbench_kernels.unpack import (
    E4M3,
    FLOAT,
    SYMMETRIC4,
    TIERS,
    UNSIGNED,
    channels,
    exp2,
    log2,
    masked,
    masked_unit,
    unpack,
)
from kvbench_kernels.whole import (
    WHOLE_ONE,
    byte_queries,
    in_bytes,
    in_upper_bytes,
    whole_halves,
    whole_queries,
    whole_scores,
    whole_unit,
    whole_words,
)

_LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEADS = 16  # query heads a program


@triton.jit
def _prefetch_tile(
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    base,
    K_WORDS: tl.constexpr,
    V_WORDS: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Asks for BLOCK_N rows from the cache's row `base` on."""
    K_ROW: tl.constexpr = 2 * K_WORDS if k_ptr.dtype.element_ty == tl.int8 else K_WORDS
    prefetch(k_ptr, base * K_ROW, BLOCK_N * K_ROW)
    prefetch(v_ptr, base * V_WORDS, BLOCK_N * V_WORDS)
    if K_SCALES:
        K_FOURS: tl.constexpr = 4 if k_scale_ptr.dtype.element_ty == tl.int32 else 1
        prefetch(k_scale_ptr, base // K_FOURS, BLOCK_N // K_FOURS)
    if V_SCALES:
        V_FOURS: tl.constexpr = 4 if v_scale_ptr.dtype.element_ty == tl.int32 else 1
        prefetch(v_scale_ptr, base // V_FOURS, BLOCK_N // V_FOURS)


@triton.jit
def _signs(row, column, WORDS: tl.constexpr):
    """[N, N] of +-1: words of one token by words of the same, Hadamard's matrix; of two tokens 0."""
    sign = (row[:, None] & column[None, :]) % WORDS
    sign ^= sign >> 4
    sign ^= sign >> 2
    sign ^= sign >> 1
    return tl.where((row // WORDS)[:, None] == (column // WORDS)[None, :], 1 - 2 * (sign & 1), 0)


@triton.jit
def _load_queries(q_at, channel, stride_d, order_ptr, spread_ptr, of_head):
    """[M, N] of queries at [M, 1] addresses: these places [N] of the keys' channels, times their spreads if ranked."""
    if order_ptr is not None:
        place = tl.load(order_ptr + of_head + channel)
        spread = tl.load(spread_ptr + of_head + channel)
        return tl.load(q_at + (place * stride_d)[None, :]).to(tl.float32) * spread[None, :]
    else:
        return tl.load(q_at + (channel * stride_d)[None, :])


@triton.jit
def _load_streams(
    q_at,
    stride_d,
    order_ptr,
    spread_ptr,
    of_head,
    kw,
    D: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ABREAST: tl.constexpr,
):
    """A tuple of tiles [COLUMNS, BLOCK_KW], the queries' channels of each stream."""
    if BITS == 8:
        # neighbouring channels are a word's two streams
        channel = tl.minimum(tl.arange(0, 2 * kw.shape[0]), D - 1)
        both = _load_queries(q_at, channel, stride_d, order_ptr, spread_ptr, of_head)
        return tl.split(tl.reshape(both, [COLUMNS, kw.shape[0], 2]))
    else:
        loaded = ()
        for stream in tl.static_range(16 // BITS):
            channel = channels(kw % WORDS if ABREAST > 1 else kw, stream, BITS, WORDS)
            if kw.shape[0] != WORDS:
                channel = tl.minimum(channel, D - 1)
            loaded = loaded + (_load_queries(q_at, channel, stride_d, order_ptr, spread_ptr, of_head),)
        return loaded


@triton.jit
def _store_part(
    part_o_ptr,
    part_m_ptr,
    part_l_ptr,
    part,
    is_head,
    own,
    m,
    l,
    shift,
    streams,
    V_BITS: tl.constexpr,
    D: tl.constexpr,
    ABREAST: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_VW: tl.constexpr,
):
    """The split's maxima, sums of weights and sums of values, less the zero-points' share of them."""
    V_WORDS: tl.constexpr = D * V_BITS // 16
    V_STREAMS: tl.constexpr = 16 // V_BITS
    APART: tl.constexpr = ABREAST * FOLD
    COLUMNS: tl.constexpr = BLOCK_G * APART
    vw = tl.arange(0, BLOCK_VW)
    l_sum = tl.sum(l, axis=0)
    shift_sum = tl.sum(shift, axis=0)
    top = m
    if APART > 1:
        # a head's columns relative to one maximum, to which a column that saw no token does not count
        m = tl.where(l_sum == 0.0, float("-inf"), m)
        top = tl.max(tl.reshape(m, [APART, BLOCK_G]), axis=0)
        share = tl.reshape(m, [APART, BLOCK_G]) - tl.where(top == float("-inf"), 0.0, top)[None, :]
        share = tl.exp2(tl.reshape(share, [COLUMNS]))
        l_sum = tl.sum(tl.reshape(l_sum * share, [APART, BLOCK_G]), axis=0)
    tl.store(part_m_ptr + part, top, mask=is_head)
    tl.store(part_l_ptr + part, l_sum, mask=is_head)
    o = together(streams) - shift_sum[None, :, None]
    if ABREAST > 1:
        vw = tl.arange(0, V_WORDS)
        own_row = tl.arange(0, BLOCK_VW)[:, None] // V_WORDS == own[None, :]
        o = tl.where(own_row[:, :, None], o * share[None, :, None], 0.0)
        o = tl.sum(tl.reshape(o, [ABREAST, V_WORDS, COLUMNS, V_STREAMS]), axis=0)
        o = tl.sum(tl.reshape(o, [V_WORDS, ABREAST, BLOCK_G, V_STREAMS]), axis=1)
    elif FOLD > 1:
        o = tl.sum(tl.reshape(o * share[None, :, None], [BLOCK_VW, FOLD, BLOCK_G, V_STREAMS]), axis=1)
    channel = channels(vw[:, None, None], tl.arange(0, V_STREAMS)[None, None, :], V_BITS, V_WORDS)
    o_at = part_o_ptr + part[None, :, None] * D + channel  # [BLOCK_VW, BLOCK_G, V_STREAMS]
    tl.store(o_at, o, mask=(vw < V_WORDS)[:, None, None] & is_head[None, :, None])


@triton.jit(
    do_not_specialize=["window", "stride_table", "SPLITS", "center_last", "stride_center"],
    do_not_specialize_on_alignment=["page_table_ptr", "seq_lens_ptr", "query_starts_ptr", "part_m_ptr", "part_l_ptr"],
)
def _decode_kernel(
    q_ptr,  # [T, HQ, D] any float
    k_ptr,  # [P, HKV, S, words] int16, or [P, HKV, S, D] fp16 or bf16; SYMMETRIC4, SIGNED: [P, HKV, S, bytes] int8
    k_scale_ptr,  # [P, HKV, S] float32 or uint8 or, of tiles that lie in a page, [P, HKV, S / 4] int32; or one float32
    v_ptr,
    v_scale_ptr,
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    query_starts_ptr,  # [B + 1] int32: sequence b's query is row [b] of q, if it has one alone; or None: row b
    slopes_ptr,  # [HQ] float32, or None
    k_signs_ptr,  # [D] float32, or None: the queries' signs, where they are turned here
    part_o_ptr,  # [pairs, SPLITS, HEADS, D] float32: sums of weight * value
    part_m_ptr,  # [pairs, SPLITS, HEADS] float32: what the weights' exponents are relative to, base 2
    part_l_ptr,  # [pairs, SPLITS, HEADS] float32: sums of weights
    scale,  # of the softmax
    softcap,
    window,  # tokens that a query sees, itself included
    k_factor,  # of the queries' turn
    stride_qt,
    stride_qh,
    stride_qd,
    stride_table,
    SPLITS,
    k_exact_ptr,  # [P, HKV, S, D] fp16 or bf16 (where codes have 8 bits: int32 words of two channels), or None
    v_exact_ptr,
    parts_ptr,  # [N, HKV, 2, D] fp16, the keys' centres (where codes have 8 bits, int32 words of two channels); or None
    center_ptr,  # [pairs, stride_center, COLUMNS] float32: room for their part of the scores; or None
    center_last,  # N - 1
    stride_center,  # pages
    k_rest_ptr,  # [P, HKV, S, words] int16: what follows the keys' words; or [P, HKV, S] int32, two of them; or None
    rest_bits_ptr,  # [words] int16: the lowest bit of each word's channel in them; or None
    order_ptr,  # [HKV, D] int32: the keys' channels in another order, and their spreads; or None
    spread_ptr,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CODEBOOK: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_STEP: tl.constexpr,
    K_SCALE: tl.constexpr,  # dimensions of the scale: 1 a row, 0 for all, -1 none
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_CODEBOOK: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_STEP: tl.constexpr,
    V_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TURN_QUERIES: tl.constexpr,
    TURN_ROWS: tl.constexpr,  # block of the queries' turn, where it is done row by row; or 0
    SPAN: tl.constexpr,
    ABREAST: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EXACT: tl.constexpr = 0,  # what a tile of tokens in 16 bits counts for; 0: there are no such tokens
    PACKED: tl.constexpr = 1,  # what a packed one counts for
    SINKS: tl.constexpr = 0,
    RECENT: tl.constexpr = 0,
    WINDOW_PAGE: tl.constexpr = 64,
    K_EXACT_TYPE: tl.constexpr = None,
    V_EXACT_TYPE: tl.constexpr = None,
    BLOCK_X: tl.constexpr = 16,
    CENTER: tl.constexpr = 0,  # 1: one centre for all positions; 2: one a page of CENTER_PAGE
    CENTER_PAGE: tl.constexpr = 64,
):
    """One program: one sequence, one KV head with HEADS of its query heads, one split of the context.

    Tokens are the rows of every product (scores [tokens, heads] = K Qᵀ, outputs [channels, heads] = Vᵀ Wᵀ), so that
    the cache's tiles are left operands and are decoded in registers. The weight of a token includes its value's
    scale, and the running maximum is that of their product: a weight is at most 1 and keeps its digits in 16 bits.

    A program is one warp: weights never leave it.

    ABREAST: 2 where a token's words are half a product's: two tokens lie in a row of every tile, and each has columns
    of its own, whose queries are 0 at the other's words. So what follows has BLOCK_N / ABREAST rows and
    ABREAST * BLOCK_G columns. Of the outputs the rows of one token under the columns of the other mean nothing.

    FOLD: how many parts of a tile's tokens have columns of their own, where heads leave some free: each part's scores
    are taken from its columns, so that BLOCK_N / FOLD rows of weights remain. The parts meet at the split's end.
    """
    GROUPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = pair // (HKV * GROUPS)
    kv_head = (pair // GROUPS % HKV).to(tl.int32)
    first_head = (pair % GROUPS * HEADS).to(tl.int32)  # of the group
    K_WORDS: tl.constexpr = D * K_BITS // 16
    V_WORDS: tl.constexpr = D * V_BITS // 16
    K_STREAMS: tl.constexpr = 16 // K_BITS
    V_STREAMS: tl.constexpr = 16 // V_BITS
    # a bf16 cache is multiplied in bf16, all others in fp16, in which every code is exact
    k_type: tl.constexpr = k_ptr.dtype.element_ty if K_KIND == FLOAT else tl.float16
    v_type: tl.constexpr = v_ptr.dtype.element_ty if V_KIND == FLOAT else tl.float16
    # what was never written may hold NaN, which a weight of 0 does not remove
    K_NAN: tl.constexpr = K_KIND == FLOAT or K_KIND == E4M3
    V_NAN: tl.constexpr = V_KIND == FLOAT or V_KIND == E4M3
    # codes that are multiplied as they lie in their words, see `masked`, and what a value is more than its code
    K_MASKED: tl.constexpr = K_KIND == UNSIGNED
    # values as whole numbers too
    V_WHOLE: tl.constexpr = V_KIND == SYMMETRIC4 and V_STEP != 0.0 and in_upper_bytes(V_CODEBOOK)
    V_MASKED: tl.constexpr = (V_KIND == UNSIGNED or V_KIND == SYMMETRIC4) and not V_WHOLE
    K_OFFSET: tl.constexpr = -(2.0 ** (K_BITS - 1))
    K_WHOLE: tl.constexpr = k_ptr.dtype.element_ty == tl.int8  # keys as whole numbers, see whole.py
    K_LOOKUP: tl.constexpr = K_WHOLE and K_KIND == SYMMETRIC4
    K_ROW: tl.constexpr = 2 * K_WORDS if K_WHOLE else K_WORDS  # of k_ptr's elements
    V_OFFSET: tl.constexpr = V_STEP - 1.5 if V_KIND == SYMMETRIC4 else -(2.0 ** (V_BITS - 1))
    ROWS: tl.constexpr = BLOCK_N // ABREAST
    COLUMNS: tl.constexpr = BLOCK_G * ABREAST * FOLD
    # rows of a product with values. Products that add to the same sums wait for each other, so where a stream has few
    # channels, all streams take their turn with 16 rows before the next 16
    SLICE: tl.constexpr = min(16, ROWS) if V_MASKED or V_WHOLE else ROWS // FOLD

    n = tl.arange(0, BLOCK_N)
    kw = tl.arange(0, BLOCK_KW)
    kr = tl.arange(0, 2 * BLOCK_KW if K_WHOLE else BLOCK_KW)
    vw = tl.arange(0, BLOCK_VW)
    g = tl.arange(0, BLOCK_G)
    head_0 = kv_head * GROUP + first_head
    is_head = (g < HEADS) & (first_head + g < GROUP)
    column = tl.arange(0, COLUMNS)
    own = column // BLOCK_G  # which of a row's tokens, or of a tile's parts, it sees
    g_column = column % BLOCK_G
    has_head = (g_column < HEADS) & (first_head + g_column < GROUP)
    head = head_0 + g_column

    if ASSEMBLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    query = b
    has_query = True
    if query_starts_ptr is not None:
        query = tl.load(query_starts_ptr + b).to(tl.int64)
        has_query = tl.load(query_starts_ptr + b + 1) - query == 1

    # length, queries and signs are asked for together, then the page; they are first used far below
    length = tl.load(seq_lens_ptr + b)
    loaded = ()
    if TURN_QUERIES:
        # all streams as one tile [K_STREAMS * COLUMNS, BLOCK_KW], to be turned by one product. Rows that are no head's
        # repeat the first head, which changes nothing
        r = tl.arange(0, K_STREAMS * COLUMNS)
        r_head = r % BLOCK_G
        r_head = head_0 + tl.where((r_head < HEADS) & (first_head + r_head < GROUP), r_head, 0)
        channel = channels((kw % K_WORDS)[None, :], (r // COLUMNS)[:, None], K_BITS, K_WORDS)
        q_all = tl.load(q_ptr + query * stride_qt + (r_head * stride_qh)[:, None] + channel * stride_qd)
        if k_signs_ptr is not None:
            signs = tl.load(k_signs_ptr + channel)
    elif TURN_ROWS > 0:
        row_at = q_ptr + query * stride_qt + ((head_0 + tl.where(is_head, g, 0)) * stride_qh)[:, None]
        for i in tl.static_range(D // SPAN):
            d = (i * SPAN + tl.arange(0, SPAN))[None, :]
            tile = tl.load(row_at + d * stride_qd).to(tl.float32)  # [BLOCK_G, SPAN]
            if k_signs_ptr is not None:
                tile *= tl.load(k_signs_ptr + d)
            loaded = loaded + (tile,)
    else:
        q_at = q_ptr + query * stride_qt + (tl.where(has_head, head, 0) * stride_qh)[:, None]
        loaded = _load_streams(
            q_at, stride_qd, order_ptr, spread_ptr, kv_head * D, kw, D, K_BITS, K_WORDS, COLUMNS, ABREAST
        )

    # the split's tokens: whole tiles
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    first_exact = first
    start, end, nothing, first, newest, exact_start, exact_end = split_bounds(
        length, first, split, SPLITS, BLOCK_N, EXACT, SINKS, RECENT, WINDOW_PAGE, BLOCK_X, PACKED
    )
    part = (pair * SPLITS + split) * HEADS + g
    if nothing or not has_query:
        tl.store(part_m_ptr + part, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=is_head)
        return
    table = page_table_ptr + b * stride_table
    last = tl.maximum(end - 1, 0)
    # a tile lies in one page, or each of its tokens looks its page up
    at = 0 if S % BLOCK_N == 0 else n
    page = tl.load(table + tl.minimum(start + at, last) // S)

    if ASSEMBLY and S % BLOCK_N == 0:
        # the first tile is on its way before the loop asks for it
        base = (page.to(tl.int64) * HKV + kv_head) * S + start % S
        _prefetch_tile(
            k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, base, K_WORDS, V_WORDS, K_SCALE == 1, V_SCALE == 1, BLOCK_N
        )

    # the group's queries divided by a power of two, so that they fit into 16 bits whatever their magnitude
    if TURN_QUERIES:
        if k_signs_ptr is not None:
            q_all = (q_all.to(tl.float32) * signs).to(q_all.dtype)
        if ABREAST > 1:
            own_word = (kw // K_WORDS)[None, :] == (r % COLUMNS // BLOCK_G)[:, None]
            q_all = tl.where(own_word, q_all, 0.0)
        # rows are streams and heads: what a lane gets is what the next product asks of it
        turned = butterfly_across(slices(tl.dot(q_all, _signs(kw, kw, K_WORDS).to(q_all.dtype)), COLUMNS))
        if K_LOOKUP:
            ordered = _signs(kw, whole_words(kw), K_WORDS).to(q_all.dtype)
            ordered = butterfly_across(slices(tl.dot(q_all, ordered), COLUMNS))
    else:
        if TURN_ROWS > 0:
            # through the place of the split's own outputs, for what comes from memory is laid out as products ask for
            rows_q = butterfly(loaded, TURN_ROWS)
            for i in tl.static_range(D // SPAN):
                turned_at = part_o_ptr + (part * D)[:, None] + (i * SPAN + tl.arange(0, SPAN))[None, :]
                tl.store(turned_at, rows_q[i] * k_factor, mask=is_head[:, None])
            tl.debug_barrier()
            own_part = (pair * SPLITS + split) * HEADS + tl.where(has_head, g_column, 0)
            streams_q = _load_streams(
                part_o_ptr + (own_part * D)[:, None], 1, None, None, 0, kw, D, K_BITS, K_WORDS, COLUMNS, ABREAST
            )
        else:
            streams_q = loaded
        turned = ()
        # a column's words are those of its own token
        is_query = has_head[:, None] & ((kw // K_WORDS)[None, :] == (own % ABREAST)[:, None])
        for stream in tl.static_range(K_STREAMS):
            turned = turned + (tl.where(is_query, streams_q[stream].to(tl.float32), 0.0),)
        ordered = turned
    peak = tl.zeros([COLUMNS, BLOCK_KW], tl.float32)
    for stream in tl.static_range(K_STREAMS):
        # of the words in whichever order is needed anyway
        peak = tl.maximum(peak, tl.abs(ordered[stream] if K_LOOKUP else turned[stream]))
    peak = tl.max(tl.max(peak, axis=1), axis=0)
    exponent = tl.minimum(tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) & 0xFF, 27), 227)
    q_unit = (exponent << 23).to(tl.float32, bitcast=True)
    q_inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)

    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=has_head, other=0.0) * _LOG2E
    else:
        slope = None
    # of products with 16-bit rows
    exact_scale = scale * q_unit
    if TURN_QUERIES:
        exact_scale *= k_factor
    if not HAS_SOFTCAP:
        exact_scale *= _LOG2E
    center = None
    center_at = None
    if CENTER > 0:
        q_upper = ()
        q_lower = ()
        for stream in tl.static_range(K_STREAMS):
            parts = two_parts(turned[stream] * q_inverse)
            q_upper = q_upper + (parts[0],)
            q_lower = q_lower + (parts[1],)
    if CENTER == 1:
        all_alike = tl.zeros([16, 1], tl.int32)
        center = center_scores(parts_ptr, all_alike, kv_head, kw, q_upper, q_lower, HKV, D, K_BITS)
        center = tl.max(center, axis=0) * exact_scale  # [COLUMNS]
    if CENTER == 2:
        # of the split's pages, before its loops, which find each one beside the page
        center_at = center_ptr + pair * stride_center * COLUMNS + column
        split_center_scores(
            center_at, parts_ptr, kv_head, kw, q_upper, q_lower, exact_scale, start, end, first_exact, first, newest,
            length, exact_start, exact_end, center_last, COLUMNS, HKV, D, K_BITS, CENTER_PAGE, EXACT, STAGES,
        )  # fmt: skip
        tl.debug_barrier()

    m = tl.full([COLUMNS], float("-inf"), tl.float32)
    # sums over tokens go as far as a lane's own, every eighth; the rest is left for the end
    l = tl.zeros([8, COLUMNS], tl.float32)
    shift = tl.zeros([8, COLUMNS], tl.float32)  # the zero-points' share of the output
    acc = ()
    for _ in tl.static_range(V_STREAMS):
        acc = acc + (tl.zeros([BLOCK_VW, COLUMNS], tl.float32),)

    if EXACT > 0:  # noqa: SIM102 - a constant, and one that is none
        if exact_start < exact_end:
            exact_queries = ()
            for stream in tl.static_range(K_STREAMS):
                exact_queries = exact_queries + (tl.trans((turned[stream] * q_inverse).to(K_EXACT_TYPE)),)
            m, l, acc = attend_exact(
                m, l, acc, exact_queries, k_exact_ptr, v_exact_ptr, table, kv_head, exact_start, exact_end,
                first_exact, first, newest, length, exact_scale, softcap, slope, center, center_at,
                HKV, D, S, K_BITS, V_BITS, K_EXACT_TYPE, V_EXACT_TYPE, HAS_SOFTCAP, CENTER_PAGE, ABREAST, BLOCK_G,
                BLOCK_X, BLOCK_KW, BLOCK_VW, STAGES, ASSEMBLY, FOLD=FOLD,
            )  # fmt: skip
            # a column that saw no token has no maximum yet
            m = tl.where(tl.sum(l, axis=0) == 0.0, float("-inf"), m - HEADROOM)
            l *= 2.0**HEADROOM
            v_all = 1.0
            if V_SCALE == 0:
                # the merge multiplies all splits by the one scale
                v_all = tl.load(v_scale_ptr)
            packed_acc = ()
            for stream in tl.static_range(V_STREAMS):
                unit = masked_unit(V_BITS, stream) if V_MASKED else 1.0
                if V_WHOLE:
                    unit = V_UNIT / whole_unit(V_CODEBOOK)
                packed_acc = packed_acc + (acc[stream] * (unit * 2.0**HEADROOM / v_all),)
            acc = packed_acc

    q_sum = tl.zeros([COLUMNS, BLOCK_KW], tl.float32)
    q_offset = tl.zeros([COLUMNS, BLOCK_KW], tl.float32)
    queries = ()
    if K_LOOKUP:
        whole_q = whole_queries(ordered, q_inverse, TURN_QUERIES)
    elif K_WHOLE:
        whole_q = byte_queries(turned, q_inverse)
    if K_KIND == TIERS:
        queries, q_offset = tier_queries(turned, q_inverse, kw, K_CODEBOOK, K_WORDS)
        REST_WORDS: tl.constexpr = rest_count(K_CODEBOOK[0], K_WORDS)
        rest_bit = tl.load(rest_bits_ptr + kw)
    for stream in tl.static_range(0 if K_KIND == TIERS or K_WHOLE else K_STREAMS):
        q = turned[stream] * q_inverse  # [COLUMNS, BLOCK_KW]
        if K_MASKED:
            # against the small units of the codes; all scores become 2^-10 of what they are
            q *= 2.0**-10 / masked_unit(K_BITS, stream)
        q = q.to(k_type)
        q_sum += q.to(tl.float32) * (masked_unit(K_BITS, stream) if K_MASKED else 1.0)
        queries = queries + (tl.trans(q),)
    if K_MASKED:
        q_offset = tl.sum(q_offset + q_sum * K_OFFSET, axis=1)  # [COLUMNS]: a part of every score
    q_sum = tl.sum(q_sum, axis=1)  # [COLUMNS]

    # scores are in base 2, except where the softcap needs them as they are
    score_scale = scale * q_unit
    if TURN_QUERIES:
        score_scale *= k_factor
    if K_MASKED:
        score_scale *= 1024
    if K_KIND == TIERS:
        score_scale *= 1 / LOWERED
    if K_WHOLE:
        score_scale *= (whole_unit(K_CODEBOOK) / K_UNIT if K_LOOKUP else 1.0) / WHOLE_ONE
    if not HAS_SOFTCAP:
        score_scale *= _LOG2E
    if K_SCALE == 0:
        score_scale *= tl.load(k_scale_ptr)
    v_step = tl.full([1, 1], V_STEP, tl.float16)
    ones = tl.full([BLOCK_VW, SLICE], 1.0, tl.float16)

    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        token = tile + n
        visible = token < end
        if HAS_WINDOW or EXACT > 0:
            # by one comparison, for a second takes instructions and registers for every token: what lies before `first`
            # is a large number without its sign
            visible = (token - first).to(tl.uint32) < (tl.maximum(end, first) - first).to(tl.uint32)
        if CENTER == 2:
            # through the tiles' pipeline: a plain load, even a tile ahead, is waited for together with shared memory
            tile_center = tl.load(center_at + tile // CENTER_PAGE * COLUMNS)
        if CENTER == 1:
            tile_center = center
        # the next page is asked for one tile ahead
        base = (page.to(tl.int64) * HKV + kv_head) * S + (tile + at) % S
        page = tl.load(table + tl.minimum(tile + BLOCK_N + at, last) // S)
        if S % BLOCK_N == 0:
            row = base + n
            k_at = k_ptr + base * K_ROW + (tl.arange(0, ROWS)[:, None] * (ABREAST * K_ROW) + kr[None, :])
        else:
            row = base
            row_0 = tl.split(tl.reshape(row, [ROWS, 2]))[0] if ABREAST > 1 else row  # [ROWS], where each row begins
            row_1 = tl.split(tl.reshape(row, [ROWS, 2]))[1] if ABREAST > 1 else row
            k_at = k_ptr + (row_0 * K_ROW)[:, None] + kr[None, :]

        # scores
        if BLOCK_KW == ABREAST * K_WORDS:
            k_words = tl.load(k_at)  # [ROWS, BLOCK_KW]
        else:
            k_words = tl.load(k_at, mask=(kr < K_ROW)[None, :], other=0.0)
        score = tl.zeros([ROWS, COLUMNS], tl.float32)
        if K_MASKED or K_KIND == TIERS:
            score += q_offset[None, :]
        if K_WHOLE:
            score = whole_scores(k_words, whole_q, K_CODEBOOK, ASSEMBLY)
        if K_KIND == TIERS:
            # the rest of a token's channels, each beside its word
            if k_rest_ptr.dtype.element_ty == tl.int32:
                both = tl.load(k_rest_ptr + base + n)
                k_rest = tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))[:, None, :]  # [ROWS, 1, 2]
                k_rest = tl.reshape(tl.broadcast_to(k_rest, [ROWS, BLOCK_KW // 2, 2]), [ROWS, BLOCK_KW])
            elif S % BLOCK_N == 0:
                beside = tl.arange(0, ROWS)[:, None] * ABREAST + (kw // K_WORDS)[None, :]
                rest_at = k_rest_ptr + base * REST_WORDS + beside * REST_WORDS
                k_rest = tl.load(rest_at + (kw % REST_WORDS)[None, :])
            else:
                rest_at = k_rest_ptr + (tl.where((kw < K_WORDS)[None, :], row_0[:, None], row_1[:, None]) * REST_WORDS)
                k_rest = tl.load(rest_at + (kw % REST_WORDS)[None, :])
            for i in tl.static_range(fields(K_CODEBOOK[0])):
                k = tier_field(k_words, k_rest, rest_bit, i, K_CODEBOOK[0], ASSEMBLY)
                score = tl.dot(k, queries[i], score)
        for stream in tl.static_range(0 if K_KIND == TIERS or K_WHOLE else K_STREAMS):
            if K_MASKED:
                k = masked(k_words, stream, K_BITS, False, ASSEMBLY)
                score = tl.dot(k, queries[stream], score)
            else:
                k = unpack(k_words, None, stream, K_KIND, K_BITS, K_CODEBOOK, ASSEMBLY)
                score = tl.dot(k, queries[stream], score)

        if FOLD > 1:
            score = folded(score, own, FOLD)
        if V_SCALE == 1:
            v_stored = stored_scales(v_scale_ptr, row, base, visible, 1, BLOCK_N)
            v_scale, v_zero = row_scale(v_stored, V_KIND, V_BITS, V_UNIT)
            v_log = log2(v_scale, ASSEMBLY)
            bias = by_column(tl.where(visible, v_log, float("-inf")), ABREAST, BLOCK_G, FOLD)
        else:
            bias = by_column(tl.where(visible, 0.0, float("-inf")), ABREAST, BLOCK_G, FOLD)
        if K_SCALE == 1:
            k_stored = stored_scales(k_scale_ptr, row, base, visible, 0, BLOCK_N)
            k_scale, k_zero = row_scale(k_stored, K_KIND, K_BITS, K_UNIT)
            k_scale = by_column(k_scale * score_scale, ABREAST, BLOCK_G, FOLD)
        else:
            k_scale = score_scale
        if HAS_SOFTCAP or slopes_ptr is not None:
            if K_KIND == UNSIGNED:
                score -= by_column(k_zero, ABREAST, BLOCK_G, FOLD) * q_sum[None, :]
            score *= k_scale
            if HAS_SOFTCAP:
                if CENTER > 0:
                    score += tile_center[None, :]
                score = softcap * (1 - 2 / (tl.exp2(score * (2 * _LOG2E / softcap)) + 1)) * _LOG2E
            if slopes_ptr is not None:
                score += slope[None, :] * by_column((token - length + 1).to(tl.float32), ABREAST, BLOCK_G, FOLD)
            score += bias
        elif K_KIND == UNSIGNED:
            score = score * k_scale + (bias - (k_scale * by_column(k_zero, ABREAST, BLOCK_G, FOLD)) * q_sum[None, :])
        else:
            score = score * k_scale + bias
        if K_NAN:
            score = tl.where(by_column(visible, ABREAST, BLOCK_G, FOLD), score, float("-inf"))

        # weights
        if CENTER > 0 and not HAS_SOFTCAP:
            # the same for all tokens of a tile: a part of the maximum instead of every score
            new_m = tl.maximum(m, tl.max(score, axis=0) + tile_center)
        else:
            new_m = tl.maximum(m, tl.max(score, axis=0))  # [COLUMNS]
        new_m = tl.maximum(new_m, NO_TOKEN)
        decay = exp2(m - new_m, ASSEMBLY)[None, :]
        m = new_m
        if CENTER > 0 and not HAS_SOFTCAP:
            weight = exp2(score - (m - tile_center)[None, :], ASSEMBLY)
        else:
            weight = exp2(score - m[None, :], ASSEMBLY)
        unscaled = weight
        if V_SCALE == 1:
            unscaled *= by_column(exp2(-v_log, ASSEMBLY), ABREAST, BLOCK_G, FOLD)
        l = l * decay + every_eighth(unscaled)
        if V_KIND == UNSIGNED:
            shift = shift * decay + every_eighth(weight * by_column(v_zero, ABREAST, BLOCK_G, FOLD))

        # outputs
        new_acc = ()
        for stream in tl.static_range(V_STREAMS):
            new_acc = new_acc + (acc[stream] * decay,)
        acc = new_acc
        if V_MASKED:
            w_sum = tl.zeros([BLOCK_VW, COLUMNS], tl.float32)  # of the tile's weights in 16 bits, in every row
        weights = slices(weight.to(v_type), SLICE)
        if FOLD > 1:
            weights = unfolded(weights, own, FOLD, ASSEMBLY)
        if S % BLOCK_N != 0:
            rows = slices(row_0[:, None], SLICE)
        for i in tl.static_range(ROWS // SLICE):
            if S % BLOCK_N == 0:
                of_slice = (i * SLICE + tl.arange(0, SLICE)) * (ABREAST * V_WORDS)
                v_at = v_ptr + base * V_WORDS + (of_slice[None, :] + vw[:, None])
            else:
                v_at = v_ptr + tl.trans(rows[i]) * V_WORDS + vw[:, None]
            if V_NAN:
                v_words = tl.load(v_at, mask=(vw < V_WORDS)[:, None] & visible[None, :], other=0.0)
            elif BLOCK_VW == ABREAST * V_WORDS:
                v_words = tl.load(v_at)  # [BLOCK_VW, SLICE]
            else:
                v_words = tl.load(v_at, mask=(vw < V_WORDS)[:, None], other=0)
            if V_MASKED:
                w_sum = tl.dot(ones, weights[i], w_sum)
                # after a product of the weights, whose layout it then shares
                upper_weights = weights[i] * -v_step
            new_acc = ()
            for stream in tl.static_range(V_STREAMS):
                if V_WHOLE:
                    v = whole_halves(v_words, stream, V_CODEBOOK, ASSEMBLY)
                elif V_MASKED:
                    v = masked(v_words, stream, V_BITS, False, ASSEMBLY)
                else:
                    v = unpack(v_words, None, stream, V_KIND, V_BITS, V_CODEBOOK, ASSEMBLY)
                new_acc = new_acc + (tl.dot(v, weights[i], acc[stream]),)
            acc = new_acc
            if V_MASKED and V_KIND == SYMMETRIC4 and V_STEP != 0.0:
                new_acc = ()
                for stream in tl.static_range(V_STREAMS):
                    upper = masked(v_words, stream, V_BITS, True, ASSEMBLY)
                    new_acc = new_acc + (tl.dot(upper, upper_weights, acc[stream]),)
                acc = new_acc
        if V_MASKED:
            # a product's sums are cut off, not rounded: codes that stand above 0 must not add up over a long context
            new_acc = ()
            for stream in tl.static_range(V_STREAMS):
                new_acc = new_acc + (acc[stream] + w_sum * (V_OFFSET * masked_unit(V_BITS, stream)),)
            acc = new_acc

    streams = ()
    for stream in tl.static_range(V_STREAMS):
        o = acc[stream]
        if V_MASKED:
            o *= 1 / masked_unit(V_BITS, stream)
        if V_WHOLE:
            o *= whole_unit(V_CODEBOOK) / V_UNIT
        streams = streams + (o,)
    _store_part(
        part_o_ptr, part_m_ptr, part_l_ptr, part, is_head, own, m, l, shift, streams,
        V_BITS, D, ABREAST, FOLD, BLOCK_G, BLOCK_VW,
    )  # fmt: skip


def decode(
    q: Tensor,
    k: Side,
    v: Side,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    max_seq_len: int,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_turn: Turn | None = None,
    v_turn: Turn | None = None,
    query_starts: Tensor | None = None,
    out: Tensor | None = None,
    exact: Exact | None = None,
    center: Center | None = None,
    rank: Rank | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Attention outputs [T, HQ, D] of one query a sequence, each at its sequence's last position.

    q: [T, HQ, D] not turned, any strides; fp16, bf16 or float32; sequence b's query is row b.
    query_starts: [B + 1] int32: sequence b's query is row query_starts[b] if it has one alone; other rows of `out` are
        left as they are.
    page_table: [B, max_pages] int32.  seq_lens: [B] int32, the query's own token included.
    max_seq_len: at least the longest of seq_lens; it chooses the number of splits.
    window: tokens that a query sees, itself included; 0 for all.
    softcap: scores become softcap * tanh(score / softcap); 0 for none.
    alibi_slopes, sinks: [HQ] float32.
    k_turn, v_turn: how keys and values were turned; queries are turned alike, outputs back.
    exact: the tokens that the query reads in 16 bits instead.
    center: what was subtracted from keys. All scores lack as much where it is the same for all positions, which shows
        with a softcap or sinks alone.
    rank: how keys' channels were sorted; queries are sorted alike. Such keys are not turned.

    A scale that is NaN makes the outputs of the heads that read it NaN.
    """
    query_heads, head_dim = q.shape[1:]
    batch = seq_lens.shape[0]
    kv_heads, page_size = k.codes.shape[1:3]
    check(q, k, v)
    if k.layout.in_blocks:
        return decode_blocks(
            q, k, v, page_table, seq_lens, scale=scale, max_seq_len=max_seq_len, window=window, softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, k_turn=k_turn, v_turn=v_turn, query_starts=query_starts, out=out,
            exact=exact, center=center, tuning=tuning,
        )  # fmt: skip
    group = query_heads // kv_heads
    heads = min(group, MAX_HEADS)
    pairs = batch * kv_heads * -(-group // heads)
    by_page = center is not None and center.last > 0
    plain = exact is None and not by_page
    tuning = tuning or choose_tuning(k.layout, v.layout, head_dim, heads, plain)
    tokens = min(max_seq_len, window + tuning.block_n) if window else max_seq_len
    words = k.layout.words(head_dim)
    # where a token's words are half a product's, and its heads no more than half of those that a program can take
    packed_bits = max(k.layout.bits, v.layout.bits)
    abreast = 2 if packed_bits <= 4 and words == v.layout.words(head_dim) == 8 and heads <= MAX_HEADS // 2 else 1
    fold = 1
    slower = by_page and k.layout.kind != TIERS.value  # by 2 to 4 % at int2, where tiers gain 5
    if abreast == 1 and heads <= 4 and v.layout.kind not in (FLOAT.value, E4M3.value) and not slower:
        # a product has eight columns at least, and sixteen rows
        fold = min(8 // triton.next_power_of_2(heads), tuning.block_n // 16)
    block_x, exact_weight, packed_weight = exact_tile(packed_bits, tuning.block_n)
    block_x = max(16 * abreast, block_x)
    exact_tiles = 0
    if exact is not None:
        exact.check(k, head_dim)
        if pairs * tuning.splits(pairs, tokens) <= 4 * multiprocessors():
            packed_weight = 1  # alone on its scheduler a program waits as long for either tile
        exact_tiles = -(-min(exact.most_tokens, max_seq_len) // block_x)
        exact_tiles = -(-exact_weight * exact_tiles // packed_weight)  # as packed ones
    splits = tuning.splits(pairs, tokens, exact_tiles, heads)
    if center is not None:
        center.check(k, head_dim, tuning.block_n)
        if center.last == 0 and not softcap and sinks is None:
            center = None
    part_o = torch.empty(pairs, splits, heads, head_dim, dtype=torch.float32, device=q.device)
    part_m, part_l = torch.empty(2, pairs, splits, heads, dtype=torch.float32, device=q.device)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_turn, v_turn = k_turn or Turn(), v_turn or Turn()
    # as a product with the matrix of +-1, which is exact for 16-bit queries; it needs whole power-of-two rows of words.
    # Others are turned row by row, as keys are
    turn_here = k_turn.block == head_dim and q.element_size() == 2 and words * abreast in (16, 32, 64)
    assembly = q.is_cuda and not INTERPRETED
    block_g = max(8 // (abreast * fold), triton.next_power_of_2(heads))
    center_pages = 0 if center is None or center.last == 0 else -(-max_seq_len // center.page)
    rest = k.following
    if rest is not None and rest.shape[-1] == 2 and abreast == 1 and page_size % tuning.block_n == 0:
        rest = rest.view(torch.int32)  # a load a token and not one a channel
    center_room = torch.empty(pairs, center_pages, block_g * abreast * fold, dtype=torch.float32, device=q.device)
    _decode_kernel[(pairs, splits)](
        q,
        k.codes.view(torch.int8) if in_bytes(k.layout.kind, head_dim) else k.words,
        k.scale_fours if page_size % tuning.block_n == 0 else k.scale,
        v.words,
        v.scale_fours if page_size % tuning.block_n == 0 else v.scale,
        page_table,
        seq_lens,
        query_starts,
        alibi_slopes,
        k_turn.signs,
        part_o,
        part_m,
        part_l,
        scale,
        softcap,
        window,
        k_turn.read_factor,
        *q.stride(),
        page_table.stride(0),
        splits,
        None if exact is None else exact.k.view(torch.int32) if k.layout.bits == 8 else exact.k,
        None if exact is None else exact.v.view(torch.int32) if v.layout.bits == 8 else exact.v,
        None if center is None else center.parts.view(torch.int32) if k.layout.bits == 8 else center.parts,
        center_room if center_pages else None,
        0 if center is None else center.last,
        center_pages,
        rest,
        None if k.rest is None else rest_bits(int(k.layout.codebook[0]), head_dim, q.device),
        None if rank is None else rank.order,
        None if rank is None else rank.spread,
        kv_heads,
        group,
        heads,
        head_dim,
        page_size,
        *k.constants,
        *v.constants,
        HAS_SOFTCAP=softcap != 0,
        HAS_WINDOW=window != 0,
        TURN_QUERIES=turn_here,
        TURN_ROWS=0 if turn_here or k_turn.block == 1 else k_turn.block,
        SPAN=span(head_dim),
        ABREAST=abreast,
        FOLD=fold,
        BLOCK_G=block_g,
        BLOCK_N=tuning.block_n,
        BLOCK_KW=max(16, triton.next_power_of_2(words)),
        BLOCK_VW=max(16, triton.next_power_of_2(v.layout.words(head_dim))),
        STAGES=tuning.stages,
        ASSEMBLY=assembly,
        EXACT=0 if exact is None else exact_weight,
        PACKED=packed_weight,
        **({} if exact is None else exact.constants),
        K_EXACT_TYPE=None if exact is None else TYPES[exact.k.dtype],
        V_EXACT_TYPE=None if exact is None else TYPES[exact.v.dtype],
        BLOCK_X=block_x,
        CENTER=0 if center is None else 1 if center.last == 0 else 2,
        CENTER_PAGE=64 if center is None else center.page,
        num_warps=1,
        maxnreg=tuning.registers,
        launch_pdl=assembly,
    )
    merge(
        part_o, part_m, part_l, out, v_turn, kv_heads=kv_heads, group=group, sinks=sinks,
        v_scale=v.scale if v.scale_dims == 0 else None, query_starts=query_starts,
    )  # fmt: skip
    return out
