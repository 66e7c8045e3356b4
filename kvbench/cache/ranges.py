"""Many short ranges of integers as whole arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def starts_of(counts: Ints) -> Ints:
    """Where each of some ranges begins that stand one after another and are so long."""
    starts: Ints = np.cumsum(counts) - counts
    return starts


def ranges(starts: Ints, counts: Ints) -> Ints:
    """The integers start, start + 1, ... of each range, one range after another."""
    made: Ints = np.repeat(starts - starts_of(counts), counts) + np.arange(counts.sum())
    return made


@dataclass(frozen=True)
class Grouped:
    """Indices by the key that each has. order: [n], by key and in order. bounds: where each key's begin and end."""

    order: Ints
    bounds: Ints

    def __getitem__(self, key: int) -> list[int]:
        """The indices of a key, counted from the lowest."""
        found: list[int] = self.order[self.bounds[key] : self.bounds[key + 1]].tolist()
        return found

    @classmethod
    def by(cls, keys: Ints, lowest: int, count: int) -> Grouped:
        """The indices of `keys`, which are `count` at most from `lowest` on."""
        order = np.argsort(keys, kind="stable")
        return cls(order, np.searchsorted(keys[order], np.arange(lowest, lowest + count + 1)))

    @cached_property
    def counts(self) -> Ints:
        """How many indices each key has."""
        made: Ints = np.diff(self.bounds)
        return made
