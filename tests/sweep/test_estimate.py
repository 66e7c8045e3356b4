"""How long a sweep takes that nobody has run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvbench.sweep import command, estimate
from kvbench.sweep.estimate import Rates, seconds
from kvbench.sweep.parts import Share
from kvbench.sweep.plan_document import plan_document
from kvbench.tasks import make_task
from kvbench.tasks.base import Work


def test_prompts_cost_operations_and_answers_reads():
    """Two operations a weight and token read; all weights read once for each token of 64 answers at a time."""
    rate = Rates(flops=1e9, bytes=1e8)

    assert seconds(Work(1000), 10**6, 4, rate) == pytest.approx(2.0)
    assert seconds(Work(0, 64, 50), 10**6, 4, rate) == pytest.approx(50 * 4e6 / 1e8)
    assert seconds(Work(0, 65, 50), 10**6, 2, rate) == pytest.approx(2 * 50 * 2e6 / 1e8)


def test_rates_are_those_of_the_machine():
    """A matrix product does more than it reads, in less time than a person waits."""
    found = estimate.rates("cpu", torch.float32)

    assert found.flops > found.bytes > 1e6


@pytest.mark.parametrize(
    ("spec", "work"),
    [
        ({"task": "divergence", "tokens": 2048, "context": 1024}, Work(2048)),
        ({"task": "divergence", "tokens": 4096, "context": 1024, "limit": 3}, Work(3072)),
        ({"task": "needle", "contexts": [1024, 2048], "depths": 2, "per_cell": 3}, Work(6 * 3072, 12, 16)),
        ({"task": "needle", "contexts": [1024, 2048], "depths": 2, "per_cell": 3, "limit": 8}, Work(10240, 8, 16)),
        ({"task": "throughput", "batch": 3, "prompt": 100, "new": 20, "repeats": 4}, Work(1500, 15, 20)),
    ],
    ids=lambda value: value["task"] if isinstance(value, dict) else "",
)
def test_our_tasks_say_what_they_compute(spec, work):
    """Tokens read and answers given, by the options alone, as a limit leaves them."""
    assert make_task(spec, None).work() == work


def test_lm_evals_tasks_say_it_where_their_rows_are_here(tmp_path):
    """GSM8K's prompts by the letters of its rows, once more for each shot; nothing without the rows."""
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": "q" * 100, "answer": "a" * 75, "number": 5}] * 4
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"task": "gsm8k", "num_fewshot": 5, "limit": 3}

    assert make_task(spec, tmp_path).work() == Work(6 * 3 * 50, 3, 256)
    assert make_task({**spec, "num_fewshot": 0, "limit": 2}, tmp_path).work() == Work(100, 2, 256)
    assert make_task(spec, tmp_path / "none").work() is None


@pytest.fixture
def plan(toy, tmp_path, monkeypatch):
    """The plan's lines of a toy sweep whose model has so many weights, at 1e9 operations a second; may run it first."""
    monkeypatch.setattr(estimate, "rates", lambda *_: Rates(1e9, 1e8))

    def lines(*tasks, weights=10**6, run=False):
        parts = replace(toy.PARTS, find_model=lambda spec: replace(toy.find_model(spec), parameters=weights))
        config = toy.write_config(tmp_path / "toys.yaml", tasks=list(tasks), dtypes=["fp16"], canary=False)
        options = command.Options(output=tmp_path / "out")
        if run:
            assert command.run_sweep(config, replace(options, skip=["dtype=again"]), parts) == command.OK
        return plan_document(command.prepare(config, options, parts)).notes

    return lines


def test_a_plan_says_which_gpu_has_what(toy, tmp_path):
    """
    Of a model that is spread: layers, weights, and by the GPU with the least room a layer how many tokens fit.
    """
    shares = [Share(0, range(1), 3 * 2**30, 5 * 2**30), Share(1, range(1, 3), 2 * 2**30, 6 * 2**30)]
    parts = replace(toy.PARTS, divide=lambda spec, dtype: shares)
    model = {"name": "toy", "device_map": "auto"}
    config = toy.write_config(tmp_path / "toys.yaml", model=model, dtypes=["fp16"], canary=False, again=False)
    prepared = command.prepare(config, command.Options(output=tmp_path / "out"), parts)
    document = plan_document(prepared, parts=parts)

    assert document.notes[2:5] == [
        "memory: 5.0 GiB of weights (toy) over 2 GPUs, and the KV cache of the table",
        "  GPU 0: layers 0 to 0, 3.0 GiB of the 5.0 that are free",
        "  GPU 1: layers 1 to 2, 2.0 GiB of the 6.0 that are free",
    ]
    column = [" ".join(one.lines) for one in document.sections[0].columns].index("tokens that fit")
    assert document.sections[0].rows[0][column] == f"{2**30 // (2 * 2 * 2 * 64):,}"  # 1 GiB for one layer in 16 bits


LONG = {"task": "toy_a", "tokens": 1000}  # 50 documents: 100 seconds a cell, of which there are two


def test_a_plan_says_time_and_memory(plan):
    """An estimate is marked, and more than an hour is warned of."""
    lines = plan(LONG)

    assert lines[1] == (
        "time: about 0:03:20 (± a factor of 3: 0:01:07 to 0:10:00), "
        "estimated by parameters, tokens and the speed of this cpu just now"
    )
    assert lines[2] == "memory: 0.0 GiB of weights (toy), and the KV cache of the table"
    lines = plan({**LONG, "tokens": 20_000})
    assert lines[1].startswith("time: about 1:06:40 (± a factor of 3: ")
    assert lines[2] == "WARNING: more than an hour; --limit N, --only or --skip makes it shorter"


def test_what_cannot_be_estimated_is_said(plan):
    """A task that does not say what it computes, and a model whose weights were not counted."""
    some = plan(LONG, "toy_b")
    assert some[1].startswith("time: about 0:03:20 (± a factor of 3")
    assert some[2] == "  and unknown until a cell is done of toy_b"
    lines = plan(LONG, weights=None)
    assert lines[1] == "time: unknown until a cell is done of toy_a"
    assert not any(line.startswith("memory") for line in lines)


def test_what_was_measured_goes_before_what_was_estimated(plan):
    """Once a cell of a task is done, its other cells are expected to take as long."""
    line = plan(LONG, run=True)[1]
    assert line.startswith("time: about 0:00:0")
    assert line.endswith(", by the cells done before")
    _, other, line, *_ = plan({**LONG, "limit": 9}, {**LONG, "task": "toy_b"})
    assert other == "toy_a: 1 cell is done with another task.limit, and does not count"
    assert line.startswith("time: about 0:03:2")
    assert "(± a factor of 3: 0:01:0" in line
    assert ", by the cells done before and estimated by parameters, tokens and the speed of this cpu" in line
