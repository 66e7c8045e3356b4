"""How a folder lists what is in it, and how a name that a person typed finds its entry. Imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
DIGITS = re.compile("[0-9]+")


def walk(package: str, path: Iterable[str], kind: type[T]) -> Iterator[T]:
    """Every module-level instance of `kind` in the modules of a package's folder."""
    for module in pkgutil.iter_modules(path):
        for value in vars(importlib.import_module(f"{package}.{module.name}")).values():
            if isinstance(value, kind):
                yield value


def find_name(text: str, names: Collection[str], what: str, others: Collection[str] = ()) -> str:
    """The one of `names` that `text` is, or that it begins where it is unique (`int2` for `int2_per_token_head`).

    A whole short name (`tiers42`, and not `tiers421`) is unique.

    others: names of another kind that an unknown one may be meant for.

    Raises:
        ValueError: no name, or more than one; the message names the nearest.
    """
    if text in names:
        return text
    begins = sorted(name for name in names if text and name.startswith(text))
    begins = [name for name in begins if name.split("_per_")[0] == text] or begins
    if len(begins) == 1:
        return begins[0]
    if begins:
        raise ValueError(f"{what} '{text}' is not unique: one of {', '.join(begins)}")
    raise ValueError(f"unknown {what} '{text}': {suggest(text, {*names, *others})}")


def suggest(text: str, names: Collection[str]) -> str:
    """The nearest name, by its short form too, as "did you mean X?", or the list of all names."""
    short = [name.split("_per_")[0] for name in names]
    known = sorted({*names, *(name for name in short if short.count(name) == 1)})
    # of equally near ones the first, for difflib's own choice would be the last
    near = max(known, key=lambda name: difflib.SequenceMatcher(None, name, text.lower()).ratio(), default="")
    # int3 is no typo of int2: another number means another thing
    other_number = DIGITS.sub("", near) == DIGITS.sub("", text.lower()) and near != text.lower()
    if difflib.get_close_matches(text.lower(), [near], cutoff=0.5) and not other_number:
        return f"did you mean {near}?"
    return f"one of {', '.join(sorted(names))}"
