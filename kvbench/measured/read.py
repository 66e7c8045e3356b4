"""The cells of a run folder, or of a baseline file. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from kvbench.measured.baseline_file import read_file
from kvbench.measured.cells import Measured, of_records
from kvbench.results import NotARunError, Store


def read(path: Path) -> Measured:
    """The cells of a run folder, or of a file that `write` wrote.

    Raises:
        FileNotFoundError: nothing is there.
        NotARunError: it holds no finished cell, or is no such file.
    """
    if path.is_dir():
        contents = Store(path).load()
        if not any(record.status == "done" for record in contents.records.values()):
            broken = f"; {contents.problems[0]}" if contents.problems else ""
            raise NotARunError(f"nothing to compare: {path} has no finished cell (kvbench sweep makes them){broken}")
        run, records, problems = Store(path).run(), list(contents.records.values()), contents.problems
        if not (path / "run.json").exists() and not all(record.kernel for record in records):
            problems = [*problems, f"{path / 'run.json'}: missing, which names the baseline and the margin"]
        return of_records(path, records, run, problems)
    if not path.exists():
        raise FileNotFoundError(f"no run folder or baseline file {path}")
    return read_file(path)
