"""A run folder's finished cells by model and scheme, as files for other tools take them. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kvbench.report.labels import group_of, task_labels
from kvbench.results import NotARunError, Record, Store

# what cells of one scheme may differ in and are then apart, as `group_of` has it
PARTS = ("limit", "model", "revision", "compute_dtype", "scoring", "seed")


@dataclass(frozen=True)
class Scheme:
    """A model under a scheme. apart: how its cells differ from others of that scheme, `limit-50`; empty where none do.

    labels: what each cell's task is called, by the cell's name: two of one task with other options have two names.
    """

    model: str
    dtype: str
    rotation: str
    apart: str
    records: tuple[Record, ...]
    labels: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """All that tells it from others."""
        return tuple(filter(None, (self.model, self.dtype, self.rotation, self.apart)))


def schemes_of(records: Iterable[Record]) -> list[Scheme]:
    """The records of each model and scheme; quick looks, other seeds, weights and precisions apart."""
    groups: dict[tuple[str, str, str], dict[tuple[str, ...], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record.model["name"], record.dtype, record.rotation][group_of(record)].append(record)
    labels = task_labels([record for alike in groups.values() for group in alike.values() for record in group])
    found = []
    for scheme, alike in groups.items():
        differ = [len({key[place] for key in alike}) > 1 for place in range(len(PARTS))]
        for key, group in alike.items():
            limit = group[0].limit  # a quick look says so whatever else is there
            parts = [f"limit-{limit}"] if limit is not None else []
            parts += [
                f"{name}-{value}" for name, value, other in zip(PARTS[1:], key[1:], differ[1:], strict=True) if other
            ]
            found.append(Scheme(*scheme, "-".join(parts), tuple(group), labels))
    return found


def by_scheme(folder: Path, kept: Callable[[Record], bool], what: str) -> tuple[Store, list[Scheme]]:
    """The run folder, and its schemes with the records that are kept. what: these are, for a person.

    Raises:
        FileNotFoundError, NotARunError: no run folder, or none with such a cell.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    store = Store(folder)
    contents = store.load()
    schemes = schemes_of(filter(kept, contents.records.values()))
    if not schemes:
        broken = f"; {contents.problems[0]}" if contents.problems else ""
        raise NotARunError(f"nothing to export: {folder} has no finished cell of {what}{broken}")
    return store, schemes
