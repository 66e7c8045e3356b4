"""What a run folder holds for a paired test: of each cell's metrics a number a document. Imports no torch.

A baseline file holds the same for `kvbench check`, in text that a commit shows well: a line a metric.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.results import Metric, NotARunError, Record, Store, describe, exponential, headline, plain_json
from kvbench.stats import Array, Difference, compare_answers, compare_means

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1  # of a baseline file
Document = tuple[str, str, str, str, str]  # task, doc_id, filter, hash of the document, hash of the prompt


class NoSeriesError(ValueError):
    """A metric of which the samples hold no number a document; the message says why."""


@dataclass(frozen=True)
class Series:
    """One metric of one cell.

    values: [n], a number a document, as the metric's kind says. weights: [n], what each counts for, such as its tokens;
    None where all count alike.
    documents: [n] in the order of `values`; a baseline file has only their `digest`.
    """

    metric: Metric
    values: Array
    weights: Array | None
    digest: str
    documents: tuple[Document, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One measured cell. environment: processor and versions, without kvbench's own; series: by name of metric.

    absent: why a metric has no series. values: of all metrics, of records alone.
    """

    name: str
    model: str
    dtype: str
    rotation: str
    task: str
    identity: dict[str, Any]
    environment: str
    series: dict[str, Series]
    absent: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def scheme(self) -> tuple[str, str]:
        """dtype and rotation as the tables have them; "canary" and "again" are the controls."""
        return self.dtype, self.rotation

    @property
    def control(self) -> bool:
        """Whether this is the destroyed cache, or the baseline once more."""
        return self.dtype in ("canary", "again")

    @cached_property
    def key(self) -> str:
        """What it has in common with the cells that it may be compared with."""
        return key_of(self.identity)


def comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without what a comparison is about: the scheme, and that this is the A/A cell."""
    return {name: value for name, value in identity.items() if name not in ("scheme", "again")}


def key_of(identity: dict[str, Any]) -> str:
    """The same text for identities that may be compared."""
    return json.dumps(plain_json(comparable(identity)), sort_keys=True)


def prompt_forms(tasks: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A line that says which tasks of lm-eval got plain prompts and which a chat, if there are any.

    tasks: what tables call each, and its part of a cell's identity.
    """
    forms: dict[str, dict[str, None]] = {}
    for name, task in tasks:
        if "apply_chat_template" not in task:
            continue
        form = "in the model's chat template" if task["apply_chat_template"] else "plain"
        if task.get("fewshot_as_multiturn") is False:
            form += ", few-shot examples in one turn"
        if system := task.get("system_instruction"):
            form += f", after {json.dumps(system, ensure_ascii=False)}"
        forms.setdefault(form, {})[name] = None
    each = [f"{form} ({', '.join(names)})" if len(forms) > 1 else form for form, names in forms.items()]
    return [f"prompts of lm-eval's tasks: {'; '.join(each)}"] if each else []


@dataclass(frozen=True)
class Measured:
    """The cells of a run folder or of a baseline file, and what the sweep said of them."""

    path: Path
    cells: list[Cell]
    run: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> tuple[str, str] | None:
        """The scheme that the sweep compares with."""
        scheme = self.run.get("baseline")
        return (scheme["dtype"], scheme["rotation"]) if scheme else None

    @property
    def schemes(self) -> list[tuple[str, str]]:
        """Every measured scheme once, without the controls."""
        return list(dict.fromkeys(cell.scheme for cell in self.cells if not cell.control))

    @property
    def margin(self) -> str | None:
        """The margin that the sweep's YAML fixed."""
        margin: str | None = self.run.get("config", {}).get("margin")
        return margin

    def without(self, control: str) -> bool:
        """Whether a control, "canary" or "again", was turned off by name."""
        return self.run.get("config", {}).get(control) is False


def read(path: Path) -> Measured:
    """The cells of a run folder, or of a file that `write` wrote.

    Raises:
        FileNotFoundError: nothing is there.
        NotARunError: it holds no finished cell, or is no such file.
    """
    if path.is_dir():
        contents = Store(path).load()
        if not any(record.status == "done" for record in contents.records.values()):
            raise NotARunError(f"nothing to compare: {path} has no finished cell (kvbench sweep makes them)")
        return of_records(path, list(contents.records.values()), Store(path).run(), contents.problems)
    if not path.exists():
        raise FileNotFoundError(f"no run folder or baseline file {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["kvbench_baseline"] != VERSION:
            raise ValueError(f"version {data['kvbench_baseline']}, this kvbench reads version {VERSION}")
        cells = [_from_row(row, data["cells"][row["cell"]], data["environments"]) for row in data["metrics"]]
    except (ValueError, KeyError, TypeError) as error:
        raise NotARunError(
            f"{path} is no baseline file ({error}): kvbench check DIR --write {path} makes one"
        ) from None
    merged: dict[str, Cell] = {}
    for cell in cells:
        if cell.name in merged:
            merged[cell.name].series.update(cell.series)
        else:
            merged[cell.name] = cell
    return Measured(path, list(merged.values()), data["run"])


def of_records(folder: Path, records: Sequence[Record], run: dict[str, Any], problems: Sequence[str] = ()) -> Measured:
    """The cells of records in the sweep's order, with their samples read from the folder."""
    store = Store(folder)
    order = {name: place for place, name in enumerate(run.get("cells", []))}
    # what a kernel took is no number a document
    measured = [one for one in records if one.status == "done" and not one.kernel]
    done = sorted(measured, key=lambda one: order.get(one.cell, len(order)))
    return Measured(folder, [_cell(store, record) for record in done], run, [*problems])


def _cell(store: Store, record: Record) -> Cell:
    shown = headline(record.metrics)
    # numbers without a kind stand beside those that are compared, or alone, as speeds do
    wanted = [metric for metric in shown if metric.kind] or shown
    series: dict[str, Series] = {}
    absent: dict[str, str] = {}
    try:
        samples = store.samples(record.cell)
    except (OSError, ValueError) as error:
        absent = {metric.name: f"its samples cannot be read: {describe(error)}" for metric in wanted}
        wanted = []
    for metric in wanted:
        try:
            series[metric.name] = series_of(metric, samples)
        except NoSeriesError as error:
            absent[metric.name] = str(error)
    return Cell(
        record.cell,
        record.model["name"],
        record.dtype,
        record.rotation,
        record.task,
        record.identity,
        platform(record.environment),
        series,
        absent,
        {metric.name: metric.value for metric in shown},
    )


def series_of(metric: Metric, samples: pd.DataFrame) -> Series:
    """A metric's number a document, of which the mean (for a perplexity, its logarithm's) is the metric's value.

    Raises:
        NoSeriesError: the samples have no such numbers, or numbers that do not give the value.
    """
    lacking = {"doc_id", "doc_hash", "prompt_hash", "filter"} - set(samples.columns)
    if lacking:
        raise NoSeriesError(f"the samples lack {', '.join(sorted(lacking))}")
    leaf, _, name = metric.name.rpartition("/")
    name, _, filter_name = name.partition(",")
    name, _, context = name.partition("@")
    rows = samples[samples["filter"] == (filter_name or "none")]
    if leaf:
        rows = rows[rows["task"] == leaf]
    if context and "context" in rows:
        rows = rows[rows["context"] == int(context)]
    log = metric.kind == "log"
    column = f"{name}.logprob" if log and f"{name}.logprob" in rows else name
    if metric.kind is None or column not in rows or rows[column].dtype.kind not in "bif":
        raise NoSeriesError("the samples have no number a document")
    rows = rows.dropna(subset=[column])
    values = rows[column].to_numpy(float)
    if not values.size:
        raise NoSeriesError("the samples have no number a document")
    if metric.weight is not None and metric.weight not in rows:
        raise NoSeriesError(f"the samples lack {metric.weight}")
    weights: Array | None = rows[metric.weight].to_numpy(float) if metric.weight else None
    if column != name:  # of all its words or bytes together
        values = -values / weights
    elif log:  # of lm-eval's `perplexity` the samples have the log-likelihood, which is never above 0
        values = np.log(values) if (values > 0).all() else -values
    elif metric.kind == "share" and not ((values >= 0) & (values <= 1)).all():
        raise NoSeriesError(f"it is a share of 1, and a document has {values[(values < 0) | (values > 1)][0]:g}")
    if metric.higher_is_better is None:
        raise NoSeriesError("it is not said whether higher is better")
    if not np.isfinite(values).all():
        raise NoSeriesError("a document's number is not finite")
    whole = float(np.average(values, weights=weights))
    value = exponential(whole) if log else whole
    if not math.isclose(value, metric.value, rel_tol=1e-4, abs_tol=1e-9):
        raise NoSeriesError("it is no mean over documents: the samples' mean is not the metric's value")
    task = rows["task"] if "task" in rows else [""] * len(rows)
    columns = (task, rows["doc_id"], rows["filter"], rows["doc_hash"], rows["prompt_hash"])
    documents = [(str(a), str(b), str(c), str(d), str(e)) for a, b, c, d, e in zip(*columns, strict=True)]
    # 2 before 10
    order = sorted(range(len(documents)), key=lambda i: (documents[i][0], len(documents[i][1]), documents[i][1:]))
    documents = [documents[i] for i in order]
    if len({document[:3] for document in documents}) < len(documents):
        raise NoSeriesError("the samples have a document twice")
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]
    picked = None if weights is None else weights[order]
    return Series(metric, values[order], picked, digest, tuple(documents))


def paired(series: Series, base: Series) -> Difference:
    """How one metric changed over the same documents; a perplexity's is that of its logarithm."""
    difference: Array = series.values - base.values
    # a document that is asked twice is one document
    hashes = [document[3] for document in series.documents or base.documents] or None
    if series.metric.kind == "share":
        return compare_answers(difference, hashes)
    return compare_means(difference, hashes, series.weights)


def platform(environment: dict[str, Any]) -> str:
    """Processor and versions, in words."""
    gpus = [gpu["name"] for gpu in environment.get("gpus") or []]
    processor = gpus[0] if gpus and environment.get("device") != "cpu" else environment.get("cpu")
    versions = environment.get("versions") or {}
    software = [
        f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "lm_eval") if versions.get(name)
    ]
    return ", ".join([str(processor), *software])


# ---- a baseline file


def write(measured: Measured, path: Path) -> None:
    """Keeps the cells in one file, a line a metric; the controls are left out."""
    cells = [cell for cell in measured.cells if not cell.control]
    environments = list(dict.fromkeys(cell.environment for cell in cells))
    identities = {
        cell.name: {
            "model": cell.model,
            "dtype": cell.dtype,
            "rotation": cell.rotation,
            "task": cell.task,
            "identity": cell.identity,
            "environment": environments.index(cell.environment),
        }
        for cell in cells
    }
    rows = [row for cell in cells for row in _rows(cell)]
    run = {"baseline": measured.run.get("baseline"), "config": {"margin": measured.margin}}
    parts = [
        f'"kvbench_baseline": {VERSION}',
        f'"run": {json.dumps(run)}',
        f'"environments": {json.dumps(environments, indent=1)}',
        '"cells": {\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in identities.items())
        + "\n}",
        '"metrics": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]",
    ]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _rows(cell: Cell) -> Iterator[dict[str, Any]]:
    for series in cell.series.values():
        metric = series.metric
        whole = bool(np.isin(series.values, (0.0, 1.0)).all())
        values = "".join(f"{value:.0f}" for value in series.values)
        yield {
            "cell": cell.name,
            "metric": metric.name,
            "value": float(f"{metric.value:.6g}"),
            "n": metric.n,
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            "kind": metric.kind,
            "documents": series.digest,
            # right and wrong as one text
            "values": values if whole else [float(f"{value:.6g}") for value in series.values],
            **({} if series.weights is None else {"weights": [float(weight) for weight in series.weights]}),
        }


def _from_row(row: dict[str, Any], cell: dict[str, Any], environments: list[str]) -> Cell:
    metric = Metric(row["metric"], row["value"], None, row["n"], row["unit"], row["higher_is_better"], row["kind"])
    values = np.array([float(value) for value in row["values"]])
    weights = np.array(row["weights"]) if "weights" in row else None
    series = Series(metric, values, weights, row["documents"])
    return Cell(
        row["cell"],
        cell["model"],
        cell["dtype"],
        cell["rotation"],
        cell["task"],
        cell["identity"],
        environments[cell["environment"]],
        {metric.name: series},
    )
