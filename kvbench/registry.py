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
FEW = 12  # names that a message lists
NEAREST = 5  # of more


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
    """What an unknown name may mean, in few words: "did you mean X?", its kin with another number, or all names.

    Where these are many, the nearest and how many there are.
    """
    short = [name.split("_per_")[0] for name in names]
    known = sorted({*names, *(name for name in short if short.count(name) == 1)})
    # of equally near ones the first, for difflib's own choice would be the last
    near = max(known, key=lambda name: difflib.SequenceMatcher(None, name, text.lower()).ratio(), default="")
    # int3 is no typo of int2: another number means another thing
    kin = sorted({name for name in known if DIGITS.sub("", name) == DIGITS.sub("", text.lower()) != name})
    if kin and near != text.lower():
        return f"there is {' and '.join(filter(None, (', '.join(kin[:-1]), kin[-1])))}"
    if difflib.get_close_matches(text.lower(), [near], cutoff=0.5):
        return f"did you mean {near}?"
    if len(names) <= FEW:
        return f"one of {', '.join(sorted(names))}"
    nearest = difflib.get_close_matches(text.lower(), sorted(names), NEAREST, 0.0)
    return f"nearest are {', '.join(nearest)}; there are {len(names)}"
