"""What a task is: something that measures a runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from kvbench.files import named_path
from kvbench.messages import shown
from kvbench.sizes import tokens

if TYPE_CHECKING:  # a config is validated without waiting for torch
    from torch import Tensor

    from kvbench.results import Outcome
    from kvbench.runners.base import Progress, Runner

    Tensors = dict[str, Tensor]


# what not every model has, and what not every backend gives
Need = Literal["tokenizer", "chat template", "generation", "clock", "hidden states"]
INSTEAD = {"hidden states": "divergence with `top: 64` needs none"}
SideName = Literal["key", "value"]


def _line(value: str) -> str:
    if not value.strip() or not value.isprintable() or len(value) > MAX_NAME:
        raise ValueError(f"expected a line of 1 to {MAX_NAME} characters that can be seen, not {shown(value)}")
    return value


def _path(value: Any) -> Any:
    # a text again, for of JSON no other is a path
    return str(named_path(value)) if isinstance(value, str) else value


MAX_NAME = 4096  # characters; a model's may be a path
Line = Annotated[str, AfterValidator(_line)]
NamedPath = Annotated[Path, BeforeValidator(_path), Field(strict=False)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Tokens = Annotated[int, Field(gt=0, le=10**9), BeforeValidator(tokens)]


@dataclass(frozen=True)
class RunContext:
    """What a sweep lends a task while it runs.

    baseline(key, compute): the tensors that `compute` gives with a runner under the baseline scheme of the same model;
    computed at most once for a key and kept in the run folder. seed: the sweep's seed.
    alone(layer, side): a runner that stores the keys ("key") or the values of one layer as the cell's scheme does, and
    all else exactly; with layer None all exactly. It computes what the cell's runner computes in the same way.
    kept: what tasks put there is there for later cells on the same model, as long as this process has it loaded.
    """

    baseline: Callable[[str, Callable[[Runner], Tensors]], Tensors]
    progress: Progress
    seed: int = 0
    alone: Callable[[int | None, SideName], Runner] | None = None
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a task gives a model to do, about: tokens read in all, and answers of so many tokens at most.

    by_layer: the tokens are read so many times for each layer.
    """

    prompt_tokens: float
    answers: int = 0
    answer_tokens: int = 0
    by_layer: int = 0


@dataclass(frozen=True)
class Text:
    """What a document asks, without the examples before it, and what is right; choices: where there are some.

    doc_hash: by which samples know the document; "" where its number says which it is.
    """

    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    doc_hash: str = ""


Texts = dict[tuple[str, str], Text]  # by the task and doc_id of a sample


class Task(Protocol):
    """A task as configured: cheap to make, heavy only in `run`."""

    @property
    def name(self) -> str:
        """What tables and records call it."""
        ...

    @property
    def timed(self) -> bool:
        """Whether its numbers are of speed: the machine decides them too, and its A/A cell repeats the same run."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that decides its numbers besides model, scheme and seed, as JSON: needs no model and no network.

        Raises:
            ValueError: a file it reads is broken; the message names file and line.
        """
        ...

    def missing(self) -> list[str]:
        """What this machine lacks to run it, one line each with what to do; empty when it can run."""
        ...

    def doubts(self) -> list[str]:
        """What may go wrong when it runs, one line each, where only a tokenizer could say."""
        ...

    def answers(self) -> int | None:
        """Documents to be answered right or wrong; None where there are none, or the data that says is not here."""
        ...

    def longest(self) -> int | None:
        """Tokens of its longest sequence, where its options say: a model needs as many positions; else None."""
        ...

    def work(self) -> Work | None:
        """What it gives a model to do; None where neither its options nor data that is here say so."""
        ...

    def needs(self) -> frozenset[Need]:
        """What not every model has, or not every backend gives."""
        ...

    def metrics(self) -> tuple[str, ...] | None:
        """Names of the metrics that are compared: a sample has a number of each; None where only a run tells."""
        ...

    def texts(self) -> Texts:
        """What its documents ask, for a person who looks at answers; empty where there are none.

        Raises:
            ValueError: the data is not here, or only a model's tokenizer makes them.
        """
        ...

    def run(self, runner: Runner, context: RunContext) -> Outcome:
        """Measures the runner."""
        ...


LETTERS_PER_TOKEN = 3.5  # Qwen's tokens of GSM8K's prompts have 3.1, its tokens of Python's help topics 4.2


def beyond(tokens: int, positions: int) -> str:
    """What is said where a task asks for more tokens than a model has positions."""
    return f"{tokens} tokens are more than the model's {positions}; ask for fewer"


def no_template(model: str) -> str:
    """What is said where a task makes a chat of its prompts, and the model has no template for one."""
    return f"model {model} has no chat template: leave out apply_chat_template, or use an instruct model"


class Options(BaseModel):
    """What every task takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, defer_build=True)

    name: Line
    """What tables call it, where one task is listed twice with other options."""
    limit: Count | None = None
    """At most so many documents (of each subtask, for a group)."""

    @property
    def timed(self) -> bool:
        """See Task."""
        return False

    def doubts(self) -> list[str]:
        """See Task."""
        return []

    def texts(self) -> Texts:
        """See Task."""
        return {}

    def longest(self) -> int | None:
        """See Task."""
        return None

    def work(self) -> Work | None:
        """See Task."""
        return None

    def needs(self) -> frozenset[Need]:
        """See Task."""
        return frozenset()

    def check_length(self, positions: int) -> None:
        """Raises ValueError where its longest sequence has more tokens than a model has positions."""
        tokens = self.longest()
        if tokens is not None and tokens > positions:
            raise ValueError(beyond(tokens, positions))
