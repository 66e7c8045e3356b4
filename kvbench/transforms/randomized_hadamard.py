"""The Hadamard rotation after random sign changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.transforms.rotation import SEED, Rotation, largest_power_of_two


@dataclass(frozen=True)
class RandomizedHadamard(Rotation):
    """One vector of b signs for all layers and heads, for keys, values and queries alike, and for each block of b."""

    def block(self, head_dim: int) -> int:
        return largest_power_of_two(head_dim)

    def signs(self, head_dim: int) -> Tensor | None:
        block = self.block(head_dim)
        if block == 1:
            return None
        generator = torch.Generator("cpu").manual_seed(SEED)
        signs = 2 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1
        return signs.repeat(head_dim // block)


randomized_hadamard = RandomizedHadamard("randomized_hadamard", source="QuIP#, https://arxiv.org/abs/2402.04396")
