"""A made-up model for tests: a few seeded matrices behind the runner's seam, no weights, no downloads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvbench.runners.base import (
    FromHidden,
    GenerateRequest,
    Generation,
    ModelInfo,
    Progress,
    Score,
    ScoreRequest,
    before_stop,
)

HIDDEN = 16
REACH = 4  # tokens that a state still feels
BOS, EOS = "<s>", "</s>"


@cache
def toy_tokenizer() -> Any:
    """A real transformers tokenizer: a token a byte, and bos and end-of-text tokens that it does not add by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kind: Any = PreTrainedTokenizerFast  # untyped
    return kind(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, name_or_path="toy")


class ToyRunner(FromHidden):
    """A runner whose next-token distribution is decided by the last few tokens and the seed.

    noise: how far its states are from those of noise 0, which stands for the exact cache. What it draws depends on the
    tokens alone, so equal prompts give equal numbers in any batch.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0, max_length: int = 4096) -> None:
        self.tokenizer = toy_tokenizer()
        self.noise = noise
        vocabulary = len(self.tokenizer)
        draw = torch.Generator().manual_seed(seed)
        self._states = torch.randn(vocabulary, HIDDEN, generator=draw)
        self._errors = torch.randn(vocabulary, HIDDEN, generator=draw)
        self._head = torch.randn(HIDDEN, vocabulary, generator=draw)
        self.info = ModelInfo("toy", f"seed-{seed}", "float32", ((1, HIDDEN),), max_length)

    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Tensor]:
        """[len(document), H] float32 a document."""
        states = []
        for done, document in enumerate(documents, 1):
            states.append(self._hidden(document))
            if progress:
                progress(done, len(documents))
        return states

    def _hidden(self, tokens: Sequence[int]) -> Tensor:
        table = self._states + self.noise * self._errors
        own = table[torch.tensor(tokens)]  # [T, H]
        felt = torch.zeros_like(own)
        for distance in range(min(REACH, len(own))):
            felt[distance:] += 0.5**distance * own[: len(own) - distance]
        return felt

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] float32."""
        return torch.log_softmax(hidden @ self._head, dim=-1)

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """One Score a request."""
        scores = []
        for done, request in enumerate(requests, 1):
            tokens = request.context + request.continuation
            wanted = torch.tensor(request.continuation)
            log_probs = self.log_probs(self._hidden(tokens[:-1])[-len(wanted) :])
            greedy = bool((log_probs.argmax(-1) == wanted).all())
            scores.append(Score(log_probs.gather(1, wanted[:, None])[:, 0], greedy))
            if progress:
                progress(done, len(requests))
        return scores

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """One Generation a request."""
        made = []
        for done, request in enumerate(requests, 1):
            made.append(self._generate(request))
            if progress:
                progress(done, len(requests))
        return made

    def _generate(self, request: GenerateRequest) -> Generation:
        draw = torch.Generator().manual_seed(request.seed)
        tokens, text = list(request.prompt), ""
        while len(tokens) < len(request.prompt) + request.max_new_tokens:
            log_probs = self.log_probs(self._hidden(tokens[-REACH:])[-1:])[0]
            if request.temperature:
                token = int(torch.multinomial(torch.softmax(log_probs / request.temperature, -1), 1, generator=draw))
            else:
                token = int(log_probs.argmax())
            if token == self.tokenizer.eos_token_id and not request.ignore_eos:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens[len(request.prompt) :], skip_special_tokens=True)
            if any(stop in text for stop in request.stop):
                text = before_stop(text, request.stop)
                break
        return Generation(text, tuple(tokens[len(request.prompt) :]))
