"""What a document asks, for a person who looks at the answers to it."""

from __future__ import annotations

import json

import pytest

from kvbench.tasks import make_task, of_identity


def test_a_document_of_lm_eval_is_its_question_and_what_is_right(tmp_path):
    """
    Without the examples before it, with lm-eval's own hash, as far as the limit; rebuilt from what a record has of it.
    """
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": f"What is {i} + {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(8)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    identity = make_task({"task": "gsm8k", "num_fewshot": 2, "limit": 3}, tmp_path).identity()

    found = of_identity(identity, tmp_path).texts()

    assert list(found) == [("gsm8k", "0"), ("gsm8k", "1"), ("gsm8k", "2")]
    assert found["gsm8k", "1"].prompt == "Question: What is 1 + 1?\nAnswer:"
    assert found["gsm8k", "1"].target == "Twice 1.\n#### 2"
    assert len({text.doc_hash for text in found.values()}) == 3
    with pytest.raises(ValueError, match="no data set openai/gsm8k here"):
        of_identity(identity, None).texts()


def test_choices_are_shown_and_which_is_right(tmp_path):
    """
    A multiple choice has the texts of its choices, and the right one is the target.
    """
    folder = tmp_path / "allenai" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    row = {"id": "1", "question": "Plants use sunlight to make", "answerKey": "B"}
    row["choices"] = {"text": ["soil", "food"], "label": ["A", "B"]}
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")

    (text,) = make_task("arc_easy", tmp_path).texts().values()

    assert (text.choices, text.target) == (("soil", "food"), "food")


def test_a_needle_is_told_without_its_haystack():
    """
    Every document's own number and city, with no tokenizer to make the haystack.
    """

    class Tokenizer:
        def encode(self, text, **_):
            return text.split()

    task = make_task({"task": "needle", "contexts": [256], "depths": 3, "per_cell": 2, "limit": 4})
    texts, documents = task.texts(), task.documents(Tokenizer())

    assert [text.target for text in texts.values()] == [document.answer for document in documents]
    for text, document in zip(texts.values(), documents, strict=True):
        fact, question = text.prompt.partition(") ")[2].split(" …")
        assert fact in document.prompt
        assert document.prompt.endswith(question)
