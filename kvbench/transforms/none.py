"""No rotation."""

from kvbench.transforms.base import Rotation

none = Rotation("none", source="values as they are")
