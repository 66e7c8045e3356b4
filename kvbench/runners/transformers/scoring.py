"""What a model makes of texts: log-probabilities of continuations, and last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kvbench.cache import to_device
from kvbench.runners.base import Progress, Score, ScoreRequest
from kvbench.runners.transformers.passes import Passes, unshared
from kvbench.runners.transformers.prefix import Segment, segments

# of a segment: from a position to before another it must predict what stands from this place on in all continuations
Wanted = dict[Segment, list[tuple[int, int, int]]]


def score(passes: Passes, requests: Sequence[ScoreRequest], progress: Progress | None) -> list[Score]:
    """One Score a request, in the order of the requests."""
    device = passes.memory.device
    sequences = [(*r.context, *r.continuation)[:-1] for r in requests]
    roots = passes.split_tree(requests) if passes.scoring == "prefill_exact" else passes.tree(sequences)
    counts = [len(r.continuation) for r in requests]
    targets = to_device([token for r in requests for token in r.continuation], torch.int64, device)
    values = torch.empty(len(targets), device=device)
    likeliest = torch.empty(len(targets), dtype=torch.bool, device=device)
    wanted = _wanted(roots, requests)

    done = 0
    for chunks, hidden in passes.prefill(roots, sequences):
        rows: list[int] = []  # of `hidden`, and
        asked: list[int] = []  # which of `targets` each must predict
        first = 0
        for chunk in chunks:
            for begin, end, target in wanted.get(chunk.segment, ()):
                # a segment may take several passes: a range that ends before it begins is empty
                low, high = max(begin, chunk.start), min(end, chunk.start + len(chunk.tokens))
                rows += range(first + low - chunk.start, first + high - chunk.start)
                asked += range(target + low - begin, target + high - begin)
            first += len(chunk.tokens)
        _score_rows(passes, hidden, rows, asked, targets, values, likeliest)
        done += sum(len(chunk.segment.ending) for chunk in chunks if chunk.completes)
        if progress is not None and any(chunk.completes and chunk.segment.ending for chunk in chunks):
            progress(done, len(requests))
    if not requests:
        return []
    tops, ends = likeliest.tolist(), accumulate(counts)
    split = zip(values.cpu().split(counts), counts, ends, strict=True)
    return [Score(logprobs, all(tops[end - count : end])) for logprobs, count, end in split]


def hidden_states(
    passes: Passes, documents: Sequence[Sequence[int]], progress: Progress | None, shared: bool
) -> list[Tensor]:
    """For each document, the last hidden states [len(document), H], on the CPU, in the compute dtype."""
    # a document's tokens count as generated, so with "prefill_exact" too they read the cache
    roots = passes.tree(documents, min_shared=1) if shared else unshared(documents)
    found: dict[Segment, list[Tensor]] = {segment: [] for segment in segments(roots)}
    done = 0
    for chunks, hidden in passes.prefill(roots, documents):
        rows = hidden.cpu().split([len(chunk.tokens) for chunk in chunks])
        for chunk, own in zip(chunks, rows, strict=True):
            found[chunk.segment].append(own)
            done += len(chunk.segment.ending) if chunk.completes else 0
        if progress is not None:
            progress(done, len(documents))
    states = [torch.empty(0)] * len(documents)
    for leaf in found:
        for i in leaf.ending:
            states[i] = torch.cat([own for segment in leaf.path for own in found[segment]])
    return states


@torch.inference_mode()
def _score_rows(
    passes: Passes,
    hidden: Tensor,
    rows: list[int],
    asked: list[int],
    targets: Tensor,
    values: Tensor,
    likeliest: Tensor,
) -> None:
    """Log-probabilities of the targets asked for, into `values`, and whether each is the likeliest token."""
    if not rows:
        return
    # a row that several ask for is computed once
    at, row_of = torch.tensor(rows).unique(return_inverse=True)
    row_of, order = row_of.sort()
    most = max(16, passes.memory.limits.logits // passes.forward.vocabulary)
    lows = range(0, len(at), most)
    bounds = [*torch.searchsorted(row_of, torch.tensor(lows)).tolist(), len(rows)]
    at, row_of, target_of = (
        to_device(x, torch.int64, targets.device) for x in (at, row_of, torch.tensor(asked)[order])
    )
    for low, (begin, end) in zip(lows, pairwise(bounds), strict=True):
        log_p = passes.forward.log_probs(hidden[at[low : low + most]])
        row, target = row_of[begin:end] - low, target_of[begin:end]
        values[target] = log_p[row, targets[target]]
        likeliest[target] = log_p.argmax(-1)[row] == targets[target]


def _wanted(roots: Sequence[Segment], requests: Sequence[ScoreRequest]) -> Wanted:
    """What each segment must predict, joined in the order of the requests."""
    firsts = list(accumulate((len(r.continuation) for r in requests), initial=0))
    found: Wanted = {}
    for leaf in segments(roots):
        for i in leaf.ending:
            begin, end = len(requests[i].context) - 1, leaf.end
            segment: Segment | None = leaf
            while segment is not None and begin < end:
                low = max(begin, segment.start)
                found.setdefault(segment, []).append((low, end, firsts[i] + low - begin))
                end, segment = segment.start, segment.parent
    return found
