"""Text in a terminal: tables that fit it, and names that cannot move the cursor."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kvbench.render.document import Column, Document, Renderer

GAP = "   "
# what a text may be broken after: a space but not that between a number and a word, and in a name : + or ,
WORD = re.compile(r"(?:\d+ )?\S+?(?:[:+,](?=\w)|(?=\s)|$)\s*")
COLORS = {
    "WORSE": "31",
    "SLOWER": "31",
    "BETTER": "32",
    "FASTER": "32",
    "EQUIVALENT": "32",
    "SAME": "32",
    "INCONCLUSIVE": "33",
    "AMBIGUOUS": "33",
    "NOT-DISCRIMINATIVE": "33",
    "INVALID": "35",
}

# what a terminal obeys instead of showing it: controls but line ends and tabs, and what turns the writing's direction
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def seen(text: object) -> str:
    r"""The text with each character that a terminal would obey written out, as `\x1b`."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def cell(text: object) -> str:
    """A text as one line of a table."""
    return seen(text).replace("\n", "\\n").replace("\t", "\\t")


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None, color: bool = False
) -> str:
    """A table as wide as it needs to be; where that is more than `width`, with fewer columns, which are named below it.

    No value is cut short, for that is a wrong value: a column is there or not, and a text goes on in the next line.
    """
    order = sorted(range(len(columns)), key=lambda place: not columns[place].verdict)
    every = [_Shown.of(columns[place], [row[place] for row in rows]) for place in order]
    if width is not None and _total([one.width for one in every]) > width:
        every = _narrowed(every)
    kept = _fitting(every, width)
    above = [one for one in every if one.column.group and not any(one.column is other.column for other in kept)]
    depth = max((len(one.head) for one in kept), default=0)
    heads = [[*[""] * (depth - len(one.head)), *one.head] for one in kept]
    lines = [_line(kept, [head[level] for head in heads]) for level in range(depth)]
    lines += ["─" * _total([one.width for one in kept])] if depth else []
    for number in range(len(rows)):
        group = [one.values[number] for one in above]
        if above and (not number or group != [one.values[number - 1] for one in above]):
            lines.append(" · ".join(group))
        cells = [one.broken(number) for one in kept]
        for level in range(max(map(len, cells))):
            lines.append(_line(kept, [part[level] if level < len(part) else "" for part in cells], color and not level))
    if dropped := [one for one in every if not any(one.column is other.column for other in (*kept, *above))]:
        names = ", ".join(" ".join(map(cell, filter(None, one.column.lines))).replace("/ ", "/") for one in dropped)
        lines += wrapped(f"not shown in {width} columns: {names}; --wide shows all", width)
    return "\n".join(lines)


@dataclass(frozen=True)
class _Shown:
    """A column as it is shown: the lines of its head, its values, and its width."""

    column: Column
    head: list[str]
    values: list[str]
    width: int

    @classmethod
    def of(cls, column: Column, values: Sequence[str]) -> _Shown:
        head = list(map(cell, column.lines)) if any(column.lines) else []
        texts = list(map(cell, values))
        return cls(column, head, texts, max(map(len, (*head, *texts)), default=0))

    def joined(self, other: _Shown) -> _Shown:
        """This column with another's values below its own."""
        names = [f"{one}, {two}" for one, two in zip(self.head[-1:], other.head[-1:], strict=True)]
        values = [
            one if two == other.column.joins else f"{one} {two}"
            for one, two in zip(self.values, other.values, strict=True)
        ]
        head = [*self.head[:-1], *names]
        return _Shown(self.column, head, values, max(map(len, (*head, *values)), default=0))

    def with_narrow_head(self) -> _Shown:
        """This column with its head in shorter lines, broken after commas and before units."""
        head = [part for line in self.head for part in re.split(r"(?<=,)|(?<=\S) (?=\()", line)]
        return replace(self, head=head, width=max(map(len, (*head, *self.values)), default=0))

    @cached_property
    def least(self) -> int:
        """How narrow it can be: as its head, and its longest word where its values may be broken."""
        words = [word.rstrip() for value in self.values for word in WORD.findall(value)]
        return max(map(len, (*self.head, *words)), default=0) if self.column.prose else self.width

    def broken(self, row: int) -> list[str]:
        """A value's lines: one, but for a text that is wider than the column."""
        if len(self.values[row]) <= self.width:
            return [self.values[row]]
        lines = [""]
        for word in WORD.findall(self.values[row]):
            if lines[-1] and len(lines[-1]) + len(word.rstrip()) > self.width:
                lines.append("")
            lines[-1] += word
        return [line.rstrip() for line in lines]


def _narrowed(every: Sequence[_Shown]) -> list[_Shown]:
    """The columns with what joins another below it, and heads of numbers in shorter lines."""
    made: list[_Shown] = []
    for one in every:
        if one.column.joins is not None and made:
            made[-1] = made[-1].joined(one)
        else:
            made.append(one.with_narrow_head() if one.column.numeric else one)
    return made


def _fitting(every: Sequence[_Shown], width: int | None) -> list[_Shown]:
    """The columns that there is room for where texts are as narrow as can be; these then share what room is left."""
    kept = list(every)
    if width is None or _total([one.width for one in kept]) <= width:
        return kept
    if _total([one.least for one in kept]) > width:
        kept = [one for one in kept if not one.column.group]
    while _total([one.least for one in kept]) > width and (droppable := [one for one in kept if one.column.drop]):
        first = max(one.column.drop for one in droppable)
        last = [one for one in droppable if one.column.drop == first][-1]
        kept = [one for one in kept if one is not last]
    widths = [one.least for one in kept]
    while _total(widths) < width and (cut := [i for i, one in enumerate(kept) if widths[i] < one.width]):
        widths[min(cut, key=lambda i: widths[i])] += 1
    return [replace(one, width=size) for one, size in zip(kept, widths, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _line(columns: Sequence[_Shown], cells: Sequence[str], color: bool = False) -> str:
    padded = []
    for one, value in zip(columns, cells, strict=True):
        text = value.rjust(one.width) if one.column.numeric else value.ljust(one.width)
        padded.append(_colored(text) if color and one.column.verdict else text)
    return GAP.join(padded).rstrip()


def _colored(text: str) -> str:
    """A verdict in the color of its first word."""
    code = COLORS.get(re.split("[^A-Z-]", text.lstrip("0123456789 "), maxsplit=1)[0])
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def wrapped(line: str, width: int | None) -> list[str]:
    """A line in as many as it takes, broken between words, but not between a number and its unit or its error."""
    if not width or len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    made = textwrap.wrap(
        bound(line.strip()),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part.replace("\xa0", " ") for part in made]


def bound(line: str) -> str:
    """A line whose numbers cannot be parted from their units or errors: with spaces there at which no line breaks."""
    return re.sub(r"(?<=[\d±×<>≥=]) (?=[^\s(\[])|(?<=\S) (?=[±×])", "\xa0", line)


def render(document: Document, width: int | None = None, color: bool = False) -> str:
    """Every table with its title, warnings and notes; then what the signs mean, and the notes.

    width: of the terminal, None where nothing limits it. color: whether verdicts have one.
    """
    lines: list[str] = []

    def say(*texts: str) -> None:
        lines.extend(part for text in texts for one in seen(text).split("\n") for part in wrapped(one, width))

    for one in document.tables:
        say(*filter(None, (one.title, *one.warnings)))
        lines.append(table(one.columns, one.rows, width, color))
        say(*one.notes)
        lines.append("")
    say(*filter(None, (document.legend, *document.notes)))
    return "\n".join(lines).rstrip("\n") + "\n"


TEXT = Renderer("table", "txt", render)
