"""A pair is compared where it can be, refused with the reason where not, and judged as sure as it is."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from kvbench.measured import read, write
from kvbench.render import render
from kvbench.report.compare import compare
from kvbench.report.comparison_text import document, noise_floor, summary
from kvbench.report.find_scheme import find_scheme
from kvbench.report.flips import NotComparableError, choose, flips, named
from kvbench.report.gate import check
from kvbench.results import Metric, NotARunError, Record, Store, name_of
from kvbench.results.store import file_checksum

N = 400
BASE = np.arange(N) % 10 < 7  # 70 % right


def changed(worse, better=0):
    """The baseline's answers, so many of them gone wrong and right."""
    answers = BASE.copy()
    answers[np.flatnonzero(BASE)[:worse]] = False
    answers[np.flatnonzero(~BASE)[:better]] = True
    return answers


def save(folder, dtype, answers=BASE, *, rotation="none", task="qa", texts=None, **changes):
    """One cell: right and wrong answers, and a divergence of as many nats a document where there is one."""
    answers = np.asarray(answers, dtype=float)
    n = len(answers)
    identity = {
        "version": 1,
        "model": {"name": "toy", "revision": "r1", "compute_dtype": "float32"},
        "scheme": {
            "dtype": "fp16" if dtype in ("canary", "again") else dtype.rsplit(" ")[-1],
            "rotation": rotation,
            "destroyed": dtype == "canary",
        },
        "task": {"task": task, "limit": None, "num_fewshot": 0},
        "scoring": "fused",
        "seed": 0,
        "limit": None,
        **({"again": dtype == "again" or int(dtype.split()[1])} if dtype.startswith("again") else {}),
    }
    for name, value in changes.pop("identity", {}).items():
        identity[name] = {**identity[name], **value} if isinstance(value, dict) else value
    metrics = [Metric("acc", changes.get("value", float(answers.mean())), 0.02, n, "", True, "share")]
    columns = {"acc": answers}
    if texts is not None:
        metrics.append(Metric("perplexity", math.exp(np.mean(texts)), 0.1, n, "ppl", False, "log"))
        columns["perplexity"] = -np.asarray(texts)
    samples = [
        {
            "task": task,
            "doc_id": int(i),
            "doc_hash": changes.get("documents", {}).get(i, f"d{i}"),
            "prompt_hash": changes.get("prompts", {}).get(i, f"p{i}"),
            "filter": "none",
            "resps": [f"answer {int(answers[i])}"],
            **{name: float(column[i]) for name, column in columns.items()},
        }
        for i in changes.get("order", range(n))
    ]
    record = Record(
        cell=name_of(f"toy-{dtype}-{rotation}-{task}", identity),
        status="done",
        identity=identity,
        model=identity["model"],
        dtype=dtype,
        rotation=rotation,
        task=task,
        scoring=identity["scoring"],
        bits_per_value=4.0,
        kv_bytes_per_token=1,
        limit=identity["limit"],
        metrics=tuple(metrics),
        environment=changes.get("environment", {"cpu": "Toy CPU", "versions": {"torch": "2.11"}}),
    )
    Store(folder).save(record, samples)


def cell(folder, dtype, task="qa"):
    """The folder of a cell."""
    (path,) = (folder / "cells").glob(f"toy-{dtype}-none-{task}-*")
    return path


@pytest.fixture
def folder(tmp_path):
    """A run folder with a baseline and what `save` puts into it."""
    path = tmp_path / "run"
    save(path, "fp16")
    Store(path).write_run({"sweep": "toys", "baseline": {"dtype": "fp16", "rotation": "none"}, "config": {}})
    return path


def verdict(folder, dtype="int4", metric="acc", **options):
    """The comparison of one metric."""
    (row,) = [row for row in compare(read(folder), **options).rows if (row.dtype, row.metric) == (dtype, metric)]
    return row


def test_a_loss_is_worse_and_a_gain_better(folder):
    """
    Forty answers gone wrong of 400 are WORSE, forty gone right BETTER, with the flips of each direction.
    """
    save(folder, "int4", changed(40, 2))
    save(folder, "int8", changed(2, 40))

    worse, better = verdict(folder), verdict(folder, "int8")
    assert (worse.verdict, worse.worse, worse.better, worse.test) == ("WORSE", 40, 2, "McNemar")
    assert (worse.baseline, worse.value) == (0.7, pytest.approx(0.605))
    assert worse.difference == pytest.approx(-0.095)
    assert worse.ci_low < -0.095 < worse.ci_high < 0
    assert worse.p < worse.p_holm < 0.05
    assert (better.verdict, better.worse, better.better) == ("BETTER", 2, 40)


def test_what_is_not_shown_is_inconclusive_with_the_n_that_decides(folder):
    """
    Three flips each way show neither a loss nor its absence, and never "no loss"; more documents would.
    """
    save(folder, "int4", changed(3, 3))

    row = verdict(folder)

    assert row.verdict == "INCONCLUSIVE"
    assert row.n_to_decide > N


def test_equivalence_needs_the_margin(folder):
    """
    The whole interval within the margin is EQUIVALENT; the margin is the option's, else the YAML's.
    """
    save(folder, "int4", changed(3, 3))

    row = verdict(folder, margin="5pp")
    assert row.verdict == "EQUIVALENT"
    assert -0.05 < row.ci_low < row.ci_high < 0.05
    assert verdict(folder, margin="1pp").verdict == "INCONCLUSIVE"
    Store(folder).write_run({"baseline": {"dtype": "fp16", "rotation": "none"}, "config": {"margin": "5pp"}})
    assert verdict(folder).verdict == "EQUIVALENT"


def test_a_task_at_the_floor_is_not_discriminative(folder):
    """
    Where the baseline has nothing right, equal answers say nothing of the cache.
    """
    save(folder, "fp16", np.zeros(N))
    save(folder, "int4", np.zeros(N))

    row = verdict(folder, margin="5pp")

    assert row.verdict == "NOT-DISCRIMINATIVE"
    assert "floor" in row.reason


def test_chance_is_a_floor_too(folder):
    """
    Where a zeroed cache answers as well as the baseline, the task does not read the cache's contents.
    """
    save(folder, "canary", changed(20, 20))
    save(folder, "int4", BASE)

    assert verdict(folder).verdict == "NOT-DISCRIMINATIVE"
    assert "zeroed cache" in verdict(folder).reason


@pytest.mark.parametrize(("lost", "called"), [(40, "WORSE"), (4, "INCONCLUSIVE"), (0, "EQUIVALENT")])
def test_the_ceiling_has_everything_to_lose(folder, lost, called):
    """
    Where the baseline has all right a loss is seen as anywhere, and so is that there is none.
    """
    save(folder, "fp16", np.ones(N))
    save(folder, "int4", np.arange(N) >= lost)
    assert verdict(folder).verdict == called

    save(folder, "canary", np.zeros(N))
    assert verdict(folder).verdict == called


def test_a_ceiling_that_a_destroyed_cache_reaches_tells_nothing(folder):
    """
    All right with and without the cache's contents is no evidence of either.
    """
    save(folder, "fp16", np.ones(N))
    save(folder, "int4", np.ones(N))
    save(folder, "canary", np.ones(N))

    assert verdict(folder).verdict == "NOT-DISCRIMINATIVE"


def test_a_perplexity_is_compared_as_a_ratio(folder):
    """
    Documents each 10 % more perplexing are +10 %, WORSE; within 1 % of each other EQUIVALENT.
    """
    texts = 3 + np.sin(np.arange(N))
    noise = np.random.default_rng(0).normal(0, 0.01, N)
    save(folder, "fp16", texts=texts)
    save(folder, "int4", texts=texts + math.log(1.1) + noise)
    save(folder, "int8", texts=texts + noise)

    row = verdict(folder, metric="perplexity")
    assert (row.verdict, row.unit, row.test) == ("WORSE", "relative", "paired t")
    assert row.difference == pytest.approx(0.1, abs=0.005)
    assert verdict(folder, "int8", "perplexity").verdict == "EQUIVALENT"


def test_holm_counts_the_whole_report(folder):
    """
    What is significant alone is not among forty comparisons.
    """
    save(folder, "int4", changed(12, 2))
    assert verdict(folder).verdict == "WORSE"

    for i in range(39):
        save(folder, "int8", changed(5, 5), task=f"other{i}")
        save(folder, "fp16", task=f"other{i}")

    row = verdict(folder, "int4")
    assert row.p < 0.05
    assert row.p_holm == pytest.approx(40 * row.p)
    assert row.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"documents": {17: "altered"}}, "1 of 400 documents differ, first doc_id 17 (another document)"),
        ({"prompts": {17: "altered"}}, "1 of 400 documents differ, first doc_id 17 (another prompt)"),
        ({"answers": BASE[:300]}, "300 documents here, 400 in the baseline, 300 in both"),
        (
            {"identity": {"model": {"revision": "r2"}}},
            "model.revision (weights, configuration or tokenizer) r2 here, r1",
        ),
        ({"identity": {"limit": 50}}, "limit 50 here, None in the baseline"),
        ({"identity": {"task": {"limit": 300}}}, "task.limit 300 here, None in the baseline"),
        ({"identity": {"scoring": "replay"}}, "scoring replay here, fused in the baseline"),
        ({"identity": {"seed": 3}}, "seed 3 here, 0 in the baseline"),
        ({"identity": {"task": {"num_fewshot": 5}}}, "task.num_fewshot 5 here, 0 in the baseline"),
    ],
)
def test_a_pair_that_differs_elsewhere_is_refused(folder, tmp_path, changes, reason):
    """
    An altered document or prompt, another tokenizer, limit, scoring mode, seed or option is INVALID, with the reason;
    in the same folder and between two.
    """
    save(folder, "int4", changes.pop("answers", BASE), **changes)

    row = verdict(folder)

    assert row.verdict == "INVALID"
    assert reason in row.reason
    assert (row.p, row.difference) == (None, None)
    other = tmp_path / "other"
    save(other, "int4")
    Store(other).write_run({})
    (row,) = compare(read(other), read(folder)).rows[1:]
    assert (row.dtype, row.verdict) == ("int4", "INVALID")


def test_samples_that_do_not_give_the_number_are_refused(folder):
    """
    A metric whose value is not the mean of its samples is not compared.
    """
    save(folder, "int4", changed(1), value=0.9)

    assert verdict(folder).verdict == "INVALID"
    assert "the samples' mean is not the metric's value" in verdict(folder).reason


def test_order_is_no_matter(folder):
    """
    Documents are joined by their ids and hashes, not by their place in the file.
    """
    save(folder, "int4", changed(40))
    before = verdict(folder)
    save(folder, "int4", changed(40), order=np.random.default_rng(0).permutation(N))

    assert verdict(folder) == before


def test_a_repeated_document_is_one(folder):
    """
    Rows of one document are clustered.
    """
    twice = {i: f"d{i // 2}" for i in range(N)}
    save(folder, "fp16", documents=twice)
    save(folder, "int4", changed(40), documents=twice)

    assert verdict(folder).test == "clustered t"


def test_the_noise_floor_stands_beside(folder):
    """
    The A/A cell has its flips and no verdict, and does not count among the comparisons; without one the report says so.
    """
    save(folder, "int4", changed(40))
    assert "A/A: no cell, so the noise floor was not measured" in summary(read(folder), compare(read(folder)))
    alone = verdict(folder).p_holm

    save(folder, "again", changed(1, 2))
    found = compare(read(folder))

    assert verdict(folder, "again").verdict is None
    assert verdict(folder).p_holm == alone
    [line] = noise_floor(found)
    assert line.endswith(", toy: qa acc 3 of 400 flipped")
    Store(folder).remove([cell(folder, "again").name])
    Store(folder).write_run({"baseline": {"dtype": "fp16", "rotation": "none"}, "config": {"again": False}})
    assert any("turned off" in line for line in summary(read(folder), compare(read(folder))))


def test_a_low_bit_scheme_has_a_noise_floor_of_its_own(folder):
    """
    Its repeats stand against itself, without a verdict and outside the family: flips of each, and between what numbers
    lie, its own among them. One of a scheme that failed is refused; a flip of one is shown against what it repeats.
    """
    loss = np.full(N, 2.0)
    save(folder, "int4", changed(40), texts=loss)
    save(folder, "again", changed(1, 2))
    alone = verdict(folder).p_holm
    save(folder, "again 1 of int4", changed(45), texts=loss + 0.01)
    save(folder, "again 2 of int4", changed(38), texts=loss + 0.03)
    save(folder, "again 1 of int2", changed(45))
    found = compare(read(folder))

    assert verdict(folder).p_holm == alone
    rows = [row for row in found.again if row.metric == "acc"]
    assert sorted((row.dtype, row.against, row.worse, row.better, row.verdict) for row in rows) == [
        ("again", "fp16 · none", 1, 2, None),
        ("again 1 of int2", "", None, None, "INVALID"),
        ("again 1 of int4", "int4 · none", 5, 0, None),
        ("again 2 of int4", "int4 · none", 0, 2, None),
    ]
    exact, quantized = noise_floor(found)
    assert exact.endswith(", toy: qa acc 3 of 400 flipped")
    assert quantized == (
        "A/A of a quantized cache (int4 · none again, 2 times, with one ulp of noise in the embedding), toy: "
        "qa acc 5, 2 of 400 flipped; qa perplexity 7.389–7.614"
    )
    (row,) = [row for row in found.invalid if row.dtype == "again 1 of int2" and row.metric == "acc"]
    assert row.reason.startswith("int2 · none has no finished cell of qa")
    assert flips(*named(cell(folder, "again-1-of-int4"))).title.endswith(" against int4 · none: acc 5 of 400")


def test_repeats_are_no_cells_that_a_check_misses(folder, tmp_path):
    """
    A run with A/A cells passes against one without, and that one against it.
    """
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for path in (folder, other):
        save(path, "int4", changed(40))
    save(other, "again", changed(1))
    save(other, "again 1 of int4", changed(90))

    for here, there in ((folder, other), (other, folder)):
        found = check(read(here), read(there))
        assert (found.failed, found.skipped, found.compared) == ([], [], 2)


def test_the_noise_floor_is_the_sweep_s_own_baseline_s(folder):
    """
    Against another baseline the A/A cell still stands against what it repeats, and its row says so.
    """
    save(folder, "int4", changed(40))
    save(folder, "again", changed(1, 2))
    measured = read(folder)
    found = compare(measured, baseline=("int4", "none"))

    (row,) = found.again
    assert (row.against, row.worse, row.better) == ("fp16 · none", 1, 2)
    assert noise_floor(found)[0].endswith("qa acc 3 of 400 flipped")
    text = render(document(measured, found), "md")
    assert "## toy against int4 · none · margin" in text
    assert "A/A against fp16 · none |" in text


def test_two_folders_have_the_floor_and_the_margin_of_the_first(folder, tmp_path):
    """
    Like for like the noise floor is the first folder's, or not shown; a margin that another sweep fixed is named.
    """
    run = {"baseline": {"dtype": "fp16", "rotation": "none"}}
    other = tmp_path / "other"
    for path, margin in ((folder, "2pp"), (other, "3pp")):
        save(path, "fp16")
        save(path, "int4", changed(40))
        Store(path).write_run({**run, "config": {"margin": margin}})
    save(other, "again", changed(5, 5))
    first, second = read(folder), read(other)
    lines = summary(first, compare(first, second), second)
    assert f"A/A: not shown: no such cell in {folder}" in lines
    assert f"margin 2pp; the sweep of {other} fixed 3pp" in lines
    assert not any("fixed none" in line or "afterwards" in line for line in lines)

    save(folder, "again", changed(1, 2))
    first = read(folder)
    found = compare(first, second)
    [line] = noise_floor(found)
    assert line.endswith(", toy: qa acc 3 of 400 flipped")
    assert not any(row.again for row in found.rows)


def test_a_margin_given_afterwards_is_said(folder):
    """
    `--margin` other than what the sweep fixed stands below the table; the same one, and none, add no line.
    """
    Store(folder).write_run({"baseline": {"dtype": "fp16", "rotation": "none"}, "config": {"margin": "1pp"}})
    save(folder, "int4", changed(3, 3))
    measured = read(folder)

    given = compare(measured, margin="5pp")
    assert "margin 5pp given afterwards; the sweep fixed 1pp" in summary(measured, given)
    assert compare(measured, margin="1.0pp").notes == compare(measured).notes == []


def test_another_baseline_by_its_short_name(folder):
    """
    --baseline takes DTYPE or DTYPE/ROTATION, and refuses what was not measured.
    """
    save(folder, "int4_per_token_head", changed(40))
    save(folder, "int4_per_token_head", changed(10), rotation="hadamard")
    measured = read(folder)

    schemes = measured.schemes
    names = {"int4": ("int4_per_token_head", "randomized_hadamard"), "int8": ("int8_per_token_head", "none")}

    def find(schemes, name):
        return find_scheme(schemes, name, names.get)

    assert find(schemes, "int4/hada") == ("int4_per_token_head", "hadamard")
    assert find([*schemes, names["int4"]], "int4") == names["int4"]
    assert find([("int4_per_token_head", "none")], "int4") == ("int4_per_token_head", "none")
    with pytest.raises(ValueError, match="it means int4_per_token_head/randomized_hadamard, which was not measured"):
        find(schemes, "int4")
    with pytest.raises(ValueError, match="it means int8_per_token_head/none"):
        find([("int8_per_token_head+w64s4", "none")], "int8")
    pair = ("int4_per_token_head:int2_per_token_head", "none")
    assert find([*schemes, pair], "int4:int2") == pair
    with pytest.raises(ValueError, match=r"--baseline int2: unknown dtype .* DTYPE/ROTATION is one of fp16/none"):
        find(schemes, "int2")
    eight = [("fp8_per_token_head", "hadamard"), ("fp8_per_tensor", "none")]
    with pytest.raises(ValueError, match=r"dtype 'fp8' is not unique: one of fp8_per_tensor, fp8_per_token_head"):
        find(eight, "fp8")
    row = verdict(folder, "fp16", baseline=("int4_per_token_head", "none"))
    assert (row.against, row.verdict) == ("int4_per_token_head · none", "BETTER")


def test_every_format_says_the_same(folder):
    """
    Markdown, CSV and JSON have the verdict of each row.
    """
    save(folder, "int4", changed(40))
    measured = read(folder)
    found = compare(measured)

    assert "| int4 | none | qa | acc | 0.7 | 0.6 | −10.0 pp |" in render(document(measured, found), "md")
    assert "WORSE |" in render(document(measured, found), "md")
    assert ",WORSE," in render(document(measured, found), "csv")


# ---- check


def lowered(folder, other, points):
    """A copy of a run folder in which int4 has so many points fewer, in its samples too."""
    save(other, "fp16")
    save(other, "int4", changed(round(points / 100 * N)))
    Store(other).write_run(Store(folder).run())
    return read(other)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_drop_fails_the_check(folder, tmp_path, as_file):
    """
    Three points fewer fail, with the line that names cell and metric; an equal copy passes. Against a folder or a file.
    """
    save(folder, "int4")
    against = read(folder)
    if as_file:
        write(against, tmp_path / "baseline.json")
        against = read(tmp_path / "baseline.json")

    found = check(lowered(folder, tmp_path / "lowered", 3), against)
    equal = check(lowered(folder, tmp_path / "equal", 0), against)

    (line,) = found.failed
    assert line.startswith("toy int4 none qa acc: 0.7 -> 0.67 (−3.0 pp, 12 of 400 documents worse and 0 better")
    assert line.endswith("WORSE, dropped by more than 1pp")
    assert (equal.failed, equal.skipped, equal.compared) == ([], [], 2)


def test_a_drop_within_the_noise_or_on_another_machine_needs_the_test(folder, tmp_path):
    """
    A drop that the paired test does not see fails only beyond the A/A cell's flips, and in the same environment.
    """
    save(folder, "int4")
    against = read(folder)
    drop = lowered(folder, tmp_path / "drop", 1.25)
    assert [line.rpartition(": ")[2] for line in check(drop, against).failed] == ["dropped by more than 1pp"]

    save(tmp_path / "drop", "again", changed(3, 3))
    assert check(read(tmp_path / "drop"), against).failed == []
    other = {"cpu": "Other CPU", "versions": {"torch": "2.12"}}
    save(tmp_path / "elsewhere", "int4", changed(5), environment=other)
    save(tmp_path / "elsewhere", "fp16", environment=other)
    found = check(read(tmp_path / "elsewhere"), against)
    assert found.failed == []
    assert any("another environment: Other CPU, torch 2.12 / Toy CPU" in line for line in found.notes)


def test_what_is_not_comparable_is_named(folder, tmp_path):
    """
    Other documents fail, and so does a cell that is gone, unless told not to; then they are named.
    """
    save(folder, "int4")
    save(folder, "int8")
    other = tmp_path / "other"
    save(other, "int4", documents={3: "altered"})

    found = check(read(other), read(folder))

    altered = "toy int4 none qa acc: 1 of 400 documents differ, first doc_id 3 (another document)"
    gone = ["toy fp16 none qa: no finished cell here", "toy int8 none qa: no finished cell here"]
    assert (found.compared, found.skipped, found.failed) == (0, [], [altered, *gone])
    lenient = check(read(other), read(folder), ["worse"])
    assert (lenient.failed, lenient.skipped) == ([], [altered, *gone])
    assert len(check(read(other), read(folder), ["skipped"]).failed) == 3


def test_a_baseline_file_is_a_line_a_metric(folder, tmp_path):
    """
    It can be read in a diff: one line changes where one number does, and the checksum; what is no such file is refused.
    """
    save(folder, "int4")
    write(read(folder), tmp_path / "before.json")
    save(folder, "int4", changed(12))
    write(read(folder), tmp_path / "after.json")

    before, after = ((tmp_path / name).read_text().splitlines() for name in ("before.json", "after.json"))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(NotARunError, match=r"is no baseline file .*kvbench check DIR --write"):
        read(tmp_path / "other.json")


def test_a_number_without_its_samples_fails(folder, tmp_path):
    """
    A record whose metric was changed, and not its samples, is no equal copy.
    """
    save(folder, "int4")
    copy = tmp_path / "copy"
    save(copy, "int4", value=0.73)
    save(copy, "fp16")

    (line,) = check(read(copy), read(folder)).failed

    assert line.startswith("toy int4 none qa acc: it is no mean over documents")


# ---- show


def test_flips_are_listed_with_both_answers(folder):
    """
    Each document that moved, with what the baseline and the cell said.
    """
    save(folder, "int4", changed(2, 1))

    found = flips(*named(cell(folder, "int4")))

    assert found.title == "toy · qa · int4 · none against fp16 · none: acc 3 of 400"
    assert [(row.doc_id, row.before, row.after, row.baseline_answer, row.answer) for row in found.rows] == [
        ("0", 1.0, 0.0, "'answer 1'", "'answer 0'"),
        ("1", 1.0, 0.0, "'answer 1'", "'answer 0'"),
        ("7", 0.0, 1.0, "'answer 0'", "'answer 1'"),
    ]


def test_answers_of_another_type_are_one_line(folder):
    """
    Samples whose answers are numbers, as none of kvbench's are, end in their file's name.
    """
    save(folder, "int4", changed(2, 1))
    path = cell(folder, "int4")
    pd.read_parquet(path / "samples.parquet").assign(resps=5).to_parquet(path / "samples.parquet")
    row = json.loads((path / "record.json").read_text())
    row["sha256"]["samples"] = file_checksum(path / "samples.parquet")
    (path / "record.json").write_text(json.dumps(row))

    with pytest.raises(NotARunError, match=r"samples\.parquet holds answers that cannot be read \('int' object"):
        flips(*named(path))


def test_the_baseline_itself_has_no_flips(folder):
    """
    It is said that this is the baseline, and which cell to pass instead.
    """
    with pytest.raises(NotComparableError, match=r"is the baseline itself.*: the sweep has no other finished cell"):
        flips(*named(cell(folder, "fp16")))
    save(folder, "again")
    save(folder, "int4")
    with pytest.raises(NotComparableError, match=r"is the baseline itself.*: pass a cell .* such as toy-int4-none-qa-"):
        flips(*named(cell(folder, "fp16")))


def test_flips_of_other_documents_are_refused(folder):
    """
    A cell without a baseline over its documents has no flips, nor has what is no cell.
    """
    save(folder, "int4", documents={3: "altered"})

    with pytest.raises(NotComparableError, match="first doc_id 3"):
        flips(*named(cell(folder, "int4")))
    save(folder, "int8", task="other")
    with pytest.raises(NotComparableError, match="no baseline cell"):
        flips(*named(cell(folder, "int8", "other")))
    with pytest.raises(FileNotFoundError, match="neither a run folder nor a cell"):
        named(folder)


def test_cells_are_chosen_by_pattern(folder):
    """
    A dtype by its short name or a pattern, several keys together; controls and the baseline only where they are meant.
    """
    for dtype in ("int4_per_token_head", "int4_per_token_head+w64s4", "int8_per_token_head", "again"):
        save(folder, dtype)
    measured = read(folder)

    def dtypes(*patterns):
        return sorted(one.dtype for one in choose(measured, patterns))

    assert dtypes() == dtypes("task=q*") == ["int4_per_token_head", "int4_per_token_head+w64s4", "int8_per_token_head"]
    assert dtypes("dtype=int4") == ["int4_per_token_head"]
    assert dtypes("dtype=int4*", "task=qa") == ["int4_per_token_head", "int4_per_token_head+w64s4"]
    assert dtypes("dtype=int8", "dtype=int4") == ["int4_per_token_head", "int8_per_token_head"]
    assert dtypes("dtype=again") == ["again"]
    with pytest.raises(ValueError, match=r"dtype=int3 matches no cell; there are again, fp16, int4_per_token_head, "):
        dtypes("dtype=int3")
    with pytest.raises(ValueError, match=r"'int4': expected KEY=PATTERN with KEY one of model, dtype, rotation, task"):
        dtypes("int4")


def test_a_tasks_own_limit_is_in_every_row(folder):
    """
    What the YAML cut a task to stands in each row of `compare`, beside `--limit`'s of the report.
    """
    limited = {"task": {"limit": 300}}
    for dtype in ("fp16", "int4"):
        save(folder, dtype, identity=limited)
    measured = read(folder)

    assert {row["task_limit"] for row in document(measured, compare(measured)).rows} == {300}
