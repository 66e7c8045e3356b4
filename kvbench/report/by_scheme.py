"""A run folder's finished cells by model and scheme, as files for other tools take them. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from kvbench.results import NotARunError, Record, Store

Scheme = tuple[str, str, str]  # model, dtype, rotation


def by_scheme(folder: Path, kept: Callable[[Record], bool], what: str) -> tuple[Store, dict[Scheme, list[Record]]]:
    """The run folder, and its records that are kept. what: these are, for a person.

    Raises:
        FileNotFoundError, NotARunError: no run folder, or none with such a cell.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    store = Store(folder)
    schemes: dict[Scheme, list[Record]] = defaultdict(list)
    for record in store.load().records.values():
        if kept(record):
            schemes[record.model["name"], record.dtype, record.rotation].append(record)
    if not schemes:
        raise NotARunError(f"nothing to export: {folder} has no finished cell of {what}")
    return store, schemes
