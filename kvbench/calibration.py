"""The text that a scheme learns from. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvbench.files import read_text
from kvbench.sizes import tokens as as_tokens

TOKENS = 8192
DOCUMENT = 2048  # tokens of a document at most, each from position 0
SHIPPED = "calibration.txt"  # our own documentation as it once was, which no task scores


@dataclass(frozen=True)
class Calibration:
    """The first `tokens` tokens of a text. path: a UTF-8 file; None for the text that ships with kvbench."""

    path: Path | None = None
    tokens: int = TOKENS

    @classmethod
    def of(cls, value: Any) -> Calibration:
        """The calibration of a mapping with `text` and `tokens`, either of which may be left out.

        Raises:
            ValueError: another key, a file that can't be read, or no number of tokens.
        """
        if not isinstance(value, Mapping) or set(value) - {"text", "tokens"}:
            raise ValueError(f"calibration: expected a mapping with 'text' and 'tokens', not {value!r}")
        text, tokens = value.get("text"), as_tokens(value.get("tokens", TOKENS))
        if text is not None and not isinstance(text, str):
            raise ValueError(f"calibration: text is the path of a file, not {text!r}")
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ValueError(f"calibration: tokens is a whole number from 1 on, not {tokens!r}")
        made = cls(None if text is None else Path(text).expanduser(), tokens)
        if len(made.read()) < tokens:
            name = made.path.name if made.path else "the text that ships with kvbench"
            raise ValueError(
                f"calibration: {name} has {len(made.read())} characters, too few for {tokens} tokens: "
                f"give a longer text or fewer tokens"
            )
        return made

    def read(self) -> str:
        """The text.

        Raises:
            ValueError: no such file, or not UTF-8.
        """
        return _read(self.path)

    def spec(self) -> dict[str, Any]:
        """The mapping that `of` makes it of."""
        return {**({"text": str(self.path)} if self.path else {}), "tokens": self.tokens}

    def identity(self) -> dict[str, Any]:
        """What decides what is learned from it."""
        return {"text_sha256": hashlib.sha256(self.read().encode()).hexdigest(), "tokens": self.tokens}

    @property
    def label(self) -> str:
        """Empty for the default, else `c4096` or `c8192-1f2e3d4c` with the beginning of the text's hash."""
        if self == Calibration():
            return ""
        digest = "" if self.path is None else f"-{self.identity()['text_sha256'][:8]}"
        return f"c{self.tokens}{digest}"

    def documents(self, tokens: list[int], longest: int) -> list[list[int]]:
        """The text's tokens, cut to this many and into documents of one length.

        Raises:
            ValueError: the text has fewer.
        """
        if len(tokens) < self.tokens:
            name = self.path.name if self.path else "the calibration text that ships with kvbench"
            raise ValueError(
                f"calibration: {name} has {len(tokens)} tokens, expected {self.tokens}: "
                f"give a longer text or `tokens: {len(tokens)}`"
            )
        length = min(DOCUMENT, longest, self.tokens)
        return [tokens[first : first + length] for first in range(0, self.tokens - length + 1, length)]


@cache
def _read(path: Path | None) -> str:
    if path is None:
        return files("kvbench").joinpath(SHIPPED).read_text(encoding="utf-8")
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"calibration: text {path} cannot be read: {reason}") from None
