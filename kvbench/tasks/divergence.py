"""How far a quantized cache moves the next-token distribution from the exact cache's, on real text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Self
from weakref import WeakKeyDictionary

from pydantic import BeforeValidator, Field, model_validator

from kvbench.environment import free_host_memory
from kvbench.results import Metric, Outcome, exponential
from kvbench.sizes import tokens
from kvbench.tasks import text
from kvbench.tasks.base import LETTERS_PER_TOKEN, Line, NamedPath, Need, Options, RunContext, Tokens, Work

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.runners.base import Next, Runner

    Tensors = dict[str, Tensor]

VERSION = 1
PERCENTILES = {"kld_median": 50, "kld_p90": 90, "kld_p95": 95, "kld_p99": 99, "kld_p99.9": 99.9}
LOGITS_AT_A_TIME = 2**24  # 64 MiB in float32; about five such arrays live at once
SMALLEST_REST = 1e-9  # of a probability, where float32's rounding leaves less than nothing
_ENCODED: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()  # by tokenizer, its last text's tokens


Position = Annotated[int, Field(ge=0, strict=True), BeforeValidator(tokens)]


class Divergence(Options):
    """Next-token KL divergence from the exact cache on real text: mean, tail, same top token, perplexity ratio.

    Every position but a document's last predicts its next token.
    """

    name: Line = "divergence"
    tokens: Annotated[Tokens, Field(ge=2)] = 4096
    """In all, spread over the text."""
    context: Annotated[Tokens, Field(ge=2)] = 512
    """Tokens of one document, its first token included."""
    text: NamedPath | None = None
    """A UTF-8 file; without one, the standard library's help topics."""
    positions: Annotated[tuple[Position, ...], Field(strict=False)] = ()
    """Bounds between which the divergence is also stated alone: [1024, 2048, 8192] adds `kld@1024-2048` and
    `kld@2048-8192`."""
    top: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Compare the baseline's so many likeliest tokens, and all others as one: never more than the whole divergence."""

    @model_validator(mode="before")
    @classmethod
    def _named_for_its_top(cls, value: Any) -> Any:
        return (
            {"name": f"divergence-top{value['top']}", **value}
            if isinstance(value, dict) and value.get("top")
            else value
        )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.positions and (len(self.positions) < 2 or any(a >= b for a, b in pairwise(self.positions))):
            raise ValueError(f"positions must be two bounds or more, in rising order, not {list(self.positions)}")
        # a document's last position predicts nothing
        if self.positions and (self.positions[-1] > self.context or self.positions[-2] > self.context - 2):
            raise ValueError(f"positions up to {self.positions[-1]} are beyond a context of {self.context}")
        return self

    def identity(self) -> dict[str, Any]:
        source = text.read(self.text)
        return {
            "task": "divergence",
            "version": VERSION,
            "context": self.context,
            "documents": self._documents,
            "text": source.source,
            "text_sha256": source.sha256,
            **({"positions": list(self.positions)} if self.positions else {}),
            **({"top": self.top} if self.top else {}),
        }

    @property
    def _documents(self) -> int:
        documents = max(1, self.tokens // self.context)
        return min(documents, self.limit or documents)

    def missing(self) -> list[str]:
        try:
            source = text.read(self.text).text
        except ValueError as error:
            return [str(error)]
        # a token has a byte at least
        enough = len(source.encode()) >= self._tokens
        return [] if enough else [f"{self.name}: {self._size(source)}: give a longer text or fewer tokens"]

    def doubts(self) -> list[str]:
        if self.missing():
            return []
        source = text.read(self.text).text
        about = int(len(source) / LETTERS_PER_TOKEN)
        return [] if about >= self._tokens else [f"{self._size(source)}, about {about} tokens: it may be too short"]

    @property
    def _tokens(self) -> int:
        return self._documents * self.context

    def _size(self, source: str) -> str:
        asked = f"{self._documents} documents of {self.context} are {self._tokens} tokens"
        return f"{asked}, and the text has {len(source)} letters"

    def answers(self) -> None:
        return None

    def longest(self) -> int:
        return self.context

    def work(self) -> Work:
        return Work(self._tokens)

    def needs(self) -> frozenset[Need]:
        return frozenset({"tokenizer"} if self.top else {"tokenizer", "hidden states"})

    def metrics(self) -> tuple[str, ...]:
        return "kld", "same_top", "ppl_ratio", *(f"kld@{a}-{b}" for a, b in pairwise(self.positions))

    def run(self, runner: Runner, context: RunContext) -> Outcome:
        """KL, Δp, same top token and perplexity over the documents.

        Logarithms are float32, sums float64. A KL of equal distributions can come out a little below 0 (about -1e-7);
        it is reported as measured. Standard errors are over documents: the tokens of one are not independent.

        Raises:
            ValueError: a document is longer than the model's positions, the text is too short, or the model gave a
                value that is not finite.
        """
        import numpy as np

        self.check_length(runner.info.max_length)
        source = text.read(self.text)
        documents = split(source.text, runner.tokenizer, self.context, self._documents)
        hashes = [text.sha256(" ".join(map(str, tokens))) for tokens in documents]
        all_hash = text.sha256(" ".join(hashes))
        compared, truncation = (self._at_top if self.top else _whole)(runner, context, documents, all_hash[:16])
        per_document = [{name: value.numpy() for name, value in columns.items()} for columns in compared]
        for i, columns in enumerate(per_document):
            if not all(bool(np.isfinite(column).all()) for column in columns.values()):
                raise ValueError(f"document {i}: the model's output is not finite, so there is no divergence to report")

        metrics = _metrics(per_document, self.positions)
        samples = [
            {
                "doc_id": i,
                "doc_hash": digest,
                "prompt_hash": digest,
                "filter": "none",
                "tokens": len(columns["kld"]),
                **{metric.name: metric.value for metric in _metrics([columns], self.positions)},
            }
            for i, (digest, columns) in enumerate(zip(hashes, per_document, strict=True))
        ]
        facts = {
            "documents_sha256": all_hash,
            "documents": len(documents),
            "context": self.context,
            "predictions": sum(len(columns["kld"]) for columns in per_document),
            "text": source.source,
            "text_sha256": source.sha256,
            **truncation,
        }
        return Outcome(tuple(metrics), samples, facts)

    def _at_top(
        self, runner: Runner, context: RunContext, documents: Sequence[tuple[int, ...]], key: str
    ) -> tuple[list[Tensors], dict[str, Any]]:
        """The columns of each document at the baseline's likeliest tokens, and facts of what that leaves out."""
        import torch

        from kvbench.runners.base import Next, NextRequest

        assert self.top
        top = min(self.top, len(runner.tokenizer))

        def exact(baseline: Runner) -> Tensors:
            found = baseline.next_tokens([NextRequest(tokens, top) for tokens in documents])
            return {name: torch.stack([getattr(one, name) for one in found]) for name in NEXT}

        kept = context.baseline(f"divergence-{key}-top{top}", exact)
        before = [Next(*(kept[name][i] for name in NEXT)) for i in range(len(documents))]
        asked = [NextRequest(tokens, top, one.ids) for tokens, one in zip(documents, before, strict=True)]
        after = runner.next_tokens(asked, context.progress)
        facts = {
            "top": top,
            "top_probability": float(kept["logprobs"].double().exp().sum(-1).mean()),
            "top_known": float(torch.cat([(~one.logprobs.isnan()).double().flatten() for one in after]).mean()),
        }
        return [compare_top(a, b) for a, b in zip(before, after, strict=True)], facts


NEXT = ("ids", "logprobs", "following", "best")


def _whole(
    runner: Runner, context: RunContext, documents: Sequence[tuple[int, ...]], key: str
) -> tuple[list[Tensors], dict[str, Any]]:
    """The columns of each document over the whole vocabulary."""
    import torch

    # hidden states, not distributions: far smaller, and the head is the same under every scheme
    before = context.baseline(
        f"divergence-{key}", lambda exact: {"hidden": torch.stack(exact.hidden_states(documents))}
    )["hidden"]
    after = runner.hidden_states(documents, context.progress)
    exact: Exact = context.kept.setdefault("divergence", Exact())
    return [
        compare(runner, a, b, torch.tensor(tokens), partial(exact.log_probs, runner, (key, number)))
        for number, (a, b, tokens) in enumerate(zip(before, after, documents, strict=True))
    ], {}


class Exact:
    """The baseline's log-probabilities, kept for later cells as far as a quarter of the free memory holds them.

    On a CPU alone: a head's work is a fifth of a cell's there and more, and a GPU's memory is what cells measure.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, int], Tensor] = {}
        self._room = free_host_memory() // 4

    def log_probs(self, runner: Runner, document: tuple[str, int], first: int, hidden: Tensor) -> Tensor:
        """[n, vocabulary] of the hidden states [n, H] of a document from position `first` on."""
        place = (*document, first)
        if (known := self._kept.get(place)) is not None:
            return known
        made = runner.log_probs(hidden)
        if made.device.type == "cpu" and made.nbytes <= self._room:
            self._kept[place] = made
            self._room -= made.nbytes
        return made


def compare_top(before: Next, after: Next) -> Tensors:
    """The columns of `compare`, the KL over the baseline's likeliest tokens and one more that stands for all others.

    A token of which the other side says nothing is among those others. By the log-sum inequality putting tokens
    together never makes a divergence larger. Returns float64 tensors [T - 1].
    """
    known = ~after.logprobs.isnan()
    p, q = before.logprobs.double(), after.logprobs.double()
    own = (p.exp() * (p - q)).where(known, 0).sum(-1)
    rest = [(1 - one.exp().where(known, 0).sum(-1)).clamp_min(SMALLEST_REST) for one in (p, q)]
    following = before.following.double(), after.following.double()
    return {
        "kld": own + rest[0] * (rest[0] / rest[1]).log(),
        "delta_p": following[1].exp() - following[0].exp(),
        "same_top": (before.best == after.best).double(),
        "nll": -following[1],
        "nll_baseline": -following[0],
    }


def split(source: str, tokenizer: Any, context: int, documents: int) -> list[tuple[int, ...]]:
    """`documents` pieces of `context` tokens, evenly spread over the text; each begins as the tokenizer begins a text.

    Raises:
        ValueError: the text has too few tokens.
    """
    from kvbench.runners.base import begins_with

    bos = begins_with(tokenizer)
    tokens = _encoded(source, tokenizer)
    length = context - len(bos)
    blocks = len(tokens) // length if length > 0 else 0
    if blocks < documents:
        raise ValueError(
            f"the text has {len(tokens)} tokens, too few for {documents} documents of {context}: "
            "give a longer text, a shorter context or fewer tokens"
        )
    starts = [length * (i * blocks // documents) for i in range(documents)]
    return [(*bos, *tokens[start : start + length]) for start in starts]


def _encoded(source: str, tokenizer: Any) -> list[int]:
    """The text's tokens without special ones, those of a tokenizer's last text kept for the cells to come."""
    kept = _ENCODED.setdefault(tokenizer, {})
    if source not in kept:
        kept.clear()
        # not verbose: the whole text is longer than the model takes, its pieces are not
        kept[source] = tokenizer.encode(source, add_special_tokens=False, verbose=False)
    return kept[source]


def compare(
    runner: Runner,
    before: Tensor,
    after: Tensor,
    tokens: Tensor,
    exact: Callable[[int, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """For each position but the last: KL in nats, change of the next token's probability, same top token, both NLLs.

    before, after: [T, H] hidden states. exact(first, hidden): log-probabilities of `before` from a position on, where
    they may be known. Returns float64 tensors [T - 1].
    """
    import torch
    from torch.nn.functional import kl_div

    rows = max(16, min(512, LOGITS_AT_A_TIME // max(1, len(runner.tokenizer))))
    chunks: list[Tensor] = []
    for first in range(0, len(tokens) - 1, rows):
        last = min(first + rows, len(tokens) - 1)
        own = before[first:last]
        base = runner.log_probs(own) if exact is None else exact(first, own)  # [n, V]
        other = runner.log_probs(after[first:last])  # [n, V]
        index = torch.arange(last - first, device=base.device)
        following = tokens[first + 1 : last + 1].to(base.device)
        kld = kl_div(other, base, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
        base_next, other_next = base[index, following].double(), other[index, following].double()
        same_top = (base.argmax(-1) == other.argmax(-1)).double()
        columns = [kld, other_next.exp() - base_next.exp(), same_top, -other_next, -base_next]
        chunks.append(torch.stack(columns).cpu())
    return dict(zip(("kld", "delta_p", "same_top", "nll", "nll_baseline"), torch.cat(chunks, 1), strict=True))


def _metrics(documents: list[dict[str, Any]], positions: Sequence[int] = ()) -> list[Metric]:
    """The metrics over documents of equal length, each a dict of float64 arrays, one value a position."""
    import numpy as np
    from scipy.stats import sem

    n = len(documents)
    every = {name: np.concatenate([columns[name] for columns in documents]) for name in documents[0]}

    def mean(name: str) -> float:
        return float(every[name].mean())

    def error(values: list[Any]) -> float | None:
        return float(sem(values)) if n > 1 else None

    def mean_error(name: str) -> float | None:
        return error([columns[name].mean() for columns in documents])

    def scaled(factor: float, stderr: float | None) -> float | None:
        return None if stderr is None else factor * stderr

    kld = every["kld"]
    rms = math.sqrt(float((every["delta_p"] ** 2).mean()))
    rms_error = error([(columns["delta_p"] ** 2).mean() for columns in documents])
    ppl, ppl_baseline = exponential(mean("nll")), exponential(mean("nll_baseline"))
    ratio = ppl / ppl_baseline if math.isfinite(ppl) else exponential(mean("nll") - mean("nll_baseline"))
    of_tokens: dict[str, Any] = {"weight": "tokens"}
    distance = {"kind": "distance", **of_tokens}
    aside: dict[str, Any] = {"headline": False}
    # d exp(x) = exp(x) dx, and d sqrt(x) = dx / (2 sqrt(x)): the delta method
    return [
        Metric("kld", mean("kld"), mean_error("kld"), n, "nats", False, **distance, when_zeroed="rises"),
        *(
            Metric(name, float(np.percentile(kld, p)), None, n, "nats", False, **aside)
            for name, p in PERCENTILES.items()
        ),
        Metric("kld_max", float(kld.max()), None, n, "nats", False, **aside),
        Metric(
            "delta_p",
            100 * mean("delta_p"),
            scaled(100, mean_error("delta_p")),
            n,
            "%",
            True,
            "mean",
            **of_tokens,
            **aside,
        ),
        Metric("rms_delta_p", 100 * rms, scaled(50 / rms, rms_error) if rms else rms_error, n, "%", False, **aside),
        Metric(
            "same_top",
            100 * mean("same_top"),
            scaled(100, mean_error("same_top")),
            n,
            "%",
            True,
            **distance,
            when_zeroed="falls",
        ),
        # what is compared is its ratio
        Metric("ppl", ppl, scaled(ppl, mean_error("nll")), n, "ppl", False),
        Metric("ppl_baseline", ppl_baseline, scaled(ppl_baseline, mean_error("nll_baseline")), n, "ppl", **aside),
        Metric(
            "ppl_ratio",
            ratio,
            scaled(ratio, error([(columns["nll"] - columns["nll_baseline"]).mean() for columns in documents])),
            n,
            "",
            False,
            "log",
            **of_tokens,
            when_zeroed="rises",
        ),
        *(
            _between(first, last, [columns["kld"][first:last] for columns in documents])
            for first, last in pairwise(positions)
        ),
    ]


def _between(first: int, last: int, kld: list[Any]) -> Metric:
    """The mean divergence of positions `first` to before `last`, an array a document."""
    import numpy as np
    from scipy.stats import sem

    means = [column.mean() for column in kld]
    stderr = float(sem(means)) if len(means) > 1 else None
    facts: dict[str, Any] = {"kind": "distance", "weight": "tokens", "when_zeroed": "rises"}
    return Metric(f"kld@{first}-{last}", float(np.mean(means)), stderr, len(means), "nats", False, **facts)
