"""Records are whole or absent, and come back as they were written."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.results import Metric, Record, Store, name_of
from kvbench.results.record import checksum


def record(task: str = "toy", status: str = "done", **changes) -> Record:
    """The record of a cell; with `identity`, its name is another one's."""
    identity = {
        "version": 1,
        "model": {"name": "toy", "revision": "r1", "compute_dtype": "float32"},
        "scheme": {"dtype": "int4_per_token_head", "rotation": "hadamard", "destroyed": False},
        "task": {"task": task},
        "scoring": "fused",
        "seed": 0,
        "limit": None,
    }
    fields = {
        "cell": name_of(f"toy-int4_per_token_head-hadamard-{task}", identity),
        "status": status,
        "identity": identity,
        "model": identity["model"],
        "dtype": "int4_per_token_head",
        "rotation": "hadamard",
        "task": task,
        "scoring": "fused",
        "bits_per_value": 4.5,
        "kv_bytes_per_token": 240,
        "metrics": (Metric("acc", 0.5, 0.1, 4, "", True),) if status == "done" else (),
    }
    return Record(**{**fields, **changes})


RESULTS = Path(__file__).parents[2] / "results"
ONE, TWO = record("one").cell, record("two").cell
SAMPLES = [{"doc_id": 0, "doc_hash": "a", "acc": 1.0}, {"doc_id": 1, "doc_hash": "b", "acc": 0.0}]


def test_a_record_comes_back_as_it_was(tmp_path):
    """
    A stored record equals the one that was saved, infinities and NaN included, and its JSON is strict.
    """
    metrics = (Metric("ppl", math.inf, None, 3, "ppl", False), Metric("acc", 0.25, math.inf, 3))
    before = record("one", metrics=metrics, facts={"a": math.nan, "b": (1, 2)})

    Store(tmp_path).save(before, SAMPLES)

    text = (tmp_path / "cells" / ONE / "record.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    after = Store(tmp_path).read(ONE)
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

    Store(tmp_path).save(record("one"), rows)

    frame = Store(tmp_path).samples(ONE)
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
    store.save(record("one"), SAMPLES)
    (tmp_path / "cells/.draft-1").mkdir()
    (tmp_path / "cells/.draft-1/record.json").write_text("{")
    (tmp_path / ".draft-2").write_text("{")

    assert store.done() == {ONE}
    with store.writing():
        assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == [ONE]
        assert not (tmp_path / ".draft-2").exists()
    assert store.done() == {ONE}


def rewrite(cell: Path, change: Callable[[dict[str, Any]], None], signed: bool = True) -> None:
    """Another record.json, with its checksum where it is signed: what a damage of today's disk can't make."""
    path = cell / "record.json"
    row = json.loads(path.read_text())
    del row["sha256"]["record"]
    sums = row.pop("sha256")
    change(row)
    row["sha256"] = {**sums, "record": checksum(row)} if signed else {**sums, "record": "0" * 64}
    path.write_text(json.dumps(row))


def set_to(*path: str | int, value: object) -> Callable[[Path], None]:
    """A damage: one value of the record is another."""

    def damage(cell: Path) -> None:
        def change(row: Any) -> None:
            for key in path[:-1]:
                row = row[key]
            row[path[-1]] = value

        rewrite(cell, change)

    return damage


def lose(*path: str) -> Callable[[Path], None]:
    def damage(cell: Path) -> None:
        def change(row: Any) -> None:
            for key in path[:-1]:
                row = row[key]
            del row[path[-1]]

        rewrite(cell, change)

    return damage


def cut_record(cell: Path) -> None:
    (cell / "record.json").write_text((cell / "record.json").read_text()[:100])


def cut_samples(cell: Path) -> None:
    content = (cell / "samples.parquet").read_bytes()
    (cell / "samples.parquet").write_bytes(content[: len(content) // 2])


def flip_a_bit_of_the_samples(cell: Path) -> None:
    content = bytearray((cell / "samples.parquet").read_bytes())
    content[20] ^= 1
    (cell / "samples.parquet").write_bytes(content)


def change_a_digit(cell: Path) -> None:
    path = cell / "record.json"
    path.write_text(path.read_text().replace('"value": 0.5', '"value": 0.6'))


def fifo(name: str) -> Callable[[Path], None]:
    def damage(cell: Path) -> None:
        (cell / name).unlink()
        os.mkfifo(cell / name)

    return damage


def link(name: str) -> Callable[[Path], None]:
    def damage(cell: Path) -> None:
        elsewhere = cell.parents[1] / f"elsewhere {name}"
        (cell / name).rename(elsewhere)
        (cell / name).symlink_to(elsewhere)

    return damage


BREAKS = {
    "cut record": (cut_record, "Unterminated string"),
    "no record": (lambda cell: (cell / "record.json").unlink(), "no record.json"),
    "a list": (lambda cell: (cell / "record.json").write_text("[]"), "it is no mapping"),
    "not UTF-8": (lambda cell: (cell / "record.json").write_bytes(b"\xff{}"), "'utf-8' codec"),
    "too deep": (lambda cell: (cell / "record.json").write_text("[" * 100_000), "nested too deeply"),
    "half a surrogate": (set_to("facts", value={"a": "\ud800"}), "surrogates not allowed"),
    "another version": (set_to("version", value=99), "version 99 of the record"),
    "a digit changed": (change_a_digit, "record.json was changed after it was written"),
    "a sum of another": (lambda cell: rewrite(cell, lambda row: None, signed=False), "was changed after"),
    "metrics lost": (lose("metrics"), "metrics: expected a list, not None"),
    "metrics are text": (set_to("metrics", value="all good"), "metrics: expected a list, not 'all good'"),
    "a value is text": (set_to("metrics", 0, "value", value="x"), "metrics[0].value: expected a number, not 'x'"),
    "a status of its own": (set_to("status", value="fine"), "status: expected 'done' or 'failed', not 'fine'"),
    "a field too many": (set_to("mood", value=1), "mood: there is no such field"),
    "a model without a name": (lose("model", "name"), "model.name is missing"),
    "layers are no pairs": (set_to("model", "layers", value=[[1]]), "model.layers[0]: expected a list of 2"),
    "GPUs are text": (set_to("environment", value={"gpus": ["H100"]}), "environment.gpus[0]: expected a mapping"),
    "half an agreement": (set_to("facts", value={"agreement": {"key": "a"}}), "facts.agreement.largest is missing"),
    "a text that was learned": (
        set_to("facts", value={"learned": "all"}),
        "facts.learned: expected a mapping, not 'all'",
    ),
    "bytes beyond every float": (
        set_to("kv_bytes_per_token", value=10**400),
        "kv_bytes_per_token: expected a number, not 1000",
    ),
    "more bits than a float": (
        set_to("bits_per_value", value=1e308),
        "bits_per_value 1e+308: expected a number from 0 to 1099511627776",
    ),
    "less than no error": (set_to("metrics", 0, "stderr", value=-1), "stderr of acc -1.0: expected a number from 0 on"),
    "positions are text": (set_to("model", "max_length", value="8k"), "model.max_length: expected a whole number, not"),
    "extras are text": (set_to("model", "extra", value="all"), "model.extra: expected a mapping, not 'all'"),
    "documents beyond every float": (
        set_to("metrics", 0, "n", value=10**400),
        "metrics[0].n: expected a whole number, not 1000",
    ),
    "identity is a list": (set_to("identity", value=[]), "identity: expected a mapping, not []"),
    "a repeat of what": (set_to("identity", "again", value="yes"), "identity.again: expected true or false, not 'yes'"),
    # it proves its name
    "another seed": (set_to("identity", "seed", value=1), "its name should end in -"),
    "another name": (set_to("cell", value="toy-9"), "its name should end in -"),
    "another model": (set_to("model", "name", value="other"), "model name 'other' where its identity has 'toy'"),
    "another revision": (set_to("model", "revision", value="r2"), "model revision 'r2' where its identity has 'r1'"),
    "another dtype": (set_to("dtype", value="fp16"), "dtype 'fp16' where its identity has 'int4_per_token_head'"),
    "no control": (set_to("dtype", value="canary"), "dtype 'canary' where its identity has 'int4_per_token_head'"),
    "another rotation": (set_to("rotation", value="none"), "rotation 'none' where its identity has 'hadamard'"),
    "another scoring": (set_to("scoring", value="replay"), "scoring 'replay' where its identity has 'fused'"),
    "a limit": (set_to("limit", value=5), "limit 5 where its identity has None"),
    "another task": (set_to("task", value="two"), "cell 'toy-int4_per_token_head-hadamard-one"),
    # it is what it seems
    "cut samples": (cut_samples, "samples.parquet is cut short"),
    "no samples": (lambda cell: (cell / "samples.parquet").unlink(), "samples.parquet is missing"),
    "another bit of the samples": (flip_a_bit_of_the_samples, "samples.parquet was changed after it was written"),
    "a FIFO for the record": (fifo("record.json"), "is a FIFO: expected a file"),
    "a FIFO for the samples": (fifo("samples.parquet"), "is a FIFO: expected a file"),
    "a link for the record": (link("record.json"), "is a symbolic link: expected a file"),
    "a link for the samples": (link("samples.parquet"), "is a symbolic link: expected a file"),
}


@pytest.mark.parametrize(("damage", "why"), BREAKS.values(), ids=BREAKS)
def test_a_broken_cell_costs_one_line_and_itself(tmp_path, damage, why):
    """
    A broken cell is named in one line with the reason, and counts as not done; others are read. Run again, its files
    are kept.
    """
    store = Store(tmp_path)
    store.save(record("one"), SAMPLES)
    store.save(record("two"), SAMPLES)
    damage(tmp_path / "cells" / ONE)

    contents = store.load()

    assert list(contents.records) == [TWO]
    assert len(contents.problems) == 1
    assert f"{ONE}: not a whole record (" in contents.problems[0]
    assert "\n" not in contents.problems[0]
    assert why in contents.problems[0]

    store.save(record("one"), SAMPLES)

    assert store.done() == {ONE, TWO}
    assert (tmp_path / f"cells/.broken-1-{ONE}").is_dir()


@pytest.mark.parametrize(
    ("again", "dtype"),
    [(True, "again"), (1, "again 1 of int4_per_token_head"), (2, "again 2 of int4_per_token_head")],
)
def test_a_repeat_is_called_what_it_repeats(tmp_path, again, dtype):
    """
    That it is the baseline once more, or under which noise a scheme is, stands in the identity and in the label alike.
    """
    identity = {**record("one").identity, "again": again}
    named = {"identity": identity, "dtype": dtype, "cell": name_of(f"toy-{dtype}-hadamard-one", identity)}
    store = Store(tmp_path)

    store.save(record("one", **named), SAMPLES)

    (found,) = store.load().records.values()
    assert found.again
    assert found.identity["again"] is again
    with pytest.raises(ValueError, match=f"where its identity has '{dtype}'"):
        store.save(record("one", **{**named, "dtype": "int4_per_token_head"}), SAMPLES)


def test_a_failed_cell_is_replaced_by_its_retry(tmp_path):
    """
    A record takes the place of an earlier one of its cell, and leaves nothing of it.
    """
    store = Store(tmp_path)
    store.save(record("one", "failed", error="RuntimeError: no", traceback="Traceback…"), [])
    assert store.done() == set()

    store.save(record("one"), SAMPLES)

    assert store.done() == {ONE}
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [ONE]


def test_what_another_machine_has_open_costs_no_record(tmp_path, monkeypatch):
    """
    On NFS a folder with an open file can't be removed: a retry takes its place all the same, and a later writer sweeps
    what is left of it.
    """
    store = Store(tmp_path)
    store.save(record("one", "failed", error="RuntimeError: no", traceback="Traceback…"), [])

    def not_empty(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", not_empty)
        with store.writing():
            store.save(record("one"), SAMPLES)
        with store.writing():
            assert store.done() == {ONE}
    assert len(list((tmp_path / "cells").iterdir())) == 2
    with store.writing():
        assert [path.name for path in (tmp_path / "cells").iterdir()] == [ONE]


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


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:150])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def without_a_checksum(file: Path) -> None:
    file.with_suffix(".sha256").unlink()


def a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_link(file: Path) -> None:
    elsewhere = file.parents[1] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BASELINE_BREAKS = {
    cut: "its checksum is another",
    flip_a_bit: "its checksum is another",
    without_a_checksum: "it has no checksum",
    a_fifo: "is a FIFO",
    a_link: "is a symbolic link",
    a_folder: "is a folder",
}


@pytest.mark.parametrize(("damage", "why"), BASELINE_BREAKS.items(), ids=[one.__name__ for one in BASELINE_BREAKS])
def test_a_damaged_baseline_is_computed_again(tmp_path, caplog, damage, why):
    """
    A file that was cut or changed, or is none, is named in one line and computed again; then it is read.
    """
    store = Store(tmp_path)
    store.baseline({"key": "a"}, "toy", lambda: {"x": torch.ones(100)})
    (file,) = (tmp_path / "baseline").glob("*.safetensors")
    damage(file)

    assert torch.equal(store.baseline({"key": "a"}, "toy", lambda: {"x": torch.zeros(100)})["x"], torch.zeros(100))
    assert torch.equal(store.baseline({"key": "a"}, "toy", lambda: pytest.fail("twice"))["x"], torch.zeros(100))
    (line,) = caplog.messages
    assert line.startswith(f"{file}: damaged (")
    assert why in line
    assert "computed again" in line


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(1.5), torch.zeros(0), torch.ones(2, 3).T, torch.ones(3, dtype=torch.bfloat16), torch.tensor([True])],
    ids=str,
)
def test_every_kind_of_tensor_has_a_checksum(tmp_path, tensor):
    """
    Scalars, empty ones, transposed ones, 16-bit ones and truth values come back as they were.
    """
    Store(tmp_path).baseline({"key": "a"}, "toy", lambda: {"x": tensor})

    again = Store(tmp_path).baseline({"key": "a"}, "toy", lambda: pytest.fail("computed again"))

    assert torch.equal(again["x"], tensor)
    assert again["x"].dtype == tensor.dtype


# ---- symbolic links


@pytest.fixture
def treasure(tmp_path):
    """A folder outside of the run folder, which nothing may touch."""
    folder = tmp_path / "treasure"
    folder.mkdir()
    (folder / "map.txt").write_text("x marks the spot")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["map.txt"]
    assert (folder / "map.txt").read_text() == "x marks the spot"


def test_a_draft_that_is_a_link_is_swept_away(tmp_path, treasure):
    """
    The link goes and its target stays; the folder can be written to again.
    """
    store = Store(tmp_path / "run")
    store.save(record("one"), SAMPLES)
    for number, target in enumerate((treasure, treasure / "map.txt", tmp_path / "nothing")):
        (store.cells / f".draft-{number}").symlink_to(target)

    with store.writing():
        assert [path.name for path in store.cells.iterdir()] == [ONE]


@pytest.mark.parametrize("target", ["treasure/map.txt", "treasure", "nothing", "no/folder", "/dev/null"])
def test_a_lock_that_is_a_link_locks_no_folder_for_good(tmp_path, treasure, target):
    """
    It is set aside, its target is neither emptied nor made, and the second writer is refused as ever.
    """
    store = Store(tmp_path / "run")
    store.folder.mkdir()
    (store.folder / ".lock").symlink_to(tmp_path / target)

    with store.writing(), pytest.raises(BlockingIOError), store.writing():
        pass

    assert (store.folder / ".lock").is_file()
    assert not (store.folder / ".lock").is_symlink()
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "FIFO"])
def test_a_lock_that_is_no_file_is_set_aside(tmp_path, make):
    """
    Neither a folder nor a FIFO of that name keeps a run folder from being written to.
    """
    make(tmp_path / ".lock")

    with Store(tmp_path).writing():
        assert (tmp_path / ".lock").is_file()
        assert (tmp_path / ".broken-1-.lock").exists()


@pytest.mark.parametrize("name", ["cells", "baseline"])
def test_a_link_in_place_of_a_folder_of_ours_is_refused(tmp_path, treasure, name):
    """
    What would write elsewhere is no place for a run, and is not read.
    """
    store = Store(tmp_path / "run")
    store.folder.mkdir()
    (store.folder / name).symlink_to(treasure)

    assert store.foreign == f"has a symbolic link for its {name}/, and would write elsewhere: move that away"
    assert not store.load().records
    assert len(store.load().problems) == (name == "cells")


def test_a_cell_that_is_a_link_is_no_record_and_is_replaced(tmp_path, treasure):
    """
    It is named in one line; saving the cell sets the link aside.
    """
    store, other = Store(tmp_path / "run"), Store(tmp_path / "other")
    other.save(record("one"), SAMPLES)
    store.save(record("two"), SAMPLES)
    (store.cells / ONE).symlink_to(other.cells / ONE)

    (problem,) = store.load().problems
    assert f"{ONE}: not a whole record (it is a symbolic link, which is not followed)" in problem
    store.save(record("one"), SAMPLES)

    assert store.done() == {ONE, TWO}
    assert other.done() == {ONE}
    assert (store.cells / f".broken-1-{ONE}").is_symlink()


@pytest.mark.parametrize("cells", [None, [ONE]])
def test_starting_over_follows_no_link(tmp_path, treasure, cells):
    """
    Cells, baselines and reports that are links are forgotten; what they point to stays, and no draft is left.
    """
    store = Store(tmp_path / "run")
    store.folder.mkdir()
    if cells is None:
        store.cells.symlink_to(treasure)
    else:
        store.cells.mkdir()
        (store.cells / ONE).symlink_to(treasure)
    store.baselines.symlink_to(treasure)
    (store.folder / "report.md").symlink_to(treasure / "map.txt")

    store.remove(cells)

    assert [path.name for path in store.folder.iterdir()] == ([] if cells is None else ["cells"])


def test_run_json_takes_the_place_of_a_link(tmp_path, treasure):
    """
    It is renamed into its place: a link there is replaced, and its target not written to.
    """
    store = Store(tmp_path / "run")
    store.folder.mkdir()
    (store.folder / "run.json").symlink_to(treasure / "map.txt")

    store.write_run({"sweep": "toys"})

    assert store.run() == {"sweep": "toys"}


RUN_BREAKS = {
    "cut": ('{"sweep": "to', "Unterminated string"),
    "a list": ("[]", "expected a mapping, not []"),
    "a name that is a number": ('{"sweep": 5}', "sweep: expected text, not 5"),
    "cells that are text": ('{"cells": "all"}', "cells: expected a list, not 'all'"),
    "a baseline without a rotation": ('{"baseline": {"dtype": "fp16"}}', "baseline.rotation is missing"),
    "a verdict of its own": ('{"canary": [{"verdict": "fine"}]}', "canary[0].model is missing"),
    "a note that was changed": (f'{{"note": "x", "sha256": "{checksum({"note": "y"})}"}}', "its checksum is another"),
    "a margin that is a number": ('{"config": {"margin": 1}}', "config.margin: expected text, not 1"),
}


@pytest.mark.parametrize(("text", "why"), RUN_BREAKS.values(), ids=RUN_BREAKS)
def test_a_broken_run_json_is_a_line(tmp_path, text, why):
    """
    It counts as missing, and the line names the file and the place.
    """
    store = Store(tmp_path)
    store.save(record("one"), SAMPLES)
    (tmp_path / "run.json").write_text(text)

    (problem,) = store.load().problems
    assert problem.startswith(f"{tmp_path / 'run.json'}: not read (")
    assert why in problem
    assert store.run() == {}
    assert store.done() == {ONE}


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/cells")), ids=lambda path: path.name)
def test_every_committed_record_proves_its_name(folder):
    """
    Records of version 1, which have no checksum, are read, and none is refused.
    """
    contents = Store(folder).load()

    assert not contents.problems
    assert len(contents.records) == len(list((folder / "cells").iterdir()))


def test_removing_leaves_what_is_not_the_sweeps(tmp_path):
    """
    Starting over forgets cells, baselines and reports, and no other file.
    """
    store = Store(tmp_path)
    store.save(record("one"), SAMPLES)
    store.baseline({"key": "a"}, "toy", lambda: {"x": torch.ones(1)})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.md").write_text("old")

    store.remove()

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
