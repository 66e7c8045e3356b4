"""lm-eval's tasks over a toy model: the mirror, the records, and what a broken or absent file is told."""

import json
import math
import os
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask
from pyarrow.parquet import read_table
from transformers import PreTrainedTokenizerFast

from kvbench.measured import series_of
from kvbench.results import headline, write_samples
from kvbench.runners.toy import ToyRunner
from kvbench.tasks import documents, lm_eval, lm_eval_index, make_task

METRICS = {
    "arc_easy": {"acc", "acc_norm"},
    "piqa": {"acc", "acc_norm"},
    "gsm8k": {"exact_match,strict-match", "exact_match,flexible-extract"},
    "lambada_openai": {"perplexity", "acc"},
    "wikitext": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
}


@pytest.mark.parametrize("name", METRICS)
def test_stock_tasks_run_from_a_mirror(name, mirror, context):
    """
    Stock tasks read the mirror's rows without a hub and give their own metrics, each with a standard error.
    """
    task = make_task({"task": name, "limit": 4}, mirror)

    assert task.missing() == []
    outcome = task.run(ToyRunner(), context)
    assert {metric.name for metric in outcome.metrics} == METRICS[name]
    assert all(metric.n == 4 and metric.stderr is not None for metric in outcome.metrics)
    assert len(outcome.samples) == (8 if name == "gsm8k" else 4)
    assert outcome.facts["data"][name].startswith("mirror: ")


@pytest.mark.parametrize("name", METRICS)
def test_samples_hold_what_a_paired_test_needs(name, mirror, context, tmp_path):
    """
    Of each metric that a table shows there is a number a document, whose mean is the metric; a plan knows how many.
    """
    task = make_task({"task": name, "limit": 3}, mirror)

    outcome = task.run(ToyRunner(), context)

    write_samples(tmp_path / "samples.parquet", outcome.samples)
    samples = read_table(tmp_path / "samples.parquet")
    for metric in headline(outcome.metrics):
        series = series_of(metric, samples)
        assert len(series.values) == 3
        assert series.metric.kind == ("log" if "perplexity" in metric.name else "share")
    assert task.answers() == (None if name == "wikitext" else 3)
    assert sorted(task.metrics()) == sorted(metric.name for metric in headline(outcome.metrics))


def test_a_field_names_the_clusters(mirror, context):
    """
    Rows that have the field in common are one cluster of the paired test; the samples hold its hash and no text.
    """
    task = make_task({"task": "arc_easy", "limit": 3, "cluster": "id"}, mirror)
    plain = make_task({"task": "arc_easy", "limit": 3}, mirror)

    rows = task.run(ToyRunner(), context).samples

    assert len({row["cluster"] for row in rows}) == 1  # the toy rows have one id
    assert all(re.fullmatch("[0-9a-f]{16}", row["cluster"]) for row in rows)
    assert task.identity() == {**plain.identity(), "cluster": "id"}
    with pytest.raises(
        ValueError, match=r"task arc_easy: its rows have no field 'passage' for cluster; they have id, "
    ):
        make_task({"task": "arc_easy", "limit": 3, "cluster": "passage"}, mirror).run(ToyRunner(), context)


def test_a_perplexity_beyond_every_float_is_infinite(mirror, context):
    """
    A model that is 800 nats off has a perplexity of inf in lm-eval's tasks; the cell does not fail.
    """

    class Lost(ToyRunner):
        def score(self, requests, progress=None):
            return [replace(score, logprobs=score.logprobs * 0 - 800.0) for score in super().score(requests, progress)]

    outcome = make_task({"task": "lambada_openai", "limit": 2}, mirror).run(Lost(), context)

    (perplexity,) = [metric for metric in outcome.metrics if metric.name == "perplexity"]
    assert perplexity.value == math.inf


@pytest.mark.parametrize("name", ["mmlu", "niah_single_1", "squadv2"])
def test_what_only_a_run_tells_is_not_guessed(name):
    """
    A group, and tasks whose own code sums up, do not say beforehand which metrics will be compared.
    """
    assert make_task(name).metrics() is None


def test_wikitext_sums_over_documents(mirror, context):
    """
    The task's word perplexity is that of the sums of `.logprob` and `.weight` in the records.
    """
    outcome = make_task("wikitext", mirror).run(ToyRunner(), context)

    logprob, weight = (sum(row[f"word_perplexity.{part}"] for row in outcome.samples) for part in ("logprob", "weight"))
    value = {metric.name: metric.value for metric in outcome.metrics}["word_perplexity"]
    assert value == pytest.approx(np.exp(-logprob / weight))


def test_records_hold_no_document(mirror, context):
    """
    A sample has hashes, what the model said and a column a metric; none of the document's words.
    """
    for name in METRICS:
        for row in make_task({"task": name, "limit": 2}, mirror).run(ToyRunner(), context).samples:
            assert {"task", "doc_id", "doc_hash", "prompt_hash", "target_hash", "filter"} <= row.keys()
            assert not {"doc", "target", "arguments"} & row.keys()
            assert not any(word in json.dumps(row) for word in ("Which is a gas", "jar", "What is", "saw the", "Title"))


def test_running_twice_gives_the_same_and_leaves_the_global_generators_alone(mirror, context):
    """
    Few-shot examples, samples and scores repeat within a process, and nobody's random numbers change.
    """
    task = make_task({"task": "gsm8k", "num_fewshot": 3, "limit": 3}, mirror)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    first, again = task.run(ToyRunner(), context), task.run(ToyRunner(), context)

    assert first == again
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    zero = make_task({"task": "gsm8k", "num_fewshot": 0, "limit": 3}, mirror).run(ToyRunner(), context)
    assert zero.samples[0]["doc_hash"] == first.samples[0]["doc_hash"]
    assert zero.samples[0]["prompt_hash"] != first.samples[0]["prompt_hash"]


@pytest.mark.parametrize("name", METRICS)
def test_later_cells_repeat_no_work_and_score_as_the_first(name, mirror, context, monkeypatch):
    """
    A task's prompts are made and encoded once a process, and a later cell's outcome is what it is as the first.
    """
    task = make_task({"task": name, "limit": 3, **({"num_fewshot": 2} if name == "gsm8k" else {})}, mirror)
    alone = task.run(ToyRunner(noise=0.5), context)
    lm_eval._load.cache_clear()
    exact = task.run(ToyRunner(), context)
    monkeypatch.setattr(ConfigurableTask, "fewshot_context", None)
    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", None)

    later = [task.run(ToyRunner(noise), context) for noise in (0.5, 0.0)]

    assert later == [alone, exact]
    said = [[row.get("logprobs", row.get("resps")) for row in outcome.samples] for outcome in (alone, exact)]
    assert said[0] != said[1]


def test_documents_that_are_shuffled_are_scored_as_they_were_asked(tmp_path, mirror, context, monkeypatch):
    """
    A task whose `process_docs` draws its answers' order is scored in that order, in later cells too.
    """
    (tmp_path / "shuffle.py").write_text(
        "import random\n"
        "def shuffled(row):\n"
        "    label = random.randrange(2)\n"
        "    return row | {'label': label} | ({'sol1': row['sol2'], 'sol2': row['sol1']} if label else {})\n"
        "def process_docs(docs):\n"
        "    return docs.map(shuffled)\n"
    )
    index = lm_eval_index.index()
    text = f"include: {index['piqa'].path}\ntask: drawn\nprocess_docs: !function shuffle.process_docs\n"
    (tmp_path / "drawn.yaml").write_text(text)
    monkeypatch.setattr(lm_eval_index, "index", lambda: index | lm_eval_index.scan(tmp_path))
    task = make_task("drawn", mirror)

    stock, first, again = (one.run(ToyRunner(), context) for one in (make_task("piqa", mirror), task, task))

    assert first == again
    # which answer scores higher is the same in either order, and so is whether that is the right one
    pairs = list(zip(stock.samples, first.samples, strict=True))
    assert {a["logprobs"] == b["logprobs"] for a, b in pairs} == {True, False}
    assert all(sorted(a["logprobs"]) == sorted(b["logprobs"]) and a["acc"] == b["acc"] for a, b in pairs)


def test_nothing_is_printed(mirror, context, capfd):
    """
    lm-eval's bars, warnings and prints stay away from both streams.
    """
    make_task({"task": "lambada_openai", "limit": 3}, mirror).run(ToyRunner(), context)

    assert capfd.readouterr() == ("", "")


def test_progress_is_told(mirror, context):
    """
    The runner's progress reaches the sweep, up to the last request.
    """
    seen = []
    context = type(context)(context.baseline, lambda done, total: seen.append((done, total)))

    make_task({"task": "arc_easy", "limit": 3}, mirror).run(ToyRunner(), context)

    assert seen[-1] == (12, 12)


def test_a_tag_runs_all_its_tasks_under_their_names(mirror, context):
    """
    A tag's subtasks stand in one outcome, metrics prefixed by the task, samples told apart by a column.
    """
    easy = (mirror / "allenai/ai2_arc/ARC-Easy/test.jsonl").read_text()
    challenge = mirror / "allenai/ai2_arc/ARC-Challenge/test.jsonl"
    challenge.parent.mkdir()
    challenge.write_text("".join(easy.splitlines(keepends=True)[:2]))

    outcome = make_task("ai2_arc", mirror).run(ToyRunner(), context)

    names = {metric.name: metric.n for metric in outcome.metrics}
    assert names == {"arc_easy/acc": 6, "arc_easy/acc_norm": 6, "arc_challenge/acc": 2, "arc_challenge/acc_norm": 2}
    assert {row["task"] for row in outcome.samples} == {"arc_easy", "arc_challenge"}


def test_a_group_gives_its_own_numbers_and_those_of_its_parts(tmp_path, mirror, context, monkeypatch):
    """
    A group's metric counts the documents of all its tasks; a nested group's only those of its own.
    """
    stock = lm_eval_index.index()["piqa"].path
    groups = {"outer": ["inner", "three"], "inner": ["one", "two"]}
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.yaml").write_text(f"include: {stock}\ntask: {name}\n")
    for name, members in groups.items():
        config = {"group": name, "task": members, "aggregate_metric_list": [{"metric": "acc"}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(lm_eval_index, "index", lambda: lm_eval_index.scan(tmp_path))

    outcome = make_task({"task": "outer", "limit": 2}, mirror).run(ToyRunner(), context)

    metrics = {metric.name: metric for metric in outcome.metrics}
    assert outcome.metrics[0] is metrics["acc"]
    assert (metrics["acc"].n, metrics["acc"].higher_is_better) == (6, True)
    assert metrics["inner/acc"].n == 4
    assert metrics["one/acc_norm"].n == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"goal": "x", ', "validation.jsonl:3: not a JSON object"),
        ("", "validation.jsonl:3: not a JSON object"),
        ('["goal"]', "validation.jsonl:3: not a JSON object but list"),
        ('{"goal": "x", "sol1": "a", "label": 0}', "validation.jsonl:3: no field 'sol2'"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(mirror, line, message):
    """
    A row that is cut, or lacks a field, is found when the task is identified, before any model is loaded.
    """
    file = mirror / "baber/piqa/default/validation.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")

    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        make_task("piqa", mirror).identity()

    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_the_task_cannot_render_is_named_before_the_model_runs(mirror, context):
    """
    A value the prompt cannot be made of is named by file and line, and no request reaches the model.
    """
    file = mirror / "allenai/ai2_arc/ARC-Easy/test.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace('"answerKey": "B"', '"answerKey": "Z"')
    file.write_text("".join(lines))
    runner = ToyRunner()
    runner.score = None

    with pytest.raises(ValueError, match=r"test\.jsonl:5: arc_easy cannot read this row"):
        make_task("arc_easy", mirror).run(runner, context)


def test_what_is_missing_is_said_with_what_to_do(mirror, context):
    """
    Without mirror and hub a task names the data set and the file to put; a mirror without the examples' split is told.
    """
    (line,) = make_task("boolq", mirror).missing()
    assert "super_glue" in line
    assert "validation.jsonl" in line
    assert "KVBENCH_DATA" in line

    task = make_task({"task": "arc_easy", "num_fewshot": 5}, mirror)
    assert task.missing() == ["arc_easy: the data folder has no allenai/ai2_arc/ARC-Easy/train.jsonl"]
    with pytest.raises(ValueError, match=r"train\.jsonl"):
        task.run(ToyRunner(), context)


def test_the_identity_follows_the_data(mirror):
    """
    Another row, limit or number of examples is another identity; the folder's place is not.
    """
    task = make_task("piqa", mirror)
    identities = [task.identity(), make_task({"task": "piqa", "limit": 3}, mirror).identity()]
    moved = mirror.parent / f"{mirror.name}-moved"
    mirror.rename(moved)
    assert make_task("piqa", moved).identity() == identities[0]

    file = moved / "baber/piqa/default/validation.jsonl"
    file.write_text(file.read_text().replace("Turn", "Pull"))
    identities.append(make_task("piqa", moved).identity())

    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == 3
    assert str(mirror.parent) not in json.dumps(identities)


def test_pydoc_cloze_needs_nothing(context):
    """
    The built-in cloze task runs without mirror or hub: passages of 60 to 100 words whose last word came before.
    """
    task = make_task({"task": "pydoc_cloze", "limit": 5})

    assert task.missing() == []
    outcome = task.run(ToyRunner(), context)
    assert {metric.name for metric in outcome.metrics} == {"acc", "perplexity"}
    assert outcome.facts["documents"] == 5

    from kvbench.tasks.lm_eval_tasks.pydoc_cloze import documents

    passages = [row["text"].split() for row in documents()["test"]]
    assert len(passages) >= 100
    for words in passages:
        assert 60 <= len(words) <= 100
        assert words[-1] in {word.strip(".,;:()") for word in words[:-1]}


def test_ruler_counts_with_the_loaded_tokenizer(tmp_path, context):
    """
    Whatever its name or the YAML's metadata say, no other tokenizer is loaded, and no code beside it runs.
    """
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "code.Evil"]}, "model_type": "evil"}')
    (evil / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "code.Evil"]}}')
    (evil / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    runner = ToyRunner()
    runner.tokenizer.name_or_path = str(evil)
    metadata = {"max_seq_lengths": [512], "tokenizer": str(evil), "pretrained": str(evil)}

    outcome = make_task({"task": "niah_single_1", "limit": 2, "metadata": metadata}).run(runner, context)

    assert not (tmp_path / "ran").exists()
    assert len(outcome.samples) == 2


@pytest.mark.parametrize(
    ("options", "there"),
    [
        ({"task": "gsm8k"}, "the split train has 6 examples"),
        ({"task": "gsm8k_cot"}, "the task itself has 8 examples"),
    ],
)
def test_more_examples_than_there_are_is_one_line(options, there, mirror):
    """
    It is known when the sweep is planned: what there is may be asked for, and one more is refused with both numbers.
    """
    most = int(there.split()[-2])
    make_task({**options, "num_fewshot": most}, mirror).identity()

    with pytest.raises(ValueError, match=rf"num_fewshot {most + 1}, and {there}$"):
        make_task({**options, "num_fewshot": most + 1}, mirror).identity()


def test_a_mirror_s_file_is_read_once(mirror, monkeypatch):
    """
    Many cells ask for the same documents: a file is read again only where it changed.
    """
    (file,) = mirror.glob("**/gsm8k/main/test.jsonl")
    whole = file.read_text()
    read = []
    text = lm_eval.mirror._text
    monkeypatch.setattr(lm_eval.mirror, "_text", lambda path: read.append(path) or text(path))

    first = [make_task("gsm8k", mirror).identity() for _ in range(3)]
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    second = make_task("gsm8k", mirror).identity()

    assert first[0] == first[1] == first[2] != second
    assert read.count(file) == 2


def test_a_mirror_s_pipe_is_not_opened(mirror):
    """
    What is no file in the data folder is named, where reading it would never end.
    """
    (file,) = mirror.glob("**/gsm8k/main/test.jsonl")
    file.unlink()
    os.mkfifo(file)

    with pytest.raises(ValueError, match=r"test\.jsonl cannot be read: it is no regular file, but a pipe or a device"):
        make_task("gsm8k", mirror).identity()


@pytest.mark.parametrize("metric", ["acc", "brier_score"])
def test_a_softmax_is_made_where_a_metric_reads_it(metric):
    """
    The softmax of a document's answers is left out of an evaluation but for the Brier score, and comes back after it.
    """
    own, task = utils.softmax, SimpleNamespace(_metric_fn_list={metric: None})
    with documents.without_softmax([task]):
        inside = utils.softmax([0.0, 0.0])

    assert (inside is None) == (metric == "acc")
    assert utils.softmax is own
