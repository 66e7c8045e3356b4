"""What goes into one forward pass, and the passes that compute a tree of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from kvbench.attention import Batch, Near
from kvbench.cache import OutOfPages, PageTable, to_device
from kvbench.runners.base import ScoreRequest
from kvbench.runners.transformers.clock import Clock
from kvbench.runners.transformers.forward import Forward, Part, paged_attention
from kvbench.runners.transformers.memory import Memory
from kvbench.runners.transformers.prefix import MIN_SHARED, Segment, build_tree, segments
from kvbench.runners.transformers.schedule import Chunk, Scheduler, pages_for_one

Scoring = Literal["fused", "replay", "prefill_exact"]


class Passes:
    """Puts forward passes together. scoring: see `TransformersModel.runner`."""

    def __init__(self, forward: Forward, memory: Memory, clock: Clock, scoring: Scoring) -> None:
        self.forward = forward
        self.memory = memory
        self.clock = clock
        self.scoring = scoring

    def tree(self, sequences: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> list[Segment]:
        """What is to be computed of these sequences: their prefix tree, or one after another where they run alone."""
        return unshared(sequences) if self.forward.alone else build_tree(sequences, min_shared)

    def split_tree(self, requests: Sequence[ScoreRequest]) -> list[Segment]:
        """Contexts are shared and exact; each continuation is a segment of its own that reads the cache."""
        roots = build_tree([r.context for r in requests])
        for segment in list(segments(roots)):
            segment.exact = True
            longer = [i for i in segment.ending if len(requests[i].continuation) > 1]
            segment.ending = [i for i in segment.ending if len(requests[i].continuation) == 1]
            for i in longer:
                leaf = Segment(segment, segment.end, requests[i].continuation[:-1], ending=[i])
                segment.children.append(leaf)
        return roots

    def scheduler(self, roots: list[Segment], longest: int) -> Scheduler:
        """Says what each pass over the tree computes; its sequences have `longest` tokens at most."""
        # a sequence that runs alone is not cut: its other layers' states are made for whole prompts
        tokens = self.memory.limits.tokens
        batch_tokens = max(tokens, longest) if self.forward.alone else tokens
        return Scheduler(self.memory.pool, roots, batch_tokens, chunk=1 if self.scoring == "replay" else None)

    def prefill(self, roots: list[Segment], sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[Chunk], Tensor]]:
        """Every chunk of the tree, parents before children: those of a pass with their hidden states [tokens, H]."""
        memory = self.memory
        longest = max(map(len, sequences), default=0)
        least = pages_for_one(roots, longest, memory.page_size)
        memory.reserve(longest, sum(-(-len(s.tokens) // memory.page_size) + 1 for s in segments(roots)), least)
        scheduler = self.scheduler(roots, longest)
        self.forward.end()
        with paged_attention(self.forward.model), memory.released_by_errors():
            while not scheduler.finished:
                chunks, copies = scheduler.take(1 if self.forward.alone else memory.limits.tokens)
                if not chunks:
                    raise OutOfPages(f"the cache is too small for sequences of {longest} tokens")
                memory.copy_pages(copies)
                with self.clock.prefill(sum(len(chunk.tokens) for chunk in chunks)), torch.inference_mode():
                    hidden = self.forward.hidden(*self.inputs(chunks))
                scheduler.computed(chunks)
                yield chunks, hidden
                for chunk in chunks:
                    if chunk.completes:
                        for _ in chunk.segment.ending:
                            scheduler.drop(chunk.segment)

    def inputs(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor, list[Part]]:
        """Tokens, positions and parts of a pass; chunks that are computed exactly come to stand first, in place."""
        chunks.sort(key=lambda chunk: not chunk.segment.exact)
        if chunks[0].start == 0:
            self.forward.begin()
        tokens = to_device([token for chunk in chunks for token in chunk.tokens], torch.int64, self.memory.device)
        parts = []
        for exact in (True, False):
            own = [chunk for chunk in chunks if chunk.segment.exact == exact]
            if own:
                batch = self.batch([chunk.table for chunk in own], [chunk.slots for chunk in own])
                parts.append(self.part(batch, exact))
        return tokens, torch.cat([part.batch.positions for part in parts]), parts

    def batch(self, tables: Sequence[PageTable], slots: Sequence[Sequence[int]]) -> Batch:
        """Of sequences that have just grown, with the slots of their new tokens; their rings grow with them."""
        memory, near = self.memory, None
        if memory.rings is not None:
            page_tokens = memory.packed.scheme.page_tokens
            near = Near.make(memory.rings, tables, [len(own) for own in slots], page_tokens, memory.device)
        return Batch.make(tables, slots, memory.page_size, memory.device, near)

    def part(self, batch: Batch, exact: bool = False) -> Part:
        """A batch whose tokens read the packed cache and its window, or with `exact` the exact one."""
        memory = self.memory
        return Part(batch, memory.packed, memory.window, memory.caches[-1] if exact else None)


def unshared(sequences: Sequence[Sequence[int]]) -> list[Segment]:
    """A tree in which every sequence is a root of its own."""
    return [Segment(None, 0, list(tokens), ending=[i]) for i, tokens in enumerate(sequences)]
