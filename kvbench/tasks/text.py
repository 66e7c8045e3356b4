"""Text to measure on that every machine has: the standard library's own help topics, or a file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvbench.files import read_text

BUILTIN = "pydoc_data.topics"


@dataclass(frozen=True)
class Text:
    """source: where it is from, without the machine's folders. sha256: of its UTF-8 bytes."""

    source: str
    text: str
    sha256: str


def sha256(text: str) -> str:
    """The SHA-256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def builtin() -> Text:
    """The language reference that Python's `help()` shows: about 113 000 tokens of English, PSF licence.

    It differs a little between Python versions, so its hash is part of every identity that uses it.

    Raises:
        ValueError: this Python comes without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            f"this Python has no {BUILTIN}: install its full standard library, or give a text file"
        ) from error
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    return Text(BUILTIN, text, sha256(text))


def read(path: Path | None) -> Text:
    """The text of a file, or the built-in one.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    if path is None:
        return builtin()
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path}: not UTF-8 (byte {error.start})") from error
    return Text(path.name, text, sha256(text))


@cache
def prose() -> tuple[tuple[str, ...], ...]:
    """The built-in text's paragraphs of plain English, each as its sentences; no paragraph twice."""
    paragraphs = dict.fromkeys(" ".join(block.split()) for block in re.split(r"\n\s*\n", builtin().text))
    return tuple(
        tuple(re.split(r"(?<=[a-z)][.!?]) (?=[A-Z])", paragraph)) for paragraph in paragraphs if _is_prose(paragraph)
    )


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(re.fullmatch(r"\(?[A-Za-z][a-z’'-]*[.,;:)]*", word) is not None for word in words)
    return len(words) >= 8 and plain >= 0.8 * len(words) and paragraph[0].isupper() and paragraph[-1] in ".!?"
