"""Rows in a CSV file, which spreadsheets open too."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from kvbench.render import text
from kvbench.render.document import Document, Renderer
from kvbench.results import plain_json

# a spreadsheet reads what begins so as a formula, and runs it
FORMULA = ("=", "@", "+", "-", "\t", "\r")


def plain(value: Any) -> Any:
    """A value that a spreadsheet shows as it is; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    return f"'{text.cell(value)}" if value.lstrip(" ").startswith(FORMULA) else text.cell(value)


def render(document: Document) -> str:
    """The rows under the names of their fields; what is absent is empty, and what is no single value is JSON."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, document.fields, lineterminator="\n")
    writer.writerow({name: plain(name) for name in document.fields})
    for row in document.rows:
        writer.writerow({name: plain(_single(row[name])) for name in document.fields})
    return lines.getvalue()


def _single(value: Any) -> Any:
    return json.dumps(plain_json(value)) if isinstance(value, (dict, list, tuple)) else value


CSV = Renderer("csv", "csv", render)
