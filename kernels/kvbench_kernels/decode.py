"""Attention of one query token a sequence over the packed, paged cache: split over the context, merged afterwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.hadamard import Turn
from kvbench_kernels.layout import Side, check
from kvbench_kernels.merge import merge_kernel
from kvbench_kernels.tuning import INTERPRETED, Tuning, choose_tuning
from kvbench_kernels.unpack import (
    E4M3,
    FLOAT,
    SYMMETRIC4,
    UNSIGNED,
    channels,
    exp2,
    halves_base,
    log2,
    unpack,
    unpack_halves,
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_scale(stored, KIND: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr):
    """The scale of one stream unit and the zero-point in streams, both [N] float32, of the rows' stored scales."""
    if KIND == UNSIGNED:
        bits = stored.to(tl.int32, bitcast=True)
        low: tl.constexpr = (1 << BITS) - 1
        return (bits & ~low).to(tl.float32, bitcast=True), ((bits & low) - (1 << (BITS - 1))).to(tl.float32)
    return stored * UNIT, stored


@triton.jit(do_not_specialize=["window", "stride_table", "SPLITS"])
def _decode_kernel(
    q_ptr,  # [T, HQ, D] any float
    k_ptr,  # [P, HKV, S, words] int16, or [P, HKV, S, D] fp16 or bf16
    k_scale_ptr,  # [P, HKV, S] float32, or one float32
    v_ptr,
    v_scale_ptr,
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    query_starts_ptr,  # [B + 1] int32: sequence b's query is row [b] of q, if it has one alone; or None: row b
    slopes_ptr,  # [HQ] float32, or None
    part_o_ptr,  # [B, HQ, SPLITS, D] float32: sums of weight * value
    part_m_ptr,  # [B, HQ, SPLITS] float32: what the weights' exponents are relative to, base 2
    part_l_ptr,  # [B, HQ, SPLITS] float32: sums of weights
    scale,  # of the softmax
    softcap,
    window,  # tokens that a query sees, itself included
    stride_qt,
    stride_qh,
    stride_qd,
    stride_table,
    SPLITS,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
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
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: one sequence, one KV head with its group of query heads, one split of the context.

    Tokens are the rows of every product (scores [tokens, heads] = K Qᵀ, outputs [channels, heads] = Vᵀ Wᵀ), so that
    the cache's tiles are left operands and are decoded in registers. The weight of a token includes its value's
    scale, and the running maximum is that of their product: a weight is at most 1 and keeps its digits in 16 bits.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = (pair // HKV).to(tl.int64)
    kv_head = pair % HKV
    HQ: tl.constexpr = HKV * GROUP
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

    g = tl.arange(0, BLOCK_G)
    n = tl.arange(0, BLOCK_N)
    kw = tl.arange(0, BLOCK_KW)
    vw = tl.arange(0, BLOCK_VW)
    head = kv_head * GROUP + g
    is_head = g < GROUP

    if ASSEMBLY:
        tl.extra.cuda.gdc_wait()
    query = b
    has_query = True
    if query_starts_ptr is not None:
        query = tl.load(query_starts_ptr + b).to(tl.int64)
        has_query = tl.load(query_starts_ptr + b + 1) - query == 1

    # the split's tokens: whole tiles
    length = tl.load(seq_lens_ptr + b)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    first_tile = first // BLOCK_N
    tiles_each = tl.cdiv(tl.cdiv(length, BLOCK_N) - first_tile, SPLITS)
    start = (first_tile + split * tiles_each) * BLOCK_N
    end = tl.minimum(start + tiles_each * BLOCK_N, length)

    part = (b * HQ + head) * SPLITS + split
    if start >= end or not has_query:
        tl.store(part_m_ptr + part, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=is_head)
        return

    # the group's queries divided by a power of two, so that they fit into 16 bits whatever their magnitude
    q_at = q_ptr + query * stride_qt + (head * stride_qh)[None, :]
    q_mask = (kw < K_WORDS)[:, None] & is_head[None, :]
    largest = 0.0
    loaded = ()
    for stream in tl.static_range(K_STREAMS):
        channel = channels(kw, stream, K_BITS, K_WORDS)
        q = tl.load(q_at + (channel * stride_qd)[:, None], mask=q_mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(q)))
        loaded = loaded + (q,)
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 27), 227)
    q_unit = (exponent << 23).to(tl.float32, bitcast=True)
    q_inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    q_sum = tl.zeros([BLOCK_G], tl.float32)
    q_offset = tl.zeros([BLOCK_G], tl.float32)  # SYMMETRIC4: what comes off every score
    queries = ()
    upper_queries = ()  # SYMMETRIC4: for the upper half of the codes
    for stream in tl.static_range(K_STREAMS):
        q = (loaded[stream] * q_inverse).to(k_type)  # [BLOCK_KW, BLOCK_G]
        stream_sum = tl.sum(q.to(tl.float32), axis=0)
        q_sum += stream_sum
        queries = queries + (q,)
        if K_KIND == SYMMETRIC4:
            q_offset += stream_sum * (K_STEP - 1.5 - halves_base(stream))
            upper_queries = upper_queries + ((q.to(tl.float32) * (-2 * K_STEP)).to(tl.float16),)

    # scores are in base 2, except where the softcap needs them as they are
    score_scale = scale * q_unit
    if not HAS_SOFTCAP:
        score_scale *= _LOG2E
    if K_SCALE == 0:
        score_scale *= tl.load(k_scale_ptr)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=is_head, other=0.0) * _LOG2E
    k_step = tl.full([1, 1], K_STEP, tl.float16)
    v_step = tl.full([1, 1], V_STEP, tl.float16)

    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)  # summed over tokens at the end
    shift = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)  # likewise: the zero-points' share of the output
    acc = ()
    for _ in tl.static_range(V_STREAMS):
        acc = acc + (tl.zeros([BLOCK_VW, BLOCK_G], tl.float32),)

    table = page_table_ptr + b * stride_table
    # a tile lies in one page, or each of its tokens looks its page up
    if S % BLOCK_N == 0:
        page = tl.load(table + start // S)
    else:
        page = tl.load(table + tl.minimum(start + n, end - 1) // S)  # [BLOCK_N]
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        token = tile + n
        visible = token < end
        if HAS_WINDOW:
            visible = visible & (token >= first)
        # the next page is asked for one tile ahead
        if S % BLOCK_N == 0:
            base = (page.to(tl.int64) * HKV + kv_head) * S + tile % S
            row = n  # [BLOCK_N], from base on
            page = tl.load(table + tl.minimum(tile + BLOCK_N, end - 1) // S)
        else:
            base = 0
            row = (page.to(tl.int64) * HKV + kv_head) * S + token % S
            page = tl.load(table + tl.minimum(token + BLOCK_N, end - 1) // S)

        # scores
        k_at = k_ptr + base * K_WORDS + (row[:, None] * K_WORDS + kw[None, :])
        if BLOCK_KW == K_WORDS:
            k_words = tl.load(k_at)  # [BLOCK_N, BLOCK_KW]
        else:
            k_words = tl.load(k_at, mask=(kw < K_WORDS)[None, :], other=0.0)
        score = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
        if K_KIND == SYMMETRIC4:
            score += q_offset[None, :]
        for stream in tl.static_range(K_STREAMS):
            if K_KIND == SYMMETRIC4:
                lower, upper = unpack_halves(k_words, stream, ASSEMBLY)
                score = tl.dot(lower, queries[stream], score)
                score = tl.dot(upper, upper_queries[stream], score)
            else:
                k = unpack(k_words, k_step, stream, K_KIND, K_BITS, K_CODEBOOK, ASSEMBLY)
                score = tl.dot(k, queries[stream], score)

        if V_SCALE == 1:
            v_stored = tl.load(v_scale_ptr + base + row, mask=visible, other=1.0)
            v_scale, v_zero = row_scale(v_stored, V_KIND, V_BITS, V_UNIT)
            v_log = log2(v_scale, ASSEMBLY)
            bias = tl.where(visible, v_log, float("-inf"))  # [BLOCK_N]
        else:
            bias = tl.where(visible, 0.0, float("-inf"))
        if K_SCALE == 1:
            k_stored = tl.load(k_scale_ptr + base + row, mask=visible, other=0.0)
            k_scale, k_zero = row_scale(k_stored, K_KIND, K_BITS, K_UNIT)
            k_scale = (k_scale * score_scale)[:, None]
        else:
            k_scale = score_scale
        if HAS_SOFTCAP or slopes_ptr is not None:
            if K_KIND == UNSIGNED:
                score -= k_zero[:, None] * q_sum[None, :]
            score *= k_scale
            if HAS_SOFTCAP:
                score = softcap * (1 - 2 / (tl.exp2(score * (2 * _LOG2E / softcap)) + 1)) * _LOG2E
            if slopes_ptr is not None:
                score += slope[None, :] * (token - length + 1).to(tl.float32)[:, None]
            score += bias[:, None]
        elif K_KIND == UNSIGNED:
            score = score * k_scale + (bias[:, None] - (k_scale * k_zero[:, None]) * q_sum[None, :])
        else:
            score = score * k_scale + bias[:, None]
        if K_NAN:
            score = tl.where(visible[:, None], score, float("-inf"))

        # weights
        new_m = tl.maximum(m, tl.max(score, axis=0))
        new_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = exp2(m - new_m, ASSEMBLY)
        m = new_m
        weight = exp2(score - m[None, :], ASSEMBLY)
        if V_SCALE == 1:
            l = l * decay[None, :] + weight * exp2(-v_log, ASSEMBLY)[:, None]
        else:
            l = l * decay[None, :] + weight
        if V_KIND == UNSIGNED:
            shift = shift * decay[None, :] + weight * v_zero[:, None]

        # outputs
        v_at = v_ptr + base * V_WORDS + (row[None, :] * V_WORDS + vw[:, None])
        if V_NAN:
            v_words = tl.load(v_at, mask=(vw < V_WORDS)[:, None] & visible[None, :], other=0.0)
        elif BLOCK_VW == V_WORDS:
            v_words = tl.load(v_at)  # [BLOCK_VW, BLOCK_N]
        else:
            v_words = tl.load(v_at, mask=(vw < V_WORDS)[:, None], other=0)
        weight = weight.to(v_type)
        new_acc = ()
        for stream in tl.static_range(V_STREAMS):
            v = unpack(v_words, v_step, stream, V_KIND, V_BITS, V_CODEBOOK, ASSEMBLY)
            o = tl.dot(v, weight, acc[stream] * decay[None, :])
            new_acc = new_acc + (o,)
        acc = new_acc

    tl.store(part_m_ptr + part, m, mask=is_head)
    tl.store(part_l_ptr + part, tl.sum(l, axis=0), mask=is_head)
    shift_sum = tl.sum(shift, axis=0)  # [BLOCK_G]
    for stream in tl.static_range(V_STREAMS):
        channel = channels(vw, stream, V_BITS, V_WORDS)
        o_at = part_o_ptr + part[None, :] * D + channel[:, None]
        tl.store(o_at, acc[stream] - shift_sum[None, :], mask=(vw < V_WORDS)[:, None] & is_head[None, :])


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
    turn: Turn | None = None,
    query_starts: Tensor | None = None,
    out: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Attention outputs [T, HQ, D] of one query a sequence, each at its sequence's last position.

    q: [T, HQ, D], any strides; fp16, bf16 or float32; sequence b's query is row b.
    query_starts: [B + 1] int32: sequence b's query is row query_starts[b] if it has one alone; other rows of `out` are
        left as they are.
    page_table: [B, max_pages] int32.  seq_lens: [B] int32, the query's own token included.
    max_seq_len: at least the longest of seq_lens; it chooses the number of splits.
    window: tokens that a query sees, itself included; 0 for all.
    softcap: scores become softcap * tanh(score / softcap); 0 for none.
    alibi_slopes, sinks: [HQ] float32.
    turn: how the values were turned; the outputs are turned back.

    A scale that is NaN makes the outputs of the heads that read it NaN.
    """
    query_heads, head_dim = q.shape[1:]
    batch = seq_lens.shape[0]
    kv_heads, page_size = k.codes.shape[1:3]
    check(q, k, v)
    tuning = tuning or choose_tuning(k.layout, v.layout, head_dim, query_heads // kv_heads)
    tokens = min(max_seq_len, window + tuning.block_n) if window else max_seq_len
    splits = tuning.splits(batch * kv_heads, tokens)
    part_o = torch.empty(batch, query_heads, splits, head_dim, dtype=torch.float32, device=q.device)
    part_m, part_l = torch.empty(2, batch, query_heads, splits, dtype=torch.float32, device=q.device)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    turn = turn or Turn()
    assembly = q.is_cuda and not INTERPRETED
    _decode_kernel[(batch * kv_heads, splits)](
        q,
        k.words,
        k.scale,
        v.words,
        v.scale,
        page_table,
        seq_lens,
        query_starts,
        alibi_slopes,
        part_o,
        part_m,
        part_l,
        scale,
        softcap,
        window,
        *q.stride(),
        page_table.stride(0),
        splits,
        kv_heads,
        query_heads // kv_heads,
        head_dim,
        page_size,
        *k.constants,
        *v.constants,
        HAS_SOFTCAP=softcap != 0,
        HAS_WINDOW=window != 0,
        BLOCK_G=max(8, triton.next_power_of_2(query_heads // kv_heads)),
        BLOCK_N=tuning.block_n,
        BLOCK_KW=max(16, triton.next_power_of_2(k.layout.words(head_dim))),
        BLOCK_VW=max(16, triton.next_power_of_2(v.layout.words(head_dim))),
        STAGES=tuning.stages,
        ASSEMBLY=assembly,
        num_warps=tuning.warps,
        launch_pdl=assembly,
    )
    merge_kernel[(batch * query_heads,)](
        part_o,
        part_m,
        part_l,
        sinks,
        v.scale if v.scale_dims == 0 else None,
        query_starts,
        turn.signs,
        out,
        splits,
        turn.read_factor,
        query_heads,
        head_dim,
        turn.block,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        CHUNK=min(64, triton.next_power_of_2(splits)),
        ASSEMBLY=assembly,
        num_warps=4 if splits <= 16 else 8,
        launch_pdl=assembly,
    )
    return out
