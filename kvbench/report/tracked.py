"""A run folder as trackers of experiments keep it, a run a scheme and model. Imports no torch."""

from __future__ import annotations

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvbench.files import write_text
from kvbench.render import all_renderers, render
from kvbench.report.by_scheme import Scheme, schemes_of
from kvbench.report.tables import Report
from kvbench.results import NotARunError, name_of, plain_json

ATTACHED = ("md", "csv")  # the formats of the report that each run holds


class TrackerError(RuntimeError):
    """A tracker that is not installed, or that does not take a run."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of one scheme of one model.

    params: the scheme's columns, what is known of them. metrics: `task/metric`, and its standard error as
    `task/metric_stderr`. verdicts: by `task/metric`. started, finished: in seconds since 1970.
    """

    name: str
    params: dict[str, str | int | float]
    metrics: dict[str, float]
    verdicts: dict[str, str]
    started: float
    finished: float

    @property
    def key(self) -> str:
        """The same for the same numbers, so that a tracker gets them once."""
        return name_of("kvbench", asdict(self))


def tracked_runs(report: Report) -> list[TrackedRun]:
    """A run for each scheme of each model, quick looks and other seeds apart, without the controls.

    Raises:
        NotARunError: there is no finished cell of a model.
    """
    schemes = schemes_of(record for record in report.records if record.scored)
    if not schemes:
        raise NotARunError(f"nothing to export: {report.folder} has no finished cell of a model")
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in report.rows():
        rows[row["cell"]].append(row)
    return [_tracked(report, scheme, rows) for scheme in schemes]


def _tracked(report: Report, scheme: Scheme, rows: dict[str, list[dict[str, Any]]]) -> TrackedRun:
    records = scheme.records
    first = records[0]
    metrics: dict[str, float] = {}
    verdicts: dict[str, str] = {}
    for record in records:
        for row in rows[record.cell]:
            if row["value"] is None:  # no metric, or an infinite value, which a chart has no place for
                continue
            name = metric_name(scheme.labels[record.cell], row["metric"])
            metrics[name] = row["value"]
            if row["stderr"] is not None:
                metrics[f"{name}_stderr"] = row["stderr"]
            if row["verdict"]:
                verdicts[name] = row["verdict"]
    baseline = report.run.get("baseline")
    params = {
        "sweep": report.run.get("sweep"),
        "model": first.model["name"],
        "revision": first.model.get("revision"),
        "compute_dtype": first.model.get("compute_dtype"),
        "dtype": first.dtype,
        "rotation": first.rotation,
        "scheme": json.dumps(plain_json(first.identity["scheme"])),
        "bits_per_value": first.bits_per_value,
        "kv_bytes_per_token": first.kv_bytes_per_token,
        "scoring": first.scoring,
        "seed": first.identity.get("seed"),
        "limit": first.limit,
        "baseline": f"{baseline['dtype']}/{baseline['rotation']}" if baseline else None,
        "kvbench": first.environment.get("kvbench"),
        "source_sha256": first.environment.get("source_sha256"),
    }
    ends = [(datetime.fromisoformat(record.finished).timestamp(), record) for record in records]
    return TrackedRun(
        " ".join(scheme.names),
        {key: value for key, value in params.items() if value is not None},
        metrics,
        verdicts,
        min(end - record.timings.get("seconds", 0.0) for end, record in ends),
        max(end for end, _ in ends),
    )


def metric_name(task: str, metric: str) -> str:
    """`task/metric` in the letters that every tracker takes: a comma of lm-eval's is a point."""
    return re.sub(r"[^\w./ -]+", "_", f"{task}/{metric}".replace(",", "."), flags=re.ASCII).strip("_")


@contextmanager
def report_files(report: Report) -> Iterator[list[Path]]:
    """The report as files for the length of the block."""
    document = report.document()
    with TemporaryDirectory() as place:
        paths = []
        for name in ATTACHED:
            path = Path(place) / f"report.{all_renderers()[name].ending}"
            write_text(path, render(document, name))
            paths.append(path)
        yield paths


def load(module: str) -> Any:
    """A tracker's package.

    Raises:
        TrackerError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrackerError(f"--to {module} needs {module} ({error}): pip install 'kvbench[{module}]'") from None
