"""What is shown, whatever the format: tables and pictures with their notes, and the rows that programs read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Column:
    """A column of a table.

    lines: its head: what it holds, and below it what and how many. numeric: set to the right.
    drop: where a terminal is too narrow, the column with the highest goes first; one with 0 never does.
    verdict: it says what the row comes to, so a terminal shows it first. prose: a text, which may be broken into lines.
    group: many rows have it in common, so a terminal that is too narrow shows it once above them.
    joins: a terminal that is too narrow puts it below the column before it, but for this value, which says nothing.
    choose: a page offers its values to filter by.
    """

    lines: tuple[str, ...]
    numeric: bool = True
    drop: int = 0
    verdict: bool = False
    prose: bool = False
    group: bool = False
    joins: str | None = None
    choose: bool = False


@dataclass(frozen=True)
class Bar:
    """An interval beside its number, as a page draws it. scale: what lies this far from 0 is at the edge."""

    low: float
    middle: float
    high: float
    margin: float | None
    scale: float


Mark = Literal["worse", "better", "same", "open", "void", "good", "bad"]


class Cell(str):
    """A text of a table, with what a page sorts it by and shows beside it: to every other format it is its text.

    mark: a sign and a colour for what the text says.
    """

    value: float | None
    bar: Bar | None
    mark: Mark | None

    def __new__(cls, text: str, value: float | None = None, bar: Bar | None = None, mark: Mark | None = None) -> Cell:
        """A cell that shows `text`."""
        made = super().__new__(cls, text)
        made.value, made.bar, made.mark = value, bar, mark
        return made


@dataclass(frozen=True)
class Table:
    """Numbers that belong together, as text; warnings stand above them and notes below.

    details: of each row, items that a page shows when asked: names and texts. They are not in other formats.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    details: Sequence[Sequence[Mapping[str, str]]] = ()


@dataclass(frozen=True)
class Axis:
    """One direction of a picture. lines: values that are marked, such as a margin."""

    label: str
    log: bool = False
    lines: Sequence[float] = ()


@dataclass(frozen=True)
class View:
    """One picture: what chooses it among its like, what it says in words, and its points.

    A point has `x`, `y` and `text` (all that is to say of it), and what applies of `low` and `high` (its interval,
    along y, of intervals along x), `mark` or `series` (a colour and a shape), `label`, and `front` (on the frontier).
    """

    choice: Mapping[str, str]
    says: str
    x: Axis
    y: Axis
    points: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """Pictures of one kind, of which a page shows the one that is chosen; formats of text have tables instead.

    points: numbers against numbers, with intervals and a frontier. lines: the same as a line a kind. intervals: a row
    a name. grid: a number a place, as its colour and as text.
    """

    title: str
    kind: Literal["points", "lines", "intervals", "grid"]
    views: Sequence[View]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Prose:
    """Sentences, or with `copy` a text to take as it is. leads: they begin with what each is about, to a colon."""

    title: str
    lines: Sequence[str]
    copy: bool = False
    leads: bool = False


Section = Table | Plot | Prose


@dataclass(frozen=True)
class Document:
    """What a command found, for every renderer.

    lead: a line above all tables, of who ran it. legend: what the signs in the tables mean. notes: lines below them.
    rows: the same as programs read it, a value a key; fields: the keys that a table of them has.
    """

    title: str = ""
    sections: Sequence[Section] = ()
    lead: str = ""
    legend: str = ""
    notes: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    fields: Sequence[str] = field(default_factory=tuple)

    @property
    def tables(self) -> list[Table]:
        """The sections that every format can show."""
        return [one for one in self.sections if isinstance(one, Table)]


@dataclass(frozen=True)
class Renderer:
    """A format: its name after --format, the ending of its files, and what makes its text of a document."""

    name: str
    ending: str
    render: Callable[[Document], str]
