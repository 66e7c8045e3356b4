"""What a runner does for a task: score continuations, give next-token distributions, generate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbench.cache.paged import Learned
from kvbench.results import Tensors
from kvbench.schemes import Scheme

ROWS = 256  # hidden states whose distributions are computed at once
Progress = Callable[[int, int], None]  # called with (requests done, requests in all)


@dataclass(frozen=True)
class ScoreRequest:
    """The log-probability of `continuation` after `context`; both are token ids and neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ScoreRequests(Sequence[ScoreRequest]):
    """Requests whose tokens [T] stand one after another, made once and asked of one runner after another.

    contexts, counts: [requests], tokens of each context and of the continuation behind it.
    kept: what runners of one model made of them and find again; nothing in it depends on a scheme.
    """

    tokens: NDArray[np.int32]
    contexts: NDArray[np.int64]
    counts: NDArray[np.int64]
    kept: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, requests: Sequence[ScoreRequest]) -> ScoreRequests:
        """These requests, as they are or put together."""
        if isinstance(requests, cls):
            return requests
        parts = [part for request in requests for part in (request.context, request.continuation)]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        tokens = np.fromiter(chain.from_iterable(parts), np.int32, int(lengths.sum()))
        return cls(tokens, lengths[::2], lengths[1::2])

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """Where each request's first token stands."""
        lengths = self.contexts + self.counts
        made: NDArray[np.int64] = np.cumsum(lengths) - lengths
        return made

    @overload
    def __getitem__(self, index: int) -> ScoreRequest: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScoreRequest]: ...
    def __getitem__(self, index: int | slice) -> ScoreRequest | list[ScoreRequest]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, cut = int(self.firsts[index]), int(self.contexts[index])
        tokens = tuple(self.tokens[first : first + cut + int(self.counts[index])].tolist())
        return ScoreRequest(tokens[:cut], tokens[cut:])


@dataclass(frozen=True)
class Score:
    """logprobs: [len(continuation)] float32 on the CPU, nats. greedy: every token was the most likely one."""

    logprobs: Tensor
    greedy: bool


@dataclass(frozen=True, eq=False)
class Scores(Sequence[Score]):
    """Scores, whose log-probabilities [N] stand one after another. counts, greedy: [requests]."""

    logprobs: Tensor
    counts: NDArray[np.int64]
    greedy: NDArray[np.bool_]

    @classmethod
    def of(cls, scores: Sequence[Score]) -> Scores:
        """These scores, as they are or put together."""
        if isinstance(scores, cls):
            return scores
        counts = np.array([len(score.logprobs) for score in scores], dtype=np.int64)
        logprobs = torch.cat([score.logprobs for score in scores]) if scores else torch.empty(0)
        return cls(logprobs, counts, np.array([score.greedy for score in scores], dtype=bool))

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> Score: ...
    @overload
    def __getitem__(self, index: slice) -> list[Score]: ...
    def __getitem__(self, index: int | slice) -> Score | list[Score]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        return Score(self.logprobs[end - int(self.counts[index]) : end], bool(self.greedy[index]))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        made: NDArray[np.int64] = np.cumsum(self.counts)
        return made

    def sums(self) -> list[float]:
        """The float64 sum of each score's log-probabilities, those of one length at once: to the bit each row's own."""
        sums = np.empty(len(self))
        for count in np.unique(self.counts):
            own = np.flatnonzero(self.counts == count)
            places = (self._ends[own] - count)[:, None] + np.arange(count)
            sums[own] = self.logprobs[torch.from_numpy(places)].double().sum(1).numpy()
        return list(sums.tolist())


@dataclass(frozen=True)
class NextRequest:
    """What follows each token of a document but its last: at `ids` [T - 1, top], without them at the `top` likeliest.

    tokens: two at least.
    """

    tokens: tuple[int, ...]
    top: int
    ids: Tensor | None = None


@dataclass(frozen=True)
class Next:
    """Log-probabilities of next tokens, in nats, on the CPU.

    ids: [T - 1, top] int64. logprobs: [T - 1, top] float32, NaN where the runner can't say.
    following: [T - 1] float32, of the token that comes. best: [T - 1] int64, the likeliest.
    """

    ids: Tensor
    logprobs: Tensor
    following: Tensor
    best: Tensor


@dataclass(frozen=True)
class GenerateRequest:
    """Tokens after `prompt`, until a stop string, an end token or `max_new_tokens`.

    temperature: 0 takes the most likely token; otherwise tokens are drawn, from the `top_k` most likely (0: all) that
    hold `top_p` of the probability, by a generator seeded with `seed` alone: a request's draws do not depend on its
    batch. top_k, top_p: None takes what the model's generation_config.json says. prompt: one token at least.
    stop: an empty one ends an answer at its first token, and cuts nothing off. ignore_eos: an end token ends nothing.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = 0
    top_p: float | None = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Generation:
    """text: before the first stop string, without special tokens. tokens: all that were made, but for the end token."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What identifies a model and sizes its cache.

    revision: a hash of the weights' and the configuration's files, or the hub's commit.
    compute_dtype: such as "float32".
    layers: (KV heads, head_dim) of each layer that has a KV cache, in order.
    """

    name: str
    revision: str
    compute_dtype: str
    layers: tuple[tuple[int, int], ...]
    max_length: int
    extra: dict[str, Any] = field(default_factory=dict)


class Runner(Protocol):
    """A model under one scheme. Tokens in, numbers out; tokenizing is the task's, through `tokenizer`."""

    info: ModelInfo
    tokenizer: Any  # a transformers tokenizer

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> Sequence[Score]:
        """One Score a request, in the order of the requests."""
        ...

    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Tensor]:
        """For each document (token ids), the last hidden states [len(document), H], on the CPU, in the compute dtype.

        State t has seen tokens 0..t; `log_probs` turns it into the distribution of token t+1. Keeping hidden
        states instead of distributions makes a baseline of a large vocabulary small enough to keep.
        """
        ...

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] float32 log-probabilities of hidden states [n, H], on the model's device.

        Take a few hundred rows at a time.
        """
        ...

    def next_tokens(self, requests: Sequence[NextRequest], progress: Progress | None = None) -> list[Next]:
        """One Next a request, in the order of the requests: all that is known of a runner without hidden states."""
        ...

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """One Generation a request, in the order of the requests."""
        ...


class LoadedModel(Protocol):
    """One model in memory; its runners share the weights."""

    @property
    def info(self) -> ModelInfo:
        """What identifies it."""
        ...

    def runner(
        self,
        scheme: Scheme,
        *,
        page_size: int,
        scoring: Any,
        attention: Any,
        destroyed: bool,
        learned: Tensors | None = None,
        nudge: int = 0,
    ) -> Runner:
        """The model under a scheme; with `destroyed`, all that its cache gives back is zero.

        learned: what `learn` gave, for a scheme that learns. nudge: the seed of a noise of one ulp in what the model
        reads of its tokens; 0: without.
        """
        ...

    def learn(self, scheme: Scheme) -> Tensors:
        """What the scheme's transforms learn of this model."""
        ...


class FromHidden(ABC):
    """A runner whose next tokens are those of its hidden states."""

    @abstractmethod
    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Tensor]:
        """See Runner."""

    @abstractmethod
    def log_probs(self, hidden: Tensor) -> Tensor:
        """See Runner."""

    def next_tokens(self, requests: Sequence[NextRequest], progress: Progress | None = None) -> list[Next]:
        """See Runner."""
        states = self.hidden_states([request.tokens for request in requests], progress)
        return [self._next(request, hidden) for request, hidden in zip(requests, states, strict=True)]

    def _next(self, request: NextRequest, hidden: Tensor) -> Next:
        parts = []
        for first in range(0, len(request.tokens) - 1, ROWS):
            last = min(first + ROWS, len(request.tokens) - 1)
            log_p = self.log_probs(hidden[first:last]).cpu()
            ids = log_p.topk(request.top, -1).indices if request.ids is None else request.ids[first:last]
            comes = torch.tensor(request.tokens[first + 1 : last + 1])[:, None]
            parts.append((ids, log_p.gather(-1, ids), log_p.gather(-1, comes)[:, 0], log_p.argmax(-1)))
        return Next(*(torch.cat(column) for column in zip(*parts, strict=True)))


@runtime_checkable
class Measuring(Protocol):
    """A runner that also says what its work took."""

    def stats(self) -> dict[str, float]:
        """What was measured since the runner was made; a name that was not measured is absent.

        kv_bytes_per_token: of the cache as allocated, see PagedCache.bytes_per_token.
        kv_window_bytes: of all rows in 16 bits beside it at most, where sequences have rings of them.
        prefill_tokens, prefill_seconds: of prompts, a shared prefix once, and of what was decoded in the same passes.
        decode_tokens, decode_seconds: of answers.
        capture_seconds: of compiling and capturing the CUDA graphs that decode.
        pass_tokens: computed at once at most.
        """
        ...


class Paged(Protocol):
    """A runner whose keys and values lie in pages on a device. devices: of each layer with a cache."""

    scheme: Scheme
    page_size: int
    device: torch.device | str
    devices: Sequence[torch.device]
    learned: Learned | None

    def longest_sequence(self, pages: int) -> int:
        """Tokens of the longest sequence that it takes with so many pages."""
        ...


def begins_with(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text: (bos,) or ()."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    return tuple(whole[: whole.index(plain[0])])


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string; an empty one cuts nothing."""
    for one in stop:
        if one:
            text = text.split(one)[0]
    return text
