"""The Hadamard rotation: spreads a few large channels over all channels of their block."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.transforms.rotation import Rotation, largest_power_of_two


@dataclass(frozen=True)
class Hadamard(Rotation):
    """The ±1 Sylvester matrix, one block for each largest power of two that divides D, and is at most `widest`."""

    widest: int = 0

    def block(self, head_dim: int) -> int:
        block = largest_power_of_two(head_dim)
        return min(block, self.widest or block)


hadamard = Hadamard("hadamard", source="QuaRot, https://arxiv.org/abs/2404.00456")
# blocks of 64 channels, each by itself, and of 32
hadamard_64 = Hadamard(
    "hadamard_64", source="llama.cpp's values, https://github.com/ggml-org/llama.cpp/pull/21038", widest=64
)
hadamard_32 = Hadamard(
    "hadamard_32", source="exllamav3's quantized cache, https://github.com/turboderp-org/exllamav3", widest=32
)
