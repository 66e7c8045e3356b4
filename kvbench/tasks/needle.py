"""Whether a fact at some depth of a long context is found again: a number, asked for at the end."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from kvbench.results import Metric, Outcome
from kvbench.tasks import text
from kvbench.tasks.base import Count, Line, Need, Options, RunContext, Text, Texts, Tokens, Work

if TYPE_CHECKING:
    from kvbench.runners.base import Runner

VERSION = 1
ANSWER_TOKENS = 16
MAX_DOCUMENTS = 10**6
CITIES = ("Oslo", "Lisbon", "Nairobi", "Quito", "Hanoi", "Dublin", "Ankara", "Havana", "Seoul", "Tunis", "Riga", "Lima")


@dataclass(frozen=True)
class Document:
    """One prompt; `answer` is the number that it hides."""

    context: int
    depth: float
    prompt: str
    answer: str


class Needle(Options):
    """A number told at a depth of a long context and asked for at its end; the answer must be exact."""

    name: Line = "needle"
    contexts: Annotated[tuple[Annotated[Tokens, Field(ge=128)], ...], Field(min_length=1, strict=False)] = (1024,)
    """Tokens of prompt and answer together, at most."""
    depths: Count = 5
    """How many places, evenly from start to end."""
    per_cell: Count = 4
    """Documents for each context and depth."""
    seed: int = 0
    """Of the documents, not of the sweep."""

    @model_validator(mode="after")
    def _few_enough(self) -> Self:
        made = len(self.contexts) * self.depths * self.per_cell
        if made > MAX_DOCUMENTS:
            raise ValueError(f"contexts × depths × per_cell are {made} documents; take at most {MAX_DOCUMENTS}")
        return self

    def identity(self) -> dict[str, Any]:
        return {
            "task": "needle",
            "version": VERSION,
            "contexts": list(self.contexts),
            "depths": self.depths,
            "per_cell": self.per_cell,
            "seed": self.seed,
            "limit": self.limit,
            "text": text.BUILTIN,
            "text_sha256": text.builtin().sha256,
        }

    def missing(self) -> list[str]:
        try:
            text.builtin()
        except ValueError as error:
            return [str(error)]
        return []

    def answers(self) -> int:
        made = len(self.contexts) * self.depths * self.per_cell
        return min(made, self.limit or made)

    def longest(self) -> int:
        return max(self._asked)

    def work(self) -> Work:
        answers = self.answers()
        each = self.depths * self.per_cell
        tokens = sum(length * min(each, answers - i * each) for i, length in enumerate(self._asked))
        return Work(tokens, answers, ANSWER_TOKENS)

    def needs(self) -> frozenset[Need]:
        return frozenset({"tokenizer", "generation"})

    def metrics(self) -> tuple[str, ...]:
        return "acc", *(f"acc@{length}" for length in self._asked if len(self.contexts) > 1)

    @property
    def _asked(self) -> tuple[int, ...]:
        """The contexts that the limit leaves."""
        return self.contexts[: math.ceil(self.answers() / (self.depths * self.per_cell))]

    def documents(self, tokenizer: Any) -> list[Document]:
        """The prompts, each no longer than its context leaves beside the answer; tokenizer and seed decide them.

        Raises:
            ValueError: the text is too short for a context.
        """
        made = (_document(draw, tokenizer, context, depth) for context, depth, draw in self._places())
        return list(islice(made, self.limit))

    def _places(self) -> Iterator[tuple[int, float, random.Random]]:
        """Context, depth and the generator of each document."""
        for context in self.contexts:
            for i in range(self.per_cell):
                for place in range(self.depths):
                    depth = place / (self.depths - 1) if self.depths > 1 else 0.5
                    yield context, depth, random.Random(f"{self.seed}/{context}/{i}/{depth}")

    def texts(self) -> Texts:
        found = {}
        for i, (context, depth, draw) in enumerate(islice(self._places(), self.limit)):
            fact, question, answer = _fact(draw)
            found["", str(i)] = Text(f"({depth:.0%} of {context} tokens in) {fact} …{question}", answer)
        return found

    def run(self, runner: Runner, context: RunContext) -> Outcome:
        """Accuracy over all documents, and for each context length where there are several.

        Raises:
            ValueError: a context is longer than the model's positions, or than the text.
        """
        from kvbench.runners.base import GenerateRequest

        self.check_length(runner.info.max_length)
        if (key := str(self.identity())) not in context.kept:
            made = self.documents(runner.tokenizer)
            context.kept[key] = made, [tuple(runner.tokenizer.encode(document.prompt)) for document in made]
        documents, prompts = context.kept[key]
        requests = [GenerateRequest(prompt, ANSWER_TOKENS, stop=("\n",)) for prompt in prompts]
        said = [generation.text for generation in runner.generate(requests, context.progress)]
        right = [
            float(_first_number(reply) == document.answer) for reply, document in zip(said, documents, strict=True)
        ]

        hashes = [text.sha256(document.prompt) for document in documents]
        samples = [
            {
                "doc_id": i,
                "doc_hash": hashes[i],
                "prompt_hash": text.sha256(" ".join(map(str, requests[i].prompt))),
                "target_hash": text.sha256(document.answer),
                "filter": "none",
                "context": document.context,
                "depth": document.depth,
                "prompt_tokens": len(requests[i].prompt),
                "resps": [said[i]],
                "acc": right[i],
            }
            for i, document in enumerate(documents)
        ]
        metrics = [_accuracy("acc", right)]
        if len(self.contexts) > 1:
            cells = groupby(zip(documents, right, strict=True), key=lambda pair: pair[0].context)
            metrics += [_accuracy(f"acc@{length}", [score for _, score in pairs]) for length, pairs in cells]
        facts = {
            "documents_sha256": text.sha256(" ".join(hashes)),
            "documents": len(documents),
            "text": text.BUILTIN,
            "text_sha256": text.builtin().sha256,
        }
        return Outcome(tuple(metrics), samples, facts)


def _fact(draw: random.Random) -> tuple[str, str, str]:
    """What is told, what is asked, and the number."""
    city, answer = draw.choice(CITIES), str(draw.randrange(10_000, 100_000))
    question = f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
    return f"The secret number of {city} is {answer}.", question, answer


def _document(draw: random.Random, tokenizer: Any, context: int, depth: float) -> Document:
    fact, question, answer = _fact(draw)
    sentences = [sentence for paragraph in text.prose() for sentence in paragraph if answer not in sentence]
    first = draw.randrange(len(sentences))
    wanted: list[str] = []
    room = context - ANSWER_TOKENS - len(tokenizer.encode(f"{fact} {question}"))
    for sentence in (sentences[(first + i) % len(sentences)] for i in range(len(sentences))):
        room -= len(tokenizer.encode(f" {sentence}", add_special_tokens=False))
        if room < 0:
            break
        wanted.append(sentence)
    else:
        raise ValueError(f"the text ends {room} tokens before a context of {context}: ask for a shorter one")

    def prompt() -> str:
        at = round(depth * len(wanted))
        return " ".join([*wanted[:at], fact, *wanted[at:]]) + question

    # sentences tokenized apart seldom take fewer tokens than together, but they can
    while len(tokenizer.encode(prompt())) > context - ANSWER_TOKENS and wanted:
        wanted.pop()
    return Document(context, depth, prompt(), answer)


def _first_number(reply: str) -> str | None:
    found = re.search(r"\d+", reply)
    return found.group() if found else None


def _accuracy(name: str, right: Iterable[float]) -> Metric:
    from scipy.stats import sem

    values = list(right)
    stderr = float(sem(values)) if len(values) > 1 else None
    mean = sum(values) / len(values)
    return Metric(name, mean, stderr, len(values), higher_is_better=True, kind="share", when_zeroed="falls")
