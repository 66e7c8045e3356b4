"""What runs inside a Ray cluster: a look at a node, a worker a seat, and one keeper of what they share.

Nothing heavy is imported before Ray has said which GPU a worker sees, and no Ray outside of a cluster's processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.environment import describe

if TYPE_CHECKING:
    from kvbench.results import Tensors
    from kvbench.sweep.job import Finished, Job, Step
    from kvbench.sweep.plan import Cell

ADVANCE_SECONDS = 0.5  # between two messages about the same cell


@dataclass(frozen=True)
class Needs:
    """What a node must have to run cells: models as they were planned, tasks, and how a model is found."""

    models: Sequence[Any]  # (spec, facts)
    tasks: Sequence[Any]
    find_model: Callable[[Any], Any]


def look(needs: Needs | None) -> tuple[dict[str, Any], list[str]]:
    """What a node is, and a line for each thing that it lacks."""
    lacks = []
    for spec, planned in needs.models if needs else ():
        try:
            found = needs.find_model(spec) if needs else None
            missing = found.missing if found else ""
            if found and not missing and found.revision != planned.revision:
                missing = f"its revision is {found.revision}, and here {planned.revision}"
        except ValueError as error:
            missing = str(error)
        if missing:
            lacks.append(f"model {planned.name}: {missing}")
    for task in needs.tasks if needs else ():
        lacks += task.missing()
    return describe(), list(dict.fromkeys(lacks))


class Worker:
    """A model on the GPU that Ray gave this process, and the cells that run on it one after another.

    share: of the GPU, of whose memory it takes no more.
    """

    def __init__(self, job: Job, number: int, share: float, keeper: Any) -> None:
        import torch

        from kvbench.sweep.executors.process import Sparing
        from kvbench.sweep.session import Bench

        self.number = number
        self.keeper = keeper
        self.cell = ""
        environment = {**describe(), "device": job.device}
        if job.device != "cpu" and share < 1:
            torch.cuda.set_per_process_memory_fraction(share)
        own = replace(job, baselines=Shared(keeper, number), environment=environment)
        self.bench = Bench(own, Sparing(self._tell, ADVANCE_SECONDS))

    def _tell(self, step: Step) -> None:
        self.keeper.tell.remote(self.number, self.cell, step)

    def ready(self) -> None:
        """Returns once the worker can take a cell."""

    def run(self, cell: Cell) -> Finished | Exception:
        """What a cell gave; what is no fault of the cell's."""
        from kvbench.runners.model_files import RefusedError
        from kvbench.sweep.stopping import UnusableError

        self.cell = cell.name
        try:
            return self.bench.run(cell)
        except (RefusedError, UnusableError, OSError) as error:
            return error


@dataclass
class Shared:
    """The run folder's baselines, as a worker has them: through the keeper."""

    keeper: Any
    number: int

    def baseline(self, identity: Mapping[str, Any], slug: str, compute: Callable[[], Tensors]) -> Tensors:
        """See Baselines."""
        import ray

        kept = ray.get(self.keeper.baseline.remote(self.number, identity, slug))
        if kept is not None:
            tensors: Tensors = ray.get(kept[0])
            return tensors
        try:
            tensors = compute()
        except BaseException:
            self.keeper.release.remote(self.number)
            raise
        ray.get(self.keeper.keep.remote(identity, slug, tensors))
        return tensors


class NotKeptError(LookupError):
    """No such tensors are kept."""


class Keeper:
    """On the driver's node: keeps the baselines in the run folder, lends them out, and passes on what workers tell."""

    def __init__(self, folder: Path) -> None:
        from kvbench.results import Store

        self.store = Store(folder)
        self.lent: dict[str, Any] = {}
        self.computing: dict[str, int] = {}
        self.told: list[tuple[int, str, Step]] = []
        self.changed = asyncio.Condition()
        self.news = asyncio.Event()

    async def baseline(self, number: int, identity: Mapping[str, Any], slug: str) -> list[Any] | None:
        """A reference to the tensors; None where this worker has to compute them. Waits while another one does."""
        import ray

        from kvbench.results import name_of

        def absent() -> Tensors:
            raise NotKeptError

        name = name_of(slug, identity)
        async with self.changed:
            while True:
                if name in self.lent:
                    return [self.lent[name]]
                if name not in self.computing:
                    try:
                        self.lent[name] = ray.put(self.store.baseline(identity, slug, absent))
                    except NotKeptError:
                        self.computing[name] = number
                        return None
                    return [self.lent[name]]
                await self.changed.wait()

    async def keep(self, identity: Mapping[str, Any], slug: str, tensors: Tensors) -> None:
        """Puts computed tensors into the run folder."""
        from kvbench.results import name_of

        async with self.changed:
            self.store.baseline(identity, slug, lambda: tensors)
            self.computing.pop(name_of(slug, identity), None)
            self.changed.notify_all()

    async def release(self, number: int) -> None:
        """A worker computes nothing any more: it failed, or died."""
        async with self.changed:
            self.computing = {name: who for name, who in self.computing.items() if who != number}
            self.changed.notify_all()

    async def tell(self, number: int, cell: str, step: Step) -> None:
        """Takes what happens in a worker's cell."""
        self.told.append((number, cell, step))
        self.news.set()

    async def steps(self) -> list[tuple[int, str, Step]]:
        """What has been told since; waits until there is something."""
        await self.news.wait()
        self.news.clear()
        told, self.told = self.told, []
        return told
