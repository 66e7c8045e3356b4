"""The Hadamard rotation: spreads a few large channels over all channels of their block."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.transforms.rotation import Rotation, largest_power_of_two


@dataclass(frozen=True)
class Hadamard(Rotation):
    """The ±1 Sylvester matrix; where D is no power of two, one block for each largest power of two that divides it."""

    def block(self, head_dim: int) -> int:
        return largest_power_of_two(head_dim)


hadamard = Hadamard("hadamard", source="QuaRot, https://arxiv.org/abs/2404.00456")
