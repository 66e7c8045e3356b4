"""A number of tokens as a person writes it: 32768 or 32k, which is the same. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any

K = 1024
MOST = 10**9 - 1


def parse_tokens(text: str) -> int:
    """32768 of `32768`, `32k` or `32K`.

    Raises:
        ValueError: anything else, 0 too.
    """
    found = re.fullmatch(r"([0-9]{1,9})([kK]?)", text.strip())
    if not found or int(found[1]) == 0:
        raise ValueError(f"'{text}' is no number from 1 to {MOST}: write 32768 or 32k")
    return int(found[1]) * (K if found[2] else 1)


def tokens(value: Any) -> Any:
    """The number that a YAML's `32k` is; what is no text stays, for its type to judge."""
    return parse_tokens(value) if isinstance(value, str) else value
