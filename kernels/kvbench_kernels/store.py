"""The write: new keys and values turned, quantized, packed and put into their slots by one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.center import Center
from kvbench_kernels.exact import Exact
from kvbench_kernels.hadamard import Turn, span
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
from kvbench_kernels.store_blocks import store_blocks
from kvbench_kernels.three import store_three
from kvbench_kernels.tiers import Rank, search, store_tiers
from kvbench_kernels.tiles import sum_by_halves
from kvbench_kernels.tuning import INTERPRETED, rows_a_program

# how a row becomes codes
ROUND_FLOAT = tl.constexpr(0)  # to the 16-bit type
ROUND_E4M3 = tl.constexpr(1)  # x / scale, saturated
ROUND_E4M3_ROW = tl.constexpr(2)  # x * (1 / s), s = absmax / 448
ROUND_INT8_ROW = tl.constexpr(3)  # x * (1 / s), s = absmax / 127
ROUND_UNSIGNED_ROW = tl.constexpr(4)  # x / s + zero, s = (max - min) / largest code
ROUND_NORM4_ROW = tl.constexpr(5)  # cut at 0 and ±threshold norms, s = norm / sqrt(D)
ROUND_SEARCH_ROW = tl.constexpr(6)  # uniform codes without a zero, s searched: see tiers.search

_SMALLEST = tl.constexpr(1e-6)
# rows of ROUND_NORM4_ROW with a value of _LARGE or more are shrunk before they are squared
_LARGE = tl.constexpr(2.0**58)
_SHRINK = tl.constexpr(2.0**-72)
_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Rounding:
    """kind: one of the constants above.  threshold: ROUND_NORM4_ROW's, for a row of unit variance.

    tiers: ROUND_SEARCH_ROW's widths and steps, as a layout of TIERS has them in its codebook.
    """

    kind: int
    threshold: float = 0.0
    tiers: tuple[float, ...] = ()


@triton.jit
def _quotient(x, scale, inverse, NEAR: tl.constexpr):
    """x / scale as IEEE rounds it, where it is below 2^20, else about that; inverse: 1 / scale, rounded.

    Two of Newton's steps, each with an exact remainder: five instructions, where a division takes a dozen and a branch.
    The scales of 4 bits are at least 1e-6, and small enough that the inverse is no subnormal number.
    NEAR: all quotients are below 2^20.
    """
    x, scale = tl.broadcast(x, scale)
    x, inverse = tl.broadcast(x, inverse)
    first = x * inverse
    second = tl.fma(tl.fma(-scale, first, x), inverse, first)
    third = tl.fma(tl.fma(-scale, second, x), inverse, second)
    return third if NEAR else tl.where(tl.abs(first) < 2.0**20, third, first)


@triton.jit
def _unsigned_codes(x, scale, inverse, zero, whole, BITS: tl.constexpr, NEAR: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The tiles' x / scale + zero, halves away from 0, within the codes of so many bits; 0 where a row is not whole.

    NEAR: all rows are whole, and all quotients below 2^20.
    """
    largest: tl.constexpr = (1 << BITS) - 1.0
    codes = ()
    for i in tl.static_range(len(x)):
        if BITS == 4 and ASSEMBLY:
            value = _quotient(x[i], scale[:, None], inverse[:, None], NEAR)
        else:
            value = tl.div_rn(x[i], tl.broadcast_to(scale[:, None], x[i].shape))
        # nothing below 0 counts, so what is cut off are the digits
        value = tl.maximum(value + zero[:, None], 0.0) + 0.5
        code = tl.minimum(value, largest + 0.5).to(tl.int32)
        codes = codes + (code if NEAR else tl.where(whole[:, None], code, 0),)
    return codes


@triton.jit
def _store_side(
    x_ptr,
    signs_ptr,
    codes_ptr,
    rest_ptr,
    scale_ptr,
    offset_ptr,
    order_ptr,  # [HKV, D] int32: which channel comes at each place, and one over its spread; or None
    inverse_ptr,
    page,  # [BLOCK_R], which offset is subtracted from each row; or None: the first
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
    SPAN: tl.constexpr,
    ROUND: tl.constexpr,
    BITS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROOT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    TIERS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Rows of x, of one head, into the cache's rows `to`, those at -1 skipped."""
    COUNT: tl.constexpr = D // SPAN
    inside = to >= 0
    d = tl.arange(0, SPAN)[None, :]
    x = turned_rows(
        x_ptr, signs_ptr, offset_ptr, order_ptr, inverse_ptr, page, exact_ptr, token, head, to,
        stride_t, stride_h, stride_d, factor, HKV, D, BLOCK, SPAN,
    )  # fmt: skip

    # the scale
    if ROUND == ROUND_E4M3_ROW or ROUND == ROUND_INT8_ROW or ROUND == ROUND_UNSIGNED_ROW:
        low = x[0]
        high = x[0]
        is_nan = x[0] != x[0]
        for i in tl.static_range(1, COUNT):
            low = tl.minimum(low, x[i])
            high = tl.maximum(high, x[i])
            is_nan = is_nan | (x[i] != x[i])
        low = tl.min(low, axis=1)
        high = tl.max(high, axis=1)
        if ROUND == ROUND_UNSIGNED_ROW:
            scale = tl.div_rn(high - low, (1 << BITS) - 1.0)
        elif ROUND == ROUND_INT8_ROW:
            scale = tl.div_rn(tl.maximum(high, -low), 127.0)
        else:
            scale = tl.div_rn(tl.maximum(high, -low), 448.0)
        scale = tl.maximum(scale, _SMALLEST)
        scale = tl.where(tl.max(is_nan.to(tl.int32), axis=1) > 0, float("nan"), scale)  # [BLOCK_R]
    if ROUND == ROUND_NORM4_ROW:
        # the squares of large rows would overflow; those of float16 can't
        CAN_BE_LARGE: tl.constexpr = x_ptr.dtype.element_ty != tl.float16
        if CAN_BE_LARGE:
            peak = tl.abs(x[0])
            for i in tl.static_range(1, COUNT):
                peak = tl.maximum(peak, tl.abs(x[i]))
            large = tl.max(peak, axis=1) >= _LARGE
            shrunk = ()
            for i in tl.static_range(COUNT):
                shrunk = shrunk + (tl.where(large[:, None], x[i] * _SHRINK, x[i]),)
            x = shrunk
        # squares are added by halving the row, which is the definition's order
        squares = ()
        for i in tl.static_range(COUNT):
            squares = squares + (x[i] * x[i],)
        total = sum_by_halves(squares)
        if CAN_BE_LARGE:
            norm = tl.sqrt_rn(tl.where(large, total, total + 1e-12))
        else:
            norm = tl.sqrt_rn(total + 1e-12)
        scale = tl.div_rn(norm, ROOT)

    # the codes
    if ROUND == ROUND_SEARCH_ROW:
        codes, scale_code = search(x, TIERS, D)
        tl.store(scale_ptr + to, scale_code.to(tl.uint8), mask=inside)
    if ROUND == ROUND_E4M3:
        scale = tl.full([token.shape[0]], 1.0, tl.float32)
        if HAS_SCALE:
            scale = scale * tl.load(scale_ptr)
    if ROUND == ROUND_E4M3_ROW or ROUND == ROUND_INT8_ROW:
        inverse = tl.div_rn(scale * 0 + 1.0, scale)[:, None]
    if ROUND == ROUND_NORM4_ROW:
        # two roundings, as torch divides a number by a tensor
        inverse = (tl.div_rn(norm * 0 + 1.0, norm) * ROOT)[:, None]
    if ROUND == ROUND_UNSIGNED_ROW:
        largest: tl.constexpr = (1 << BITS) - 1.0
        zero = tl.minimum(tl.maximum(half_away(tl.div_rn(-low, scale)), 0.0), largest)
        inverse = tl.div_rn(scale * 0 + 1.0, scale)
    if ROUND == ROUND_FLOAT:
        for i in tl.static_range(COUNT):
            to_at = codes_ptr + (to * D)[:, None] + i * SPAN + d
            tl.store(to_at, x[i].to(codes_ptr.dtype.element_ty), mask=inside[:, None])
    elif rest_ptr is not None:
        store_tiers(codes, codes_ptr, rest_ptr, to, TIERS, D * BITS // 16)
    elif ROUND == ROUND_SEARCH_ROW:
        store_words(codes, codes_ptr, to, D, BITS)
    else:
        if ROUND != ROUND_E4M3:
            # a row without a finite scale reads back as NaN throughout
            whole = tl.abs(scale) < float("inf")
        codes = ()
        if ROUND == ROUND_UNSIGNED_ROW:
            near = whole & (tl.maximum(high, -low) * inverse < 2.0**20)
            if tl.min(near.to(tl.int32), axis=0) > 0:
                unsigned = _unsigned_codes(x, scale, inverse, zero, whole, BITS, True, ASSEMBLY)
            else:
                unsigned = _unsigned_codes(x, scale, inverse, zero, whole, BITS, False, ASSEMBLY)
            codes = unsigned
        for i in tl.static_range(0 if ROUND == ROUND_UNSIGNED_ROW else COUNT):
            if ROUND == ROUND_E4M3:
                code = to_e4m3(clamp(tl.div_rn(x[i], tl.broadcast_to(scale[:, None], x[i].shape)), 448.0))
            elif ROUND == ROUND_E4M3_ROW:
                code = to_e4m3(clamp(x[i] * inverse, 448.0))
            elif ROUND == ROUND_INT8_ROW:
                code = tl.minimum(tl.maximum(half_away(x[i] * inverse), -128.0), 127.0).to(tl.int32)
            else:
                z = x[i] * inverse
                code = (z > -THRESHOLD).to(tl.int32) + (z >= 0).to(tl.int32) + (z > THRESHOLD).to(tl.int32)
            if ROUND != ROUND_E4M3:
                code = tl.where(whole[:, None], code, 0)
            codes = codes + (code,)
        if BITS == 8:
            for i in tl.static_range(COUNT):
                tl.store(codes_ptr + (to * D)[:, None] + i * SPAN + d, codes[i].to(tl.int8), mask=inside[:, None])
        elif BITS == 3:
            store_three(codes, codes_ptr, to, D)
        else:
            store_words(codes, codes_ptr, to, D, BITS)
        if ROUND != ROUND_E4M3:
            if ROUND == ROUND_UNSIGNED_ROW:
                bits = (scale.to(tl.int32, bitcast=True) & ~((1 << BITS) - 1)) | zero.to(tl.int32)
                scale = bits.to(tl.float32, bitcast=True)
            if ROUND == ROUND_NORM4_ROW and CAN_BE_LARGE:
                scale = tl.where(large, tl.minimum(scale * (1.0 / _SHRINK), _MAX), scale)
            tl.store(scale_ptr + to, tl.where(whole, scale, float("nan")), mask=inside)


@triton.jit(
    do_not_specialize=["tokens", "offset_last"],
    # a vector's last tokens begin anywhere, and nothing is read of them by more than one number
    do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"],
)
def _store_kernel(
    k_ptr,  # [T, HKV, D] any float, any strides
    v_ptr,
    k_signs_ptr,  # [D] float32, or None
    v_signs_ptr,
    k_codes_ptr,  # [P, HKV, S, ...]: the 16-bit type, int8, or int16 words
    v_codes_ptr,
    k_scale_ptr,  # [P, HKV, S] float32, one float32, or None
    v_scale_ptr,
    slots_ptr,  # [T] int64: page * S + offset, or -1
    offset_ptr,  # [N, HKV, D] float32: subtracted from keys; or None
    positions_ptr,  # [T] int64, which offset is meant; or None: the first
    k_exact_ptr,  # [P, HKV, S, D]: the rows in 16 bits too, or None
    v_exact_ptr,
    k_rest_ptr,  # [P, HKV, S, words] int16: what follows the keys' words, or None
    order_ptr,  # [HKV, D] int32: the keys' channels in another order, and one over their spreads; or None
    inverse_ptr,
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
    ROOT: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_SPAN: tl.constexpr,
    K_ROUND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_THRESHOLD: tl.constexpr,
    K_HAS_SCALE: tl.constexpr,
    K_TIERS: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_SPAN: tl.constexpr,
    V_ROUND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    V_HAS_SCALE: tl.constexpr,
    V_TIERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OFFSET_PAGE: tl.constexpr = 64,
):
    """One program: BLOCK_R tokens' rows of one head; the grid's second axis is keys, values."""
    head, token = own_rows(HKV, BLOCK_R)
    page = None
    if positions_ptr is not None:
        page = offset_pages(positions_ptr, token, tokens, offset_last, OFFSET_PAGE)
    to = cache_rows(slots_ptr, token, tokens, head, HKV, S)
    if tl.program_id(1) == 0:
        _store_side(
            k_ptr, k_signs_ptr, k_codes_ptr, k_rest_ptr, k_scale_ptr, offset_ptr, order_ptr, inverse_ptr, page,
            k_exact_ptr, token, head, to, stride_kt, stride_kh, stride_kd, k_factor, HKV, D,
            K_BLOCK, K_SPAN, K_ROUND, K_BITS, K_THRESHOLD, ROOT, K_HAS_SCALE, K_TIERS, ASSEMBLY,
        )  # fmt: skip
    else:
        _store_side(
            v_ptr, v_signs_ptr, v_codes_ptr, None, v_scale_ptr, None, None, None, None,
            v_exact_ptr, token, head, to, stride_vt, stride_vh, stride_vd, v_factor, HKV, D,
            V_BLOCK, V_SPAN, V_ROUND, V_BITS, V_THRESHOLD, ROOT, V_HAS_SCALE, V_TIERS, ASSEMBLY,
        )  # fmt: skip


def store(
    k: Tensor,
    v: Tensor,
    k_side: Side,
    v_side: Side,
    k_rounding: Rounding,
    v_rounding: Rounding,
    slot_mapping: Tensor,
    *,
    k_turn: Turn | None = None,
    v_turn: Turn | None = None,
    center: Center | None = None,
    rank: Rank | None = None,
    positions: Tensor | None = None,
    exact: Exact | None = None,
) -> None:
    """Turn, quantize and write new tokens.

    k, v: [T, HKV, D], any strides.  slot_mapping: [T] int64, page * S + offset; -1 skips the token.
    center: is subtracted from keys before they are turned, or sorted by `rank`.
    positions: [T] int64, where its offsets differ by page.
    exact: gets the same rows, turned, in 16 bits.

    A row with NaN or ±inf gets codes 0 and the scale NaN, where rows have scales.
    """
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    k_turn, v_turn = k_turn or Turn(), v_turn or Turn()
    by_page = center is not None and center.last > 0
    if by_page and positions is None:
        raise ValueError("offsets by page of positions need the positions of the new tokens")
    if center is not None:
        center.check(k_side, head_dim)
    if exact is not None:
        exact.check(k_side, head_dim)
    if k_side.layout.block:
        store_blocks(
            k, v, k_side, v_side, k_rounding.kind, v_rounding.kind, slot_mapping, k_turn, v_turn, center,
            positions if by_page else None, exact,
        )  # fmt: skip
        return
    # few rows: more programs, so that all multiprocessors take part
    block_r = rows_a_program(4 if tokens * kv_heads <= 1024 else 8)
    _store_kernel[(triton.cdiv(tokens, block_r) * kv_heads, 2)](
        k,
        v,
        k_turn.signs,
        v_turn.signs,
        _codes(k_side),
        _codes(v_side),
        k_side.scale,
        v_side.scale,
        slot_mapping,
        None if center is None else center.offset,
        positions if by_page else None,
        None if exact is None else exact.k,
        None if exact is None else exact.v,
        k_side.following,
        None if rank is None else rank.order,
        None if rank is None else rank.inverse,
        center.last if center is not None and by_page else 0,
        tokens,
        k_turn.write_factor,
        v_turn.write_factor,
        *k.stride(),
        *v.stride(),
        kv_heads,
        head_dim,
        k_side.codes.shape[2],
        head_dim**0.5,
        *_constants(k_side, k_rounding, k_turn, head_dim),
        *_constants(v_side, v_rounding, v_turn, head_dim),
        BLOCK_R=block_r,
        ASSEMBLY=not INTERPRETED,  # whose fma rounds twice
        OFFSET_PAGE=64 if center is None else center.page,
        num_warps=1,
        # a fused multiply-add would round a sum of squares once where the definition rounds twice
        enable_fp_fusion=False,
    )


def _codes(side: Side) -> Tensor:
    given = {8: torch.int8, 3: torch.int32}.get(side.layout.bits)
    return side.words if given is None else side.codes.view(given)


def _constants(side: Side, rounding: Rounding, turn: Turn, head_dim: int) -> tuple[object, ...]:
    """The kernel's constants BLOCK, SPAN, ROUND, BITS, THRESHOLD, HAS_SCALE and TIERS."""
    bits = side.layout.bits
    tile = 16 if bits == 3 else span(side.layout.words(head_dim) if bits < 8 else head_dim)
    # Triton's time for a kernel grows with the third power of its tiles, so fewer are better where the codes that
    # all have at a place fit 64 bits. Tiles of tiers lie in one slice each
    fewer = head_dim // span(head_dim)
    if tile < 8 and head_dim // tile > 8 and fewer * bits <= 64 and side.following is None:
        tile = span(head_dim)
    return turn.block, tile, rounding.kind, bits, rounding.threshold, side.scale is not None, rounding.tiers
