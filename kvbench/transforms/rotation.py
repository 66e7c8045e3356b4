"""What a rotation is: how rows are turned before they are quantized, and turned back.

One convention, written down here. With H the ±1 matrix of blocks of b = 2^m, and a = m // 2 (rounded down):

    a stored row    y  = 2^-a     H (signs ∘ x)          `rotate`          K and V, before quantization
    a query         q' = 2^-(m-a) H (signs ∘ q)          `rotate_query`    so that q'·y = q·x
    an output       o  = signs ∘ (2^-(m-a) H o')         `unrotate`        the inverse of `rotate`

Attention between the last two needs no extra factor. All factors are powers of two, so codes are those of the
unnormalised matrix and the seed's scales are ours times a power of two (`Rotation.exponent`): exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvbench.transforms.base import NOTHING, Lowered, Params, Transform

CPU = torch.device("cpu")
SEED = 0x9E3779B9  # of what is drawn at random: signs, matrices


@dataclass(frozen=True)
class Rotation(Transform):
    """An orthogonal map of the D values of a row, up to powers of two, the same for all layers and heads.

    A subclass says `block` and `signs`; one that is no Hadamard matrix writes the three maps itself.
    """

    def block(self, head_dim: int) -> int:
        """Size b of the blocks that are turned among themselves; 1 turns nothing."""
        return 1

    def signs(self, head_dim: int) -> Tensor | None:
        """[D] float32 of ±1 on the CPU, or None where no sign changes."""
        return None

    def exponent(self, head_dim: int) -> int:
        """a: stored rows are 2^-a times those of the unnormalised matrix."""
        return (self.block(head_dim).bit_length() - 1) // 2

    def rotate(self, x: Tensor) -> Tensor:
        """[..., D] rows as they are stored, from x: [..., D]; float32, or float64 where x is.

        Summed as a butterfly (neighbours first), so that the result is the same bits on every machine.
        """
        head_dim = x.shape[-1]
        block = self.block(head_dim)
        if block == 1:
            return x
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        signs = _signs(self, head_dim, y.dtype, y.device)
        if signs is not None:
            y = y * signs
        return butterfly(y, block) * 2.0 ** -self.exponent(head_dim)

    def rotate_query(self, q: Tensor) -> Tensor:
        """[..., D] queries for rotated keys, in q's dtype."""
        return self._times_matrix(q, transpose=False)

    def unrotate(self, o: Tensor) -> Tensor:
        """[..., D] attention outputs turned back, in o's dtype: the inverse of `rotate`."""
        return self._times_matrix(o, transpose=True)

    def _times_matrix(self, x: Tensor, transpose: bool) -> Tensor:
        head_dim = x.shape[-1]
        if self.block(head_dim) == 1:
            return x
        matrix = reader_matrix(self, head_dim, x.dtype, x.device)
        # rows are multiplied from the left: x @ Mᵀ is M applied to each
        return x @ (matrix if transpose else matrix.T)

    # ---- as a transform

    def apply(self, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
        return self.rotate(x)

    def query(self, q: Tensor, params: Params) -> Tensor:
        return self.rotate_query(q)

    def undo(self, o: Tensor, params: Params) -> Tensor:
        return self.unrotate(o)

    def lower(self, head_dim: int, params: Params = NOTHING) -> Lowered | None:
        maps = ("rotate", "rotate_query", "unrotate", "_times_matrix")
        if any(getattr(type(self), name) is not getattr(Rotation, name) for name in maps):
            return None  # it is not what blocks and signs say
        return Lowered(self.block(head_dim), self.exponent(head_dim), self.signs(head_dim))


@lru_cache(maxsize=16)  # asked for in every layer of every pass; a copy to a device would wait for the host
def _signs(rotation: Rotation, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`signs`, there."""
    with torch.inference_mode(False):
        signs = rotation.signs(head_dim)
        return None if signs is None else signs.to(device, dtype)


@lru_cache(maxsize=16)  # likewise
def reader_matrix(rotation: Rotation, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[D, D] M = 2^-(m-a) H diag(signs): queries become M q, outputs Mᵀ o."""
    block = rotation.block(head_dim)
    m = block.bit_length() - 1
    with torch.inference_mode(False):
        matrix = butterfly(torch.eye(head_dim, dtype=torch.float64), block) * 2.0 ** -(m - rotation.exponent(head_dim))
        signs = rotation.signs(head_dim)
        return (matrix if signs is None else matrix * signs.to(torch.float64)).to(device, dtype)


def butterfly(x: Tensor, block: int) -> Tensor:
    """[..., D] of x: [..., D]: each block of `block` values times the ±1 Sylvester matrix in natural order.

    Source: fast Walsh-Hadamard transform, Fino and Algazi 1976.
    """
    half = 1
    while half < block:
        pairs = x.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x


def largest_power_of_two(head_dim: int) -> int:
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim
