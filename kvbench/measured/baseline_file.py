"""A run's numbers in one text file for `kvbench check`, a line a metric, which a commit shows well."""

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from kvbench.files import read_json, write_text
from kvbench.measured.cells import Cell, Measured
from kvbench.measured.series import Series
from kvbench.results import Metric, NotARunError, describe, name_of
from kvbench.results.metrics import Kind, exponential
from kvbench.results.record import checksum, unsigned
from kvbench.results.shapes import Run, read_as

VERSION = 1  # of a baseline file


def write(measured: Measured, path: Path) -> None:
    """Keeps the cells in one file, a line a metric; the controls are left out.

    Raises:
        OSError: it can't be written, or something is there that is no such file.
    """
    if os.path.lexists(path) and not is_baseline(path):
        code = errno.EISDIR if path.is_dir() else errno.EEXIST
        words = os.strerror(code) if path.is_dir() else "it is no baseline file of kvbench, and stays as it is"
        raise OSError(code, words, str(path))
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
            # metrics without a number a document: they are not compared, but must be there
            **({"absent": others} if (others := _others(cell)) else {}),
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
    digest = checksum(json.loads("{" + ",".join(parts) + "}"))
    write_text(path, "{\n" + ",\n".join([*parts, f'"sha256": "{digest}"']) + "\n}\n")


def _others(cell: Cell) -> list[str]:
    return [name for name in {**cell.values, **cell.absent} if name not in cell.series]


def is_baseline(path: Path) -> bool:
    """Whether a file is one that `write` wrote."""
    try:
        data = read_json(path, follow=False)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "kvbench_baseline" in data


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


class FileCell(TypedDict):
    """A cell as a baseline file has it; environment: its place in the list of them."""

    model: str
    dtype: str
    rotation: str
    task: str
    identity: dict[str, Any]
    environment: int
    absent: NotRequired[list[str]]


class FileRow(TypedDict):
    """A metric of a cell; values: a number a document, right and wrong as one text."""

    cell: str
    metric: str
    value: float
    n: int
    unit: str
    higher_is_better: bool | None
    kind: NotRequired[Kind | None]
    documents: str
    values: Any
    weights: NotRequired[list[float]]


class BaselineFile(TypedDict):
    """A baseline file."""

    kvbench_baseline: int
    run: Run
    environments: list[str]
    cells: dict[str, FileCell]
    metrics: list[FileRow]


def _cell(name: str, row: FileCell, environments: list[str]) -> Cell:
    if not name.endswith(name_of("", row["identity"])):
        raise ValueError(f"cells.{name}: the hash of its identity is another")
    environment = environments[row["environment"]]
    absent = dict.fromkeys(row.get("absent", []), "the baseline file has no number a document")
    return Cell(
        name, row["model"], row["dtype"], row["rotation"], row["task"], row["identity"], environment, {}, absent
    )


def _series(row: FileRow) -> Series:
    metric = Metric(
        row["metric"], float(row["value"]), None, row["n"], row["unit"], row["higher_is_better"], row.get("kind")
    )
    values = np.array([float(value) for value in row["values"]])
    weights = np.array(row["weights"], float) if "weights" in row else None
    if not values.size or (weights is not None and len(weights) != len(values)):
        raise ValueError(f"{row['cell']} {metric.name}: {len(values)} values and {row['n']} documents")
    mean = float(np.average(values, weights=weights))
    whole = exponential(mean) if metric.kind == "log" else mean
    if not math.isclose(whole, metric.value, rel_tol=1e-3, abs_tol=1e-6):
        raise ValueError(
            f"{row['cell']} {metric.name}: its values' mean is {whole:.6g}, and its value {metric.value:g}"
        )
    return Series(metric, values, weights, row["documents"])


def read_file(path: Path) -> Measured:
    """The cells of a file that `write` wrote.

    Raises:
        NotARunError: it is no such file.
    """
    try:
        data: BaselineFile = read_as(BaselineFile, unsigned(read_json(path)))
        if data["kvbench_baseline"] != VERSION:
            raise ValueError(f"version {data['kvbench_baseline']}, this kvbench reads version {VERSION}")
        cells = {name: _cell(name, row, data["environments"]) for name, row in data["cells"].items()}
        for row in data["metrics"]:
            cells[row["cell"]].series[row["metric"]] = _series(row)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise NotARunError(
            f"{path} is no baseline file ({describe(error)}): kvbench check DIR --write FILE makes one"
        ) from None
    return Measured(path, list(cells.values()), dict(data["run"]))
