"""Attention of many query tokens a sequence over the packed, paged cache: prompts, and chunks after a cached prefix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvbench_kernels.center import Center, row_center_scores, scores_by_page, upper_and_lower
from kvbench_kernels.exact import TYPES, Exact, attend_exact_rows, exact_start
from kvbench_kernels.hadamard import Turn, rotate
from kvbench_kernels.layout import Side, check
from kvbench_kernels.spread_blocks import spread_blocks
from kvbench_kernels.tiers import Rank, rest_count, tier_rows, tier_steps
from kvbench_kernels.tiles import row_scale, stack
from kvbench_kernels.tuning import INTERPRETED, SHORT, PrefillTuning, choose_prefill_tuning
from kvbench_kernels.unpack import E4M3, FLOAT, SIGNED, SYMMETRIC4, TIERS, UNSIGNED, channels, exp2, unpack

_LOG2E = tl.constexpr(1.4426950408889634)
# query rows of a KV head, per sequence on average, from which on a cache is first spread in memory, once for all
SPREAD_ROWS = 512
SHORT_SPREAD_ROWS = 128  # the same where contexts are short
# tokens spread, padded to the longest sequence, for each query token at most: the copy's memory has a limit
SPREAD_RATIO = 16
# codes whose tiles for short contexts were measured
SHORT_KINDS = {kind.value for kind in (FLOAT, SIGNED, UNSIGNED, SYMMETRIC4)}


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
        return tl.reshape(stack(streams, N, W), [N, W * (16 // BITS)])


@triton.jit
def _load_rest(rest_ptr, row, kw, mask, CODEBOOK: tl.constexpr, WORDS: tl.constexpr):
    """[N, W] of the words that follow: beside each word of these rows [N] the one with the bits of its channels."""
    REST: tl.constexpr = rest_count(CODEBOOK[0], WORDS)
    return tl.load(rest_ptr + row[:, None] * REST + (kw % REST)[None, :], mask=mask, other=0)


@triton.jit
def _spread_side(
    words_ptr,  # [P, HKV, S, words] int16, or [P, HKV, S, D] fp16 or bf16
    scale_ptr,  # [P, HKV, S] float32, one float32, or None
    signs_ptr,  # [D] float32, or None
    page_table_ptr,
    values_ptr,  # [B, HKV, length, D] fp16
    unit_ptr,  # [B, HKV, length / BLOCK_N] float32
    b,
    head,
    block,
    length,
    seq_len,
    factor,
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
    TURN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    offset_ptr=None,
    offset_last=0,
    OFFSET_PAGE: tl.constexpr = 64,
    exact_ptr=None,
    SINKS: tl.constexpr = 0,
    rest_ptr=None,  # [P, HKV, S, words] int16: what follows the words
    order_ptr=None,  # [HKV, D] int32: which channel comes at each place, and its spread
    spread_ptr=None,
):
    WORDS: tl.constexpr = D * BITS // 16
    BLOCK_C: tl.constexpr = BLOCK_W * (16 // BITS)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < seq_len
    page = tl.load(page_table_ptr + b * stride_table + token // S, mask=inside, other=0)
    row = (page.to(tl.int64) * HKV + head) * S + token % S
    w = tl.arange(0, BLOCK_W)
    c = tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (w < WORDS)[None, :]
    words = tl.load(words_ptr + row[:, None] * WORDS + w[None, :], mask=mask, other=0)
    zero = tl.zeros([BLOCK_N], tl.float32)
    scale = tl.full([BLOCK_N], factor, tl.float32)
    if SCALE == 1:
        row_unit, zero = row_scale(tl.load(scale_ptr + row, mask=inside, other=0.0), KIND, BITS, UNIT)
        if KIND != UNSIGNED:
            zero = tl.zeros([BLOCK_N], tl.float32)
        scale *= row_unit
    elif SCALE == 0:
        scale *= tl.load(scale_ptr)
    # codes are small integers, and so are zero-points: exact in fp16, and so are their sums in float32
    if KIND == TIERS:
        rest = _load_rest(rest_ptr, row, w, mask, CODEBOOK, WORDS)
        codes = tier_rows(words, rest, w, CODEBOOK, WORDS)
    else:
        codes = _whole_rows(words, zero, tl.full([1, 1], STEP, tl.float16), KIND, BITS, CODEBOOK, ASSEMBLY)
    if BITS >= 8:
        if BITS == 8:
            # bytes of a word are neighbours
            codes = tl.reshape(tl.permute(tl.reshape(codes, [BLOCK_N, 2, BLOCK_W]), (0, 2, 1)), [BLOCK_N, BLOCK_C])
        channel = c
        is_channel = c < D
    else:
        channel = channels(c % BLOCK_W, c // BLOCK_W, BITS, WORDS)
        is_channel = c % BLOCK_W < WORDS
    if TURN > 1:
        d = tl.arange(0, BLOCK_D)
        sign = channel[:, None] & d[None, :] & (TURN - 1)
        sign ^= sign >> 8
        sign ^= sign >> 4
        sign ^= sign >> 2
        sign ^= sign >> 1
        same = (channel // TURN)[:, None] == (d // TURN)[None, :]
        turn = tl.where(same & is_channel[:, None], 1 - 2 * (sign & 1), 0)
        values = tl.dot(codes, turn.to(codes.dtype)) * scale[:, None]
    else:
        values = codes.to(tl.float32) * scale[:, None]
        if KIND == TIERS:
            values *= tier_steps(c // BLOCK_W, CODEBOOK)[None, :]
    if exact_ptr is not None:  # noqa: SIM102 - a constant, and one that is none
        if block * BLOCK_N < SINKS:
            exact_at = exact_ptr + (row * D)[:, None] + channel[None, :]
            is_sink = inside & (token < SINKS)
            exact = tl.load(exact_at, mask=is_sink[:, None] & is_channel[None, :], other=0.0)
            if TURN > 1:
                exact = tl.dot(exact, turn.to(exact.dtype))
            values = tl.where(is_sink[:, None], exact.to(tl.float32) * factor, values)
    if TURN > 1:
        channel = d
        is_channel = d < D
        if signs_ptr is not None:
            values *= tl.load(signs_ptr + d, mask=is_channel, other=0.0)[None, :]
    if order_ptr is not None:
        values *= tl.load(spread_ptr + head * D + channel, mask=is_channel, other=0.0)[None, :]
        channel = tl.load(order_ptr + head * D + channel, mask=is_channel, other=0)
    if offset_ptr is not None:
        of_row = (tl.minimum(token // OFFSET_PAGE, offset_last) * HKV + head) * D
        values += tl.load(offset_ptr + of_row[:, None] + channel[None, :], mask=is_channel[None, :], other=0.0)
    values = tl.where(inside[:, None] & is_channel[None, :], values, 0.0)
    # the largest value becomes just less than 2^15: fp16 keeps 11 bits of all down to 2^-29 times that
    magnitude = tl.abs(values)
    largest = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0))
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 27), 254)
    values = (values * ((268 - exponent) << 23).to(tl.float32, bitcast=True)).to(tl.float16)
    pair = b * HKV + head
    tl.store(unit_ptr + pair * (length // BLOCK_N) + block, ((exponent - 14) << 23).to(tl.float32, bitcast=True))
    at = values_ptr + ((pair * length + token) * D)[:, None] + channel[None, :]
    tl.store(at, values, mask=is_channel[None, :])


@triton.jit(
    do_not_specialize=["length", "stride_table"],
    do_not_specialize_on_alignment=["page_table_ptr", "seq_lens_ptr", "query_starts_ptr", "k_unit_ptr", "v_unit_ptr"],
)
def _spread_kernel(
    k_ptr,
    k_scale_ptr,
    k_signs_ptr,
    v_ptr,
    v_scale_ptr,
    v_signs_ptr,
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    k_values_ptr,
    k_unit_ptr,
    v_values_ptr,
    v_unit_ptr,
    length,
    k_factor,
    v_factor,
    stride_table,
    offset_ptr,  # [N, HKV, D] float32: added back to keys, or None
    offset_last,  # N - 1
    query_starts_ptr,  # [B + 1] int32 where rows are exact ones, of which not all are asked for; or None
    k_exact_ptr,  # [P, HKV, S, D] 16 bits, whose first SINKS tokens are taken instead; or None
    v_exact_ptr,
    k_rest_ptr,  # [P, HKV, S, words] int16: what follows the keys' words; or None
    order_ptr,  # [HKV, D] int32: the keys' channels in another order, and their spreads; or None
    spread_ptr,
    HKV: tl.constexpr,
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
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OFFSET_PAGE: tl.constexpr = 64,
    SINKS: tl.constexpr = 0,
    RECENT: tl.constexpr = 0,
    WINDOW_PAGE: tl.constexpr = 64,
):
    """One program: BLOCK_N tokens of one sequence and KV head, the keys or the values (the grid's third axis).

    Values in units of a power of two, one for the program's tokens; zeros after the last token.
    """
    blocks = length // BLOCK_N
    b = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + b)
    if block * BLOCK_N >= seq_len:
        return
    if query_starts_ptr is not None:
        queries = tl.load(query_starts_ptr + b + 1) - tl.load(query_starts_ptr + b)
        if (block + 1) * BLOCK_N <= exact_start(seq_len - queries, RECENT, WINDOW_PAGE):  # of the first query
            return
    if tl.program_id(2) == 0:
        _spread_side(
            k_ptr, k_scale_ptr, k_signs_ptr, page_table_ptr, k_values_ptr, k_unit_ptr, b, head, block, length, seq_len,
            k_factor, stride_table, HKV, D, S, K_KIND, K_BITS, K_CODEBOOK, K_UNIT, K_STEP, K_SCALE, K_TURN,
            BLOCK_N, BLOCK_KW, BLOCK_D, ASSEMBLY, offset_ptr, offset_last, OFFSET_PAGE, k_exact_ptr, SINKS,
            k_rest_ptr, order_ptr, spread_ptr,
        )  # fmt: skip
    else:
        _spread_side(
            v_ptr, v_scale_ptr, v_signs_ptr, page_table_ptr, v_values_ptr, v_unit_ptr, b, head, block, length, seq_len,
            v_factor, stride_table, HKV, D, S, V_KIND, V_BITS, V_CODEBOOK, V_UNIT, V_STEP, V_SCALE, V_TURN,
            BLOCK_N, BLOCK_VW, BLOCK_D, ASSEMBLY, None, 0, 64, v_exact_ptr, SINKS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "sequences", "window", "stride_table", "stride_bias", "length_all", "rows_all", "center_last", "center_rows",
    ],
    do_not_specialize_on_alignment=["page_table_ptr", "seq_lens_ptr", "query_starts_ptr"],
)  # fmt: skip
def _prefill_kernel(
    q_ptr,  # [T, HQ, D] any float
    k_ptr,  # [P, HKV, S, words] int16, or [P, HKV, S, D] fp16 or bf16; LINEAR: a descriptor of fp16 [rows, D]
    k_scale_ptr,  # [P, HKV, S] float32, or one float32; LINEAR: [B, HKV, length_all / BLOCK_N] float32
    v_ptr,
    v_scale_ptr,
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    query_starts_ptr,  # [B + 1] int32
    slopes_ptr,  # [HQ] float32, or None
    bias_ptr,  # [new tokens, new tokens] float32, rows stride_bias apart, or None
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
    stride_bias,
    length_all,
    rows_all,  # LINEAR: where the exact rows begin in k_ptr and v_ptr, a multiple of BLOCK_N
    k_exact_ptr,  # [P, HKV, S, D] 16 bits; LINEAR: none, they follow the packed ones; or None
    v_exact_ptr,
    parts_ptr,  # [1, HKV, 2, D] fp16: the keys' one centre; or None
    center_ptr,  # [HKV, N, T, GROUP] float32: queries times the pages' centres, scaled; or None
    center_last,  # N - 1
    center_rows,  # T * GROUP
    k_rest_ptr,  # [P, HKV, S, words] int16: what follows the keys' words; or None
    order_ptr,  # [HKV, D] int32: the keys' channels in another order, and their spreads; or None
    spread_ptr,
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
    LINEAR: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_VW: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EXACT: tl.constexpr = False,
    SINKS: tl.constexpr = 0,
    RECENT: tl.constexpr = 0,
    WINDOW_PAGE: tl.constexpr = 64,
    K_EXACT_TYPE: tl.constexpr = None,
    CENTER: tl.constexpr = 0,  # 1: one centre for all positions; 2: one a page of CENTER_PAGE
    CENTER_PAGE: tl.constexpr = 64,
):
    """One program: BLOCK_M / BLOCK_G query tokens of one sequence with all query heads of one KV head.

    A tile of keys or values is unpacked once for all BLOCK_M rows. A weight includes its value's scale. LINEAR: keys
    and values lie in fp16 in the order of their tokens, each tile in a power-of-two unit of its own.
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
    k_type: tl.constexpr = k_ptr.dtype.element_ty if K_KIND == FLOAT and not LINEAR else tl.float16
    v_type: tl.constexpr = v_ptr.dtype.element_ty if V_KIND == FLOAT and not LINEAR else tl.float16
    V_NAN: tl.constexpr = (V_KIND == FLOAT or V_KIND == E4M3) and not LINEAR

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
    place = k_channel
    if order_ptr is not None:
        is_place = kd % BLOCK_KW < K_WORDS
        place = tl.load(order_ptr + kv_head * D + k_channel, mask=is_place, other=0)
    q = tl.load(q_at + (place * stride_qd)[None, :], mask=q_mask, other=0.0).to(tl.float32)
    if order_ptr is not None:
        q *= tl.load(spread_ptr + kv_head * D + k_channel, mask=is_place, other=0.0)[None, :]
    exponent = tl.minimum(tl.maximum((tl.max(tl.abs(q)).to(tl.int32, bitcast=True) >> 23) & 0xFF, 27), 227)
    q *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if CENTER == 1:
        q_upper, q_lower = upper_and_lower(q)
    if EXACT:
        q_exact = q.to(K_EXACT_TYPE)
    if K_KIND == TIERS:
        # a code's step is its query's; none is as much as 2
        q *= tier_steps(kd // BLOCK_KW, K_CODEBOOK)[None, :]
    q = q.to(k_type)  # [BLOCK_M, BLOCK_KD]

    score_scale = scale * (exponent << 23).to(tl.float32, bitcast=True)
    if not HAS_SOFTCAP:
        score_scale *= _LOG2E
    exact_scale = score_scale  # of products with 16-bit rows
    center = None
    center_at = None
    is_k_channel = kd % BLOCK_KW < K_WORDS
    if CENTER == 1:
        center = row_center_scores(parts_ptr, kv_head, k_channel, is_k_channel, q_upper, q_lower, D)
        center *= exact_scale
    if CENTER == 2:
        pages = kv_head.to(tl.int64) * (center_last + 1)
        center_at = center_ptr + pages * center_rows + ((query_start + query) * GROUP + g)  # of page 0
    if K_SCALE == 0:
        score_scale *= tl.load(k_scale_ptr)
    slope = None
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
    if EXACT:
        # packed tokens lie between the first ones and what each row sees in 16 bits
        end_exact = end
        starts = exact_start(position, RECENT, WINDOW_PAGE)  # [BLOCK_M]
        newest = exact_start(first_position, RECENT, WINDOW_PAGE)
        end = exact_start(end - 1, RECENT, WINDOW_PAGE)
        if not HAS_WINDOW:
            inner = newest // BLOCK_N * BLOCK_N
    # bias is on scores among new tokens alone
    if bias_ptr is not None:
        inner = tl.minimum(inner, (length - queries) // BLOCK_N * BLOCK_N)
    after_sinks = start
    if EXACT and SINKS > 0 and not HAS_WINDOW and not LINEAR:
        after_sinks = (SINKS + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        inner = tl.maximum(inner, after_sinks)
    linear = (b * HKV + kv_head) * length_all  # the pair's first row
    # all tiles with masks in one loop, exact ones too, where one descriptor reads them
    ONE_LOOP: tl.constexpr = LINEAR and EXACT
    if ONE_LOOP:
        border = tl.maximum(tl.cdiv(end - inner, BLOCK_N), 0) * BLOCK_N
        newest = tl.maximum(newest // BLOCK_N * BLOCK_N, start)
        masked = border + tl.cdiv(end_exact - newest, BLOCK_N) * BLOCK_N
    for MASKED in tl.static_range(3 if EXACT and SINKS > 0 and not HAS_WINDOW and not LINEAR else 2):
        if MASKED == 0:
            tile_start = after_sinks
            tile_end = inner
        elif MASKED == 1:
            tile_start = 0 if ONE_LOOP else inner
            tile_end = masked if ONE_LOOP else end
        else:
            tile_start = start
            tile_end = tl.minimum(after_sinks, end)
        page = 0
        if LINEAR:
            next_tile = tl.minimum(tile_start, end - 1)
            if ONE_LOOP and MASKED == 1:
                next_tile = tl.where(border > 0, inner, newest + rows_all)
            unit_at = (linear + next_tile) // BLOCK_N
            next_k_unit = tl.load(k_scale_ptr + unit_at)
            next_v_unit = tl.load(v_scale_ptr + unit_at)
        elif S % BLOCK_N == 0:
            page = tl.load(table + tl.minimum(tile_start, end - 1) // S)
        else:
            page = tl.load(table + tl.minimum(tile_start + n, end - 1) // S)  # [BLOCK_N]
        for tile_i in tl.range(tile_start, tile_end, BLOCK_N, num_stages=STAGES):
            tile = tile_i
            is_exact = False
            if ONE_LOOP and MASKED == 1:
                is_exact = tile_i >= border
                tile = tl.where(is_exact, newest + tile_i - border, inner + tile_i)
            token = tile + n
            inside = token < (tl.where(is_exact, end_exact, end) if ONE_LOOP and MASKED == 1 else end)
            # the next page or units are asked for one tile ahead
            if LINEAR:
                base = 0
                line = linear + tile
                k_unit = next_k_unit
                v_unit = next_v_unit
                next_tile = tl.minimum(tile + BLOCK_N, end - 1)
                if ONE_LOOP and MASKED == 1:
                    line += tl.where(is_exact, rows_all, 0)
                    next_i = tl.minimum(tile_i + BLOCK_N, masked - BLOCK_N)
                    next_tile = tl.where(next_i >= border, newest + next_i - border + rows_all, inner + next_i)
                unit_at = (linear + next_tile) // BLOCK_N
                next_k_unit = tl.load(k_scale_ptr + unit_at)
                next_v_unit = tl.load(v_scale_ptr + unit_at)
            elif S % BLOCK_N == 0:
                base = (page.to(tl.int64) * HKV + kv_head) * S + tile % S
                line = n
                page = tl.load(table + tl.minimum(tile + BLOCK_N, end - 1) // S)
            else:
                base = 0
                line = (page.to(tl.int64) * HKV + kv_head) * S + token % S
                page = tl.load(table + tl.minimum(token + BLOCK_N, end - 1) // S)

            # scores
            if LINEAR:
                k = k_ptr.load([line, 0])
            else:
                k_at = k_ptr + base * K_WORDS + (line[:, None] * K_WORDS + kw[None, :])
                if BLOCK_KW == K_WORDS:
                    k_words = tl.load(k_at)  # [BLOCK_N, BLOCK_KW]
                else:
                    k_words = tl.load(k_at, mask=(kw < K_WORDS)[None, :], other=0.0)
                k_zero = 0.0
                if K_SCALE == 1:
                    if MASKED > 0:
                        k_stored = tl.load(k_scale_ptr + base + line, mask=inside, other=1.0)
                    else:
                        k_stored = tl.load(k_scale_ptr + base + line)
                    k_scale, k_zero = row_scale(k_stored, K_KIND, K_BITS, K_UNIT)
                if K_KIND == TIERS:
                    k_rest = _load_rest(k_rest_ptr, base + line, kw, (kw < K_WORDS)[None, :], K_CODEBOOK, K_WORDS)
                    k = tier_rows(k_words, k_rest, kw, K_CODEBOOK, K_WORDS)
                else:
                    k = _whole_rows(k_words, k_zero, k_step, K_KIND, K_BITS, K_CODEBOOK, ASSEMBLY)
            score = tl.dot(q, tl.trans(k))
            # `factor` waits for the subtraction of the maximum: one instruction for both
            factor = score_scale
            if K_SCALE == 1:
                score *= k_scale[None, :]
            if LINEAR:
                factor *= k_unit
            if HAS_SOFTCAP or slopes_ptr is not None or bias_ptr is not None or CENTER > 0:
                score *= factor
                factor = 1.0
                if CENTER == 1:
                    score += center[:, None]
                if CENTER == 2:
                    center_page = tl.minimum(tile // CENTER_PAGE, center_last).to(tl.int64)
                    score += tl.load(center_at + center_page * center_rows, mask=is_row, other=0.0)[:, None]
                if HAS_SOFTCAP:
                    score = softcap * (1 - 2 / (tl.exp2(score * (2 * _LOG2E / softcap)) + 1)) * _LOG2E
                if slopes_ptr is not None:
                    score += slope[:, None] * (token[None, :] - position[:, None]).to(tl.float32)
            if MASKED > 0:
                if bias_ptr is not None:
                    new = token - (length - queries)
                    bias_at = bias_ptr + query[:, None] * stride_bias + new[None, :]
                    is_new = (is_row & (query < queries))[:, None] & (inside & (new >= 0))[None, :]
                    score += tl.load(bias_at, mask=is_new, other=0.0) * _LOG2E
                visible = inside[None, :] & (token[None, :] <= position[:, None])
                if HAS_WINDOW:
                    visible = visible & (token[None, :] > position[:, None] - window)
                if EXACT:
                    is_packed = token[None, :] < starts[:, None]
                    if not LINEAR:
                        is_packed = is_packed & (token >= SINKS)[None, :]
                    visible = visible & (is_packed != is_exact)
                score = tl.where(visible, score, float("-inf"))

            # weights
            v_log = 0.0
            if LINEAR:
                # the unit of a tile's values is in its weights, and in their maximum
                v_exponent = v_unit.to(tl.int32, bitcast=True)
                v_log = ((v_exponent >> 23) - 127).to(tl.float32)
            new_m = tl.maximum(m, tl.max(score, axis=1) * factor + v_log)
            safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
            decay = exp2(m - safe_m, ASSEMBLY)
            m = new_m
            weight = exp2(score * factor - (safe_m - v_log)[:, None], ASSEMBLY)
            if LINEAR:
                l = l * decay + tl.sum(weight, axis=1) * ((254 << 23) - v_exponent).to(tl.float32, bitcast=True)
            else:
                l = l * decay + tl.sum(weight, axis=1)
            v_zero = 0.0
            if V_SCALE == 1 and not LINEAR:
                if MASKED > 0:
                    v_stored = tl.load(v_scale_ptr + base + line, mask=inside, other=0.0)
                else:
                    v_stored = tl.load(v_scale_ptr + base + line)
                v_scale, v_zero = row_scale(v_stored, V_KIND, V_BITS, V_UNIT)
                new_top = tl.maximum(v_top, tl.max(v_scale))
                decay *= v_top / new_top
                weight *= (v_scale * (1.0 / new_top))[None, :]
                v_top = new_top

            # outputs
            if LINEAR:
                v = v_ptr.load([line, 0])
            else:
                v_at = v_ptr + base * V_WORDS + (line[:, None] * V_WORDS + vw[None, :])
                if V_NAN and MASKED > 0:
                    v_words = tl.load(v_at, mask=inside[:, None] & (vw < V_WORDS)[None, :], other=0.0)
                elif BLOCK_VW == V_WORDS:
                    v_words = tl.load(v_at)  # [BLOCK_N, BLOCK_VW]
                else:
                    v_words = tl.load(v_at, mask=(vw < V_WORDS)[None, :], other=0.0)
                v = _whole_rows(v_words, v_zero, v_step, V_KIND, V_BITS, V_CODEBOOK, ASSEMBLY)
            acc = tl.dot(weight.to(v_type), v, acc * decay[:, None])

    vd = tl.arange(0, BLOCK_VD)
    if V_KIND == FLOAT:
        v_channel = vd
    else:
        v_channel = channels(vd % BLOCK_VW, vd // BLOCK_VW, V_BITS, V_WORDS)
    is_v_channel = vd % BLOCK_VW < V_WORDS
    if EXACT and not LINEAR:
        if V_SCALE == 1:
            acc *= v_top
            v_top = 1.0
        if V_SCALE == 0:
            acc *= tl.load(v_scale_ptr)
        m, l, acc = attend_exact_rows(
            m, l, acc, q_exact, k_exact_ptr, v_exact_ptr, table,
            slope, bias_ptr, center, center_at, center_last, center_rows, kv_head, start,
            end_exact, end_exact if RECENT < 0 else newest, starts,
            position, query, is_row, length, queries, k_channel, is_k_channel, v_channel, is_v_channel, exact_scale,
            softcap, window, stride_bias, HKV, D, S, SINKS, HAS_SOFTCAP, HAS_WINDOW, CENTER, CENTER_PAGE,
            BLOCK_N, STAGES, ASSEMBLY,
        )  # fmt: skip

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=float("-inf")) * _LOG2E
        l += exp2(sink - tl.where(m == float("-inf"), 0.0, m), ASSEMBLY)
    if V_SCALE == 1:
        acc *= v_top
    if V_SCALE == 0 and (LINEAR or not EXACT):
        acc *= tl.load(v_scale_ptr)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out_at = out_ptr + (((query_start + query).to(tl.int64) * HQ + head) * D)[:, None] + v_channel[None, :]
    o_mask = is_row[:, None] & is_v_channel[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=o_mask)


def _spread(
    k: Side,
    v: Side,
    page_table: Tensor,
    seq_lens: Tensor,
    k_turn: Turn,
    v_turn: Turn,
    values: Tensor,
    units: Tensor,
    center: Center | None,
    rank: Rank | None,
    exact: Exact | None,
    query_starts: Tensor | None = None,
) -> None:
    """Writes a batch's keys and values in fp16, turned back, in the order of their tokens.

    values: [2, B, HKV, length, D] fp16, keys and values.  units: [2, B, HKV, blocks] float32, of a block's tokens each.
    center: is added back to the keys, which `rank` had sorted.  exact: has the first tokens, which every query reads in
        16 bits.
    query_starts: k and v are the exact rows themselves, and those are left out that no query reads.
    """
    page_size = k.codes.shape[2]
    _, batch, kv_heads, length, head_dim = values.shape
    blocks = units.shape[3]
    with_sinks = exact if exact is not None and exact.sinks and query_starts is None else None
    _spread_kernel[(batch * blocks, kv_heads, 2)](
        k.words,
        k.scale,
        k_turn.signs,
        v.words,
        v.scale,
        v_turn.signs,
        page_table,
        seq_lens,
        values[0],
        units[0],
        values[1],
        units[1],
        length,
        k_turn.read_factor,
        v_turn.read_factor,
        page_table.stride(0),
        None if center is None else center.offset,
        None if center is None else center.last,
        query_starts,
        *((None, None) if with_sinks is None else (with_sinks.k, with_sinks.v)),
        k.following,
        None if rank is None else rank.order,
        None if rank is None else rank.spread,
        kv_heads,
        head_dim,
        page_size,
        *k.constants,
        *v.constants,
        K_TURN=k_turn.block,
        V_TURN=v_turn.block,
        BLOCK_N=length // blocks,
        BLOCK_KW=max(k.layout.bits, triton.next_power_of_2(k.layout.words(head_dim))),
        BLOCK_VW=max(v.layout.bits, triton.next_power_of_2(v.layout.words(head_dim))),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        ASSEMBLY=values.is_cuda and not INTERPRETED,
        OFFSET_PAGE=64 if center is None else center.page,
        **({} if exact is None else exact.constants),
        # first tokens in 16 bits are a second tile in registers
        # rows of 256 channels need more than half of the registers that a thread may have
        **({"num_warps": 4} if with_sinks is None else {"num_warps": 8, "maxnreg": 128 if head_dim <= 128 else 255}),
    )


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
    qq_bias: Tensor | None = None,
    k_turn: Turn | None = None,
    v_turn: Turn | None = None,
    exact: Exact | None = None,
    center: Center | None = None,
    rank: Rank | None = None,
    single: bool = False,
    tuning: PrefillTuning | None = None,
) -> None:
    """Causal attention outputs of every sequence's queries, its last tokens, into out [T, HQ, D].

    Sequences of one query are left for `decode`, unless `single` or a qq_bias is given; their rows of `out` hold
    anything.

    q: [T, HQ, D] not turned, any strides.  query_starts: [B + 1] int32: sequence b's queries are rows [b] to [b + 1].
    qq_bias: as in `attend`.
    The other arguments are as in `decode`.
    """
    tokens, query_heads, head_dim = q.shape
    kv_heads, page_size = k.codes.shape[1:3]
    check(q, k, v)
    single = single or qq_bias is not None
    k_turn, v_turn = k_turn or Turn(), v_turn or Turn()
    group = query_heads // kv_heads
    packed = k.layout.kind != FLOAT.value or v.layout.kind != FLOAT.value
    # longer rows would need too large a matrix to be turned back
    # rows in blocks always: no program decodes them for itself
    in_blocks = k.layout.in_blocks
    # short tiles were measured with these codes, and with nothing beside them
    plain = not in_blocks and exact is None and center is None and rank is None and qq_bias is None
    plain = plain and {k.layout.kind, v.layout.kind} <= SHORT_KINDS
    reach = page_table.shape[1] * page_size
    short = plain and head_dim <= 64 and reach <= SHORT
    rows = min(SPREAD_ROWS, SHORT_SPREAD_ROWS) if short else SPREAD_ROWS
    spread = in_blocks or (
        packed
        and tokens * group >= rows * seq_lens.shape[0]
        and page_table.numel() * page_size <= SPREAD_RATIO * max(tokens, page_size)
        and (head_dim <= 256 or k_turn.block == v_turn.block == 1)
    )
    bits = 0 if spread else max(k.layout.bits, v.layout.bits)
    own = {"pairs": seq_lens.shape[0] * kv_heads, "reach": reach, "bits": bits} if plain else {}
    tuning = tuning or choose_prefill_tuning(head_dim, **own)
    if center is not None:
        center.check(k, head_dim, 1 if spread else tuning.block_n)
        if center.last == 0 and not softcap and sinks is None:
            center = None
    exact_args: tuple[Tensor | None, Tensor | None] = (None, None)
    if exact is not None:
        exact.check(k, head_dim)
        exact_args = (exact.k, exact.v)
    by_page = None
    if center is not None and center.last > 0 and not spread:
        by_page = scores_by_page(q, center, reach, scale=scale, softcap=softcap)
    block_g = triton.next_power_of_2(group)
    block_m = max(block_g, tuning.block_m)
    block_t = block_m // block_g
    if spread:
        blocks = -(-page_table.shape[1] * page_size // tuning.block_n)
        length = blocks * tuning.block_n
        # the packed rows, and first tokens in 16 bits; then the exact ones
        has_recent = exact is not None and exact.recent is not None
        shape = (2, 2 if has_recent else 1, seq_lens.shape[0], kv_heads, blocks)
        units = torch.empty(shape, dtype=torch.float32, device=q.device)
        values = torch.empty(*shape[:-1], length, head_dim, dtype=torch.float16, device=q.device)
        turns = (page_table, seq_lens, k_turn, v_turn)
        if in_blocks:
            # their rows stay turned
            if k_turn.block > 1:
                q = rotate(q, k_turn, dtype=torch.float32)
            turns = (page_table, seq_lens, Turn(), Turn())
            spread_blocks(
                k, v, page_table, seq_lens, query_starts, values[:, 0], units[:, 0],
                single=single, center=center, exact=exact,
            )  # fmt: skip
            center = None if center is None else center.turned
        else:
            _spread(k, v, *turns, values[:, 0], units[:, 0], center, rank, exact)
        if exact is not None and has_recent:
            _spread(*exact.sides, *turns, values[:, 1], units[:, 1], center, rank, exact, query_starts)
        else:
            exact = None
        exact_args, rows_all = (None, None), seq_lens.shape[0] * kv_heads * length
        float_constants = (FLOAT.value, 16, (), 1.0, 0.0, -1)
        constants = (*float_constants, *float_constants)
        k_words = v_words = head_dim
        widths = (16, 16)
        block = [tuning.block_n, max(16, triton.next_power_of_2(head_dim))]
        k_tensor, v_tensor = (TensorDescriptor.from_tensor(x.view(-1, head_dim), block) for x in values)
        k_scale, v_scale = units
        center = rank = None  # keys are again as they were
    else:
        length = rows_all = 0
        k_tensor, k_scale, v_tensor, v_scale = k.words, k.scale, v.words, v.scale
        constants = (*k.constants, *v.constants)
        k_words, v_words = k.layout.words(head_dim), v.layout.words(head_dim)
        widths = (k.layout.bits, v.layout.bits)
        if k_turn.block > 1:
            q = rotate(q, k_turn, dtype=torch.float32)
    _prefill_kernel[(tokens // block_t + seq_lens.shape[0], kv_heads)](
        q,
        k_tensor,
        k_scale,
        v_tensor,
        v_scale,
        page_table,
        seq_lens,
        query_starts,
        alibi_slopes,
        qq_bias,
        sinks,
        out,
        seq_lens.shape[0],
        scale,
        softcap,
        window,
        *q.stride(),
        page_table.stride(0),
        0 if qq_bias is None else qq_bias.stride(0),
        length,
        rows_all,
        *exact_args,
        None if center is None or by_page is not None else center.parts,
        by_page,
        0 if by_page is None else by_page.shape[1] - 1,
        0 if by_page is None else tokens * group,
        None if spread else k.following,
        None if rank is None else rank.order,
        None if rank is None else rank.spread,
        kv_heads,
        group,
        head_dim,
        page_size,
        *constants,
        HAS_SOFTCAP=softcap != 0,
        HAS_WINDOW=window != 0,
        SKIP_SINGLE=not single,
        LINEAR=spread,
        BLOCK_G=block_g,
        BLOCK_M=block_m,
        BLOCK_N=tuning.block_n,
        BLOCK_KW=max(widths[0], triton.next_power_of_2(k_words)),
        BLOCK_VW=max(widths[1], triton.next_power_of_2(v_words)),
        STAGES=tuning.stages,
        ASSEMBLY=q.is_cuda and not INTERPRETED,
        EXACT=exact is not None,
        **({} if exact is None else exact.constants),
        K_EXACT_TYPE=None if exact is None else tl.float16 if spread else TYPES[exact.k.dtype],
        CENTER=0 if center is None else 1 if by_page is None else 2,
        CENTER_PAGE=64 if center is None else center.page,
        num_warps=tuning.warps,
    )
    if v_turn.block > 1 and (in_blocks or not spread):
        rotate(out, v_turn, back=True, out=out)
