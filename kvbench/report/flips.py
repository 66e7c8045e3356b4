"""`kvbench show`: the documents whose score moved against the baseline, with both answers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.measured import Cell, Measured, Series, read
from kvbench.report.compare import reasons
from kvbench.results import NotARunError, Store, describe, shown_number

if TYPE_CHECKING:
    import pandas as pd


class NotComparableError(ValueError):
    """A cell without a baseline cell over the same documents."""


@dataclass(frozen=True)
class Flip:
    """One document whose score moved. before, after: the baseline's score and the cell's; *_answer: what was said."""

    task: str
    doc_id: str
    metric: str
    before: float
    after: float
    baseline_answer: str
    answer: str


@dataclass(frozen=True)
class Flips:
    """The flips of one cell. title: cell and baseline, and of how many documents."""

    title: str
    rows: list[Flip]


def flips(path: Path) -> Flips:
    """The flips of the cell in a folder `DIR/cells/NAME`; of shares alone, for other metrics have no answers.

    Raises:
        FileNotFoundError, NotARunError: no such cell.
        NotComparableError: the baseline's documents are not the cell's.
    """
    folder = path.resolve()
    if not (folder / "record.json").is_file() or folder.parent.name != "cells":
        raise FileNotFoundError(f"{path} is no cell: a cell is a folder DIR/cells/NAME with a record.json")
    measured = read(folder.parents[1])
    cell = next((one for one in measured.cells if one.name == folder.name), None)
    if cell is None:
        raise NotARunError(_absence(Store(measured.path), folder.name))
    base = _baseline(measured, cell)
    store = Store(measured.path)
    here, there = _answers(store, cell), _answers(store, base)
    shares = [name for name, one in cell.series.items() if one.metric.kind == "share" and name in base.series]
    rows = [
        Flip(task, doc_id, name, before, after, there[task, doc_id, flt], here[task, doc_id, flt])
        for name in shares
        for (task, doc_id, flt), before, after in moved(cell.series[name], base.series[name])
    ]
    names = [" · ".join(one.scheme) for one in (cell, base)]
    counts = ", ".join(
        f"{name} {sum(row.metric == name for row in rows)} of {len(cell.series[name].values)}" for name in shares
    )
    return Flips(
        f"{cell.model} · {cell.task} · {names[0]} against {names[1]}: {counts or 'no metric of single answers'}", rows
    )


def _absence(store: Store, cell: str) -> str:
    """Why a cell has no documents to list."""
    contents = store.load()
    record = contents.records.get(cell)
    if record is None:
        return next(line for line in contents.problems if f"/{cell}: " in line)
    return f"{cell} " + ("is of a kernel, which reads no documents" if record.kernel else f"failed: {record.error}")


def _baseline(measured: Measured, cell: Cell) -> Cell:
    scheme = cell.repeats if cell.again else measured.baseline
    same = [one for one in measured.cells if one.scheme == scheme and one.task == cell.task]
    base = next((one for one in same if one.key == cell.key), None)
    if base is cell:
        others = [one.name for one in measured.cells if one.key == cell.key and one is not cell and not one.control]
        instead = (
            f"pass a cell that is compared with it, such as {others[0]}"
            if others
            else "the sweep has no other finished cell of its task"
        )
        raise NotComparableError(f"{cell.name} is the baseline itself, whose answers moved nowhere: {instead}")
    if base is None:
        raise NotComparableError(f"{cell.name}: the sweep has no baseline cell to compare it with")
    if wrong := reasons(cell, base):
        raise NotComparableError(f"{cell.name}: {'; '.join(wrong)}")
    return base


def moved(series: Series, base: Series) -> list[tuple[tuple[str, str, str], float, float]]:
    """Each document whose number is another, with the baseline's and this one's."""
    triples = zip(series.documents, base.values, series.values, strict=True)
    return [(doc[:3], float(before), float(after)) for doc, before, after in triples if before != after]


def _answers(store: Store, cell: Cell) -> dict[tuple[str, str, str], str]:
    """What the model said of each document: its text, or the log-likelihoods of the choices."""
    samples: pd.DataFrame = store.samples(cell.name)
    rows: list[dict[str, Any]] = samples.to_dict("records")  # type: ignore[assignment]
    try:
        return {(str(row.get("task", "")), str(row["doc_id"]), str(row["filter"])): answer(row) for row in rows}
    except (TypeError, ValueError, LookupError) as error:
        file = store.cells / cell.name / "samples.parquet"
        raise NotARunError(f"{file} holds answers that cannot be read ({describe(error)})") from None


def answer(row: dict[str, Any]) -> str:
    """A sample's answer, for a person."""
    if row.get("resps") is not None:
        said = row.get("filtered_resps")
        texts = row["resps"] if said is None else said
        return " | ".join(repr(str(text)) for text in texts)
    if row.get("logprobs") is not None:
        logprobs = [float(logprob) for logprob in row["logprobs"]]
        if len(logprobs) == 1:
            likely = "the most likely answer" if row["greedy"][0] else "not the most likely answer"
            return f"{likely}, log-likelihood {shown_number(logprobs[0])}"
        return f"log-likelihoods of the choices {', '.join(shown_number(logprob) for logprob in logprobs)}"
    return "-"
