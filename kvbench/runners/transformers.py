"""Transformers models whose attention reads and writes our paged cache.

A decoder is token-wise outside attention, so many sequences without padding are one row of tokens with position
ids: our attention function knows where each begins. Models whose other layers carry state too (linear attention),
or whose rotary frequencies depend on the longest position of a pass, run one sequence at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from kvbench.attention import Batch, attend
from kvbench.cache import OutOfPages, PagedCache, PagePool, PageTable
from kvbench.runners import models
from kvbench.runners.base import GenerateRequest, Generation, ModelInfo, Progress, Score, ScoreRequest
from kvbench.runners.prefix import Segment, build_tree
from kvbench.runners.schedule import Piece, Prefill
from kvbench.schemes import Scheme

Scoring = Literal["fused", "replay"]

NAME = "kvbench"  # of our attention among transformers' implementations
BATCH_TOKENS = 2048  # of one forward pass
BATCH_SEQUENCES = 64  # decoded at once
LOGIT_ROWS = 256  # rows whose full-vocabulary logits are held at once
STATEFUL_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class _Step:
    """What our attention function needs to know of the forward pass it is called in."""

    cache: PagedCache
    batch: Batch
    layer_index: dict[int, int]  # the model's layer number to the cache's


_step: ContextVar[_Step] = ContextVar("kvbench_step")


def _attention(
    module: Any,
    query: Tensor,  # [1, HQ, T, D]
    key: Tensor,  # [1, HKV, T, D]
    value: Tensor,  # [1, HKV, T, D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the new keys and values, then read only the cache: [1, T, HQ, D]."""
    step = _step.get()
    layer = step.layer_index[module.layer_idx]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    step.cache.append(layer, k, v, step.batch.slot_mapping)
    out = attend(
        q,
        step.cache,
        layer,
        step.batch,
        impl="reference",
        scaling=q.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Our attention knows the sequences' boundaries; no mask is made."""


@contextmanager
def paged_attention(model: Any) -> Iterator[None]:
    """`model` attends through the paged cache inside the block, and as before after it."""
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


class _Counter(DynamicLayer):
    """Stands where transformers keeps an attention layer's keys and values: counts tokens and keeps none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it so
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0


@dataclass
class _Running:
    """A request that is being decoded."""

    request: int
    table: PageTable
    tokens: list[int]
    generator: torch.Generator | None
    state: DynamicCache | None = None


@dataclass
class TransformersModel:
    """A loaded causal language model. `runner` puts it under a scheme; runners of one model share its weights."""

    model: Any
    tokenizer: Any
    info: ModelInfo

    @classmethod
    def load(cls, source: models.ModelSource, dtype: models.ComputeDtype = "float32", device: str = "cpu") -> Self:
        """The model of this source, computing in `dtype`.

        Raises:
            ModelError: it is not here, or can't be loaded.
        """
        return cls(*models.load(source, dtype, device))

    def runner(
        self, scheme: Scheme, *, page_size: int = 16, scoring: Scoring = "fused", destroyed: bool = False
    ) -> TransformersRunner:
        """This model with its keys and values stored by `scheme`.

        scoring: "fused" computes a prompt in one pass, each query reading what was written before it; "replay" feeds
        it token by token, as decoding does: slow, and the definition that "fused" must match.
        destroyed: the canary; see PagedCache.

        Raises:
            ValueError: a head_dim that the scheme can't take.
        """
        for _, head_dim in self.info.layers:
            scheme.key.check_head_dim(head_dim)
            scheme.value.check_head_dim(head_dim)
        return TransformersRunner(self, scheme, page_size, scoring, destroyed)


@dataclass
class TransformersRunner:
    """Scores and generates with one model under one scheme. Made by `TransformersModel.runner`."""

    loaded: TransformersModel
    scheme: Scheme
    page_size: int
    scoring: Scoring
    destroyed: bool
    _cache: PagedCache | None = field(init=False, default=None)
    _pool: PagePool = field(init=False)

    def __post_init__(self) -> None:
        self.info = self.loaded.info
        self.tokenizer = self.loaded.tokenizer
        self.model = self.loaded.model
        self.device = self.model.device
        config = self.model.config.get_text_config(decoder=True)
        kinds: list[str] = getattr(config, "layer_types", None) or []
        if getattr(config, "num_kv_shared_layers", 0) or "chunked_attention" in kinds:
            raise ValueError(
                f"{self.info.name} has layers that share a cache or attend in chunks: this runner has neither; "
                f"use a model of full, sliding or linear attention"
            )
        layers = models.cache_layer_indices(config)
        self._layer_index = {layer: i for i, layer in enumerate(layers)}
        self._has_state = len(layers) < config.num_hidden_layers
        rope = getattr(config, "rope_parameters", None) or {}
        self._alone = self._has_state or rope.get("rope_type") in STATEFUL_ROPE
        ends = self.model.generation_config.eos_token_id
        self._ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    # ---- what tasks call

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """One Score a request, in the order of the requests. Shared prefixes are computed once."""
        sequences = [(*r.context, *r.continuation)[:-1] for r in requests]
        logprobs = [torch.empty(len(r.continuation)) for r in requests]
        greedy = [True] * len(requests)
        roots = self._tree(sequences)

        # what each segment's positions must predict: segment -> position -> (request, offset in its continuation)
        wanted: dict[Segment, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for leaf in _segments(roots):
            for i in leaf.ending:
                segment: Segment | None = leaf
                for position in range(len(sequences[i]) - 1, len(requests[i].context) - 2, -1):
                    while segment is not None and position < segment.start:
                        segment = segment.parent
                    assert segment is not None
                    wanted[segment][position].append((i, position + 1 - len(requests[i].context)))

        done = 0
        for piece, hidden in self._prefill(roots, sequences):
            of_segment = wanted[piece.segment]
            rows = [p for p in range(piece.start, piece.start + len(piece.tokens)) if p in of_segment]
            for first in range(0, len(rows), LOGIT_ROWS):
                some = rows[first : first + LOGIT_ROWS]
                at = torch.tensor(some, device=hidden.device) - piece.start
                log_p = self.log_probs(hidden[at])
                asked = [(row, i, o) for row, p in enumerate(some) for i, o in of_segment[p]]
                targets = [requests[i].continuation[o] for _, i, o in asked]
                row_index = torch.tensor([row for row, _, _ in asked], device=hidden.device)
                values = log_p[row_index, torch.tensor(targets, device=hidden.device)].cpu()
                best = log_p.argmax(-1)[row_index].tolist()
                for (_, i, o), target, value, top in zip(asked, targets, values, best, strict=True):
                    logprobs[i][o] = value
                    greedy[i] &= target == top
            if piece.completes:
                done += len(piece.segment.ending)
                if progress is not None and piece.segment.ending:
                    progress(done, len(requests))
        return [Score(values, top) for values, top in zip(logprobs, greedy, strict=True)]

    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Tensor]:
        """For each document, the last hidden states [len(document), H], on the CPU, in the compute dtype."""
        found: list[list[Tensor]] = [[] for _ in documents]
        done = 0
        for piece, hidden in self._prefill(_unshared(documents), documents):
            found[piece.segment.ending[0]].append(hidden.cpu())
            if piece.completes:
                done += 1
                if progress is not None:
                    progress(done, len(documents))
        return [torch.cat(pieces) for pieces in found]

    @torch.inference_mode()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] float32 log-probabilities of hidden states [n, H], by what follows the model's decoder."""
        with _decoder_returns(self.model, hidden[None].to(self.device)):
            blank = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            logits: Tensor = self.model(input_ids=blank, use_cache=False).logits[0]
        return logits.to(torch.float32).log_softmax(-1)

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """One Generation a request, in the order of the requests. Sequences come and go in one decoded batch."""
        prompts = [r.prompt for r in requests]
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests) if requests else 0
        cache = self._cache_for(longest)
        # so many that neither their prompts nor their answers can take each other's last page
        fitting = self._pool.free_pages // (2 * self._pool.pages_for(longest) + 2)
        most = 1 if self._alone else max(1, min(BATCH_SEQUENCES, fitting))
        prefill = self._plan(self._tree(prompts), longest)
        answers: list[Generation | None] = [None] * len(requests)
        # requests whose prompt is computed, with its last log-probabilities
        waiting: list[tuple[int, Segment, Tensor]] = []
        running: list[_Running] = []
        state = None

        def advance(run: _Running, log_p: Tensor) -> None:
            """Add the next token; the answer is complete when it ends."""
            request = requests[run.request]
            token = _next_token(log_p, request, run.generator)
            ended = token in self._ends
            if not ended:
                run.tokens.append(token)
            text = self.tokenizer.decode(run.tokens, skip_special_tokens=True)
            if ended or len(run.tokens) == request.max_new_tokens or any(stop in text for stop in request.stop):
                for stop in request.stop:
                    text = text.split(stop)[0]
                answers[run.request] = Generation(text, tuple(run.tokens))
                self._pool.release(run.table)
                running.remove(run)
                if progress is not None:
                    progress(sum(answer is not None for answer in answers), len(requests))

        with paged_attention(self.model), self._cleared_pool():
            while running or waiting or not prefill.finished:
                while waiting and len(running) < most:
                    i, segment, log_p = waiting.pop(0)
                    table, copies = prefill.claim(segment)
                    cache.copy_pages(copies)
                    self._pool.reserve(table, len(prompts[i]) + requests[i].max_new_tokens)
                    running.append(_Running(i, table, [], self._generator(requests[i]), state))
                    advance(running[-1], log_p)
                if not prefill.finished and len(running) + len(waiting) < most:
                    pieces, copies = prefill.take(most - len(running) - len(waiting))
                    if not (pieces or running):
                        raise OutOfPages(f"the cache is too small for prompts and answers of {longest} tokens")
                    if pieces:
                        cache.copy_pages(copies)
                        state = self._new_state() if pieces[0].start == 0 else state
                        hidden = self._forward(cache, pieces, state)
                        prefill.computed(pieces)
                        for piece, rows in zip(pieces, hidden, strict=True):
                            if piece.completes and piece.segment.ending:
                                log_p = self.log_probs(rows[-1:])[0]
                                waiting += [(i, piece.segment, log_p) for i in piece.segment.ending]
                        continue
                if running:
                    hidden = self._forward(cache, [self._next_piece(run) for run in running], running[0].state)
                    for run, log_p in zip(list(running), self.log_probs(torch.cat(hidden)), strict=True):
                        advance(run, log_p)
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    # ---- forward passes

    def _tree(self, sequences: Sequence[Sequence[int]]) -> list[Segment]:
        return _unshared(sequences) if self._alone else build_tree(sequences)

    def _plan(self, roots: list[Segment], longest: int) -> Prefill:
        # a sequence that runs alone is not cut: its other layers' states are made for whole prompts
        batch_tokens = max(BATCH_TOKENS, longest) if self._alone else BATCH_TOKENS
        return Prefill(self._pool, roots, batch_tokens, chunk=1 if self.scoring == "replay" else None)

    def _prefill(self, roots: list[Segment], sequences: Sequence[Sequence[int]]) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece of the tree with its hidden states [tokens, H], parents before children."""
        longest = max(map(len, sequences), default=0)
        cache = self._cache_for(longest)
        prefill = self._plan(roots, longest)
        state = None
        with paged_attention(self.model), self._cleared_pool():
            while not prefill.finished:
                pieces, copies = prefill.take(1 if self._alone else BATCH_TOKENS)
                if not pieces:
                    raise OutOfPages(f"the cache is too small for sequences of {longest} tokens")
                cache.copy_pages(copies)
                state = self._new_state() if pieces[0].start == 0 else state
                hidden = self._forward(cache, pieces, state)
                prefill.computed(pieces)
                yield from zip(pieces, hidden, strict=True)
                for piece in pieces:
                    if piece.completes:
                        for _ in piece.segment.ending:
                            prefill.drop(piece.segment)

    def _next_piece(self, run: _Running) -> Piece:
        """The last token of a running request, whose keys and values are not in the cache yet."""
        start = run.table.length
        slots = self._pool.extend(run.table, 1)
        return Piece(Segment(None, start, run.tokens[-1:]), run.table, start, run.tokens[-1:], slots)

    def _generator(self, request: GenerateRequest) -> torch.Generator | None:
        return torch.Generator(self.device).manual_seed(request.seed) if request.temperature > 0 else None

    @torch.inference_mode()
    def _forward(self, cache: PagedCache, pieces: Sequence[Piece], state: DynamicCache | None) -> list[Tensor]:
        """Last hidden states [tokens, H] of each piece."""
        batch = Batch.make([p.table for p in pieces], [p.slots for p in pieces], self.page_size, self.device)
        tokens = torch.tensor([token for p in pieces for token in p.tokens], device=self.device)
        token = _step.set(_Step(cache, batch, self._layer_index))
        try:
            decoder = getattr(self.model, self.model.base_model_prefix)
            out = decoder(
                input_ids=tokens[None],
                position_ids=batch.positions[None],
                past_key_values=state,
                use_cache=state is not None,
            )
        finally:
            _step.reset(token)
        return list(out.last_hidden_state[0].split([len(p.tokens) for p in pieces]))

    def _new_state(self) -> DynamicCache | None:
        """What a model's other layers carry from pass to pass; None where they carry nothing."""
        if not self._has_state:
            return None
        state = DynamicCache(config=self.model.config)
        for layer in self._layer_index:
            state.layers[layer] = _Counter()
        return state

    def _cache_for(self, longest: int) -> PagedCache:
        """The cache, made anew where it is too small for sequences of `longest` tokens."""
        needed = -(-4 * (BATCH_TOKENS + longest) // self.page_size)
        if self._cache is None or self._pool.free_pages < needed:
            self._cache = None  # freed before the larger one is made
            self._pool = PagePool(needed, self.page_size)
            self._cache = PagedCache(
                self.info.layers,
                self.scheme,
                pages=needed,
                page_size=self.page_size,
                model_dtype=self.model.dtype,
                device=self.device,
                destroyed=self.destroyed,
            )
        return self._cache

    @contextmanager
    def _cleared_pool(self) -> Iterator[None]:
        """An error inside the block leaves no page taken: the cache is made anew by the next call."""
        try:
            yield
        except BaseException:
            self._cache = None
            raise


@contextmanager
def _decoder_returns(model: Any, hidden: Tensor) -> Iterator[None]:
    """The decoder gives `hidden` [1, n, H] inside the block, so calling the model computes only its head."""
    decoder = getattr(model, model.base_model_prefix)
    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        del decoder.forward


def _next_token(log_p: Tensor, request: GenerateRequest, generator: torch.Generator | None) -> int:
    """The next token of a request from log-probabilities [vocabulary]."""
    if generator is None:
        return int(log_p.argmax())
    p, order = (log_p / request.temperature).softmax(-1).sort(descending=True)
    keep = p.cumsum(-1) - p < request.top_p  # the smallest set that holds top_p
    if request.top_k:
        keep[request.top_k :] = False
    return int(order[torch.multinomial(p * keep, 1, generator=generator)])


def _unshared(sequences: Sequence[Sequence[int]]) -> list[Segment]:
    """A tree in which every sequence is a root of its own."""
    return [Segment(None, 0, list(tokens), ending=[i]) for i, tokens in enumerate(sequences)]


def _segments(roots: Sequence[Segment]) -> Iterator[Segment]:
    """Every segment of a tree."""
    stack = list(roots)
    while stack:
        segment = stack.pop()
        yield segment
        stack += segment.children
