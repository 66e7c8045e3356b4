"""A metric says what it is: where it is measured, in a new record, and read from an old one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kvbench.measured import NoSeriesError, paired, series_of
from kvbench.results import LM_EVAL, Metric, Record, upgrade
from kvbench.tasks.divergence import _metrics
from kvbench.tasks.needle import _accuracy

RESULTS = Path(__file__).parents[2] / "results"


def samples(name, values, **columns):
    """A row a document, as a task keeps them."""
    rows = {"doc_id": range(len(values)), "doc_hash": [f"d{i}" for i in range(len(values))]}
    rows |= {"prompt_hash": rows["doc_hash"], "filter": ["none"] * len(values), name: values, **columns}
    return pa.table({key: list(column) for key, column in rows.items()})


def own(metric):
    return {name: getattr(metric, name) for name in ("kind", "weight", "when_zeroed", "headline")}


def test_an_old_divergence_is_read_as_a_new_one_is_written():
    """
    Each metric of `divergence` and `needle` is from version 1 what it says of itself: kind, weight, direction, room.
    """
    draw = np.random.default_rng(0)
    names = ("kld", "delta_p", "same_top", "nll", "nll_baseline")
    found = [*_metrics([{name: draw.random(5) for name in names} for _ in range(3)]), _accuracy("acc@1024", [0.0, 1.0])]

    for metric in found:
        row = {name: getattr(metric, name) for name in ("name", "value", "stderr", "n", "unit", "higher_is_better")}
        assert own(Metric(**upgrade([row])[0])) == own(metric), metric.name


def test_what_was_committed_reads_as_version_2():
    """
    Every committed record is read, keeps its numbers, and is written again as version 2, which reads the same.
    """
    paths = sorted(RESULTS.glob("*/cells/*/record.json"))
    assert len(paths) > 300
    for path in paths:
        row = json.loads(path.read_text())
        row.pop("sha256", None)  # the store's
        record = Record.from_json(row)
        assert [(m.name, m.n, m.unit) for m in record.metrics] == [
            (m["name"], m["n"], m["unit"]) for m in row["metrics"]
        ]
        assert record.to_json()["version"] == 2
        assert Record.from_json(record.to_json()) == record


def test_what_a_metric_is_does_not_hang_on_a_cells_values():
    """
    An F1 of 0 to 100 that falls to 0 everywhere is a mean that fell by 50, not a share that fell by 5000 points.
    """
    n = 40
    f1 = Metric(
        **upgrade([{"name": "f1", "value": 50.0, "stderr": 1.0, "n": n, "unit": "", "higher_is_better": True}])[0]
    )
    fallen = Metric(**{**f1.__dict__, "value": 0.0})
    values = np.where(np.arange(n) % 2, 100.0, 0.0)

    here, there = series_of(fallen, samples("f1", np.zeros(n))), series_of(f1, samples("f1", values))

    assert (here.metric.kind, there.metric.kind) == ("mean", "mean")
    assert paired(here, there).mean == -50
    assert paired(here, there).test == "paired t"


@pytest.mark.parametrize(("higher", "kind"), [(True, "share"), (False, "share")])
def test_a_share_is_one_in_either_direction(higher, kind):
    """
    Right or wrong is tested by McNemar's, also where fewer are better; 2 of 2 shows nothing.
    """
    metric = Metric("toxic", 1.0, None, 2, "", higher, kind)
    before = Metric("toxic", 0.0, None, 2, "", higher, kind)

    found = paired(series_of(metric, samples("toxic", [1.0, 1.0])), series_of(before, samples("toxic", [0.0, 0.0])))

    assert (found.test, found.p) == ("McNemar", 0.5)
    assert found.ci_low < 0


def test_a_share_beyond_1_is_refused():
    """
    A document with 55 is no share: the metric is not compared, and it is said why.
    """
    with pytest.raises(NoSeriesError, match="it is a share of 1, and a document has 55"):
        series_of(Metric("acc", 27.5, None, 2, "", True, "share"), samples("acc", [0.0, 55.0]))


def test_a_perplexity_beyond_every_float_is_infinite():
    """
    Documents of 800 nats a word have a logarithm, whose exponential is infinite: no error, and a difference.
    """
    log = Metric("perplexity", np.inf, None, 2, "ppl", False, "log")
    before = Metric("perplexity", np.exp(1.5), None, 2, "ppl", False, "log")

    here, there = (
        series_of(log, samples("perplexity", [-800.0, -900.0])),
        series_of(before, samples("perplexity", [-1.0, -2.0])),
    )

    assert paired(here, there).mean == pytest.approx(848.5)


def test_weights_come_from_the_column_that_the_metric_names():
    """
    A word perplexity is a mean over words; where the samples lack the column it is not compared.
    """
    metric = Metric(
        "word_perplexity",
        float(np.exp(12 / 9)),
        None,
        2,
        "ppl",
        False,
        **{k: v for k, v in LM_EVAL["word_perplexity"].items() if k != "unit"},
    )
    columns = {"word_perplexity.logprob": [-10.0, -2.0], "word_perplexity.weight": [5.0, 4.0]}

    assert series_of(metric, samples("word_perplexity", [np.exp(2), np.exp(0.5)], **columns)).weights.tolist() == [5, 4]
    with pytest.raises(NoSeriesError, match=r"the samples lack word_perplexity\.weight"):
        series_of(metric, samples("word_perplexity", [np.exp(2), np.exp(0.5)]))
