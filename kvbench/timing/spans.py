"""What a GPU did while something ran, and when: torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Span(NamedTuple):
    """A kernel or a copy, in microseconds of the profiler's clock."""

    begin: float
    end: float
    name: str


def spans(run: Callable[[], object]) -> list[Span]:
    """All that the GPU did of what `run` launched, in the order in which it began. Needs a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type.name == "CUDA"]
    return sorted(Span(event.time_range.start, event.time_range.end, event.name) for event in events)


def alone(found: Sequence[Span]) -> list[float]:
    """Microseconds of each span, in their order, in which none before it runs: their sum is the GPU's busy time."""
    own, end = [], 0.0
    for span in found:
        own.append(max(0.0, span.end - max(end, span.begin)))
        end = max(end, span.end)
    return own
