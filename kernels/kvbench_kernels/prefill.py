"""Attention of many query tokens a sequence over the packed, paged cache: prompts, and chunks after a cached prefix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.decode import row_scale
from kvbench_kernels.layout import Layout, Side, check
from kvbench_kernels.tuning import INTERPRETED
from kvbench_kernels.unpack import E4M3, FLOAT, UNSIGNED, channels, exp2, unpack

_LOG2E = tl.constexpr(1.4426950408889634)
# query rows of a KV head, per sequence on average, from which on a cache is first unpacked in memory, once for all
UNPACK_ROWS = 512


@triton.jit
def _whole_rows(
    words,
    zero,
    step,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """[N, W] words to [N, STREAMS * W] fp16 values without their scale, stream after stream."""
    if KIND == FLOAT:
        return words
    else:
        N: tl.constexpr = words.shape[0]
        W: tl.constexpr = words.shape[1]
        streams = ()
        for stream in tl.static_range(16 // BITS):
            values = unpack(words, step, stream, KIND, BITS, CODEBOOK, ASSEMBLY)
            if KIND == UNSIGNED:
                values -= zero.to(tl.float16)[:, None]  # small integers: exact
            streams = streams + (values,)
        return tl.reshape(_stack(streams, N, W), [N, W * (16 // BITS)])


@triton.jit
def _stack(tiles, N: tl.constexpr, W: tl.constexpr):
    """A tuple of 2^m tiles [N, W] to [N, 2^m, W]."""
    COUNT: tl.constexpr = len(tiles)
    if COUNT == 1:
        return tl.reshape(tiles[0], [N, 1, W])
    else:
        even = ()
        odd = ()
        for i in tl.static_range(COUNT // 2):
            even = even + (tiles[2 * i],)
            odd = odd + (tiles[2 * i + 1],)
        pair = tl.join(_stack(even, N, W), _stack(odd, N, W))  # [N, COUNT / 2, W, 2]
        return tl.reshape(tl.permute(pair, (0, 1, 3, 2)), [N, COUNT, W])


@triton.jit(do_not_specialize=["max_pages", "stride_table"])
def _unpack_kernel(
    words_ptr,  # [P, HKV, S, words] int16
    scale_ptr,  # [P, HKV, S] float32, or None
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    values_ptr,  # [B * max_pages, HKV, S, D] fp16
    row_scale_ptr,  # [B * max_pages, HKV, S] float32, or None
    max_pages,
    stride_table,
    HKV: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: one page and head of one sequence, as values without their scale, zeros after its last token."""
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    b = page // max_pages
    slot = tl.arange(0, S)
    left = tl.load(seq_lens_ptr + b) - page % max_pages * S
    if left <= 0:
        return
    inside = slot < left
    row = (tl.load(page_table_ptr + b * stride_table + page % max_pages).to(tl.int64) * HKV + head) * S + slot
    to = (page * HKV + head) * S + slot
    w = tl.arange(0, BLOCK_W)
    WORDS: tl.constexpr = D * BITS // 16
    words = tl.load(words_ptr + row[:, None] * WORDS + w[None, :], mask=inside[:, None] & (w < WORDS)[None, :], other=0)
    zero = tl.zeros([S], tl.float32)
    if SCALE == 1:
        scale, stored_zero = row_scale(tl.load(scale_ptr + row, mask=inside, other=0.0), KIND, BITS, UNIT)
        tl.store(row_scale_ptr + to, scale)
        if KIND == UNSIGNED:
            zero = stored_zero
    # codes are small integers, and so are zero-points: exact in fp16
    values = _whole_rows(words, zero, tl.full([1, 1], STEP, tl.float16), KIND, BITS, CODEBOOK, ASSEMBLY)
    d = tl.arange(0, BLOCK_W * (16 // BITS))
    channel = channels(d % BLOCK_W, d // BLOCK_W, BITS, WORDS)
    if BITS == 8:
        # bytes of a word are neighbours
        values = tl.reshape(tl.permute(tl.reshape(values, [S, 2, BLOCK_W]), (0, 2, 1)), [S, 2 * BLOCK_W])
        channel = d
    at = values_ptr + to[:, None] * D + channel[None, :]
    is_channel = (d < D) if BITS == 8 else (d % BLOCK_W < WORDS)
    tl.store(at, tl.where(inside[:, None], values, 0.0), mask=is_channel[None, :])


@triton.jit(do_not_specialize=["sequences", "window", "stride_table"])
def _prefill_kernel(
    q_ptr,  # [T, HQ, D] any float
    k_ptr,  # [P, HKV, S, words] int16, or [P, HKV, S, D] fp16 or bf16
    k_scale_ptr,  # [P, HKV, S] float32, or one float32
    v_ptr,
    v_scale_ptr,
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    query_starts_ptr,  # [B + 1] int32
    slopes_ptr,  # [HQ] float32, or None
    sinks_ptr,  # [HQ] float32, or None
    out_ptr,  # [T, HQ, D], contiguous
    sequences,
    scale,
    softcap,
    window,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_table,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CODEBOOK: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_STEP: tl.constexpr,
    K_SCALE: tl.constexpr,
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_CODEBOOK: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_STEP: tl.constexpr,
    V_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: BLOCK_M / BLOCK_G query tokens of one sequence with all query heads of one KV head.

    A tile of keys or values is unpacked once for all BLOCK_M rows. A weight includes its value's scale.
    """
    kv_head = tl.program_id(1)
    # long rows of causal tiles first: the last programs to start are the shortest
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    HQ: tl.constexpr = HKV * GROUP
    K_WORDS: tl.constexpr = D * K_BITS // 16
    V_WORDS: tl.constexpr = D * V_BITS // 16
    BLOCK_T: tl.constexpr = BLOCK_M // BLOCK_G
    BLOCK_KD: tl.constexpr = BLOCK_KW * (16 // K_BITS)
    BLOCK_VD: tl.constexpr = BLOCK_VW * (16 // V_BITS)
    k_type: tl.constexpr = k_ptr.dtype.element_ty if K_KIND == FLOAT else tl.float16
    v_type: tl.constexpr = v_ptr.dtype.element_ty if V_KIND == FLOAT else tl.float16
    V_NAN: tl.constexpr = V_KIND == FLOAT or V_KIND == E4M3

    # blocks are numbered as if each sequence began with a block of its own: sequence b's first is starts[b]/BLOCK_T + b
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts_ptr + middle) // BLOCK_T + middle <= block:
            low = middle + 1
        else:
            high = middle
    b = low - 1
    query_start = tl.load(query_starts_ptr + b)
    queries = tl.load(query_starts_ptr + b + 1) - query_start
    first_query = (block - query_start // BLOCK_T - b) * BLOCK_T
    if first_query >= queries:
        return
    if SKIP_SINGLE and queries == 1:
        return

    length = tl.load(seq_lens_ptr + b)
    row = tl.arange(0, BLOCK_M)
    query = first_query + row // BLOCK_G
    g = row % BLOCK_G
    head = kv_head * GROUP + g
    is_row = (query < queries) & (g < GROUP)
    position = length - queries + query  # [BLOCK_M]
    n = tl.arange(0, BLOCK_N)
    kw = tl.arange(0, BLOCK_KW)
    vw = tl.arange(0, BLOCK_VW)

    # queries, channels in the order in which rows are unpacked
    kd = tl.arange(0, BLOCK_KD)
    if K_KIND == FLOAT:
        k_channel = kd
    else:
        k_channel = channels(kd % BLOCK_KW, kd // BLOCK_KW, K_BITS, K_WORDS)
    q_mask = is_row[:, None] & (kd % BLOCK_KW < K_WORDS)[None, :]
    q_at = q_ptr + ((query_start + query).to(tl.int64) * stride_qt + head * stride_qh)[:, None]
    q = tl.load(q_at + (k_channel * stride_qd)[None, :], mask=q_mask, other=0.0).to(tl.float32)
    exponent = tl.minimum(tl.maximum((tl.max(tl.abs(q)).to(tl.int32, bitcast=True) >> 23) & 0xFF, 27), 227)
    q = (q * ((254 - exponent) << 23).to(tl.float32, bitcast=True)).to(k_type)  # [BLOCK_M, BLOCK_KD]

    score_scale = scale * (exponent << 23).to(tl.float32, bitcast=True)
    if not HAS_SOFTCAP:
        score_scale *= _LOG2E
    if K_SCALE == 0:
        score_scale *= tl.load(k_scale_ptr)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=is_row, other=0.0) * _LOG2E
    k_step = tl.full([1, 1], K_STEP, tl.float16)
    v_step = tl.full([1, 1], V_STEP, tl.float16)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    # values' scales are taken relative to the largest so far, so that weights keep their digits in 16 bits
    v_top = 1e-30
    acc = tl.zeros([BLOCK_M, BLOCK_VD], tl.float32)
    table = page_table_ptr + b.to(tl.int64) * stride_table

    first_position = length - queries + first_query
    end = tl.minimum(first_position + BLOCK_T, length)
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    # tiles that every row sees whole come first, without masks
    inner = start
    if not HAS_WINDOW:
        inner = (first_position + 1) // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        if MASKED == 0:
            tile_start = start
            tile_end = inner
        else:
            tile_start = inner
            tile_end = end
        if S % BLOCK_N == 0:
            page = tl.load(table + tl.minimum(tile_start, end - 1) // S)
        else:
            page = tl.load(table + tl.minimum(tile_start + n, end - 1) // S)  # [BLOCK_N]
        for tile in tl.range(tile_start, tile_end, BLOCK_N, num_stages=STAGES):
            token = tile + n
            inside = token < end
            # the next page is asked for one tile ahead
            if S % BLOCK_N == 0:
                base = (page.to(tl.int64) * HKV + kv_head) * S + tile % S
                line = n
                page = tl.load(table + tl.minimum(tile + BLOCK_N, end - 1) // S)
            else:
                base = 0
                line = (page.to(tl.int64) * HKV + kv_head) * S + token % S
                page = tl.load(table + tl.minimum(token + BLOCK_N, end - 1) // S)

            # scores
            k_at = k_ptr + base * K_WORDS + (line[:, None] * K_WORDS + kw[None, :])
            if BLOCK_KW == K_WORDS:
                k_words = tl.load(k_at)  # [BLOCK_N, BLOCK_KW]
            else:
                k_words = tl.load(k_at, mask=(kw < K_WORDS)[None, :], other=0.0)
            if K_SCALE == 1:
                if MASKED == 1:
                    k_stored = tl.load(k_scale_ptr + base + line, mask=inside, other=1.0)
                else:
                    k_stored = tl.load(k_scale_ptr + base + line)
                k_scale, k_zero = row_scale(k_stored, K_KIND, K_BITS, K_UNIT)
                k_scale = (k_scale * score_scale)[None, :]
            else:
                k_zero = 0.0
                k_scale = score_scale
            k = _whole_rows(k_words, k_zero, k_step, K_KIND, K_BITS, K_CODEBOOK, ASSEMBLY)
            score = tl.dot(q, tl.trans(k))
            if HAS_SOFTCAP or slopes_ptr is not None:
                score *= k_scale
                if HAS_SOFTCAP:
                    score = softcap * (1 - 2 / (tl.exp2(score * (2 * _LOG2E / softcap)) + 1)) * _LOG2E
                if slopes_ptr is not None:
                    score += slope[:, None] * (token[None, :] - position[:, None]).to(tl.float32)
            else:
                score *= k_scale
            if MASKED == 1:
                visible = inside[None, :] & (token[None, :] <= position[:, None])
                if HAS_WINDOW:
                    visible = visible & (token[None, :] > position[:, None] - window)
                score = tl.where(visible, score, float("-inf"))

            # weights
            new_m = tl.maximum(m, tl.max(score, axis=1))
            safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
            decay = exp2(m - safe_m, ASSEMBLY)
            m = new_m
            weight = exp2(score - safe_m[:, None], ASSEMBLY)
            l = l * decay + tl.sum(weight, axis=1)
            if V_SCALE == 1:
                if MASKED == 1:
                    v_stored = tl.load(v_scale_ptr + base + line, mask=inside, other=0.0)
                else:
                    v_stored = tl.load(v_scale_ptr + base + line)
                v_scale, v_zero = row_scale(v_stored, V_KIND, V_BITS, V_UNIT)
                new_top = tl.maximum(v_top, tl.max(v_scale))
                decay *= v_top / new_top
                weight *= (v_scale * (1.0 / new_top))[None, :]
                v_top = new_top
            else:
                v_zero = 0.0

            # outputs
            v_at = v_ptr + base * V_WORDS + (line[:, None] * V_WORDS + vw[None, :])
            if V_NAN and MASKED == 1:
                v_words = tl.load(v_at, mask=inside[:, None] & (vw < V_WORDS)[None, :], other=0.0)
            elif BLOCK_VW == V_WORDS:
                v_words = tl.load(v_at)  # [BLOCK_N, BLOCK_VW]
            else:
                v_words = tl.load(v_at, mask=(vw < V_WORDS)[None, :], other=0.0)
            v = _whole_rows(v_words, v_zero, v_step, V_KIND, V_BITS, V_CODEBOOK, ASSEMBLY)
            acc = tl.dot(weight.to(v_type), v, acc * decay[:, None])

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=float("-inf")) * _LOG2E
        l += exp2(sink - tl.where(m == float("-inf"), 0.0, m), ASSEMBLY)
    if V_SCALE == 1:
        acc *= v_top
    if V_SCALE == 0:
        acc *= tl.load(v_scale_ptr)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    vd = tl.arange(0, BLOCK_VD)
    if V_KIND == FLOAT:
        v_channel = vd
    else:
        v_channel = channels(vd % BLOCK_VW, vd // BLOCK_VW, V_BITS, V_WORDS)
    out_at = out_ptr + (((query_start + query).to(tl.int64) * HQ + head) * D)[:, None] + v_channel[None, :]
    o_mask = is_row[:, None] & (vd % BLOCK_VW < V_WORDS)[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=o_mask)


def _unpack_pages(side: Side, page_table: Tensor, seq_lens: Tensor, head_dim: int) -> Side:
    """A batch's pages in fp16, in the order of the page table, with their scales."""
    kv_heads, page_size = side.codes.shape[1:3]
    pages = page_table.numel()
    values = torch.empty(pages, kv_heads, page_size, head_dim, dtype=torch.float16, device=side.codes.device)
    scale = torch.empty_like(values[..., 0], dtype=torch.float32) if side.scale_dims == 1 else side.scale
    _unpack_kernel[(pages, kv_heads)](
        side.words,
        side.scale,
        page_table,
        seq_lens,
        values,
        scale,
        page_table.shape[1],
        page_table.stride(0),
        kv_heads,
        head_dim,
        page_size,
        *side.constants,
        BLOCK_W=triton.next_power_of_2(side.layout.words(head_dim)),
        ASSEMBLY=values.is_cuda and not INTERPRETED,
    )
    return Side(values, scale, Layout(FLOAT.value, 16))


def prefill(
    q: Tensor,
    k: Side,
    v: Side,
    page_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    out: Tensor,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    skip_single: bool = False,
) -> None:
    """Causal attention outputs of every sequence's queries, its last tokens, into out [T, HQ, D].

    q: [T, HQ, D], any strides.  query_starts: [B + 1] int32: sequence b's queries are rows [b] to [b + 1].
    skip_single: leaves sequences of one query alone, for `decode`.
    The other arguments are as in `decode`.
    """
    tokens, query_heads, head_dim = q.shape
    kv_heads, page_size = k.codes.shape[1:3]
    check(q, k, v)
    group = query_heads // kv_heads
    packed = k.layout.kind != FLOAT.value and v.layout.kind != FLOAT.value
    if packed and tokens * group >= UNPACK_ROWS * seq_lens.shape[0]:
        k = _unpack_pages(k, page_table, seq_lens, head_dim)
        v = _unpack_pages(v, page_table, seq_lens, head_dim)
        page_table = torch.arange(page_table.numel(), dtype=torch.int32, device=q.device).view(page_table.shape)
    block_g = triton.next_power_of_2(group)
    block_m = max(block_g, 32 if INTERPRETED else 128 if head_dim <= 128 else 64)
    block_t = block_m // block_g
    k_words, v_words = k.layout.words(head_dim), v.layout.words(head_dim)
    _prefill_kernel[(tokens // block_t + seq_lens.shape[0], kv_heads)](
        q,
        k.words,
        k.scale,
        v.words,
        v.scale,
        page_table,
        seq_lens,
        query_starts,
        alibi_slopes,
        sinks,
        out,
        seq_lens.shape[0],
        scale,
        softcap,
        window,
        *q.stride(),
        page_table.stride(0),
        kv_heads,
        group,
        head_dim,
        page_size,
        *k.constants,
        *v.constants,
        HAS_SOFTCAP=softcap != 0,
        HAS_WINDOW=window != 0,
        SKIP_SINGLE=skip_single,
        BLOCK_G=block_g,
        BLOCK_M=block_m,
        BLOCK_N=64 if head_dim <= 256 else 32,
        BLOCK_KW=max(16 * k.layout.bits // 16, triton.next_power_of_2(k_words)),
        BLOCK_VW=max(16 * v.layout.bits // 16, triton.next_power_of_2(v_words)),
        STAGES=3 if head_dim <= 128 else 2,
        ASSEMBLY=q.is_cuda and not INTERPRETED,
        num_warps=8,
    )
