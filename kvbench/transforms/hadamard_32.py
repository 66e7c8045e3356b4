"""The Hadamard rotation of blocks of 32 channels, each by itself."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.transforms.rotation import Rotation, largest_power_of_two


@dataclass(frozen=True)
class Hadamard32(Rotation):
    """The ±1 Sylvester matrix of 32 for each 32 channels; a smaller one where D is no multiple of 32."""

    def block(self, head_dim: int) -> int:
        return min(32, largest_power_of_two(head_dim))


hadamard_32 = Hadamard32(
    "hadamard_32", source="exllamav3's quantized cache, https://github.com/turboderp-org/exllamav3"
)
