"""What a person sees of a running sweep, on stderr."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from kvbench.render.text import cell as cell_text
from kvbench.render.text import seen, wrapped
from kvbench.results import Record, headline, shown_metric
from kvbench.sweep.clock import Clock, duration
from kvbench.sweep.job import Advanced, Event, Loading, Started
from kvbench.sweep.plan import Cell

NARROW = 100  # columns of a terminal


class Display:
    """A line for each finished cell, and on a terminal some below them that redraw: a running cell's each, the sweep's.

    A lane shows a seat, on which cells run one after another. before: cells of the sweep that were done before, which
    count too.
    """

    def __init__(self, cells: Sequence[Cell], clock: Clock, cells_folder: Path, before: int = 0) -> None:
        self.clock = clock
        self.folder = cells_folder
        self.cells = {cell.name: cell for cell in cells}
        self.remaining = Counter(cell.task.name for cell in cells)
        self.total = before + len(cells)
        self.failed = 0
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.redraws = self.console.is_terminal and os.environ.get("TERM") != "dumb"
        self.width = max((len(cell.label) for cell in cells), default=0)
        bar, eta = 24 if self.console.width > NARROW else 8, "eta 0:00:00"
        # where a line is too long its label ends in …, and no number is broken
        label = self.console.width - bar - len(f"{self._count(self.total)}{eta}") - 6
        self.bars = Progress(
            TextColumn("  {task.description}", table_column=Column(no_wrap=True, max_width=max(20, label))),
            BarColumn(bar_width=bar),
            TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
            TextColumn("eta {task.fields[eta]}", table_column=Column(no_wrap=True, min_width=len(eta))),
            console=self.console,
            transient=True,
            disable=not self.redraws,
        )
        self.lanes: dict[int, Lane] = {}
        self.sweep_bar = self._last_bar()

    def _last_bar(self) -> TaskID:
        return self.bars.add_task("all cells", total=self.total, count=self._count(self.failed), eta="-")

    def _count(self, failed: int) -> str:
        return f"{self.done} of {self.total} cells" + (f" · {failed} failed" if failed else "")

    def __enter__(self) -> Self:
        self._show_sweep()
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.bars.stop()

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        width = self.console.width if self.console.is_terminal else None
        lines = [part for line in seen(text).split("\n") for part in wrapped(line, width)]
        self.console.print(Text("\n".join(lines), style))

    def tell(self, seat: int, event: Event) -> None:
        """Shows what happens at a seat."""
        if seat not in self.lanes:
            self.bars.remove_task(self.sweep_bar)
            self.lanes[seat] = Lane(self)
            self.sweep_bar = self._last_bar()
        self.lanes[seat].show(event)

    @property
    def done(self) -> int:
        """Cells that are done, or have failed."""
        return self.total - self.remaining.total()

    def finished(self, record: Record) -> None:
        """The line of a cell that is done, or has failed."""
        cell = self.cells[record.cell]
        self.remaining[cell.task.name] -= 1
        self.remaining = +self.remaining  # what is down to none is left out
        seconds = record.timings.get("seconds", 0.0)
        count = f"{self.done} of {self.total}"
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
        self.say(
            f"{count:>{len(str(self.total)) * 2 + 6}}  {cell.label:{self.width}}  {what}{text}",
            "red" if record.status == "failed" else "",
        )
        self._show_sweep()

    def _show_sweep(self) -> None:
        left = self.clock.expect_all(self.remaining)
        spent = sum(lane.spent for lane in self.lanes.values())
        self.bars.update(
            self.sweep_bar,
            completed=self.done,
            count=self._count(self.failed),
            eta=duration(None if left is None else max(0.0, left - spent) / max(1, len(self.lanes))),
        )


class Lane:
    """The part of a display that shows one seat."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.bars = display.bars
        self.bar = display.bars.add_task("", visible=False, count="", eta="-")
        self.began: float | None = None

    @property
    def spent(self) -> float:
        """Seconds of the running cell."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def show(self, event: Event) -> None:
        """What happens there."""
        if isinstance(event, Loading):
            self._begin(f"loading {event.model}", None)
        elif isinstance(event, Started):
            cell = self.display.cells[event.cell]
            self.began = time.monotonic()
            self._begin(cell.label, self.display.clock.expect(cell.task.name))
            self.display._show_sweep()
        elif isinstance(event, Advanced):
            self._advance(event.done, event.total)
        else:
            self.bars.update(self.bar, visible=False)
            self.began = None
            self.display.finished(event.record)

    def _advance(self, done: int, total: int) -> None:
        if not total:
            return
        left = self.spent / done * (total - done) if done else None
        self.bars.update(self.bar, total=total, completed=done, count=f"{done}/{total}", eta=duration(left))
        self.display._show_sweep()

    def _begin(self, text: str, eta: float | None) -> None:
        self.bars.reset(self.bar, total=None, description=cell_text(text), visible=True, count="", eta=duration(eta))
