"""How many tokens a second a runner reads and writes, and how long a context fits. Says nothing of accuracy."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from kvbench.results import Metric, Outcome
from kvbench.tasks import text
from kvbench.tasks.base import Count, Line, Need, Options, RunContext, Tokens, Work

if TYPE_CHECKING:
    from kvbench.runners.base import GenerateRequest, Paged, Runner

VERSION = 2
# left free beside the longest context; what a forward pass took more is subtracted
RESERVE_BYTES = 2**30
CHAIN = 256  # kernels of the graph that says in which of its states a GPU is


class Throughput(Options):
    """Prefill and decode tokens per second on random tokens, and on a GPU how many tokens its memory holds."""

    name: Line = "throughput"
    prompt: Tokens = 1024
    """Tokens of each request."""
    new: Annotated[Tokens, Field(ge=2)] = 128
    """Tokens of each answer."""
    batch: Count = 8
    """Requests at once."""
    repeats: Count = 3
    """Of each time; the medians count."""
    seed: int = 0
    """Of the tokens, not of the sweep."""

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

    def longest(self) -> int:
        return self.prompt + self.new

    def work(self) -> Work:
        answers = self.batch * (1 + min(self.repeats, self.limit or self.repeats))
        return Work(answers * self.prompt, answers, self.new)

    def needs(self) -> frozenset[Need]:
        return frozenset({"generation", "clock"})

    def metrics(self) -> tuple[str, ...]:
        return ()

    def run(self, runner: Runner, context: RunContext) -> Outcome:
        """The medians of the rates of the repeats, each on tokens of its own, so that no prompt is known before.

        Raises:
            ValueError: prompt and answer are longer than the model's positions, the runner measures nothing, or nothing
                was decoded after the prompts.
        """
        self.check_length(runner.info.max_length)
        if not hasattr(runner, "stats"):
            raise ValueError(f"{runner.info.name} is run by what counts no tokens and seconds: take another runner")
        memory = _Memory(runner)
        _settle(runner)
        kernel_us = _kernel_us(runner)  # before the warm-up, since making a graph frees what torch holds unused
        runner.generate(self._requests(runner, "before"))  # compiles, captures, allocates
        repeats = min(self.repeats, self.limit or self.repeats)
        samples = []
        for repeat in range(repeats):
            sample = {"doc_id": repeat, **self._sample(runner, repeat)}
            samples.append(sample | ({"kernel_us": kernel_us()} if kernel_us else {}))
            context.progress(repeat + 1, repeats)
        metrics = []
        for name in ("prefill", "decode"):
            if not all(row[f"{name}_tokens"] for row in samples):
                raise ValueError(f"no {name} could be timed by itself; ask for more new tokens, or a smaller batch")
            rate = median(row[f"{name}_tokens"] / row[f"{name}_seconds"] for row in samples)
            metrics.append(Metric(name, rate, None, repeats, "tokens/s"))
        if (held := memory.tokens()) is not None:
            longest, limit = _longest(cast("Paged", runner), held, runner.info.max_length)
            metrics.append(Metric("memory_holds", held, None, 1, "tokens"))
            metrics.append(Metric("longest_context", longest, None, 1, "tokens"))
            memory.facts["longest_context_limit"] = limit
        state = {"kernel_us": median(row["kernel_us"] for row in samples)} if kernel_us else {}
        return Outcome(tuple(metrics), samples, {**memory.facts, **state})

    def _sample(self, runner: Any, repeat: int) -> dict[str, Any]:
        """One measurement: what the runner counted while it answered, and the seconds that passed in all."""
        requests = self._requests(runner, str(repeat))
        before, began = runner.stats(), time.perf_counter()
        runner.generate(requests)
        seconds, after = time.perf_counter() - began, runner.stats()
        counted = ("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds")
        return {
            "doc_hash": text.sha256(f"{self.seed}/{repeat}"),
            "prompt_hash": text.sha256(" ".join(str(token) for request in requests for token in request.prompt)),
            "filter": "none",
            "seconds": seconds,
            **{name: after.get(name, 0) - before.get(name, 0) for name in counted},
        }

    def _requests(self, runner: Runner, key: str) -> list[GenerateRequest]:
        from kvbench.runners.base import GenerateRequest

        draw, vocabulary = random.Random(f"{self.seed}/{key}"), len(runner.tokenizer)
        return [
            # an answer that ended early would be counted as slow
            GenerateRequest(tuple(draw.randrange(vocabulary) for _ in range(self.prompt)), self.new, ignore_eos=True)
            for _ in range(self.batch)
        ]


def _longest(runner: Paged, held: int, positions: int) -> tuple[int, str]:
    """The longest sequence that a runner takes where memory holds so many tokens, and which of the two limits it."""
    by_memory = runner.longest_sequence(held // runner.page_size)
    return (positions, "the model's positions") if positions <= by_memory else (by_memory, "memory")


def _gpus(runner: Runner) -> list[Any]:
    """Those that a runner's layers are on, each once."""
    return [device for device in dict.fromkeys(getattr(runner, "devices", ())) if device.type == "cuda"]


def _settle(runner: Runner) -> None:
    """The runner's GPUs are as a process finds them that has launched nothing: see `kvbench.runners.settle`."""
    from kvbench.runners.settle import settle

    settle(_gpus(runner))


def _kernel_us(runner: Runner) -> Callable[[], float] | None:
    """What gives the microseconds of a kernel that does next to nothing, in a CUDA graph of many; None on a CPU."""
    if not (devices := _gpus(runner)):
        return None
    from kvbench.runners.settle import Chain

    chains = [Chain(device, CHAIN) for device in devices]
    # of several GPUs the slowest, which every step waits for
    return lambda: max(float(median(chain.kernel_us() for _ in range(5))) for chain in chains)


class _Memory:
    """What a runner's GPU has room for. Made before the runner has a cache; on a CPU it knows nothing."""

    def __init__(self, runner: Runner) -> None:
        import torch

        from kvbench.cache.paged import by_device, fitting_tokens
        from kvbench.runners.transformers.memory import free_memory

        self.facts: dict[str, Any] = {}
        self.allocated: int | None = None
        if torch.device(getattr(runner, "device", "cpu")).type != "cuda":
            return
        paged = cast("Paged", runner)
        gc.collect()  # an earlier runner's cache
        torch.cuda.empty_cache()
        self.free = {device: free_memory(device) for device in dict.fromkeys(paged.devices)}
        scheme = paged.scheme.resolve(getattr(torch, runner.info.compute_dtype))
        room = {device: free - RESERVE_BYTES for device, free in self.free.items()}
        cache = (runner.info.layers, scheme, room)
        self.allocated, _ = fitting_tokens(
            *cache, page_size=paged.page_size, device=paged.devices, learned=paged.learned
        )
        self.token_bytes = by_device(paged.devices, scheme.layer_bytes(runner.info.layers))
        torch.cuda.empty_cache()
        for device in self.free:
            torch.cuda.reset_peak_memory_stats(device)

    def tokens(self) -> int | None:
        """Tokens whose keys and values were allocated, less those whose room a forward pass has shown to need."""
        import torch

        if self.allocated is None:
            return None
        held, facts = [], []
        for device, free in self.free.items():
            working = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
            held.append(int((free - working) // self.token_bytes[device]))
            facts.append({"free_bytes": free, "working_bytes": working})
        # of several devices, the one that holds the fewest tokens
        self.facts = {**facts[held.index(min(held))], "allocated_tokens": self.allocated}
        if len(facts) > 1:
            self.facts["devices"] = facts
        return min(self.allocated, *held)
