"""Rows of a bit-shift trellis of 2^8 states: written, and read back as values; the definition's bytes and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.tiles import nearest, sum_by_halves
from kvbench_kernels.tuning import rows_a_program
from kvbench_kernels.viterbi import Part, cheapest_paths

_EXPONENT_OF_ONE = tl.constexpr(127)  # of a float32


@dataclass(frozen=True, eq=False)
class Code:
    """How rows of D channels are a string of bits, as data; tensors are int32 on the device.

    parts: steps that follow each other. values: [parts, 256], what a state decodes to.
    channel, part, weight, word, shift: [D] of each step, its channel, its part, what an error counts, and where the
    bits that end with its code are: the low ones of the words word-1 and word, shifted right.
    step: [D] of each channel. byte_step, byte_bits, byte_down: [bytes], of each byte of the string the first step whose
    code ends with it or after it, the bits of that code, and by how many of them it ends after it; negative where the
    string ends before.
    start_bits: of the bits before the first code, that are stored below the scale.
    mantissa, bias: of a scale's bits. nan: the code of one that is none. zero: whether the code 0 is the scale 0.
    unit, fine: of values in a row's root mean square, and of the row's numbers in that. reach: the largest such number.
    largest, smallest: values beyond are taken for it; rows of a smaller norm are zeros.
    """

    parts: tuple[Part, ...]
    values: Tensor
    channel: Tensor
    step: Tensor
    part: Tensor
    weight: Tensor
    word: Tensor
    shift: Tensor
    byte_step: Tensor
    byte_bits: Tensor
    byte_down: Tensor
    start_bits: int
    mantissa: int
    bias: int
    nan: int
    zero: bool
    unit: int
    fine: int
    reach: int
    largest: float
    smallest: float

    @property
    def scale_storage(self) -> torch.dtype:
        """A word of 16 bits with the start, or a byte."""
        return torch.int16 if self.start_bits else torch.uint8


@triton.jit
def _scale_of(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr, ZERO: tl.constexpr):
    """The float32 number of a scale's code."""
    bits = (code << (23 - MANTISSA)) + ((_EXPONENT_OF_ONE - BIAS) << 23)
    scale = tl.where(code == NAN, float("nan"), bits.to(tl.float32, bitcast=True))
    if ZERO:
        scale = tl.where(code == 0, 0.0, scale)
    return scale


@triton.jit
def _code_of(scale, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr):
    """The code of the nearest number that a scale can be."""
    bits = scale.to(tl.int32, bitcast=True)
    code = ((bits + (1 << (22 - MANTISSA))) >> (23 - MANTISSA)) - ((_EXPONENT_OF_ONE - BIAS) << MANTISSA)
    return tl.where(scale > 0, tl.minimum(tl.maximum(code, 0), NAN - 1), 0)


@triton.jit
def _within(x, whole, LARGEST: tl.constexpr):
    """Rows of x within ±LARGEST, zeros where a row is not whole."""
    return tl.where(whole, tl.minimum(tl.maximum(x, -LARGEST), LARGEST), 0.0)


@triton.jit
def _stored(z, REACH: tl.constexpr):
    """Whole numbers within ±REACH, as the search reads them."""
    return tl.minimum(tl.maximum(z, -REACH), REACH).to(tl.int16)


@triton.jit
def _unit(norm, UNITS: tl.constexpr, SMALLEST: tl.constexpr):
    """The unit that a row is searched in, and what makes it a row's; 0 for a row of zeros."""
    step = tl.div_rn(norm, norm * 0.0 + UNITS)
    return step, tl.where(norm >= SMALLEST, tl.div_rn(norm * 0.0 + 1.0, step), 0.0)


@triton.jit
def _measure_kernel(
    x_ptr,  # [N, D] float32, float16 or bfloat16
    channel_ptr,  # [D] int32, of each step
    z_ptr,  # [N, D] int16: rows in the order of steps, in the search's own unit
    norm_ptr,  # [N] float32, -1 for a row that is not finite
    N,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # in the row's norm
    REACH: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per R rows: the unit of each, and the row in it."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (d < D)
    x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    whole = tl.min(tl.where(tl.abs(x) < float("inf"), 1, 0), axis=1)[:, None] == 1
    x = _within(x, whole, LARGEST)
    norm = tl.sqrt_rn(sum_by_halves((x * x,)))[:, None]
    _, inverse = _unit(norm, UNITS, SMALLEST)
    tl.store(norm_ptr + row, tl.where(whole, norm, -1.0), mask=row < N)
    channel = tl.load(channel_ptr + d, mask=d < D, other=0)
    y = tl.load(x_ptr + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    y = _within(y, whole, LARGEST)
    z = nearest(y * inverse)
    tl.store(z_ptr + row * D + d, _stored(z, REACH), mask=inside)


@triton.jit
def _fit_kernel(
    x_ptr,  # [N, D] float32, float16 or bfloat16
    channel_ptr,  # [D] int32, of each step
    part_ptr,  # [D] int32, of each step
    weight_ptr,  # [D] int32, of each step
    value_ptr,  # [parts, 256] int32
    state_ptr,  # [N, D] uint8: of the path
    norm_ptr,  # [N] float32, of `_measure_kernel`
    scale_ptr,  # [N] int16 or uint8
    z_ptr,  # [N, D] int16: where AGAIN, the row in the unit of the scale
    N,
    D: tl.constexpr,
    AGAIN: tl.constexpr,
    FIRST: tl.constexpr,  # bits of the first step's code
    START: tl.constexpr,  # see Code
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    NAN: tl.constexpr,
    UNITS: tl.constexpr,  # in the row's norm
    FINE: tl.constexpr,
    REACH: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per R rows: the scale that suits the path best, and the bits before the first code."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (d < D)
    norm = tl.load(norm_ptr + row, mask=row < N, other=-1.0)
    whole = norm >= 0
    step, inverse = _unit(norm, UNITS, SMALLEST)
    channel = tl.load(channel_ptr + d, mask=d < D, other=0)
    x = tl.load(x_ptr + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    x = _within(x, whole, LARGEST)
    z = nearest(x * inverse).to(tl.int64)
    state = tl.load(state_ptr + row * D + d, mask=inside, other=0).to(tl.int32)
    part = tl.load(part_ptr + d, mask=d < D, other=0)
    value = tl.load(value_ptr + part * 256 + state)
    weighted = value * tl.load(weight_ptr + d, mask=d < D, other=0)
    along = tl.sum(z * weighted, axis=1)[:, None].to(tl.float32)
    square = tl.sum(value * weighted.to(tl.int64), axis=1)[:, None].to(tl.float32)
    code = _code_of(step * tl.div_rn(along, square), MANTISSA, BIAS, NAN)
    code = tl.where(whole, code, NAN)
    if AGAIN:
        scale = _scale_of(code, MANTISSA, BIAS, NAN, False)
        y = x * tl.where(whole, tl.div_rn(scale * 0.0 + 1.0, scale * (1.0 / FINE)), 0.0)
        y = tl.minimum(tl.maximum(y, -REACH - 1.0), REACH + 1.0)
        y = nearest(y)
        tl.store(z_ptr + row * D + d, _stored(y, REACH), mask=inside)
    if START:
        first = tl.load(state_ptr + row * D, mask=row < N, other=0).to(tl.int32) >> FIRST
        code = (code << START) | tl.where(whole, first, 0)
    tl.store(scale_ptr + row, code.to(scale_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def _pack_kernel(
    state_ptr,  # [N, D] uint8: of the path
    norm_ptr,  # [N] float32, of `_measure_kernel`
    byte_step_ptr,  # [BYTES] int32, see Code
    byte_down_ptr,  # [BYTES] int32
    bits_ptr,  # [BYTES] int32, of the codes there
    out_ptr,  # [N, BYTES] uint8
    N,
    D: tl.constexpr,
    BYTES: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per R rows: the string of each, whose words have the upper byte last."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    b = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (b < BYTES)
    step = tl.load(byte_step_ptr + b, mask=b < BYTES, other=1)
    down = tl.load(byte_down_ptr + b, mask=b < BYTES, other=0)
    bits = tl.load(bits_ptr + b, mask=b < BYTES, other=0)
    whole = tl.load(norm_ptr + row, mask=row < N, other=-1.0) >= 0
    state = tl.load(state_ptr + row * D + step, mask=inside, other=0).to(tl.int32)
    before = tl.load(state_ptr + row * D + step - 1, mask=inside, other=0).to(tl.int32)
    both = ((before << bits) | state) << 8
    byte = tl.where(down > -8, both >> tl.minimum(8 + down, 31), 0) & 255
    tl.store(out_ptr + row * BYTES + (b ^ 1), tl.where(whole, byte, 0).to(tl.uint8), mask=inside)


@triton.jit
def _read_kernel(
    word_ptr,  # [N, WORDS] int16
    scale_ptr,  # [N] int16 or uint8
    step_ptr,  # [D] int32, of each channel
    at_ptr,  # [D] int32, of each step: the word that its code ends in
    shift_ptr,  # [D] int32
    part_ptr,  # [D] int32
    value_ptr,  # [parts, 256] int32
    out_ptr,  # [N, D] float32
    N,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    START: tl.constexpr,  # see Code
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    NAN: tl.constexpr,
    ZERO: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per R rows: their values."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (d < D)
    step = tl.load(step_ptr + d, mask=d < D, other=0)
    at = tl.load(at_ptr + step)
    shift = tl.load(shift_ptr + step)
    part = tl.load(part_ptr + step)
    stored = tl.load(scale_ptr + row, mask=row < N, other=0).to(tl.int32) & ((1 << (16 if START else 8)) - 1)
    low = tl.load(word_ptr + row * WORDS + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    high = tl.load(word_ptr + row * WORDS + at - 1, mask=inside & (at > 0), other=0).to(tl.int32) & 0xFFFF
    if START:
        high = tl.where(at == 0, stored & ((1 << START) - 1), high)
    window = (((high << 16) | low) >> shift) & 255
    value = tl.load(value_ptr + part * 256 + window).to(tl.float32)
    scale = _scale_of(stored >> START, MANTISSA, BIAS, NAN, ZERO)
    tl.store(out_ptr + row * D + d, value * scale, mask=inside)


def write(x: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Packed rows [N, bytes] uint8 and their scales [N] of x [N, D] float32, float16 or bfloat16: the definition's.

    A row with NaN or ±inf gets codes 0 and the scale NaN.
    """
    rows, head_dim = x.shape
    x = x.contiguous()
    scale = torch.empty(rows, dtype=code.scale_storage, device=x.device)
    count = len(code.byte_step)
    out = torch.empty(rows, count, dtype=torch.uint8, device=x.device)
    if not rows:
        return out, scale
    z = torch.empty(rows, head_dim, dtype=torch.int16, device=x.device)
    norm = torch.empty(rows, dtype=torch.float32, device=x.device)
    each, block = _tile(head_dim)
    grid = (triton.cdiv(rows, each),)
    units = code.unit * code.fine * head_dim**0.5
    _measure_kernel[grid](
        x,
        code.channel,
        z,
        norm,
        rows,
        head_dim,
        units,
        code.reach,
        code.largest,
        code.smallest,
        each,
        block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    states = cheapest_paths(z, code.values, code.parts, code.fine // 2, bool(code.start_bits))
    _fit_kernel[grid](
        x,
        code.channel,
        code.part,
        code.weight,
        code.values,
        states,
        norm,
        scale,
        z,
        rows,
        head_dim,
        not code.start_bits,
        code.parts[0].bits,
        code.start_bits,
        code.mantissa,
        code.bias,
        code.nan,
        units,
        code.fine,
        code.reach,
        code.largest,
        code.smallest,
        each,
        block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    if not code.start_bits:
        states = cheapest_paths(z, code.values, code.parts, code.fine // 2, False)
    each, block = _tile(count)
    _pack_kernel[(triton.cdiv(rows, each),)](
        states,
        norm,
        code.byte_step,
        code.byte_down,
        code.byte_bits,
        out,
        rows,
        head_dim,
        count,
        each,
        block,
        num_warps=4,
    )
    return out, scale


def read(codes: Tensor, scale: Tensor, head_dim: int, code: Code) -> Tensor:
    """[N, D] float32 values of packed rows [N, bytes] with scales [N]."""
    rows, count = codes.shape
    out = torch.empty(rows, head_dim, dtype=torch.float32, device=codes.device)
    if rows:
        each, block = _tile(head_dim)
        _read_kernel[(triton.cdiv(rows, each),)](
            codes.contiguous().view(torch.int16),
            scale.contiguous(),
            code.step,
            code.word,
            code.shift,
            code.part,
            code.values,
            out,
            rows,
            head_dim,
            count // 2,
            code.start_bits,
            code.mantissa,
            code.bias,
            code.nan,
            code.zero,
            each,
            block,
            num_warps=4,
        )
    return out


def _tile(width: int) -> tuple[int, int]:
    """Rows of a program, and columns of its tile."""
    block = triton.next_power_of_2(width)
    return rows_a_program(max(1, 1024 // block)), block
