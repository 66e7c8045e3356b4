"""`kvbench check` fails on what is missing, not only on what is worse."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest

from kvbench.measured import read, write
from kvbench.report.gate import check
from kvbench.results import Metric, NotARunError, Record, Store, name_of

N = 40


def cell(dtype="int4", *, metric="acc", documents="d", task="qa", limit=None, seed=0, measured=True):
    """A record of a cell and its samples."""
    identity = {
        "version": 1,
        "model": {"name": "toy", "revision": "r1", "compute_dtype": "float32"},
        "scheme": {"dtype": dtype, "rotation": "none", "destroyed": False},
        "task": {"task": task},
        "scoring": "fused",
        "seed": seed,
        "limit": limit,
    }
    samples = [
        {"doc_id": i, "doc_hash": f"{documents}{i}", "prompt_hash": "p", "filter": "none", metric: float(i % 2)}
        for i in range(N)
    ]
    record = Record(
        cell=name_of(f"toy-{dtype}-none-{task}", identity),
        status="done",
        identity=identity,
        model=identity["model"],
        dtype=dtype,
        rotation="none",
        task=task,
        scoring="fused",
        bits_per_value=4.0,
        kv_bytes_per_token=1,
        limit=limit,
        metrics=(Metric(metric, 0.5, 0.1, N, "", True, "share"),) if measured else (),
    )
    return record, samples


@pytest.fixture
def run(tmp_path):
    """A run folder of fp16 and these cells."""

    def make(name, *cells):
        store = Store(tmp_path / name)
        for record, samples in (cell("fp16"), *cells):
            store.save(record, samples)
        store.write_run({"sweep": "toys", "baseline": {"dtype": "fp16", "rotation": "none"}, "config": {}})
        return tmp_path / name

    return make


def lose(folder):
    (path,) = (folder / "cells").glob("toy-int4-*")
    path.rename(folder / "gone")


def cut(folder):
    (path,) = (folder / "cells").glob("toy-int4-*/record.json")
    path.write_text(path.read_text()[:300])


def fail(folder):
    record, _ = cell()
    Store(folder).save(replace(record, status="failed", metrics=(), error="RuntimeError: no"), [])


# how the same cell is elsewhere, what is done to the folder, and why it fails
MISSING = {
    "gone": (cell(), lose, "toy int4 none qa: no finished cell here"),
    "unreadable": (cell(), cut, "not a whole record (Unterminated string"),
    "failed": (cell(), fail, "toy int4 none qa: no finished cell here"),
    "without metrics": (cell(measured=False), None, "toy int4 none qa acc: not measured here"),
    "a renamed metric": (cell(metric="accuracy"), None, "toy int4 none qa acc: not measured here"),
    "other documents": (cell(documents="e"), None, "toy int4 none qa acc: 40 of 40 documents differ"),
    "another limit": (cell(limit=5), None, "toy int4 none qa acc: limit 5 here, None in the baseline"),
    "another seed": (cell(seed=1), None, "toy int4 none qa acc: seed 1 here, 0 in the baseline"),
    "a renamed task": (cell(task="qa2"), None, "toy int4 none qa: no finished cell here"),
}


@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize(("here", "damage", "why"), MISSING.values(), ids=MISSING)
def test_what_the_baseline_has_and_is_missing_here_fails(run, tmp_path, here, damage, why, as_file):
    """
    Absent, renamed, refused or unreadable: one line that says why, though the other cell is equal.
    """
    before, after = run("before", cell()), run("after", here)
    if damage:
        damage(after)
    if as_file:
        write(read(before), tmp_path / "before.json")
        before = tmp_path / "before.json"

    found = check(read(after), read(before))

    (line,) = found.failed
    # a file has no documents, only a hash of them
    assert (why if "documents differ" not in why or not as_file else "other documents or prompts (40 here") in line
    assert found.compared == 1
    lenient = check(read(after), read(before), ["worse"])
    assert (lenient.failed, len(lenient.skipped)) == ([], 1 + len(found.skipped))


def test_what_is_unreadable_in_the_baseline_fails(run):
    """
    A gate against half a baseline is none.
    """
    before, after = run("before", cell()), run("after", cell())
    cut(before)

    (line,) = check(read(after), read(before)).failed

    assert line.startswith("in the baseline: ")
    assert "not a whole record" in line


@pytest.mark.parametrize("more", [cell("int8"), cell(seed=1), cell(task="qa2")], ids=["dtype", "seed", "task"])
def test_what_the_baseline_has_not_is_skipped_alone(run, more):
    """
    A run may have more cells than its baseline, of the same scheme and task too.
    """
    found = check(read(run("after", cell(), more)), read(run("before", cell())))

    assert (found.compared, found.failed, len(found.skipped)) == (2, [], 1)


def test_a_metric_without_numbers_a_document_must_be_there(run, tmp_path):
    """
    It is not compared, but a file of the baseline knows it, and its absence fails.
    """
    record, samples = cell()
    speed = Metric("speed", 3.0, None, 1, "tokens/s", True)
    before = run("before", (replace(record, metrics=(*record.metrics, speed)), samples))
    write(read(before), tmp_path / "before.json")

    for against in (before, tmp_path / "before.json"):
        assert check(read(before), read(against)).failed == []
        (line,) = check(read(run("after", cell())), read(against)).failed
        assert line == "toy int4 none qa speed: not measured here"


# ---- a baseline file


def test_a_cell_whose_metrics_are_lost_is_still_expected(run, tmp_path):
    """
    The file lists its cells apart from their metrics.
    """
    write(read(run("before", cell(measured=False))), tmp_path / "before.json")

    (line,) = check(read(run("after")), read(tmp_path / "before.json")).failed

    assert line == "toy int4 none qa: no finished cell here"


@pytest.mark.parametrize(
    ("content", "kind"), [("my thesis", "file"), ('{"a": 1}', "file"), ("[]", "file"), ("", "link"), ("", "fifo")]
)
def test_only_a_baseline_file_is_overwritten(run, tmp_path, content, kind):
    """
    What kvbench did not write stays as it is, a link with its target too.
    """
    path = tmp_path / "thesis.txt"
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_text(content)

    with pytest.raises(FileExistsError, match="it is no baseline file of kvbench"):
        write(read(run("before")), path)

    assert kind != "file" or path.read_text() == content
    assert not (tmp_path / "elsewhere").exists()
    assert not list(tmp_path.glob(".draft-*"))


def test_a_baseline_file_is_written_again(run, tmp_path):
    """
    In place of an earlier one, to the byte the same.
    """
    folder, path = run("before", cell()), tmp_path / "before.json"
    write(read(folder), path)
    before = path.read_text()

    write(read(folder), path)

    assert path.read_text() == before


BROKEN = {
    "no JSON": (lambda data: "{", "Expecting property name"),
    "a list": (lambda data: [], "expected a mapping, not []"),
    "another version": (lambda data: {**data, "kvbench_baseline": 9}, "version 9, this kvbench reads version 1"),
    "a value": (lambda data: changed(data, value=0.6), "its values' mean is 0.5, and its value 0.6"),
    "values": (lambda data: changed(data, values="x" * N), "could not convert string to float"),
    "no values": (lambda data: changed(data, values=""), "0 values and 40 documents"),
    "a number of values": (lambda data: changed(data, values=5), "'int' object is not iterable"),
    "a cell": (lambda data: changed(data, cell="other"), "no 'other'"),
    "no environment": (lambda data: {**data, "environments": []}, "list index out of range"),
    "an identity": (lambda data: {**data, "cells": {"a": next(iter(data["cells"].values()))}}, "cells.a: the hash of"),
}


def changed(data, **row):
    return {**data, "metrics": [{**data["metrics"][0], **row}]}


@pytest.mark.parametrize(("change", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_baseline_file_is_one_line(run, tmp_path, change, why):
    """
    It names the file, the reason, and how to make one.
    """
    path = tmp_path / "before.json"
    write(read(run("before")), path)
    unsigned = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    content = change(unsigned)
    path.write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(NotARunError) as error:
        read(path)

    assert "\n" not in str(error.value)
    assert f"{path} is no baseline file (" in str(error.value)
    assert why in str(error.value)
    assert "kvbench check DIR --write FILE makes one" in str(error.value)


def test_a_baseline_file_that_was_changed_is_refused(run, tmp_path):
    """
    Two answers that changed places leave every mean as it was: the file's checksum is another, and it is not believed.
    """
    path = tmp_path / "before.json"
    write(read(run("before")), path)
    data = json.loads(path.read_text())
    values = data["metrics"][0]["values"]
    data["metrics"][0]["values"] = values[::-1]
    assert values != values[::-1]
    path.write_text(json.dumps(data))

    with pytest.raises(NotARunError, match=r"before\.json is no baseline file \(it was changed after it was written"):
        read(path)


def test_a_lost_run_json_is_said(run):
    """
    It held the baseline and the margin: where it is gone, a line says so.
    """
    folder = run("before", cell())
    (folder / "run.json").unlink()

    assert read(folder).problems == [f"{folder / 'run.json'}: missing, which names the baseline and the margin"]


def test_a_cell_that_the_baseline_lost_is_named(run):
    """
    What its sweep planned and has no record of is a line, beside the cell that has nothing to be compared with.
    """
    before, after = run("before", cell()), run("after", cell())
    lost = cell()[0].cell
    for folder in (before, after):
        Store(folder).write_run({**Store(folder).run(), "cells": [path.name for path in (folder / "cells").iterdir()]})
    shutil.rmtree(before / "cells" / lost)

    found = check(read(after), read(before))

    assert f"not run, of the sweep's cells: {lost}" in found.notes
    assert len(found.skipped) == 1
