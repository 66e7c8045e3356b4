"""The run folders below a folder: what each holds at a glance, and how one is removed. Imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kvbench.files import discard, is_folder, is_real_folder, read_json
from kvbench.results.store import Store

EXPORTS = ("lm-eval", "eee", "mlflow", "wandb")
REPORTS = (*EXPORTS, "report.md", "report.csv", "report.json", "report.html", "compare.md")


@dataclass(frozen=True)
class RunFolder:
    """A run folder, by its records as they say they are: none is proven, so that hundreds are listed at once.

    finished: when its last cell was, as ISO 8601 in UTC; None where none is. left: cells of the sweep without a record.
    size_bytes: of all files in it.
    """

    path: Path
    sweep: str
    finished: str | None
    models: tuple[str, ...]
    done: int
    failed: int
    left: int
    size_bytes: int


def find_runs(folder: Path) -> list[RunFolder]:
    """The run folders in a folder, or itself where it is one; the newest first.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not is_folder(folder):
        raise FileNotFoundError(f"no folder {folder}")
    places = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.iterdir()))
    return sorted(map(look, places), key=lambda run: run.finished or "", reverse=True)


def _is_run(folder: Path) -> bool:
    try:
        return is_real_folder(folder) and (is_real_folder(folder / "cells") or (folder / "run.json").is_file())
    except OSError:  # closed to us, beside others that are not
        return False


def look(folder: Path) -> RunFolder:
    """What one run folder holds; a record that can't be read counts as not there."""
    store = Store(folder)
    run = store.run()
    records = list(_records(store))
    counts = Counter(record["status"] for record in records)
    left = set(run.get("cells", [])) - {record["cell"] for record in records}
    models = dict.fromkeys(record["model"] for record in records)
    finished = max((record["finished"] for record in records), default=None)
    sizes = (path.lstat().st_size for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return RunFolder(
        folder,
        run.get("sweep", ""),
        finished,
        tuple(models),
        counts["done"],
        counts["failed"],
        len(left),
        sum(sizes),
    )


def _records(store: Store) -> Iterator[dict[str, str]]:
    for path in store.cells.glob("*/record.json") if is_real_folder(store.cells) else ():
        try:
            row = read_json(path, follow=False)
            # a kernel's record names heads where others name a model
            model = "kernel times" if "kernel" in row["identity"] else str(row["model"]["name"])
            named = {"status": str(row["status"]), "cell": str(row["cell"]), "model": model}
            yield {**named, "finished": _utc(row["finished"])}
        except (OSError, ValueError, LookupError, TypeError):
            continue


def _utc(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="seconds")


def remove(run: RunFolder) -> list[str]:
    """Removes what kvbench wrote into a run folder, and the folder where nothing else is in it; returns what stays.

    Raises:
        BlockingIOError: a sweep writes there.
    """
    store = Store(run.path)
    with store.writing():
        store.remove()
        for name in REPORTS:
            if os.path.lexists(run.path / name):
                discard(run.path / name)
    (run.path / ".lock").unlink(missing_ok=True)
    if left := sorted(path.name for path in run.path.iterdir()):
        return left
    run.path.rmdir()
    return []
