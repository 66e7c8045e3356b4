"""The logit correction: what a stored key's noise does to softmax, taken off its scores.

A score that is wrong by noise of variance σ² weighs e^(σ²/2) times what it should in the mean, or what it should weighs
so many times more: which of both hangs on the code. With codes that are fitted to their rows (a centroid, a path of a
trellis) what is stored is the mean of what it may stand for, so e^score of the key lies above; with codes that round,
the noise is the stored value's. The variance is the query's square times the noise of the key, which is a share of its
own square where a rotation has made all channels alike. Keys that are read in 16 bits have no noise: there it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.transforms.base import FIRST, Params, Sample, Transform, grouped

QUERIES = 256  # of a document, that its factor is learned from


@dataclass(frozen=True)
class Correction(Transform):
    """To a stored key's score comes factor · |q|² · |k|², for each query head a factor. It comes after a rotation.

    Fitted: of queries in the later half of a document, the logarithm of what all keys weigh together over what they
    weigh as stored, by least squares over queries; so its sign is what the code asks for. Learned: factor [HQ] float32.
    """

    keys_only: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    reads_queries: ClassVar[bool] = True
    reads_stored: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        assert sample.queries is not None, "it reads queries"
        heads, head_dim = sample.queries.shape[1:]
        scaling = head_dim**-0.5 if sample.scaling is None else sample.scaling
        above, below = torch.zeros(2, heads, dtype=torch.float64)
        for start, end in _documents(sample.positions):
            whole = grouped(sample.keys[start:end].to(torch.float32), heads)
            kept = grouped(sample.stored(sample.keys[start:end]).to(torch.float32), heads)
            middle = (end - start) // 2
            at = torch.arange(middle, end - start)[:: max(1, middle // QUERIES)]
            q = sample.queries[start:end][at].to(torch.float32)
            keys = torch.arange(end - start)
            hidden = (keys > at[:, None]) | (keys < FIRST)  # which a window with sinks reads in 16 bits
            if sample.window is not None:
                hidden |= keys <= at[:, None] - sample.window
            exact, stored = (
                (torch.einsum("thd,lhd->htl", q, k) * scaling).masked_fill(hidden, -torch.inf) for k in (whole, kept)
            )
            lengths = kept.square().sum(-1).T[:, None] * q.square().sum(-1).T[:, :, None]  # [HQ, queries, keys]
            mean = (stored.softmax(-1) * lengths).sum(-1).double() * scaling
            lacks = (exact.logsumexp(-1) - stored.logsumexp(-1)).double()
            above, below = above + (mean * lacks).sum(-1), below + mean.square().sum(-1)
        factor = torch.where(below > 0, above / below, 0)
        return {"factor": factor.to(torch.float32)}

    def lift(self, q: Tensor, params: Params) -> Tensor:
        return params["factor"].to(q) * q.square().sum(-1)


def _documents(positions: Tensor) -> list[tuple[int, int]]:
    """Begin and end of each run of following positions from 0 on: a document, or as much of it as came in one piece."""
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist(), len(positions)]
    return [(start, end) for start, end in pairwise(starts) if positions[start] == 0]


correction = Correction(
    "correction",
    source="kvbench: the mean of e^x of a Gaussian x; keys' noise as in https://arxiv.org/abs/2401.18079",
)
