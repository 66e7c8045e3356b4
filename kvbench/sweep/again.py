"""The A/A cell: the baseline once more, in other batches and under another seed. What then moves is noise.

A timed task is repeated as it was: what other batches take says nothing of what these take. A low-bit scheme's repeats
are the runner's own (`nudge`): they differ by noise in the embedding, not by batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvbench.runners.base import (
    GenerateRequest,
    Generation,
    ModelInfo,
    Next,
    NextRequest,
    Progress,
    Runner,
    Score,
    ScoreRequest,
)

Request = TypeVar("Request")
Answer = TypeVar("Answer")
LOTS = 2  # a runner may sort what it gets at once, so another order alone could make the same batches


@dataclass
class Around:
    """A runner around another one, which gives all that a subclass does not."""

    runner: Runner
    info: ModelInfo = field(init=False)
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.info = self.runner.info
        self.tokenizer = self.runner.tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)


@dataclass
class Shuffled(Around):
    """A runner that gets its requests in a seeded order and in lots; answers come in the order of the requests."""

    seed: int

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """As the runner's."""
        return self._in_lots(self.runner.score, requests, progress)

    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Any]:
        """As the runner's."""
        return self._in_lots(self.runner.hidden_states, documents, progress)

    def next_tokens(self, requests: Sequence[NextRequest], progress: Progress | None = None) -> list[Next]:
        """As the runner's."""
        return self._in_lots(self.runner.next_tokens, requests, progress)

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """As the runner's."""
        return self._in_lots(self.runner.generate, requests, progress)

    def log_probs(self, hidden: Any) -> Any:
        """As the runner's."""
        return self.runner.log_probs(hidden)

    def _in_lots(
        self,
        ask: Callable[[Sequence[Request], Progress | None], Sequence[Answer]],
        requests: Sequence[Request],
        progress: Progress | None,
    ) -> list[Answer]:
        order = list(range(len(requests)))
        random.Random(self.seed).shuffle(order)
        answers: dict[int, Answer] = {}
        for lot in filter(None, (order[first::LOTS] for first in range(LOTS))):
            before = len(answers)

            def further(done: int, _: int, before: int = before) -> None:
                if progress:
                    progress(before + done, len(order))

            answers.update(zip(lot, ask([requests[i] for i in lot], further), strict=True))
        return [answers[i] for i in range(len(order))]
