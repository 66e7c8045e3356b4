"""A model in vLLM under one scheme: requests in vLLM's words, and its answers in ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from kvbench.results import Tensors
from kvbench.runners.backends.vllm import cache_dtype, vllm
from kvbench.runners.base import (
    GenerateRequest,
    Generation,
    ModelInfo,
    Next,
    NextRequest,
    Progress,
    Score,
    ScoreRequest,
    before_stop,
)
from kvbench.runners.catalog import ModelSource
from kvbench.runners.facts import key_bias, revision, shape
from kvbench.runners.load import prepare
from kvbench.runners.model_files import ComputeDtype, ModelError, one_error
from kvbench.runners.vllm.engine import Engine, Kind
from kvbench.schemes import Scheme

LOT = 64  # requests that vLLM is given at once, so that progress is seen
WIDE = 1024  # of its own likeliest tokens, where it can't be asked for others
Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass
class VllmModel:
    """A model for vLLM, which is started for a kv_cache_dtype as runners ask for one."""

    engine: Engine
    tokenizer: Any
    info: ModelInfo

    @classmethod
    def load(cls, source: ModelSource, dtype: ComputeDtype, device: str) -> Self:
        """The model of this source, which is made a folder where it is none.

        Raises:
            ModelError: it is not here, or can't be loaded.
        """
        if source.kind == "shape":
            raise ModelError(f"model '{source.name}': vLLM needs weights and a tokenizer, and this has neither")
        from transformers import AutoTokenizer

        folder = prepare(source, dtype)
        with one_error(f"model '{source.name}': vLLM can't be imported"):
            from vllm import __version__
        with one_error(f"model '{source.name}': its tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trusted, local_files_only=True)
        layers, positions = shape(source)
        info = ModelInfo(
            name=vllm.called(source.name),
            revision=revision(source),
            compute_dtype=dtype,
            layers=layers,
            max_length=positions - vllm.kept,
            extra={"backend": vllm.name, "vllm": __version__, "key_bias": key_bias(source)},
        )
        itemsize = getattr(torch, dtype).itemsize
        longest = positions * itemsize * sum(2 * heads * head_dim for heads, head_dim in layers)
        return cls(Engine(source.name, folder, dtype, device, longest, source.trusted), tokenizer, info)

    def runner(
        self,
        scheme: Scheme,
        *,
        page_size: int = 16,
        scoring: str = "fused",
        attention: str = "auto",
        destroyed: bool = False,
        learned: Tensors | None = None,
        nudge: int = 0,
    ) -> VllmRunner:
        """This model with its keys and values stored by vLLM as the scheme does.

        page_size: vLLM has blocks of its own size. scoring: "fused" is a prompt as vLLM reads it, "replay" feeds it
        token by token, as decoding does.

        Raises:
            ValueError: a scheme that vLLM has no kv_cache_dtype for, or noise.
        """
        found = cache_dtype(scheme, self.info.compute_dtype)  # type: ignore[arg-type]
        if found is None or nudge:
            raise ValueError(f"vLLM has no kv_cache_dtype for {scheme.label}{' under noise' if nudge else ''}")
        return VllmRunner(self, Kind(found, scoring == "replay", destroyed))

    def learn(self, scheme: Scheme) -> Tensors:
        """Raises ValueError: vLLM's caches learn nothing."""
        raise ValueError(f"vLLM's caches learn nothing, and {scheme.label} does")


@dataclass
class VllmRunner:
    """Scores and generates with a model in vLLM under one kv_cache_dtype. Made by `VllmModel.runner`."""

    loaded: VllmModel
    kind: Kind

    def __post_init__(self) -> None:
        self.info = self.loaded.info
        self.tokenizer = self.loaded.tokenizer

    @property
    def attention(self) -> str:
        """What read the cache last, by vLLM's name."""
        return f"vLLM {self.loaded.engine.attention}"

    def stats(self) -> dict[str, float]:
        """The bytes that a token takes in the cache, as vLLM has allocated it."""
        engine = self.loaded.engine
        return {"kv_bytes_per_token": engine.bytes_per_token} if engine.kind == self.kind else {}

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """One Score a request, in the order of the requests."""

        def answer(lot: Sequence[ScoreRequest]) -> Iterator[Score]:
            rows = self._rows([request.context + request.continuation for request in lot], 0)
            for request, found in zip(lot, rows, strict=True):
                own = [
                    row[token]
                    for token, row in zip(request.continuation, found[-len(request.continuation) :], strict=True)
                ]
                yield Score(torch.tensor([one.logprob for one in own]), all(one.rank == 1 for one in own))

        return _in_lots(answer, requests, progress)

    def next_tokens(self, requests: Sequence[NextRequest], progress: Progress | None = None) -> list[Next]:
        """One Next a request. Where its model runner can't score tokens by name, its 1024 likeliest are looked at."""
        return _in_lots(self._next_tokens, requests, progress)

    def _next_tokens(self, requests: Sequence[NextRequest]) -> Iterator[Next]:
        scored = self._start().loaded.engine.ids_scored and not self.kind.replay
        named = [request.ids for request in requests if request.ids is not None]
        many = max(request.top for request in requests)
        tokens = [request.tokens for request in requests]
        found: list[Tensor | None] = [None] * len(requests)
        if scored and len(named) == len(requests):
            outputs = self._ask_prompts(tokens, 1, named)
            found = [torch.tensor(one.prompt_token_id_logprobs) for one in outputs]
            rows = [one.prompt_logprobs[1:] for one in outputs]
        else:
            wide = min(max(WIDE, many), len(self.tokenizer)) if named else many
            rows = list(self._rows(tokens, wide))
        for request, own, logprobs in zip(requests, rows, found, strict=True):
            best = [max(row, key=lambda token: row[token].logprob) for row in own]
            ids = (
                request.ids if request.ids is not None else torch.tensor([_likeliest(row, request.top) for row in own])
            )
            if logprobs is None:
                pairs = zip(ids.tolist(), own, strict=True)
                logprobs = torch.tensor([[_logprob(row.get(token)) for token in line] for line, row in pairs])
            following = [row[token].logprob for token, row in zip(request.tokens[1:], own, strict=True)]
            yield Next(ids, logprobs, torch.tensor(following), torch.tensor(best))

    def _rows(self, documents: Sequence[Sequence[int]], many: int) -> Iterator[Sequence[Any]]:
        """For each token of a document but its first, vLLM's log-probabilities of it and of the `many` likeliest."""
        if not self.kind.replay:
            for output in self._ask_prompts(documents, many):
                yield output.prompt_logprobs[1:]
            return
        asked = [
            self._params(max_tokens=len(tokens) - 1, logprobs=many, trace_decode_token_ids=list(tokens[1:]))
            for tokens in documents
        ]
        for output in self._ask([tokens[:1] for tokens in documents], asked):
            yield output.outputs[0].logprobs

    def _ask_prompts(
        self, documents: Sequence[Sequence[int]], many: int, ids: Sequence[Tensor] | None = None
    ) -> list[Any]:
        """vLLM's answers for whole prompts, each in one pass or a few."""
        own = [{"prompt_logprob_token_ids": one.numpy()} for one in ids] if ids else [{}] * len(documents)
        asked = [self._params(max_tokens=1, prompt_logprobs=many, **one) for one in own]
        return self._ask(documents, asked)

    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Tensor]:
        """Raises ValueError: vLLM gives none."""
        raise ValueError("vLLM gives no hidden states")

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Raises ValueError: vLLM gives no hidden states."""
        raise ValueError("vLLM gives no hidden states")

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """One Generation a request, in the order of the requests. What is drawn is drawn by vLLM's own generator."""

        def answer(lot: Sequence[GenerateRequest]) -> Iterator[Generation]:
            engine = self._start().loaded.engine
            asked = [self._sampling(request, engine.defaults) for request in lot]
            for request, output in zip(lot, self._ask([one.prompt for one in lot], asked), strict=True):
                made = output.outputs[0]
                tokens = tuple(made.token_ids)
                # an end token is among them, and its text is not; nor is that of a stop string
                if made.finish_reason == "stop" and (made.stop_reason is None or isinstance(made.stop_reason, int)):
                    tokens = tokens[:-1]
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                yield Generation(before_stop(text, request.stop), tokens)

        return _in_lots(answer, requests, progress)

    def _sampling(self, request: GenerateRequest, defaults: Any) -> Any:
        top_k = defaults.top_k if request.top_k is None else request.top_k
        top_p = defaults.top_p if request.top_p is None else request.top_p
        return self._params(
            max_tokens=1 if "" in request.stop else request.max_new_tokens,
            stop=[one for one in request.stop if one],
            repetition_penalty=defaults.repetition_penalty,
            detokenize=True,
            ignore_eos=request.ignore_eos,
            **(
                {"temperature": request.temperature, "top_k": top_k, "top_p": top_p, "seed": request.seed}
                if request.temperature
                else {}
            ),
        )

    def _params(self, **options: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 0.0, "detokenize": False, **options})

    def _start(self) -> Self:
        """With the engine of this runner running."""
        self.loaded.engine.start(self.kind)
        return self

    def _ask(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        llm = self.loaded.engine.start(self.kind)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs: list[Any] = llm.generate(asked, list(params), use_tqdm=False)
        return outputs


def _likeliest(row: dict[int, Any], top: int) -> list[int]:
    """Of vLLM's log-probabilities of a position the tokens of the `top` greatest: there may be one more, the next."""
    return sorted(row, key=lambda token: (-row[token].logprob, token))[:top]


def _logprob(found: Any) -> float:
    return math.nan if found is None else float(found.logprob)


def _in_lots(
    ask: Callable[[Sequence[Request]], Iterator[Answer]], requests: Sequence[Request], progress: Progress | None
) -> list[Answer]:
    answers: list[Answer] = []
    for first in range(0, len(requests), LOT):
        answers += ask(requests[first : first + LOT])
        if progress:
            progress(len(answers), len(requests))
    return answers
