"""A report shows what was measured, and nothing else."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from kvbench.render import render
from kvbench.report.tables import FIELDS, Report
from kvbench.results import Metric, NotARunError, Record, Store, name_of

BITS = {"fp16": 16.0, "int8_per_token_head": 8.5, "int4_per_token_head": 4.5, "canary": 16.0, "again": 16.0}
GSM8K = (
    Metric("exact_match,strict-match", 0.8908, 0.0086, 1319, "", True, "share"),
    Metric("exact_match,flexible-extract", 0.8969, 0.0084, 1319, "", True, "share"),
)
DIVERGENCE = (
    Metric("kld", 0.0031, 0.0002, 8, "nats", False, "distance"),
    Metric("kld_p99", 0.05, None, 8, "nats", False, headline=False),
    Metric("same_top", 98.4, 0.3, 8, "%", True, "distance"),
    Metric("ppl_ratio", math.inf, None, 8, "", False, "log"),
)


def record(
    dtype="fp16", rotation="none", task="gsm8k", metrics=GSM8K, status="done", limit=None, options=None, **changes
):
    model = {"name": changes.pop("model", "toy"), "revision": "r1", "compute_dtype": "float32"}
    identity = {
        "model": model,
        "scheme": {
            "dtype": "fp16" if dtype in ("canary", "again") else dtype.rsplit(" ")[-1],
            "rotation": rotation,
            "destroyed": dtype == "canary",
        },
        "task": {"task": task, **(options or {})},
        "scoring": changes.get("scoring", "fused"),
        "seed": 0,
        "limit": limit,
        **({"again": dtype == "again" or int(dtype.split()[1])} if dtype.startswith("again") else {}),
        **changes.pop("identity", {}),
    }
    fields = {
        "cell": name_of(f"{model['name']}-{dtype}-{rotation}-{task}", identity),
        "status": status,
        "identity": identity,
        "model": model,
        "dtype": dtype,
        "rotation": rotation,
        "task": task,
        "scoring": "fused",
        "bits_per_value": BITS[dtype.rsplit(" ")[-1]],
        "kv_bytes_per_token": BITS[dtype.rsplit(" ")[-1]] * 1536,
        "limit": limit,
        "metrics": metrics if status == "done" else (),
        "environment": {"cpu": "Toy CPU", "cores": 2, "versions": {"torch": "2.11"}, "kvbench": "0.1", "device": "cpu"},
        "error": None if status == "done" else "RuntimeError: no",
    }
    return Record(**{**fields, **changes})


@pytest.fixture
def report(tmp_path):
    def of(*records, **run):
        store = Store(tmp_path)
        for one in records:
            store.save(one, [{"doc_id": 0}])
        store.write_run({"sweep": "toys", **run})
        return Report.read(tmp_path)

    return of


def heads(table):
    return [" ".join(header.lines) for header in table.columns]


def test_the_table_that_the_caches_were_proposed_with(report):
    """
    GSM8K: a row a dtype, strict-match and flexible-extract with their standard errors, beside bits and sizes.
    """
    (table,) = report(record(), record("int4_per_token_head", "randomized_hadamard")).tables()

    assert heads(table) == [
        "dtype",
        "rotation",
        "bits/ value",
        "KV KiB/ token",
        "smaller than fp16",
        "gsm8k exact_match,strict-match n=1319",
        "gsm8k exact_match,flexible-extract n=1319",
    ]
    assert table.rows == [
        ["fp16", "none", "16.00", "24.0", "1.00 ×", "0.891 ± 0.009", "0.897 ± 0.008"],
        ["int4_per_token_head", "randomized_hadamard", "4.50", "6.8", "3.56 ×", "0.891 ± 0.009", "0.897 ± 0.008"],
    ]
    assert table.title == "toy · float32 · scoring fused"
    assert not table.warnings


def test_what_was_not_measured_is_a_dash(report):
    """
    A cell that failed, and one that was never run, are `-`; the failed one is named with its record.
    """
    failed = record("int8_per_token_head", task="divergence", status="failed")
    found = report(record(), record(task="divergence", metrics=DIVERGENCE), failed, record("int4_per_token_head"))

    (table,) = found.tables()

    assert heads(table)[5:] == [
        "divergence kld (nats) n=8",
        "divergence same_top n=8",
        "divergence ppl_ratio n=8",
        "gsm8k exact_match,strict-match n=1319",
        "gsm8k exact_match,flexible-extract n=1319",
    ]
    rows = {row[0]: row[5:] for row in table.rows}
    assert rows["fp16"] == ["0.0031 ± 0.0002", "98.4 ± 0.3 %", "inf", "0.891 ± 0.009", "0.897 ± 0.008"]
    assert rows["int8_per_token_head"] == ["-"] * 5
    assert rows["int4_per_token_head"] == ["-", "-", "-", "0.891 ± 0.009", "0.897 ± 0.008"]
    path = found.folder / "cells" / failed.cell / "record.json"
    assert f"failed: toy · int8_per_token_head · none · divergence: RuntimeError: no: {path}" in found.summary()
    assert path.is_file()


def test_the_json_is_one_list_a_row_a_metric(report):
    """
    Every metric of every cell is a row with the promised keys; a failed cell is one row without a number.
    """
    failed = record("int8_per_token_head", status="failed")
    rows = json.loads(render(report(record(task="divergence", metrics=DIVERGENCE), failed).document(), "json"))

    promised = "model dtype rotation task metric value stderr n bits_per_value kv_bytes_per_token scoring status"
    assert all(set(promised.split()) <= set(row) for row in rows)
    assert [(row["metric"], row["value"], row["status"]) for row in rows] == [
        ("kld", 0.0031, "done"),
        ("kld_p99", 0.05, "done"),
        ("same_top", 98.4, "done"),
        ("ppl_ratio", None, "done"),
        (None, None, "failed"),
    ]


def test_the_csv_has_the_rows_of_the_json(report):
    """
    CSV and JSON say the same; what is absent is empty.
    """
    found = report(record(), record("int8_per_token_head", status="failed"))

    rows = list(csv.DictReader(io.StringIO(render(found.document(), "csv"))))

    assert list(rows[0]) == list(FIELDS)
    assert rows == [
        {key: "" if value is None else str(value) for key, value in row.items()}
        for row in json.loads(render(found.document(), "json"))
    ]


def test_markdown_has_the_table_and_paths_from_itself(report):
    """
    The Markdown can be committed: a table that renders, the note, and no path of this machine.
    """
    found = report(record(), record("int8_per_token_head", status="failed"), note="A look.")

    text = render(found.document(), "md")

    assert text.startswith("# toys\n\nA look.\n\n## toy · float32 · scoring fused\n")
    assert "| fp16 | none | 16.00 | 24.0 | 1.00 × | 0.891 ± 0.009 | 0.897 ± 0.008 |\n" in text
    assert str(found.folder) not in text
    assert ": cells/toy-int8" in text


def test_a_quick_look_is_never_mistaken_for_a_score(report):
    """
    Cells under --limit have a table of their own, marked, after the real ones.
    """
    found = report(record(limit=5), record())

    real, quick = found.tables()

    assert not real.warnings
    assert quick.warnings == ["NOT A REAL SCORE: --limit 5, the first documents of each task alone"]
    assert "**NOT A REAL SCORE: --limit 5" in render(found.document(), "md")
    assert {row["limit"] for row in found.rows()} == {None, 5}
    assert all("task_limit" in row for row in found.rows())


def test_a_tasks_own_limit_is_noted(report):
    """
    A task that the configuration itself cuts short says so below the table.
    """
    (table,) = report(record(options={"limit": 100})).tables()

    assert "first documents only: gsm8k 100" in table.notes


def test_one_task_with_two_options_has_two_columns(report):
    """
    Cells of a task under different options never share a column.
    """
    (table,) = report(record(options={"num_fewshot": 0}), record(options={"num_fewshot": 5})).tables()

    assert (
        sorted(header.lines[0] for header in table.columns[5:])
        == ["gsm8k (num_fewshot=0)"] * 2 + ["gsm8k (num_fewshot=5)"] * 2
    )
    assert len(table.rows) == 1


def test_models_and_scoring_modes_have_tables_of_their_own(report):
    """
    Numbers of other models, precisions or scoring modes never stand in one table.
    """
    found = report(record(), record(model="other"), record(scoring="replay"))

    assert [table.title for table in found.tables()] == [
        "other · float32 · scoring fused",
        "toy · float32 · scoring fused",
        "toy · float32 · scoring replay",
    ]


def test_rows_stand_as_the_sweep_lists_them(report):
    """
    Schemes keep the sweep's order, not the alphabet's; what it does not list comes after, most bits first.
    """
    names = ["int4_per_token_head", "fp16", "int8_per_token_head"]
    cells = [record(name) for name in names]

    (table,) = report(*cells, schemes=[{"dtype": name, "rotation": "none"} for name in names]).tables()
    assert [row[0] for row in table.rows] == names
    (table,) = report(*cells).tables()
    assert [row[0] for row in table.rows] == ["fp16", "int8_per_token_head", "int4_per_token_head"]


def test_the_canary_is_no_row(report):
    """
    The zeroed cache is a line below the table, with its verdict, and in no list of results.
    """
    verdict = {"model": "toy", "task": "gsm8k", "limit": None, "verdict": "wrecked", "why": "acc 0.9 -> 0"}
    found = report(record(), record("canary"), canary=[verdict])

    assert [row[0] for row in found.tables()[0].rows] == ["fp16"]
    assert {row["dtype"] for row in found.rows()} == {"fp16"}
    assert any(line.startswith("canary (a zeroed cache) breaks the scores") for line in found.summary())
    assert any("turned off" in line for line in report(record(), canary=None).summary())


def test_verdicts_stand_beside_the_numbers(report):
    """
    Each row names what is WORSE and counts the rest; in CSV and JSON each number has its own verdict; an A/A cell is
    a row below what it repeats.
    """

    def measured(dtype, right):
        metric = Metric("acc", right / 200, 0.03, 200, "", True, "share")
        rows = [
            {"doc_id": i, "doc_hash": f"d{i}", "prompt_hash": f"p{i}", "filter": "none", "acc": float(i < right)}
            for i in range(200)
        ]
        return record(dtype, task="qa", metrics=(metric,)), rows

    repeats = [f"again {seed} of int4_per_token_head" for seed in (1, 2)]
    cells = [measured("int4_per_token_head", 100), measured("again", 150), measured("fp16", 150)]
    cells += [measured(repeat, 110) for repeat in reversed(repeats)]
    schemes = [{"dtype": dtype, "rotation": "none"} for dtype in ("fp16", "int4_per_token_head")]
    found = report(*(cell for cell, _ in cells), baseline=schemes[0], schemes=schemes)
    for cell, rows in cells:
        Store(found.folder).save(cell, rows)
    found = Report.read(found.folder)

    (table,) = found.tables()
    assert heads(table)[-1] == "verdict"
    assert [(row[0], row[-1]) for row in table.rows] == [
        ("fp16", "-"),
        ("again", "-"),
        ("int4_per_token_head", "WORSE acc"),
        *((repeat, "-") for repeat in repeats),
    ]
    assert [row["verdict"] for row in json.loads(render(found.document(), "json"))] == [None, None, "WORSE", None, None]
    assert "1 comparisons (Holm over all): 1 WORSE" in found.summary()
    assert any("qa acc 0 of 200 flipped" in line for line in found.summary())
    assert render(found.document(), "md").count("WORSE acc |") == 1


def test_cells_of_two_machines_are_marked(report):
    """
    A table whose cells were measured under other versions or processors says so.
    """
    other = {"cpu": "Other CPU", "versions": {"torch": "2.12"}, "device": "cpu"}

    (table,) = report(record(), record("int8_per_token_head", environment=other)).tables()

    assert any(warning.startswith("cells of 2 environments: ") for warning in table.warnings)


def test_a_broken_record_does_not_hide_the_others(report):
    """
    What can be read is reported, what can't is named.
    """
    found = report(record(), record("int8_per_token_head"))
    (found.folder / "cells" / record("int8_per_token_head").cell / "record.json").write_text("{")

    again = Report.read(found.folder)

    assert len(again.tables()[0].rows) == 1
    assert any("not a whole record" in line for line in again.summary())


def test_nothing_to_report_is_an_error(tmp_path):
    """
    A folder that is missing, no run, or empty is refused.
    """
    with pytest.raises(FileNotFoundError, match="no folder"):
        Report.read(tmp_path / "absent")
    with pytest.raises(NotARunError, match="is no run folder"):
        Report.read(tmp_path)
    (tmp_path / "cells").mkdir()
    with pytest.raises(NotARunError, match="has no finished cell"):
        Report.read(tmp_path)


def test_tokens_or_seconds_that_are_missing_are_a_dash(report):
    """
    A speed needs both; a record that lost one of them costs its own number and no traceback.
    """
    half = record("int4_per_token_head", timings={"seconds": 1.0, "prefill_seconds": 0.5})

    cost = report(half).tables()[1]

    assert cost.rows[0][5:] == ["-", "-", "1.0"]
