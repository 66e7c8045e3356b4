"""What stops a sweep and is no cell's fault: a person, a full disk, a machine that can't."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from kvbench.faults import fault_of, triton_fault

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


def raise_if_the_machine_s(error: Exception) -> None:
    """Raises what is no fault of the cell's: the OSError of a full disk or a limit, or what Triton lacks.

    Raises:
        OSError, UnusableError: the error came from that.
    """
    if (fault := fault_of(error)) is not None:
        raise fault
    if (line := triton_fault(error)) is not None:
        raise UnusableError(f"{line}; the same command goes on") from error


def raise_if_stopped() -> None:
    """Raises KeyboardInterrupt once a stop was asked for: compiled code may have made another error of it, or none."""
    if _stopped.is_set():
        raise KeyboardInterrupt
