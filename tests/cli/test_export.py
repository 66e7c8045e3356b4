"""`kvbench export`: a committed sweep as other tools' files, read by these tools' own code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.results import Store, name_of

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


@pytest.fixture
def with_others(tmp_path):
    """The quickstart's int8 measured again as a quick look, under another seed, and of another number of shots."""
    folder = tmp_path / "others"
    shutil.copytree(RESULTS / "quickstart", folder)
    store = Store(folder)
    (record,) = (
        one
        for one in store.load().records.values()
        if (one.task, one.dtype, one.rotation) == ("pydoc_cloze", "int8_per_token_head", "none")
    )
    samples = store.samples(record.cell).to_dict("records")
    task = record.identity["task"]
    for other in ({"limit": 5}, {"seed": 1}, {"task": {**task, "num_fewshot": 3}}):
        identity = {**record.identity, **other}
        cell = name_of(record.cell.rpartition("-")[0], identity)
        store.save(replace(record, cell=cell, identity=identity, limit=identity["limit"]), samples)
    return folder


@pytest.mark.parametrize("tool", ["lm-eval", "eee"])
def test_other_limits_seeds_and_options_stay_apart(kvbench, with_others, tool):
    """
    A quick look and another seed are files of their own, another number of shots a task of its own: none replaces one.
    """
    assert kvbench("export", str(with_others), "--to", tool).exit_code == 0

    files = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in (with_others / tool).rglob("results_*.json" if tool == "lm-eval" else "*.json")
    ]
    if tool == "eee":
        found = [one for one in files if one["model_info"]["additional_details"]["kv_cache_dtype"].startswith("int8")]
        named = [{result["evaluation_name"] for result in one["evaluation_results"]} for one in found]
    else:
        found = [one for one in files if one["config"]["kvbench"]["scheme"]["dtype"].startswith("int8")]
        named = [set(one["results"]) for one in found if "again" not in one["model_name"]]
        assert len(list((with_others / tool).glob("*int8*none*/samples_*.jsonl"))) == 4
    asked = [tuple(sorted(name for name in names if "pydoc" in name)) for names in named]
    assert sorted(filter(None, asked)).count(("pydoc_cloze (num_fewshot=None)",)) == 2
    assert ("pydoc_cloze (num_fewshot=3)", "pydoc_cloze (num_fewshot=None)") in asked


def test_only_what_lm_eval_measures_is_exported(kvbench, toy, tmp_path):
    """
    A run without its tasks has nothing to export, and a folder that is none is bad input.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"]))

    assert kvbench("export", "out/toys", "--to", "lm-eval").exit_code == 5
    assert kvbench("export", "absent", "--to", "lm-eval").exit_code == 2


@pytest.mark.parametrize("lost", ["cells/*int8*/record.json", "run.json"])
def test_what_an_export_leaves_out_is_told(kvbench, toy, tmp_path, lost):
    """
    A record that can't be read, and a run.json that is gone, cost a line on stderr each; the rest is written.
    """
    kvbench("sweep", toy.write_config(tmp_path / "toys.yaml", dtypes=["int8", "int4"], tasks=["toy_a"]))
    [file] = Path("out/toys").glob(lost)
    file.unlink()

    told = kvbench("export", "out/toys", "--to", "eee")

    assert told.exit_code == 0
    assert any((file.parent.name if "cells" in lost else "run.json") in line for line in told.stderr.splitlines())
    assert list(Path("out/toys/eee").rglob("*.json"))


def test_an_export_in_a_run_folder_goes_with_it(kvbench, exported):
    """
    `runs --remove` knows it as kvbench's own.
    """
    run = exported.parent

    kvbench("runs", str(run), "--remove", "run", "--yes")

    assert not run.exists()


def test_every_eval_ever_has_the_scheme_the_error_and_the_documents(kvbench, tmp_path):
    """
    A file a scheme at data/SWEEP/DEVELOPER/MODEL/UUID.json, controls left out; all details are text, every score has
    its range, its standard error and its number of documents.
    """
    shutil.copytree(RESULTS / "quickstart", tmp_path / "run")

    assert kvbench("export", "run", "--to", "eee", "--output", "store").exit_code == 0
    assert kvbench("export", "run", "--to", "eee", "--output", "store").exit_code == 0
    files = list(Path("store").rglob("*.json"))

    assert len(files) == 9
    assert {file.parent for file in files} == {Path("store/data/quickstart/unknown/smollm2-135m-instruct")}
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    details = [one["model_info"]["additional_details"] for one in found]
    assert {"int8_per_token_head", "fp16"} <= {one["kv_cache_dtype"] for one in details}
    assert all(isinstance(value, str) for one in details for value in one.values())
    for one in found:
        assert one["schema_version"] == "0.3.0"
        for result in one["evaluation_results"]:
            low, high = (
                float(result["metric_config"][end].replace("Infinity", "inf"))
                if isinstance(result["metric_config"][end], str)
                else result["metric_config"][end]
                for end in ("min_score", "max_score")
            )
            assert low <= result["score_details"]["score"] <= high
            assert result["score_details"]["uncertainty"]["num_samples"] > 0
    acc = [r for one in found for r in one["evaluation_results"] if r["metric_config"]["metric_id"] == "acc"]
    assert all(result["score_details"]["uncertainty"]["standard_error"]["value"] >= 0 for result in acc)
