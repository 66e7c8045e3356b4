"""Blocks of neighbouring channels with a scale each: the formats of OCP's MX, of NVIDIA and of llama.cpp.

A format is its element (how a code decodes), its block (how many channels) and its scale (float16, e4m3 or e8m0).
A subclass says which scale a block gets and how its values are rounded; what is stored and what is broken is said once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes.base import Affine, Cast, Codebook, Dtype, Rows, constant, over, round_half_away, stored_as
from kvbench.dtypes.fp8 import e4m3
from kvbench.dtypes.int2 import sum_by_halves

E8M0_BIAS = 127
E2M1_MAX = 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
IQ4_NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
IQ4_NL_SMALLEST = 1e-15  # of a block's largest magnitude: below, it is zeros


def e2m1(x: Tensor) -> Tensor:
    """[...] uint8 codes of the nearest e2m1 numbers, ties to the even code, saturated at ±6. A zero keeps its sign."""
    size = x.abs().clamp(max=E2M1_MAX)
    # steps of 1/2 up to 2, of 1 up to 4, of 2 from there on
    codes = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return (codes + 8 * x.signbit()).to(torch.uint8)


def inverse(scale: Tensor) -> Tensor:
    """[..., 1] 1 / scale [...], and 0 of 0."""
    return torch.where(scale == 0, 0, 1 / scale).unsqueeze(-1)


def farthest(blocks: Tensor) -> Tensor:
    """[...] of blocks [..., n]: the value of the largest magnitude, with its sign; of equal ones the first."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True)
class Blocks(Dtype):
    """`group_size` neighbouring channels, a block, share a scale of `scale_type`.

    A block with NaN or ±inf, or whose scale or minimum is no number of that type, decodes to NaN.
    """

    scale_type: torch.dtype = torch.float16

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.uint8 if self.scale_type.itemsize == 1 else self.scale_type

    def clean_scale(self, scale: Tensor) -> Tensor:
        return scale.view(self.scale_type).to(torch.float32)

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes of blocks [..., n, group_size] (float32, finite), and float32 [..., n]: scales, and minima if any."""
        raise NotImplementedError

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        blocks = x.to(torch.float32).unflatten(-1, (-1, self.group_size))
        whole = blocks.isfinite().all(-1)
        codes, *numbers = self.encode(blocks.masked_fill(~whole.unsqueeze(-1), 0), tensor_scale)
        for number in numbers:
            whole = whole & number.to(self.scale_type).to(torch.float32).isfinite()
        stored = [stored_as(self.scale_type, number, ~whole).view(self.scale_storage) for number in numbers]
        packed = self.pack(codes.masked_fill(~whole.unsqueeze(-1), 0).flatten(-2))
        return Rows(packed, torch.stack(stored, -1) if len(stored) > 1 else stored[0])


@dataclass(frozen=True)
class MicroScaling(Blocks):
    """The scale is the power of two that brings a block's largest magnitude into the element's highest binade.

    2^(floor(log2(largest)) - emax), with emax 2 of e2m1 and 8 of e4m3, and at least 2^-127, which a block of zeros has.
    Elements round to nearest, ties to even, and saturate at 6 and 448: the binades end at 8 and 512.
    """

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        four = isinstance(self.decode, Codebook)
        largest = blocks.abs().amax(-1)
        exponent = largest.frexp().exponent - 1 - (2 if four else 8)
        exponent = exponent.clamp_min(-E8M0_BIAS).masked_fill(largest == 0, -E8M0_BIAS)
        scale = (exponent + E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32)
        scaled = blocks / scale.unsqueeze(-1)
        if four:
            return e2m1(scaled), scale
        return e4m3(scaled).view(torch.uint8), scale


@dataclass(frozen=True)
class NvFp4(Blocks):
    """e2m1 in blocks of 16 whose largest magnitude becomes 6: the e4m3 scale is largest / (6 t), t of the whole tensor.

    The tensor is a layer's K, or its V, as in vLLM and TensorRT-LLM, and t is 1, as there without calibration: a cache
    grows, so its largest value is not known when the first row is written. Scales saturate at 448, so blocks beyond
    2688 t are clipped; below 6 · 2^-6 t they are subnormal, and below 6 · 2^-10 t zero, as then the block is. With t
    from a layer's own largest value, or from a row's, the keys and values of SmolLM2-135M, Gemma-3-270M and
    Qwen2.5-Coder-0.5B err by less than 2 % less.
    """

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        t = blocks.new_ones(()) if tensor_scale is None else tensor_scale
        scale = e4m3(blocks.abs().amax(-1) / (E2M1_MAX * t)).to(torch.float32)
        step = (scale * t).unsqueeze(-1)
        return e2m1((blocks / step).masked_fill(step == 0, 0)), scale


@dataclass(frozen=True)
class Q8(Blocks):
    """The largest magnitude of a block becomes 127; halves round away from zero."""

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        scale = over(blocks.abs().amax(-1), 127)
        return round_half_away(blocks * inverse(scale)).to(torch.int8), scale


@dataclass(frozen=True)
class QMiddle(Blocks):
    """The value of the largest magnitude becomes the lowest code's, whatever its sign; halves round up.

    Of 4 bits that is -8, so the other end is 7.
    """

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        middle = 1 << (self.code_bits - 1)
        scale = farthest(blocks) / -middle
        return (blocks * inverse(scale) + (middle + 0.5)).clamp(max=2 * middle - 1).to(torch.uint8), scale


@dataclass(frozen=True)
class QMinimum(Blocks):
    """Equal steps from a block's minimum to its maximum; codes are made before step and minimum become float16."""

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        levels = (1 << self.code_bits) - 1
        low = blocks.amin(-1)
        scale = over(blocks.amax(-1) - low, levels)
        return ((blocks - low.unsqueeze(-1)) * inverse(scale) + 0.5).clamp(max=levels).to(torch.uint8), scale, low


@dataclass(frozen=True)
class Iq4(Blocks):
    """The value of the largest magnitude becomes -127, whatever its sign; then the scale that suits the codes best.

    That is Σ w c x / Σ w c² of values x with codes that decode to c, weighted with w = x²; halves round up.
    """

    def encode(self, blocks: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
        levels = constant(IQ4_NL, blocks.dtype, blocks.device)
        first = over(farthest(blocks), IQ4_NL[0])
        codes = torch.bucketize(blocks * inverse(first), (levels[1:] + levels[:-1]) / 2, out_int32=True, right=True)
        weighted = blocks * blocks * levels[codes]
        fitted = sum_by_halves(weighted * blocks) / sum_by_halves(weighted * levels[codes])
        zeros = blocks.abs().amax(-1) < IQ4_NL_SMALLEST
        return codes.masked_fill(zeros.unsqueeze(-1), 0).to(torch.uint8), fitted.masked_fill(zeros, 0)


_MX = "OCP Microscaling Formats (MX) 1.0, 2023; https://arxiv.org/abs/2310.10537"
mxfp8 = MicroScaling(
    "mxfp8", 8, Cast(torch.float8_e4m3fn), "per_group", _MX, group_size=32, scale_type=torch.float8_e8m0fnu
)
mxfp4 = MicroScaling("mxfp4", 4, Codebook(E2M1), "per_group", _MX, group_size=32, scale_type=torch.float8_e8m0fnu)
nvfp4 = NvFp4(
    "nvfp4",
    4,
    Codebook(E2M1),
    "per_group",
    "NVFP4, https://arxiv.org/abs/2509.25149; vLLM's KV cache, https://github.com/vllm-project/vllm/pull/40177",
    group_size=16,
    tensor_scaled=True,
    scale_type=torch.float8_e4m3fn,
)

_GGML = "llama.cpp's cache type, ggml-quants.c of https://github.com/ggml-org/ggml"
q8_0 = Q8("q8_0", 8, Affine("none"), "per_group", _GGML, group_size=32)
q5_1 = QMinimum("q5_1", 5, Affine("minimum"), "per_group", _GGML, group_size=32)
q4_1 = QMinimum("q4_1", 4, Affine("minimum"), "per_group", _GGML, group_size=32)
q5_0 = QMiddle("q5_0", 5, Codebook(tuple(map(float, range(-16, 16)))), "per_group", _GGML, group_size=32)
q4_0 = QMiddle("q4_0", 4, Codebook(tuple(map(float, range(-8, 8)))), "per_group", _GGML, group_size=32)
iq4_nl = Iq4("iq4_nl", 4, Codebook(IQ4_NL), "per_group", _GGML, group_size=32)
