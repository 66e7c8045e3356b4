"""Cells given out to many workers: which takes which, and what happens when one of them dies."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvbench.sweep.clock import Clock
from kvbench.sweep.job import Event, Finished, Job, Tell
from kvbench.sweep.parts import ModelFacts
from kvbench.sweep.plan import Cell
from kvbench.sweep.session import failed
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import raise_if_stopped

Model = tuple[ModelSpec, ModelFacts]

END = 3  # of the longest cells for each seat: with no more than that left, the longest go first


class WorkerDiedError(RuntimeError):
    """What ran a cell ended before the cell did."""


@dataclass(frozen=True)
class Died:
    """A worker has ended in the middle of its cell. how: for a person."""

    how: str


@dataclass
class Seat:
    """A place where one cell at a time runs.

    node: the machine. share: of a GPU, what it holds; a model that asks for another does not run there; None: all do.
    cell: what runs there now. model: what was given to it last, and so is loaded there.
    """

    number: int
    node: str = ""
    share: float | None = None
    cell: Cell | None = None
    model: Model | None = None
    began: float = 0.0


class Pool(Protocol):
    """The workers of an executor."""

    def seats(self, queue: Queue) -> Sequence[Seat]:
        """Those where a cell can run. queue: what no one has yet; more seats may be made for it."""
        ...

    def give(self, seat: Seat, cell: Cell) -> None:
        """Runs a cell there."""
        ...

    def wait(self) -> Iterable[tuple[Seat, Event | Died | Exception]]:
        """What has happened since: waits a second for it at most. An exception is no cell's fault."""
        ...

    def replace(self, seat: Seat) -> None:
        """Ends the worker there, dead or broken: another takes its place."""
        ...

    def end(self) -> None:
        """Ends all workers; what they have not told is lost."""
        ...


@dataclass
class Queue:
    """The cells that no worker has, by their models, in the order in which they came.

    tried: by cell: where, and how that ended. left: how many of each task. clock: how long those took that are done.
    """

    models: dict[Model, deque[Cell]] = field(default_factory=dict)
    tried: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)
    clock: Clock = field(default_factory=lambda: Clock(()))

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Queue:
        """All of them."""
        queue = cls()
        for cell in cells:
            queue.models.setdefault((cell.spec, cell.model), deque()).append(cell)
            queue.left[cell.task.name] += 1
        return queue

    def __bool__(self) -> bool:
        return any(self.models.values())

    def shares(self) -> Counter[float]:
        """How many cells are left by the share of a GPU that their model takes."""
        counts: Counter[float] = Counter()
        for (spec, _), cells in self.models.items():
            if cells:
                counts[spec.gpus] += len(cells)
        return counts

    def take(self, seat: Seat, seats: Sequence[Seat]) -> Cell | None:
        """The next cell for a seat: of the model that is loaded there, else of the first that is loaded nowhere.

        Else of that with the most cells left a worker. One whose worker died goes to another node, if there is one.
        Near the end the longest goes first, so that none is begun when the others have no more.
        """
        fit = [other for other in seats if other.share == seat.share]
        loaded = Counter(other.model for other in fit if other is not seat)
        nodes = {other.node for other in fit}

        def order(model: Model) -> tuple[bool, bool, float]:
            a_worker = len(self.models[model]) / (loaded[model] + 1)
            return model != seat.model, model in loaded, -a_worker if model in loaded else 0.0

        those = [model for model, cells in self.models.items() if cells and seat.share in (None, model[0].gpus)]
        for model in sorted(those, key=order):
            cells = self.models[model]
            for cell in self._longest_first(cells) if self._ends(len(fit)) else cells:
                tried = {node for node, _ in self.tried.get(cell.name, ())}
                if seat.node not in tried or nodes <= tried:
                    cells.remove(cell)
                    self.left[cell.task.name] -= 1
                    return cell
        return None

    def _ends(self, seats: int) -> bool:
        """Whether so few are left that their order matters, and each of their tasks was seen to take its time."""
        tasks = {task: count for task, count in self.left.items() if count}
        if not all(map(self.clock.knows, tasks)):
            return False
        longest = max((self.clock.expect(task) or 0.0 for task in tasks), default=0.0)
        return (self.clock.expect_all(tasks) or 0.0) <= END * seats * longest

    def _longest_first(self, cells: Iterable[Cell]) -> list[Cell]:
        """Behind those that were tried already, and those that say whether quantization is in effect."""

        def order(cell: Cell) -> tuple[bool, bool, float]:
            return cell.name not in self.tried, not cell.judged, -(self.clock.expect(cell.task.name) or 0.0)

        return sorted(cells, key=order)

    def died(self, seat: Seat, how: str, tries: int) -> WorkerDiedError | None:
        """Puts the cell of a worker that died before all others; the error instead where it was tried often enough."""
        assert seat.cell is not None
        tried = self.tried.setdefault(seat.cell.name, [])
        tried.append((seat.node, how))
        if len(tried) < tries:
            assert seat.model is not None
            self.models[seat.model].appendleft(seat.cell)
            self.left[seat.cell.task.name] += 1
            return None
        if tries == 1:
            return WorkerDiedError(how)
        where = "; ".join(f"on {node}: {how}" for node, how in tried)
        return WorkerDiedError(f"it was tried {tries} times, and each time its worker died: {where}")


def share_out(pool: Pool, cells: Sequence[Cell], job: Job, tell: Tell, tries: int) -> None:
    """Measures the cells on all seats of a pool at once, and tells of each as it is done.

    A worker that dies costs the cell that it ran, which is tried `tries` times in all and then told of as failed.

    Raises: as `Executor.run`.
    """
    queue = Queue.of(cells)
    try:
        while give_out(pool, queue):
            for seat, event in pool.wait():
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Died):
                    pool.replace(seat)
                    error = queue.died(seat, event.how, tries)
                    cell, seat.cell = seat.cell, None
                    if error is None or cell is None:
                        continue
                    event = Finished(failed(cell, error, job.environment, time.monotonic() - seat.began), [])
                elif isinstance(event, Finished):
                    seat.cell = None
                    if "seconds" in event.record.timings:
                        queue.clock.add(event.record.task, event.record.timings["seconds"])
                    if event.broken:
                        pool.replace(seat)
                    give_out(pool, queue)  # before the record is written, so that no worker waits for the disk
                tell(seat.number, event)
            raise_if_stopped()
    finally:
        pool.end()


def give_out(pool: Pool, queue: Queue) -> bool:
    """Gives each idle seat its next cell; False once nothing runs and nothing is left."""
    seats = pool.seats(queue)
    for seat in seats:
        if seat.cell is None and (cell := queue.take(seat, seats)):
            seat.cell, seat.model, seat.began = cell, (cell.spec, cell.model), time.monotonic()
            pool.give(seat, cell)
    return bool(queue) or any(seat.cell for seat in seats)
