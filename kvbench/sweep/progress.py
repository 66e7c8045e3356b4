"""What a person sees of a running sweep, on stderr."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from kvbench.render.text import cell as cell_text
from kvbench.render.text import seen
from kvbench.results import Record, headline, shown_metric
from kvbench.sweep.plan import Cell


class Clock:
    """How long cells take, from those that are done: the mean of the same task, else of all."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        for record in records:
            if record.status == "done" and "seconds" in record.timings:
                self.add(record.task, record.timings["seconds"])

    def add(self, task: str, seconds: float) -> None:
        """One more cell."""
        self.seconds[task].append(seconds)

    def expect(self, task: str) -> float | None:
        """Seconds of a cell of this task; None before any cell is done."""
        times = self.seconds.get(task) or [second for some in self.seconds.values() for second in some]
        return sum(times) / len(times) if times else None

    def knows(self, task: str) -> bool:
        """A cell of this very task is done."""
        return task in self.seconds

    def expect_all(self, cells: Sequence[Cell]) -> float | None:
        """Seconds of all these cells."""
        times = [self.expect(cell.task.name) for cell in cells]
        known = [second for second in times if second is not None]
        return sum(known) if len(known) == len(times) else None


def duration(seconds: float | None) -> str:
    """`0:07:41`, or `-` where it is unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Watcher(Protocol):
    """Who is told of cells that run one after another."""

    def loading(self, model: str) -> None:
        """A model is being loaded."""
        ...

    def started(self, cell: Cell) -> None:
        """A cell begins."""
        ...

    def advanced(self, done: int, total: int) -> None:
        """The running cell has done some of its requests."""
        ...

    def finished(self, cell: Cell, record: Record) -> None:
        """A cell is done, or has failed."""
        ...


class Display:
    """A line for each finished cell, and on a terminal some below them that redraw: a running cell's each, the sweep's.

    lanes: a watcher for each device, on which cells run one after another.
    """

    def __init__(self, cells: Sequence[Cell], clock: Clock, cells_folder: Path, lanes: int = 1) -> None:
        self.clock = clock
        self.folder = cells_folder
        self.remaining = list(cells)
        self.total = len(cells)
        self.failed = 0
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.redraws = self.console.is_terminal and os.environ.get("TERM") != "dumb"
        self.width = max((len(cell.label) for cell in cells), default=0)
        self.bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("eta {task.fields[eta]}"),
            console=self.console,
            transient=True,
            disable=not self.redraws,
        )
        self.lanes = [Lane(self) for _ in range(lanes)]
        self.sweep_bar = self.bars.add_task("all cells", total=self.total, count="", eta="-")

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.bars.stop()

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(Text(seen(text), style))

    def finished(self, cell: Cell, record: Record) -> None:
        """The line of a cell that is done, or has failed."""
        self.remaining.remove(cell)
        seconds = record.timings.get("seconds", 0.0)
        count = f"{self.total - len(self.remaining)}/{self.total}"
        if record.status == "done":
            self.clock.add(record.task, seconds)
            scores = "  ".join(f"{metric.name} {shown_metric(metric)}" for metric in headline(record.metrics)[:3])
            what = f"{scores}   {seconds:.1f} s"
        else:
            self.failed += 1
            what = f"failed: {record.error}   {self.folder / record.cell / 'record.json'}"
        left = self.clock.expect_all(self.remaining)
        eta = duration(None if left is None else left / len(self.lanes))
        text = f"   eta {eta}" if self.remaining and not self.redraws else ""
        self.say(f"{count:>7}  {cell.label:{self.width}}  {what}{text}", "red" if record.status == "failed" else "")
        self._show_sweep()

    def _show_sweep(self) -> None:
        left = self.clock.expect_all(self.remaining)
        done = self.total - len(self.remaining)
        failed = f" · {self.failed} failed" if self.failed else ""
        spent = sum(lane.spent for lane in self.lanes)
        self.bars.update(
            self.sweep_bar,
            completed=done,
            count=f"{done} of {self.total} cells{failed}",
            eta=duration(None if left is None else max(0.0, left - spent) / len(self.lanes)),
        )


class Lane:
    """The part of a display that watches one device."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.bars = display.bars
        self.bar = display.bars.add_task("", visible=False, count="", eta="-")
        self.began: float | None = None

    @property
    def spent(self) -> float:
        """Seconds of the running cell."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def loading(self, model: str) -> None:
        """A model is being loaded."""
        self._show(f"loading {model}", None)

    def started(self, cell: Cell) -> None:
        """A cell begins."""
        self.began = time.monotonic()
        self._show(cell.label, self.display.clock.expect(cell.task.name))
        self.display._show_sweep()

    def advanced(self, done: int, total: int) -> None:
        """The running cell has done some of its requests."""
        if not total:
            return
        left = self.spent / done * (total - done) if done else None
        self.bars.update(self.bar, total=total, completed=done, count=f"{done}/{total}", eta=duration(left))
        self.display._show_sweep()

    def finished(self, cell: Cell, record: Record) -> None:
        """A cell is done, or has failed."""
        self.bars.update(self.bar, visible=False)
        self.began = None
        self.display.finished(cell, record)

    def _show(self, text: str, eta: float | None) -> None:
        self.bars.reset(self.bar, total=None, description=cell_text(text), visible=True, count="", eta=duration(eta))
