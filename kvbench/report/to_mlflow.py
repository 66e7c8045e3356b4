"""A run folder in MLflow, a run a scheme and model. Imports no torch, and MLflow when it is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvbench.report.tables import Report
from kvbench.report.tracked import TrackedRun, TrackerError, load, report_files, tracked_runs

KEY = "kvbench.key"  # the tag by which a run that is there is known
BATCH = 100  # parameters or tags at once, as its server takes them; of metrics 1000


def export(folder: Path, place: Path | None) -> list[str]:
    """Writes a run for each scheme into the experiment of the sweep's name; returns a line for each, and where.

    place: a tracking folder; None for the server or folder of MLFLOW_TRACKING_URI, else `mlflow/` in the run folder.
    Numbers that are there are not written again.

    Raises:
        FileNotFoundError, NotARunError: no run folder, or none with a finished cell of a model.
        TrackerError: MLflow is not installed, or refuses.
    """
    report = Report.read(folder)
    runs = tracked_runs(report)
    mlflow = load("mlflow")
    given = None if place else os.environ.get("MLFLOW_TRACKING_URI")
    local = (place or folder / "mlflow").resolve()
    if not given:
        local.mkdir(parents=True, exist_ok=True)
    uri = given or f"sqlite:///{local / 'mlflow.db'}"
    name = report.run.get("sweep") or folder.resolve().name
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(name)
        artifacts = None if given else (local / "artifacts").as_uri()
        experiment = known.experiment_id if known else client.create_experiment(name, artifact_location=artifacts)
        with report_files(report) as files:
            lines = [_line(mlflow, client, experiment, run, files) for run in runs]
    except mlflow.exceptions.MlflowException as error:
        raise TrackerError(f"MLflow at {uri}: {' '.join(str(error).split())[:300]}") from None
    view = given or f"mlflow ui --backend-store-uri {uri}"
    return [*lines, f"experiment {name}: {view}"]


def _line(mlflow: Any, client: Any, experiment: str, run: TrackedRun, files: list[Path]) -> str:
    """Writes one run, unless it is there; returns what was done."""
    if there := client.search_runs([experiment], f"tags.`{KEY}` = '{run.key}'", max_results=1):
        return f"{there[0].info.run_id}  {run.name} (there before)"
    started, finished = int(run.started * 1000), int(run.finished * 1000)
    made = client.create_run(experiment, start_time=started, run_name=run.name).info.run_id
    entities = mlflow.entities
    params = [entities.Param(name, str(value)) for name, value in run.params.items()]
    metrics = [entities.Metric(name, value, finished, 0) for name, value in run.metrics.items()]
    shown = {name: str(run.params[name]) for name in ("model", "dtype", "rotation")}
    shown |= {f"verdict/{name}": verdict for name, verdict in run.verdicts.items()}
    tags = [entities.RunTag(name, value) for name, value in shown.items()]
    client.log_batch(made, params=params)
    for start in range(0, len(tags), BATCH):
        client.log_batch(made, tags=tags[start : start + BATCH])
    for start in range(0, len(metrics), 10 * BATCH):
        client.log_batch(made, metrics=metrics[start : start + 10 * BATCH])
    for file in files:
        client.log_artifact(made, str(file), "report")
    client.set_tag(made, KEY, run.key)  # last: one that was cut off is written again
    client.set_terminated(made, "FINISHED", finished)
    return f"{made}  {run.name}"
