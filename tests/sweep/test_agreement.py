"""The third control: a model under an exact cache is compared with the model itself, before its first cell."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvbench.report.tables import Report
from kvbench.results import Store
from kvbench.runners.model_files import RefusedError
from kvbench.sweep.command import Options, run_sweep
from kvbench.sweep.session import Timed
from kvbench.yaml_text import ConfigError

FOUND = {"largest": 3e-6, "noise": 1e-6, "tokens": 100, "unreached": (), "typical": 1e-6, "tolerance": 1e-3}


class Compared:
    """A comparison that counts, and refuses the models that it is told to."""

    def __init__(self, refused=()):
        self.asked = []
        self.refused = refused

    def __call__(self, model, page_size, attention):
        self.asked.append((model.info.name, page_size, attention))
        if model.info.name in self.refused:
            raise RefusedError(f"model {model.info.name}: with an exact cache this runner is not the model")
        return FOUND


@pytest.fixture
def run(toy, tmp_path):
    """A function: a sweep of the toy with a comparison; returns the run folder's records."""

    def sweep(compared, *settings, **changes):
        config = toy.write_config(tmp_path / "toys.yaml", **changes)
        options = Options(output=tmp_path / "run", settings=settings)
        run_sweep(config, options, replace(toy.PARTS, compare=compared))
        return Store(tmp_path / "run").load().records

    return sweep


def test_each_record_says_how_the_exact_cache_agrees(run, tmp_path):
    """It is asked once a model, not once a cell, and the report has a line of it."""
    compared = Compared()

    records = run(compared)

    assert compared.asked == [("toy", 16, "auto")]
    assert {record.facts["agreement"]["largest"] for record in records.values()} == {3e-6}
    (line,) = [one for one in Report.read(tmp_path / "run").summary() if one.startswith("exact cache = model")]
    assert line == (
        "exact cache = model: toy, float32: max |Δ log p| 3e-06 nats over 100 positions (transformers against itself: "
        "1e-06)"
    )


def test_what_the_run_folder_knows_is_not_asked_again(run, monkeypatch):
    """A later part of the same sweep takes over what a record says; under another code it asks anew."""
    compared = Compared()
    first = run(compared)
    run(compared, tasks=["toy_a", "toy_b", "toy_c"])
    assert len(compared.asked) == 1

    monkeypatch.setattr("kvbench.sweep.command.describe", lambda: {"source_sha256": "other"})
    records = run(compared, tasks=["toy_a", "toy_b", "toy_c", "toy_d"])
    assert len(compared.asked) == 2
    assert first.keys() < records.keys()


def test_a_model_that_is_not_itself_is_refused(run, tmp_path):
    """In one line, a mistake of the sweep; what other models measured is kept, and nothing of this one."""
    with pytest.raises(ConfigError, match=r"model other: .* is not the model; --skip model=NAME runs the rest"):
        run(Compared(refused=["other"]), model=None, models=["toy", "other"])

    records = Store(tmp_path / "run").load().records.values()
    assert {record.model["name"] for record in records} == {"toy"}
    with pytest.raises(ConfigError, match=r"model toy: .* is not the model$"):
        run(Compared(refused=["toy"]), "page_size=32", tasks=["toy_c"])


def test_it_is_turned_off_by_name(run, tmp_path):
    """The report says that it was; a run from before it was asked says nothing of it."""
    compared = Compared()

    records = run(compared, agreement=False)

    assert compared.asked == []
    assert not any("agreement" in record.facts for record in records.values())
    assert "agreement: turned off, so it was not tested that the exact cache is the model" in (
        Report.read(tmp_path / "run").summary()
    )
    run_json = tmp_path / "run/run.json"
    kept = json.loads(run_json.read_text())
    del kept["config"]["agreement"]
    run_json.write_text(json.dumps(kept))
    assert not any("exact cache" in line or "agreement" in line for line in Report.read(tmp_path / "run").summary())


def test_numbers_that_are_not_finite_fail_a_cell():
    """Neither a NaN nor an infinite log-likelihood becomes a score."""
    import torch

    from kvbench.runners.base import Score, ScoreRequest
    from kvbench.runners.toy import ToyRunner

    class Damaged(ToyRunner):
        def score(self, requests, progress=None):
            return [Score(torch.tensor([-1.0, value]), False) for value in (0.0, float("-inf"))]

        def log_probs(self, hidden):
            return torch.tensor([[0.0, float("nan")]])

    runner = Timed(Damaged())
    with pytest.raises(ValueError, match="a log-likelihood is not finite"):
        runner.score([ScoreRequest((1,), (2, 3))] * 2)
    with pytest.raises(ValueError, match="a log-likelihood is not finite"):
        runner.log_probs(torch.zeros(1, 16))
