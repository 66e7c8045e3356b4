"""What a measurement is, and where it is kept. Imports no torch.

A run folder holds one folder a cell, written whole or not at all, and the baseline's tensors that cells share:

    results/quickstart/
      run.json                          the sweep that was asked for, and its cells
      cells/<slug>-<hash>/record.json   the cell's numbers, or its error
      cells/<slug>-<hash>/samples.parquet
      baseline/<slug>-<hash>.safetensors
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1  # of record.json; raised when a reader of the old one would misread the new one

Tensors = dict[str, Any]  # of torch tensors


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


class NotARunError(ValueError):
    """A folder that holds no run."""


@dataclass(frozen=True)
class Contents:
    """The records of a run folder by cell name, and a line for each that cannot be read."""

    records: dict[str, Record]
    problems: list[str]


class Store:
    """The results of one sweep in one folder.

    Every file is written beside its place and renamed into it, so a process killed at any moment leaves whole cells and
    drafts; a draft is never read, and the next writer sweeps it away.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        self.baselines = folder / "baseline"

    @property
    def foreign(self) -> str:
        """Why this is no place for a run: it is a file, or a folder with other things alone; else empty."""
        if self.folder.exists() and not self.folder.is_dir():
            return "is a file"
        own = {"cells", "run.json", ".lock"}
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return "holds other files and no run" if names and not names & own else ""

    # ---- reading

    def load(self) -> Contents:
        """All that can be read; a broken record costs one line in `problems` and nothing else."""
        records: dict[str, Record] = {}
        problems: list[str] = []
        for path in sorted(self.cells.iterdir()) if self.cells.is_dir() else []:
            if path.name.startswith(".") or not path.is_dir():
                continue
            try:
                records[path.name] = self.read(path.name)
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{path}: not a whole record ({describe(error)}); the cell counts as not done")
        return Contents(records, problems)

    def read(self, cell: str) -> Record:
        """The record of one cell.

        Raises:
            OSError, ValueError, KeyError, TypeError: it is not there, or not whole.
        """
        record = Record.from_json(json.loads((self.cells / cell / "record.json").read_text(encoding="utf-8")))
        if record.cell != cell:
            raise ValueError(f"it is the record of {record.cell}")
        samples = self.cells / cell / "samples.parquet"
        if record.status == "done" and not (samples.is_file() and whole_parquet(samples)):
            raise ValueError("samples.parquet is missing or cut short")
        return record

    def done(self) -> set[str]:
        """Names of the cells that were measured."""
        return {name for name, record in self.load().records.items() if record.status == "done"}

    def samples(self, cell: str) -> pd.DataFrame:
        """A row a document (and filter) of a cell."""
        import pandas as pd

        return pd.read_parquet(self.cells / cell / "samples.parquet")

    def run(self) -> dict[str, Any]:
        """What `write_run` wrote; empty where it is missing or broken."""
        try:
            row = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return row if isinstance(row, dict) else {}

    # ---- writing

    def save(self, record: Record, samples: list[dict[str, Any]]) -> None:
        """Put a cell in its place, in place of an earlier record of it."""
        draft = self._draft(self.cells)
        draft.mkdir(parents=True)
        if record.status == "done":
            write_samples(draft / "samples.parquet", samples)
        write_text(draft / "record.json", json.dumps(record.to_json(), indent=1, allow_nan=False) + "\n")
        flush(draft)
        place = self.cells / record.cell
        if place.exists():
            self._make_room(place)
        draft.rename(place)
        flush(self.cells)

    def _make_room(self, place: Path) -> None:
        """Moves an earlier record aside; a broken one is kept for whoever wants to look."""
        try:
            self.read(place.name)
        except (OSError, ValueError, KeyError, TypeError):
            number = 1
            while (aside := self.cells / f".broken-{number}-{place.name}").exists():
                number += 1
            place.rename(aside)
        else:
            aside = self._draft(self.cells)
            place.rename(aside)
            shutil.rmtree(aside)

    def write_run(self, row: dict[str, Any]) -> None:
        """Keep what was asked for, for the report."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._draft(self.folder)
        write_text(draft, json.dumps(plain_json(row), indent=1, allow_nan=False) + "\n")
        draft.rename(self.folder / "run.json")

    def remove(self, cells: Sequence[str] | None = None) -> None:
        """Forget these cells, or all results of this run folder; nothing else in it, and the baseline's tensors too."""
        folders = [self.cells] if cells is None else [self.cells / cell for cell in cells]
        for folder in (*folders, self.baselines):
            if folder.is_dir():
                aside = self._draft(self.folder)
                folder.rename(aside)
                shutil.rmtree(aside)
        for name in ("run.json", "report.md", "report.csv", "report.json"):
            (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Sole right to write here while the block runs; drafts that an earlier process left are swept away.

        Raises:
            BlockingIOError: another process writes here.
        """
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (self.folder, self.cells, self.baselines):
                for draft in folder.glob(".draft-*"):
                    if draft.is_dir():
                        shutil.rmtree(draft)
                    else:
                        draft.unlink()
            yield

    def _draft(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f".draft-{uuid.uuid4().hex}"

    # ---- tensors that cells share

    def baseline(self, identity: Mapping[str, Any], slug: str, compute: Callable[[], Tensors]) -> Tensors:
        """The tensors kept under `identity`, computed and kept where they are missing or broken."""
        import fcntl

        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        self.baselines.mkdir(parents=True, exist_ok=True)
        place = self.baselines / f"{name_of(slug, identity)}.safetensors"
        # of several processes one computes and the others wait; what a killed one held is free
        with place.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError, SafetensorError):
                return load_file(place)
            tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
            draft = self._draft(self.baselines)
            save_file(tensors, draft)
            flush(draft)
            draft.rename(place)
        return tensors


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


def write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    """Parquet of the rows; a column that is not all text, all numbers or all truth values becomes JSON text."""
    import pandas as pd

    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for row in samples for name in row):
        values = [scalar(row.get(name)) for row in samples]
        kinds = {kind(value) for value in values if value is not None}
        if len(kinds) > 1 or "other" in kinds:
            values = [None if value is None else json.dumps(plain_json(value)) for value in values]
        columns[name] = values
    pd.DataFrame(columns).to_parquet(path, index=False)
    flush(path)


def kind(value: object) -> str:
    """How Parquet would store a value: text, truth values, numbers, or lists of one of these."""
    if isinstance(value, (bool, str)):
        return type(value).__name__
    if isinstance(value, (list, tuple)):
        kinds = {kind(item) for item in value}
        return f"list of {kinds.pop()}" if len(kinds) == 1 and kinds <= {"bool", "str", "number"} else "other"
    return "number" if isinstance(value, (int, float)) else "other"


def whole_parquet(path: Path) -> bool:
    """Whether the file ends as a Parquet file does."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < 12:
            return False
        file.seek(-4, os.SEEK_END)
        return file.read() == b"PAR1"


def write_text(path: Path, text: str) -> None:
    """A file with this text, on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Writes a file or a folder's entries through to the disk, so that a power cut keeps the order of renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(error: BaseException) -> str:
    """One line for an error, for a person."""
    if isinstance(error, FileNotFoundError):
        return f"no {Path(error.filename).name}" if error.filename else "file not found"
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
