"""A model's own changes to its next-token logits, made by transformers' logits processors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvbench.runners.base import GenerateRequest
from kvbench.runners.settings import processed

# what asks only which tokens a sequence has: rows of another length are filled up with tokens of their own
OF_A_SET = {"repetition_penalty"}


TOP_K = 50  # transformers' own, where nobody says


def with_defaults(request: GenerateRequest, settings: Mapping[str, Any]) -> GenerateRequest:
    """The request with the model's own `top_k` and `top_p` where it leaves them to the model."""
    top_k, top_p = settings.get("top_k"), settings.get("top_p")
    return replace(
        request,
        top_k=(TOP_K if top_k is None else top_k) if request.top_k is None else request.top_k,
        top_p=(1.0 if top_p is None else top_p) if request.top_p is None else request.top_p,
    )


class Processors:
    """What `generate` of this model would do to its logits, greedy or not, before it takes a token.

    of_a_set: they take a batch whose rows are filled up, and so run in a CUDA graph; others take a sequence at a time.
    device: the logits'; the model's own where it is on one.
    """

    def __init__(self, model: Any, device: torch.device | None = None) -> None:
        self._model = model
        self._device = device or model.device
        self._settings = processed(model.generation_config.to_dict())
        self.of_a_set = self._settings.keys() <= OF_A_SET
        self._of_rows: Any = self._made(1, 1, None) if self and self.of_a_set else None

    def __bool__(self) -> bool:
        return bool(self._settings)

    def of(self, request: GenerateRequest) -> Any:
        """Those of one sequence: called with its tokens [1, n] and the logits [1, V] float32 that follow them."""
        prompt = torch.tensor([request.prompt], device=self._device)
        return self._made(len(request.prompt), request.max_new_tokens, prompt)

    def of_rows(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """The logits [B, V] after tokens [B, W], in rows that are filled up with tokens of their own; if `of_a_set`."""
        changed: Tensor = self._of_rows(tokens, logits)
        return changed

    def _made(self, prompt_tokens: int, new_tokens: int, prompt: Tensor | None) -> Any:
        config = copy.deepcopy(self._model.generation_config)
        config.do_sample = False  # the sampler is ours
        config.max_length = prompt_tokens + new_tokens
        ends = config.eos_token_id
        if ends is not None:
            ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=self._device)
        config._eos_token_tensor = ends
        # transformers' own list in its own order, as `generate` makes it
        return self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt_tokens,
            encoder_input_ids=prompt,
            device=self._device,
            model_kwargs={},
        )
