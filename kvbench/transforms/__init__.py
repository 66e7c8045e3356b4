"""Every rotation. The folder is walked: a new rotation is one new file, listed nowhere."""

from __future__ import annotations

from functools import cache

from kvbench.registry import walk
from kvbench.transforms.base import Rotation

__all__ = ["Rotation", "all_rotations"]


@cache
def all_rotations() -> dict[str, Rotation]:
    """Every rotation by name, `none` first."""
    return {
        rotation.name: rotation for rotation in sorted(walk(__name__, __path__, Rotation), key=lambda r: len(r.name))
    }
