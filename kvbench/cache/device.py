"""Integers on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes, of an array among others that are copied together


def to_device(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[len(values)] on the device; where that is a GPU, the copy waits for nothing that runs there."""
    made = torch.as_tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else made.to(device)


def on_device(arrays: Sequence[NDArray[Any]], device: torch.device | str) -> list[Tensor]:
    """These arrays on the device; where that is a GPU, by one copy, which waits for nothing that runs there."""
    hosts = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if torch.device(device).type != "cuda":
        return [host.to(device) for host in hosts]
    sizes = [-(-host.nbytes // ALIGNMENT) * ALIGNMENT for host in hosts]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for part, host in zip(buffer.split(sizes), hosts, strict=True):
        part[: host.nbytes].view(host.dtype).copy_(host.flatten())
    parts = buffer.to(device, non_blocking=True).split(sizes)
    return [part[: host.nbytes].view(host.dtype).view(host.shape) for part, host in zip(parts, hosts, strict=True)]
