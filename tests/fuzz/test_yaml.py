"""A YAML file is taken as it was meant, or refused at its place: the smallest of each kind, and a seeded many."""

from __future__ import annotations

import contextlib
import os
import re
import time
from functools import partial

import mutate_yaml
import pytest
from campaign import Case, campaign, limited
from typer.testing import CliRunner

from kvbench.cli import app

MODEL = re.search(r"^model: .*$", (mutate_yaml.CONFIGS / "quickstart.yaml").read_text(), re.MULTILINE)[0]
GOOD = f"name: toys\n{MODEL}\ndtypes: [fp16, int4]\ntasks: [divergence]\n"
BOMB = ", ".join(["&b0 [x]", *(f"&b{i} [*b{i - 1}, *b{i - 1}]" for i in range(1, 25))])
NINES = "9" * 5000

# a line below GOOD's four, the column where it is wrong, and what is said of it
LINES = [
    ("? [a]\n: 1", 3, "a key is text"),
    ("1.5: x", 1, "a key is text"),
    ("note: 2020-13-45", 7, "is a date to YAML"),
    ("note: 2020-12-01", 7, "is a date to YAML"),
    ("seed: !!int abc", 7, "'abc' is not a whole number"),
    ("note: !!timestamp 99999", 7, "'99999' is not a date"),
    ("canary: !!bool 7", 9, "'7' is not true or false"),
    (f"seed: {NINES}", 7, "is no plain number"),
    ("x: " + "[" * 900 + "]" * 900, 43, "more than 40 levels"),
    ("x: " + "{a: " * 900, 157, "more than 40 levels"),
    ("metadata: &n {a: *n}", 18, r"\*n stands inside"),
    (f"x: [{BOMB}]", 175, "aliases written out"),
    ("data: ~nobodyx/y", 7, "no such home"),
    (f"data: {'x' * 300}", 7, "expected a path"),
    ("limit: 1:30", 8, "1:30 is no plain number"),
    ("seed: 010", 7, "010 is no plain number"),
    ("seed: 0x1F", 7, "0x1F is no plain number"),
    ("page_size: 1_6", 12, "1_6 is no plain number"),
    ("margin: ١pp", 9, "expected a margin"),
    (f"limit: {'9' * 400}", 8, "is no plain number"),
    ("limit: 100000000000000000000", 8, "of at most 1000000000"),
    ('note: "\\uD800"', 7, "half a character"),
    ("note: a\x00b", 8, r"U\+0000"),
    ("note: a\x1bb", 8, r"U\+001B"),
]
# a list of tasks, the column in line 4, and what is said of it
TASKS = [
    (f"[{BOMB}]", 179, "aliases written out"),
    ("[{task: divergence, metadata: &n {a: *n}}]", 45, r"\*n stands inside"),
    ("[{task: needle, depths: 1000000000000}]", 32, "of at most 1000000000"),
    ("[{task: needle, depths: 1000000000}]", 9, "take at most 1000000"),
    ("[{task: divergence, limit: '5'}]\nlimit: 7", 35, "expected a whole number, not '5'"),
    ("[{task: divergence, limit: true}]\nlimit: 7", 35, "expected a whole number, not true"),
    ("[{task: divergence, name: ''}]", 34, "expected a line"),
    ('[{task: divergence, name: "a\\nb"}]', 34, "expected a line"),
    ('[{task: divergence, name: "\\e[31mred"}]', 34, "expected a line"),
    ("[{task: divergence, text: /dev/zero}]", 9, "a pipe or a device"),
    (f"[{{task: divergence, text: {'x' * 300}}}]", 34, "expected a path"),
    ('["a\\0b"]', 9, r"unknown task 'a\\x00b'"),
    ("[[]]", 9, "expected a task's name"),
    ("[{task: []}]", 10, "a task is a name"),
]
TEXTS = [
    *((f"{GOOD}{line}\n", f"5:{column}", said) for line, column, said in LINES),
    *((GOOD.replace("[divergence]", tasks), f"4:{column}", said) for tasks, column, said in TASKS),
    (GOOD.replace(MODEL, "model: ~nobodyx/y"), "2:8", "no such folder"),
    (GOOD.replace(MODEL, f"model: {'x' * 300}"), "2:8", "unknown model"),
    (GOOD.replace(MODEL, f"model: {'x/' * 3000}"), "2:8", "expected a line|no path"),
    (GOOD.replace("[fp16, int4]", "[[int8]]"), "3:11", "expected a name"),
]


@pytest.fixture
def planned(tmp_path):
    """What `kvbench plan` says of a text."""

    def run(text, *arguments):
        file = tmp_path / "bad.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return CliRunner().invoke(app, ["plan", str(file), "--output", str(tmp_path / "none"), *arguments])

    assert run(GOOD).exit_code == 0
    return run


@pytest.mark.parametrize(("text", "place", "said"), TEXTS, ids=range(len(TEXTS)))
def test_each_trap_is_refused_at_its_place(planned, text, place, said):
    """
    Exit 2 at once, one error with file, line and column, and nothing that a terminal obeys.
    """
    with limited(60):
        done = planned(text)

    assert done.exit_code == 2
    assert re.search(rf"^error: \S+bad\.yaml:{place}: .*{said}", done.stderr), done.stderr
    assert len(done.stderr.splitlines()[0]) < 6500
    assert all(len(line) <= 210 for line in done.stderr.splitlines()[1:])
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.stderr)


def test_a_limit_beyond_any_data_is_refused(planned):
    """
    `--limit` takes no number that would stand for nothing, and says which it takes.
    """
    done = planned(GOOD, "--limit", "100000000000000000000")

    assert done.exit_code == 2
    assert "1000000000" in done.stderr


@pytest.mark.parametrize("value", ["010", "1:30", "2020-01-01", "&a [*a]", "[" * 900, NINES, '"\\uD800"'])
def test_a_trap_in_a_setting_is_refused(planned, value):
    """
    `--set` reads values as the file is read.
    """
    done = planned(GOOD, "--set", f"seed={value}")

    assert done.exit_code == 2
    assert done.stderr.startswith("error: --set seed=")


def test_what_is_no_file_is_not_opened(planned, tmp_path):
    """
    A pipe or a device in place of the YAML is refused at once, where reading would never end.
    """
    os.mkfifo(tmp_path / "pipe.yaml")

    for name in (str(tmp_path / "pipe.yaml"), "/dev/zero"):
        done = CliRunner().invoke(app, ["plan", name])
        assert done.exit_code == 2
        assert done.stderr == f"error: {name} cannot be read: it is no regular file, but a pipe or a device\n"


def test_a_file_that_no_person_wrote_is_not_read(planned):
    """
    Megabytes of YAML, which would take minutes, are refused by their size; thousands of values by their number.
    """
    assert "has 200005 bytes" in planned("note: " + "x" * 199_999).stderr
    assert "more than 5000 values" in planned("x: [" + "a, " * 6000 + "]").stderr


def test_mutated_files_end_in_an_answer_or_a_place(tmp_path, monkeypatch):
    """
    A seeded part of the campaign: no traceback, no hang, no refusal without a place.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mutate_yaml.planned(tmp_path / "first.yaml", GOOD)

    tally = campaign("YAMLs", mutate_yaml.cases(150, 7, tmp_path), seconds=60)

    assert not tally.broken, tally.broken[0]
    assert tally.outcomes["refused (2)"] > 50
    assert tally.outcomes["taken"] > 5


def test_a_campaign_sees_what_is_broken():
    """
    A case that raises, that never ends or that a handler keeps alive is counted as such, and the next one still runs.
    """

    def stubborn():
        while True:
            with contextlib.suppress(Exception):
                time.sleep(10)

    found = campaign("x", [Case("a", partial(int, "x")), Case("b", stubborn), Case("c", lambda: "taken")], seconds=0.2)

    assert [(kind, name) for kind, name, _ in found.broken] == [("traceback", "a"), ("hang", "b")]
    assert found.outcomes == {"taken": 1}
    assert "3 cases" in str(found)
    assert "1 tracebacks, 1 hangs, 0 differences" in str(found)
