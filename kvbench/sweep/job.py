"""What passes between a sweep and what runs its cells; all of it can be sent to another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvbench.results import Record, Tensors
from kvbench.schemes import Scheme
from kvbench.sweep.parts import REAL, Parts


class Baselines(Protocol):
    """Where the tensors are that cells share: a run folder, or what stands for it on another machine."""

    def baseline(self, identity: Mapping[str, Any], slug: str, compute: Callable[[], Tensors]) -> Tensors:
        """The tensors kept under `identity`, computed and kept where they are missing."""
        ...


@dataclass(frozen=True)
class Job:
    """What all cells of a sweep share.

    agreement: whether a model is held against transformers first. known: how that ended before, by its key.
    """

    baselines: Baselines
    baseline: Scheme
    page_size: int
    attention: str
    device: str
    environment: dict[str, Any]
    parts: Parts = REAL
    agreement: bool = True
    known: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loading:
    """A model is being loaded."""

    model: str


@dataclass(frozen=True)
class Started:
    """A cell begins."""

    cell: str


@dataclass(frozen=True)
class Advanced:
    """The running cell has done some of its requests."""

    done: int
    total: int


@dataclass(frozen=True)
class Finished:
    """A cell is done, or has failed. broken: what ran it can run no other, since its GPU fails every call."""

    record: Record
    samples: list[dict[str, Any]]
    broken: bool = False


Step = Loading | Started | Advanced
Event = Step | Finished
Tell = Callable[[int, Event], None]  # the number of a seat, where one cell at a time runs, and what happened there
