"""What is shown, whatever the format: tables with a title and notes, and the rows that programs read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of a table.

    lines: its head: what it holds, and below it what and how many. numeric: set to the right.
    drop: where a terminal is too narrow, the column with the highest goes first; one with 0 never does.
    verdict: it says what the row comes to, so a terminal shows it first. prose: a text, which may be broken into lines.
    group: many rows have it in common, so a terminal that is too narrow shows it once above them.
    """

    lines: tuple[str, ...]
    numeric: bool = True
    drop: int = 0
    verdict: bool = False
    prose: bool = False
    group: bool = False


@dataclass(frozen=True)
class Table:
    """Numbers that belong together, as text; warnings stand above them and notes below."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Document:
    """What a command found, for every renderer.

    lead: a line above all tables, of who ran it. legend: what the signs in the tables mean. notes: lines below them.
    rows: the same as programs read it, a value a key; fields: the keys that a table of them has.
    """

    title: str = ""
    sections: Sequence[Table] = ()
    lead: str = ""
    legend: str = ""
    notes: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    fields: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Renderer:
    """A format: its name after --format, the ending of its files, and what makes its text of a document."""

    name: str
    ending: str
    render: Callable[[Document], str]
