"""The draws of lm-eval's bootstrap, a resample at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np


class Draws:
    """What `random.Random(seed).choices` gives, element by element: numpy has the same generator."""

    def __init__(self, seed: int) -> None:
        *key, position = random.Random(seed).getstate()[1]
        self._generator = np.random.RandomState()
        self._generator.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), 0, 0.0))
        self._given: Sequence[Any] = ()
        self._population = np.empty(0, dtype=object)

    def choices(self, population: Sequence[Any], *, k: int) -> list[Any]:
        """`k` elements, with replacement."""
        if population is not self._given:
            self._given, self._population = population, np.fromiter(population, object, len(population))
        index = (self._generator.random_sample(k) * len(population)).astype(np.int64)
        drawn: list[Any] = self._population[index].tolist()
        return drawn


@contextmanager
def drawn_at_once() -> Iterator[None]:
    """Inside the block lm-eval's bootstrap draws by `Draws`."""
    from lm_eval.api import metrics

    metrics.random = SimpleNamespace(**{**vars(random), "Random": Draws})
    try:
        yield
    finally:
        metrics.random = random
