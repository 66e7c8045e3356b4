"""What a decoder computes around attention, a launch each, rounded wherever torch's own operations round.

Torch takes seven operations for an RMSNorm, nine for rotary positions of queries and keys, two for a gated activation;
each reads and writes all rows. Only float32 sums over a row are taken in another order than torch's.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from kvbench_kernels.tuning import INTERPRETED

# gates
SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU = tl.constexpr(2)

_TILE = 4096  # elements of a program
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["rows", "eps"])
def _rms_norm_kernel(
    x_ptr,  # [T, D], rows contiguous
    weight_ptr,  # [D]
    out_ptr,  # [T, D]
    rows,  # T
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_MORE: tl.constexpr,
):
    """One program norms BLOCK_R rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = (row * D)[:, None] + d[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    mean = tl.sum(x * x, axis=1) / D
    y = x * tl.rsqrt(mean + eps)[:, None]
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if ONE_MORE:
        y *= 1.0 + weight.to(tl.float32)
    else:
        y = y.to(dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + at, y.to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, one_more: bool = False) -> Tensor:
    """x [..., D] over its rows' root mean square, times weight [D]; rounded to x's dtype before and after that.

    one_more: times 1 + weight, in float32, and rounded once, as Gemma has it.
    """
    head_dim = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // head_dim
    block_d = triton.next_power_of_2(head_dim)
    block_r = max(1, _TILE // block_d)
    _rms_norm_kernel[(triton.cdiv(rows, block_r),)](
        x,
        weight,
        out,
        rows,
        eps,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_R=block_r,
        ONE_MORE=one_more,
        num_warps=4 if block_d <= _TILE else 8,
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _rotary_kernel(
    q_ptr,  # [HQ, T, D], any strides but D's
    k_ptr,  # [HKV, T, D], any strides but D's
    cos_ptr,  # [T, D], contiguous
    sin_ptr,  # [T, D], contiguous
    q_out_ptr,  # [T, HQ, D], contiguous
    k_out_ptr,  # [T, HKV, D], contiguous
    tokens,  # T
    q_stride_h,
    q_stride_t,
    k_stride_h,
    k_stride_t,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program turns one head of BLOCK_T tokens."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    d = tl.arange(0, HALF)[None, :]
    inside = (token < tokens)[:, None] & (d < D // 2)
    if head < HQ:
        x_ptr = q_ptr + head.to(tl.int64) * q_stride_h
        at = (token * q_stride_t)[:, None] + d
        out_ptr = q_out_ptr + head * D
        out_at = (token * (HQ * D))[:, None] + d
    else:
        x_ptr = k_ptr + (head - HQ).to(tl.int64) * k_stride_h
        at = (token * k_stride_t)[:, None] + d
        out_ptr = k_out_ptr + (head - HQ) * D
        out_at = (token * (HKV * D))[:, None] + d
    angle = (token * D)[:, None] + d
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_T, HALF]
    b = tl.load(x_ptr + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    for half in tl.static_range(2):
        cos = tl.load(cos_ptr + angle + half * (D // 2), mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle + half * (D // 2), mask=inside, other=0.0).to(tl.float32)
        if half == 0:
            first, second = a * cos, -b * sin
        else:
            first, second = b * cos, a * sin
        out = first.to(dtype).to(tl.float32) + second.to(dtype).to(tl.float32)
        tl.store(out_ptr + out_at + half * (D // 2), out.to(dtype), mask=inside)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [HQ, T, D] and k [HKV, T, D] turned by their tokens' angles, cos and sin [T, D]: x·cos + rotate_half(x)·sin.

    Both products are rounded to the dtype. The results lie in memory as [T, H, D].
    """
    (hq, tokens, head_dim), hkv = q.shape, k.shape[0]
    q_out = torch.empty(tokens, hq, head_dim, dtype=q.dtype, device=q.device)
    k_out = torch.empty(tokens, hkv, head_dim, dtype=q.dtype, device=q.device)
    half = triton.next_power_of_2(head_dim // 2)
    block_t = max(1, _TILE // 2 // half)
    _rotary_kernel[(triton.cdiv(tokens, block_t), hq + hkv)](
        q,
        k,
        cos.contiguous(),
        sin.contiguous(),
        q_out,
        k_out,
        tokens,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        HQ=hq,
        HKV=hkv,
        D=head_dim,
        BLOCK_T=block_t,
        HALF=half,
        num_warps=4,
        # products of 16 bits that are rounded and added would be one multiply-add, which rounds once
        enable_fp_fusion=False,
    )
    return q_out.transpose(0, 1), k_out.transpose(0, 1)


@triton.jit
def _gated_kernel(
    gate_ptr,  # [T, N], rows contiguous
    up_ptr,  # [T, N], rows contiguous
    out_ptr,  # [T, N], contiguous
    count,  # T * N
    gate_stride,
    up_stride,
    N: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program computes BLOCK elements, runs of RUN that lie in one row each."""
    at = (tl.program_id(0).to(tl.int64) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)) * RUN
    row = at // N
    column = at - row * N
    place = tl.arange(0, RUN)[None, :]
    inside = (at < count)[:, None]
    x = tl.load(gate_ptr + (row * gate_stride + column)[:, None] + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + column)[:, None] + place, mask=inside, other=0.0).to(tl.float32)
    if KIND == SILU:
        x = x / (1.0 + tl.exp(-x))
    elif KIND == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        if TANH:
            x = 0.5 * x * (1.0 + libdevice.tanh(y))
        else:  # the interpreter has no libdevice
            x = 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * y) + 1.0))
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + at[:, None] + place, (x.to(dtype).to(tl.float32) * up).to(dtype), mask=inside)


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """The activation `kind` of `gate`, rounded, times `up`, both of any one shape; their rows may lie apart."""
    width = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = (x.reshape(-1, width) if x.stride(-1) == 1 else x.contiguous().view(-1, width) for x in (gate, up))
    _gated_kernel[(triton.cdiv(gate.numel(), _TILE),)](
        gate,
        up,
        out,
        gate.numel(),
        gate.stride(0),
        up.stride(0),
        N=width,
        RUN=math.gcd(width, 8),
        KIND=kind,
        TANH=not INTERPRETED,
        BLOCK=_TILE,
        num_warps=8,
    )
    return out


@triton.jit
def _peaks_kernel(
    logits_ptr,  # [N, V], rows contiguous
    peak_ptr,  # [N] float32
    best_ptr,  # [N] int64
    total_ptr,  # [N] float32
    stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: its largest value, where that stands first, and the sum of exp(x - largest)."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * stride
    v = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], _LOWEST, tl.float32)
    best = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    # each place of the tile has a peak and a sum of its own
    for first in range(0, V, BLOCK):
        x = tl.load(x_ptr + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32)
        higher = x > peak
        new = tl.where(higher, x, peak)
        total = total * tl.exp(peak - new) + tl.exp(x - new)
        best = tl.where(higher, first + v, best)
        peak = new
    highest = tl.max(peak, axis=0)
    tl.store(peak_ptr + row, highest)
    tl.store(total_ptr + row, tl.sum(total * tl.exp(peak - highest), axis=0))
    tl.store(best_ptr + row, tl.min(tl.where(peak == highest, best, V), axis=0).to(tl.int64))


def peaks(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows [N, V], whatever their float dtype: their largest values, where these stand, sums of exp(x - largest).

    [N] float32, [N] int64 (the first of equal ones), [N] float32. A row with a NaN has NaN for a sum.
    """
    count, vocabulary = logits.shape
    peak, total = torch.empty(2, count, dtype=torch.float32, device=logits.device)
    best = torch.empty(count, dtype=torch.int64, device=logits.device)
    _peaks_kernel[(count,)](logits, peak, best, total, logits.stride(0), V=vocabulary, BLOCK=2048, num_warps=8)
    return peak, best, total
