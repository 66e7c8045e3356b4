"""Where an answer ends, and what its text is: those of lm-eval's HFLM, for each answer as if it were alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from kvbench.runners.base import before_stop
from kvbench.runners.transformers.decode import Decoding

UNFINISHED = "\ufffd"  # what stands for a character of which bytes are missing
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte: a run of them is decoded together


class Stopping:
    """Ends of a model's answers: its end tokens, stop strings, the length.

    A stop string is looked for in the text with special tokens too, so that one may be such a token's. An empty one is
    in every text: it ends an answer at its first token. Where a tokenizer decodes each token by itself
    (`decodes_by_token`) only the newest tokens are decoded, and the end of the text before them is kept.
    """

    def __init__(self, tokenizer: Any, generation_config: Any) -> None:
        self._tokenizer = tokenizer
        ends = generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # those that decoding leaves out
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {index for index, token in added.items() if token.special}
        self._by_token = decodes_by_token(tokenizer)

    def extend(self, sequence: Decoding, new: Sequence[int]) -> str | None:
        """Gives a sequence its new tokens, without an end token; its text, if one of them or its length ended it."""
        request, before = sequence.request, len(sequence.tokens)
        end: list[int] = []
        for token in new:
            if token in self._ends and not request.ignore_eos:
                end = [token]
                break
            if len(sequence.tokens) == request.max_new_tokens:
                break
            sequence.tokens.append(token)
        sequence.answered |= bool(end) or len(sequence.tokens) == request.max_new_tokens
        if not sequence.answered and not request.stop:
            return None
        texts = self._texts(sequence, len(sequence.tokens))
        if self._stopped(texts, request.stop) and len(sequence.tokens) > before:
            sequence.answered, end = True, []
            # what was made after the first stop string is no part of the answer
            for count in range(before + 1, len(sequence.tokens)):
                if self._stopped(self._texts(sequence, count), request.stop):
                    del sequence.tokens[count:]
                    break
        elif self._by_token:
            self._settle(sequence, texts)
        # an end token that is not special is part of the text, as in HFLM
        return before_stop(self._text([*sequence.tokens, *end]), request.stop) if sequence.answered else None

    @staticmethod
    def _stopped(texts: tuple[str, str], stop: Sequence[str]) -> bool:
        return any(one in text for text in texts for one in stop)

    def _texts(self, sequence: Decoding, count: int) -> tuple[str, str]:
        """The text of a sequence's first tokens from the settled tail on: without special tokens, and with them."""
        tokens, (plain, whole) = sequence.tokens[sequence.settled : count], sequence.tails
        text = self._text(tokens)
        return plain + text, whole + (text if self._special.isdisjoint(tokens) else self._text(tokens, special=True))

    def _settle(self, sequence: Decoding, texts: tuple[str, str]) -> None:
        """Keeps of a sequence's texts what a stop string may begin in, unless the next token can change them."""
        last = sequence.tokens[-1:]
        if any(text.endswith(UNFINISHED) for text in texts) or not self._special.isdisjoint(last):
            return
        if any(BYTE.fullmatch(token or "") for token in self._tokenizer.convert_ids_to_tokens(last)):
            return
        longest = max(map(len, sequence.request.stop), default=0)
        plain, whole = (text[max(0, len(text) - longest) :] for text in texts)
        sequence.settled, sequence.tails = len(sequence.tokens), (plain, whole)

    def _text(self, tokens: Sequence[int], special: bool = False) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=not special)
        return text


def decodes_by_token(tokenizer: Any) -> bool:
    """Whether a text is its tokens' bytes one after another, but for characters that are not whole yet."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    kinds = [one["type"] for one in decoder.get("decoders", [decoder])]
    joined = kinds in (["ByteLevel"], ["Replace", "ByteFallback", "Fuse"])
    cleaned = tokenizer.clean_up_tokenization_spaces and type(backend.model).__name__ != "BPE"
    return joined and not cleaned
