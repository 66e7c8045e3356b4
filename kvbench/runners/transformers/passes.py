"""What goes into one forward pass, and the passes that compute a tree of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbench.attention import Batch, Near
from kvbench.cache import OutOfPages, PageTable, on_device
from kvbench.cache.ranges import Ints
from kvbench.runners.transformers.clock import Clock
from kvbench.runners.transformers.forward import Forward, Part, paged_attention
from kvbench.runners.transformers.memory import Memory
from kvbench.runners.transformers.prefix import MIN_SHARED, Flat, Tree, build_tree, unshared
from kvbench.runners.transformers.schedule import Chunks, Scheduler, pages_for_one

Scoring = Literal["fused", "replay", "prefill_exact"]


class Passes:
    """Puts forward passes together. scoring: see `TransformersModel.runner`."""

    def __init__(self, forward: Forward, memory: Memory, clock: Clock, scoring: Scoring) -> None:
        self.forward = forward
        self.memory = memory
        self.clock = clock
        self.scoring = scoring

    def tree(self, sequences: Flat, min_shared: int = MIN_SHARED) -> Tree:
        """What is to be computed of these sequences: their prefix tree, or one after another where they run alone."""
        return unshared(sequences) if self.forward.alone else build_tree(sequences, min_shared)

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

    def prefill(self, tree: Tree) -> Iterator[tuple[Chunks, Tensor]]:
        """Every chunk of the tree, parents before children: those of a pass with their hidden states [tokens, H]."""
        memory, longest = self.memory, tree.longest
        pages = -((tree.start - tree.end) // memory.page_size) + 1
        memory.reserve(longest, int(pages.sum()), pages_for_one(tree, longest, memory.page_size))
        scheduler = self.scheduler(tree, longest)
        self.forward.end()
        with paged_attention(self.forward.model), memory.released_by_errors():
            while not scheduler.finished:
                chunks, copies = scheduler.take(1 if self.forward.alone else memory.limits.tokens)
                if not len(chunks):
                    raise OutOfPages(f"the cache is too small for sequences of {longest} tokens")
                memory.copy_pages(copies)
                with self.clock.prefill(int(chunks.counts.sum())), torch.inference_mode():
                    hidden = self.forward.hidden(*self.inputs(chunks))
                scheduler.computed(chunks)
                yield chunks, hidden
                done = chunks.segments[chunks.completes]
                requests = tree.ending.counts[done]
                for segment, count in zip(done[requests > 0].tolist(), requests[requests > 0].tolist(), strict=True):
                    scheduler.drop(segment, count)

    def inputs(self, chunks: Chunks) -> tuple[Tensor, Tensor, list[Part]]:
        """Tokens, positions and parts of a pass."""
        if chunks.starts[0] == 0:
            self.forward.begin()
        memory, exact = self.memory, chunks.exact
        arrays: list[NDArray[Any]] = [chunks.tokens, chunks.positions]
        # those that are computed exactly, and the others
        own = [(chunks.tables[part], chunks.counts[part]) for part in (slice(exact), slice(exact, None))]
        for tables, counts in own:
            arrays += Batch.arrays(tables, counts, memory.page_size) if tables else []
        tokens, positions, *tensors = on_device(arrays, memory.device)
        parts = []
        for (tables, counts), exactly in zip(own, (True, False), strict=True):
            if tables:
                starts, lengths, pages, slots, *tensors = tensors
                near = self._near(tables, counts)
                parts.append(self.part(Batch(starts, lengths, pages, slots, memory.page_size, near), exactly))
        return tokens, positions, parts

    def grown(self, tables: Sequence[PageTable]) -> Batch:
        """Of sequences that have just grown by a token each; their rings grow with them."""
        counts = [1] * len(tables)
        return Batch.make(tables, counts, self.memory.page_size, self.memory.device, self._near(tables, counts))

    def _near(self, tables: Sequence[PageTable], counts: Sequence[int] | Ints) -> Near | None:
        memory = self.memory
        if memory.rings is None:
            return None
        return Near.make(memory.rings, tables, counts, memory.packed.scheme.page_tokens, memory.device)

    def part(self, batch: Batch, exact: bool = False) -> Part:
        """A batch whose tokens read the packed cache and its window, or with `exact` the exact one."""
        memory = self.memory
        return Part(batch, memory.packed, memory.window, memory.caches[-1] if exact else None)
