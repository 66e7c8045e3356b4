"""Transformers models whose attention reads and writes our paged cache.

A decoder is token-wise outside attention, so many sequences without padding are one row of tokens with position
ids: our attention function knows where each begins. Models whose other layers carry state too (linear attention),
or whose rotary frequencies depend on the longest position of a pass, run one sequence at a time.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from kvbench.attention import Batch, Implementation, append, attend, choose, kernels_lack
from kvbench.cache import OutOfPages, PagedCache, PagePool, to_device
from kvbench.cache.paged import Learned
from kvbench.results import Tensors
from kvbench.runners.base import GenerateRequest, Generation, ModelInfo, Progress, Score, ScoreRequest
from kvbench.runners.catalog import ModelSource
from kvbench.runners.facts import cache_layer_indices
from kvbench.runners.lanes import GRAPH_SIZES, Lanes, Made, Run
from kvbench.runners.learned import unpack
from kvbench.runners.load import load as load_model
from kvbench.runners.model_files import ComputeDtype
from kvbench.runners.nudge import nudged
from kvbench.runners.prefix import MIN_SHARED, Segment, build_tree, segments
from kvbench.runners.probe import Windows, decoder_of, windows
from kvbench.runners.processors import Processors, with_defaults
from kvbench.runners.rope import Frequencies
from kvbench.runners.schedule import Piece, Prefill, pages_for_one
from kvbench.runners.settings import refusal
from kvbench.runners.stopping import Stopping
from kvbench.schemes import Scheme

Scoring = Literal["fused", "replay", "prefill_exact"]
Attention = Literal["auto", "reference", "triton"]

NAME = "kvbench"  # of our attention among transformers' implementations
SMALLEST_BATCH = 64  # tokens of a pass, below which a model that runs out of memory is given up

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Limits:
    """How much is computed at once.

    tokens: of one forward pass. sequences: decoded at once. logits: values of full-vocabulary rows held at once.
    memory: share of the device's free memory that pages may take; 0 for as many as a few passes need.
    """

    tokens: int
    sequences: int
    logits: int
    memory: float


CPU_LIMITS = Limits(tokens=2048, sequences=64, logits=2**24, memory=0.0)
GPU_LIMITS = Limits(tokens=65536, sequences=GRAPH_SIZES[-1], logits=2**27, memory=0.6)


@dataclass(frozen=True)
class _Part:
    """Some of a pass's tokens: what they attend to, and the caches that keep their keys and values."""

    batch: Batch
    read: PagedCache
    written: tuple[PagedCache, ...]
    exact: PagedCache | None = None  # what `read` holds, in 16 bits: its window


@dataclass(frozen=True)
class _Step:
    """What our attention function needs to know of the forward pass it is called in: parts, in the tokens' order."""

    parts: tuple[_Part, ...]
    layer_index: dict[int, int]  # the model's layer number to the cache's
    windows: Windows  # by the model's layer number
    impl: Implementation


_step: ContextVar[_Step] = ContextVar("kvbench_step")

# called with the model's number of a layer, its new queries [T, HQ, D] and keys [T, HKV, D], and their positions [T]
Observer = Callable[[int, Tensor, Tensor, Tensor], None]
_observer: ContextVar[Observer | None] = ContextVar("kvbench_observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside the block `observer` is called with what each attention layer gets."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _attention(
    module: Any,
    query: Tensor,  # [1, HQ, T, D]
    key: Tensor,  # [1, HKV, T, D]
    value: Tensor,  # [1, HKV, T, D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the new keys and values, then read only the cache: [1, T, HQ, D]."""
    step = _step.get()
    layer = step.layer_index[module.layer_idx]
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    if (observer := _observer.get()) is not None:
        observer(module.layer_idx, queries, keys, torch.cat([part.batch.positions for part in step.parts]))
    outs = []
    sizes = [len(part.batch.slot_mapping) for part in step.parts]
    for part, q, k, v in zip(step.parts, queries.split(sizes), keys.split(sizes), values.split(sizes), strict=True):
        for cache in part.written:
            if cache is part.exact:
                continue  # written with the rows that it holds in 16 bits
            positions = part.batch.positions if cache.scheme.learns else None
            exact = part.exact if cache is part.read else None
            append(cache, layer, k, v, part.batch.slot_mapping, impl=step.impl, positions=positions, exact=exact)
        outs.append(
            attend(
                q,
                part.read,
                layer,
                part.batch,
                impl=step.impl,
                scaling=q.shape[-1] ** -0.5 if scaling is None else scaling,
                sliding_window=step.windows[module.layer_idx],
                softcap=softcap,
                sinks=s_aux,
                exact=part.exact,
                window=part.read.scheme.window,
            )
        )
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None


@contextmanager
def paged_attention(model: Any) -> Iterator[None]:
    """`model` attends through the paged cache inside the block, and as before after it.

    No mask is registered under our name, so transformers makes none: our attention knows the sequences' boundaries, and
    the layers' windows from what its masks would hide (`probe`).
    """
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)


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
class TransformersModel:
    """A loaded causal language model. `runner` puts it under a scheme; runners of one model share its weights."""

    model: Any
    tokenizer: Any
    info: ModelInfo

    @cached_property
    def windows(self) -> Windows:
        """How many of the last tokens each attention layer reads; None for all.

        Raises:
            RefusedError: the model's attention asks of a cache what ours doesn't do.
        """
        config = self.model.config.get_text_config(decoder=True)
        return windows(self.model, self.info.layers, cache_layer_indices(config))

    @classmethod
    def load(cls, source: ModelSource, dtype: ComputeDtype = "float32", device: str = "cpu") -> Self:
        """The model of this source, computing in `dtype`.

        Raises:
            ModelError: it is not here, can't be loaded, or asks of a cache what ours doesn't do.
        """
        loaded = cls(*load_model(source, dtype, device))
        loaded.windows  # noqa: B018 - refuses here, not at the first cell
        return loaded

    def runner(
        self,
        scheme: Scheme,
        *,
        page_size: int = 16,
        scoring: Scoring = "fused",
        attention: Attention = "auto",
        destroyed: bool = False,
        learned: Tensors | None = None,
        nudge: int = 0,
    ) -> TransformersRunner:
        """This model with its keys and values stored by `scheme`.

        scoring: "fused" computes a prompt in one pass, each query reading what was written before it; "replay" feeds
        it token by token, as decoding does: slow, and the definition that "fused" must match; "prefill_exact" reads a
        context's keys and values exactly, and only later tokens read the cache, as engines do that attend to the
        prompt before they store it.
        attention: "auto" takes the Triton kernels on a GPU where they can serve; an explicit choice never falls back.
        destroyed: the canary; see PagedCache. learned: what `learn` gave for a scheme that learns; learned here and now
        where it is not given. nudge: the seed of a noise of one ulp in the model's embedding; 0: without.

        Raises:
            ValueError: a model that can't have the scheme, or an attention that can't serve it.
        """
        scheme.check(self.info.layers, self.info.max_length)
        if scheme.learns and learned is None:
            learned = self.learn(scheme)
        known = None if learned is None else unpack(learned, scheme, len(self.info.layers))
        return TransformersRunner(self, scheme, page_size, scoring, attention, destroyed, known, nudge)

    def learn(self, scheme: Scheme) -> Tensors:
        """What the scheme's transforms learn of this model from its calibration text.

        Raises:
            ValueError: the text is too short.
        """
        from kvbench.runners.calibrate import learn

        return learn(self, scheme)


@dataclass
class TransformersRunner:
    """Scores and generates with one model under one scheme. Made by `TransformersModel.runner`.

    attention: what computes it: "reference" or "triton". limits: halved where the device runs out of memory.
    """

    loaded: TransformersModel
    scheme: Scheme
    page_size: int
    scoring: Scoring
    attention: Attention
    destroyed: bool
    learned: Learned | None = None
    nudge: int = 0
    limits: Limits = field(init=False)
    # packed; with a window the same rows in 16 bits; with "prefill_exact" the exact cache
    _caches: tuple[PagedCache, ...] = field(init=False, default=())
    _pool: PagePool = field(init=False)
    _lanes: dict[tuple[int, int], Lanes] = field(init=False, default_factory=dict)  # whose graphs read `_caches`
    _state: DynamicCache | None = field(init=False, default=None)  # of a sequence that runs alone

    def __post_init__(self) -> None:
        self.info = self.loaded.info
        self.tokenizer = self.loaded.tokenizer
        self.model = self.loaded.model
        self.device = self.model.device
        wanted = self.attention
        self.attention = choose(wanted, self.scheme, self.model.dtype, self.device)
        self.kernels_lack = ""  # why "auto" is the reference on a GPU
        if (wanted, self.attention, self.device.type) == ("auto", "reference", "cuda"):
            self.kernels_lack = kernels_lack(self.scheme, self.model.dtype, self.device)
        self.limits = GPU_LIMITS if self.device.type == "cuda" else CPU_LIMITS
        config = self.model.config.get_text_config(decoder=True)
        layers = cache_layer_indices(config)
        self._layer_index = {layer: i for i, layer in enumerate(layers)}
        self._has_state = len(layers) < config.num_hidden_layers
        self._frequencies = Frequencies(self.model)
        self._alone = self._has_state or self._frequencies.moves
        self._stopping = Stopping(self.tokenizer, self.model.generation_config)
        self._processors = Processors(self.model)
        self._clock = _Clock(self.device)

    # ---- what tasks call

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """One Score a request, in the order of the requests. Shared prefixes are computed once."""
        return self._halving(lambda: self._score(requests, progress))

    def hidden_states(
        self, documents: Sequence[Sequence[int]], progress: Progress | None = None, *, shared: bool = False
    ) -> list[Tensor]:
        """For each document, the last hidden states [len(document), H], on the CPU, in the compute dtype.

        shared: what documents begin with alike is computed once, as `score` does, down to a single token.
        """
        return self._halving(lambda: self._hidden_states(documents, progress, shared))

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """One Generation a request, in the order of the requests.

        Sequences come and go in one batch: a pass of prompts takes a step of every running sequence along, and where no
        prompt waits, steps follow each other (with the kernels on a GPU without the host). Requests for which no page
        is free wait.

        Raises:
            ValueError: a prompt without tokens, or a setting of the model's generation_config.json that is not offered.
            OutOfPages: the cache can't hold one of them alone.
        """
        return self._halving(lambda: self._generate(requests, progress))

    @torch.inference_mode()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] float32 log-probabilities of hidden states [n, H], by what follows the model's decoder."""
        return self._logits(hidden).to(torch.float32).log_softmax(-1)

    def stats(self) -> dict[str, float]:
        """Tokens and seconds of prefill and of decoding so far, and the bytes that a token takes in the cache.

        A pass of prompts with steps of running sequences counts as prefill, their tokens too. What was decoded after
        the end of an answer takes seconds and counts no tokens. The seconds in which CUDA graphs for decoding were made
        are counted apart. And the tokens of a pass at most, for they are halved where memory is too small.
        """
        sizes = {"kv_bytes_per_token": self._caches[0].bytes_per_token} if self._caches else {}
        return {**self._clock.totals(), **sizes, "pass_tokens": self.limits.tokens}

    @property
    def alone(self) -> bool:
        """Whether sequences are computed one at a time."""
        return self._alone

    @property
    def rope_moves(self) -> bool:
        """Whether a longer sequence has other rotary frequencies: then steps are not what one pass is."""
        return self._frequencies.moves

    @property
    def stored(self) -> PagedCache:
        """What the last call wrote. Only a sequence that was run alone lies there in the order of its tokens."""
        return self._caches[0]

    def longest_sequence(self, pages: int) -> int:
        """Tokens of the longest sequence that so many pages are enough for, where it shares none with others."""
        return max(0, pages - 1) * self.page_size

    # ---- scoring

    def _score(self, requests: Sequence[ScoreRequest], progress: Progress | None) -> list[Score]:
        sequences = [(*r.context, *r.continuation)[:-1] for r in requests]
        roots = self._split_tree(requests) if self.scoring == "prefill_exact" else self._tree(sequences)
        counts = [len(r.continuation) for r in requests]
        targets = to_device([token for r in requests for token in r.continuation], torch.int64, self.device)
        values = torch.empty(len(targets), device=self.device)
        likeliest = torch.empty(len(targets), dtype=torch.bool, device=self.device)
        wanted = _wanted(roots, requests)

        done = 0
        for pieces, hidden in self._prefill(roots, sequences):
            rows: list[int] = []  # of `hidden`, and
            asked: list[int] = []  # which of `targets` each must predict
            first = 0
            for piece in pieces:
                for begin, end, target in wanted.get(piece.segment, ()):
                    # a segment may take several passes: a range that ends before it begins is empty
                    low, high = max(begin, piece.start), min(end, piece.start + len(piece.tokens))
                    rows += range(first + low - piece.start, first + high - piece.start)
                    asked += range(target + low - begin, target + high - begin)
                first += len(piece.tokens)
            self._score_rows(hidden, rows, asked, targets, values, likeliest)
            done += sum(len(piece.segment.ending) for piece in pieces if piece.completes)
            if progress is not None and any(piece.completes and piece.segment.ending for piece in pieces):
                progress(done, len(requests))
        if not requests:
            return []
        tops, ends = likeliest.tolist(), accumulate(counts)
        split = zip(values.cpu().split(counts), counts, ends, strict=True)
        return [Score(logprobs, all(tops[end - count : end])) for logprobs, count, end in split]

    @torch.inference_mode()
    def _score_rows(
        self,
        hidden: Tensor,
        rows: list[int],
        asked: list[int],
        targets: Tensor,
        values: Tensor,
        likeliest: Tensor,
    ) -> None:
        """Log-probabilities of the targets asked for, into `values`, and whether each is the likeliest token."""
        if not rows:
            return
        # a row that several ask for is computed once
        at, row_of = torch.tensor(rows).unique(return_inverse=True)
        row_of, order = row_of.sort()
        lows = range(0, len(at), self._logit_rows)
        bounds = [*torch.searchsorted(row_of, torch.tensor(lows)).tolist(), len(rows)]
        at, row_of, target_of = (
            to_device(x, torch.int64, self.device) for x in (at, row_of, torch.tensor(asked)[order])
        )
        for low, (begin, end) in zip(lows, pairwise(bounds), strict=True):
            log_p = self.log_probs(hidden[at[low : low + self._logit_rows]])
            row, target = row_of[begin:end] - low, target_of[begin:end]
            values[target] = log_p[row, targets[target]]
            likeliest[target] = log_p.argmax(-1)[row] == targets[target]

    def _hidden_states(
        self, documents: Sequence[Sequence[int]], progress: Progress | None, shared: bool
    ) -> list[Tensor]:
        # a document's tokens count as generated, so with "prefill_exact" too they read the cache
        roots = self._tree(documents, min_shared=1) if shared else _unshared(documents)
        found: dict[Segment, list[Tensor]] = {segment: [] for segment in segments(roots)}
        done = 0
        for pieces, hidden in self._prefill(roots, documents):
            rows = hidden.cpu().split([len(piece.tokens) for piece in pieces])
            for piece, own in zip(pieces, rows, strict=True):
                found[piece.segment].append(own)
                done += len(piece.segment.ending) if piece.completes else 0
            if progress is not None:
                progress(done, len(documents))
        states = [torch.empty(0)] * len(documents)
        for leaf in found:
            for i in leaf.ending:
                states[i] = torch.cat([own for segment in leaf.path for own in found[segment]])
        return states

    # ---- generation

    def _generate(self, requests: Sequence[GenerateRequest], progress: Progress | None) -> list[Generation]:
        if not requests:
            return []
        settings = self.model.generation_config.to_dict()
        if refused := refusal(settings, sampled=any(r.temperature > 0 for r in requests)):
            raise ValueError(refused)
        requests = [with_defaults(r, settings) for r in requests]
        prompts = [r.prompt for r in requests]
        if not all(prompts):
            raise ValueError("a prompt has no tokens: give it one, such as the tokenizer's bos token")
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        roots = self._tree(prompts)
        each = pages_for_one(roots, longest, self.page_size)
        self._reserve_pages(longest, each * min(self.limits.sequences, len(requests)), each)
        # so many that neither their prompts nor their answers can take each other's last page
        most = 1 if self._alone else max(1, min(self.limits.sequences, self._pool.free_pages // each))
        if self.scoring == "prefill_exact":
            for segment in segments(roots):
                segment.exact = True
        prefill = self._plan(roots, longest)
        sampled = [r for r in requests if r.temperature > 0]
        lanes = self._lanes_for(most, longest, max((r.max_new_tokens for r in sampled), default=0))
        answers: list[Generation | None] = [None] * len(requests)
        waiting: deque[tuple[int, Segment, Tensor]] = deque()  # computed prompts, with their last hidden state
        pending: deque[Made] = deque()
        self._state = None

        with paged_attention(self.model), self._cleared_pool(), torch.inference_mode():
            while True:
                idle = True
                if waiting and lanes.free and (admitted := self._admit(lanes, waiting, requests, prefill)):
                    pending.append(admitted)
                    idle = False
                for run in lanes.retire():
                    self._pool.release(run.table)
                pieces: list[Piece] = []
                room = lanes.free - len(waiting)
                if not prefill.finished and room > 0:
                    pieces, copies = prefill.take(room, others=len(lanes.running))
                    if not (pieces or lanes.running or waiting):
                        raise OutOfPages(f"the cache is too small for prompts and answers of {longest} tokens")
                    # a segment whose own pages must wait may have its parent's last one already
                    self._copy_pages(copies)
                if pieces:
                    with self._clock.prefill(sum(len(piece.tokens) for piece in pieces) + len(lanes.running)):
                        hidden, made = self._mixed_pass(pieces, lanes)
                    prefill.computed(pieces)
                    last = -1
                    for piece in pieces:
                        last += len(piece.tokens)
                        if piece.completes:
                            waiting.extend((i, piece.segment, hidden[last : last + 1]) for i in piece.segment.ending)
                    pending.extend(made)
                    idle = False
                elif lanes.running:
                    if not lanes.ready:
                        with self._clock.capture():
                            lanes.capture(self._lane_logits)
                    with self._clock.decode():
                        pending.append(lanes.block(self._lane_logits))
                    idle = False
                # the newest tokens of graphs are still being computed
                while len(pending) > (1 if lanes.graphed and not idle else 0):
                    self._answer(pending.popleft(), answers)
                    if progress is not None:
                        progress(sum(answer is not None for answer in answers), len(requests))
                if idle and not pending and not waiting and prefill.finished and not lanes.running:
                    break
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    def _lanes_for(self, most: int, longest: int, draws: int) -> Lanes:
        """Lanes for so many sequences of so many tokens. Where they have graphs, those that an earlier call left."""
        # rounded up, so that similar calls share them, and a call's graphs do not depend on what came before it
        pages, draws = _power_of_two(self._pool.pages_for(longest)), _power_of_two(draws) if draws else 0
        lanes = self._lanes.get((pages, draws))
        if lanes is None:
            graphed = self.attention == "triton" and self.device.type == "cuda" and not self._alone
            options: dict[str, Any] = {"page_size": self.page_size, "device": self.device}
            options["graphed"] = graphed and self._processors.of_a_set
            options["processors"] = self._processors or None
            lanes = Lanes(most=most, pages=pages, draws=draws, **options)
            if lanes.graphed:
                self._lanes[pages, draws] = lanes
        lanes.most = most
        return lanes

    def _admit(
        self,
        lanes: Lanes,
        waiting: deque[tuple[int, Segment, Tensor]],
        requests: Sequence[GenerateRequest],
        prefill: Prefill,
    ) -> Made | None:
        """Gives computed prompts a lane, as many as there are lanes and pages for."""
        runs: list[Run] = []
        hidden: list[Tensor] = []
        while waiting and len(runs) < lanes.free:
            index, segment, last = waiting[0]
            wanted = len(requests[index].prompt) + requests[index].max_new_tokens
            # its pages, and one more for a copy of the last that others share
            if self._pool.pages_for(wanted) - len(prefill.pages(segment)) + 1 > self._pool.free_pages:
                if runs or lanes.running:
                    break  # it waits for those to end
                raise OutOfPages(f"the cache is too small for a prompt and an answer of {wanted} tokens")
            waiting.popleft()
            table, copies = prefill.claim(segment)
            self._copy_pages(copies)
            self._pool.reserve(table, wanted)
            runs.append(Run(index, requests[index], table))
            hidden.append(last)
        return lanes.admit(runs, self._logits(torch.cat(hidden))) if runs else None

    def _mixed_pass(self, pieces: list[Piece], lanes: Lanes) -> tuple[Tensor, list[Made]]:
        """The hidden states of the pieces' tokens, and a token more of every running sequence."""
        tokens, positions, parts = self._inputs(pieces)
        if not lanes.running:
            return self._forward(tokens, positions, parts), []
        next_tokens, next_positions, batch = lanes.inputs()
        parts.append(self._part(batch))
        both = torch.cat([tokens, next_tokens]), torch.cat([positions, next_positions])
        hidden, last = self._forward(*both, parts).split([len(tokens), len(next_tokens)])
        return hidden, [lanes.take(self._logits(last))]

    def _lane_logits(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        return self._logits(self._forward(tokens, positions, [self._part(batch)]))

    def _answer(self, made: Made, answers: list[Generation | None]) -> None:
        """Gives each run its new tokens, and answers those that ended."""
        for run, new in zip(made.runs, made.columns(), strict=True):
            if run.answered:
                continue
            before = len(run.tokens)
            text = self._stopping.extend(run, new)
            if made.decoded:
                self._clock.decoded += len(run.tokens) - before
            if text is not None:
                answers[run.index] = Generation(text, tuple(run.tokens))

    # ---- forward passes

    def _tree(self, sequences: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> list[Segment]:
        return _unshared(sequences) if self._alone else build_tree(sequences, min_shared)

    def _split_tree(self, requests: Sequence[ScoreRequest]) -> list[Segment]:
        """Contexts are shared and exact; each continuation is a segment of its own that reads the cache."""
        if self._alone:
            raise ValueError(f"{self.info.name} runs one sequence at a time, which can't be scored as prefill_exact")
        roots = build_tree([r.context for r in requests])
        for segment in list(segments(roots)):
            segment.exact = True
            longer = [i for i in segment.ending if len(requests[i].continuation) > 1]
            segment.ending = [i for i in segment.ending if len(requests[i].continuation) == 1]
            for i in longer:
                leaf = Segment(segment, segment.end, requests[i].continuation[:-1], ending=[i])
                segment.children.append(leaf)
        return roots

    def _plan(self, roots: list[Segment], longest: int) -> Prefill:
        # a sequence that runs alone is not cut: its other layers' states are made for whole prompts
        batch_tokens = max(self.limits.tokens, longest) if self._alone else self.limits.tokens
        return Prefill(self._pool, roots, batch_tokens, chunk=1 if self.scoring == "replay" else None)

    def _prefill(
        self, roots: list[Segment], sequences: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[Piece], Tensor]]:
        """Every piece of the tree, parents before children: those of a pass with their hidden states [tokens, H]."""
        longest = max(map(len, sequences), default=0)
        least = pages_for_one(roots, longest, self.page_size)
        self._reserve_pages(longest, sum(-(-len(s.tokens) // self.page_size) + 1 for s in segments(roots)), least)
        prefill = self._plan(roots, longest)
        self._state = None
        with paged_attention(self.model), self._cleared_pool():
            while not prefill.finished:
                pieces, copies = prefill.take(1 if self._alone else self.limits.tokens)
                if not pieces:
                    raise OutOfPages(f"the cache is too small for sequences of {longest} tokens")
                self._copy_pages(copies)
                with self._clock.prefill(sum(len(piece.tokens) for piece in pieces)), torch.inference_mode():
                    hidden = self._forward(*self._inputs(pieces))
                prefill.computed(pieces)
                yield pieces, hidden
                for piece in pieces:
                    if piece.completes:
                        for _ in piece.segment.ending:
                            prefill.drop(piece.segment)

    def _inputs(self, pieces: list[Piece]) -> tuple[Tensor, Tensor, list[_Part]]:
        """Tokens, positions and parts of a pass; pieces that are computed exactly come to stand first, in place."""
        pieces.sort(key=lambda piece: not piece.segment.exact)
        if pieces[0].start == 0:
            self._state = self._new_state()
            self._frequencies.reset()
        tokens = to_device([token for piece in pieces for token in piece.tokens], torch.int64, self.device)
        parts = []
        for exact in (True, False):
            own = [piece for piece in pieces if piece.segment.exact == exact]
            if own:
                batch = Batch.make([p.table for p in own], [p.slots for p in own], self.page_size, self.device)
                parts.append(_Part(batch, self._caches[-1], self._caches) if exact else self._part(batch))
        return tokens, torch.cat([part.batch.positions for part in parts]), parts

    def _part(self, batch: Batch) -> _Part:
        """Tokens that read the packed cache, and their window."""
        windowed = self.scheme.window is not None
        return _Part(batch, self._caches[0], self._caches[: 1 + windowed], self._caches[1] if windowed else None)

    def _forward(self, tokens: Tensor, positions: Tensor, parts: Sequence[_Part]) -> Tensor:
        """Last hidden states [T, H]."""
        token = _step.set(_Step(tuple(parts), self._layer_index, self.loaded.windows, self.attention))  # type: ignore[arg-type]
        try:
            decoder = decoder_of(self.model)
            with nudged(self.model, self.nudge) if self.nudge else nullcontext():
                out = decoder(
                    input_ids=tokens[None],
                    position_ids=positions[None],
                    past_key_values=self._state,
                    use_cache=self._state is not None,
                )
        finally:
            _step.reset(token)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] in the compute dtype."""
        with _decoder_returns(self.model, hidden[None].to(self.device)):
            blank = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            logits: Tensor = self.model(input_ids=blank, use_cache=False).logits[0]
        return logits

    @property
    def _logit_rows(self) -> int:
        vocabulary: int = self.model.config.get_text_config(decoder=True).vocab_size
        return max(16, self.limits.logits // vocabulary)

    def _new_state(self) -> DynamicCache | None:
        """What a model's other layers carry from pass to pass; None where they carry nothing."""
        if not self._has_state:
            return None
        state = DynamicCache(config=self.model.config)
        for layer in self._layer_index:
            state.layers[layer] = _Counter()
        return state

    # ---- memory

    def _reserve_pages(self, longest: int, wanted: int, least: int) -> None:
        """Pages for `wanted`, or as many as there is memory for; made anew where there are fewer than that.

        least: what one sequence of `longest` tokens needs.

        Raises:
            OutOfPages: the memory does not hold one sequence of `longest` tokens.
        """
        schemes = [self.scheme.resolve(self.model.dtype)]
        if self.scheme.window:
            schemes.append(self.scheme.exact(self.model.dtype))
        stored = len(schemes)
        if self.scoring == "prefill_exact":
            schemes.append(Scheme.parse("auto").resolve(self.model.dtype))
        pages = -(-4 * (self.limits.tokens + longest) // self.page_size)
        if self.limits.memory:
            page_bytes = self.page_size * sum(scheme.token_bytes(self.info.layers) for scheme in schemes)
            held = sum(cache.nbytes for cache in self._caches)
            graphs = sum(lanes.graph_bytes for lanes in self._lanes.values())
            free = (_free_memory(self.device) - graphs + held) // page_bytes
            # a share of the memory, or what one sequence needs
            pages = min(max(wanted, least), max(int(self.limits.memory * free), least))
            if pages > free:
                raise OutOfPages(
                    f"the device's free memory holds {free * self.page_size} tokens of {schemes[0].dtype_name}, "
                    f"and a sequence of {longest} takes {least * self.page_size} with the pages that are copied"
                )
        there = self._caches[0].pages if self._caches else 0
        # where memory is what limits them, a few pages more are not worth new graphs
        if pages <= there or (self.limits.memory and least <= there and pages < min(wanted, 1.25 * there)):
            return
        self._release()  # before the larger ones are made
        self._pool = PagePool(pages, self.page_size)
        self._caches = tuple(
            PagedCache(
                self.info.layers,
                scheme,
                pages=pages,
                page_size=self.page_size,
                model_dtype=self.model.dtype,
                device=self.device,
                learned=self.learned if i < stored else None,
                destroyed=self.destroyed and i < stored,
            )
            for i, scheme in enumerate(schemes)
        )

    def _release(self) -> None:
        """Gives up the cache, and the graphs that read it."""
        self._lanes.clear()
        self._caches = ()

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        for cache in self._caches:
            cache.copy_pages(copies)

    @contextmanager
    def _cleared_pool(self) -> Iterator[None]:
        """An error inside the block leaves no page taken: the cache is made anew by the next call."""
        try:
            yield
        except BaseException:
            self._release()
            raise

    def _halving(self, call: Callable[[], Answer]) -> Answer:
        """What `call` gives, with half as much computed at once for as long as the device's memory is too small."""
        while True:
            counted = self._clock.copy()
            try:
                return call()
            except torch.OutOfMemoryError:
                if self.limits.tokens // 2 < SMALLEST_BATCH:
                    raise
            self._clock = counted  # what was thrown away is not counted
            half = Limits(
                self.limits.tokens // 2,
                max(1, self.limits.sequences // 2),
                self.limits.logits // 2,
                self.limits.memory / 2,
            )
            logger.warning("out of memory with %d tokens a pass: trying %d", self.limits.tokens, half.tokens)
            self.limits = half
            self._release()
            gc.collect()  # the failed call's tensors hang on its traceback
            torch.cuda.empty_cache()


def _free_memory(device: torch.device) -> int:
    """Bytes that can be allocated: what the driver has left, and what torch holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << (count - 1).bit_length()


class _Clock:
    """Seconds of prefill and of decoding, on a GPU by its own events, so that nothing waits; and their tokens."""

    def __init__(self, device: torch.device) -> None:
        self.decoded = 0
        self._gpu = device.type == "cuda"
        self._prefilled = 0
        self._spans: dict[str, list[tuple[Any, Any]]] = {"prefill": [], "decode": [], "capture": []}

    def copy(self) -> _Clock:
        """As it stands now."""
        made = copy.copy(self)
        made._spans = {name: list(spans) for name, spans in self._spans.items()}
        return made

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def prefill(self, tokens: int) -> Iterator[None]:
        """Counts the block as a pass of so many prompt tokens."""
        self._prefilled += tokens
        with self._timed("prefill"):
            yield

    @contextmanager
    def decode(self) -> Iterator[None]:
        """Counts the block as decoding; its tokens are counted when the host has seen them."""
        with self._timed("decode"):
            yield

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Counts the block as making a CUDA graph, which is no decoding."""
        with self._timed("capture"):
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans[name].append((begin, self._now()))

    def totals(self) -> dict[str, float]:
        """Tokens and seconds; what did not happen is left out."""
        if self._gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        tokens = {"prefill": self._prefilled, "decode": self.decoded}
        for name, spans in self._spans.items():
            if spans:
                if name in tokens:
                    found[f"{name}_tokens"] = tokens[name]
                found[f"{name}_seconds"] = sum(a.elapsed_time(b) / 1e3 if self._gpu else b - a for a, b in spans)
        return found


class _DecoderOutput(MoeModelOutputWithPast):
    """Hidden states alone; all else that a model's head may pass on is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _decoder_returns(model: Any, hidden: Tensor) -> Iterator[None]:
    """The decoder gives `hidden` [1, n, H] inside the block, so calling the model computes only its head."""
    decoder: Any = decoder_of(model)
    decoder.forward = lambda *_, **__: _DecoderOutput(last_hidden_state=hidden)
    try:
        yield
    finally:
        del decoder.forward


# of a segment: from a position to before another it must predict what stands from this place on in all continuations
Wanted = dict[Segment, list[tuple[int, int, int]]]


def _wanted(roots: Sequence[Segment], requests: Sequence[ScoreRequest]) -> Wanted:
    """What each segment must predict, joined in the order of the requests."""
    firsts = list(accumulate((len(r.continuation) for r in requests), initial=0))
    found: Wanted = {}
    for leaf in segments(roots):
        for i in leaf.ending:
            begin, end = len(requests[i].context) - 1, leaf.end
            segment: Segment | None = leaf
            while segment is not None and begin < end:
                low = max(begin, segment.start)
                found.setdefault(segment, []).append((low, end, firsts[i] + low - begin))
                end, segment = segment.start, segment.parent
    return found


def _unshared(sequences: Sequence[Sequence[int]]) -> list[Segment]:
    """A tree in which every sequence is a root of its own."""
    return [Segment(None, 0, list(tokens), ending=[i]) for i, tokens in enumerate(sequences)]
