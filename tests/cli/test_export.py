"""`kvbench export`: a committed sweep as other tools' files, read by these tools' own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def exported(kvbench, tmp_path):
    """The committed quickstart's folder in lm-eval's form."""
    shutil.copytree(RESULTS / "quickstart", tmp_path / "run")
    assert kvbench("export", "run", "--to", "lm-eval").exit_code == 0
    return tmp_path / "run" / "lm-eval"


def test_lm_eval_reads_what_is_exported(exported):
    """
    lm-eval's own functions find the files by name and make its table of them; the numbers are the records'.
    """
    from lm_eval.utils import get_results_filenames, get_sample_results_filenames, make_table

    folder = exported / "smollm2-135m-instruct__int8_per_token_head__none"
    names = list(map(str, folder.iterdir()))
    (results,), (samples,) = get_results_filenames(names), get_sample_results_filenames(names)
    found = json.loads(Path(results).read_text(encoding="utf-8"))
    (cell,) = (RESULTS / "quickstart" / "cells").glob("*-int8_per_token_head-none-pydoc_cloze-*")
    record = json.loads((cell / "record.json").read_text(encoding="utf-8"))

    row = found["results"]["pydoc_cloze"]
    for metric in record["metrics"]:
        assert row[f"{metric['name']},none"] == metric["value"]
        assert row[f"{metric['name']}_stderr,none"] == metric["stderr"]
    assert found["config"]["kvbench"]["scheme"]["dtype"] == "int8_per_token_head"
    assert "pydoc_cloze" in make_table(found)
    lines = [json.loads(line) for line in Path(samples).read_text(encoding="utf-8").splitlines()]
    assert len(lines) == found["n-samples"]["pydoc_cloze"]["effective"] == 48
    assert sum(line["acc"] for line in lines) / 48 == pytest.approx(row["acc,none"])
    assert all(line["doc_hash"] and line["resps"] and line["filter"] == "none" for line in lines)


def test_only_what_lm_eval_measures_is_exported(kvbench, toy, tmp_path):
    """
    A run without its tasks has nothing to export, and a folder that is none is bad input.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))

    assert kvbench("export", "out/toys", "--to", "lm-eval").exit_code == 5
    assert kvbench("export", "absent", "--to", "lm-eval").exit_code == 2


def test_an_export_in_a_run_folder_goes_with_it(kvbench, exported):
    """
    `runs --remove` knows it as kvbench's own.
    """
    run = exported.parent

    kvbench("runs", str(run), "--remove", "run", "--yes")

    assert not run.exists()
