"""The page of a sweep: its answer follows from the verdicts, its pictures and lists from the records."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvbench.render import Plot, Table, render
from kvbench.report.documents import hash_of, texts
from kvbench.report.page import page
from kvbench.report.page.answer import answer, cautions, chosen
from kvbench.report.page.found import Scheme, difference_and_interval
from kvbench.report.tables import Report
from kvbench.report.verdicts import Comparison
from kvbench.results import Metric, Record, Store, name_of

RESULTS = Path(__file__).parents[2] / "results"


def scheme(dtype, bits, *verdicts):
    rows = [
        Comparison(
            "toy", dtype, "none", f"task{place}", "acc", "fp16", difference=-0.02, ci_low=-0.03, ci_high=-0.01,
            unit="share", n=400, p_holm=1e-9, margin=0.01, verdict=verdict,
            n_to_decide=900 if verdict == "INCONCLUSIVE" else None,
        )
        for place, verdict in enumerate(verdicts)
    ]  # fmt: skip
    return Scheme("toy", dtype, "none", bits, bits * 16, 0, dtype == "fp16", rows)


def found(*schemes):
    every = [scheme("fp16", 16.0), *schemes]
    return SimpleNamespace(
        models=["toy"],
        schemes=every,
        baseline=lambda model: every[0],
        task=lambda row: row.task,
        rows=[row for one in schemes for row in one.rows],
        comparisons=SimpleNamespace(again=[], family=[row for one in schemes for row in one.rows]),
        longest=1024,
    )


EQUIVALENT, WORSE, OPEN = "EQUIVALENT", "WORSE", "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("schemes", "name"),
    [
        ([("int8", 8, EQUIVALENT, OPEN), ("int4", 4, EQUIVALENT, EQUIVALENT), ("int2", 2, WORSE, OPEN)], "int4"),
        # the surer one, though a smaller one is WORSE in nothing
        ([("int8", 8, EQUIVALENT, EQUIVALENT), ("int4", 4, EQUIVALENT, OPEN)], "int8"),
        ([("int8", 8, EQUIVALENT, OPEN), ("int4", 4, OPEN, OPEN), ("int2", 2, EQUIVALENT, WORSE)], "int4"),
        # one that was asked less does not win by that
        ([("int8", 8, EQUIVALENT, EQUIVALENT), ("int2", 2, EQUIVALENT)], "int8"),
        ([("int8", 8, EQUIVALENT, WORSE), ("int4", 4, WORSE, WORSE)], None),
        # a floor says nothing, and keeps nothing from being equivalent
        ([("int4", 4, EQUIVALENT, "NOT-DISCRIMINATIVE"), ("int2", 2, WORSE, "NOT-DISCRIMINATIVE")], "int4"),
    ],
)
def test_the_answer_is_the_smallest_cache_without_a_loss(schemes, name):
    """
    EQUIVALENT in all that could tell goes before WORSE in none; where each is WORSE somewhere there is no answer.
    """
    best = chosen(found(*(scheme(*one) for one in schemes)), "toy")

    assert (best and best.dtype) == name


def test_the_answer_in_sentences():
    """
    What is chosen, what it saves, what is open, and what the next size down costs, with intervals.
    """
    sentences = answer(
        found(scheme("int8", 8, EQUIVALENT, OPEN), scheme("int2", 2, WORSE, OPEN), scheme("fp8", 8, WORSE))
    ).lines

    assert sentences == [
        "Answer: of the 2 schemes measured on every task, the smallest cache without a measurable loss is int8, with "
        "8.00 bits a value: WORSE than fp16 in none of 2 comparisons, but not EQUIVALENT in all (1 EQUIVALENT, 1 "
        "INCONCLUSIVE).",
        "Left out, as measured on fewer tasks: fp8. Of these fp8 (8.00 bits a value) looks best on what it has: 1 "
        "WORSE in task0.",
        "Size: int8 takes 0 MiB in place of 0 for one sequence of 1024 tokens, 0.1 KiB a token in place of 0.2: "
        "2.00 × smaller.",
        "Uncertain: 1 of its comparisons could not be decided: task1 acc −2.0 pp [−3.0, −1.0] would need 900 documents "
        "and has 400 (verdicts are corrected for 5 comparisons by Holm, intervals are not).",
        "Next size down: int2 (2.00 bits a value) is WORSE in 1 of 2 comparisons: task0 acc −2.0 pp [−3.0, −1.0] "
        "(p = 1e-09).",
    ]


def test_a_loss_of_a_share_says_of_how_much():
    """
    `from 42.1 % to 0.0 %`: a reader sees whether anything is left. What is not listed is counted, distances too.
    """
    one = scheme("int4", 4, WORSE, WORSE, WORSE)
    rows = [replace(one.rows[0], baseline=0.421, value=0.0), *(replace(row, unit="nats") for row in one.rows[1:])]

    told = answer(found(scheme("int8", 8, *[EQUIVALENT] * 3), replace(one, rows=rows))).lines[-1]

    assert "task0 acc from 42.1 % to 0.0 %, −2.0 pp [−3.0, −1.0] (p = 1e-09); and 2 more." in told


def test_an_answer_that_is_none_says_what_comes_nearest():
    """
    Where every smaller cache loses something, the first sentence says so, and where the best of them loses.
    """
    first = answer(found(scheme("int8", 8, WORSE, EQUIVALENT), scheme("int4", 4, WORSE, WORSE))).lines[0]

    assert first == (
        "Answer: none without a measurable loss: every cache smaller than fp16 is WORSE in something. Nearest comes "
        "int8 (8.00 bits a value): 1 EQUIVALENT, 1 WORSE of 2 comparisons. WORSE in task0 acc −2.0 pp [−3.0, −1.0] "
        "(p = 1e-09)."
    )


def test_an_answer_that_is_none_counts_only_what_was_measured_whole():
    """
    A scheme of fewer tasks, WORSE in nothing, is named beside "none", not contradicted by it; lists add up.
    """
    first, left, *_ = answer(
        found(scheme("int8", 8, *[WORSE] * 5), scheme("int4", 4, *[WORSE] * 5), scheme("fp8", 8, OPEN, OPEN))
    ).lines

    assert first.startswith(
        "Answer: of the 2 schemes measured on every task, none is without a measurable loss: each is WORSE than fp16 "
        "in something. Nearest comes int4 (4.00 bits a value): 5 WORSE of 5 comparisons. WORSE in task0 acc"
    )
    assert first.endswith("; and 2 more.")
    assert left == (
        "Left out, as measured on fewer tasks: fp8. Of these fp8 (8.00 bits a value) looks best on what it has: "
        "2 INCONCLUSIVE in task0, task1."
    )


def test_a_perplexity_millions_of_times_as_large_is_no_percentage():
    """
    A relative difference from × 11 on is a factor, its interval too; below it is a percentage.
    """
    row = Comparison("toy", "int2", "none", "text", "perplexity", "fp16", difference=1.5e7 - 1, unit="relative",
                     ci_low=1.2e7 - 1, ci_high=1.9e7 - 1, verdict="WORSE")  # fmt: skip

    assert difference_and_interval(row) == "× 1.5e7 [× 1.2e7, × 1.9e7]"
    assert difference_and_interval(replace(row, difference=0.5, ci_low=0.4, ci_high=0.6)) == "+50.00 % [+40.00, +60.00]"


def test_the_page_of_a_partial_sweep_says_so_first(qwen):
    """
    What was not run stands above the numbers; so does up to which context accuracy was measured, and whose speed it is.
    """
    told, cautions = qwen.sections[:2]
    assert cautions.lines[0] == "86 cells done, 0 failed, 54 of the sweep not run."
    assert "needle up to 8192 tokens; nothing here says what a cache loses at 32768." in told.lines[-1]
    assert "32 query and 8 KV heads (this model: 2 KV heads)" in told.lines[-2]
    assert "Speed at 32768 tokens: " in told.lines[-2]
    assert "32 sequences: fp16 " in told.lines[-2]


def test_no_speed_of_unlike_tasks_and_needles_open_on_a_loss(qwen):
    """
    The table of costs has no tokens a second; the needles' first picture is of the scheme that finds least.
    """
    cost = part(qwen, "Cost of all cells")
    assert not any("tokens/s" in column.lines for column in cost.columns)
    assert all(len(row) == len(cost.columns) for row in cost.rows)
    shares = [sum(point["value"] for point in view.points) for view in part(qwen, "Needles by length and depth").views]
    assert shares[0] == min(shares) < shares[-1]


@pytest.mark.parametrize(
    ("extra", "warned"),
    [({"model_type": "gpt_oss", "key_bias": True}, True), ({"model_type": "qwen2", "key_bias": False}, False),
     ({"model_type": "qwen2"}, True), ({"model_type": "llama"}, False), ({}, False)],
)  # fmt: skip
def test_a_bias_of_keys_is_warned_of_where_the_weights_have_one(extra, warned):
    """
    What was seen when the model was loaded decides; records from before that go by the architecture.
    """
    record = SimpleNamespace(
        model={"name": "toy", "extra": extra}, dtype="int4", rotation="none", bits_per_value=4.25, status="done",
        canary=False, again=False, kernel=False, timings={},
    )  # fmt: skip
    found = cautions(SimpleNamespace(records=[record]))

    assert bool(found and "Keys of toy have a bias" in found.lines[0]) == warned


def test_what_rounding_alone_moves_does_not_count():
    """
    Where an exact cache under a rotation is WORSE too, a loss in that metric is no loss of the small cache's.
    """
    turned = replace(scheme("fp16", 16.0, EQUIVALENT, WORSE), rotation="hadamard", baseline=False)
    both = found(turned, scheme("int8", 8, EQUIVALENT, WORSE), scheme("int4", 4, WORSE, WORSE))

    assert chosen(both, "toy").dtype == "int8"
    assert answer(both).lines[0] == (
        "Answer: the smallest cache without a measurable loss is int8, with 8.00 bits a value: EQUIVALENT to fp16 in "
        "all 1 comparisons that could tell. Left out: task1 acc, where an exact cache under a rotation is WORSE too, "
        "by rounding alone."
    )


@pytest.fixture(scope="module")
def qwen():
    return page(Report.read(RESULTS / "qwen", RESULTS / "kernels-h100"))


def part(document, title):
    return next(one for one in document.sections if one.title == title)


def test_a_picture_holds_the_numbers_of_the_comparison(qwen):
    """
    Size against loss of GSM8K: int4's loss in points with its interval, both turned so that up is worse.
    """
    plot = part(qwen, "Size against loss")
    assert isinstance(plot, Plot)
    view = next(one for one in plot.views if one.choice["metric"] == "gsm8k exact_match,strict-match")
    point = next(one for one in view.points if one["label"] == "int4")

    assert (point["x"], round(point["y"], 1), point["mark"]) == (4.25, 42.1, "worse")
    assert point["low"] < point["y"] < point["high"]
    assert plot.views[0].y.log
    assert all(one["y"] > 0 for one in plot.views[0].points)


def test_a_frontier_has_no_point_below_and_left_of_another(qwen):
    """
    Along the frontier, from small to large caches, each loses less than the one before, and none beside it is better.
    """
    for view in part(qwen, "Size against loss").views:
        front = sorted((one["x"], one["y"]) for one in view.points if one.get("front"))
        assert [y for _, y in front] == sorted({y for _, y in front}, reverse=True)
        for point in view.points:
            assert any(x <= point["x"] and y <= point["y"] for x, y in front)


def test_flipped_answers_lie_behind_their_row(qwen):
    """
    Of each scheme and metric some documents that moved, with what both caches answered; losses and gains as counted.
    """
    table = part(qwen, "Answers that flipped")
    assert isinstance(table, Table)
    rows = {tuple(row[:3]): (row, details) for row, details in zip(table.rows, table.details, strict=True)}
    row, details = rows["int8_per_token_head", "gsm8k", "exact_match,strict-match"]

    assert (row[3], row[4], row[5]) == ("77", "73", "1319")
    assert len(details) == 12
    kinds = [tuple(name.rpartition(": ")[2] for name in list(item)[1:]) for item in details]
    assert set(kinds) == {("right", "wrong"), ("wrong", "right")}


def test_a_window_costs_its_ring_at_every_length():
    """
    int4 with a window of 64 tokens and 4 sinks: 4.51 bits at 8192 tokens, whose ring weighs less at 32768.
    """
    table = part(page(Report.read(RESULTS / "schemes-qwen")), "Memory and speed")
    rows = [row for row in table.rows if row[0].startswith("int4_per_token_head")]
    windowed = next(row for row in rows if "+w64s4" in row[0])
    plain = next(row for row in rows if "+w64s4" not in row[0])

    short, long = (float(windowed[place].value - plain[place].value) for place in (2, 3))
    assert short == long > 0
    assert abs(windowed[2].value * 8 / (8192 * 28672 / 2) - 4.51) < 0.01


def test_texts_are_found_by_lm_evals_hash_of_a_document(tmp_path):
    """
    A row of a data set's file is the document that samples name, by the hash that lm-eval takes of it.
    """
    from lm_eval.utils import handle_non_serializable, hash_string

    row = {"question": "Wie viel ist 2 × 3?", "choices": ["5", "6"], "answer": 1}
    (tmp_path / "toy" / "sums").mkdir(parents=True)
    (tmp_path / "toy" / "sums" / "test.jsonl").write_text(json.dumps(row) + "\n")
    whole = hash_string(json.dumps(row, indent=2, default=handle_non_serializable, ensure_ascii=False))
    record = SimpleNamespace(facts={"data": {"sums": "mirror: toy/sums"}})

    assert hash_of(row) == whole[:16]
    assert texts([record], tmp_path) == {
        whole[:16]: {"question": "Wie viel ist 2 × 3?", "choices": '["5", "6"]', "answer": "1"}
    }


@pytest.mark.slow
def test_300_cells_are_a_page_of_3_mb_in_5_seconds(tmp_path):
    """
    25 schemes on 12 tasks of 300 documents, each with an answer of 500 characters: under 3 MB, in under 5 s of CPU.
    """
    random, store = np.random.default_rng(0), Store(tmp_path)
    dtypes = ["fp16", *(f"int{place}" for place in range(1, 25))]
    for dtype in dtypes:
        for task in range(12):
            save(store, dtype, f"task{task}", random.random(300) < 0.6)
    store.write_run(
        {
            "sweep": "large",
            "baseline": {"dtype": "fp16", "rotation": "none"},
            "schemes": [{"dtype": dtype, "rotation": "none"} for dtype in dtypes],
            "config": {"name": "large", "margin": "1pp"},
        }
    )

    start = time.process_time()
    text = render(page(Report.read(tmp_path)), "html")
    seconds = time.process_time() - start

    assert len(text.encode()) < 3e6
    assert seconds < 5


def save(store, dtype, task, answers):
    model = {"name": "toy", "revision": "r1", "compute_dtype": "float32"}
    identity = {
        "model": model,
        "scheme": {"dtype": dtype, "rotation": "none"},
        "task": {"task": task},
        "scoring": "fused",
        "seed": 0,
        "limit": None,
    }
    bits = 16.0 if dtype == "fp16" else 2.0 + int(dtype[3:]) / 4
    value, n = float(answers.mean()), len(answers)
    record = Record(
        name_of(f"toy-{dtype}-none-{task}", identity), "done", identity, model, dtype, "none", task, "fused",
        bits, bits * 100, metrics=(Metric("exact_match", value, 0.02, n, "", True, "share"),),
    )  # fmt: skip
    samples = [
        {
            "doc_id": place,
            "doc_hash": hashlib.sha256(f"{task}{place}".encode()).hexdigest()[:16],
            "prompt_hash": f"{place:016}",
            "filter": "none",
            "resps": ["word " * 100],
            "filtered_resps": [f"{place}"],
            "exact_match": float(right),
        }
        for place, right in enumerate(answers)
    ]
    store.save(record, samples)
