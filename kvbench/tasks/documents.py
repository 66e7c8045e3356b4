"""What lm-eval makes of a task's documents, kept from cell to cell: their rows, targets, choices and hashes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

HASHES = 2**17  # of texts, kept at once


class Document(dict[str, Any]):
    """A document that lm-eval's own code alone reads, which changes nothing of it; and what was made of it so far."""

    __slots__ = ("made",)

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.made: dict[str, Any] = {}


class Documents:
    """The documents of a data set, each read when it is first asked for."""

    def __init__(self, rows: Any) -> None:
        self._count = len(rows)
        self._rows = iter(rows)
        self._kept: list[Document] = []

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Document]:
        for number in range(self._count):
            if number == len(self._kept):
                self._kept.append(Document(next(self._rows)))
            yield self._kept[number]


def keep(task: Any) -> None:
    """lm-eval's task has its documents, targets and choices made once; where it has code of its own, its data set."""
    code = has_code(task)
    for name in ("test_docs", "validation_docs"):
        setattr(task, name, cache(getattr(task, name) if code else _documents(getattr(task, name))))
    if not code:
        for name in ("doc_to_target", "doc_to_choice"):
            setattr(task, name, _kept(getattr(task, name), name))


def has_code(task: Any) -> bool:
    """Whether code that comes with a task sees its documents, and could change them."""
    from lm_eval.api.task import ConfigurableTask

    if type(task) is not ConfigurableTask:
        return True
    named = ("doc_to_text", "doc_to_target", "doc_to_choice", "process_results")
    steps = [step for one in task.config.filter_list or () for step in one["filter"]]
    return any(callable(getattr(task.config, name)) for name in named) or any(
        callable(value) for step in steps for value in step.values()
    )


def _documents(rows: Callable[[], Any]) -> Callable[[], Documents]:
    return lambda: Documents(rows())


def _kept(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`method` of a document, which keeps what it gave."""

    def once(doc: Any, *given: Any) -> Any:
        if given or type(doc) is not Document:
            return method(doc, *given)
        if name not in doc.made:
            doc.made[name] = method(doc)
        return doc.made[name]

    return once


@contextmanager
def written_once() -> Iterator[None]:
    """Inside the block lm-eval's evaluation writes a document as JSON once, and takes the hash of a text once."""
    from lm_eval import evaluator

    def dumps(value: Any, **options: Any) -> str:
        if type(value) is not Document:
            return json.dumps(value, **options)
        if "json" not in value.made:
            value.made["json"] = json.dumps(value, **options)
        return str(value.made["json"])

    evaluator.json, hashed = SimpleNamespace(**{**vars(json), "dumps": dumps}), evaluator.hash_string
    evaluator.hash_string = _hashed()
    try:
        yield
    finally:
        evaluator.json, evaluator.hash_string = json, hashed


@cache
def _hashed() -> Callable[[str], str]:
    """lm-eval's hash of a text, which is kept with it."""
    from lm_eval.utils import hash_string

    return lru_cache(maxsize=HASHES)(hash_string)


@contextmanager
def without_softmax(tasks: Iterable[Any]) -> Iterator[None]:
    """Inside the block no softmax of a document's answers is made, unless for the Brier score, which alone has it."""
    from lm_eval import utils

    if any("brier_score" in getattr(task, "_metric_fn_list", ("brier_score",)) for task in tasks):
        yield
        return
    softmax, utils.softmax = utils.softmax, lambda _: None
    try:
        yield
    finally:
        utils.softmax = softmax
