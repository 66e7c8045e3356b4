"""What goes into one forward pass, and the passes that compute a tree of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal

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
from kvbench.runners.transformers.schedule import Chunks, Scheduler, pages_for_one

Scoring = Literal["fused", "replay", "prefill_exact"]
LAUNCHED = 2**35  # tokens times weights of a layer, which a GPU multiplies in the time that the layer's launch takes
More = Callable[[Chunks], Sequence[NDArray[Any]]]


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

    def prefill(self, tree: Tree, more: More | None = None) -> Iterator[tuple[Chunks, Tensor, list[Tensor]]]:
        """Every chunk of the tree, parents before children: those of a pass with their hidden states [tokens, H].

        more: arrays that a pass's chunks need besides, which come with them on the device.
        """
        memory, longest = self.memory, tree.longest
        pages = -((tree.start - tree.end) // memory.page_size) + 1
        memory.reserve(longest, int(pages.sum()), pages_for_one(tree, longest, memory.page_size))
        scheduler = self.scheduler(tree, longest)
        self.forward.end()
        with self.forward.attending(), memory.released_by_errors():
            while not scheduler.finished:
                chunks, copies = scheduler.take(1 if self.forward.alone else memory.limits.tokens)
                if not len(chunks):
                    raise OutOfPages(f"the cache is too small for sequences of {longest} tokens")
                memory.copy_pages(copies)
                with self.clock.prefill(int(chunks.counts.sum())), torch.inference_mode():
                    tokens, positions, parts, further = self.inputs(chunks, more(chunks) if more else ())
                    hidden = self.forward.hidden(tokens, positions, parts)
                scheduler.computed(chunks)
                yield chunks, hidden, further
                done = chunks.segments[chunks.completes]
                requests = tree.ending.counts[done]
                for segment, count in zip(done[requests > 0].tolist(), requests[requests > 0].tolist(), strict=True):
                    scheduler.drop(segment, count)

    def inputs(
        self, chunks: Chunks, more: Sequence[NDArray[Any]] = ()
    ) -> tuple[Tensor, Tensor, list[Part], list[Tensor]]:
        """Tokens, positions and parts of a pass, and `more` arrays: by one copy to the device."""
        if chunks.starts[0] == 0:
            self.forward.begin()
        # those that are computed exactly, and the others
        sides = ((slice(chunks.exact), True), (slice(chunks.exact, None), False))
        own = [(self._arrays(chunks.tables[one], chunks.counts[one]), exactly) for one, exactly in sides]
        arrays = [chunks.tokens, chunks.positions, *more, *chain.from_iterable(each for each, _ in own)]
        given = iter(on_device(arrays, self.memory.device))
        tokens, positions, *further = islice(given, 2 + len(more))
        parts = [self.part(self._batch(*islice(given, len(each))), exactly) for each, exactly in own if each]
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
