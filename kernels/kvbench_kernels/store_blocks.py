"""The write of rows in blocks: turned, each block scaled and rounded as its definition says, packed and scattered."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.center import Center
from kvbench_kernels.exact import Exact
from kvbench_kernels.hadamard import Turn
from kvbench_kernels.layout import Side
from kvbench_kernels.rows import (
    cache_rows,
    clamp,
    half_away,
    offset_pages,
    own_rows,
    store_words,
    to_e4m3,
    turned_rows,
)
from kvbench_kernels.tiles import nearest
from kvbench_kernels.tuning import rows_a_program

# how a block becomes codes; `s` is the scale before it is rounded
BLOCK_Q8 = tl.constexpr(16)  # x / s to the nearest, halves away from zero, s = absmax / 127
BLOCK_Q4 = tl.constexpr(17)  # x / s + 8.5 cut off, s = the value of the largest magnitude / -8
BLOCK_MX4 = tl.constexpr(18)  # e2m1 of x / s, s = 2^(floor(log2(absmax)) - 2)
BLOCK_MX8 = tl.constexpr(19)  # e4m3 of x / s, s = 2^(floor(log2(absmax)) - 8)
BLOCK_NV4 = tl.constexpr(20)  # e2m1 of x / (s t), s = e4m3 of absmax / (6 t)

_SPAN = tl.constexpr(16)  # channels a tile, of which a block has one or two


@triton.jit
def _to_e2m1(x):
    """The e2m1 codes (int32) of x, to the nearest, ties to the even code, saturated; a zero keeps its sign."""
    size = tl.minimum(tl.abs(x), 6.0)
    twice = nearest(size * 2)
    once = nearest(size)
    half = nearest(size * 0.5)
    code = tl.where(size < 2, twice, tl.where(size < 4, once + 2, half + 4)).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _first_largest(tiles, largest):
    """[R] of a block's tiles: the value of that magnitude [R], with its sign; of equal ones the first."""
    place = tl.arange(0, _SPAN)[None, :]
    first = tl.full([largest.shape[0]], len(tiles) * _SPAN, tl.int32)
    for i in tl.static_range(len(tiles)):
        is_largest = tl.abs(tiles[i]) == largest[:, None]
        first = tl.minimum(first, tl.min(tl.where(is_largest, place + i * _SPAN, len(tiles) * _SPAN), axis=1))
    bits = tl.zeros([largest.shape[0]], tl.int32)
    for i in tl.static_range(len(tiles)):
        own = tl.where(place + i * _SPAN == first[:, None], tiles[i].to(tl.int32, bitcast=True), 0)
        bits += tl.sum(own, axis=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _block_codes(tiles, tensor_scale, ROUND: tl.constexpr):
    """(codes, a tuple of [R, SPAN] int32; the scale's bits [R] int32) of a block's tiles."""
    COUNT: tl.constexpr = len(tiles)
    largest = tl.abs(tiles[0])
    is_whole = largest < float("inf")
    for i in tl.static_range(1, COUNT):
        size = tl.abs(tiles[i])
        is_whole = is_whole & (size < float("inf"))
        largest = tl.maximum(largest, size)
    whole = tl.min(is_whole.to(tl.int32), axis=1) > 0
    # a broken block is one of zeros until it is marked
    largest = tl.where(whole, tl.max(largest, axis=1), 0.0)
    clean = ()
    for i in tl.static_range(COUNT):
        clean = clean + (tl.where(whole[:, None], tiles[i], 0.0),)

    if ROUND == BLOCK_Q8 or ROUND == BLOCK_Q4:
        if ROUND == BLOCK_Q8:
            scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
        else:
            scale = _first_largest(clean, largest) * -0.125
        inverse = tl.where(scale == 0, 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))[:, None]
        stored = scale.to(tl.float16)
        whole = whole & (tl.abs(stored.to(tl.float32)) < float("inf"))
        bits = tl.where(whole, stored.to(tl.int16, bitcast=True).to(tl.int32), 0x7E00)
    elif ROUND == BLOCK_NV4:
        by = tl.zeros(largest.shape, tl.float32) + 6.0 * tensor_scale
        bits = to_e4m3(clamp(tl.div_rn(largest, by), 448.0))
        step = (bits << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256 * tensor_scale
        step = tl.broadcast_to(step[:, None], clean[0].shape)
        bits = tl.where(whole, bits, 0x7F)
    else:
        emax: tl.constexpr = 2 if ROUND == BLOCK_MX4 else 8
        bits = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - emax, 0)
        inverse = ((254 - bits) << 23).to(tl.float32, bitcast=True)[:, None]
        bits = tl.where(whole, bits, 0xFF)

    codes = ()
    for i in tl.static_range(COUNT):
        if ROUND == BLOCK_Q8:
            code = half_away(clean[i] * inverse).to(tl.int32)
        elif ROUND == BLOCK_Q4:
            code = tl.minimum(clean[i] * inverse + 8.5, 15.0).to(tl.int32)
        elif ROUND == BLOCK_NV4:
            code = _to_e2m1(tl.where(step == 0, 0.0, tl.div_rn(clean[i], step)))
        elif ROUND == BLOCK_MX4:
            code = _to_e2m1(clean[i] * inverse)
        else:
            code = to_e4m3(clamp(clean[i] * inverse, 448.0))
        codes = codes + (tl.where(whole[:, None], code, 0),)
    return codes, bits


@triton.jit
def _store_blocks_side(
    x_ptr,
    signs_ptr,
    codes_ptr,
    scale_ptr,
    tensor_scale_ptr,
    offset_ptr,
    page,
    exact_ptr,
    token,
    head,
    to,
    stride_t,
    stride_h,
    stride_d,
    factor,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,  # that share a scale
):
    """Rows of x, of one head, into the cache's rows `to`, those at -1 skipped."""
    x = turned_rows(
        x_ptr, signs_ptr, offset_ptr, None, None, page, exact_ptr, token, head, to,
        stride_t, stride_h, stride_d, factor, HKV, D, BLOCK, _SPAN,
    )  # fmt: skip
    inside = to >= 0
    tensor_scale = 1.0
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
    TILES: tl.constexpr = CHANNELS // _SPAN
    BLOCKS: tl.constexpr = D // CHANNELS
    codes = ()
    for b in tl.static_range(BLOCKS):
        own, bits = _block_codes(x[b * TILES : (b + 1) * TILES], tensor_scale, ROUND)
        codes = codes + own
        tl.store(scale_ptr + to * BLOCKS + b, bits.to(scale_ptr.dtype.element_ty), mask=inside)
    if BITS == 8:
        d = tl.arange(0, _SPAN)[None, :]
        for i in tl.static_range(D // _SPAN):
            tl.store(codes_ptr + (to * D)[:, None] + i * _SPAN + d, codes[i].to(tl.int8), mask=inside[:, None])
    else:
        store_words(codes, codes_ptr, to, D, BITS)


@triton.jit(
    do_not_specialize=["tokens", "offset_last"],
    do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"],
)
def _store_blocks_kernel(
    k_ptr,  # [T, HKV, D] any float, any strides
    v_ptr,
    k_signs_ptr,  # [D] float32, or None
    v_signs_ptr,
    k_codes_ptr,  # [P, HKV, S, ...] int8, or int16 words
    v_codes_ptr,
    k_scale_ptr,  # [P, HKV, S, blocks] int16 or uint8
    v_scale_ptr,
    k_tensor_scale_ptr,  # one float32, or None
    v_tensor_scale_ptr,
    slots_ptr,  # [T] int64: page * S + offset, or -1
    offset_ptr,  # [N, HKV, D] float32: subtracted from keys; or None
    positions_ptr,  # [T] int64, which offset is meant; or None: the first
    k_exact_ptr,  # [P, HKV, S, D]: the rows in 16 bits too, or None
    v_exact_ptr,
    offset_last,  # N - 1
    tokens,  # T
    k_factor,
    v_factor,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    HKV: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    K_TURN: tl.constexpr,
    K_ROUND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_CHANNELS: tl.constexpr,
    V_TURN: tl.constexpr,
    V_ROUND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OFFSET_PAGE: tl.constexpr,
):
    """One program: BLOCK_R tokens' rows of one head; the grid's second axis is keys, values."""
    head, token = own_rows(HKV, BLOCK_R)
    page = None
    if positions_ptr is not None:
        page = offset_pages(positions_ptr, token, tokens, offset_last, OFFSET_PAGE)
    to = cache_rows(slots_ptr, token, tokens, head, HKV, S)
    if tl.program_id(1) == 0:
        _store_blocks_side(
            k_ptr, k_signs_ptr, k_codes_ptr, k_scale_ptr, k_tensor_scale_ptr, offset_ptr, page, k_exact_ptr,
            token, head, to, stride_kt, stride_kh, stride_kd, k_factor, HKV, D, K_TURN, K_ROUND, K_BITS, K_CHANNELS,
        )  # fmt: skip
    else:
        _store_blocks_side(
            v_ptr, v_signs_ptr, v_codes_ptr, v_scale_ptr, v_tensor_scale_ptr, None, None, v_exact_ptr,
            token, head, to, stride_vt, stride_vh, stride_vd, v_factor, HKV, D, V_TURN, V_ROUND, V_BITS, V_CHANNELS,
        )  # fmt: skip


def store_blocks(
    k: Tensor,
    v: Tensor,
    k_side: Side,
    v_side: Side,
    k_rounding: int,
    v_rounding: int,
    slot_mapping: Tensor,
    k_turn: Turn,
    v_turn: Turn,
    center: Center | None = None,
    positions: Tensor | None = None,
    exact: Exact | None = None,
) -> None:
    """Turn, quantize and write new tokens' rows; as `store`, of sides that are both in blocks."""
    tokens, kv_heads, head_dim = k.shape
    block_r = rows_a_program(4 if tokens * kv_heads <= 1024 else 8)
    _store_blocks_kernel[(triton.cdiv(tokens, block_r) * kv_heads, 2)](
        k,
        v,
        k_turn.signs,
        v_turn.signs,
        *(side.codes.view(torch.int8) if side.layout.bits == 8 else side.words for side in (k_side, v_side)),
        *(side.scale.view(torch.int16) if side.scale.element_size() == 2 else side.scale for side in (k_side, v_side)),
        k_side.tensor_scale,
        v_side.tensor_scale,
        slot_mapping,
        None if center is None else center.offset,
        positions,
        None if exact is None else exact.k,
        None if exact is None else exact.v,
        0 if positions is None else center.last,
        tokens,
        k_turn.write_factor,
        v_turn.write_factor,
        *k.stride(),
        *v.stride(),
        kv_heads,
        head_dim,
        k_side.codes.shape[2],
        k_turn.block,
        k_rounding,
        k_side.layout.bits,
        k_side.layout.block,
        v_turn.block,
        v_rounding,
        v_side.layout.bits,
        v_side.layout.block,
        BLOCK_R=block_r,
        OFFSET_PAGE=64 if center is None else center.page,
        num_warps=1,
        # each operation is rounded by itself, as the definition's
        enable_fp_fusion=False,
    )
