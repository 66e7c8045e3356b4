"""What a KV-cache dtype is: its layout as data, its generic decoding, and the byte layout of the seed.

One **row** is the D values of one token and one head. A quantized row is its packed codes and, for dtypes that
scale each row, one float32. A dtype whose scales are shared by the tokens of a page quantizes the page whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from kvbench.transforms.base import Params, Sample

SCALE_BYTES = 4  # of a float32 scale
# of NaN, in the types that scales are stored in
NAN_BITS = {torch.float16: 0x7E00, torch.float8_e4m3fn: 0x7F, torch.float8_e8m0fnu: 0xFF}


@dataclass(frozen=True)
class Cast:
    """A code is the value's bits in `storage`; it decodes to `code * scale` (or to the code where there is no scale).

    `storage` is None only for `auto`, until `Dtype.resolve` names the model's own dtype.
    """

    storage: torch.dtype | None


@dataclass(frozen=True)
class Affine:
    """A code is an integer; it decodes to `(code - zero) * scale`, or to `code * scale + minimum`.

    zero: "none" (signed codes), or "in_scale" (unsigned codes; `zero` is the low `code_bits` bits of the float32
    scale's bit pattern, and the scale is that pattern with those bits cleared), or "minimum" (unsigned codes; what is
    stored as a scale is two numbers, the scale and the minimum).
    """

    zero: Literal["none", "in_scale", "minimum"]


@dataclass(frozen=True)
class Codebook:
    """A code is an index; it decodes to `centroids[code] * scale`."""

    centroids: tuple[float, ...]


@dataclass(frozen=True)
class Sketch:
    """A code's upper bits are an index of `centroids`; its lowest is a sign of a projection of what they leave."""

    centroids: tuple[float, ...]


# of the uniform code of so many bits that suits a unit Gaussian best (Max 1960)
STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}


@dataclass(frozen=True)
class Field:
    """`bits` bits of a slice's codes, from `bit` on, that lie in a word from bit `place` on."""

    slice: int
    bit: int
    bits: int
    place: int


@dataclass(frozen=True)
class Tiers:
    """A row is eight equal slices of channels; slice i has codes of `widths[i]` bits.

    A code decodes to `(code - 2^(bits-1) + 1/2) * STEPS[bits] * scale`.
    """

    widths: tuple[int, ...]

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """What a word of 16 bits holds."""
        return self._fields[0]

    @cached_property
    def rest(self) -> tuple[Field, ...]:
        """What follows the words, a bit a channel."""
        return self._fields[1]

    @cached_property
    def _fields(self) -> tuple[tuple[Field, ...], tuple[Field, ...]]:
        words: list[Field] = []
        rest: list[Field] = []
        place = 0
        for index, width in enumerate(self.widths):
            inside = min(width - width % 2 if width > 1 else 1, 16 - place)
            if inside:
                words.append(Field(index, 0, inside, place))
            place += inside
            rest += [Field(index, bit, 1, 0) for bit in range(inside, width)]
        if len(self.widths) != 8 or place != 16:
            raise ValueError(f"tiers of {self.widths} bits do not fill words of 16 bits")
        return tuple(words), tuple(rest)

    def by_channel(self, head_dim: int) -> tuple[int, ...]:
        """Bits of each channel's code."""
        return tuple(width for width in self.widths for _ in range(head_dim // len(self.widths)))


@dataclass(frozen=True)
class Part:
    """A slice of a row's channels, `eighths` of them, with codes of `bits` bits.

    A window w of L bits is the level l = (2 (multiplier * w mod 2^n) + 1) / 2^n - 1 for n = L + bits, and its value is
    the sum of coefficient * l * |l|^exponent over `curve`, rounded to a whole number. An error counts `weight` times.
    """

    bits: int
    multiplier: int
    curve: tuple[tuple[int, int], ...]
    eighths: int = 8
    weight: int = 1

    def values(self, state_bits: int) -> tuple[int, ...]:
        """Of each window; computed in whole numbers, so the same on every machine."""
        levels = 1 << (state_bits + self.bits)
        top = max(exponent for exponent, _ in self.curve)
        found = []
        for window in range(1 << state_bits):
            level = 2 * (self.multiplier * window % levels) + 1 - levels
            size = abs(level)
            # over levels^(top + 1)
            total = sum(c * size ** (exponent + 1) * levels ** (top - exponent) for exponent, c in self.curve)
            whole = levels ** (top + 1)
            value = (2 * total + whole) // (2 * whole)
            found.append(value if level > 0 else -value)
        return tuple(found)


@dataclass(frozen=True)
class Trellis:
    """A row's codes are one string of bits; a code ends a window of `state_bits` of them, which is `value * scale`.

    parts: of the channels in their order, with what a window decodes to in each.
    """

    state_bits: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Rows:
    """Quantized rows; of a dtype that quantizes pages, [..., S] rows of whole pages.

    codes: [..., code_bytes] uint8, packed as `Dtype.pack` says.
    scale: [..., *scales_shape] of the dtype's `scale_storage`, for each row, or for each page where those are
        quantized; None where the dtype has no scale a row.
    """

    codes: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Dtype:
    """How the rows of K or V become bytes. A subclass adds `quantize`; everything else follows from the fields.

    code_bits: bits of one code, without the scale's share; of tiers, the mean, rounded down.
    granularity: what shares a scale: nothing ("none"), one layer's K or V ("per_tensor"), one row ("per_token_head"),
        `group_size` neighbouring channels of a row ("per_group"), a channel of `page_tokens` tokens ("per_channel");
        or a channel of a layer has one that was learned ("learned"), of which rows hold nothing.
    page_tokens: of a page that is quantized whole; 0 where every row is by itself.
    word_bits: codes are packed into little-endian words of this many bits; of 3, 5, 6 and 7 bits in `planes`.
    tensor_scaled: beside what granularity says, one float32 of a layer's K or V multiplies all scales.
    default_rotation: the rotation that the dtype's origin runs it with.
    source: where the definition comes from.
    """

    name: str
    code_bits: int
    decode: Cast | Affine | Codebook | Sketch | Tiers | Trellis
    granularity: Literal["none", "per_tensor", "per_token_head", "per_group", "per_channel", "learned"]
    source: str
    default_rotation: str = "none"
    word_bits: int = 16
    group_size: int = 0
    page_tokens: int = 0
    tensor_scaled: bool = False
    learns: ClassVar[bool] = False  # from a calibration text
    reads_queries: ClassVar[bool] = False  # and from the queries there
    reads_anywhere: ClassVar[bool] = False  # turned to any of the model's positions, few of which the text reaches

    def learn(self, sample: Sample) -> Params:
        """What it needs to know of a layer, from its rows as the transforms left them."""
        return {}

    def bind(self, params: Params) -> Self:
        """This dtype as it stores a layer of which it learned this; itself where that is nothing."""
        return self

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        """Quantized rows of x: [..., D], or pages of x: [..., S, D] with S = page_tokens; any floating dtype.

        tensor_scale: scalar float32, where `has_tensor_scale`; 1.0 when not given.

        What shares a scale with NaN or ±inf decodes to NaN throughout (dtypes that scale each row or group), so that a
        broken model stays visible; see each dtype for the others.
        """
        raise NotImplementedError

    # ---- sizes

    @property
    def has_tensor_scale(self) -> bool:
        """Whether a layer's K, and its V, has one float32 for all of it."""
        return self.tensor_scaled or self.granularity == "per_tensor"

    @property
    def head_dim_multiple(self) -> int:
        """What head_dim must be a multiple of, for rows to fill whole words and groups."""
        words = max(1, self.word_bits // self.planes[-1]) if self.code_bits < 8 else 1
        return math.lcm(words, self.group_size or 1)

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of a code that are packed together, from the upper ones down: 4, 2 or 1; none straddles words."""
        return tuple(bits for bits in (4, 2, 1) if self.code_bits & bits)

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError where rows of head_dim values do not fill whole words."""
        multiple = self.head_dim_multiple
        if head_dim <= 0 or head_dim % multiple:
            raise ValueError(
                f"head_dim {head_dim} does not fit {self.name}: it needs a multiple of {multiple}; "
                f"use a dtype with a scale a row and 8 or more bits for this model"
            )

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of one row's codes."""
        self.check_head_dim(head_dim)
        return head_dim * self.code_bits // 8

    def word_bytes(self, head_dim: int) -> int:
        """Those of them that a cache keeps in one piece of memory; the rest of a row's lie in another."""
        return self.code_bytes(head_dim)

    @property
    def scale_storage(self) -> torch.dtype:
        """The type of stored scales."""
        return torch.float32

    def scales_shape(self, head_dim: int) -> tuple[int, ...] | None:
        """The shape of the scales of a row, or of a page where those are quantized; None where a row has none.

        () for one number, (groups,) or (D,); and a last 2 where a minimum is stored too.
        """
        numbers = (2,) if self.decode == Affine("minimum") else ()
        match self.granularity:
            case "per_group":
                return (head_dim // self.group_size, *numbers)
            case "per_channel":
                return (head_dim, *numbers)
            case "per_token_head":
                return numbers
        return None

    def row_bytes(self, head_dim: int) -> float:
        """Bytes of one row: its codes and its scales, of those of a page its share."""
        scales = self.scales_shape(head_dim)
        shared = 0 if scales is None else self.scale_storage.itemsize * math.prod(scales)
        rows = self.page_tokens or 1
        return self.code_bytes(head_dim) + (shared / rows if shared % rows else shared // rows)

    def bits_per_value(self, head_dim: int) -> float:
        """True bits a value, every byte of the row counted.

        A scale a tensor is 4 bytes a layer's K or V, counted in the cache's `nbytes`.
        """
        return 8 * self.row_bytes(head_dim) / head_dim

    def resolve(self, model_dtype: torch.dtype) -> Self:
        """This dtype for a model that computes in `model_dtype`: only `auto` differs from itself."""
        if self.decode == Cast(None):
            return replace(self, decode=Cast(model_dtype), code_bits=8 * model_dtype.itemsize)
        return self

    def stored(self, x: Tensor) -> Tensor:
        """[T, H, D] float32, what rows x [T, H, D] of a sequence are read as; those of no whole page, as they are."""
        if not self.page_tokens:
            return self.dequantize(self.quantize(x))
        whole = len(x) // self.page_tokens * self.page_tokens
        pages = x[:whole].unflatten(0, (-1, self.page_tokens)).transpose(1, 2)  # [pages, H, S, D]
        read = self.dequantize(self.quantize(pages)).transpose(1, 2).flatten(0, 1)
        return torch.cat([read, x[whole:].to(read.dtype)])

    # ---- packing

    def pack(self, codes: Tensor) -> Tensor:
        """[..., D] integer codes to [..., code_bytes] uint8.

        A row is W = D * code_bits / word_bits words. Word j holds the codes of channels j, j+W, j+2W, ... from its low
        bits up, so that the codes at one bit position of all words (a *stream*) are a contiguous slice of channels: a
        kernel multiplies each stream with a slice of Q, and never interleaves. Planes are packed so one after another.
        """
        if self.code_bits >= 8:
            return codes.contiguous().view(torch.uint8)
        codes, below = codes.to(torch.int64), self.code_bits
        word_dtype = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[self.word_bits]
        parts = []
        for bits in self.planes:
            below -= bits
            per_word = self.word_bits // bits
            streams = ((codes >> below) & ((1 << bits) - 1)).unflatten(-1, (per_word, codes.shape[-1] // per_word))
            shifts = torch.arange(0, self.word_bits, bits, device=codes.device).unsqueeze(-1)
            parts.append((streams << shifts).sum(-2).to(word_dtype))  # [..., W]
        words = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return words.contiguous().view(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """[..., code_bytes] uint8 back to [..., D] integer codes (int32), the inverse of `pack`."""
        if self.code_bits >= 8:
            return (packed.view(torch.int8) if self.decode == Affine("none") else packed).to(torch.int32)
        word_dtype = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[self.word_bits]
        words = elements(packed, word_dtype).to(torch.int32)
        sizes = [words.shape[-1] * bits // self.code_bits for bits in self.planes]
        codes: Tensor | None = None
        for bits, own in zip(self.planes, words.split(sizes, -1), strict=True):
            mask = (1 << bits) - 1
            part = torch.cat([(own >> shift) & mask for shift in range(0, self.word_bits, bits)], dim=-1)
            codes = part if codes is None else codes << bits | part
        assert codes is not None
        return codes

    # ---- decoding

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        """[..., D] values of the rows, computed in `dtype`."""
        if isinstance(self.decode, Cast):
            storage = self.decode.storage
            assert storage is not None, "auto is resolved before it is used"
            values = elements(rows.codes, storage).to(dtype)
        elif isinstance(self.decode, Codebook):
            table = constant(self.decode.centroids, dtype, rows.codes.device)
            values = table[self.unpack(rows.codes)]
        else:
            assert isinstance(self.decode, Affine), "other forms have a `dequantize` of their own"
            values = self.unpack(rows.codes).to(dtype)
            if self.decode.zero == "in_scale":
                assert rows.scale is not None
                values -= self._by_channel(self.zero_point(rows.scale))
        if rows.scale is not None and self.decode == Affine("minimum"):
            scale, minimum = (self._by_channel(x) for x in rows.scale.to(dtype).unbind(-1))
            return values * scale + minimum
        if rows.scale is not None:
            scale = self.clean_scale(rows.scale).to(dtype)
            return values * self._by_channel(scale if tensor_scale is None else scale * tensor_scale.to(dtype))
        if tensor_scale is not None:
            return values * tensor_scale.to(dtype)
        return values

    def _by_channel(self, scales: Tensor) -> Tensor:
        """[..., D], or [..., 1] where a row has one, or [..., 1, D] of a page: what belongs to each channel."""
        if self.granularity == "per_group":
            return scales.repeat_interleave(self.group_size, -1)
        return scales.unsqueeze(-2 if self.page_tokens else -1)

    def zero_point(self, scale: Tensor) -> Tensor:
        """[...] int32 zero-points hidden in the low `code_bits` bits of float32 scales."""
        return scale.contiguous().view(torch.int32) & ((1 << self.code_bits) - 1)

    def clean_scale(self, scale: Tensor) -> Tensor:
        """[...] float32 scales of stored ones, without what else is stored in them."""
        if self.decode != Affine("in_scale"):
            return scale
        return (scale.contiguous().view(torch.int32) & ~((1 << self.code_bits) - 1)).view(torch.float32)


def round_half_away(x: Tensor) -> Tensor:
    """Nearest integers, halves away from zero: sign(x) * floor(|x| + 0.5), evaluated in x's dtype."""
    return torch.copysign((x.abs() + 0.5).floor(), x)


@lru_cache(maxsize=64)  # asked for in every layer of every pass; a copy to a device would wait for the host
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n] of these values, there."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def elements(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., n] what bytes [..., n * size] are as elements of `dtype`, wherever they lie."""
    packed, size = packed.contiguous(), dtype.itemsize
    # a row alone counts as contiguous, however far the next one would be
    if packed.storage_offset() % size or any(stride % size for stride in packed.stride()[:-1]):
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(dtype)


def over(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once: by a number alone, torch multiplies with its rounded inverse on a GPU."""
    return x / x.new_full((), divisor)


def stored_as(dtype: torch.dtype, x: Tensor, broken: Tensor) -> Tensor:
    """x as `dtype`, NaN where `broken`: of one pattern everywhere, while casts on a GPU have another."""
    integer = torch.uint8 if dtype.itemsize == 1 else torch.int16
    return x.to(dtype).view(integer).masked_fill(broken, NAN_BITS[dtype]).view(dtype)


def mark_broken(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., D] and scales [...] in which every row whose scale is not finite is (0, NaN)."""
    broken = ~scale.isfinite()
    # a look is cheap on a CPU alone
    if broken.device.type == "cpu" and not bool(broken.any()):
        return codes, scale
    return codes.masked_fill(broken.unsqueeze(-1), 0), scale.masked_fill(broken, math.nan)
