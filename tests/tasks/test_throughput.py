"""Tokens per second are those of the requests that were made, and nothing is said of accuracy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbench.cache import OutOfPages
from kvbench.calibration import Calibration
from kvbench.measured import read
from kvbench.report.compare import compare
from kvbench.report.comparison_text import noise_floor
from kvbench.report.labels import notes_of
from kvbench.report.tables import Report
from kvbench.results import Store
from kvbench.runners import catalog, facts, model_files
from kvbench.runners.base import GenerateRequest
from kvbench.runners.calibrate import _drawn
from kvbench.runners.load import NoTokenizer
from kvbench.runners.toy import ToyRunner
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.command import Options, run_sweep
from kvbench.tasks import RunContext, make_task, throughput
from kvbench.tasks.throughput import _longest

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
CONTEXT = RunContext(lambda key, compute: {}, lambda done, total: None)


@pytest.fixture
def shape(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(SHAPE))
    return file


class Recorder(ToyRunner):
    """A toy that keeps what it is asked, and says that it took ever longer."""

    def __init__(self):
        super().__init__()
        self.asked = []
        self.counted = dict.fromkeys(("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds"), 0)

    def generate(self, requests, progress=None):
        self.asked.append(requests)
        self.counted["prefill_tokens"] += sum(len(request.prompt) for request in requests)
        self.counted["prefill_seconds"] += 2 ** len(self.asked)
        self.counted["decode_tokens"] += sum(request.max_new_tokens - 1 for request in requests)
        self.counted["decode_seconds"] += 10 * len(self.asked)
        return super().generate(requests, progress)

    def stats(self):
        return {**self.counted, "kv_bytes_per_token": 7}


def test_a_rate_is_tokens_over_seconds():
    """
    Those that the runner counted in each repeat, and none of the pass before; the median of the repeats.
    """
    task = make_task({"task": "throughput", "prompt": 20, "new": 64, "batch": 3, "repeats": 3})
    outcome = task.run(Recorder(), CONTEXT)

    assert [(metric.name, metric.unit, metric.n, metric.value) for metric in outcome.metrics] == [
        ("prefill", "tokens/s", 3, 3 * 20 / 2**3),
        ("decode", "tokens/s", 3, 3 * 63 / 30),
    ]
    assert [row["decode_seconds"] for row in outcome.samples] == [20, 30, 40]


def test_no_prompt_is_asked_twice():
    """
    A runner that remembers prefixes finds none: every prompt of every repeat, the first pass's too, is new.
    """
    runner = Recorder()
    make_task({"task": "throughput", "prompt": 20, "new": 64, "batch": 3, "repeats": 2}).run(runner, CONTEXT)
    prompts = [request.prompt for requests in runner.asked for request in requests]

    assert len(prompts) == len({prompt[:10] for prompt in prompts}) == 3 * 3
    assert {len(prompt) for prompt in prompts} == {20}


def test_no_answer_ends_before_its_length(shape):
    """
    An end token is a token like another: a scheme that brings it up at once was counted as a slow one.
    """

    class Ending(NoTokenizer):
        eos_token_id = 7

    loaded = TransformersModel.load(catalog.resolve(str(shape)))
    loaded.tokenizer = Ending(SHAPE["vocab_size"])
    loaded.model.lm_head.register_forward_hook(lambda head, args, out: out.index_fill(-1, torch.tensor([7]), 1e3))
    task = make_task({"task": "throughput", "prompt": 20, "new": 8, "batch": 3, "repeats": 1})
    outcome = task.run(loaded.runner(Scheme.parse("fp16")), CONTEXT)

    assert outcome.samples[0]["decode_tokens"] == 3 * 7


@pytest.mark.parametrize("scheme", ["int4_centered_window", "tiers421_centered_window"])
def test_a_scheme_that_learns_is_timed_on_a_shape(shape, scheme):
    """
    Of random tokens, for a shape has no tokenizer: the speed is that of the same kernels on the same bytes.
    """
    loaded = TransformersModel.load(catalog.resolve(str(shape)))
    task = make_task({"task": "throughput", "prompt": 150, "new": 8, "batch": 2, "repeats": 1})
    outcome = task.run(loaded.runner(Scheme.parse(scheme)), CONTEXT)

    assert outcome.samples[0]["decode_tokens"] == 2 * 7


def test_a_shape_learns_from_few_tokens(shape):
    """
    What it learns says nothing: half a minute for a text of 8192 tokens would be waited for in vain.
    """
    documents = _drawn(TransformersModel.load(catalog.resolve(str(shape))), Calibration())

    assert [len(document) for document in documents] == [SHAPE["max_position_embeddings"]] * 2


def test_a_runner_that_counts_nothing_is_refused():
    """
    No rate is made up from other times.
    """
    with pytest.raises(ValueError, match="counts no tokens and seconds"):
        make_task({"task": "throughput", "prompt": 20}).run(ToyRunner(), CONTEXT)


def test_a_request_beyond_the_model_is_refused():
    """
    With the numbers, before anything runs.
    """
    with pytest.raises(ValueError, match=r"4128 tokens are more than the model's 4096"):
        make_task({"task": "throughput", "prompt": 4000}).run(Recorder(), CONTEXT)


def test_the_smaller_limit_is_the_longest_context(shape):
    """
    What memory holds counts as far as the runner takes it as one sequence; the model's positions where they are fewer.
    """
    runner = TransformersModel.load(catalog.resolve(str(shape))).runner(Scheme.parse("int4"), page_size=16)
    assert _longest(runner, 10_000, 256) == (256, "the model's positions")
    longest, limit = _longest(runner, 160, 256)
    assert (longest, limit) == (144, "memory")

    runner.memory.limits = replace(runner.memory.limits, memory=1.0)
    free = 160 * runner.scheme.resolve(torch.float32).token_bytes(runner.info.layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.runners.transformers.memory.free_memory", lambda _: free)
        runner.generate([GenerateRequest(tuple(range(longest - 4)), 4)])
        runner.memory.release()
        with pytest.raises(OutOfPages):
            runner.generate([GenerateRequest(tuple(range(longest - 3)), 4)])


def test_a_shape_is_a_model_of_random_weights(shape):
    """
    Named as such; the same weights each time, in the compute dtype; its generated answers have their whole length.
    """
    source = catalog.resolve(str(shape))
    loaded, again = (TransformersModel.load(source, "bfloat16") for _ in range(2))
    weights = list(loaded.model.parameters())

    assert loaded.info.name == "tiny (random weights)"
    assert loaded.info.revision == facts.revision(source)
    assert loaded.info.revision.startswith("random-")
    assert loaded.info.layers == facts.shape(source)[0] == ((2, 32),) * 2
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(weights, again.model.parameters(), strict=True))
    assert torch.std(loaded.model.lm_head.weight.float()) == pytest.approx(0.02, rel=0.05)
    with pytest.raises(model_files.ModelError, match="has no tokenizer: run the task throughput"):
        loaded.tokenizer.encode("words")


def test_a_sweep_over_a_shape(shape, tmp_path):
    """
    Each scheme is timed through the real runner; the table says random weights and has no accuracy; other tasks fail.
    """
    config = {
        "name": "tiny",
        "model": str(shape),
        "dtypes": ["fp16", "int4"],
        "schemes": ["int4_centered"],
        "canary": False,
        "tasks": [
            {"task": "throughput", "prompt": 32, "new": 64, "batch": 2, "repeats": 1},
            {"task": "needle", "contexts": [256]},
        ],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    assert run_sweep(tmp_path / "tiny.yaml", Options(output=tmp_path / "run")) == 3
    records = Store(tmp_path / "run").load().records.values()
    table, *_ = Report.read(tmp_path / "run").tables()

    assert {(one.task, one.status) for one in records} == {("throughput", "done"), ("needle", "failed")}
    assert all("has no tokenizer" in one.error for one in records if one.task == "needle")
    assert all(
        Store(tmp_path / "run").samples(one.cell)["decode_tokens"].tolist() == [2 * 63]
        for one in records
        if one.task == "throughput"
    )
    assert table.title.startswith("tiny (random weights) · ")
    gpu = torch.cuda.is_available()
    memory = ["memory_holds (tokens)", "longest_context (tokens)"] if gpu else []
    assert [header.lines[1] for header in table.columns[5:]] == ["prefill (tokens/s)", "decode (tokens/s)", *memory]
    repeats = [f"again {seed} of int4_per_token_head" for seed in (1, 2)]  # of the needle alone, which failed
    assert [row[0] for row in table.rows] == ["fp16", "again", "int4_per_token_head", *repeats, "int4_per_token_head"]
    assert any("from random tokens (" in note for note in table.notes)
    [noise] = noise_floor(compare(read(tmp_path / "run")))
    rates = {one.dtype: {metric.name: metric.value for metric in one.metrics} for one in records if one.metrics}
    moved = 100 * (rates["again"]["decode"] / rates["fp16"]["decode"] - 1)
    assert f"throughput decode {'−' if moved < 0 else '+'}{abs(moved):.2f} %" in noise
    options = [one.identity["task"] for one in records if one.task == "throughput"]
    assert {(one["device"], one["attention"], one["page_size"]) for one in options} == {
        (torch.cuda.get_device_name() if gpu else "cpu", "auto", 16)
    }
    assert all("page_size" not in one.identity["task"] for one in records if one.task == "needle")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's memory")
def test_what_the_memory_holds_was_allocated(shape):
    """
    A quarter of the bits, about four times the tokens; all of them fit what was free.
    """
    loaded = TransformersModel.load(catalog.resolve(str(shape)), "bfloat16", "cuda")
    found = {}
    for name in ("fp16", "int4"):
        task = make_task({"task": "throughput", "prompt": 32, "new": 64, "batch": 2, "repeats": 1})
        outcome = task.run(loaded.runner(Scheme.parse(name)), CONTEXT)
        (found[name],) = [metric.value for metric in outcome.metrics if metric.name == "memory_holds"]
        assert outcome.facts["allocated_tokens"] >= found[name] > 0

    bits = [Scheme.parse(name).bits_per_value(32) for name in ("fp16", "int4")]
    assert found["int4"] / found["fp16"] == pytest.approx(bits[0] / bits[1], rel=0.02)


@pytest.mark.parametrize(("slower", "told"), [(0.93, False), (1.02, False), (1.23, True)])
def test_rates_of_two_states_of_a_gpu_are_told(slower, told):
    """
    Where an empty kernel of a graph took a fifth longer in one cell than in another, of a dtype too, the table says in
    which; what one state varies by is no note.
    """
    store = Store(Path(__file__).parents[2] / "results" / "throughput")
    [first, *_] = store.load().records.values()
    cells = (("fp16", "none", 0.89), ("int4", "none", slower), ("int4", "hadamard", 0.89))
    notes = notes_of(
        [replace(first, dtype=d, rotation=r, facts={**first.facts, "kernel_us": us}) for d, r, us in cells]
    )

    said = [note for note in notes if "two states" in note]
    assert [note.rpartition("took ")[2] for note in said] == [f"0.89 µs, but 1.23 (int4 · none · {first.task})"] * told


def test_a_gpus_state_stands_beside_what_its_memory_holds(monkeypatch):
    """
    Each sample has the microseconds of an empty kernel behind it, and the cell's facts their median. Its graph is made
    before the first answers: a graph's making frees memory, which the first sample would have to ask for again.
    """

    class Paging(Recorder):
        page_size = 16

        def longest_sequence(self, pages):
            return pages * self.page_size

    class Memory(throughput._Memory):
        def tokens(self):
            self.facts = {"allocated_tokens": 320}
            return 320

    found = iter([0.9, 1.2, 0.91])
    monkeypatch.setattr(throughput, "_Memory", Memory)
    monkeypatch.setattr(throughput, "_kernel_us", lambda runner: None if runner.asked else lambda: next(found))
    outcome = make_task({"task": "throughput", "prompt": 20, "new": 64, "batch": 3}).run(Paging(), CONTEXT)

    assert [row["kernel_us"] for row in outcome.samples] == [0.9, 1.2, 0.91]
    assert outcome.facts == {"allocated_tokens": 320, "longest_context_limit": "memory", "kernel_us": 0.91}


def test_of_several_gpus_the_slowest_kernel_counts(monkeypatch):
    """
    A model that is spread waits for it in every step: one GPU in the slow state is seen, whichever it is.
    """

    class Chained:
        def __init__(self, device, kernels):
            self.kernel_us = lambda: (1.24, 0.89)[device.index]

    monkeypatch.setattr("kvbench.runners.settle.Chain", Chained)
    runner = Recorder()
    runner.devices = (torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cuda", 0))

    assert throughput._kernel_us(runner)() == 1.24
