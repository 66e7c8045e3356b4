"""The A/A cells measure noise, and nothing but."""

from __future__ import annotations

import pytest

from kvbench.results import Store
from kvbench.runners.base import GenerateRequest, ScoreRequest
from kvbench.runners.toy import ToyRunner
from kvbench.sweep.again import Shuffled
from kvbench.sweep.command import Options, run_sweep

REQUESTS = [ScoreRequest((1, 2, i), (3, i)) for i in range(50)]


class Watched(ToyRunner):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[ScoreRequest]] = []

    def score(self, requests, progress=None):
        self.asked.append(list(requests))
        return super().score(requests, progress)


def test_answers_come_in_the_order_of_the_requests():
    """
    Scores, hidden states and generations are those of the runner itself.
    """
    runner = ToyRunner()
    again = Shuffled(runner, 1)
    documents = [(1, 2, 3), (4, 5), (6, 7, 8, 9)]
    prompts = [GenerateRequest((i, 2), 4) for i in range(7)]

    assert [s.logprobs.tolist() for s in again.score(REQUESTS)] == [s.logprobs.tolist() for s in runner.score(REQUESTS)]
    assert [h.shape[0] for h in again.hidden_states(documents)] == [3, 2, 4]
    assert again.generate(prompts) == runner.generate(prompts)
    assert again.score([]) == []


def test_other_requests_meet_in_a_batch():
    """
    Every request is asked for once, in another order and not all at once: a runner that sorts them makes other batches.
    """
    runner = Watched()

    Shuffled(runner, 1).score(REQUESTS)
    Shuffled(runner, 2).score(REQUESTS)

    first, second, *other = runner.asked
    assert sorted(first + second, key=REQUESTS.index) == REQUESTS
    assert (len(first), len(second)) == (25, 25)
    assert first + second != REQUESTS
    assert other != [first, second]


def test_progress_counts_all_requests():
    """
    Progress goes from the first request to the last, over both lots.
    """
    seen = []

    Shuffled(ToyRunner(), 1).score(REQUESTS, lambda done, total: seen.append((done, total)))

    assert seen == [(i + 1, 50) for i in range(50)]


@pytest.mark.parametrize("again", [True, False])
def test_every_sweep_has_one_unless_it_is_turned_off(toy, tmp_path, again):
    """
    The baseline is measured once more under the next seed, against the same baseline tensors; `again: false` is kept.
    """
    seeds = []

    class Task(toy.ToyTask):
        def run(self, runner, context):
            seeds.append((runner.scheme.dtype_name, context.seed))
            return super().run(runner, context)

    parts = toy.Parts(toy.find_model, toy.fetch_model, toy.open_model, lambda spec, data: Task("toy_a"))
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"], again=again)

    assert run_sweep(config, Options(output=tmp_path / "run"), parts) == 0

    store = Store(tmp_path / "run")
    found = [record for record in store.load().records.values() if record.again]
    of_low_bit = [record for record in found if record.identity["again"] is not True]
    assert (len(found), len(of_low_bit)) == ((3, 2) if again else (0, 0))
    assert (("fp16", 1) in seeds) == again
    assert store.run()["config"]["again"] is again
    assert len(list(store.baselines.glob("*.safetensors"))) == 1
    for record in found:
        if record in of_low_bit:
            continue
        assert {metric.name: metric.value for metric in record.metrics} == {"acc": 1.0, "kld": 0.0, "kld_max": 9.0}


def test_a_low_bit_scheme_is_repeated_under_noise(toy, tmp_path):
    """
    Twice, each under its own noise, in the same order and under the sweep's seed, and never the baseline's tensors.
    """
    seen = []

    class Task(toy.ToyTask):
        def run(self, runner, context):
            seen.append((runner.scheme.dtype_name, runner.nudge, context.seed))
            return super().run(runner, context)

        def _exact(self, runner):
            assert runner.nudge == 0
            return super()._exact(runner)

    parts = toy.Parts(toy.find_model, toy.fetch_model, toy.open_model, lambda spec, data: Task("toy_a"))
    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int4"], tasks=["toy_a"], canary=False)
    assert run_sweep(config, Options(output=tmp_path / "run"), parts) == 0
    # a folder without what it computed of the baseline, as committed ones are, gets repeats that it has not
    store = Store(tmp_path / "run")
    store.remove([name for name, record in store.load().records.items() if record.dtype.startswith("again ")])
    assert run_sweep(config, Options(output=tmp_path / "run"), parts) == 0

    repeats = [("int4_per_token_head", nudge, 0) for nudge in (1, 2)]
    assert seen == [("fp16", 0, 0), ("fp16", 0, 1), ("int4_per_token_head", 0, 0), *repeats, *repeats]


def test_a_timed_task_is_repeated_as_it_was(toy, tmp_path):
    """
    The same requests in the same order, at once, under the same seed; the cell is another one all the same.
    """
    seen = []

    class Task(toy.ToyTask):
        def run(self, runner, context):
            seen.append((runner.scheme.dtype_name, type(runner).__name__, context.seed))
            return super().run(runner, context)

    for timed in (False, True):
        make = toy.Parts(
            toy.find_model, toy.fetch_model, toy.open_model, lambda spec, data, timed=timed: Task("toy_a", timed=timed)
        )
        config = toy.write_config(tmp_path / "toys.yaml", dtypes=["fp16"], tasks=["toy_a"], canary=False)
        assert run_sweep(config, Options(output=tmp_path / f"run {timed}"), make) == 0
        assert len(Store(tmp_path / f"run {timed}").load().records) == 2

    assert seen == [("fp16", "Timed", 0), ("fp16", "Shuffled", 1), ("fp16", "Timed", 0), ("fp16", "Timed", 0)]
