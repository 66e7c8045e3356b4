"""Uniform codes with a searched 8-bit scale: of 2 bits, and in tiers, fewer bits for channels that weigh less.

Tiers are for keys whose channels come in the order of what they weigh in scores, each with a spread of 1, as the
transform `rank` leaves them: then no channel needs a scale of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbench.dtypes import e5m3
from kvbench.dtypes.base import STEPS, Codebook, Dtype, Rows, Tiers, constant, elements
from kvbench.dtypes.int2 import sum_by_halves, sum_of_squares

SEARCHED = range(-3, 8)  # the scales that are tried, in codes from that of the row's root mean square on
SEARCHED_BY_CHANNEL = range(0, 18, 2)  # likewise, downwards from that of the channel's largest magnitude


@lru_cache(maxsize=64)
def _by_channel(
    widths: tuple[int, ...], steps: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """[D] float32 each: one over the step, and the lowest and the highest code less 2^(bits-1)."""
    inverse = torch.tensor([1 / step for step in steps], device=device)
    half = torch.tensor([2.0 ** (bits - 1) for bits in widths], device=device)
    return inverse, -half, half - 1


def search(x: Tensor, widths: tuple[int, ...], steps: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Codes [..., D] uint8 of x [..., D], channel c with widths[c] bits, and e5m3 scales [...] uint8.

    With y = x / steps, a scale s gives the codes c = clamp(round(y / s - 1/2)), halves to even, which decode to
    (c + 1/2) s, and the error s² Σ (y / s - 1/2 - c)², summed as `sum_of_squares` does: each channel's error counts in
    its own steps. The scales tried are 11 that follow each other, the fourth of them the last one up to the root mean
    square of x; the smallest error wins, of equal ones the smallest scale. A row with NaN or ±inf has codes 0 and the
    scale NaN. All in float32, divisions as products with a rounded inverse.
    """
    x = x.to(torch.float32)
    inverse, low, high = _by_channel(widths, steps, x.device)
    whole = (x.abs() < torch.inf).all(-1)
    y = x * inverse
    # by way of float64, since torch's float32 square root on CPUs is not always the nearest value
    first = e5m3.floor((sum_of_squares(x) * (1 / x.shape[-1])).double().sqrt().float())
    least, chosen = torch.full(first.shape, torch.inf, device=x.device), first
    for step in SEARCHED:
        tried = (first + step).clamp(0, e5m3.NAN - 1)
        scale = e5m3.decode(tried)
        z = y * (1 / scale).unsqueeze(-1) - 0.5
        error = sum_of_squares(z - z.clamp(low, high).round()) * (scale * scale)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, tried, chosen)
    z = y * (1 / e5m3.decode(chosen)).unsqueeze(-1) - 0.5
    codes = (z.clamp(low, high).round() - low).masked_fill(~whole.unsqueeze(-1), 0)
    return codes.to(torch.uint8), torch.where(whole, chosen, e5m3.NAN).to(torch.uint8)


@dataclass(frozen=True)
class _Searched(Dtype):
    """Scales are e5m3."""

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.uint8

    def clean_scale(self, scale: Tensor) -> Tensor:
        return e5m3.decode(scale)


@dataclass(frozen=True)
class MidrisePerTokenHead(_Searched):
    """Uniform codes for a Gaussian row, as a Hadamard rotation leaves it."""

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        codes, scale = search(x, (self.code_bits,) * x.shape[-1], (1.0,) * x.shape[-1])
        return Rows(self.pack(codes), scale)


@dataclass(frozen=True)
class TiersPerTokenHead(_Searched):
    """Eight slices of D/8 channels, with codes of their own width each.

    A row is W = D/8 words of 16 bits: word j holds, from its low bits up, codes of the channels j, j+W, j+2W, …, of
    three bits the lower two. What then has no place follows the words, one bit a channel, slice after slice, packed as
    codes of one bit are.
    """

    @property
    def tiers(self) -> Tiers:
        assert isinstance(self.decode, Tiers)
        return self.decode

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        widths = self.tiers.by_channel(x.shape[-1])
        codes, scale = search(x, widths, tuple(STEPS[bits] for bits in widths))
        return Rows(self.pack(codes), scale)

    @property
    def head_dim_multiple(self) -> int:
        return 8

    def word_bytes(self, head_dim: int) -> int:
        return head_dim // 4

    def code_bytes(self, head_dim: int) -> int:
        self.check_head_dim(head_dim)
        return self.word_bytes(head_dim) + 2 * -(-len(self.tiers.rest) * head_dim // 128)

    def pack(self, codes: Tensor) -> Tensor:
        slices = codes.to(torch.int64).unflatten(-1, (8, -1))  # [..., 8, W]
        words = torch.zeros_like(slices[..., 0, :])
        for field in self.tiers.fields:
            words |= ((slices[..., field.slice, :] >> field.bit) & ((1 << field.bits) - 1)) << field.place
        if self.tiers.rest:
            bits = torch.cat([(slices[..., field.slice, :] >> field.bit) & 1 for field in self.tiers.rest], -1)
            bits = pad(bits, (0, -bits.shape[-1] % 16)).unflatten(-1, (16, -1))
            words = torch.cat([words, (bits << torch.arange(16, device=bits.device)[:, None]).sum(-2)], -1)
        return words.to(torch.int16).contiguous().view(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        words = elements(packed, torch.int16).to(torch.int32)
        width = words.shape[-1] * 16 // (16 + len(self.tiers.rest))
        slices = torch.zeros(*words.shape[:-1], 8, width, dtype=torch.int32, device=words.device)
        for field in self.tiers.fields:
            part = (words[..., :width] >> field.place) & ((1 << field.bits) - 1)
            slices[..., field.slice, :] |= part << field.bit
        if self.tiers.rest:
            bits = torch.cat([(words[..., width:] >> place) & 1 for place in range(16)], -1)
            for at, field in enumerate(self.tiers.rest):
                slices[..., field.slice, :] |= bits[..., at * width : (at + 1) * width] << field.bit
        return slices.flatten(-2)

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        assert rows.scale is not None
        codes = self.unpack(rows.codes)
        widths = self.tiers.by_channel(codes.shape[-1])
        middle = constant(tuple(2.0 ** (bits - 1) - 0.5 for bits in widths), torch.float32, codes.device)
        steps = constant(tuple(STEPS[bits] for bits in widths), dtype, codes.device)
        return (codes - middle).to(dtype) * self.clean_scale(rows.scale).to(dtype).unsqueeze(-1) * steps


@dataclass(frozen=True)
class TiersPerChannel(TiersPerTokenHead):
    """Tiers of a page: each channel has a scale, searched for its tokens, and a zero in eighths of it.

    A code c of b bits decodes to (c - 2^(b-1) + 1/2 + zero/8) s. With m the channel's middle (halfway between its ends
    where b > 2, its mean otherwise) and r = max |x - m| / 2^(b-1), the scales tried are 9, every other e5m3 number from
    the last one up to r downwards, none too small for a zero of -127 to 127 to reach m; the zero of each is the integer
    next to 8 m / s. The smallest sum of squared errors wins, of equal ones the largest scale. Stored: the scale, and
    the zero as int8. Sums are by halves, as `sum_by_halves` does; divisions are products with a rounded inverse. A
    channel with NaN or ±inf has codes 0, zero 0 and the scale NaN.
    """

    def scales_shape(self, head_dim: int) -> tuple[int, ...]:
        return (head_dim, 2)

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32).transpose(-1, -2).contiguous()  # [..., D, S]
        widths = self.tiers.by_channel(x.shape[-2])
        _, low, high = _by_channel(widths, (1.0,) * len(widths), x.device)
        whole = (x.abs() < torch.inf).all(-1)
        x = x.masked_fill(~whole.unsqueeze(-1), 0)
        ends = (x.amin(-1) + x.amax(-1)) * 0.5
        middle = torch.where(high > 1, ends, sum_by_halves(x) * (1 / x.shape[-1]))  # [..., D]
        first = e5m3.floor((x - middle.unsqueeze(-1)).abs().amax(-1) * (1 / -low))
        reach = e5m3.floor(middle.abs() * (8 / 127)) + 1
        low, high = low[:, None], high[:, None]
        least, chosen = torch.full(first.shape, torch.inf, device=x.device), first
        for step in SEARCHED_BY_CHANNEL:
            tried = torch.maximum(first - step, reach).clamp(0, e5m3.NAN - 1)
            scale, zero = self._offset(tried, middle)
            z = x * (1 / scale).unsqueeze(-1) - 0.5 - zero.unsqueeze(-1) / 8
            error = sum_of_squares(z - z.clamp(low, high).round()) * (scale * scale)
            better = error < least
            least, chosen = torch.where(better, error, least), torch.where(better, tried, chosen)
        scale, zero = self._offset(chosen, middle)
        z = x * (1 / scale).unsqueeze(-1) - 0.5 - zero.unsqueeze(-1) / 8
        codes = (z.clamp(low, high).round() - low).masked_fill(~whole.unsqueeze(-1), 0)
        zero = zero.masked_fill(~whole, 0).to(torch.int8).view(torch.uint8)
        stored = torch.stack([torch.where(whole, chosen, e5m3.NAN).to(torch.uint8), zero], -1)
        return Rows(self.pack(codes.transpose(-1, -2).to(torch.uint8)), stored)

    def _offset(self, code: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
        """[...] float32 scales of these codes, and zeros in eighths of them."""
        scale = e5m3.decode(code)
        return scale, (middle * (1 / scale) * 8).round().clamp(-127, 127)

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        assert rows.scale is not None
        codes = self.unpack(rows.codes)
        widths = self.tiers.by_channel(codes.shape[-1])
        half = constant(tuple(2.0 ** (bits - 1) - 0.5 for bits in widths), torch.float32, codes.device)
        zero = rows.scale[..., 1].contiguous().view(torch.int8) / 8
        scale = e5m3.decode(rows.scale[..., 0]).to(dtype)
        return (codes - half + zero.unsqueeze(-2)).to(dtype) * scale.unsqueeze(-2)


_STEPS = "steps of Max 1960, Quantizing for Minimum Distortion"
_TIERS = f"kvbench: bits by reverse water-filling (Shannon 1959) over a key's channels; {_STEPS}"
tiers421_per_token_head = TiersPerTokenHead(
    "tiers421_per_token_head", 2, Tiers((4, 4, 2, 2, 2, 2, 1, 1)), "per_token_head", _TIERS
)
tiers4321_per_token_head = TiersPerTokenHead(
    "tiers4321_per_token_head", 2, Tiers((4, 4, 3, 3, 2, 2, 1, 1)), "per_token_head", _TIERS
)
tiers42_per_token_head = TiersPerTokenHead(
    "tiers42_per_token_head", 2, Tiers((4, 4, 2, 2, 2, 2, 2, 2)), "per_token_head", _TIERS
)
midrise2_per_token_head = MidrisePerTokenHead(
    "midrise2_per_token_head",
    2,
    Codebook((-1.5, -0.5, 0.5, 1.5)),
    "per_token_head",
    "uniform codes without a zero, their scale searched",
    default_rotation="hadamard",
)
tiers421_per_channel_128 = TiersPerChannel(
    "tiers421_per_channel_128", 2, Tiers((4, 4, 2, 2, 2, 2, 1, 1)), "per_channel", _TIERS, page_tokens=128
)
