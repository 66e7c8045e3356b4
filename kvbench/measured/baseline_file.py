"""A run's numbers in one text file for `kvbench check`, a line a metric, which a commit shows well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.measured.cells import Cell, Measured
from kvbench.measured.series import Series
from kvbench.results import Metric, NotARunError

VERSION = 1  # of a baseline file


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


def read_file(path: Path) -> Measured:
    """The cells of a file that `write` wrote.

    Raises:
        NotARunError: it is no such file.
    """
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
