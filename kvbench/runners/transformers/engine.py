"""A loaded model, and its runner under one scheme: what tasks call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from kvbench.attention import choose, in_copies, kernels_lack, waits
from kvbench.cache import PagedCache
from kvbench.cache.paged import Learned
from kvbench.results import Tensors
from kvbench.runners.base import FromHidden, GenerateRequest, Generation, ModelInfo, Progress, Score, ScoreRequest
from kvbench.runners.catalog import ModelSource
from kvbench.runners.facts import cache_layer_indices
from kvbench.runners.learned import unpack
from kvbench.runners.load import load as load_model
from kvbench.runners.model_files import ComputeDtype
from kvbench.runners.placement import Places, in_one_place
from kvbench.runners.probe import Windows, windows
from kvbench.runners.transformers.clock import Clock
from kvbench.runners.transformers.forward import Forward
from kvbench.runners.transformers.fused import Fused
from kvbench.runners.transformers.generation import Generator
from kvbench.runners.transformers.memory import Memory
from kvbench.runners.transformers.passes import Passes, Scoring
from kvbench.runners.transformers.scoring import hidden_states, score
from kvbench.schemes import Scheme

Attention = Literal["auto", "reference", "triton"]
Answer = TypeVar("Answer")


@dataclass
class TransformersModel:
    """A loaded causal language model. `runner` puts it under a scheme; runners of one model share its weights."""

    model: Any
    tokenizer: Any
    info: ModelInfo
    places: Places = field(default=None)  # type: ignore[assignment]  # where it is: on one device, if nobody says

    def __post_init__(self) -> None:
        self.places = self.places or in_one_place(self.model)

    @cached_property
    def windows(self) -> Windows:
        """How many of the last tokens each attention layer reads; None for all.

        Raises:
            RefusedError: the model's attention asks of a cache what ours doesn't do.
        """
        config = self.model.config.get_text_config(decoder=True)
        return windows(self.model, self.info.layers, cache_layer_indices(config))

    @cached_property
    def fused(self) -> Fused:
        """What kernels compute of the model beside attention."""
        return Fused(self.model, {head_dim for _, head_dim in self.info.layers})

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

        page_size: of the cache, where the scheme's dtypes don't quantize pages of their own size.
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
        page_size = scheme.page_tokens or page_size
        return TransformersRunner(self, scheme, page_size, scoring, attention, destroyed, known, nudge)

    def learn(self, scheme: Scheme) -> Tensors:
        """What the scheme's transforms learn of this model from its calibration text.

        Raises:
            ValueError: the text is too short.
        """
        from kvbench.runners.calibrate import learn

        return learn(self, scheme)


@dataclass
class TransformersRunner(FromHidden):
    """Scores and generates with one model under one scheme. Made by `TransformersModel.runner`.

    attention: what computes it: "reference" or "triton".
    """

    loaded: TransformersModel
    scheme: Scheme
    page_size: int
    scoring: Scoring
    attention: Attention
    destroyed: bool
    learned: Learned | None = None
    nudge: int = 0
    memory: Memory = field(init=False)

    def __post_init__(self) -> None:
        self.info = self.loaded.info
        self.tokenizer = self.loaded.tokenizer
        self.model = self.loaded.model
        places = self.loaded.places
        self.device = places.last
        self.devices = tuple(places.layers[i] for i in cache_layer_indices(self.model.config))
        wanted = self.attention
        head_dims = {head_dim for _, head_dim in self.info.layers}
        self.attention = impl = choose(wanted, self.scheme, self.model.dtype, self.device, head_dims)
        self.kernels_lack = ""  # why "auto" is the reference on a GPU
        if (wanted, impl, self.device.type) == ("auto", "reference", "cuda"):
            self.kernels_lack = kernels_lack(self.scheme, self.model.dtype, self.device, head_dims)
        resolved = self.scheme.resolve(self.model.dtype)
        self.memory = Memory(
            self.info.layers,
            self.scheme,
            page_size=self.page_size,
            model_dtype=self.model.dtype,
            devices=self.devices,
            learned=self.learned,
            destroyed=self.destroyed,
            exact_prefill=self.scoring == "prefill_exact",
            ring=impl == "reference",
            copied=in_copies(resolved, impl),
        )
        loaded = self.loaded
        self._clock = Clock(self.device)
        fused = (lambda: loaded.fused) if impl == "triton" else None
        self._forward = Forward(self.model, places, lambda: loaded.windows, impl, self.nudge, fused)
        self._passes = Passes(self._forward, self.memory, self._clock, self.scoring)
        # a graph is of one device
        one = len(places.devices) == 1
        graphed = not waits(resolved, impl) and self.device.type == "cuda" and one and not self._forward.alone
        self._generator = Generator(self._passes, self.tokenizer, graphed)

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> Sequence[Score]:
        """One Score a request, in the order of the requests. Shared prefixes are computed once.

        Raises:
            ValueError: "prefill_exact" of a model that runs one sequence at a time.
        """
        if self.scoring == "prefill_exact" and self.alone:
            raise ValueError(f"{self.info.name} runs one sequence at a time, which can't be scored as prefill_exact")
        return self._halving(lambda: score(self._passes, requests, progress))

    def hidden_states(
        self, documents: Sequence[Sequence[int]], progress: Progress | None = None, *, shared: bool = False
    ) -> list[Tensor]:
        """For each document, the last hidden states [len(document), H], on the CPU, in the compute dtype.

        shared: what documents begin with alike is computed once, as `score` does, down to a single token.
        """
        return self._halving(lambda: hidden_states(self._passes, documents, progress, shared))

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """One Generation a request, in the order of the requests.

        Sequences come and go in one batch: a pass of prompts takes a step of every running sequence along, and where no
        prompt waits, steps follow each other (with the kernels on a GPU without the host). Requests for which no page
        is free wait.

        Raises:
            ValueError: a prompt without tokens, or a setting of the model's generation_config.json that is not offered.
            OutOfPages: the cache can't hold one of them alone.
        """
        return self._halving(lambda: self._generator.generate(requests, progress))

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] float32 log-probabilities of hidden states [n, H], by what follows the model's decoder."""
        return self._forward.log_probs(hidden)

    def stats(self) -> dict[str, float]:
        """Tokens and seconds of prefill and of decoding so far, and the bytes that a token takes in the cache.

        A pass of prompts with steps of running sequences counts as prefill, their tokens too. What was decoded after
        the end of an answer takes seconds and counts no tokens. The seconds in which CUDA graphs for decoding were made
        are counted apart. And the tokens of a pass at most, for they are halved where memory is too small.
        """
        caches = self.memory.caches
        sizes: dict[str, float] = {"kv_bytes_per_token": caches[0].bytes_per_token} if caches else {}
        if self.memory.rings is not None:
            sizes["kv_window_bytes"] = caches[1].nbytes if caches else 0
        return {**self._clock.totals(), **sizes, "pass_tokens": self.memory.limits.tokens}

    @property
    def alone(self) -> bool:
        """Whether sequences are computed one at a time."""
        return self._forward.alone

    @property
    def rope_moves(self) -> bool:
        """Whether a longer sequence has other rotary frequencies: then steps are not what one pass is."""
        return self._forward.rope_moves

    @property
    def stored(self) -> PagedCache:
        """What the last call wrote. Only a sequence that was run alone lies there in the order of its tokens."""
        return self.memory.caches[0]

    def longest_sequence(self, pages: int) -> int:
        """Tokens of the longest sequence that so many pages are enough for, where it shares none with others."""
        return max(0, pages - 1) * self.page_size

    def _halving(self, call: Callable[[], Answer]) -> Answer:
        """What `call` gives, with half as much computed at once for as long as the device's memory is too small."""
        while True:
            counted = self._clock.copy()
            try:
                # events, graphs and what they wait for are of the device that a pass ends on
                with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                    return call()
            except torch.OutOfMemoryError:
                if self.memory.least:
                    raise
            self._clock.restore(counted)  # what was thrown away is not counted
            self.memory.halve()
