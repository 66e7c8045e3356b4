"""Rows in blocks of neighbouring channels with a scale each: read in decode, and spread for prefill.

A row's words are cut into **parts**, tiles of words that lie in one block under each stream. A stream of a part is a
**piece**: what one product takes. All pieces of a block share a scale a token, which multiplies their scores together,
and with values the weights.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.center import Center, center_scores, split_center_scores, two_parts
from kvbench_kernels.exact import HEADROOM, TYPES, Exact, attend_exact, split_bounds
from kvbench_kernels.hadamard import Turn, butterfly_across, rotate
from kvbench_kernels.layout import Side
from kvbench_kernels.merge import merge
from kvbench_kernels.three import lowest, lowest_bits, lowest_place, power, stream_count, stream_words
from kvbench_kernels.tiles import every_eighth, prefetch, row_offsets, slices
from kvbench_kernels.tuning import INTERPRETED, Tuning, choose_block_tuning, exact_tile
from kvbench_kernels.unpack import (
    BLOCK_E2M1,
    E2M1_UNIT,
    E4M3,
    SCALE_E4M3,
    SCALE_F16,
    SCALE_ROW,
    THREE,
    channels,
    exp2,
    log2,
    masked,
    masked_unit,
    unpack,
)

_LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEADS = 16  # query heads a program
_MIDDLE = tl.constexpr(3.5)  # of codes of 3 bits
# a token's largest scale is taken for this at least, so that its logarithm is a number
_SMALLEST = tl.constexpr(2.0**-60)


@triton.constexpr_function
def part_words(words, bits, group):
    """Words of a part; of the one of a row with codes of 3 bits, as many as a product takes."""
    if bits == 3:
        return max(16, triton.next_power_of_2(words))
    return math.gcd(words, group * bits // 16 if bits == 8 else group)


@triton.constexpr_function
def piece_block(part, stream, words, bits, group):
    """Which block's channels a piece has."""
    if bits == 3:
        return 0
    first = part * part_words(words, bits, group)
    return first * 2 // group if bits == 8 else (stream * words + first) // group


@triton.constexpr_function
def piece_unit(kind, stream):
    """What a value of 1 is in a piece, before its scale; of codes of 3 bits, in their upper ones."""
    if kind == THREE:
        return masked_unit(2, stream) / 2
    return E2M1_UNIT.value if kind == BLOCK_E2M1 else 1.0


# four e4m3 numbers to float32
_E4M3_SCALES = tl.constexpr(
    "{\n.reg .b16 low, high, a, b;\n.reg .b32 t;\nmov.b32 {low, high}, $4;\n"
    "cvt.rn.f16x2.e4m3x2 t, low;\nmov.b32 {a, b}, t;\ncvt.f32.f16 $0, a;\ncvt.f32.f16 $1, b;\n"
    "cvt.rn.f16x2.e4m3x2 t, high;\nmov.b32 {a, b}, t;\ncvt.f32.f16 $2, a;\ncvt.f32.f16 $3, b;\n}"
)


@triton.jit
def block_scales(words, COUNT: tl.constexpr, FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A tuple of [N] float32, the scales of COUNT blocks of rows whose scales are these words, a tuple of [N] integers.

    Of e8m0, 2^-127 is 0 here, and NaN is inf: codes are 0 where a scale is NaN, and that product is NaN.
    """
    SIZE: tl.constexpr = 16 if FORMAT == SCALE_F16 else 8
    PER_WORD: tl.constexpr = words[0].dtype.primitive_bitwidth // SIZE
    tl.static_assert(FORMAT != SCALE_ROW or COUNT == 1)
    scales = ()
    if FORMAT == SCALE_E4M3 and ASSEMBLY and PER_WORD % 4 == 0:
        for b in tl.static_range(0, COUNT, 4):
            four = (words[b // PER_WORD] >> (b % PER_WORD * SIZE)).to(tl.int32)
            scales = scales + tl.inline_asm_elementwise(
                _E4M3_SCALES, "=f,=f,=f,=f,r", [four], (tl.float32, tl.float32, tl.float32, tl.float32), True, 1
            )
    elif FORMAT == SCALE_ROW:
        scales = ((words[0] & ~7).to(tl.float32, bitcast=True),)
    else:
        for b in tl.static_range(COUNT):
            bits = ((words[b // PER_WORD] >> (b % PER_WORD * SIZE)) & ((1 << SIZE) - 1)).to(tl.int32)
            if FORMAT == SCALE_F16:
                scales = scales + (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
            elif FORMAT == SCALE_E4M3:
                scale = (bits << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
                scales = scales + (tl.where(bits == 0x7F, float("nan"), scale),)
            else:
                scales = scales + ((bits << 23).to(tl.float32, bitcast=True),)
    return scales


# of two rows, four e4m3 numbers each, or two fp16 numbers: as fp16, each of both rows side by side
_E4M3_SHARES = tl.constexpr(
    "{\n.reg .b16 a, b, c, d;\n.reg .b32 p, q;\nmov.b32 {a, b}, $4;\nmov.b32 {c, d}, $5;\n"
    "cvt.rn.f16x2.e4m3x2 p, a;\ncvt.rn.f16x2.e4m3x2 q, c;\nprmt.b32 $0, p, q, 0x5410;\nprmt.b32 $1, p, q, 0x7632;\n"
    "cvt.rn.f16x2.e4m3x2 p, b;\ncvt.rn.f16x2.e4m3x2 q, d;\nprmt.b32 $2, p, q, 0x5410;\nprmt.b32 $3, p, q, 0x7632;\n}"
)
_F16_SHARES = tl.constexpr("{\nprmt.b32 $0, $2, $3, 0x5410;\nprmt.b32 $1, $2, $3, 0x7632;\n}")


@triton.jit
def _block_shares(words, COUNT: tl.constexpr, FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What `block_scales` gives of SCALE_F16 and SCALE_E4M3, in fp16, which holds them."""
    SIZE: tl.constexpr = 16 if FORMAT == SCALE_F16 else 8
    PER_WORD: tl.constexpr = words[0].dtype.primitive_bitwidth // SIZE
    EACH: tl.constexpr = 32 // SIZE
    shares = ()
    if ASSEMBLY and PER_WORD % EACH == 0:
        for b in tl.static_range(0, COUNT, EACH):
            some = (words[b // PER_WORD] >> (b % PER_WORD * SIZE)).to(tl.int32)
            if FORMAT == SCALE_F16:
                shares = shares + tl.inline_asm_elementwise(
                    _F16_SHARES, "=&r,=&r,r,r", [some], (tl.float16, tl.float16), True, 2
                )
            else:
                shares = shares + tl.inline_asm_elementwise(
                    _E4M3_SHARES,
                    "=&r,=&r,=&r,=&r,r,r",
                    [some],
                    (tl.float16, tl.float16, tl.float16, tl.float16),
                    True,
                    2,
                )
    else:
        scales = block_scales(words, COUNT, FORMAT, False)
        for b in tl.static_range(COUNT):
            shares = shares + (scales[b].to(tl.float16),)
    return shares


@triton.jit
def load_scales(ptr, row, mask, COUNT: tl.constexpr):
    """A tuple of [N] words: the scales of these rows, zeros where masked."""
    words = ()
    for i in tl.static_range(COUNT):
        words = words + (tl.load(ptr + row * COUNT + i, mask=mask, other=0),)
    return words


@triton.jit(
    do_not_specialize=["window", "stride_table", "SPLITS", "center_last", "stride_center"],
    do_not_specialize_on_alignment=["page_table_ptr", "seq_lens_ptr", "query_starts_ptr", "part_m_ptr", "part_l_ptr"],
)
def _decode_blocks_kernel(
    q_ptr,  # [T, HQ, D] any float
    k_ptr,  # [P, HKV, S, words] int16
    k_scale_ptr,  # [P, HKV, S, K_SCALE_WORDS] integers
    k_all_ptr,  # one float32, or None
    v_ptr,
    v_scale_ptr,
    v_all_ptr,
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    query_starts_ptr,  # [B + 1] int32, or None, as in decode
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
    center_ptr,  # [pairs, stride_center, BLOCK_G] float32: room for their part of the scores; or None
    center_last,  # N - 1
    stride_center,  # pages
    bits_ptr,  # int16, of `lowest_bits`; or None
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_BLOCK: tl.constexpr,  # channels that share a scale
    K_SCALES: tl.constexpr,  # the scales' format
    K_SCALE_WORDS: tl.constexpr,
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_SCALE_WORDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TURN_QUERIES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EXACT: tl.constexpr,  # packed tiles that a tile of tokens in 16 bits counts for; 0: there are no such tokens
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

    As in decode: tokens are the rows of scores, a program is one warp. A weight includes the largest scale of its
    value's blocks, and so does the running maximum; a block's weights are that, times its share of the largest scale.
    """
    GROUPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = pair // (HKV * GROUPS)
    kv_head = (pair // GROUPS % HKV).to(tl.int32)
    first_head = (pair % GROUPS * HEADS).to(tl.int32)  # of the group
    K_WORDS: tl.constexpr = stream_words(D, K_BITS)
    V_WORDS: tl.constexpr = stream_words(D, V_BITS)
    K_ROW: tl.constexpr = D * K_BITS // 16
    V_ROW: tl.constexpr = D * V_BITS // 16
    K_STREAMS: tl.constexpr = stream_count(K_BITS)
    V_STREAMS: tl.constexpr = stream_count(V_BITS)
    K_PART: tl.constexpr = part_words(K_WORDS, K_BITS, K_BLOCK)
    V_PART: tl.constexpr = part_words(V_WORDS, V_BITS, V_BLOCK)
    K_PARTS: tl.constexpr = (K_WORDS + K_PART - 1) // K_PART
    V_PARTS: tl.constexpr = (V_WORDS + V_PART - 1) // V_PART
    V_RAW: tl.constexpr = V_SCALES == SCALE_F16 or V_SCALES == SCALE_E4M3
    # all scores become so many times smaller, so that queries fit into 16 bits
    K_LOWERED: tl.constexpr = 2.0**-12 if K_KIND == THREE else 1.0

    n = tl.arange(0, BLOCK_N)
    kw = tl.arange(0, K_PART)
    vw = tl.arange(0, V_PART)
    g = tl.arange(0, BLOCK_G)
    head_0 = kv_head * GROUP + first_head
    is_head = (g < HEADS) & (first_head + g < GROUP)
    head = head_0 + g

    if ASSEMBLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    query = b
    has_query = True
    if query_starts_ptr is not None:
        query = tl.load(query_starts_ptr + b).to(tl.int64)
        has_query = tl.load(query_starts_ptr + b + 1) - query == 1
    length = tl.load(seq_lens_ptr + b)
    loaded = ()  # pieces, part after part: tiles [BLOCK_G, K_PART]; rows that are no head's repeat the first head
    if TURN_QUERIES:
        # all pieces as one tile, to be turned by one product
        r = tl.arange(0, K_PARTS * K_STREAMS * BLOCK_G)
        r_head = r % BLOCK_G
        r_head = head_0 + tl.where((r_head < HEADS) & (first_head + r_head < GROUP), r_head, 0)
        r_words = (r // (BLOCK_G * K_STREAMS) * K_PART)[:, None] + kw[None, :]
        channel = channels(r_words, (r // BLOCK_G % K_STREAMS)[:, None], K_BITS, K_WORDS)
        q_all = tl.load(q_ptr + query * stride_qt + (r_head * stride_qh)[:, None] + channel * stride_qd)
        if k_signs_ptr is not None:
            q_all = (q_all.to(tl.float32) * tl.load(k_signs_ptr + channel)).to(q_all.dtype)
        sign = kw[:, None] & kw[None, :]
        sign ^= sign >> 4
        sign ^= sign >> 2
        sign ^= sign >> 1
        hadamard = (1 - 2 * (sign & 1)).to(q_all.dtype)
        # a piece is some bits of its channels' numbers, and a word the others
        loaded = butterfly_across(slices(tl.dot(q_all, hadamard), BLOCK_G))
    else:
        q_at = q_ptr + query * stride_qt + (tl.where(is_head, head, head_0) * stride_qh)[:, None]
        for p in tl.static_range(K_PARTS):
            for stream in tl.static_range(K_STREAMS):
                channel = channels(p * K_PART + kw, stream, K_BITS, K_WORDS)
                if K_PARTS * K_PART == K_WORDS:
                    q = tl.load(q_at + (channel * stride_qd)[None, :])
                else:
                    q = tl.load(q_at + (channel * stride_qd)[None, :], mask=(kw < K_WORDS)[None, :], other=0.0)
                loaded = loaded + (q.to(tl.float32),)

    # the split's tokens: whole tiles
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    first_exact = first
    start, end, nothing, first, newest, exact_start, exact_end = split_bounds(
        length, first, split, SPLITS, BLOCK_N, EXACT, SINKS, RECENT, WINDOW_PAGE, BLOCK_X
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
        prefetch(k_ptr, base * K_ROW, BLOCK_N * K_ROW)
        prefetch(v_ptr, base * V_ROW, BLOCK_N * V_ROW)
        prefetch(k_scale_ptr, base * K_SCALE_WORDS, BLOCK_N * K_SCALE_WORDS)
        prefetch(v_scale_ptr, base * V_SCALE_WORDS, BLOCK_N * V_SCALE_WORDS)

    # the group's queries divided by a power of two, so that they fit into 16 bits whatever their magnitude
    peak = tl.abs(loaded[0])
    for i in tl.static_range(1, K_PARTS * K_STREAMS):
        peak = tl.maximum(peak, tl.abs(loaded[i]))
    peak = tl.max(tl.max(peak, axis=1), axis=0)
    exponent = tl.minimum(tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) & 0xFF, 27), 227)
    q_unit = (exponent << 23).to(tl.float32, bitcast=True)
    q_inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=is_head, other=0.0) * _LOG2E
    else:
        slope = None
    # scores are in base 2, except where the softcap needs them as they are
    exact_scale = scale * q_unit  # of products with 16-bit rows
    if TURN_QUERIES:
        exact_scale *= k_factor
    if not HAS_SOFTCAP:
        exact_scale *= _LOG2E
    center = None
    center_at = None
    if CENTER > 0:
        q_upper = ()
        q_lower = ()
        for i in tl.static_range(K_PARTS * K_STREAMS):
            both = two_parts(loaded[i] * q_inverse)
            q_upper = q_upper + (both[0],)
            q_lower = q_lower + (both[1],)
    if CENTER == 1:
        all_alike = tl.zeros([16, 1], tl.int32)
        center = center_scores(parts_ptr, all_alike, kv_head, kw, q_upper, q_lower, HKV, D, K_BITS, K_PARTS)
        center = tl.max(center, axis=0) * exact_scale  # [BLOCK_G]
    if CENTER == 2:
        # of the split's pages, before its loops, which find each one beside the page
        center_at = center_ptr + pair * stride_center * BLOCK_G + g
        split_center_scores(
            center_at, parts_ptr, kv_head, kw, q_upper, q_lower, exact_scale, start, end, first_exact, first, newest,
            length, exact_start, exact_end, center_last, BLOCK_G, HKV, D, K_BITS, CENTER_PAGE, EXACT, STAGES, K_PARTS,
        )  # fmt: skip
        tl.debug_barrier()

    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    # sums over tokens go as far as a lane's own, every eighth; the rest is left for the end
    l = tl.zeros([8, BLOCK_G], tl.float32)
    shift = tl.zeros([8, BLOCK_G], tl.float32)  # the zero-points' share of the output
    ones = tl.full([V_PART, BLOCK_N], 1.0, tl.float16)
    acc = ()
    lowest_acc = ()  # of the lowest bits of codes of 3
    for _ in tl.static_range(V_STREAMS if V_KIND == THREE else 0):
        lowest_acc = lowest_acc + (tl.zeros([V_PART, BLOCK_G], tl.float32),)
    for _ in tl.static_range(V_PARTS * V_STREAMS):
        acc = acc + (tl.zeros([V_PART, BLOCK_G], tl.float32),)

    if EXACT > 0:  # noqa: SIM102 - a constant, and one that is none
        if exact_start < exact_end:
            exact_queries = ()
            for i in tl.static_range(K_PARTS * K_STREAMS):
                exact_queries = exact_queries + (tl.trans((loaded[i] * q_inverse).to(K_EXACT_TYPE)),)
            m, l, acc = attend_exact(
                m, l, acc, exact_queries, k_exact_ptr, v_exact_ptr, table, kv_head, exact_start, exact_end,
                first_exact, first, newest, length, exact_scale, softcap, slope, center, center_at,
                HKV, D, S, K_BITS, V_BITS, K_EXACT_TYPE, V_EXACT_TYPE, HAS_SOFTCAP, CENTER_PAGE, 1, BLOCK_G,
                BLOCK_X, K_PART, V_PART, STAGES, ASSEMBLY, K_PARTS, V_PARTS,
            )  # fmt: skip
            # a column that saw no token has no maximum yet
            m = tl.where(tl.sum(l, axis=0) == 0.0, float("-inf"), m - HEADROOM)
            l *= 2.0**HEADROOM
            unit = 2.0**HEADROOM
            if v_all_ptr is not None:
                # the merge multiplies all splits by the one scale
                unit /= tl.load(v_all_ptr)
            packed_acc = ()
            for i in tl.static_range(V_PARTS * V_STREAMS):
                packed_acc = packed_acc + (acc[i] * (unit * piece_unit(V_KIND, i % V_STREAMS)),)
            acc = packed_acc

    queries = ()
    q_sum = tl.zeros([BLOCK_G, K_PART], tl.float32)
    for i in tl.static_range(K_PARTS * K_STREAMS):
        q = (loaded[i] * (q_inverse * (K_LOWERED / piece_unit(K_KIND, i % K_STREAMS)))).to(tl.float16)
        q_sum += q.to(tl.float32) * piece_unit(K_KIND, i % K_STREAMS)
        queries = queries + (tl.trans(q),)
    lowest_queries = ()
    for stream in tl.static_range(K_STREAMS if K_KIND == THREE else 0):
        enlarged = power(24 - lowest_place(kw, stream, K_WORDS))[None, :]
        q = (loaded[stream] * (q_inverse * K_LOWERED) * enlarged).to(tl.float16)
        lowest_queries = lowest_queries + (tl.trans(q),)
    q_sum = tl.sum(q_sum, axis=1)  # [BLOCK_G]
    score_scale = exact_scale * (1 / K_LOWERED)
    if k_all_ptr is not None:
        score_scale *= tl.load(k_all_ptr)

    if K_KIND == THREE:
        k_bit = tl.load(bits_ptr + kw)[None, :]
    if V_KIND == THREE:
        v_bit = tl.load(bits_ptr + vw)[:, None]

    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        token = tile + n
        visible = token < end
        if HAS_WINDOW or EXACT > 0:
            visible = (token - first).to(tl.uint32) < (tl.maximum(end, first) - first).to(tl.uint32)
        if CENTER == 2:
            tile_center = tl.load(center_at + tile // CENTER_PAGE * BLOCK_G)
        if CENTER == 1:
            tile_center = center
        # the next page is asked for one tile ahead
        own_page = page
        row = row_offsets(page, kv_head, tile + at, HKV, S, 1)
        page = tl.load(table + tl.minimum(tile + BLOCK_N + at, last) // S)
        if S % BLOCK_N == 0:
            k_at = k_ptr + row * K_ROW + n[:, None] * K_ROW
            v_at = v_ptr + row * V_ROW + n[None, :] * V_ROW
            row += n
        else:
            k_at = k_ptr + row_offsets(own_page, kv_head, tile + at, HKV, S, K_ROW)[:, None]
            v_at = v_ptr + row_offsets(own_page, kv_head, tile + at, HKV, S, V_ROW)[None, :]

        # scores
        k_words = ()
        for p in tl.static_range(K_PARTS):
            k_words = k_words + (tl.load(k_at + (p * K_PART + kw % K_WORDS)[None, :]),)  # [BLOCK_N, K_PART]
        if K_KIND == THREE:
            k_rest = tl.load(k_at + (K_WORDS + kw % (K_WORDS // 2))[None, :])
        k_stored = load_scales(k_scale_ptr, row, visible, K_SCALE_WORDS)
        k_scales = block_scales(k_stored, D // K_BLOCK, K_SCALES, ASSEMBLY)
        score = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
        for block in tl.static_range(D // K_BLOCK):
            of_block = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
            for p in tl.static_range(K_PARTS):
                for stream in tl.static_range(K_STREAMS):
                    if piece_block(p, stream, K_WORDS, K_BITS, K_BLOCK) == block:
                        if K_KIND == THREE:
                            k = lowest(k_rest, k_bit, stream, ASSEMBLY)
                            of_block = tl.dot(k, lowest_queries[stream], of_block)
                            k = masked(k_words[p], stream, 2, False, ASSEMBLY)
                        else:
                            k = unpack(k_words[p], None, stream, K_KIND, K_BITS, (), ASSEMBLY)
                        of_block = tl.dot(k, queries[p * K_STREAMS + stream], of_block)
            if K_KIND == THREE:
                of_block -= (k_stored[0] & 7).to(tl.float32)[:, None] * q_sum[None, :]
            score += of_block * k_scales[block][:, None]
        v_stored = load_scales(v_scale_ptr, row, visible, V_SCALE_WORDS)
        room = 0.0
        if V_RAW:
            v_shares = _block_shares(v_stored, D // V_BLOCK, V_SCALES, ASSEMBLY)
            bias = tl.where(visible, 0.0, float("-inf"))[:, None]
            room = 6.0
            if V_SCALES == SCALE_F16:
                v_top = tl.abs(v_shares[0])
                for block in tl.static_range(1, D // V_BLOCK):
                    v_top = tl.maximum(v_top, tl.abs(v_shares[block]))
                exponent = tl.max(v_top.to(tl.float32), axis=0).to(tl.int32, bitcast=True) >> 23
                room = tl.minimum(15, 14 + 126 - exponent).to(tl.float32)
        else:
            v_scales = block_scales(v_stored, D // V_BLOCK, V_SCALES, ASSEMBLY)
            if V_KIND == THREE:
                v_top = tl.where(visible, v_scales[0], 1.0)  # or NaN
                v_zero = (v_stored[0] & 7).to(tl.float32)
            else:
                v_top = tl.full([BLOCK_N], _SMALLEST, tl.float32)
                for block in tl.static_range(D // V_BLOCK):
                    v_top = tl.maximum(v_top, tl.where(v_scales[block] < float("inf"), v_scales[block], 0.0))
            v_log = log2(v_top, ASSEMBLY)
            bias = tl.where(visible, v_log, float("-inf"))[:, None]
        score *= score_scale
        if CENTER > 0:
            score += tile_center[None, :]
        if HAS_SOFTCAP:
            score = softcap * (1 - 2 / (tl.exp2(score * (2 * _LOG2E / softcap)) + 1)) * _LOG2E
        if slopes_ptr is not None:
            score += slope[None, :] * (token - length + 1).to(tl.float32)[:, None]
        score += bias
        if K_KIND == E4M3:
            # what was never written may hold NaN
            score = tl.where(visible[:, None], score, float("-inf"))

        # weights
        new_m = tl.maximum(m, tl.max(score, axis=0) - room)  # [BLOCK_G]
        new_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = exp2(m - new_m, ASSEMBLY)[None, :]
        m = new_m
        weight = exp2(score - m[None, :], ASSEMBLY)
        if V_RAW:
            l = l * decay + every_eighth(weight)
        else:
            inverse_top = exp2(-v_log, ASSEMBLY)
            l = l * decay + every_eighth(weight * inverse_top[:, None])

        # outputs
        new_acc = ()
        for i in tl.static_range(V_PARTS * V_STREAMS):
            new_acc = new_acc + (acc[i] * decay,)
        acc = new_acc
        weights = weight.to(tl.float16)
        v_words = ()
        for p in tl.static_range(V_PARTS):
            of_part = (p * V_PART + vw % V_WORDS)[:, None]
            if V_KIND == E4M3:
                v_words = v_words + (tl.load(v_at + of_part, mask=visible[None, :], other=0),)
            else:
                v_words = v_words + (tl.load(v_at + of_part),)  # [V_PART, BLOCK_N]
        if V_KIND == THREE:
            v_rest = tl.load(v_at + (V_WORDS + vw % (V_WORDS // 2))[:, None])
            # codes that stand above 0 must not add up over a long context: see decode
            w_sum = tl.dot(ones, weights)
            lowest_w_sum = w_sum * power(lowest_place(vw, 0, V_WORDS) - 25)[:, None]
            shift = shift * decay + every_eighth(weight * (v_zero - _MIDDLE)[:, None])
        new_acc = ()
        for p in tl.static_range(V_PARTS):
            for stream in tl.static_range(V_STREAMS):
                if V_KIND == THREE:
                    v = masked(v_words[p], stream, 2, False, ASSEMBLY)
                    o = tl.dot(v, weights, acc[stream]) - w_sum * (1.5 * masked_unit(2, stream))
                else:
                    if V_RAW:
                        share = v_shares[piece_block(p, stream, V_WORDS, V_BITS, V_BLOCK)]
                    else:
                        v_scale = v_scales[piece_block(p, stream, V_WORDS, V_BITS, V_BLOCK)]
                        share = (v_scale * inverse_top).to(tl.float16)
                    v = unpack(v_words[p], None, stream, V_KIND, V_BITS, (), ASSEMBLY)
                    o = tl.dot(v, weights * share[:, None], acc[p * V_STREAMS + stream])
                new_acc = new_acc + (o,)
        acc = new_acc
        if V_KIND == THREE:
            new_acc = ()
            for stream in tl.static_range(V_STREAMS):
                v = lowest(v_rest, v_bit, stream, ASSEMBLY)
                o = tl.dot(v, weights, lowest_acc[stream] * decay) - lowest_w_sum * 4.0 ** (stream % 4)
                new_acc = new_acc + (o,)
            lowest_acc = new_acc

    tl.store(part_m_ptr + part, m, mask=is_head)
    tl.store(part_l_ptr + part, tl.sum(l, axis=0), mask=is_head)
    for p in tl.static_range(V_PARTS):
        for stream in tl.static_range(V_STREAMS):
            channel = channels(p * V_PART + vw, stream, V_BITS, V_WORDS)
            o = acc[p * V_STREAMS + stream] * (1 / piece_unit(V_KIND, stream))
            if V_KIND == THREE:
                o += lowest_acc[stream] * power(24 - lowest_place(vw, stream, V_WORDS))[:, None]
                o -= tl.sum(shift, axis=0)[None, :]
            is_row = is_head[None, :] & (vw < V_WORDS)[:, None]
            tl.store(part_o_ptr + part[None, :] * D + channel[:, None], o, mask=is_row)


def decode_blocks(
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
    tuning: Tuning | None = None,
) -> Tensor:
    """Attention outputs [T, HQ, D] of one query a sequence over rows in blocks; see `decode`."""
    k_turn, v_turn = k_turn or Turn(), v_turn or Turn()
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    query_heads, head_dim = q.shape[1:]
    kv_heads, page_size = k.codes.shape[1:3]
    group = query_heads // kv_heads
    heads = min(group, MAX_HEADS)
    pairs = seq_lens.shape[0] * kv_heads * -(-group // heads)
    tuning = tuning or choose_block_tuning(k.layout, v.layout, head_dim)
    tokens = min(max_seq_len, window + tuning.block_n) if window else max_seq_len
    bits = max(k.layout.bits, v.layout.bits)
    block_x, exact_weight, _ = exact_tile(bits, tuning.block_n)
    exact_tiles = 0
    if exact is not None:
        exact.check(k, head_dim)
        exact_tiles = exact_weight * -(-min(exact.most_tokens, max_seq_len) // block_x)
    splits = tuning.splits(pairs, tokens, exact_tiles)
    if center is not None:
        center.check(k, head_dim, tuning.block_n)
        if center.last == 0 and not softcap and sinks is None:
            center = None
    part_o = torch.empty(pairs, splits, heads, head_dim, dtype=torch.float32, device=q.device)
    part_m, part_l = torch.empty(2, pairs, splits, heads, dtype=torch.float32, device=q.device)
    # as a product with the matrix of +-1, which is exact for 16-bit queries; see decode
    words = stream_words(head_dim, k.layout.bits)
    pieces = head_dim // part_words(words, k.layout.bits, k.layout.block or head_dim)
    whole = head_dim & (head_dim - 1) == 0 and pieces <= 16 and words >= 16
    turn_here = k_turn.block == head_dim and q.element_size() == 2 and whole
    if k_turn.block > 1 and not turn_here:
        q = rotate(q, k_turn, dtype=torch.float32)
    assembly = q.is_cuda and not INTERPRETED
    block_g = max(8, triton.next_power_of_2(heads))
    center_pages = 0 if center is None or center.last == 0 else -(-max_seq_len // center.page)
    center_room = torch.empty(pairs, center_pages, block_g, dtype=torch.float32, device=q.device)
    _decode_blocks_kernel[(pairs, splits)](
        q,
        k.words,
        k.scale_words,
        k.tensor_scale,
        v.words,
        v.scale_words,
        v.tensor_scale,
        page_table,
        seq_lens,
        query_starts,
        alibi_slopes,
        k_turn.signs if turn_here else None,
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
        lowest_bits(head_dim, q.device) if THREE.value in (k.layout.kind, v.layout.kind) else None,
        kv_heads,
        group,
        heads,
        head_dim,
        page_size,
        *k.block_constants,
        *v.block_constants,
        HAS_SOFTCAP=softcap != 0,
        HAS_WINDOW=window != 0,
        TURN_QUERIES=turn_here,
        BLOCK_G=block_g,
        BLOCK_N=tuning.block_n,
        STAGES=tuning.stages,
        ASSEMBLY=assembly,
        EXACT=0 if exact is None else exact_weight,
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
        part_o, part_m, part_l, out, v_turn, kv_heads=kv_heads, group=group, sinks=sinks, v_scale=v.tensor_scale,
        query_starts=query_starts,
    )  # fmt: skip
    return out
