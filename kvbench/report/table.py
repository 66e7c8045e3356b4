"""A table as the report's formats share it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Header:
    """A column's head: what it holds, and below it what and how many. numeric: set to the right."""

    lines: tuple[str, ...]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Numbers that belong together; notes stand below them."""

    title: str
    headers: list[Header]
    rows: list[list[str]]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
