"""How many tokens a second a runner reads and writes, and how long a context fits. Says nothing of accuracy."""

from __future__ import annotations

import gc
import random
import time
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, PositiveInt

from kvbench.results import Metric, Outcome
from kvbench.tasks import text
from kvbench.tasks.base import Options, RunContext

if TYPE_CHECKING:
    from kvbench.runners.base import GenerateRequest, Paged, Runner

VERSION = 2
# left free beside the longest context; what a forward pass took more is subtracted
RESERVE_BYTES = 2**30


class Throughput(Options):
    """Prefill and decode tokens per second on random tokens, and on a GPU how many tokens its memory holds.

    prompt, new: tokens of each request. batch: requests at once. repeats: of each time; the medians count.
    seed: of the tokens, not of the sweep.
    """

    name: str = "throughput"
    prompt: PositiveInt = 1024
    new: int = Field(default=128, ge=2)
    batch: PositiveInt = 8
    repeats: PositiveInt = 3
    seed: int = 0

    @property
    def timed(self) -> bool:
        """See Task."""
        return True

    def identity(self) -> dict[str, Any]:
        return {
            "task": "throughput",
            "version": VERSION,
            "prompt": self.prompt,
            "new": self.new,
            "batch": self.batch,
            "repeats": self.repeats,
            "seed": self.seed,
            "limit": self.limit,
        }

    def missing(self) -> list[str]:
        return []

    def answers(self) -> None:
        return None

    def run(self, runner: Runner, context: RunContext) -> Outcome:
        """Rates from the medians over the repeats, each on tokens of its own, so that no prompt is known before.

        Prefill is timed by requests for one token, decode by what requests for all tokens take longer.

        Raises:
            ValueError: prompt and answer are longer than the model's positions, or decoding was too short to time.
        """
        if self.prompt + self.new > runner.info.max_length:
            raise ValueError(
                f"{self.prompt} + {self.new} tokens are more than the model's {runner.info.max_length}; ask for fewer"
            )
        memory = _Memory(runner)
        runner.generate(self._requests(runner, "before", self.new))  # compiles, captures, allocates
        repeats = min(self.repeats, self.limit or self.repeats)
        samples = []
        for repeat in range(repeats):
            samples.append({"doc_id": repeat, **self._seconds(runner, repeat)})
            context.progress(repeat + 1, repeats)
        prefill_seconds, all_seconds, tokens = (
            median(row[name] for row in samples) for name in ("prefill_seconds", "all_seconds", "decode_tokens")
        )
        if tokens <= 0 or all_seconds <= prefill_seconds:
            raise ValueError(f"decoding {tokens} tokens took no time beside the prompts'; ask for more new tokens")
        rates = {
            "prefill": self.batch * self.prompt / prefill_seconds,
            "decode": tokens / (all_seconds - prefill_seconds),
        }
        metrics = [Metric(name, rate, None, repeats, "tokens/s") for name, rate in rates.items()]
        if (tokens_held := memory.tokens()) is not None:
            longest, limit = _longest(cast("Paged", runner), tokens_held, runner.info.max_length)
            metrics.append(Metric("memory_holds", tokens_held, None, 1, "tokens"))
            metrics.append(Metric("longest_context", longest, None, 1, "tokens"))
            memory.facts["longest_context_limit"] = limit
        return Outcome(tuple(metrics), samples, memory.facts)

    def _seconds(self, runner: Runner, repeat: int) -> dict[str, Any]:
        """One measurement, as a sample."""
        first, second = self._requests(runner, f"{repeat}/first", 1), self._requests(runner, f"{repeat}/all", self.new)
        began = time.perf_counter()
        runner.generate(first)
        between = time.perf_counter()
        made = runner.generate(second)
        ended = time.perf_counter()
        return {
            "doc_hash": text.sha256(f"{self.seed}/{repeat}"),
            "prompt_hash": text.sha256(" ".join(str(token) for request in second for token in request.prompt)),
            "filter": "none",
            "prefill_seconds": between - began,
            "all_seconds": ended - between,
            "decode_tokens": sum(len(generation.tokens) for generation in made) - self.batch,
        }

    def _requests(self, runner: Runner, key: str, new: int) -> list[GenerateRequest]:
        from kvbench.runners.base import GenerateRequest

        draw, vocabulary = random.Random(f"{self.seed}/{key}"), len(runner.tokenizer)
        return [
            GenerateRequest(tuple(draw.randrange(vocabulary) for _ in range(self.prompt)), new)
            for _ in range(self.batch)
        ]


def _longest(runner: Paged, held: int, positions: int) -> tuple[int, str]:
    """The longest sequence that a runner takes where memory holds so many tokens, and which of the two limits it."""
    by_memory = runner.longest_sequence(held // runner.page_size)
    return (positions, "the model's positions") if positions <= by_memory else (by_memory, "memory")


class _Memory:
    """What a runner's GPU has room for. Made before the runner has a cache; on a CPU it knows nothing."""

    def __init__(self, runner: Runner) -> None:
        import torch

        from kvbench.cache.paged import fitting_tokens

        self.facts: dict[str, Any] = {}
        self.allocated: int | None = None
        if torch.device(getattr(runner, "device", "cpu")).type != "cuda":
            return
        paged = cast("Paged", runner)
        gc.collect()  # an earlier runner's cache
        torch.cuda.empty_cache()
        self.free = torch.cuda.mem_get_info()[0]
        dtype = getattr(torch, runner.info.compute_dtype)
        cache = (runner.info.layers, paged.scheme.resolve(dtype), self.free - RESERVE_BYTES)
        self.allocated, self.token_bytes = fitting_tokens(*cache, page_size=paged.page_size, device=paged.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def tokens(self) -> int | None:
        """Tokens whose keys and values were allocated, less those whose room a forward pass has shown to need."""
        import torch

        if self.allocated is None:
            return None
        working = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        self.facts = {"free_bytes": self.free, "working_bytes": working, "allocated_tokens": self.allocated}
        return min(self.allocated, int((self.free - working) // self.token_bytes))
