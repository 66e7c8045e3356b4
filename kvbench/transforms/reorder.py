"""Reordering: channels whose ranges are alike stand side by side, so that those that share a scale need the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.transforms.base import Params, Sample, Transform, grouped


@dataclass(frozen=True)
class Reorder(Transform):
    """Channels of each head in the order that halving finds: by their least or their greatest value, again and again.

    A set of channels is halved where it is wider: sorted by their least values over the calibration text, or by their
    greatest. SKVQ clusters both with k-means over all heads, in groups of any size; here a row is one head's, and
    groups are of one size, whichever a dtype has. Learned: order [HKV, D] int64.
    """

    learns: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        ends = torch.stack([sample.keys.amin(0), sample.keys.amax(0)]).to(torch.float64)  # [2, HKV, D]
        return {"order": torch.stack([_halved(own, torch.arange(own.shape[-1])) for own in ends.unbind(1)])}

    def apply(self, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
        return x.gather(-1, params["order"].expand(x.shape))

    def query(self, q: Tensor, params: Params) -> Tensor:
        return q.gather(-1, grouped(params["order"], q.shape[1]).expand(q.shape))

    def undo(self, o: Tensor, params: Params) -> Tensor:
        back = params["order"].argsort(-1)
        return o.gather(-1, grouped(back, o.shape[1]).expand(o.shape))


def _halved(ends: Tensor, channels: Tensor) -> Tensor:
    """[n] of these channels [n], of whose ends [2, D] both halves are alike."""
    if len(channels) < 2:
        return channels
    own = ends[:, channels]
    wider = own[int((own.amax(-1) - own.amin(-1)).argmax())]
    channels = channels[wider.argsort(stable=True)]
    return torch.cat([_halved(ends, half) for half in channels.tensor_split(2)])


reorder = Reorder("reorder", source="SKVQ, https://arxiv.org/abs/2405.06219, its channel reorder")
