"""A run folder in Weights & Biases, a run a scheme and model. Imports no torch, and wandb when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvbench.report.tables import Report
from kvbench.report.tracked import TrackedRun, TrackerError, load, report_files, tracked_runs

TAG = 64  # letters of a tag at most


def export(folder: Path, place: Path | None) -> list[str]:
    """Writes a run for each scheme into the group of the sweep's name; returns a line for each.

    place: wandb keeps its files in `wandb/` there; None for the run folder. WANDB_MODE=offline writes only there, and
    WANDB_PROJECT names another project than kvbench. The same numbers have the same run id.

    Raises:
        FileNotFoundError, NotARunError: no run folder, or none with a finished cell of a model.
        TrackerError: wandb is not installed, or refuses.
    """
    report = Report.read(folder)
    runs = tracked_runs(report)
    wandb = load("wandb")
    local = place or folder
    local.mkdir(parents=True, exist_ok=True)
    group = report.run.get("sweep") or folder.resolve().name
    try:
        with report_files(report) as files:
            return [_line(wandb, group, local, run, files) for run in runs]
    except wandb.errors.Error as error:
        raise TrackerError(f"wandb: {' '.join(str(error).split())[:300]}") from None


def _line(wandb: Any, group: str, place: Path, run: TrackedRun, files: list[Path]) -> str:
    """Writes one run; returns where it is."""
    # nothing of the machine that exports, which measured nothing
    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    made = wandb.init(
        project=quiet.project or "kvbench",
        group=group,
        name=run.name,
        id=run.key.rpartition("-")[2],
        dir=str(place),
        tags=[str(run.params[name])[:TAG] for name in ("model", "dtype", "rotation")],
        config={**run.params, "started": run.started, "finished": run.finished},
        settings=quiet,
    )
    made.summary.update({**run.metrics, **{f"{name}_verdict": verdict for name, verdict in run.verdicts.items()}})
    report = wandb.Artifact(f"{group}-report", "report")
    for file in files:
        report.add_file(str(file))
    made.log_artifact(report)
    where = str(Path(made.dir).parent) if made.offline else made.url
    made.finish()
    return f"{where}  {run.name}"
