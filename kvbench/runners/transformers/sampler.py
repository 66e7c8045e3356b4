"""The next token of each sequence that is decoded: the most likely, or drawn as its request says. All on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import to_device
from kvbench.runners.base import GenerateRequest
from kvbench.runners.processors import Processors


class Sampler:
    """Chooses tokens for a decode batch of at most `room` rows of at most `tokens` tokens each.

    draws: random numbers that a request's sampling takes at most; 0 where all are greedy.
    processors: what the model does to its logits before a token is chosen; None where it does nothing.
    state: tensors with an entry a row, which move as rows move. changed: those that `choose` changes.
    """

    def __init__(
        self, room: int, tokens: int, *, draws: int, device: torch.device, processors: Processors | None = None
    ) -> None:
        self.sampled = draws > 0
        self._device = device
        self._processors = processors
        self._count = torch.zeros(room, dtype=torch.int64, device=device)  # tokens chosen so far
        self._top_k = torch.zeros(room, dtype=torch.int64, device=device)
        self._temperature = torch.zeros(room, device=device)
        self._top_p = torch.ones(room, device=device)
        self._draws = torch.zeros(room, max(1, draws), device=device)
        # the tokens of each row, filled up with its first: kept only where logits depend on them
        self._history = torch.zeros(room, tokens if processors else 0, dtype=torch.int64, device=device)
        self.state = [self._count, self._top_k, self._temperature, self._top_p, self._draws]
        if processors:
            self.state.append(self._history)
        self.changed = (self._count, self._history)

    def admit(self, rows: slice, requests: Sequence[GenerateRequest]) -> list[Any]:
        """New sequences in these rows: for each what changes its logits, where that takes a sequence at a time."""
        self._count[rows] = 0
        if self.sampled:
            self._top_k[rows] = to_device([r.top_k or 0 for r in requests], torch.int64, self._device)
            self._temperature[rows] = to_device([r.temperature for r in requests], torch.float32, self._device)
            self._top_p[rows] = to_device(
                [1.0 if r.top_p is None else r.top_p for r in requests], torch.float32, self._device
            )
            drawn = torch.stack([uniform(r.seed, self._draws.shape[1]) for r in requests])
            self._draws[rows] = to_device(drawn.flatten().tolist(), torch.float32, self._device).view(drawn.shape)
        if not self._processors:
            return [None] * len(requests)
        for row, request in enumerate(requests, rows.start):
            prompt = to_device(request.prompt, torch.int64, self._device)
            self._history[row] = prompt[0]
            self._history[row, : len(prompt)] = prompt
        return [None if self._processors.of_a_set else self._processors.of(request) for request in requests]

    def choose(self, rows: slice, each: Sequence[Any], logits: Tensor, known: Tensor) -> Tensor:
        """The next token [n] of each of these rows, from logits [n, V] that follow so many `known` tokens [n].

        each: what `admit` gave for the sequences in these rows.
        """
        if not self._processors:
            return self._sample(rows, logits)
        history = self._history[rows]
        logits = logits.float()  # as `generate` has them
        if self._processors.of_a_set:
            logits = self._processors.of_rows(history, logits)
        else:
            by_row = zip(each, history, known.tolist(), logits, strict=True)
            logits = torch.cat(
                [processors(tokens[None, :count], row[None]) for processors, tokens, count, row in by_row]
            )
        chosen = self._sample(rows, logits)
        history.scatter_(1, known.clamp_max(history.shape[1] - 1)[:, None], chosen[:, None])
        return chosen

    def _sample(self, rows: slice, logits: Tensor) -> Tensor:
        """The most likely token of each row, or one that is drawn as its request says."""
        likeliest = logits.argmax(-1)
        if not self.sampled:
            return likeliest
        temperature = self._temperature[rows, None]
        p, order = (logits.float() / temperature.clamp_min(1e-6)).softmax(-1).sort(descending=True, stable=True)
        top_k = self._top_k[rows, None]
        p = p.where((torch.arange(p.shape[-1], device=p.device) < top_k) | (top_k == 0), 0)
        # of what top_k left, the smallest set that holds top_p: one token at least
        before = p.cumsum(-1) - p
        keep = before < self._top_p[rows, None] * p.sum(-1, keepdim=True)
        keep[:, 0] = True
        mass = (p * keep).cumsum(-1)
        drawn = self._draws[rows].gather(1, self._count[rows, None].clamp_max(self._draws.shape[1] - 1))
        rank = (mass <= drawn * mass[:, -1:]).sum(-1, keepdim=True).clamp_max(p.shape[-1] - 1)
        self._count[rows] += 1
        return torch.where(temperature[:, 0] > 0, order.gather(1, rank)[:, 0], likeliest)


def uniform(seed: int, count: int) -> Tensor:
    """[count] float32 in [0, 1): a request's draws, decided by its seed alone; a longer list begins as a shorter."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
