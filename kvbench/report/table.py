"""A table as the report's formats share it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvbench.render import csv
from kvbench.results import plain_json


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


def rows_json(rows: Sequence[Any]) -> str:
    """The rows as a JSON list; what JSON has no number for is "inf", "-inf" or "nan"."""
    return json.dumps(plain_json([asdict(row) for row in rows]), indent=1, allow_nan=False) + "\n"


def rows_csv(rows: Sequence[Any], columns: Sequence[str]) -> str:
    """The rows as CSV; what is absent is empty."""
    return csv.table(columns, [asdict(row) for row in rows])
