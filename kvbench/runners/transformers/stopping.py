"""Where an answer ends, and what its text is: those of lm-eval's HFLM, for each answer as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvbench.runners.base import before_stop
from kvbench.runners.transformers.decode import Decoding


class Stopping:
    """Ends of a model's answers: its end tokens, stop strings, the length.

    A stop string is looked for in the text with special tokens too, so that one may be such a token's. An empty one is
    in every text: it ends an answer at its first token.
    """

    def __init__(self, tokenizer: Any, generation_config: Any) -> None:
        self._tokenizer = tokenizer
        ends = generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # those that decoding leaves out
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {index for index, token in added.items() if token.special}

    def extend(self, sequence: Decoding, new: Sequence[int]) -> str | None:
        """Gives a sequence its new tokens, without an end token; its text, if one of them or its length ended it."""
        request, before = sequence.request, len(sequence.tokens)
        end: list[int] = []
        for token in new:
            if token in self._ends:
                end = [token]
                break
            if len(sequence.tokens) == request.max_new_tokens:
                break
            sequence.tokens.append(token)
        sequence.answered |= bool(end) or len(sequence.tokens) == request.max_new_tokens
        if not sequence.answered and not request.stop:
            return None
        if self._stopped(sequence.tokens, request.stop) and len(sequence.tokens) > before:
            sequence.answered, end = True, []
            # what was made after the first stop string is no part of the answer
            for count in range(before + 1, len(sequence.tokens)):
                if self._stopped(sequence.tokens[:count], request.stop):
                    del sequence.tokens[count:]
                    break
        # an end token that is not special is part of the text, as in HFLM
        return before_stop(self._text([*sequence.tokens, *end]), request.stop) if sequence.answered else None

    def _stopped(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        texts = [self._text(tokens)]
        if not self._special.isdisjoint(tokens):
            texts.append(self._text(tokens, special=True))
        return any(one in text for text in texts for one in stop)

    def _text(self, tokens: Sequence[int], special: bool = False) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=not special)
        return text
