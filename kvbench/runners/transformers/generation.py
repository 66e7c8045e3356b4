"""Answers to prompts: prefill and decoding in one loop, in which sequences come and go."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbench.attention import Batch
from kvbench.cache import OutOfPages
from kvbench.runners.base import GenerateRequest, Generation, Progress
from kvbench.runners.processors import Processors, with_defaults
from kvbench.runners.settings import refusal
from kvbench.runners.transformers.decode import DecodeBatch, Decoding, Made
from kvbench.runners.transformers.passes import Passes
from kvbench.runners.transformers.prefix import Flat
from kvbench.runners.transformers.schedule import Chunks, Scheduler, pages_for_one
from kvbench.runners.transformers.stopping import Stopping


class Generator:
    """Generates with one model. graphed: steps may be CUDA graphs."""

    def __init__(self, passes: Passes, tokenizer: Any, graphed: bool) -> None:
        self._passes = passes
        self._forward = passes.forward
        self.memory = passes.memory
        self._stopping = Stopping(tokenizer, self._forward.model.generation_config)
        self._processors = Processors(self._forward.model, self._forward.places.last)
        self._graphed = graphed
        self._pipelined = len(self._forward.places.devices) > 1
        self._running: list[Decoding] = []  # of the next step, in the rows' order

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None) -> list[Generation]:
        """One Generation a request, in the order of the requests. See `TransformersRunner.generate`."""
        if not requests:
            return []
        settings = self._forward.model.generation_config.to_dict()
        if refused := refusal(settings, sampled=any(r.temperature > 0 for r in requests)):
            raise ValueError(refused)
        requests = [with_defaults(r, settings) for r in requests]
        prompts = [r.prompt for r in requests]
        if not all(prompts):
            raise ValueError("a prompt has no tokens: give it one, such as the tokenizer's bos token")
        memory, clock = self.memory, self._passes.clock
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        tree = self._passes.tree(Flat.of(prompts))
        each = pages_for_one(tree, longest, memory.page_size)
        memory.reserve(longest, each * min(memory.limits.sequences, len(requests)), each)
        # so many that neither their prompts nor their answers can take each other's last page
        most = 1 if self._forward.alone else max(1, min(memory.limits.sequences, memory.pool.free_pages // each))
        tree.exact[:] = self._passes.scoring == "prefill_exact"
        scheduler = self._passes.scheduler(tree, longest)
        sampled = [r for r in requests if r.temperature > 0]
        batch = self._decode_batch(most, longest, max((r.max_new_tokens for r in sampled), default=0))
        answers: list[Generation | None] = [None] * len(requests)
        waiting: deque[tuple[int, int, Tensor]] = deque()  # computed prompts: index, segment, last hidden state
        pending: deque[Made] = deque()
        self._forward.end()
        stuck = False  # no page is free for a prompt's next tokens

        with self._forward.attending(), memory.released_by_errors(), torch.inference_mode():
            while True:
                idle = True
                # a pass with steps of running sequences waits for the last one: over several devices, prompts go first
                full = stuck or scheduler.finished or batch.free <= len(waiting)
                ready = waiting and batch.free and (full or not self._pipelined)
                if ready and (admitted := self._admit(batch, waiting, requests, scheduler)):
                    pending.append(admitted)
                    idle = False
                for gone in batch.retire():
                    memory.pool.release(gone.table)
                self._running = batch.running
                chunks: Chunks | None = None
                room = batch.free - len(waiting)
                if not scheduler.finished and room > 0:
                    chunks, copies = scheduler.take(room, others=len(batch.running))
                    stuck = not len(chunks)
                    if not (len(chunks) or batch.running or waiting):
                        raise OutOfPages(f"the cache is too small for prompts and answers of {longest} tokens")
                    # a segment whose own pages must wait may have its parent's last one already
                    memory.copy_pages(copies)
                if chunks:
                    with clock.prefill(int(chunks.counts.sum()) + len(batch.running)):
                        hidden, made = self._mixed_pass(chunks, batch)
                    scheduler.computed(chunks)
                    done = chunks.completes
                    lasts = (np.cumsum(chunks.counts) - 1)[done].tolist()
                    for segment, last in zip(chunks.segments[done].tolist(), lasts, strict=True):
                        state = hidden[last : last + 1]
                        # many passes may wait, of which nothing but this is kept
                        state = state.clone() if self._pipelined else state
                        waiting.extend((i, segment, state) for i in tree.ending[segment])
                    pending.extend(made)
                    idle = False
                elif batch.running:
                    if not batch.choose():
                        with clock.capture():
                            batch.capture(self._step)
                    with clock.decode():
                        pending.append(batch.block(self._step))
                    idle = False
                # the newest tokens of graphs are still being computed
                while len(pending) > (1 if batch.graphed and not idle else 0):
                    self._answer(pending.popleft(), answers)
                    if progress is not None:
                        progress(sum(answer is not None for answer in answers), len(requests))
                if idle and not pending and not waiting and scheduler.finished and not batch.running:
                    break
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    def _decode_batch(self, most: int, longest: int, draws: int) -> DecodeBatch:
        """Room for so many sequences of so many tokens. With graphs, the batch that an earlier call left."""
        # rounded up, so that similar calls share them, and a call's graphs do not depend on what came before it
        pages = _power_of_two(self.memory.pool.pages_for(longest))
        draws = _power_of_two(draws) if draws else 0
        batch = self.memory.graphed.get((pages, draws))
        if batch is None:
            batch = DecodeBatch(
                most=most,
                pages=pages,
                page_size=self.memory.page_size,
                draws=draws,
                device=self._forward.places.last,
                graphed=self._graphed and self._processors.of_a_set,
                processors=self._processors or None,
            )
            if batch.graphed:
                self.memory.graphed[pages, draws] = batch
        assert isinstance(batch, DecodeBatch)
        batch.begin(most)
        return batch

    def _admit(
        self,
        batch: DecodeBatch,
        waiting: deque[tuple[int, int, Tensor]],
        requests: Sequence[GenerateRequest],
        scheduler: Scheduler,
    ) -> Made | None:
        """Gives computed prompts a row, as many as there are rows and pages for."""
        pool = self.memory.pool
        admitted: list[Decoding] = []
        hidden: list[Tensor] = []
        while waiting and len(admitted) < batch.free:
            index, segment, last = waiting[0]
            wanted = len(requests[index].prompt) + requests[index].max_new_tokens
            # its pages, and one more for a copy of the last that others share
            if pool.pages_for(wanted) - len(scheduler.pages(segment)) + 1 > pool.free_pages:
                if admitted or batch.running:
                    break  # it waits for those to end
                raise OutOfPages(f"the cache is too small for a prompt and an answer of {wanted} tokens")
            waiting.popleft()
            table, copies = scheduler.claim(segment)
            self.memory.copy_pages(copies)
            pool.reserve(table, wanted)
            admitted.append(Decoding(index, requests[index], table))
            hidden.append(last)
        return batch.admit(admitted, self._forward.logits(torch.cat(hidden))) if admitted else None

    def _mixed_pass(self, chunks: Chunks, batch: DecodeBatch) -> tuple[Tensor, list[Made]]:
        """The hidden states of the chunks' tokens, and a token more of every running sequence."""
        tokens, positions, parts, _ = self._passes.put(self._passes.inputs(chunks))
        if not batch.running:
            return self._forward.hidden(tokens, positions, parts), []
        next_tokens, next_positions, decoded = batch.inputs()
        parts.append(self._passes.part(self._grown(decoded)))
        more = (x.to(self.memory.device, non_blocking=True) for x in (next_tokens, next_positions))
        both = zip((tokens, positions), more, strict=True)
        all_tokens, all_positions = map(torch.cat, both)
        hidden, last = self._forward.hidden(all_tokens, all_positions, parts).split([len(tokens), len(next_tokens)])
        return hidden, [batch.take(self._forward.logits(last))]

    def _step(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Next-token logits [T, V] of one step of a decode batch."""
        parts = [self._passes.part(self._grown(batch))]
        return self._forward.logits(self._forward.hidden(tokens, positions, parts))

    def _grown(self, batch: Batch) -> Batch:
        """The running sequences' next step; with rings, which the host keeps, their page tables grow here."""
        if self.memory.rings is None:
            return batch
        tables = [one.table for one in self._running]
        for table in tables:
            self.memory.pool.trim(table)
            self.memory.pool.extend(table, 1)
        return self._passes.grown(tables)

    def _answer(self, made: Made, answers: list[Generation | None]) -> None:
        """Gives each sequence its new tokens, and answers those that ended."""
        for one, new in zip(made.sequences, made.columns(), strict=True):
            if one.answered:
                continue
            before = len(one.tokens)
            text = self._stopping.extend(one, new)
            if made.decoded:
                self._passes.clock.decoded += len(one.tokens) - before
            if text is not None:
                answers[one.index] = Generation(text, tuple(one.tokens))


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << (count - 1).bit_length()
