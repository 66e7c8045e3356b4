"""How long cells take, by those that are done, and how that is written. Imports nothing heavy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from kvbench.results import Record


class Clock:
    """How long cells take, from those that are done: the mean of the same task, else of all."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cells: Counter[str] = Counter()
        for record in records:
            if record.status == "done" and "seconds" in record.timings:
                self.add(record.task, record.timings["seconds"])

    def add(self, task: str, seconds: float) -> None:
        """One more cell."""
        self.seconds[task] += seconds
        self.cells[task] += 1

    def expect(self, task: str) -> float | None:
        """Seconds of a cell of this task; None before any cell is done."""
        if self.cells[task]:
            return self.seconds[task] / self.cells[task]
        return sum(self.seconds.values()) / self.cells.total() if self.cells else None

    def knows(self, task: str) -> bool:
        """A cell of this very task is done."""
        return task in self.cells

    def expect_all(self, tasks: Mapping[str, int]) -> float | None:
        """Seconds of so many cells of each task."""
        times = [(self.expect(task), count) for task, count in tasks.items()]
        known = [second * count for second, count in times if second is not None]
        return sum(known) if len(known) == len(times) else None


def duration(seconds: float | None) -> str:
    """`0:07:41`, or `-` where it is unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
