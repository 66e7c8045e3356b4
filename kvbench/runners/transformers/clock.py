"""What the passes took."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds of prefill and of decoding, on a GPU by its own events, so that nothing waits; and their tokens.

    device: where passes end. A pass through several begins, for the clock, once the last has ended there.
    """

    def __init__(self, device: torch.device) -> None:
        self.decoded = 0
        self._device = device
        self._gpu = device.type == "cuda"
        self._prefilled = 0
        self._spans: dict[str, list[tuple[Any, Any]]] = {"prefill": [], "decode": [], "capture": []}

    def copy(self) -> Clock:
        """As it stands now."""
        made = copy.copy(self)
        made._spans = {name: list(spans) for name, spans in self._spans.items()}
        return made

    def restore(self, before: Clock) -> None:
        """As it stood when that copy was made."""
        self.__dict__.update(before.__dict__)

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def prefill(self, tokens: int) -> Iterator[None]:
        """Counts the block as a pass of so many prompt tokens."""
        self._prefilled += tokens
        with self._timed("prefill"):
            yield

    @contextmanager
    def decode(self) -> Iterator[None]:
        """Counts the block as decoding; its tokens are counted when the host has seen them."""
        with self._timed("decode"):
            yield

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Counts the block as making a CUDA graph, which is no decoding."""
        with self._timed("capture"):
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans[name].append((begin, self._now()))

    def totals(self) -> dict[str, float]:
        """Tokens and seconds; what did not happen is left out."""
        if self._gpu:
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = {}
        tokens = {"prefill": self._prefilled, "decode": self.decoded}
        for name, spans in self._spans.items():
            if spans:
                if name in tokens:
                    found[f"{name}_tokens"] = tokens[name]
                found[f"{name}_seconds"] = sum(a.elapsed_time(b) / 1e3 if self._gpu else b - a for a, b in spans)
        return found
