"""What an executor is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvbench.sweep.job import Job, Tell
from kvbench.sweep.plan import Cell
from kvbench.sweep.spec import ModelSpec


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

    def gpus(self, spec: ModelSpec) -> int:
        """How many GPUs the model is on; 0 on a CPU."""
        ...

    def missing(self, cells: Sequence[Cell]) -> list[str]:
        """What is lacking where the cells would run, one line each with what to do; empty when they can."""
        ...

    def run(self, cells: Sequence[Cell], job: Job, tell: Tell) -> None:
        """Measures every cell, about in this order, and tells of each when it is done.

        What `tell` raises ends all that runs, and is raised; so is what is no cell's fault (see `run_cells`).
        """
        ...


def gpus_here(device: str, spec: ModelSpec) -> int:
    """GPUs of this machine that a process on `device` runs a model on; 0 on a CPU."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if spec.device_map else 1
