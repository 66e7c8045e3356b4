"""How a time is taken: cold buffers in turn, CUDA graphs, every sample kept, and the machine's state beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

WARM_UP_S = 0.1  # of replays before the first sample: after a pause a GPU raises its clock for some milliseconds


@dataclass(frozen=True)
class Sampled:
    """Microseconds of one call: every sample, each the mean over one replay of a graph of several calls."""

    samples_us: tuple[float, ...]
    launch_us: float  # of the host, without a graph

    @property
    def median(self) -> float:
        return statistics.median(self.samples_us)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples_us)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def cold_copies(nbytes: int) -> int:
    """How many buffers of this size, used in turn, are never found in the L2 cache; 64 at most."""
    cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(64, -(-4 * cache // nbytes))


def time_calls(calls: Sequence[Callable[[], object]], samples: int, least: int = 8) -> Sampled:
    """The time of one call. calls: the same work on different buffers, run in turn, at least `least` to a graph."""
    count = -(-least // len(calls)) * len(calls) if len(calls) < least else len(calls)
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(count):
        calls[i % len(calls)]()
    launch_us = (time.perf_counter() - begin) * 1e6 / count
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_S:
        graph.replay()
        torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
    for begin_event, end_event in events:
        begin_event.record()
        graph.replay()
        end_event.record()
    torch.cuda.synchronize()
    return Sampled(tuple(a.elapsed_time(b) * 1e3 / count for a, b in events), launch_us)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of 1 GiB, bytes read and bytes written counted, measured now."""
    # random, since a memory of zeros may be faster
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(2 * source.numel() / statistics.median(times) / 1e6)


def throttle_reasons() -> tuple[str, ...] | None:
    """Why the GPU's clocks are held back just now (read, never set); None where NVML is not there to ask."""
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # torch counts the devices that it may see, NVML all
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        mask = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except pynvml.NVMLError:
        return None
    # an idle GPU and one that runs at the clock its applications asked for are not held back
    names = {
        "SwPowerCap": "power cap",
        "HwSlowdown": "hardware slowdown",
        "SyncBoost": "sync boost",
        "SwThermalSlowdown": "software thermal",
        "HwThermalSlowdown": "hardware thermal",
        "HwPowerBrakeSlowdown": "power brake",
    }
    return tuple(text for name, text in names.items() if mask & getattr(pynvml, f"nvmlClocksThrottleReason{name}", 0))
