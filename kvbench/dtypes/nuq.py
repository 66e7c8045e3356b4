"""KVQuant's codebooks: of keys by channels whose range was learned, of values by rows, and outliers in 16 bits.

KVQuant quantizes keys before their rotary embedding; a cache that is read as it is written has them after it, so the
transform `center` should come before, which takes off a channel's mean at each page of positions. Its outliers are
1 % of all values, as many a row as there are; here each row has as many, those that lie furthest out, 1 % of them or
one. Its codebooks are weighted by gradients of the loss; here a key's by what the calibration text's queries make of
an error in its channel, a value's by the row's range alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvbench.dtypes.base import Codebook, Dtype, Rows, elements, stored_as
from kvbench.dtypes.int2 import sum_by_halves
from kvbench.dtypes.turboquant import book
from kvbench.transforms.base import Params, Sample

SHARE = 100  # values of a row for each outlier
OUTLIER_BYTES = 3  # a place of 8 bits and a float16
MOST = 256  # places
TAIL = 0.005  # of a channel, beyond each end of its range
REACH = 2.5758293  # a unit Gaussian lies between minus and plus that but for its tails
BINS, ROUNDS = 4096, 100  # of the search of a codebook
SMALLEST = 2.0**-24  # half a range, of float16


def fitted(values: Tensor, weights: Tensor, start: tuple[float, ...]) -> Tensor:
    """[2^bits] float64 centroids of values from -1 to 1 by their weights, as Lloyd's steps find them from `start`.

    Values count as the middles of 4096 cells.
    """
    cells = ((values.double() + 1) * (BINS / 2)).floor().long().clamp(0, BINS - 1)
    mass = torch.zeros(BINS, dtype=torch.float64).index_add(0, cells.flatten(), weights.double().flatten())
    middle = (torch.arange(BINS, dtype=torch.float64) * 2 + 1) / BINS - 1
    centroids = torch.tensor(start, dtype=torch.float64)
    for _ in range(ROUNDS):
        own = torch.bucketize(middle, (centroids[1:] + centroids[:-1]) / 2)
        total = torch.zeros_like(centroids).index_add(0, own, mass)
        moved = torch.zeros_like(centroids).index_add(0, own, mass * middle) / total
        moved = torch.where(total > 0, moved, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


@dataclass(frozen=True)
class NonUniform(Dtype):
    """What both kinds share. centroids: the book as it was learned, of values between -1 and 1.

    Stored after the codes: of each outlier its place and its value.
    """

    centroids: Tensor | None = field(default=None, compare=False, repr=False)
    learns: ClassVar[bool] = True

    def bind(self, params: Params) -> Self:
        return replace(self, centroids=params["centroids"]) if params else self

    def check_head_dim(self, head_dim: int) -> None:
        super().check_head_dim(head_dim)
        if head_dim > MOST:
            raise ValueError(f"head_dim {head_dim} does not fit {self.name}: a place of 8 bits reaches to {MOST}")

    def word_bytes(self, head_dim: int) -> int:
        return super().code_bytes(head_dim)

    def code_bytes(self, head_dim: int) -> int:
        return self.word_bytes(head_dim) + OUTLIER_BYTES * outliers(head_dim)

    @property
    def book(self) -> tuple[float, ...]:
        """Centroids where none were learned."""
        assert isinstance(self.decode, Codebook)
        return self.decode.centroids

    def _table(self, like: Tensor) -> Tensor:
        """[2^bits] float32."""
        found = torch.tensor(self.book) if self.centroids is None else self.centroids
        return found.to(like.device, torch.float32)

    def _codes(self, x: Tensor, middle: Tensor, half: Tensor, places: Tensor, whole: Tensor) -> Tensor:
        """[..., code_bytes] uint8: the nearest centroids of (x - middle) / half, and what stands at these places."""
        table = self._table(x)
        z = ((x - middle) / half).contiguous()
        codes = torch.bucketize(z, (table[1:] + table[:-1]) / 2).masked_fill(~whole, 0)
        kept = x.gather(-1, places).to(torch.float16)
        kept = kept.masked_fill(~whole | ~kept.isfinite(), math.nan)
        beside = torch.cat([places.to(torch.uint8).unsqueeze(-1), kept.unsqueeze(-1).view(torch.uint8)], -1)
        return torch.cat([self.pack(codes.to(torch.uint8)), beside.flatten(-2)], -1)

    def _values(self, codes: Tensor, middle: Tensor, half: Tensor) -> Tensor:
        """[..., D] in middle's type."""
        head_dim = self._head_dim(codes.shape[-1])
        words = self.word_bytes(head_dim)
        index = self.unpack(codes[..., :words]).long()
        values = self._table(codes).to(middle.dtype)[index] * half + middle
        beside = codes[..., words:].unflatten(-1, (-1, OUTLIER_BYTES))
        kept = elements(beside[..., 1:], torch.float16).squeeze(-1)
        # rows of a page that were never written hold anything
        return values.scatter(-1, beside[..., 0].long().clamp_max(head_dim - 1), kept.to(middle.dtype))

    def _head_dim(self, code_bytes: int) -> int:
        return next(
            d for d in range(16, MOST + 1, 16) if d % self.head_dim_multiple == 0 and self.code_bytes(d) == code_bytes
        )


def outliers(head_dim: int) -> int:
    """Values of a row that are stored in 16 bits."""
    return -(-head_dim // SHARE)


def furthest(distance: Tensor) -> Tensor:
    """[..., n] places of the outliers, largest distance first, of equal ones the first."""
    # a few looks at a row are far sooner done than sorting it
    found = [distance.argmax(-1, keepdim=True)]
    for _ in range(outliers(distance.shape[-1]) - 1):
        distance = distance.scatter(-1, found[-1], -torch.inf)
        found.append(distance.argmax(-1, keepdim=True))
    return torch.cat(found, -1)


@dataclass(frozen=True)
class NonUniformPerChannel(NonUniform):
    """Keys: each channel's range, but for half a percent at each end, and a codebook for all of a layer's channels.

    low, high: [HKV, D], what was learned. Rows are [..., HKV, D].
    Learned: centroids, low, high; the centroids weigh a value by its channel's E[q²] times its range's square.
    """

    low: Tensor | None = field(default=None, compare=False, repr=False)
    high: Tensor | None = field(default=None, compare=False, repr=False)
    reads_queries: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        assert sample.queries is not None, "it reads queries"
        keys, queries = sample.keys[sample.later].double(), sample.queries[sample.later].double()
        beyond = int(TAIL * len(keys))
        channels = keys.movedim(0, -1).contiguous()
        low, high = (channels.kthvalue(place).values for place in (beyond + 1, len(keys) - beyond))
        middle, half = _range(low, high)
        weigh = queries.square().mean(0).unflatten(0, (keys.shape[1], -1)).mean(1) * half.square()  # [HKV, D]
        z = (keys - middle) / half
        inside = z.abs() <= 1
        centroids = fitted(z[inside], weigh.expand_as(z)[inside], self.book)
        return {"centroids": centroids.float(), "low": low.float(), "high": high.float()}

    def bind(self, params: Params) -> Self:
        bound = super().bind(params)
        return replace(bound, low=params["low"], high=params["high"]) if params else bound

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        middle, half = self._ends(x)
        whole = x.isfinite().all(-1, keepdim=True)
        places = furthest(((x - middle) / half).abs())
        return Rows(self._codes(x, middle, half, places, whole), None)

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        middle, half = (x.to(dtype) for x in self._ends(rows.codes))
        return self._values(rows.codes, middle, half)

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The middle and half the width of each channel's range, float32."""
        if self.low is None or self.high is None:
            return _range(*torch.tensor([-REACH, REACH], device=like.device))
        return _range(self.low.to(like.device), self.high.to(like.device))


@dataclass(frozen=True)
class NonUniformPerTokenHead(NonUniform):
    """Values: a row's range but for its outliers, and a codebook for all rows of a layer.

    Outliers are what lies furthest from the row's mean. The range's ends are stored as float16, and codes made with
    them. Learned: centroids, which weigh a value by its row's range squared.
    """

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.float16

    def scales_shape(self, head_dim: int) -> tuple[int, ...]:
        return (2,)

    def learn(self, sample: Sample) -> Params:
        rows = sample.keys.to(torch.float32)
        places, ends = self._parts(rows)
        middle, half = _range(*ends.double().unbind(-1))
        z = (rows.double() - middle.unsqueeze(-1)) / half.unsqueeze(-1)
        inside = torch.ones_like(z, dtype=torch.bool).scatter(-1, places, False) & z.isfinite()
        weigh = half.square().unsqueeze(-1).expand_as(z)
        return {"centroids": fitted(z[inside].clamp(-1, 1), weigh[inside], self.book).float()}

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        places, ends = self._parts(x)
        whole = ends.isfinite().all(-1, keepdim=True)
        middle, half = (end.unsqueeze(-1) for end in _range(*ends.float().unbind(-1)))
        codes = self._codes(x, middle, half, places, whole)
        return Rows(codes, ends.masked_fill(~whole, math.nan))

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        assert rows.scale is not None
        middle, half = (end.unsqueeze(-1) for end in _range(*rows.scale.to(dtype).unbind(-1)))
        return self._values(rows.codes, middle, half)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., n] places of outliers, and the ends of the rest [..., 2] float16; NaN where the row has NaN or ±inf."""
        mean = sum_by_halves(x) / x.shape[-1]
        places = furthest((x - mean.unsqueeze(-1)).abs())
        low = x.scatter(-1, places, torch.inf).amin(-1)
        high = x.scatter(-1, places, -torch.inf).amax(-1)
        broken = ~x.isfinite().all(-1)
        return places, stored_as(torch.float16, torch.stack([low, high], -1), broken.unsqueeze(-1))


def _range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The middle, and half the width."""
    return (low + high) / 2, ((high - low) / 2).clamp_min(SMALLEST)


_SOURCE = "KVQuant, https://arxiv.org/abs/2401.18079"


def _decode(bits: int) -> Codebook:
    return Codebook(tuple(centroid / REACH for centroid in book(bits)))


nuq2_per_channel, nuq3_per_channel, nuq4_per_channel = (
    NonUniformPerChannel(f"nuq{bits}_per_channel", bits, _decode(bits), "learned", _SOURCE + "; keys")
    for bits in (2, 3, 4)
)
nuq2_per_token_head, nuq3_per_token_head, nuq4_per_token_head = (
    NonUniformPerTokenHead(f"nuq{bits}_per_token_head", bits, _decode(bits), "per_token_head", _SOURCE + "; values")
    for bits in (2, 3, 4)
)
