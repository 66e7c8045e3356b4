"""`kvbench export --to mlflow|wandb`: what trackers are handed, and what the real ones then have."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest

from kvbench.report.tables import Report
from kvbench.report.tracked import metric_name, tracked_runs

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def run(tmp_path):
    """A copy of the committed quickstart."""
    shutil.copytree(RESULTS / "quickstart", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def int8():
    """What a tracker is told of the quickstart's int8."""
    return next(one for one in tracked_runs(Report.read(RESULTS / "quickstart")) if "int8" in one.name)


def test_a_run_a_scheme_has_the_records_numbers(int8):
    """
    The quickstart's nine schemes are nine runs without the controls; numbers, sizes and verdicts are the report's.
    """
    runs = tracked_runs(Report.read(RESULTS / "quickstart"))
    (cell,) = (RESULTS / "quickstart" / "cells").glob("*-int8_per_token_head-none-pydoc_cloze-*")
    record = json.loads((cell / "record.json").read_text(encoding="utf-8"))

    assert len({one.key for one in runs}) == len(runs) == 9
    for metric in record["metrics"]:
        assert int8.metrics[f"pydoc_cloze/{metric['name']}"] == metric["value"]
        assert int8.metrics[f"pydoc_cloze/{metric['name']}_stderr"] == metric["stderr"]
    assert int8.params["bits_per_value"] == record["bits_per_value"]
    assert (int8.params["dtype"], int8.params["baseline"]) == ("int8_per_token_head", "fp16/none")
    assert int8.verdicts["divergence/kld"] == "EQUIVALENT"
    assert "limit" not in int8.params
    assert int8.started < int8.finished


def test_a_metrics_name_has_letters_that_trackers_take():
    """
    A filter of lm-eval's and the options of a task stay readable.
    """
    assert metric_name("gsm8k", "exact_match,strict-match") == "gsm8k/exact_match.strict-match"
    assert metric_name("ruler (limit=5, seed=1)", "4096,none") == "ruler _limit_5. seed_1_/4096.none"


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(kvbench, run, monkeypatch, tracker):
    """
    Exit code 4 and one line that says what to install.
    """
    monkeypatch.setitem(sys.modules, tracker, None)

    result = kvbench("export", "run", "--to", tracker)

    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1
    assert f"pip install 'kvbench[{tracker}]'" in result.stderr


def test_mlflow_has_what_it_was_handed_once(kvbench, run, int8, monkeypatch):
    """
    Its own client finds the experiment, and a second export of the same numbers adds nothing.
    """
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    assert kvbench("export", "run", "--to", "mlflow").exit_code == 0
    assert "there before" in kvbench("export", "run", "--to", "mlflow").stdout
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    found = next(one for one in runs if "int8" in one.info.run_name)

    assert len(runs) == 9
    assert found.data.metrics == int8.metrics
    assert found.data.params == {name: str(value) for name, value in int8.params.items()}
    assert found.data.tags["verdict/divergence/kld"] == "EQUIVALENT"
    assert (found.info.status, found.info.end_time) == ("FINISHED", int8.finished * 1000)
    assert {file.path for file in client.list_artifacts(found.info.run_id, "report")} == {
        "report/report.md",
        "report/report.csv",
    }


def test_wandb_has_what_it_was_handed(kvbench, run, int8, monkeypatch):
    """
    Offline its transaction log, which `wandb sync` sends, holds name, group, configuration, numbers and the report.
    """
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")

    result = kvbench("export", "run", "--to", "wandb", "--output", "kept")
    (log,) = Path("kept/wandb").glob(f"offline-run-*/run-{int8.key.rpartition('-')[2]}.wandb")
    records = list(_records(log.read_bytes()))
    (started,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }

    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 9
    assert (started.display_name, started.run_group) == (int8.name, "quickstart")
    assert int8.params.items() <= config.items()
    assert int8.metrics.items() <= summary.items()
    assert summary["divergence/kld_verdict"] == "EQUIVALENT"
    requests = [record.request.log_artifact for record in records if record.request.HasField("log_artifact")]
    artifacts = [record.artifact for record in records if record.HasField("artifact")]
    artifacts += [request.artifact for request in requests]
    assert {entry.path for entry in artifacts[0].manifest.contents} == {"report.md", "report.csv"}


def _records(log: bytes):
    """The records of a file of wandb's: LevelDB's log format after a head of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, whole = 7, b""
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:  # no head fits into what is left of the block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""
