"""What a measurement is: a record a cell, and the name that its identity gives it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kvbench.results.metrics import Metric, upgrade

VERSION = 2  # of record.json; raised when a reader of the old one would misread the new one, or refuse it


@dataclass(frozen=True)
class Outcome:
    """What a task gave: its metrics, and a row a document (and filter) with what the paired tests need.

    A sample has at least `doc_id`, `doc_hash`, `prompt_hash`, `filter` and one column a metric; it holds no text of a
    document.
    facts: whatever else decides or explains the numbers (documents' hash, versions), as JSON.
    """

    metrics: tuple[Metric, ...]
    samples: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One cell as it was measured, or as it failed.

    cell: its name, a slug and a hash of `identity`. identity: all that decides its numbers.
    model: name, revision, compute_dtype, layers, max_length. dtype: "canary" for the destroyed cache, "again" for the
    baseline once more.
    bits_per_value: true bits over all layers, every scale counted; kv_bytes_per_token: of all layers together.
    limit: documents a task was cut to by `--limit`, a quick look; None for a real run.
    timings: seconds, and what else was counted while they passed: tokens, bytes. error: one line; traceback: all of it.
    """

    cell: str
    status: Literal["done", "failed"]
    identity: dict[str, Any]
    model: dict[str, Any]
    dtype: str
    rotation: str
    task: str
    scoring: str
    bits_per_value: float | None
    kv_bytes_per_token: float | None
    limit: int | None = None
    metrics: tuple[Metric, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    traceback: str | None = None
    finished: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: int = VERSION

    @property
    def canary(self) -> bool:
        """Whether this is the destroyed cache, which no table ranks."""
        return self.dtype == "canary"

    @property
    def again(self) -> bool:
        """Whether this is the baseline once more, whose difference from it is the noise floor."""
        return self.dtype == "again"

    @property
    def kernel(self) -> bool:
        """Whether a kernel was timed here, and no model measured; the facts are its row."""
        return "kernel" in self.identity

    @property
    def throughput(self) -> bool:
        """Whether its scores are speeds, which it timed apart from the rest of the cell."""
        task = self.identity.get("task")
        return isinstance(task, dict) and task.get("task") == "throughput"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; numbers that JSON lacks are the strings "inf", "-inf" and "nan"."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        row["metrics"] = [{f.name: getattr(metric, f.name) for f in fields(Metric)} for metric in self.metrics]
        plain: dict[str, Any] = plain_json(row)
        return plain

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """The record that `to_json` wrote, here or in version 1.

        Raises:
            ValueError, KeyError, TypeError: this is no record, or one of another version.
        """
        if row["version"] not in (1, VERSION):
            raise ValueError(f"version {row['version']} of the record, this kvbench reads versions 1 and {VERSION}")
        if row["status"] not in ("done", "failed"):
            raise ValueError(f"status {row['status']!r}")
        metrics = tuple(
            Metric(**{**m, "value": float(m["value"]), "stderr": None if m["stderr"] is None else float(m["stderr"])})
            for m in (upgrade(row["metrics"]) if row["version"] == 1 else row["metrics"])
        )
        return cls(**{**row, "metrics": metrics, "version": VERSION})


def kernel_task(row: Mapping[str, Any]) -> str:
    """What a kernel's row timed, `decode 32×8192` (sequences × tokens of each), or `write 64` (tokens)."""
    return f"{row['op']} {row['batch']}" + (f"×{row['context']}" if row.get("context") else "")


def name_of(slug: str, identity: Mapping[str, Any]) -> str:
    """A readable slug, then a hash of the identity's canonical JSON."""
    canonical = json.dumps(plain_json(identity), sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:10]
    # short enough for a file name everywhere
    readable = re.sub(r"[^a-z0-9._+]+", "-", slug.lower()).strip("-.")[:120]
    return f"{readable}-{digest}"


def plain_json(value: Any) -> Any:
    """What JSON has instead of `value`: lists for tuples, numbers for numpy scalars, strings for infinities and NaN."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain_json(item) for item in value)
    value = scalar(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def scalar(value: Any) -> Any:
    """A numpy or torch scalar as Python's own; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def describe(error: BaseException) -> str:
    """One line for an error, for a person."""
    if isinstance(error, FileNotFoundError):
        return f"no {Path(error.filename).name}" if error.filename else "file not found"
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
