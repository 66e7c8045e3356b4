"""One metric of one cell: a number a document, and how it changed over the same documents. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvbench.results import Metric, exponential
from kvbench.stats import Array, Difference, compare_answers, compare_distances, compare_means, compare_scores

if TYPE_CHECKING:
    import pyarrow as pa


NUMBERS = re.compile(r"u?int\d+|float|double|bool")  # types of a column
Document = tuple[str, str, str, str, str]  # task, doc_id, filter, hash of the document, hash of the prompt


class NoSeriesError(ValueError):
    """A metric of which the samples hold no number a document; the message says why."""


@dataclass(frozen=True)
class Series:
    """One metric of one cell.

    values: [n], a number a document, as the metric's kind says. weights: [n], what each counts for, such as its tokens;
    None where all count alike.
    documents: [n] in the order of `values`; a baseline file has only their `digest`.
    clusters: [n]; documents of one are not independent. What a task's `cluster` names, else each document by itself.
    """

    metric: Metric
    values: Array
    weights: Array | None
    digest: str
    documents: tuple[Document, ...] = ()
    clusters: tuple[str, ...] = ()


class Samples:
    """A cell's samples with each column taken out of the table once, for all of its metrics."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.names = set(table.column_names)
        self._texts: dict[str, NDArray[np.object_]] = {}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def texts(self, name: str) -> NDArray[np.object_]:
        """[n]: a column as text; what is absent is `nan`."""
        if name not in self._texts:
            values = self._table.column(name).to_pylist()
            self._texts[name] = np.array(["nan" if value is None else str(value) for value in values], object)
        return self._texts[name]

    def numbers(self, name: str) -> Array:
        """[n]: a column of numbers; what is absent is nan.

        Raises:
            NoSeriesError: it is no column of numbers.
        """
        column = self._table.column(name) if name in self.names else None
        if column is None or not NUMBERS.fullmatch(str(column.type)):
            raise NoSeriesError("the samples have no number a document")
        # as a list: pyarrow's own way to numpy imports pandas
        return np.array(column.to_pylist(), float)


def series_of(metric: Metric, samples: pa.Table | Samples) -> Series:
    """A metric's number a document, of which the mean (for a perplexity, its logarithm's) is the metric's value.

    Raises:
        NoSeriesError: the samples have no such numbers, or numbers that do not give the value.
    """
    rows = samples if isinstance(samples, Samples) else Samples(samples)
    lacking = {"doc_id", "doc_hash", "prompt_hash", "filter"} - rows.names
    if lacking:
        raise NoSeriesError(f"the samples lack {', '.join(sorted(lacking))}")
    leaf, _, name = metric.name.rpartition("/")
    name, _, filter_name = name.partition(",")
    # acc@1024 is acc of the documents of that context; kld@1024-2048 is a number of every document
    name, _, context = (name, "", "") if name in rows.names else name.partition("@")
    chosen = rows.texts("filter") == (filter_name or "none")
    if leaf:
        chosen &= rows.texts("task") == leaf
    if context and "context" in rows.names:
        chosen &= rows.numbers("context") == int(context)
    log = metric.kind == "log"
    column = f"{name}.logprob" if log and f"{name}.logprob" in rows.names else name
    if metric.kind is None:
        raise NoSeriesError("the samples have no number a document")
    numbers = rows.numbers(column)
    chosen &= ~np.isnan(numbers)
    values = numbers[chosen]
    if not values.size:
        raise NoSeriesError("the samples have no number a document")
    if metric.weight is not None and metric.weight not in rows.names:
        raise NoSeriesError(f"the samples lack {metric.weight}")
    weights: Array | None = rows.numbers(metric.weight)[chosen] if metric.weight else None
    if column != name:  # of all its words or bytes together
        values = -values / weights
    elif log:  # of lm-eval's `perplexity` the samples have the log-likelihood, which is never above 0
        values = np.log(values) if (values > 0).all() else -values
    elif metric.kind == "share" and not ((values >= 0) & (values <= 1)).all():
        raise NoSeriesError(f"it is a share of 1, and a document has {values[(values < 0) | (values > 1)][0]:g}")
    if metric.higher_is_better is None:
        raise NoSeriesError("it is not said whether higher is better")
    if not np.isfinite(values).all():
        raise NoSeriesError("a document's number is not finite")
    whole = float(np.average(values, weights=weights))
    value = exponential(whole) if log else whole
    if not math.isclose(value, metric.value, rel_tol=1e-4, abs_tol=1e-9):
        raise NoSeriesError("it is no mean over documents: the samples' mean is not the metric's value")
    columns = [tuple(rows.texts(name)[chosen]) for name in ("doc_id", "filter", "doc_hash", "prompt_hash")]
    task = tuple(rows.texts("task")[chosen]) if "task" in rows.names else ("",) * len(values)
    # a document that is asked twice is one document
    named = tuple(rows.texts("cluster")[chosen]) if "cluster" in rows.names else columns[2]
    documents, clusters, order, digest = _in_order(named, task, *columns)
    picked = None if weights is None else weights[order]
    return Series(metric, values[order], picked, digest, documents, clusters)


@lru_cache(maxsize=100)  # the cells of a task have the same documents
def _in_order(
    named: tuple[str, ...], *columns: tuple[str, ...]
) -> tuple[tuple[Document, ...], tuple[str, ...], NDArray[np.intp], str]:
    """The documents of such columns in the order of their numbers, 2 before 10; their clusters, where each was, a hash.

    Raises:
        NoSeriesError: one is there twice.
    """
    found: list[Document] = list(zip(*columns, strict=True))
    order = sorted(range(len(found)), key=lambda i: (found[i][0], len(found[i][1]), found[i][1:]))
    documents = tuple(found[i] for i in order)
    if len({document[:3] for document in documents}) < len(documents):
        raise NoSeriesError("the samples have a document twice")
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]
    return documents, tuple(named[i] for i in order), np.array(order, np.intp), digest


def paired(series: Series, base: Series, origin: bool = False) -> Difference:
    """How one metric changed over the same documents; a perplexity's is that of its logarithm.

    origin: `base` is the sweep's baseline, which distances are measured from.
    """
    difference: Array = series.values - base.values
    clusters = series.clusters or base.clusters or None
    if series.metric.kind == "share":
        return compare_answers(difference, clusters)
    if series.metric.kind == "distance" and origin:
        return compare_distances(difference, clusters, series.weights)
    if series.metric.kind == "mean" and series.weights is None:
        return compare_scores(difference, clusters)
    return compare_means(difference, clusters, series.weights)
