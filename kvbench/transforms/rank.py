"""Ranking: key channels in the order of what they weigh in scores, each in units of its spread.

A channel's error reaches a score times the query's value there, so a channel weighs E[q²]·E[k²], both over the
calibration text and q over the query heads that read the KV head. A dtype that gives some places of a row more bits
than others (`Tiers`) then gives them to the channels that matter, and needs no scale a channel: queries are multiplied
by the spreads instead, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.transforms.base import NOTHING, Lowered, Params, Sample, Transform, grouped

SMALLEST = 2.0**-10  # of a spread, of its head's largest
TURNED = 16  # positions, evenly spread over the model's


@dataclass(frozen=True)
class Rank(Transform):
    """Channels sorted by E[q²]·E[k²], largest first, equal ones as they were; each divided by its spread, sqrt(E[k²]).

    Learned: order [HKV, D] int64; spread [HKV, D] float32, of the sorted channels.
    """

    keys_only: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    reads_queries: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        assert sample.queries is not None, "it reads queries"
        heads, head_dim = sample.keys.shape[1:]
        of_keys = self._mean_square(sample.keys, sample)  # [HKV, D]
        of_queries = self._mean_square(sample.queries, sample).view(heads, -1, head_dim).mean(1)
        order = torch.argsort(of_keys * of_queries, dim=-1, descending=True, stable=True)
        return _sorted(order, of_keys.sqrt())

    def _mean_square(self, x: Tensor, sample: Sample) -> Tensor:
        """[H, D] float64 of x [T, H, D]."""
        return _mean_square(x[sample.later])

    def apply(self, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return y.gather(-1, params["order"].expand(y.shape)) * (1 / params["spread"].to(y.dtype))

    def query(self, q: Tensor, params: Params) -> Tensor:
        order, spread = (grouped(params[name], q.shape[1]) for name in ("order", "spread"))
        return q.gather(-1, order.expand(q.shape)) * spread.to(q.dtype)

    def lower(self, head_dim: int, params: Params = NOTHING) -> Lowered | None:
        none = torch.zeros(1, head_dim, dtype=torch.int64)
        return Lowered(order=params.get("order", none), spread=params.get("spread", none.to(torch.float32) + 1))


@dataclass(frozen=True)
class RankFar(Rank):
    """As `rank`, for all of the model's positions, few of which the calibration text reaches, and for rare large keys.

    RoPE turns two channels into each other, slow pairs over tens of thousands of tokens: what is wide at the first
    positions is narrow at others. So both means are over all positions; where the rotary embedding is not known, over
    the text's. A spread is (E[k⁸] / 105)^(1/8), a Gaussian's deviation, and more than that where tails are heavy: a
    code that ends too soon costs most. E[k⁸] is over keys turned to 16 positions.
    """

    def learn(self, sample: Sample) -> Params:
        order = super().learn(sample)["order"]
        keys, positions = sample.keys[sample.later], sample.positions[sample.later]
        step = max(1, len(keys) // 2048)
        keys, positions = keys[::step].to(torch.float64), positions[::step]
        if sample.rope is not None:
            bare = sample.rope.turn(keys, positions, back=True)
            places = [int((i + 0.5) * sample.max_length / TURNED) for i in range(TURNED)]
            eighth = sum(_eighth(sample.rope.turn(bare, torch.full_like(positions, at))) for at in places) / TURNED
        else:
            eighth = _eighth(keys)
        return _sorted(order, (eighth / 105) ** 0.125)

    def _mean_square(self, x: Tensor, sample: Sample) -> Tensor:
        if sample.rope is None:
            return super()._mean_square(x, sample)
        later = sample.later
        return sample.rope.mean_square(x[later], sample.positions[later], sample.max_length)


def _sorted(order: Tensor, spread: Tensor) -> Params:
    """What is learned, of spreads [HKV, D] of the channels as they were, none too small."""
    spread = spread.clamp_min(SMALLEST * spread.amax(-1, keepdim=True)).clamp_min(1e-6).gather(-1, order)
    return {"order": order, "spread": spread.to(torch.float32)}


def _eighth(x: Tensor) -> Tensor:
    """[H, D]: the mean eighth power of x [T, H, D]."""
    return x.square().square().square().mean(0)


def _mean_square(x: Tensor) -> Tensor:
    """[H, D] float64 of x [T, H, D]."""
    total = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    for part in x.split(1024):
        total += part.to(torch.float64).square().sum(0)
    return total / len(x)


_SOURCE = (
    "bits by what an error costs: reverse water-filling, Shannon 1959; E[q²] as in https://arxiv.org/abs/2306.00978"
)
rank = Rank("rank", source=_SOURCE)
rank_far = RankFar("rank_far", source=f"{_SOURCE}; RoPE, https://arxiv.org/abs/2104.09864")
