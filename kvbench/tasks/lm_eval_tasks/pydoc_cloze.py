"""The documents of `pydoc_cloze`, made as LAMBADA's are, of the standard library's help topics."""

from __future__ import annotations

import random
import re
from typing import Any

from datasets import Dataset, DatasetDict

from kvbench.tasks.text import prose

WORDS = range(60, 101)  # of a passage


def documents(**_: Any) -> DatasetDict:
    """A test split of rows {"text": passage}, in a fixed shuffled order, so that the first few are like all.

    A passage is a run of sentences of 60 to 100 words. Its last word, without the full stop, has four small letters or
    more and occurs earlier in it. Passages do not overlap.
    """
    sentences = [sentence for paragraph in prose() for sentence in paragraph]
    passages, first = [], 0
    for end in range(1, len(sentences) + 1):
        passage = _passage(sentences[first:end])
        if passage:
            passages.append({"text": passage})
            first = end
    random.Random("pydoc_cloze").shuffle(passages)
    return DatasetDict({"test": Dataset.from_list(passages)})


def _passage(sentences: list[str]) -> str | None:
    """The longest passage that ends with the last of the sentences, or None."""
    for first in range(len(sentences)):
        words = " ".join(sentences[first:]).split()
        if len(words) < WORDS.start:
            return None
        last = words[-1].rstrip(".")
        if len(words) in WORDS:
            earlier = {word.strip(".,;:()") for word in words[:-1]}
            fits = re.fullmatch(r"[a-z]{4,}\.", words[-1]) and last in earlier
            return " ".join([*words[:-1], last]) if fits else None
    return None
