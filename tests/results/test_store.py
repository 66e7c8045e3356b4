"""Records are whole or absent, and come back as they were written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kvbench.results import Metric, Record, Store


def record(cell: str = "toy-1", status: str = "done", **changes) -> Record:
    fields = {
        "cell": cell,
        "status": status,
        "identity": {"seed": 0, "task": {"task": "toy"}},
        "model": {"name": "toy", "revision": "r1"},
        "dtype": "int4_per_token_head",
        "rotation": "hadamard",
        "task": "toy",
        "scoring": "fused",
        "bits_per_value": 4.5,
        "kv_bytes_per_token": 240,
        "metrics": (Metric("acc", 0.5, 0.1, 4, "", True),),
    }
    return Record(**{**fields, **changes})


SAMPLES = [{"doc_id": 0, "doc_hash": "a", "acc": 1.0}, {"doc_id": 1, "doc_hash": "b", "acc": 0.0}]


def test_a_record_comes_back_as_it_was(tmp_path):
    """
    A stored record equals the one that was saved, infinities and NaN included, and its JSON is strict.
    """
    metrics = (Metric("ppl", math.inf, None, 3, "ppl", False), Metric("acc", 0.25, math.inf, 3))
    before = record(metrics=metrics, facts={"a": math.nan, "b": (1, 2)})

    Store(tmp_path).save(before, SAMPLES)

    text = (tmp_path / "cells/toy-1/record.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    after = Store(tmp_path).read("toy-1")
    assert after.metrics == metrics
    assert after.facts == {"a": "nan", "b": [1, 2]}
    assert after.identity == before.identity


def test_samples_come_back_with_their_types(tmp_path):
    """
    Numbers, texts, truth values and lists of them keep their type; a column of mixed things becomes JSON text.
    """
    rows = [
        {"n": 1, "text": "a", "right": True, "logprobs": [-1.0, -2.5], "mixed": {"x": 1}, "late": None},
        {"n": 2.5, "text": "b", "right": False, "logprobs": [-3.0], "mixed": "y", "late": 7},
    ]

    Store(tmp_path).save(record(), rows)

    frame = Store(tmp_path).samples("toy-1")
    assert frame["n"].tolist() == [1.0, 2.5]
    assert frame["right"].tolist() == [True, False]
    assert [list(some) for some in frame["logprobs"]] == [[-1.0, -2.5], [-3.0]]
    assert frame["mixed"].tolist() == ['{"x": 1}', '"y"']
    assert math.isnan(frame["late"][0])


def test_a_draft_is_no_cell(tmp_path):
    """
    What a killed process left is not read, and the next writer sweeps it away; finished cells stay.
    """
    store = Store(tmp_path)
    store.save(record(), SAMPLES)
    (tmp_path / "cells/.draft-1").mkdir()
    (tmp_path / "cells/.draft-1/record.json").write_text("{")
    (tmp_path / ".draft-2").write_text("{")

    assert store.done() == {"toy-1"}
    with store.writing():
        assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == ["toy-1"]
        assert not (tmp_path / ".draft-2").exists()
    assert store.done() == {"toy-1"}


def break_json(cell: Path) -> None:
    (cell / "record.json").write_text((cell / "record.json").read_text()[:100])


def break_version(cell: Path) -> None:
    row = json.loads((cell / "record.json").read_text())
    (cell / "record.json").write_text(json.dumps({**row, "version": 99}))


def break_name(cell: Path) -> None:
    row = json.loads((cell / "record.json").read_text())
    (cell / "record.json").write_text(json.dumps({**row, "cell": "toy-9"}))


def break_field(cell: Path) -> None:
    row = json.loads((cell / "record.json").read_text())
    del row["metrics"]
    (cell / "record.json").write_text(json.dumps(row))


def break_list(cell: Path) -> None:
    (cell / "record.json").write_text("[]")


def break_record(cell: Path) -> None:
    (cell / "record.json").unlink()


def break_samples(cell: Path) -> None:
    content = (cell / "samples.parquet").read_bytes()
    (cell / "samples.parquet").write_bytes(content[: len(content) // 2])


def lose_samples(cell: Path) -> None:
    (cell / "samples.parquet").unlink()


BREAKS = [break_json, break_version, break_name, break_field, break_list, break_record, break_samples, lose_samples]


@pytest.mark.parametrize("damage", BREAKS)
def test_a_broken_cell_costs_one_line_and_itself(tmp_path, damage):
    """
    A broken cell is named in one line and counts as not done; others are read. Run again, its files are kept.
    """
    store = Store(tmp_path)
    store.save(record("toy-1"), SAMPLES)
    store.save(record("toy-2"), SAMPLES)
    damage(tmp_path / "cells/toy-1")

    contents = store.load()

    assert list(contents.records) == ["toy-2"]
    assert len(contents.problems) == 1
    assert "toy-1: not a whole record (" in contents.problems[0]
    assert "\n" not in contents.problems[0]

    store.save(record("toy-1"), SAMPLES)

    assert store.done() == {"toy-1", "toy-2"}
    assert (tmp_path / "cells/.broken-1-toy-1").is_dir()


def test_a_failed_cell_is_replaced_by_its_retry(tmp_path):
    """
    A record takes the place of an earlier one of its cell, and leaves nothing of it.
    """
    store = Store(tmp_path)
    store.save(record(status="failed", metrics=(), error="RuntimeError: no", traceback="Traceback…"), [])
    assert store.done() == set()

    store.save(record(), SAMPLES)

    assert store.done() == {"toy-1"}
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["toy-1"]


def test_two_sweeps_do_not_write_to_one_folder(tmp_path):
    """
    The second writer is refused at once; after the first is gone the folder is free.
    """
    with Store(tmp_path).writing(), pytest.raises(BlockingIOError), Store(tmp_path).writing():
        pass
    with Store(tmp_path).writing():
        pass


def test_the_baseline_is_computed_once(tmp_path):
    """
    Tensors kept under an identity are read from then on, by another store too; another identity has its own.
    """
    calls = []

    def compute(value: float):
        calls.append(value)
        return {"hidden": torch.full((2, 3), value).T}

    first = Store(tmp_path).baseline({"key": "a"}, "toy-a", lambda: compute(1.0))
    again = Store(tmp_path).baseline({"key": "a"}, "toy-a", lambda: compute(2.0))
    other = Store(tmp_path).baseline({"key": "b"}, "toy-a", lambda: compute(3.0))

    assert calls == [1.0, 3.0]
    assert torch.equal(first["hidden"], again["hidden"])
    assert other["hidden"][0, 0] == 3.0


def test_a_broken_baseline_is_computed_again(tmp_path):
    """
    A file cut short is no baseline.
    """
    store = Store(tmp_path)
    store.baseline({"key": "a"}, "toy", lambda: {"x": torch.ones(100)})
    (file,) = (tmp_path / "baseline").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:150])

    assert torch.equal(store.baseline({"key": "a"}, "toy", lambda: {"x": torch.zeros(100)})["x"], torch.zeros(100))


def test_removing_leaves_what_is_not_the_sweeps(tmp_path):
    """
    Starting over forgets cells, baselines and reports, and no other file.
    """
    store = Store(tmp_path)
    store.save(record(), SAMPLES)
    store.baseline({"key": "a"}, "toy", lambda: {"x": torch.ones(1)})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.md").write_text("old")

    store.remove()

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
