"""What a model makes of texts: log-probabilities of continuations, and last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbench.cache import on_device
from kvbench.cache.ranges import Grouped, Ints, ranges, starts_of
from kvbench.runners.base import Progress, Score, ScoreRequest, ScoreRequests, Scores
from kvbench.runners.transformers.forward import Forward
from kvbench.runners.transformers.passes import Passes
from kvbench.runners.transformers.prefix import Flat, Tree, unshared
from kvbench.runners.transformers.schedule import Chunks


def score(passes: Passes, requests: Sequence[ScoreRequest], progress: Progress | None) -> Sequence[Score]:
    """One Score a request, in the order of the requests."""
    if not requests:
        return []
    asked = ScoreRequests.of(requests)
    split = passes.scoring == "prefill_exact"
    key = split, passes.forward.alone
    if key not in asked.kept:
        asked.kept[key] = Plan.of(passes, asked, split)
    plan: Plan = asked.kept[key]
    tree, wanted, counts = plan.tree, plan.wanted, asked.counts
    (targets,) = on_device([plan.targets], passes.forward.places.last)
    values = torch.empty(len(targets), device=targets.device)
    likeliest = torch.empty(len(targets), dtype=torch.bool, device=targets.device)

    most = max(16, passes.memory.limits.logits // passes.forward.vocabulary)
    done = 0
    for one, hidden, arrays in passes.prefill(tree, lambda chunks: Rows.of(*wanted.rows(chunks), most), asked.kept):
        _score_rows(passes.forward, hidden, one.rows, arrays, targets, values, likeliest)
        ended = int(tree.ending.counts[one.chunks.segments[one.chunks.completes]].sum())
        done += ended
        if progress is not None and ended:
            progress(done, len(requests))
    greedy = np.logical_and.reduceat(likeliest.cpu().numpy(), starts_of(counts))
    return Scores(values.cpu(), counts, greedy)


def hidden_states(
    passes: Passes, documents: Sequence[Sequence[int]], progress: Progress | None, shared: bool
) -> list[Tensor]:
    """For each document, the last hidden states [len(document), H], on the CPU, in the compute dtype."""
    # a document's tokens count as generated, so with "prefill_exact" too they read the cache
    sequences = Flat.of(documents)
    tree = passes.tree(sequences, min_shared=1) if shared else unshared(sequences)
    found: list[list[Tensor]] = [[] for _ in range(len(tree))]
    # over several devices no pass waits for a copy of the last one, which takes memory that the host can't page out
    several = len(passes.forward.places.devices) > 1
    done = 0
    for one, hidden, _ in passes.prefill(tree):
        chunks = one.chunks
        rows = hidden.to("cpu", non_blocking=several).split(chunks.counts.tolist())
        for segment, own in zip(chunks.segments.tolist(), rows, strict=True):
            found[segment].append(own)
        done += int(tree.ending.counts[chunks.segments[chunks.completes]].sum())
        if progress is not None:
            progress(done, len(documents))
    if several and passes.forward.places.last.type == "cuda":
        torch.cuda.synchronize(passes.forward.places.last)
    return [torch.cat([own for segment in tree.path(leaf) for own in found[segment]]) for leaf in tree.leaf.tolist()]


@dataclass(frozen=True)
class Plan:
    """What is computed of requests, whatever the scheme: their tree, what it must predict, and all targets [n]."""

    tree: Tree
    wanted: Wanted
    targets: Ints

    @classmethod
    def of(cls, passes: Passes, asked: ScoreRequests, split: bool) -> Self:
        """Of these requests. split: contexts are computed exactly, and what follows reads the cache."""
        sequences = Flat(asked.tokens, asked.firsts, asked.contexts + asked.counts - 1)
        tree = passes.split_tree(sequences, asked.contexts) if split else passes.tree(sequences)
        wanted = Wanted.of(tree, asked.contexts, starts_of(asked.counts))
        targets = asked.tokens[ranges(asked.firsts + asked.contexts, asked.counts)].astype(np.int64)
        return cls(tree, wanted, targets)


@dataclass(frozen=True)
class Wanted:
    """What each segment must predict: from a position to before another what stands from a place on in all targets.

    by_segment: of entries, which have a begin, an end and the first one's target [n].
    """

    by_segment: Grouped
    begins: Ints
    ends: Ints
    targets: Ints

    @classmethod
    def of(cls, tree: Tree, contexts: Ints, targets: Ints) -> Wanted:
        """Of requests with contexts of so many tokens, whose targets begin at these places."""
        found = []
        # from its last token back, the segments of each request that lie behind its context's last token but one
        segment, begin = tree.leaf, contexts - 1
        end = tree.end[segment]
        while len(segment):
            low = np.maximum(begin, tree.start[segment])
            found.append((segment, low, end, targets + low - begin))
            onward = (tree.start[segment] > begin) & (tree.parent[segment] >= 0)
            segment, end = tree.parent[segment[onward]], tree.start[segment[onward]]
            begin, targets = begin[onward], targets[onward]
        segments, begins, ends, firsts = (np.concatenate(column) for column in zip(*found, strict=True))
        return cls(Grouped.by(segments, 0, len(tree)), begins, ends, firsts)

    def rows(self, chunks: Chunks) -> tuple[Ints, Ints]:
        """Of a pass's tokens those that must predict, once for each target, and the targets."""
        bounds = self.by_segment.bounds
        counts = self.by_segment.counts[chunks.segments]
        entries = self.by_segment.order[ranges(bounds[chunks.segments], counts)]
        chunk = np.repeat(np.arange(len(chunks)), counts)
        # a segment may take several passes: a range that ends before it begins is empty
        start = chunks.starts[chunk]
        low = np.maximum(self.begins[entries], start)
        many = np.maximum(np.minimum(self.ends[entries], start + chunks.counts[chunk]) - low, 0)
        rows = ranges(starts_of(chunks.counts)[chunk] + low - start, many)
        return rows, ranges(self.targets[entries] + low - self.begins[entries], many)


@dataclass(frozen=True)
class Rows:
    """What a pass's hidden states must predict: the arrays of `of`, and how its distinct rows are cut up.

    lots: of so many distinct rows at most, the entries that ask for one of them begin and end there.
    """

    arrays: list[NDArray[Any]]
    lots: list[tuple[int, int]]
    most: int

    @classmethod
    def of(cls, rows: Ints, targets: Ints, most: int) -> Self:
        """Of rows, once for each target: [distinct rows], of each entry its row in its lot, and its target."""
        # a row that several ask for is computed once
        distinct, row_of = np.unique(rows, return_inverse=True)
        order = np.argsort(row_of, kind="stable")
        row_of = row_of[order]
        bounds = np.searchsorted(row_of, range(0, len(distinct) + most, most)).tolist()
        return cls([distinct, row_of % most, targets[order]], [*pairwise(bounds)], most)


@torch.inference_mode()
def _score_rows(
    forward: Forward,
    hidden: Tensor,
    rows: Rows,
    arrays: Sequence[Tensor],
    targets: Tensor,
    values: Tensor,
    likeliest: Tensor,
) -> None:
    """Log-probabilities of the targets asked for, into `values`, and whether each is the likeliest token."""
    if not rows.lots:
        return
    distinct, row, target = (x.to(forward.places.last, non_blocking=True) for x in arrays)
    for own, (begin, end) in zip(distinct.split(rows.most), rows.lots, strict=True):
        these = target[begin:end]
        values[these], likeliest[these] = _predicted(forward, hidden[own], row[begin:end], targets[these])


def _predicted(forward: Forward, hidden: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[m] float32 log-probabilities of targets after rows of hidden [n, H]; [m] whether each is the likeliest."""
    if not forward.fused:
        log_p = forward.log_probs(hidden)
        return log_p[rows, targets], log_p.argmax(-1)[rows] == targets
    logits = forward.logits(hidden)
    peak, best, total = forward.fused().peaks(logits)
    return logits[rows, targets].float() - peak[rows] - total.log()[rows], best[rows] == targets
