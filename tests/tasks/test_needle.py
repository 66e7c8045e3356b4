"""Needle documents: how long, where the fact is, and who finds it."""

import re

import pytest

from kvbench.runners.base import Generation
from kvbench.runners.toy import ToyRunner
from kvbench.tasks import make_task
from kvbench.tasks.needle import ANSWER_TOKENS

SPEC = {"task": "needle", "contexts": [600, 1000], "depths": 3, "per_cell": 2}


class Oracle(ToyRunner):
    """Says the number that its prompt hides, or another one."""

    def __init__(self, knows=True):
        super().__init__()
        self.knows = knows

    def generate(self, requests, progress=None):
        prompts = [self.tokenizer.decode(list(request.prompt)) for request in requests]
        numbers = [re.search(r"The secret number of \w+ is (\d{5})\.", prompt).group(1) for prompt in prompts]
        said = [number if self.knows else f"{number}0" for number in numbers]
        return [Generation(f" {number}. And 12345", ()) for number in said]


def test_who_reads_the_fact_is_right_and_who_does_not_is_wrong(context):
    """
    The first number said must be the hidden one, digit for digit.
    """
    for knows, expected in ((True, 1.0), (False, 0.0)):
        outcome = make_task(SPEC).run(Oracle(knows), context)
        assert {metric.name: metric.value for metric in outcome.metrics} == {
            "acc": expected,
            "acc@600": expected,
            "acc@1000": expected,
        }
        assert len(outcome.samples) == make_task(SPEC).answers() == 12
        assert make_task(SPEC).metrics() == tuple(metric.name for metric in outcome.metrics)


def test_documents_are_made_once_for_all_cells_of_a_model(context, monkeypatch):
    """
    The second cell encodes nothing and gives the same outcome; a task of other contexts makes its own.
    """
    runner, task = Oracle(), make_task(SPEC)
    first = task.run(runner, context)
    encoded = []
    encode = type(runner.tokenizer).encode
    monkeypatch.setattr(
        type(runner.tokenizer), "encode", lambda *args, **kw: encoded.append(args) or encode(*args, **kw)
    )

    assert task.run(runner, context) == first
    assert not encoded
    make_task(SPEC | {"contexts": [600]}).run(runner, context)
    assert encoded


@pytest.mark.parametrize("limit", [1, 6, 7])
def test_a_limit_leaves_the_contexts_that_it_reaches(limit, context):
    """
    A plan names the metrics that a run cut short will have.
    """
    task = make_task(SPEC | {"limit": limit})

    assert task.metrics() == tuple(metric.name for metric in task.run(Oracle(True), context).metrics)


def test_prompt_and_answer_fit_the_context_and_fill_it():
    """
    No document is longer than its context leaves beside the answer, nor shorter by more than a long sentence.
    """
    tokenizer = ToyRunner().tokenizer
    for document in make_task(SPEC).documents(tokenizer):
        tokens = len(tokenizer.encode(document.prompt))
        assert document.context - 400 < tokens <= document.context - ANSWER_TOKENS


def test_the_fact_stands_at_its_depth_once():
    """
    Depth 0 is before all of the haystack, depth 1 after it, and the number is nowhere else.
    """
    for document in make_task(SPEC).documents(ToyRunner().tokenizer):
        assert document.prompt.count(document.answer) == 1
        haystack, question = document.prompt.split("\n\nQuestion:")
        if document.depth == 0:
            assert haystack.startswith("The secret number")
        if document.depth == 1:
            assert haystack.endswith(f"{document.answer}.")
        assert question.count(re.search(r"number of (\w+) is \d", haystack).group(1)) == 2


def test_documents_are_frozen(context):
    """
    The same seed gives the same documents, whatever was drawn before; another seed gives others.
    """
    runner = ToyRunner()

    first, again = (make_task(SPEC).run(runner, context).facts["documents_sha256"] for _ in range(2))
    other = make_task(SPEC | {"seed": 1}).run(runner, context).facts["documents_sha256"]

    assert first == again != other


def test_an_impossible_context_is_refused():
    """
    A context that could not hold the question is refused when the config is read.
    """
    with pytest.raises(ValueError, match="contexts"):
        make_task({"task": "needle", "contexts": []})


def test_a_context_beyond_the_model_is_refused_and_not_scored(context):
    """
    A model has no positions for it; a context that the limit leaves out asks for none.
    """
    longer = SPEC | {"contexts": [600, 5000]}

    with pytest.raises(ValueError, match="5000 tokens are more than the model's 4096; ask for fewer"):
        make_task(longer).run(Oracle(), context)
    assert make_task(longer | {"limit": 6}).run(Oracle(), context).metrics[0].value == 1.0


def test_a_context_beyond_the_text_is_refused():
    """
    A prompt that the text cannot fill would stand in a table as one of that length.
    """
    task = make_task(SPEC | {"contexts": [10_000_000], "limit": 1})

    with pytest.raises(ValueError, match=r"the text ends \d+ tokens before a context of 10000000"):
        task.documents(ToyRunner().tokenizer)
