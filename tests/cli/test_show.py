"""`kvbench show` and `kvbench ls tasks`: what is looked at, by pattern."""

from __future__ import annotations

import json


def test_documents_are_shown_in_full_by_pattern(kvbench, toy, tmp_path):
    """
    So many of each cell, each once with all scores that moved; JSON has all; a folder of a cell is its run's cell.
    """
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8", "int4"], tasks=["toy_a"])
    kvbench("sweep", config)

    shown = kvbench("show", "out/toys", "dtype=int4", "--documents", "2")
    rows = json.loads(kvbench("show", "out/toys", "dtype=int4*", "task=toy_a", "--format", "json").stdout)

    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("toy · toy_a · int4_per_token_head · randomized_hadamard against fp16 · none: acc ")
    assert shown.stdout.count("\ndocument ") == 2
    assert "acc 1 → 0" in shown.stdout
    assert f"2 of {len(rows)} documents; --documents {len(rows)} shows all" in shown.stdout
    assert {row["dtype"] for row in rows} == {"int4_per_token_head"}
    assert kvbench("show", "out/toys", "dtype=int4", "--documents", "0").stdout.count("\ndocument ") == 0
    assert kvbench("show", "out/toys", "--documents", "0").stdout.count(" against fp16 · none: ") == 2


def test_a_prompt_that_is_not_known_is_said(kvbench, toy, tmp_path):
    """
    The toy's task is none that can be made again, and the answers are shown all the same.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int4"], tasks=["toy_a"]))

    shown = kvbench("show", "out/toys").stdout

    assert "not shown: unknown task 'toy_a'" in shown


def test_tasks_are_listed_by_pattern(kvbench):
    """
    gsm8k* lists those tasks alone; a pattern without a task is an error.
    """
    names = [row["name"] for row in json.loads(kvbench("ls", "tasks", "gsm8k*", "--format", "json").stdout)]

    assert "gsm8k" in names
    assert all(name.startswith("gsm8k") for name in names)
    assert kvbench("ls", "tasks", "gsm9*").exit_code == 2
