"""The texts of documents that flipped, from a folder with the data sets' rows. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from kvbench.results import Record

LONGEST = 2000  # characters of a field


def texts(records: Sequence[Record], data: Path) -> dict[str, dict[str, str]]:
    """The fields of every row of the records' data sets, by the hash that samples have of a document.

    data: a folder with the rows, `<data set>/<configuration>/<split>.jsonl`. A task that makes other documents of its
    rows is not found by their hash, and has no text here.
    """
    named = {
        place
        for record in records
        for place in (record.facts.get("data") or {}).values()
        if isinstance(place, str) and place.startswith("mirror: ")
    }
    found: dict[str, dict[str, str]] = {}
    for place in sorted(named):
        for file in sorted((data / place.removeprefix("mirror: ")).glob("*.jsonl")):
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    found[hash_of(row)] = {name: _shown(value) for name, value in row.items()}
    return found


def hash_of(row: object) -> str:
    """What samples have of a document: lm-eval's hash of it, its first 16 digits."""
    text = json.dumps(row, indent=2, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
