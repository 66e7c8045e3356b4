"""No rotation."""

from kvbench.transforms.rotation import Rotation

none = Rotation("none", source="values as they are")
