"""What a measurement is: metrics, a record a cell, and the name that its identity gives it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

VERSION = 1  # of record.json; raised when a reader of the old one would misread the new one


@dataclass(frozen=True)
class Metric:
    """One number of a task.

    name: such as "acc" or "exact_match,strict-match"; stderr: its standard error, None where there is none.
    n: documents behind it. unit: "" for a plain ratio, else such as "nats", "ppl", "%".
    """

    name: str
    value: float
    stderr: float | None
    n: int
    unit: str = ""
    higher_is_better: bool | None = None


# a divergence has a dozen metrics and a perplexity three: a table shows these only where it shows everything
NOT_HEADLINE = re.compile(r"kld_.*|(rms_)?delta_p|ppl_baseline|byte_perplexity|bits_per_byte")


def headline(metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics of a task that a table has room for."""
    names = {metric.name for metric in metrics}
    chosen = [
        metric
        for metric in metrics
        if not NOT_HEADLINE.fullmatch(metric.name)
        # a group's own numbers stand for those of its tasks
        and not ("/" in metric.name and any("/" not in name for name in names))
    ]
    return chosen or list(metrics)


def shown_metric(metric: Metric) -> str:
    """`0.889 ± 0.009`: the standard error to one digit (two where that is a 1), the value to the same place."""
    value, stderr = metric.value, metric.stderr
    unit = " %" if metric.unit == "%" else ""
    if not math.isfinite(value):
        return str(value)
    if stderr is None or not math.isfinite(stderr) or stderr == 0:
        return f"{shown_number(value)}{unit}"
    exponent = math.floor(math.log10(stderr))
    digits = -exponent + (1 if f"{stderr:.1e}"[0] == "1" else 0)
    if (digits > 5 and abs(value) < 0.1) or exponent > 3:
        return f"{value:.1e} ± {stderr:.0e}{unit}"
    places = max(0, digits)
    return f"{value:.{places}f} ± {stderr:.{places}f}{unit}"


def shown_number(value: float) -> str:
    """A number to four digits; a whole one as it is."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e7:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def shown_megabytes(nbytes: int) -> str:
    """Bytes as MB (1e6): to a tenth, and below that to three digits, so that what was read is never 0.0."""
    megabytes = nbytes / 1e6
    return f"{megabytes:.1f}" if megabytes >= 0.1 else f"{megabytes:.3g}"


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
        """The record that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: this is no record, or one of another version.
        """
        if row["version"] != VERSION:
            raise ValueError(f"version {row['version']} of the record, this kvbench reads version {VERSION}")
        if row["status"] not in ("done", "failed"):
            raise ValueError(f"status {row['status']!r}")
        metrics = tuple(
            Metric(**{**m, "value": float(m["value"]), "stderr": None if m["stderr"] is None else float(m["stderr"])})
            for m in row["metrics"]
        )
        return cls(**{**row, "metrics": metrics})


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
