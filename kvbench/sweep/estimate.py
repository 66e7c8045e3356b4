"""How long a cell takes that was never measured, by what it computes and what this machine can."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil

import torch

from kvbench.tasks.base import Work

BATCH = 64  # answers at once, as on a CPU
FACTOR = 3  # what cells took is between a third and three times the estimate: attention and loading are left out
SECONDS = 0.05  # for each of the two rates


@dataclass(frozen=True)
class Rates:
    """Of a device: operations a second of a matrix product, bytes a second read by a matrix times a vector."""

    flops: float
    bytes: float


@cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """What the device does now, measured in a fifth of a second."""
    square = torch.ones(1024, 1024, dtype=dtype, device=device)
    weights = torch.ones(4096, 4096, dtype=dtype, device=device)
    vector = torch.ones(4096, dtype=dtype, device=device)
    return Rates(
        2 * 1024**3 / _seconds(lambda: square @ square, device),
        weights.nbytes / _seconds(lambda: weights @ vector, device),
    )


def _seconds(compute: Callable[[], object], device: str) -> float:
    """The mean over SECONDS, after a first call that is not counted."""
    compute()
    _wait(device)
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < SECONDS:
        compute()
        _wait(device)
        count += 1
    return (time.perf_counter() - began) / count


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(work: Work, parameters: int, itemsize: int, rate: Rates) -> float:
    """Two operations a weight and prompt token; of answers, the weights read once a token of a batch, to the longest.

    Attention, the cache and the loading of the model are left out, and answers may end early.
    """
    steps = ceil(work.answers / BATCH) * work.answer_tokens
    return 2 * parameters * work.prompt_tokens / rate.flops + steps * parameters * itemsize / rate.bytes
