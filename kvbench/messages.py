"""What is wrong with an option, in the words of a YAML: pydantic speaks of Python."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from pydantic_core import ErrorDetails

KINDS = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "int_type": "a whole number",
    "invalid_key": "a key that is text",
    "list_type": "a list",
    "path_type": "a path",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "tuple_type": "a list",
}
BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("of at least", "ge"),
    "less_than_equal": ("of at most", "le"),
}


def unknown_key(name: object, known: Collection[str]) -> str:
    """`unknown key 'x': did you mean y?`, or all that there are."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"unknown key '{name}': " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}")


def wrong(item: ErrorDetails) -> str:
    """`expected a whole number, not 'x'`, of one of pydantic's errors; of a check of ours, its own words."""
    kind = item["type"]
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if kind == "too_short":
        return "expected at least one entry, the list is empty"
    if kind in BOUNDS:
        bound, key = BOUNDS[kind]
        expected = f"a number {bound} {item['ctx'][key]}"
    else:
        expected = KINDS.get(kind) or re.sub(r"^Input should be (a valid )?", "", item["msg"])
    return f"expected {expected}, not {shown(item['input'])}"


def path_text(loc: tuple[str | int, ...]) -> str:
    """`tasks[0].limit`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return text.removeprefix(".")


def shown(value: Any) -> str:
    """A value as a person wrote it, cut where it is long."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
