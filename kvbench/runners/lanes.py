"""Sequences that are decoded together, a lane each, as tensors on the model's device: no step waits for the host.

On a GPU a step is a CUDA graph, and the host reads the tokens of one block of steps while the next one runs. So a
sequence that ended is noticed up to a block late; what was computed after its end is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvbench.attention import Batch
from kvbench.cache import PageTable, to_device
from kvbench.runners.base import GenerateRequest
from kvbench.runners.processors import Processors

BLOCK_STEPS = 16  # between two looks of the host, on a GPU
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # lanes of a graph; a step runs the smallest that holds all

# next-token logits [T, V] of new tokens [T] at positions [T], the batch that they are
Compute = Callable[[Tensor, Tensor, Batch], Tensor]


@dataclass(eq=False)
class Run:
    """A request that is being decoded. launched: tokens asked of the device; tokens: those that the host has seen.

    processors: what changes its logits, where they take a sequence at a time.
    """

    index: int
    request: GenerateRequest
    table: PageTable
    tokens: list[int] = field(default_factory=list)
    launched: int = 0
    answered: bool = False
    processors: Any = None


@dataclass(frozen=True)
class Made:
    """Tokens [steps, lanes] on their way to the host, of these runs in order.

    copied: when they are there. decoded: they were made by steps of their own, not beside a pass of prompts.
    """

    runs: tuple[Run, ...]
    tokens: Tensor
    copied: torch.cuda.Event | None
    decoded: bool

    def columns(self) -> list[list[int]]:
        """The new tokens of each run."""
        if self.copied is not None:
            self.copied.synchronize()
        columns: list[list[int]] = self.tokens.T.tolist()
        return columns


class Lanes:
    """At most `most` sequences of at most `pages` pages each; `running` are those in lanes 0, 1, ...

    draws: random numbers that a request's sampling takes at most; 0 where all are greedy.
    processors: what the model does to its logits before a token is chosen; None where it does nothing.
    graphed: steps are CUDA graphs, over padded batches of GRAPH_SIZES lanes. A graph reads and writes the cache that it
    was captured with, so it is of use as long as that one; `most` may change while nothing runs.
    """

    def __init__(
        self,
        *,
        most: int,
        pages: int,
        page_size: int,
        draws: int,
        device: torch.device,
        graphed: bool,
        processors: Processors | None = None,
    ) -> None:
        self.most = most
        self.running: list[Run] = []
        self.graphed = graphed
        self.graph_bytes = 0  # of the device's memory, which only the graphs can use
        self._page_size = page_size
        self._device = device
        self._sampled = draws > 0
        self._processors = processors

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        room = max(GRAPH_SIZES) if graphed else most
        self._tokens = integers(room)  # the next input
        self._positions = integers(room)  # where its key and value are written
        self._ends = integers(room)  # the position from which on nothing is written: an idle lane's is 0
        self._pages = integers(room, pages, dtype=torch.int32)
        self._count = integers(room)  # tokens chosen so far
        self._top_k = integers(room)
        self._temperature = torch.zeros(room, device=device)
        self._top_p = torch.ones(room, device=device)
        self._draws = torch.zeros(room, max(1, draws), device=device)
        self._state: tuple[Tensor, ...] = (
            self._tokens, self._positions, self._ends, self._pages, self._count,
            self._top_k, self._temperature, self._top_p, self._draws,
        )  # fmt: skip
        # the tokens of each lane, filled up with its first: kept only where logits depend on them
        self._history = integers(room, pages * page_size if processors else 0)
        if processors:
            self._state = (*self._state, self._history)
        self._made = integers(BLOCK_STEPS, room)
        self._step = integers(1)
        self._starts = torch.arange(room + 1, dtype=torch.int32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graph_memory: Any = None  # what the graphs, of which one runs at a time, take in turn

    @property
    def free(self) -> int:
        """How many lanes have no sequence."""
        return self.most - len(self.running)

    def admit(self, runs: Sequence[Run], logits: Tensor) -> Made:
        """New sequences, with the logits [n, V] that follow their prompts: chooses the first token of each."""
        first, last = len(self.running), len(self.running) + len(runs)
        width = self._pages.shape[1]
        lengths = [len(run.request.prompt) for run in runs]
        # the last token is only read, never written
        ends = [length + run.request.max_new_tokens - 1 for length, run in zip(lengths, runs, strict=True)]
        pages = [page for run in runs for page in (*run.table.pages, *[0] * (width - len(run.table.pages)))]
        lanes = slice(first, last)
        self._positions[lanes] = to_device(lengths, torch.int64, self._device)
        self._ends[lanes] = to_device(ends, torch.int64, self._device)
        self._pages[lanes] = to_device(pages, torch.int32, self._device).view(-1, width)
        self._count[lanes] = 0
        if self._sampled:
            requests = [run.request for run in runs]
            self._top_k[lanes] = to_device([r.top_k or 0 for r in requests], torch.int64, self._device)
            self._temperature[lanes] = to_device([r.temperature for r in requests], torch.float32, self._device)
            self._top_p[lanes] = to_device(
                [1.0 if r.top_p is None else r.top_p for r in requests], torch.float32, self._device
            )
            drawn = torch.stack([uniform(r.seed, self._draws.shape[1]) for r in requests])
            self._draws[lanes] = to_device(drawn.flatten().tolist(), torch.float32, self._device).view(drawn.shape)
        if self._processors:
            for lane, run in enumerate(runs, first):
                prompt = to_device(run.request.prompt, torch.int64, self._device)
                self._history[lane] = prompt[0]
                self._history[lane, : len(prompt)] = prompt
                run.processors = None if self._processors.of_a_set else self._processors.of(run.request)
        self.running += runs
        for run in runs:
            run.launched += 1
        self._tokens[lanes] = chosen = self._choose(lanes, logits, self._positions[lanes])
        return self._on_its_way(tuple(runs), chosen[None], decoded=False)

    def inputs(self) -> tuple[Tensor, Tensor, Batch]:
        """Tokens, positions and batch of the next step, for a caller that computes it together with other work."""
        return self._inputs(len(self.running))

    def take(self, logits: Tensor) -> Made:
        """Ends a step that a caller computed: logits [lanes, V]."""
        self._advance(len(self.running), logits)
        return self._collect(1, decoded=False)

    @property
    def _size(self) -> int:
        """Lanes of the next step, idle ones included."""
        running = len(self.running)
        return next(count for count in GRAPH_SIZES if count >= running) if self.graphed else running

    @property
    def ready(self) -> bool:
        """Whether `block` can run at once; if not, `capture` comes first."""
        return not self.graphed or self._size in self._graphs

    def capture(self, compute: Compute) -> None:
        """Makes the graph of the next steps; the sequences stay where they are. compute: one step of the model."""
        size = self._size
        # what a step changes; the key and value that it writes, the next step writes again
        changed = (self._tokens, self._positions, self._count, self._history)
        before = [tensor[:size].clone() for tensor in changed]
        # the first step compiles kernels, which a capture can't
        self._advance(size, compute(*self._inputs(size)))
        for tensor, old in zip(changed, before, strict=True):
            tensor[:size] = old
        self._step.zero_()
        self._graphs[size] = self._captured(size, compute)

    def block(self, compute: Compute) -> Made:
        """Some steps for all lanes, at least one; a run's tokens after its end are to be ignored.

        compute: one step of the model; not called where a graph has it.
        """
        size = self._size
        if not self.graphed:
            self._advance(size, compute(*self._inputs(size)))
            return self._collect(1)
        steps = min(BLOCK_STEPS, max(run.request.max_new_tokens - run.launched for run in self.running))
        for _ in range(steps):
            self._graphs[size].replay()
        return self._collect(steps)

    def retire(self) -> list[Run]:
        """Frees the lanes whose sequence is answered or needs no more steps, and returns those sequences."""

        def stays(run: Run) -> bool:
            return not run.answered and run.launched < run.request.max_new_tokens

        kept = [lane for lane, run in enumerate(self.running) if stays(run)]
        gone = [run for run in self.running if not stays(run)]
        if gone:
            if kept:
                index = to_device(kept, torch.int64, self._device)
                for tensor in self._state:
                    tensor[: len(kept)] = tensor[index]
            self._ends[len(kept) : len(self.running)] = 0
            self.running = [self.running[lane] for lane in kept]
        return gone

    # ---- steps, all on the device

    def _inputs(self, size: int) -> tuple[Tensor, Tensor, Batch]:
        positions, pages = self._positions[:size], self._pages[:size]
        active = positions < self._ends[:size]
        page = pages.gather(1, (positions // self._page_size).clamp_max(pages.shape[1] - 1)[:, None])[:, 0]
        slots = torch.where(active, page * self._page_size + positions % self._page_size, -1)
        lengths = torch.where(active, positions + 1, 0).to(torch.int32)
        return (
            self._tokens[:size],
            positions,
            Batch(self._starts[: size + 1], lengths, pages, slots, self._page_size),
        )

    def _advance(self, size: int, logits: Tensor) -> None:
        lanes = slice(0, size)
        chosen = self._choose(lanes, logits, self._positions[lanes] + 1)
        self._positions[lanes] += self._positions[lanes] < self._ends[lanes]
        self._tokens[lanes] = chosen
        self._made[:, lanes].index_copy_(0, self._step, chosen[None])
        self._step += 1

    def _choose(self, lanes: slice, logits: Tensor, known: Tensor) -> Tensor:
        """The next token of each lane, after so many `known` ones: the most likely, or drawn as its request says."""
        if not self._processors:
            return self._sample(lanes, logits)
        history = self._history[lanes]
        logits = logits.float()  # as `generate` has them
        if self._processors.of_a_set:
            logits = self._processors.of_rows(history, logits)
        else:
            rows = zip(self.running[lanes], history, known.tolist(), logits, strict=True)
            changed = [run.processors(tokens[None, :count], row[None]) for run, tokens, count, row in rows]
            logits = torch.cat(changed)
        chosen = self._sample(lanes, logits)
        history.scatter_(1, known.clamp_max(history.shape[1] - 1)[:, None], chosen[:, None])
        return chosen

    def _sample(self, lanes: slice, logits: Tensor) -> Tensor:
        """The most likely token of each lane, or one that is drawn as its request says."""
        likeliest = logits.argmax(-1)
        if not self._sampled:
            return likeliest
        temperature = self._temperature[lanes, None]
        p, order = (logits.float() / temperature.clamp_min(1e-6)).softmax(-1).sort(descending=True, stable=True)
        top_k = self._top_k[lanes, None]
        p = p.where((torch.arange(p.shape[-1], device=p.device) < top_k) | (top_k == 0), 0)
        # of what top_k left, the smallest set that holds top_p: one token at least
        before = p.cumsum(-1) - p
        keep = before < self._top_p[lanes, None] * p.sum(-1, keepdim=True)
        keep[:, 0] = True
        mass = (p * keep).cumsum(-1)
        drawn = self._draws[lanes].gather(1, self._count[lanes, None].clamp_max(self._draws.shape[1] - 1))
        rank = (mass <= drawn * mass[:, -1:]).sum(-1, keepdim=True).clamp_max(p.shape[-1] - 1)
        self._count[lanes] += 1
        return torch.where(temperature[:, 0] > 0, order.gather(1, rank)[:, 0], likeliest)

    def _captured(self, size: int, compute: Compute) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._graph_memory = self._graph_memory or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._graph_memory):
            before = torch.cuda.memory_reserved(self._device)
            self._advance(size, compute(*self._inputs(size)))
        self.graph_bytes += torch.cuda.memory_reserved(self._device) - before
        return graph

    def _collect(self, steps: int, decoded: bool = True) -> Made:
        for run in self.running:
            run.launched += steps
        self._step.zero_()
        return self._on_its_way(tuple(self.running), self._made[:steps, : len(self.running)], decoded)

    def _on_its_way(self, runs: tuple[Run, ...], tokens: Tensor, decoded: bool) -> Made:
        if self._device.type != "cuda":
            return Made(runs, tokens.clone(), None, decoded)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens.contiguous(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Made(runs, host, copied, decoded)


def uniform(seed: int, count: int) -> Tensor:
    """[count] float32 in [0, 1): a request's draws, decided by its seed alone; a longer list begins as a shorter."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
