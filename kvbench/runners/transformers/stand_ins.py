"""What stands where a model would have a cache, or its decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from kvbench.runners.probe import decoder_of


class Counter(DynamicLayer):
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


class _DecoderOutput(MoeModelOutputWithPast):
    """Hidden states alone; all else that a model's head may pass on is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def decoder_returns(model: Any, hidden: Tensor) -> Iterator[None]:
    """The decoder gives `hidden` [1, n, H] inside the block, so calling the model computes only its head."""
    decoder: Any = decoder_of(model)
    decoder.forward = lambda *_, **__: _DecoderOutput(last_hidden_state=hidden)
    try:
        yield
    finally:
        del decoder.forward
