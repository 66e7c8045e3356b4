"""What each layer's keys, and its values, cost alone: the next-token divergence with all others exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from kvbench.calibration import Calibration
from kvbench.results import Metric, Outcome
from kvbench.tasks import text
from kvbench.tasks.base import Line, NamedPath, Need, Options, RunContext, SideName, Tokens, Work
from kvbench.tasks.divergence import compare, split
from kvbench.tasks.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.runners.base import Runner

VERSION = 1
SIDES: tuple[SideName, ...] = ("key", "value")


class Layers(Options):
    """Divergence of each layer's keys and values alone, all others exact: what each layer costs."""

    name: Line = "layers"
    tokens: Annotated[Tokens, Field(ge=2)] = 4096
    """In all, spread over the text."""
    context: Annotated[Tokens, Field(ge=2)] = 1024
    """Tokens of one document, its first token included."""
    text: NamedPath | None = None
    """A UTF-8 file; without one, the calibration text that ships with kvbench, which no task scores."""
    sides: Annotated[tuple[Literal["key", "value"], ...], Field(strict=False, min_length=1)] = SIDES
    """Of keys, of values, or of both."""

    def identity(self) -> dict[str, Any]:
        source = self._source()
        return {
            "task": "layers",
            "version": VERSION,
            "context": self.context,
            "documents": self._documents,
            "text": source.source,
            "text_sha256": source.sha256,
            "sides": list(self.sides),
        }

    @property
    def _documents(self) -> int:
        documents = max(1, self.tokens // self.context)
        return min(documents, self.limit or documents)

    def _source(self) -> Text:
        if self.text is not None:
            return text.read(self.text)
        shipped = Calibration().read()
        return Text("calibration.txt", shipped, text.sha256(shipped))

    def missing(self) -> list[str]:
        try:
            self._source()
        except ValueError as error:
            return [str(error)]
        return []

    def answers(self) -> None:
        return None

    def longest(self) -> int:
        return self.context

    def work(self) -> Work:
        return Work(self._documents * self.context, by_layer=len(self.sides))

    def needs(self) -> frozenset[Need]:
        return frozenset({"tokenizer", "hidden states"})

    def metrics(self) -> tuple[str, ...]:
        return tuple(f"kld_{side}s" for side in self.sides)

    def run(self, runner: Runner, context: RunContext) -> Outcome:
        """KL of each layer and side alone, `kld_l3_key`, and their sums over the layers, `kld_keys`.

        The exact distribution is computed as the others are, by the same implementation and in the same passes, so that
        a layer that loses nothing has 0.

        Raises:
            ValueError: a document is longer than the model's positions, or the text is too short.
        """
        import torch

        assert context.alone is not None
        self.check_length(runner.info.max_length)
        source = self._source()
        documents = split(source.text, runner.tokenizer, self.context, self._documents)
        hashes = [text.sha256(" ".join(map(str, tokens))) for tokens in documents]
        all_hash = text.sha256(" ".join(hashes))
        exact = context.alone(None, "key")
        before = context.baseline(
            f"layers-{all_hash[:16]}-{getattr(runner, 'attention', '')}",
            lambda _: {"hidden": torch.stack(exact.hidden_states(documents))},
        )["hidden"]

        samples: list[dict[str, Any]] = [
            {"doc_id": i, "doc_hash": digest, "prompt_hash": digest, "filter": "none", "tokens": len(tokens) - 1}
            for i, (digest, tokens) in enumerate(zip(hashes, documents, strict=True))
        ]
        layers = len(runner.info.layers)
        for layer in range(layers):
            for place, side in enumerate(self.sides):
                after = context.alone(layer, side).hidden_states(documents)
                for row, tokens, a, b in zip(samples, documents, before, after, strict=True):
                    row[f"kld_l{layer}_{side}"] = _mean_kld(runner, a, b, torch.tensor(tokens))
                context.progress(layer * len(self.sides) + place + 1, layers * len(self.sides))
        for row in samples:
            for side in self.sides:
                row[f"kld_{side}s"] = sum(row[f"kld_l{layer}_{side}"] for layer in range(layers))
        metrics = [_metric(f"kld_{side}s", samples, headline=True) for side in self.sides]
        metrics += [_metric(f"kld_l{layer}_{side}", samples) for layer in range(layers) for side in self.sides]
        facts = {
            "documents_sha256": all_hash,
            "documents": len(documents),
            "context": self.context,
            "predictions": sum(row["tokens"] for row in samples),
            "text": source.source,
            "text_sha256": source.sha256,
        }
        return Outcome(tuple(metrics), samples, facts)


def _mean_kld(runner: Runner, before: Tensor, after: Tensor, tokens: Tensor) -> float:
    kld = compare(runner, before, after, tokens)["kld"]
    if not bool(kld.isfinite().all()):
        raise ValueError("the model's output is not finite, so there is no divergence to report")
    return float(kld.mean())


def _metric(name: str, samples: list[dict[str, Any]], headline: bool = False) -> Metric:
    import numpy as np
    from scipy.stats import sem

    values = [row[name] for row in samples]
    stderr = float(sem(values)) if len(values) > 1 else None
    facts: dict[str, Any] = {"kind": "distance", "weight": "tokens", "when_zeroed": "rises", "headline": headline}
    return Metric(name, float(np.mean(values)), stderr, len(values), "nats", False, **facts)
