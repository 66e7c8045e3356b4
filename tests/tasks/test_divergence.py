"""Divergence against scipy's definitions and against a model that does not differ."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import entropy, sem

from kvbench.measured.series import series_of
from kvbench.results import headline
from kvbench.runners.base import Next
from kvbench.runners.toy import ToyRunner
from kvbench.tasks import RunContext, make_task, text
from kvbench.tasks.divergence import compare_top, split


@pytest.fixture
def small(tmp_path):
    """Five documents of 40 tokens."""
    file = tmp_path / "small.txt"
    file.write_text(text.builtin().text[:2000])
    return {"task": "divergence", "tokens": 200, "context": 40, "text": str(file)}


def values(outcome):
    return {metric.name: metric.value for metric in outcome.metrics}


def errors(outcome):
    return {metric.name: metric.stderr for metric in outcome.metrics}


def test_every_number_is_the_textbooks(small, context):
    """
    KL is scipy's entropy(p, q) at every position but a document's last; Δp, same top and perplexities follow their
    definitions; standard errors are those of the documents' means.
    """
    exact, noisy = ToyRunner(), ToyRunner(noise=0.1)
    outcome = make_task(small).run(noisy, context)

    documents = split(text.read(Path(small["text"])).text, exact.tokenizer, 40, 5)
    kld, delta_p, same, nll = [], [], [], []
    for document in documents:
        p = exact.log_probs(exact.hidden_states([document])[0][:-1]).double().numpy()
        q = noisy.log_probs(noisy.hidden_states([document])[0][:-1]).double().numpy()
        following = (np.arange(39), np.array(document[1:]))
        kld.append(entropy(np.exp(p), np.exp(q), axis=1))
        delta_p.append(100 * (np.exp(q[following]) - np.exp(p[following])))
        same.append(100.0 * (p.argmax(1) == q.argmax(1)))
        nll.append([-q[following].mean(), -p[following].mean()])
    nll = np.array(nll)

    got = values(outcome)
    expected = {
        "kld": np.mean(kld),
        "kld_median": np.median(kld),
        "kld_p99": np.percentile(kld, 99),
        "kld_max": np.max(kld),
        "delta_p": np.mean(delta_p),
        "rms_delta_p": np.sqrt(np.mean(np.square(delta_p))),
        "same_top": np.mean(same),
        "ppl": math.exp(nll[:, 0].mean()),
        "ppl_baseline": math.exp(nll[:, 1].mean()),
        "ppl_ratio": math.exp((nll[:, 0] - nll[:, 1]).mean()),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert errors(outcome)["kld"] == pytest.approx(sem(np.mean(kld, axis=1)), rel=1e-4)
    assert errors(outcome)["ppl_ratio"] == pytest.approx(expected["ppl_ratio"] * sem(nll[:, 0] - nll[:, 1]), rel=1e-4)
    assert [sample["kld"] for sample in outcome.samples] == pytest.approx(np.mean(kld, axis=1).tolist(), rel=1e-4)


def test_positions_are_stated_alone_where_asked_for(small, context):
    """
    kld@FIRST-LAST is the mean over the documents of the KL at those positions, a number a document too, and compared as
    such; the rest of the outcome and, without positions, the identity stay as they were.
    """
    plain = make_task(small).run(ToyRunner(noise=0.1), context)
    task = make_task(small | {"positions": [0, 8, 40]})
    outcome = task.run(ToyRunner(noise=0.1), context)

    got, before = values(outcome), values(plain)
    assert {name: got[name] for name in before} == before
    assert 8 * got["kld@0-8"] + 31 * got["kld@8-40"] == pytest.approx(39 * before["kld"])
    assert got["kld@0-8"] == pytest.approx(np.mean([sample["kld@0-8"] for sample in outcome.samples]))
    assert errors(outcome)["kld@0-8"] == pytest.approx(sem([sample["kld@0-8"] for sample in outcome.samples]))
    assert {*task.metrics(), "ppl"} == {one.name for one in headline(outcome.metrics)}
    (metric,) = (one for one in outcome.metrics if one.name == "kld@0-8")
    series = series_of(metric, pa.Table.from_pylist(outcome.samples))
    assert sorted(series.values) == pytest.approx(sorted(sample["kld@0-8"] for sample in outcome.samples))
    assert "positions" not in make_task(small).identity()


@pytest.mark.parametrize("positions", [[8], [8, 8], [9, 8], [-1, 8], [0, 41], [39, 40]])
def test_positions_that_no_document_has_are_refused(small, positions):
    """
    Bounds rise, and lie within what a document predicts.
    """
    with pytest.raises(ValueError, match="positions"):
        make_task(small | {"positions": positions})


def test_the_exact_cache_diverges_from_itself_by_nothing(small, context):
    """
    The baseline against itself: KL 0, the same top token always, a perplexity ratio of 1.
    """
    got = values(make_task(small).run(ToyRunner(), context))

    assert abs(got["kld"]) < 1e-6
    assert got["same_top"] == 100
    assert got["ppl_ratio"] == 1
    assert got["rms_delta_p"] == 0


def test_a_plan_knows_what_will_be_compared(small, context):
    """
    What a table shows, but for the perplexity, of which the ratio says the same.
    """
    task = make_task(small)

    assert {*task.metrics(), "ppl"} == {one.name for one in headline(task.run(ToyRunner(), context).metrics)}


def test_more_noise_diverges_more(small, context):
    """
    KL and RMS Δp grow with the noise, the same-top share falls.
    """
    runs = [values(make_task(small).run(ToyRunner(noise=noise), context)) for noise in (0.02, 0.1, 0.5)]

    for name, sign in (("kld", 1), ("rms_delta_p", 1), ("same_top", -1)):
        row = [sign * run[name] for run in runs]
        assert row == sorted(row)


def test_one_document_has_no_standard_error(small, context):
    """
    A standard error needs two documents; with one it is absent, not 0.
    """
    outcome = make_task(small | {"tokens": 40}).run(ToyRunner(noise=0.1), context)

    assert {metric.n for metric in outcome.metrics} == {1}
    assert set(errors(outcome).values()) == {None}


def test_a_broken_cache_is_an_error_not_a_number(small, context):
    """
    A model whose output is NaN fails the cell instead of reporting NaN.
    """
    runner = ToyRunner()
    runner._states[ord("e") :] = torch.nan

    with pytest.raises(ValueError, match="not finite"):
        make_task(small).run(runner, context)


def test_the_baseline_is_asked_for_under_a_key_of_the_documents(small):
    """
    Two schemes share a baseline; another context is another key.
    """
    keys = []

    def baseline(key, compute):
        keys.append(key)
        return compute(ToyRunner())

    context = RunContext(baseline=baseline, progress=lambda done, total: None)
    for spec in (small, small, small | {"context": 50}):
        make_task(spec).run(ToyRunner(noise=0.1), context)

    assert keys[0] == keys[1] != keys[2]


def test_a_text_file_is_taken_and_a_short_one_refused(small, tmp_path, context):
    """
    `text` names a UTF-8 file whose hash is the identity's; too few tokens or no file is said before anything runs.
    """
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time. " * 20)

    task = make_task(small | {"text": str(file)})
    assert len(task.run(ToyRunner(), context).samples) == 5
    before = task.identity()
    file.write_text("Twice. ")
    assert task.identity() != before
    with pytest.raises(ValueError, match="too few for 5 documents of 40"):
        task.run(ToyRunner(), context)
    (line,) = make_task(small | {"text": str(tmp_path / "none.txt")}).missing()
    assert "none.txt" in line


def test_limit_takes_fewer_documents(small, context):
    """
    `limit` counts documents, and the identity counts them too.
    """
    task = make_task(small | {"limit": 2})

    assert len(task.run(ToyRunner(), context).samples) == 2
    assert task.identity() != make_task(small).identity()


def test_samples_hold_numbers_and_hashes_but_no_text(small, context):
    """
    A row a document, as JSON, with the columns that paired tests join by.
    """
    for sample in make_task(small).run(ToyRunner(noise=0.1), context).samples:
        assert {"doc_id", "doc_hash", "prompt_hash", "filter", "tokens", "kld", "same_top"} <= sample.keys()
        assert len(json.dumps(sample)) < 1000


def test_a_document_beyond_the_model_is_refused_and_not_scored(small, context):
    """
    Beyond its positions a model's output means nothing; as many tokens as positions are scored.
    """
    assert make_task(small).run(ToyRunner(max_length=40), context).metrics
    with pytest.raises(ValueError, match="40 tokens are more than the model's 39; ask for fewer"):
        make_task(small).run(ToyRunner(max_length=39), context)


def test_a_text_that_is_too_short_is_said_before_it_runs(tmp_path):
    """
    Fewer bytes than tokens cannot be; fewer letters than such a text has as a rule are a doubt.
    """
    path = tmp_path / "text.txt"
    path.write_text("seven l" * 1000)

    def said(tokens):
        task = make_task({"task": "divergence", "tokens": tokens, "context": 100, "text": str(path)})
        return task.missing(), task.doubts()

    lack = "documents of 100 are 8000 tokens, and the text has 7000 letters: give a longer text or fewer tokens"
    doubt = "documents of 100 are 6000 tokens, and the text has 7000 letters, about 2000 tokens: it may be too short"
    assert said(1500) == ([], [])
    assert said(6000) == ([], [f"60 {doubt}"])
    assert said(8000) == ([f"divergence: 80 {lack}"], [])


def test_tokens_put_together_hide_divergence_and_add_none(small, context):
    """
    The KL over the baseline's likeliest tokens and one for all others is scipy's, never above the whole one, and that
    where all tokens are likeliest; what the next token and the best one say does not depend on it. Its name says so.
    """
    exact, noisy = ToyRunner(), ToyRunner(noise=0.1)
    whole = make_task(small).run(noisy, context)
    found = {top: make_task({**small, "top": top}).run(noisy, context) for top in (1, 8, 258)}
    kld = {top: values(outcome)["kld"] for top, outcome in found.items()}

    assert 0 < kld[1] < kld[8] < kld[258]
    assert kld[258] == pytest.approx(values(whole)["kld"], rel=1e-4)
    for name in ("same_top", "ppl_ratio", "rms_delta_p"):
        assert values(found[8])[name] == pytest.approx(values(whole)[name], rel=1e-5)
    expected = []
    for document in split(text.read(Path(small["text"])).text, exact.tokenizer, 40, 5):
        p, q = (one.log_probs(one.hidden_states([document])[0][:-1]).exp().double() for one in (exact, noisy))
        best = p.topk(8, -1).indices
        p, q = (torch.cat([one.gather(1, best), 1 - one.gather(1, best).sum(1, keepdim=True)], 1) for one in (p, q))
        expected.append(entropy(p.numpy(), q.numpy(), axis=1))
    assert kld[8] == pytest.approx(np.mean(expected), rel=1e-3)
    assert found[8].facts["top"] == 8
    assert 0.1 < found[8].facts["top_probability"] < 1
    assert found[8].facts["top_known"] == 1

    task = make_task({**small, "top": 8})
    assert task.name == "divergence-top8"
    assert task.identity() == {**make_task(small).identity(), "top": 8}
    assert task.needs() == {"tokenizer"}


def test_a_token_of_which_nothing_is_known_is_one_of_the_others():
    """
    Its probability is the baseline's rest, and the divergence that of the coarser parts.
    """
    p, q = torch.tensor([[0.5, 0.3]]), torch.tensor([[0.4, float("nan")]])
    rest = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    before, after = (Next(torch.tensor([[3, 5]]), one.log(), *rest) for one in (p, q))

    assert float(compare_top(before, after)["kld"]) == pytest.approx(entropy([0.5, 0.5], [0.4, 0.6]), rel=1e-6)


def test_the_baselines_log_probabilities_are_computed_once_where_memory_holds_them(small, context, monkeypatch):
    """
    A later cell takes them as they were, and says the same as one for which there was no room.
    """
    asked = []

    class Asked(ToyRunner):
        def log_probs(self, hidden):
            asked.append(len(hidden))
            return super().log_probs(hidden)

    task = make_task(small)
    monkeypatch.setattr("kvbench.tasks.divergence.free_host_memory", lambda: 0)
    alone = task.run(Asked(noise=0.1), replace(context, kept={}))
    each = len(asked)
    monkeypatch.setattr("kvbench.tasks.divergence.free_host_memory", lambda: 2**40)
    outcomes = [task.run(Asked(noise=noise), context) for noise in (0.0, 0.1)]

    assert outcomes[1] == alone
    assert outcomes[0] != alone
    assert len(asked) == each + each + each // 2
