"""Every transform. The folder is walked: a new transform is one new file, listed nowhere."""

from __future__ import annotations

from functools import cache

from kvbench.registry import walk
from kvbench.transforms.base import Lowered, Params, Rope, Sample, Transform
from kvbench.transforms.rotation import Rotation

__all__ = ["Lowered", "Params", "Rope", "Rotation", "Sample", "Transform", "all_rotations", "all_transforms"]


@cache
def all_transforms() -> dict[str, Transform]:
    """Every transform by name: rotations first, `none` before all."""
    found = sorted(walk(__name__, __path__, Transform), key=lambda t: (not isinstance(t, Rotation), len(t.name)))
    return {transform.name: transform for transform in found}


@cache
def all_rotations() -> dict[str, Rotation]:
    """The transforms that turn rows and learn nothing, by name."""
    return {name: transform for name, transform in all_transforms().items() if isinstance(transform, Rotation)}
