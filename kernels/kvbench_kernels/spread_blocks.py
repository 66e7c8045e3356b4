"""Rows in blocks, in fp16 and in the order of their tokens: what prefill reads of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.blocks import block_scales, load_scales, part_words, piece_block, piece_unit
from kvbench_kernels.center import LOWER, Center
from kvbench_kernels.exact import Exact
from kvbench_kernels.layout import Side
from kvbench_kernels.three import stream_count, stream_words, three_codes
from kvbench_kernels.tiles import row_offsets
from kvbench_kernels.tuning import INTERPRETED
from kvbench_kernels.unpack import THREE, channels, unpack


@triton.jit
def _spread_side(
    words_ptr,  # [P, HKV, S, words] int16
    scale_ptr,  # [P, HKV, S, SCALE_WORDS] integers
    all_ptr,  # one float32, or None
    page_table_ptr,
    values_ptr,  # [B, HKV, length, D] fp16
    unit_ptr,  # [B, HKV, length / BLOCK_N] float32
    b,
    head,
    block,
    length,
    seq_len,
    stride_table,
    parts_ptr,  # [N, HKV, 2, D] fp16: added to keys; or None
    center_last,
    exact_ptr,  # [P, HKV, S, D] 16 bits, whose first SINKS tokens are taken instead; or None
    HKV: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    SINKS: tl.constexpr,
    CENTER_PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    WORDS: tl.constexpr = stream_words(D, BITS)
    ROW: tl.constexpr = D * BITS // 16
    PART: tl.constexpr = part_words(WORDS, BITS, CHANNELS)
    PARTS: tl.constexpr = (WORDS + PART - 1) // PART
    STREAMS: tl.constexpr = stream_count(BITS)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < seq_len
    page = tl.load(page_table_ptr + b * stride_table + token // S, mask=inside, other=0)
    row = row_offsets(page, head, token, HKV, S, 1)
    row_at = words_ptr + row_offsets(page, head, token, HKV, S, ROW)[:, None]
    w = tl.arange(0, PART)
    stored = load_scales(scale_ptr, row, inside, SCALE_WORDS)
    scales = block_scales(stored, D // CHANNELS, SCALES, ASSEMBLY)
    unit = 1.0
    if all_ptr is not None:
        unit *= tl.load(all_ptr)
    pieces = ()
    largest = tl.zeros([BLOCK_N, PART], tl.float32)
    bit = (1 + w % WORDS // (WORDS // 2)).to(tl.int16)
    is_word = (w < WORDS)[None, :]
    for p in tl.static_range(PARTS):
        at = row_at + (p * PART + w % WORDS)[None, :]
        words = tl.load(at, mask=inside[:, None], other=0)
        if KIND == THREE:
            rest = tl.load(row_at + (WORDS + w % (WORDS // 2))[None, :], mask=inside[:, None], other=0)
        for stream in tl.static_range(STREAMS):
            own = scales[piece_block(p, stream, WORDS, BITS, CHANNELS)]
            if KIND == THREE:
                code = three_codes(words, rest, bit[None, :], stream, ASSEMBLY)
                value = (code - (stored[0] & 7).to(tl.float32)[:, None]) * own[:, None]
            else:
                value = unpack(words, None, stream, KIND, BITS, (), ASSEMBLY).to(tl.float32) * own[:, None]
                value *= unit * (1 / piece_unit(KIND, stream))
            channel = channels(p * PART + w, stream, BITS, WORDS)
            if exact_ptr is not None:  # noqa: SIM102 - a constant, and one that is none
                if block * BLOCK_N < SINKS:
                    is_sink = (inside & (token < SINKS))[:, None]
                    exact = tl.load(exact_ptr + (row * D)[:, None] + channel[None, :], mask=is_sink, other=0.0)
                    value = tl.where(is_sink, exact.to(tl.float32), value)
            if parts_ptr is not None:
                of_row = (tl.minimum(token // CENTER_PAGE, center_last) * HKV + head) * (2 * D)
                parts_at = parts_ptr + of_row[:, None] + channel[None, :]
                offset = tl.load(parts_at).to(tl.float32) + tl.load(parts_at + D).to(tl.float32) * (1 / LOWER)
                value += tl.where(inside[:, None], offset, 0.0)
            magnitude = tl.abs(value)
            largest = tl.maximum(largest, tl.where(magnitude < float("inf"), magnitude, 0.0))
            pieces = pieces + (value,)
    # the largest value becomes just less than 2^15: fp16 keeps 11 bits of all down to 2^-29 times that
    exponent = tl.max(tl.max(largest, axis=1), axis=0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 27), 254)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    pair = b * HKV + head
    tl.store(unit_ptr + pair * (length // BLOCK_N) + block, ((exponent - 14) << 23).to(tl.float32, bitcast=True))
    for p in tl.static_range(PARTS):
        for stream in tl.static_range(STREAMS):
            channel = channels(p * PART + w, stream, BITS, WORDS)
            at = values_ptr + ((pair * length + token) * D)[:, None] + channel[None, :]
            tl.store(at, (pieces[p * STREAMS + stream] * inverse).to(tl.float16), mask=is_word)


@triton.jit(
    do_not_specialize=["length", "stride_table", "center_last"],
    do_not_specialize_on_alignment=["page_table_ptr", "seq_lens_ptr", "query_starts_ptr", "k_unit_ptr", "v_unit_ptr"],
)
def _spread_blocks_kernel(
    k_ptr,
    k_scale_ptr,
    k_all_ptr,
    v_ptr,
    v_scale_ptr,
    v_all_ptr,
    page_table_ptr,  # [B, stride_table] int32
    seq_lens_ptr,  # [B] int32
    query_starts_ptr,  # [B + 1] int32
    k_values_ptr,
    k_unit_ptr,
    v_values_ptr,
    v_unit_ptr,
    length,
    stride_table,
    parts_ptr,
    center_last,
    k_exact_ptr,
    v_exact_ptr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CHANNELS: tl.constexpr,
    K_SCALES: tl.constexpr,
    K_SCALE_WORDS: tl.constexpr,
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_SCALE_WORDS: tl.constexpr,
    SINGLE: tl.constexpr,
    SINKS: tl.constexpr,
    CENTER_PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One program: BLOCK_N tokens of one sequence and KV head, the keys or the values (the grid's third axis).

    Values in units of a power of two, one for the program's tokens, still turned; zeros after the last token.
    Sequences of one query are left out, but where they are SINGLE.
    """
    blocks = length // BLOCK_N
    b = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + b)
    if block * BLOCK_N >= seq_len:
        return
    if not SINGLE and tl.load(query_starts_ptr + b + 1) - tl.load(query_starts_ptr + b) == 1:
        return
    if tl.program_id(2) == 0:
        _spread_side(
            k_ptr, k_scale_ptr, k_all_ptr, page_table_ptr, k_values_ptr, k_unit_ptr, b, head, block, length, seq_len,
            stride_table, parts_ptr, center_last, k_exact_ptr, HKV, D, S, K_KIND, K_BITS, K_CHANNELS, K_SCALES,
            K_SCALE_WORDS, SINKS, CENTER_PAGE, BLOCK_N, ASSEMBLY,
        )  # fmt: skip
    else:
        _spread_side(
            v_ptr, v_scale_ptr, v_all_ptr, page_table_ptr, v_values_ptr, v_unit_ptr, b, head, block, length, seq_len,
            stride_table, None, 0, v_exact_ptr, HKV, D, S, V_KIND, V_BITS, V_CHANNELS, V_SCALES,
            V_SCALE_WORDS, SINKS, CENTER_PAGE, BLOCK_N, ASSEMBLY,
        )  # fmt: skip


def spread_blocks(
    k: Side,
    v: Side,
    page_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    values: Tensor,
    units: Tensor,
    *,
    single: bool,
    center: Center | None,
    exact: Exact | None,
) -> None:
    """Writes a batch's keys and values in fp16, still turned, in the order of their tokens.

    values: [2, B, HKV, length, D] fp16, keys and values.  units: [2, B, HKV, blocks] float32, of a block's tokens each.
    single: sequences of one query too.  center: is added back to the keys.
    exact: has the first tokens, which every query reads in 16 bits.
    """
    _, batch, kv_heads, length, head_dim = values.shape
    blocks = units.shape[3]
    sinks = 0 if exact is None else exact.sinks
    _spread_blocks_kernel[(batch * blocks, kv_heads, 2)](
        k.words,
        k.scale_words,
        k.tensor_scale,
        v.words,
        v.scale_words,
        v.tensor_scale,
        page_table,
        seq_lens,
        query_starts,
        values[0],
        units[0],
        values[1],
        units[1],
        length,
        page_table.stride(0),
        None if center is None else center.parts,
        0 if center is None else center.last,
        *((None, None) if exact is None or not sinks else (exact.k, exact.v)),
        kv_heads,
        head_dim,
        k.codes.shape[2],
        *k.block_constants,
        *v.block_constants,
        SINGLE=single,
        SINKS=sinks,
        CENTER_PAGE=64 if center is None else center.page,
        BLOCK_N=length // blocks,
        ASSEMBLY=values.is_cuda and not INTERPRETED,
        num_warps=4,
    )
