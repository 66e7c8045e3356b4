"""What goes into one forward pass, and the passes that compute a tree of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbench.attention import Batch, Near
from kvbench.cache import OutOfPages, PageTable, on_device
from kvbench.cache.ranges import Ints
from kvbench.runners.transformers.clock import Clock
from kvbench.runners.transformers.forward import Forward, Part
from kvbench.runners.transformers.memory import Memory
from kvbench.runners.transformers.prefix import MIN_SHARED, Flat, Tree, build_tree, unshared
from kvbench.runners.transformers.schedule import Chunks, Copies, Scheduler, pages_for_one

Scoring = Literal["fused", "replay", "prefill_exact"]
LAUNCHED = 2**35  # tokens times weights of a layer, which a GPU multiplies in the time that the layer's launch takes
KEPT_TOKENS = 2**21  # of requests, more of which no passes are kept of


class Rows(Protocol):
    """What a pass's chunks need besides."""

    @property
    def arrays(self) -> Sequence[NDArray[Any]]: ...


More = Callable[[Chunks], Rows]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a pass takes, as arrays on the host: tokens, positions, `more` others, and those of the batch on each side.

    sides: of how many arrays each is, and whether it is computed exactly. begins: with the beginning of a sequence.
    """

    arrays: list[NDArray[Any]]
    more: int
    sides: list[tuple[int, bool]]
    begins: bool


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass computes. copies: of pages, before it. rows: what its chunks need besides."""

    chunks: Chunks
    copies: Copies
    inputs: Inputs
    rows: Any


class Passes:
    """Puts forward passes together. scoring: see `TransformersModel.runner`."""

    def __init__(self, forward: Forward, memory: Memory, clock: Clock, scoring: Scoring) -> None:
        self.forward = forward
        self.memory = memory
        self.clock = clock
        self.scoring = scoring
        self._worth = 0
        if memory.device.type == "cuda":
            weights = sum(parameter.numel() for parameter in forward.model.parameters())
            self._worth = LAUNCHED * len(memory.devices) // max(1, weights)

    def tree(self, sequences: Flat, min_shared: int = MIN_SHARED) -> Tree:
        """What is to be computed of these sequences: their prefix tree, or one after another where they run alone."""
        if self.forward.alone:
            return unshared(sequences)
        return build_tree(sequences, min_shared, self._worth)

    def split_tree(self, sequences: Flat, contexts: Ints) -> Tree:
        """Contexts, of so many tokens, are shared and exact; what follows one reads the cache, a segment a request."""
        tree = build_tree(sequences._replace(lengths=contexts))
        longer = np.flatnonzero(sequences.lengths > contexts)
        firsts, more = (sequences.firsts + contexts)[longer], (sequences.lengths - contexts)[longer]
        split = tree.with_leaves(tree.leaf[longer], firsts, more, longer)
        split.exact[: len(tree)] = True
        return split

    def scheduler(self, tree: Tree, longest: int) -> Scheduler:
        """Says what each pass over the tree computes; its sequences have `longest` tokens at most."""
        # a sequence that runs alone is not cut: its other layers' states are made for whole prompts
        tokens = self.memory.limits.tokens
        batch_tokens = max(tokens, longest) if self.forward.alone else tokens
        return Scheduler(self.memory.pool, tree, batch_tokens, chunk=1 if self.scoring == "replay" else None)

    def prefill(
        self, tree: Tree, more: More | None = None, kept: dict[Any, Any] | None = None
    ) -> Iterator[tuple[Pass, Tensor, list[Tensor]]]:
        """Every pass over the tree, parents before children, with its hidden states [tokens, H].

        more: what a pass's chunks need besides, whose arrays come with them on the device.
        kept: where the passes are kept, and are taken from by a later call for the same tree and `more`.
        """
        memory, longest = self.memory, tree.longest
        pages = -((tree.start - tree.end) // memory.page_size) + 1
        memory.reserve(longest, int(pages.sum()), pages_for_one(tree, longest, memory.page_size))
        self.forward.end()
        with self.forward.attending(), memory.released_by_errors():
            for one in self._planned(tree, longest, more, kept):
                memory.copy_pages(one.copies)
                with self.clock.prefill(int(one.chunks.counts.sum())), torch.inference_mode():
                    tokens, positions, parts, further = self.put(one.inputs)
                    hidden = self.forward.hidden(tokens, positions, parts)
                yield one, hidden, further

    def _planned(self, tree: Tree, longest: int, more: More | None, kept: dict[Any, Any] | None) -> Iterator[Pass]:
        """The passes over a tree, of whose sequences none is left in the pool behind the last one."""
        memory, pool = self.memory, self.memory.pool
        # which pages are free decides where sequences lie: all of them, and no ring beside
        if memory.rings is not None or pool.free_pages < pool.pages or len(tree.tokens) > KEPT_TOKENS:
            kept = None
        key = pool.pages, pool.page_size, memory.limits, self.scoring
        if kept is not None and key in kept:
            yield from kept[key]
            return
        scheduler, made = self.scheduler(tree, longest), []
        while not scheduler.finished:
            chunks, copies = scheduler.take(1 if self.forward.alone else memory.limits.tokens)
            if not len(chunks):
                raise OutOfPages(f"the cache is too small for sequences of {longest} tokens")
            rows = more(chunks) if more else None
            one = Pass(chunks, copies, self.inputs(chunks, rows.arrays if rows else ()), rows)
            yield one
            if kept is not None:
                made.append(one)
            scheduler.computed(chunks)
            done = chunks.segments[chunks.completes]
            requests = tree.ending.counts[done]
            for segment, count in zip(done[requests > 0].tolist(), requests[requests > 0].tolist(), strict=True):
                scheduler.drop(segment, count)
        if kept is not None:
            kept[key] = made

    def inputs(self, chunks: Chunks, more: Sequence[NDArray[Any]] = ()) -> Inputs:
        """What a pass of these chunks takes, and `more` arrays, on the host."""
        # those that are computed exactly, and the others
        sides = ((slice(chunks.exact), True), (slice(chunks.exact, None), False))
        own = [(self._arrays(chunks.tables[one], chunks.counts[one]), exactly) for one, exactly in sides]
        arrays = [chunks.tokens, chunks.positions, *more, *chain.from_iterable(each for each, _ in own)]
        sizes = [(len(each), exactly) for each, exactly in own if each]
        return Inputs(arrays, len(more), sizes, bool(chunks.starts[0] == 0))

    def put(self, inputs: Inputs) -> tuple[Tensor, Tensor, list[Part], list[Tensor]]:
        """Tokens, positions and parts of a pass, and what came with them: by one copy to the device."""
        if inputs.begins:
            self.forward.begin()
        given = iter(on_device(inputs.arrays, self.memory.device))
        tokens, positions, *further = islice(given, 2 + inputs.more)
        parts = [self.part(self._batch(*islice(given, count)), exactly) for count, exactly in inputs.sides]
        return tokens, positions, parts, further

    def grown(self, tables: Sequence[PageTable]) -> Batch:
        """Of sequences that have just grown by a token each; their rings grow with them."""
        return self._batch(*on_device(self._arrays(tables, [1] * len(tables)), self.memory.device))

    def _arrays(self, tables: Sequence[PageTable], counts: Sequence[int] | Ints) -> list[NDArray[Any]]:
        """What `_batch` is made of, of sequences that have just grown by so many tokens each; nothing of none."""
        memory = self.memory
        if not tables:
            return []
        arrays = Batch.arrays(tables, counts, memory.page_size)
        if memory.rings is not None:
            arrays += Near.arrays(memory.rings, tables, counts, memory.packed.scheme.page_tokens)
        return arrays

    def _batch(self, starts: Tensor, lengths: Tensor, pages: Tensor, slots: Tensor, *near: Tensor) -> Batch:
        memory = self.memory
        rings = Near.of(near, memory.rings.page_size) if near and memory.rings is not None else None
        return Batch(starts, lengths, pages, slots, memory.page_size, rings)

    def part(self, batch: Batch, exact: bool = False) -> Part:
        """A batch whose tokens read the packed cache and its window, or with `exact` the exact one."""
        memory = self.memory
        return Part(batch, memory.packed, memory.window, memory.caches[-1] if exact else None)
