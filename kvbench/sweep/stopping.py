"""What stops a sweep and is no cell's fault: a person, a full disk, a machine that can't."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from kvbench.files import fault_of

_stopped = threading.Event()


class UnusableError(RuntimeError):
    """This machine, or a cluster, cannot run what was asked for; the message says what to do."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM stops the block as Ctrl-C does, and `raise_if_stopped` knows of either."""
    _stopped.clear()
    before = {kind: signal.signal(kind, _stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _stop(*_: object) -> None:
    _stopped.set()
    raise KeyboardInterrupt


def raise_if_full(error: Exception) -> None:
    """Raises the OSError that an error came from, where that is a full disk or a limit: no fault of the cell's."""
    fault = fault_of(error)
    if fault is not None:
        raise fault


def raise_if_stopped() -> None:
    """Raises KeyboardInterrupt once a stop was asked for: compiled code may have made another error of it, or none."""
    if _stopped.is_set():
        raise KeyboardInterrupt
