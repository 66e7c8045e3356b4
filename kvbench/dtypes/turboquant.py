"""TurboQuant: a row turned at random, its norm, and a fixed codebook for each channel; with a sketch of what is left.

On a sphere a coordinate that was turned at random has a Beta distribution, times sqrt(D) a unit Gaussian's for large D;
the codebook is the one of Lloyd and Max for that limit, the same for every head_dim, as the paper's own examples and
serving engines have it. The paper stores norms "in floating-point precision": here a float16 a row, and one more for
the norm of what the sketch is of. Its split into channels of more and of fewer bits (2.5 and 3.5) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvbench.dtypes.base import Codebook, Dtype, Rows, Sketch, constant, over
from kvbench.dtypes.int2 import LARGE, SHRINK, sum_of_squares
from kvbench.transforms.rotation import CPU, SEED

GRID = 2.0**16  # a projection's entries are multiples of its inverse, so that their sums are exact in float64

# the positive half of each book, by bits (Max 1960)
HALVES = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}


def book(bits: int) -> tuple[float, ...]:
    """The centroids of a unit Gaussian in 2^bits cells, in ascending order."""
    return tuple(sign * c for sign, half in ((-1, HALVES[bits][::-1]), (1, HALVES[bits])) for c in half)


@dataclass(frozen=True)
class TurboQuantMse(Dtype):
    """Each row in units of its norm over sqrt(D), and of each channel the nearest centroid of a unit Gaussian.

    Stored: codes, and norm / sqrt(D) as float16; codes are made with the norm before it is rounded. A value midway
    between two centroids takes the lower one. A row whose norm is none decodes to NaN.
    """

    @property
    def scale_storage(self) -> torch.dtype:
        return torch.float16

    @property
    def centroids(self) -> tuple[float, ...]:
        """Of the codes."""
        assert isinstance(self.decode, Codebook | Sketch)
        return self.decode.centroids

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        codes, scale = self._nearest(x)
        whole = scale.isfinite()
        codes = codes.masked_fill(~whole.unsqueeze(-1), 0)
        return Rows(self.pack(codes.to(torch.uint8)), scale.masked_fill(~whole, math.nan))

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] int64 indices of centroids, and [...] float16 scales."""
        shrink = torch.where(x.abs().amax(-1) >= LARGE, SHRINK, 1.0)
        # by way of float64, since torch's float32 square root on CPUs is not always the nearest value
        root = sum_of_squares(x * shrink.unsqueeze(-1)).double().sqrt().float() / shrink
        scale = over(root, math.sqrt(x.shape[-1]))
        book = constant(self.centroids, torch.float32, x.device)
        z = x * torch.where(scale > 0, 1 / scale, 0).unsqueeze(-1)
        codes = torch.bucketize(z.contiguous(), (book[1:] + book[:-1]) / 2)
        return codes, scale.to(torch.float16)


@dataclass(frozen=True)
class TurboQuantProd(TurboQuantMse):
    """TurboQuantMse with a bit less, and of what it leaves of a row, r, the norm and a bit a channel: sign(S r).

    S is one D x D matrix of Gaussian values; r is read as sqrt(pi/2)/D |r| S' sign(S r), so that products with
    queries are right in the mean over S (QJL). r is of the row as it is read back, its norm a float16.
    """

    def scales_shape(self, head_dim: int) -> tuple[int, ...]:
        return (2,)

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        x = x.to(torch.float32)
        codes, scale = self._nearest(x)
        left = x.double() - self._centre(codes, scale)
        norm = left.square().sum(-1).sqrt().to(torch.float16)
        signs = left @ projection(x.shape[-1], x.device).T >= 0
        stored = torch.stack([scale, norm], -1)
        whole = stored.isfinite().all(-1, keepdim=True)
        codes = (codes << 1 | signs).masked_fill(~whole, 0)
        return Rows(self.pack(codes.to(torch.uint8)), stored.masked_fill(~whole, math.nan))

    def dequantize(self, rows: Rows, dtype: torch.dtype = torch.float32, tensor_scale: Tensor | None = None) -> Tensor:
        assert rows.scale is not None
        codes = self.unpack(rows.codes).to(torch.int64)
        scale, norm = rows.scale.double().unbind(-1)
        head_dim = codes.shape[-1]
        sketch = ((codes & 1) * 2 - 1).double() @ projection(head_dim, codes.device)
        sketch *= (math.sqrt(math.pi / 2) / head_dim * norm).unsqueeze(-1)
        return (self._centre(codes >> 1, scale) + sketch).to(dtype)

    def _centre(self, codes: Tensor, scale: Tensor) -> Tensor:
        """[..., D] float64, what the upper bits alone are read as."""
        book = constant(self.centroids, torch.float64, codes.device)
        return book[codes] * scale.double().unsqueeze(-1)


@lru_cache(maxsize=16)
def projection(head_dim: int, device: torch.device = CPU) -> Tensor:
    """[D, D] float64: S, drawn on the CPU."""
    generator = torch.Generator("cpu").manual_seed(SEED + 1)
    drawn = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    with torch.inference_mode(False):
        return ((drawn * GRID).round() / GRID).to(device)


_SOURCE = "TurboQuant, https://arxiv.org/abs/2504.19874"


def _mse(bits: int) -> TurboQuantMse:
    return TurboQuantMse(
        f"turboquant{bits}_mse",
        bits,
        Codebook(book(bits)),
        "per_token_head",
        f"{_SOURCE}, algorithm 1; Lloyd 1982, Max 1960",
        default_rotation="random_rotation",
    )


def _prod(bits: int) -> TurboQuantProd:
    return TurboQuantProd(
        f"turboquant{bits}_prod",
        bits,
        Sketch(book(bits - 1)),
        "per_token_head",
        f"{_SOURCE}, algorithm 2; QJL, https://arxiv.org/abs/2406.03482",
        default_rotation="random_rotation",
    )


turboquant2_mse, turboquant3_mse, turboquant4_mse = map(_mse, (2, 3, 4))
turboquant2_prod, turboquant3_prod, turboquant4_prod = map(_prod, (2, 3, 4))
