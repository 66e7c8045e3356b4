"""Sequences that are decoded together, a row each, as tensors on the model's device: no step waits for the host.

On a GPU a step is a CUDA graph, and the host reads the tokens of one block of steps while the next one runs. So a
sequence that ended is noticed up to a block late; what was computed after its end is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbench.attention import Batch
from kvbench.cache import PageTable, on_device, to_device
from kvbench.cache.pages import pages_of
from kvbench.runners.base import GenerateRequest
from kvbench.runners.processors import Processors
from kvbench.runners.transformers.memory import LARGEST_GRAPH
from kvbench.runners.transformers.sampler import Sampler

BLOCK_STEPS = 16  # between two looks of the host, on a GPU
# rows of a graph; the first step runs the smallest that holds all
GRAPH_SIZES = tuple(2**i for i in range(LARGEST_GRAPH.bit_length()))
SPARSE = 4  # a graph of so many times as many rows is left for a smaller one, which takes time to make

# next-token logits [T, V] of new tokens [T] at positions [T], the batch that they are
Compute = Callable[[Tensor, Tensor, Batch], Tensor]


@dataclass(eq=False)
class Decoding:
    """A sequence that is being decoded. launched: tokens asked of the device; tokens: those that the host has seen.

    processors: what changes its logits, where they take a sequence at a time.
    settled, tails: tokens whose text no later one changes, and what that ends with, without special tokens and with
    them; see `Stopping`.
    """

    index: int
    request: GenerateRequest
    table: PageTable
    tokens: list[int] = field(default_factory=list)
    launched: int = 0
    answered: bool = False
    processors: Any = None
    settled: int = 0
    tails: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Made:
    """Tokens [steps, rows] on their way to the host, of these sequences in order.

    copied: when they are there. decoded: they were made by steps of their own, not beside a pass of prompts.
    """

    sequences: tuple[Decoding, ...]
    tokens: Tensor
    copied: torch.cuda.Event | None
    decoded: bool

    def columns(self) -> list[list[int]]:
        """The new tokens of each sequence."""
        if self.copied is not None:
            self.copied.synchronize()
        columns: list[list[int]] = self.tokens.T.tolist()
        return columns


class DecodeBatch:
    """At most `most` sequences of at most `pages` pages each; `running` are those in rows 0, 1, ...

    draws, processors: of the sampler.
    graphed: steps are CUDA graphs, over padded batches of GRAPH_SIZES rows. A graph reads and writes the cache that it
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
        self.running: list[Decoding] = []
        self.graphed = graphed
        self.graph_bytes = 0  # of the device's memory, which only the graphs can use
        self._page_size = page_size
        self._device = device

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        room = max(GRAPH_SIZES) if graphed else most
        self._tokens = integers(room)  # the next input
        self._positions = integers(room)  # where its key and value are written
        self._ends = integers(room)  # the position from which on nothing is written: an idle row's is 0
        self._pages = integers(room, pages, dtype=torch.int32)
        self._sampler = Sampler(room, pages * page_size, draws=draws, device=device, processors=processors)
        self._state = (self._tokens, self._positions, self._ends, self._pages, *self._sampler.state)
        self._made = integers(BLOCK_STEPS, room)
        self._step = integers(1)
        self._starts = torch.arange(room + 1, dtype=torch.int32, device=device)
        self._size = 0  # rows of the last step, idle ones included
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graph_memory: Any = None  # what the graphs, of which one runs at a time, take in turn

    @property
    def free(self) -> int:
        """How many rows have no sequence."""
        return self.most - len(self.running)

    def admit(self, sequences: Sequence[Decoding], logits: Tensor) -> Made:
        """New sequences, with the logits [n, V] that follow their prompts: chooses the first token of each."""
        first, last = len(self.running), len(self.running) + len(sequences)
        lengths = np.array([len(one.request.prompt) for one in sequences], dtype=np.int64)
        # the last token is only read, never written
        ends = lengths + [one.request.max_new_tokens - 1 for one in sequences]
        pages = pages_of([one.table for one in sequences], width=self._pages.shape[1])
        rows = slice(first, last)
        state = self._positions, self._ends, self._pages
        for tensor, new in zip(state, on_device([lengths, ends, pages], self._device), strict=True):
            tensor[rows] = new
        each = self._sampler.admit(rows, [one.request for one in sequences])
        self.running += sequences
        for one, processors in zip(sequences, each, strict=True):
            one.launched += 1
            one.processors = processors
        self._tokens[rows] = chosen = self._choose(rows, logits, self._positions[rows])
        return self._on_its_way(tuple(sequences), chosen[None], decoded=False)

    def inputs(self) -> tuple[Tensor, Tensor, Batch]:
        """Tokens, positions and batch of the next step, for a caller that computes it together with other work."""
        return self._inputs(len(self.running))

    def take(self, logits: Tensor) -> Made:
        """Ends a step that a caller computed: logits [rows, V]."""
        self._advance(len(self.running), logits)
        return self._collect(1, decoded=False)

    def begin(self, most: int) -> None:
        """Nothing runs; what follows has `most` sequences at most, and depends on nothing that was before it."""
        self.most, self._size = most, 0

    def choose(self) -> bool:
        """Chooses how many rows the next steps have. Whether `block` can run at once; if not, `capture` comes first."""
        running = len(self.running)
        if not self.graphed:
            self._size = running
        elif not self._size // SPARSE < running <= self._size:
            self._size = next(count for count in GRAPH_SIZES if count >= running)
        return not self.graphed or self._size in self._graphs

    def capture(self, compute: Compute) -> None:
        """Makes the graph of the next steps; the sequences stay where they are. compute: one step of the model."""
        size = self._size
        # what a step changes; the key and value that it writes, the next step writes again
        changed = (self._tokens, self._positions, *self._sampler.changed)
        before = [tensor[:size].clone() for tensor in changed]
        # the first step compiles kernels, which a capture can't
        self._advance(size, compute(*self._inputs(size)))
        for tensor, old in zip(changed, before, strict=True):
            tensor[:size] = old
        self._step.zero_()
        self._graphs[size] = self._captured(size, compute)

    def block(self, compute: Compute) -> Made:
        """Some steps for all rows, at least one; a sequence's tokens after its end are to be ignored.

        compute: one step of the model; not called where a graph has it.
        """
        size = self._size
        if not self.graphed:
            self._advance(size, compute(*self._inputs(size)))
            return self._collect(1)
        steps = min(BLOCK_STEPS, max(one.request.max_new_tokens - one.launched for one in self.running))
        for _ in range(steps):
            self._graphs[size].replay()
        return self._collect(steps)

    def retire(self) -> list[Decoding]:
        """Frees the rows whose sequence is answered or needs no more steps, and returns those sequences."""

        def stays(one: Decoding) -> bool:
            return not one.answered and one.launched < one.request.max_new_tokens

        kept = [row for row, one in enumerate(self.running) if stays(one)]
        gone = [one for one in self.running if not stays(one)]
        if gone:
            if kept:
                index = to_device(kept, torch.int64, self._device)
                for tensor in self._state:
                    tensor[: len(kept)] = tensor[index]
            self._ends[len(kept) : len(self.running)] = 0
            self.running = [self.running[row] for row in kept]
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
        rows = slice(0, size)
        chosen = self._choose(rows, logits, self._positions[rows] + 1)
        self._positions[rows] += self._positions[rows] < self._ends[rows]
        self._tokens[rows] = chosen
        self._made[:, rows].index_copy_(0, self._step, chosen[None])
        self._step += 1

    def _choose(self, rows: slice, logits: Tensor, known: Tensor) -> Tensor:
        return self._sampler.choose(rows, [one.processors for one in self.running[rows]], logits, known)

    def _captured(self, size: int, compute: Compute) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._graph_memory = self._graph_memory or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._graph_memory):
            before = torch.cuda.memory_reserved(self._device)
            self._advance(size, compute(*self._inputs(size)))
        self.graph_bytes += torch.cuda.memory_reserved(self._device) - before
        return graph

    def _collect(self, steps: int, decoded: bool = True) -> Made:
        for one in self.running:
            one.launched += steps
        self._step.zero_()
        return self._on_its_way(tuple(self.running), self._made[:steps, : len(self.running)], decoded)

    def _on_its_way(self, sequences: tuple[Decoding, ...], tokens: Tensor, decoded: bool) -> Made:
        if self._device.type != "cuda":
            return Made(sequences, tokens.clone(), None, decoded)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens.contiguous(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Made(sequences, host, copied, decoded)
