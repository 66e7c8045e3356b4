"""A campaign: damaged inputs by the thousand, each of which must end in an answer or in a refusal that says where."""

from __future__ import annotations

import importlib
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 2.0  # of the processor: more than this is a hang
WAIT = 10  # times as many seconds of the clock, since the machine may have other work


@dataclass(frozen=True)
class Case:
    """One damaged input. run: gives its outcome in a word, or raises Broken; whatever else it raises is a traceback."""

    name: str
    run: Callable[[], str]


class Broken(Exception):
    """What must not be: the first argument is the kind ("no place", "difference", …), the second says more."""


class TooLong(BaseException):
    """The time is over; no `except Exception` in between may keep it."""


@dataclass
class Tally:
    """What a campaign found. broken: a kind, the case and what was seen."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str, str]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = Counter(kind for kind, _, _ in self.broken)
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        bad = ", ".join(f"{kinds[kind]} {kind}s" for kind in dict.fromkeys(("traceback", "hang", "difference", *kinds)))
        cases = self.outcomes.total() + len(self.broken)
        return (
            f"{self.name}: {cases} cases in {self.seconds:.0f} s: {outcomes}; {bad}; "
            f"slowest {self.slowest[0]:.2f} s ({self.slowest[1]})"
        )


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TooLong inside the block when it took so many seconds of the processor, or WAIT times as many in all."""

    def over(*_: object) -> None:
        raise TooLong

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, WAIT * seconds),
    }
    before = {kind: signal.signal(kind, over) for kind in timers}
    for timer, most in timers.values():
        signal.setitimer(timer, most, 0.1)
    try:
        yield
    finally:
        for kind, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(kind, before[kind])


def campaign(name: str, cases: Iterable[Case], seconds: float = SECONDS) -> Tally:
    """Runs every case, each within `seconds`; a broken one stops none of the others."""
    tally, began = Tally(name), time.perf_counter()
    for case in cases:
        start = time.perf_counter()
        try:
            with limited(seconds):
                tally.outcomes[case.run()] += 1
        except TooLong:
            tally.broken.append(("hang", case.name, f"more than {seconds} s"))
        except Broken as found:
            kind, detail = found.args
            tally.broken.append((kind, case.name, detail))
        except BaseException:
            tally.broken.append(("traceback", case.name, traceback.format_exc()))
        tally.slowest = max(tally.slowest, (time.perf_counter() - start, case.name))
    tally.seconds = time.perf_counter() - began
    return tally


UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def refusal(code: int, stdout: str, stderr: str, exception: BaseException | None, place: str) -> str:
    """The outcome of a command line that took a damaged input, or Broken.

    place: what a refusal must name, a regular expression.
    """
    if exception is not None and not isinstance(exception, SystemExit):
        raise Broken("traceback", "".join(traceback.format_exception(exception)))
    if UNSEEN.search(stdout + stderr):
        raise Broken("control character", repr(stdout + stderr)[:2000])
    if code == 0:
        return "taken"
    if not stderr.startswith("error: "):
        raise Broken("no message", f"exit {code}: {stderr[:2000]}")
    if not re.search(place, stderr):
        raise Broken("refusal without a place", stderr[:2000])
    return f"refused ({code})"


def toy_sweeps() -> Any:
    """tests/sweep/toy.py: a model and tasks that take no time."""
    folder = str(Path(__file__).parents[1] / "sweep")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("toy")
