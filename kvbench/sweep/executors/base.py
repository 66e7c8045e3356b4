"""What an executor is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvbench.sweep.job import Job, Tell
from kvbench.sweep.plan import Cell


class Executor(Protocol):
    """Something that measures cells. It writes no record: whoever called it does, as it is told of them."""

    @property
    def device(self) -> str:
        """What cells run on: "cpu" or "cuda"."""
        ...

    @property
    def device_name(self) -> str:
        """What that is called, of which a speed is: a GPU's name, or "cpu"."""
        ...

    def missing(self, cells: Sequence[Cell]) -> list[str]:
        """What is lacking where the cells would run, one line each with what to do; empty when they can."""
        ...

    def run(self, cells: Sequence[Cell], job: Job, tell: Tell) -> None:
        """Measures every cell, about in this order, and tells of each when it is done.

        What `tell` raises ends all that runs, and is raised; so is what is no cell's fault (see `run_cells`).
        """
        ...
