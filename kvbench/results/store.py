"""Where measurements are kept. Imports no torch.

A run folder holds one folder a cell, written whole or not at all, and the baseline's tensors that cells share:

    out/quickstart/
      run.json                          the sweep that was asked for, and its cells
      cells/<slug>-<hash>/record.json   the cell's numbers, or its error
      cells/<slug>-<hash>/samples.parquet
      baseline/<slug>-<hash>.safetensors, and its checksum in .sha256
      search/                           a run folder of its own: what layers cost, of `kvbench search`
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.files import (
    DRAFT,
    check_file,
    discard,
    draft_in,
    flush,
    is_real_folder,
    locked,
    read_json,
    read_text,
    set_aside,
    sweep_away,
    write_text,
)
from kvbench.results.record import Record, checksum, describe, name_of, plain_json, scalar, unsigned
from kvbench.results.shapes import Run, Sums, read_as

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Tensors = dict[str, Any]  # of torch tensors

DEFAULT_FOLDER = Path("out")  # of run folders: a person's own, which git ignores; results/ is committed evidence

logger = logging.getLogger(__name__)


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
    drafts; a draft is never read, and the next writer sweeps it away. Symbolic links inside are not followed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        self.baselines = folder / "baseline"

    @property
    def foreign(self) -> str:
        """Why this is no place for a run; empty where it is one, or may become one."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            return "is a file" if self.folder.exists() else "is a symbolic link to nothing"
        own = {"cells", "run.json", ".lock", "search"}
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        for path in (self.cells, self.baselines):
            if os.path.lexists(path) and not is_real_folder(path):
                what = "a symbolic link" if path.is_symlink() else "no folder"
                return f"has {what} for its {path.name}/, and would write elsewhere: move that away"
        return "holds other files and no run" if names and not names & own else ""

    # ---- reading

    def load(self) -> Contents:
        """All that can be read; a broken record costs one line in `problems` and nothing else."""
        records: dict[str, Record] = {}
        problems: list[str] = []
        for path in sorted(self.cells.iterdir()) if is_real_folder(self.cells) else []:
            if path.name.startswith(".") or not path.is_dir():
                continue
            try:
                records[path.name] = self.read(path.name)
            except (OSError, ValueError) as error:
                problems.append(f"{path}: not a whole record ({describe(error)}); the cell counts as not done")
        if self.cells.is_symlink():
            problems.append(f"{self.cells}: a symbolic link, which is not followed")
        elif self.cells.exists() and not self.cells.is_dir():
            problems.append(f"{self.cells}: no folder, so it holds no cell")
        try:
            self._read_run()
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            problems.append(f"{self.folder / 'run.json'}: not read ({describe(error)})")
        return Contents(records, problems)

    def read(self, cell: str) -> Record:
        """The record of one cell.

        Raises:
            OSError, ValueError: it is not there, not whole, or changed since it was written.
        """
        folder = self.cells / cell
        if folder.is_symlink():
            raise ValueError("it is a symbolic link, which is not followed")
        row = read_json(folder / "record.json", follow=False)
        sums = row.pop("sha256", None) if isinstance(row, dict) else None
        if sums is not None and checksum(row) != read_as(Sums, sums, "sha256")["record"]:
            raise ValueError("record.json was changed after it was written: its checksum is another")
        if sums is None and isinstance(row, dict) and row.get("version") != 1:
            raise ValueError("record.json has no checksum")
        record = Record.from_json(row)
        if record.cell != cell:
            raise ValueError(f"it is the record of {record.cell}")
        if record.status == "done":
            samples = folder / "samples.parquet"
            try:
                check_file(samples, follow=False)
            except FileNotFoundError:
                raise ValueError("samples.parquet is missing") from None
            if not whole_parquet(samples):
                raise ValueError("samples.parquet is cut short")
            if sums is not None and file_checksum(samples) != sums.get("samples"):
                raise ValueError("samples.parquet was changed after it was written: its checksum is another")
        return record

    def done(self) -> set[str]:
        """Names of the cells that were measured."""
        return {name for name, record in self.load().records.items() if record.status == "done"}

    def samples(self, cell: str) -> pd.DataFrame:
        """A row a document (and filter) of a cell.

        Raises:
            OSError, ValueError: they can't be read.
        """
        with _readable():
            # in one thread: starting more costs more than reading such a file
            frame: pd.DataFrame = self.columns(cell, lists=True).to_pandas(use_threads=False)
        return frame

    def columns(self, cell: str, lists: bool = False) -> pa.Table:
        """The same without pandas, which takes longer to import than a report to read all cells.

        lists: also the columns with a list a row, such as answers, which are most of a file.

        Raises:
            OSError, ValueError: they can't be read.
        """
        import pyarrow.parquet as pq

        with _readable(), pq.ParquetFile(self.cells / cell / "samples.parquet") as file:
            names = [one.name for one in file.schema_arrow if lists or not hasattr(one.type, "value_type")]
            return file.read(names, use_threads=False)

    def run(self) -> dict[str, Any]:
        """What `write_run` wrote; empty where it is missing or broken, which `load` says."""
        try:
            return self._read_run()
        except (OSError, ValueError):
            return {}

    def _read_run(self) -> dict[str, Any]:
        row: dict[str, Any] = read_as(Run, unsigned(read_json(self.folder / "run.json", follow=False)))
        return row

    # ---- writing

    def save(self, record: Record, samples: list[dict[str, Any]]) -> None:
        """Put a cell in its place, in place of an earlier record of it."""
        row, sums = record.to_json(), {}
        Record.from_json(row)  # what could not be read again is not written
        draft = self._draft(self.cells)
        try:
            draft.mkdir()
            if record.status == "done":
                write_samples(draft / "samples.parquet", samples)
                sums["samples"] = file_checksum(draft / "samples.parquet")
            row["sha256"] = {**sums, "record": checksum(row)}
            write_text(draft / "record.json", json.dumps(row, indent=1, allow_nan=False) + "\n")
            flush(draft)
            place = self.cells / record.cell
            if os.path.lexists(place):
                self._make_room(place)
            draft.rename(place)
        except BaseException:
            sweep_away(draft)
            raise
        flush(self.cells)

    def _make_room(self, place: Path) -> None:
        """Moves an earlier record aside; a broken one is kept for whoever wants to look."""
        try:
            self.read(place.name)
        except (OSError, ValueError):
            set_aside(place)
        else:
            aside = self._draft(self.cells)
            place.rename(aside)
            sweep_away(aside)

    def write_run(self, row: dict[str, Any]) -> None:
        """Keep what was asked for, for the report."""
        self.folder.mkdir(parents=True, exist_ok=True)
        signed = {**plain_json(row), "sha256": checksum(row)}
        write_text(self.folder / "run.json", json.dumps(signed, indent=1, allow_nan=False) + "\n")

    def remove(self, cells: Sequence[str] | None = None) -> None:
        """Forget these cells, or all results of this run folder; nothing else in it, and the baseline's tensors too."""
        folders = [self.cells] if cells is None else [self.cells / cell for cell in cells]
        for folder in (*folders, self.baselines):
            if os.path.lexists(folder):
                aside = self._draft(self.folder)
                folder.rename(aside)
                sweep_away(aside)
        for name in ("run.json", "report.md", "report.csv", "report.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Sole right to write here while the block runs; drafts that an earlier process left are swept away.

        Raises:
            BlockingIOError: another process writes here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", wait=False):
            for folder in filter(is_real_folder, (self.folder, self.cells, self.baselines)):
                for draft in folder.glob(f"{DRAFT}*"):
                    sweep_away(draft)
            yield

    def _draft(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return draft_in(folder)

    # ---- tensors that cells share

    def baseline(self, identity: Mapping[str, Any], slug: str, compute: Callable[[], Tensors]) -> Tensors:
        """The tensors kept under `identity`, computed and kept where they are missing, or (with a line) damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self.baselines.mkdir(parents=True, exist_ok=True)
        place = self.baselines / f"{name_of(slug, identity)}.safetensors"
        # of several processes one computes and the others wait; what a killed one held is free
        with locked(place.with_suffix(".lock"), wait=True):
            try:
                return read_tensors(place)
            except FileNotFoundError:
                pass
            except (OSError, ValueError, SafetensorError) as error:
                logger.warning("%s: damaged (%s); computed again", place, describe(error))
            tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
            draft = self._draft(self.baselines)
            try:
                save_file(tensors, draft)
                flush(draft)
                for path in filter(os.path.lexists, (place, sum_of(place))):
                    discard(path)
                write_text(sum_of(place), file_checksum(draft))
                draft.rename(place)
            except BaseException:
                sweep_away(draft)
                raise
        return tensors


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Errors of the readers of Parquet, which raise what they like at a damaged file, as OSError or ValueError."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"samples.parquet: {describe(error)}") from error


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file whose checksum stands beside it.

    Raises:
        OSError, ValueError, SafetensorError: they are not there, or not as they were written.
    """
    from safetensors.torch import load_file

    check_file(path, follow=False)
    try:
        known = read_text(sum_of(path))
    except FileNotFoundError:
        raise ValueError("it has no checksum") from None
    if known != file_checksum(path):
        raise ValueError("its checksum is another")
    return load_file(path)


def sum_of(path: Path) -> Path:
    """Where the checksum of a baseline's tensors is kept."""
    return path.with_suffix(".sha256")


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
    pd.DataFrame(columns).to_parquet(path, index=False, compression="zstd")
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


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
