"""`kvbench runs`: what is listed, and what is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbench.results import Store


@pytest.fixture
def two(kvbench, toy, tmp_path):
    """Two run folders, out/one and out/two."""
    for name in ("one", "two"):
        config = toy.write_config(tmp_path / f"{name}.yaml", name=name, dtypes=["int8"], tasks=["toy_a"])
        assert kvbench("sweep", config).exit_code == 0
    return kvbench


def test_runs_are_listed(two):
    """
    A row a run folder of out/: when its last cell was done, how many of its cells, its bytes and models.
    """
    table = two("runs").stdout
    rows = {Path(row["path"]).name: row for row in json.loads(two("runs", "--format", "json").stdout)}

    assert {"out/one", "out/two"} == {line.split()[0] for line in table.splitlines()[2:]}
    assert all("6 of 6" in line and line.endswith("toy") for line in table.splitlines()[2:])
    assert rows["one"]["done"] == 6
    assert rows["one"]["size_bytes"] == sum(
        path.stat().st_size for path in Path("out/one").rglob("*") if path.is_file()
    )
    assert rows["one"]["finished"] == max(record.finished for record in Store(Path("out/one")).load().records.values())


def test_what_is_missing_of_a_sweep_is_counted(two):
    """
    Cells without a record count for the whole, and a broken record is none.
    """
    first, second, *_ = sorted(Path("out/one/cells").iterdir())
    (first / "record.json").unlink()
    (second / "record.json").write_text("{")

    assert "4 of 6" in next(line for line in two("runs").stdout.splitlines() if line.startswith("out/one"))


def test_nothing_is_removed_without_a_yes(two):
    """
    "n" keeps all; no answer at all is an error.
    """
    declined, unanswered = two("runs", "--remove", "one", input="n\n"), two("runs", "--remove", "one")

    assert (declined.exit_code, declined.stdout.splitlines()[-1]) == (0, "nothing was removed")
    assert "Remove 1 run folder" in declined.stderr
    assert unanswered.exit_code == 2
    assert "--yes removes without the question" in unanswered.stderr
    assert Path("out/one/run.json").is_file()


def test_removed_are_those_that_match_and_are_not_kept(two):
    """
    --remove PATTERN removes what matches, --keep PATTERN all else; what kvbench did not write stays.
    """
    Path("out/two/notes.txt").write_text("mine")

    assert two("runs", "--remove", "t*", "--yes").stdout.splitlines()[-1] == (
        "removed out/two, but not notes.txt, which kvbench did not write"
    )
    assert [path.name for path in Path("out/two").iterdir()] == ["notes.txt"]
    assert two("runs", "--keep", "one", "--yes").stdout == "nothing to remove\n"
    assert two("runs", "--keep", "other", "--yes").exit_code == 2
    assert two("runs", "--remove", "o*", input="y\n").exit_code == 0
    assert not Path("out/one").exists()


def test_a_run_that_is_being_written_stays(two):
    """
    A sweep's own folder is not taken from under it.
    """
    with Store(Path("out/one")).writing():
        result = two("runs", "--remove", "one", "--yes")

    assert (result.exit_code, Path("out/one/run.json").is_file()) == (4, True)
    assert "a sweep is writing" in result.stderr


def test_no_runs_is_no_error_but_no_folder_is(kvbench):
    """
    Without out/ there is nothing to list; a folder that is named must be there.
    """
    assert kvbench("runs").stdout == "no run folder in out; kvbench sweep CONFIG makes one\n"
    assert kvbench("runs", "absent").exit_code == 2
