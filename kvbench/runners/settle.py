"""Brings a GPU into one state before something is timed on it, and says in which it is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch


def settle(devices: Iterable[torch.device]) -> bool:
    """Has each GPU change contexts, and says whether all could.

    Once a process has launched on many streams, each kernel of any of its CUDA graphs begins up to a third of a
    microsecond later than before, a tenth to a sixth of a decode step, until another context has worked on that GPU
    (`benchmarks/graphs.py`). So a context is made here, writes a little, and is given up.
    """
    # a list, since one that could not leaves those behind it no less in need
    could = [_settled(device) for device in devices if device.type == "cuda"]
    return bool(could) and all(could)


def _settled(device: torch.device) -> bool:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            _work_in_a_context(cuda, torch.cuda.current_device())
    except (OSError, AttributeError):  # no such library or call, no memory for a context
        return False
    return True


def _work_in_a_context(cuda: Any, device: int) -> None:
    def call(name: str, *given: Any) -> None:
        if code := getattr(cuda, name)(*given):
            raise OSError(f"{name}: CUDA error {code}")

    number, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    call("cuDeviceGet", ctypes.byref(number), device)
    call("cuCtxCreate_v2", ctypes.byref(context), 0, number)
    try:
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(1024))
        call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(1024))
        call("cuCtxSynchronize")
    finally:
        # with it goes its memory, and the context before it is the current one again
        call("cuCtxDestroy_v2", context)


class Chain:
    """A CUDA graph of kernels that do next to nothing, one after another: how long one takes says a GPU's state."""

    def __init__(self, device: torch.device, kernels: int) -> None:
        self.device, self.kernels = device, kernels
        with torch.cuda.device(device):
            self._counted, self._graph = torch.zeros(32, device=device), torch.cuda.CUDAGraph()
            self._counted.add_(1)
            with torch.cuda.graph(self._graph):
                for _ in range(kernels):
                    self._counted.add_(1)

    def replay(self) -> None:
        """Launches all of them."""
        self._graph.replay()

    def kernel_us(self) -> float:
        """Microseconds of one kernel in one replay."""
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.replay()
            end.record()
            end.synchronize()
        return 1e3 * float(begin.elapsed_time(end)) / self.kernels
