"""A random rotation: a matrix drawn evenly from all orthogonal ones, of which every row of every head is turned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvbench.transforms.rotation import CPU, SEED, Rotation


@dataclass(frozen=True)
class RandomRotation(Rotation):
    """One matrix for all layers and heads: Q of the QR decomposition of a matrix of Gaussian values.

    R's diagonal is made positive, for then Q is evenly distributed (Mezzadri 2007). Products are summed in float64.
    """

    def block(self, head_dim: int) -> int:
        return head_dim

    def exponent(self, head_dim: int) -> int:
        return 0

    def rotate(self, x: Tensor) -> Tensor:
        return _turned(x, orthogonal(x.shape[-1], x.device).T).to(torch.promote_types(x.dtype, torch.float32))

    def rotate_query(self, q: Tensor) -> Tensor:
        return _turned(q, orthogonal(q.shape[-1], q.device).T).to(q.dtype)

    def unrotate(self, o: Tensor) -> Tensor:
        return _turned(o, orthogonal(o.shape[-1], o.device)).to(o.dtype)


def _turned(x: Tensor, matrix: Tensor) -> Tensor:
    return x.to(torch.float64) @ matrix


@lru_cache(maxsize=16)
def orthogonal(head_dim: int, device: torch.device = CPU) -> Tensor:
    """[D, D] float64, drawn on the CPU."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64))
    with torch.inference_mode(False):
        turned: Tensor = (q * r.diagonal().sign()).to(device)
    return turned


random_rotation = RandomRotation("random_rotation", source="TurboQuant, https://arxiv.org/abs/2504.19874, algorithm 1")
