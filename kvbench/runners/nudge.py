"""The least that a model's arithmetic can differ by: a quantized cache may make much of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes as a float


@contextmanager
def nudged(model: Any, seed: int) -> Iterator[None]:
    """`model` reads each number of its tokens' embedding one ulp up or down inside the block, and as before after it.

    Which way is decided by the number, its channel and the seed: a token is the same wherever it stands.

    Raises:
        ValueError: the block computed nothing through the embedding, so what it gave is no repeat under noise.
    """
    outputs = 0

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        nonlocal outputs
        outputs += 1
        return one_ulp(output, seed)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not outputs:
        raise ValueError(
            f"{type(model).__name__} read no token through its embedding, so a repeat under noise is none: "
            "turn repeats off (again: false)"
        )


def one_ulp(x: Tensor, seed: int) -> Tensor:
    """Each number's neighbour in its own dtype, towards 0 or away from it; 0 stays."""
    bits = x.contiguous().view(INTEGERS[x.element_size()])
    mixed = (
        bits.to(torch.int64) * 0x9E3779B1 + torch.arange(x.shape[-1], device=x.device) * 0x85EBCA6B + seed * 0xC2B2AE35
    )
    mixed = (mixed ^ (mixed >> 15)) * 0x27D4EB2F
    step = ((mixed ^ (mixed >> 13)) & 1) * 2 - 1
    # as integers, neighbours of one sign differ by 1
    return torch.where(x == 0, bits, bits + step.to(bits.dtype)).view(x.dtype)
