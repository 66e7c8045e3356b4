"""Rows in a CSV file, which spreadsheets open too."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.render import text

# a spreadsheet reads what begins so as a formula, and runs it
FORMULA = ("=", "@", "+", "-", "\t", "\r")


def plain(value: Any) -> Any:
    """A value that a spreadsheet shows as it is; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    return f"'{text.cell(value)}" if value.lstrip(" ").startswith(FORMULA) else text.cell(value)


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows under their columns' names; what is absent is empty."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writerow({name: plain(name) for name in columns})
    writer.writerows({name: plain(value) for name, value in row.items()} for row in rows)
    return lines.getvalue()
