"""Where measurements are kept. Imports no torch.

A run folder holds one folder a cell, written whole or not at all, and the baseline's tensors that cells share:

    results/quickstart/
      run.json                          the sweep that was asked for, and its cells
      cells/<slug>-<hash>/record.json   the cell's numbers, or its error
      cells/<slug>-<hash>/samples.parquet
      baseline/<slug>-<hash>.safetensors
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.results.record import Record, describe, name_of, plain_json, scalar

if TYPE_CHECKING:
    import pandas as pd

Tensors = dict[str, Any]  # of torch tensors


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
