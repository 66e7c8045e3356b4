"""Every KV-cache dtype. The folder is walked: a new dtype is one new file, listed nowhere."""

from __future__ import annotations

from functools import cache

from kvbench.dtypes.base import Affine, Cast, Codebook, Dtype, Part, Rows, Sketch, Tiers, Trellis
from kvbench.registry import walk

__all__ = ["Affine", "Cast", "Codebook", "Dtype", "Part", "Rows", "Sketch", "Tiers", "Trellis", "all_dtypes"]


@cache
def all_dtypes() -> dict[str, Dtype]:
    """Every dtype by name, from most bits to fewest."""
    found = walk(__name__, __path__, Dtype)
    return {dtype.name: dtype for dtype in sorted(found, key=lambda d: (-d.code_bits, d.name))}
