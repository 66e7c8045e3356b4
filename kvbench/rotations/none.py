"""No rotation."""

from kvbench.rotations.base import Rotation

none = Rotation("none", source="values as they are")
