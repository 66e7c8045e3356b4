"""The embedded model through the exact cache against lm-eval's own HFLM, on the same weights in float32."""

from unittest import mock

import pytest
from lm_eval.models.huggingface import HFLM

from kvbench.runners import catalog
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.tasks import make_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded():
    return TransformersModel.load(catalog.resolve("smollm2-135m-instruct"), "float32")


def both(spec, data, loaded, context):
    """The outcomes of a task through our runner and through HFLM."""
    task = make_task(spec, data)
    ours = task.run(loaded.runner(Scheme.parse("auto")), context)
    hflm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4, device="cpu")
    hflm.truncated = 0
    with mock.patch("kvbench.tasks.runner_lm.RunnerLM", return_value=hflm):
        theirs = task.run(loaded.runner(Scheme.parse("auto")), context)
    return ours, theirs


@pytest.mark.parametrize(
    ("spec", "documents"),
    [
        ({"task": "pydoc_cloze", "limit": 6}, 6),
        ({"task": "arc_easy", "limit": 6}, 6),
        ({"task": "wikitext", "limit": 2}, 2),
        ({"task": "gsm8k", "num_fewshot": 2, "limit": 2}, 2),
        ({"task": "gsm8k", "num_fewshot": 1, "limit": 2, "apply_chat_template": True}, 2),
    ],
    ids=["pydoc_cloze", "arc_easy", "wikitext", "gsm8k", "gsm8k-chat"],
)
def test_scores_are_hflms(spec, documents, mirror, loaded, context):
    """
    Every log-likelihood is within 1e-4 of HFLM's, every generated text equal, and so are the scores.
    """
    ours, theirs = both(spec, mirror, loaded, context)

    assert ours.facts["documents"] == documents
    assert len(ours.samples) == len(theirs.samples)
    for a, b in zip(ours.samples, theirs.samples, strict=True):
        assert a["doc_hash"] == b["doc_hash"]
        assert a["prompt_hash"] == b["prompt_hash"]
        assert a.get("logprobs") == pytest.approx(b.get("logprobs"), abs=1e-4)
        assert (a.get("resps"), a.get("greedy")) == (b.get("resps"), b.get("greedy"))
    for metric, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert metric.name == other.name
        assert metric.value == pytest.approx(other.value, rel=1e-5)
