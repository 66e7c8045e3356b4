"""What a runner does for a task: score continuations, give next-token distributions, generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvbench.schemes import Scheme

Progress = Callable[[int, int], None]  # called with (requests done, requests in all)


@dataclass(frozen=True)
class ScoreRequest:
    """The log-probability of `continuation` after `context`; both are token ids and neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """logprobs: [len(continuation)] float32 on the CPU, nats. greedy: every token was the most likely one."""

    logprobs: Tensor
    greedy: bool


@dataclass(frozen=True)
class GenerateRequest:
    """Tokens after `prompt`, until a stop string, an end token or `max_new_tokens`.

    temperature: 0 takes the most likely token; otherwise tokens are drawn, from the `top_k` most likely (0: all) that
    hold `top_p` of the probability, by a generator seeded with `seed` alone: a request's draws do not depend on its
    batch. top_k, top_p: None takes what the model's generation_config.json says. prompt: one token at least.
    stop: an empty one ends an answer at its first token, and cuts nothing off.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = 0
    top_p: float | None = 1.0
    seed: int = 0


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

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
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

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """One Generation a request, in the order of the requests."""
        ...


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
    """A runner whose keys and values lie in pages on a device."""

    scheme: Scheme
    page_size: int
    device: torch.device | str

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
