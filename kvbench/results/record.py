"""What a measurement is: a record a cell, and the name that its identity gives it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kvbench.results.metrics import Metric, upgrade
from kvbench.results.shapes import (
    CellIdentity,
    Environment,
    Facts,
    KernelIdentity,
    KernelRow,
    MetricOfBefore,
    Model,
    read_as,
)

# of a kernel's row: the first is not shown without the others
SHOWN_TOGETHER = (
    ("us", "us_p10", "us_p90", "gbps", "share_of_copy"),
    ("speedup", "best_16bit_us"),
    ("same_dtype_speedup", "same_dtype_us"),
)

MAX_SIZE = 2**40  # bits of a value, bytes of a token: no number of a record is larger
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
    model: name, revision, compute_dtype, layers, max_length. dtype: "canary" for the zeroed cache; of a scheme once
    more what `dtype_label` says.
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
        """Whether this is the zeroed cache, which no table ranks."""
        return self.dtype == "canary"

    @property
    def again(self) -> bool:
        """Whether this is the baseline or a low-bit scheme once more, whose difference from it is the noise floor."""
        return bool(self.identity.get("again"))

    @property
    def kernel(self) -> bool:
        """Whether a kernel was timed here, and no model measured; the facts are its row."""
        return "kernel" in self.identity

    @property
    def scored(self) -> bool:
        """Whether it says what a scheme does to a model: done, and no control and no kernel's time."""
        return self.status == "done" and not (self.canary or self.again or self.kernel)

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
            ValueError: this is no record, or one of another version, or it does not prove its name.
        """
        if not isinstance(row, dict):
            raise ValueError("it is no mapping")
        version, metrics = row.get("version"), row.get("metrics")
        if version not in (1, VERSION):
            raise ValueError(f"version {version!r} of the record, this kvbench reads versions 1 and {VERSION}")
        if version == 1:
            metrics = upgrade(read_as(list[MetricOfBefore], metrics, "metrics"))
        record: Record = read_as(cls, {**row, "metrics": metrics, "version": VERSION})
        metrics = tuple(
            replace(one, value=float(one.value), stderr=None if one.stderr is None else float(one.stderr))
            for one in record.metrics
        )
        record = replace(record, metrics=metrics)
        sizes = {"bits_per_value": record.bits_per_value, "kv_bytes_per_token": record.kv_bytes_per_token}
        for name, value in (sizes | {f"stderr of {one.name}": one.stderr for one in metrics}).items():
            if value is not None and (value < 0 or (name in sizes and not value < MAX_SIZE)):
                most = f"to {MAX_SIZE}" if name in sizes else "on"
                raise ValueError(f"{name} {value!r}: expected a number from 0 {most}")
        record.prove()
        return record

    def prove(self) -> None:
        """Raises ValueError where the name is not that of the identity, or what tables show is not the identity's."""
        read_as(Model, self.model, "model")
        read_as(Environment, self.environment, "environment")
        if not self.kernel:
            read_as(Facts, self.facts, "facts")
        read_as(KernelIdentity if self.kernel else CellIdentity, self.identity, "identity")
        proven = name_of("", self.identity)
        if not self.cell.endswith(proven):
            raise ValueError(f"its name should end in {proven}: that is the hash of its identity")
        said, meant = (self._kernel_claims if self.kernel else self._claims)()
        for name, value in meant.items():
            if said[name] != value:
                raise ValueError(f"{name} {said[name]!r} where its identity has {value!r}")

    def _claims(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the record says, and what the identity does, of the same things."""
        identity, model = self.identity, self.model["name"].rsplit("/", 1)[-1]
        destroyed = bool(identity["scheme"].get("destroyed"))
        said = {
            **{f"model {name}": self.model.get(name) for name in ("name", "revision", "compute_dtype")},
            **{name: getattr(self, name) for name in ("dtype", "rotation", "limit", "scoring")},
            # the task's own name stands in the cell's alone
            "cell": self.cell,
        }
        meant = {
            **{f"model {name}": identity["model"].get(name) for name in ("name", "revision", "compute_dtype")},
            "dtype": "canary" if destroyed else dtype_label(identity["scheme"]["dtype"], identity.get("again", 0)),
            "rotation": identity["scheme"]["rotation"],
            "limit": identity["limit"],
            "scoring": identity["scoring"],
            "cell": name_of(f"{model}-{self.dtype}-{self.rotation}-{self.task}", identity),
        }
        return said, meant

    def _kernel_claims(self) -> tuple[dict[str, Any], dict[str, Any]]:
        row = read_as(KernelRow, self.facts, "facts")
        for first, *others in SHOWN_TOGETHER:
            absent = [name for name in others if row.get(first) is not None and row.get(name) is None]
            if absent:
                raise ValueError(f"facts.{absent[0]} is missing, which belongs to {first}")
        kernel, scheme = self.identity["kernel"], self.identity["scheme"]
        said = {name: row[name] for name in (*kernel, *scheme)}
        said |= {"task": self.task, "dtype": self.dtype, "rotation": self.rotation}
        return said, {"task": kernel_task(kernel), **kernel, **scheme}


def dtype_label(dtype: str, again: bool | int) -> str:
    """What tables call the dtype of a cell; again: True for the baseline once more, else which noise a repeat is under.

    0: no repeat.
    """
    if again is True:
        return "again"
    return f"again {again} of {dtype}" if again else dtype


def kernel_task(row: Mapping[str, Any]) -> str:
    """What a kernel's row timed, `decode 32×8192` (sequences × tokens of each), or `write 64` (tokens)."""
    return f"{row['op']} {row['batch']}" + (f"×{row['context']}" if row.get("context") else "")


def name_of(slug: str, identity: Mapping[str, Any]) -> str:
    """A readable slug, then a hash of the identity's canonical JSON."""
    digest = checksum(identity)[:10]
    # short enough for a file name everywhere
    readable = re.sub(r"[^a-z0-9._+]+", "-", slug.lower()).strip("-.")[:120]
    return f"{readable}-{digest}"


def checksum(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON."""
    try:
        canonical = _CANONICAL.encode(value)  # most values are plain already
    except (TypeError, ValueError):  # an infinity, or keys that are no text
        canonical = _CANONICAL.encode(plain_json(value))
    return hashlib.sha256(canonical.encode()).hexdigest()


def unsigned(row: Any) -> Any:
    """What a file says without the checksum of it; one of before checksums as it is.

    Raises:
        ValueError: it was changed after it was written.
    """
    if not isinstance(row, dict) or "sha256" not in row:
        return row
    rest = {name: value for name, value in row.items() if name != "sha256"}
    if row["sha256"] != checksum(rest):
        raise ValueError("it was changed after it was written: its checksum is another")
    return rest


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


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, default=plain_json)


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
