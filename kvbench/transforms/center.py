"""Centring: keys without the mean of each channel, which a bias of the key projection can make a hundred times wider.

Softmax does not see a constant added to all keys: q·(k - μ) = q·k - q·μ, and q·μ is the same for every key. But RoPE
turns a bias with the position, so a mean over all positions ages; the mean of a page's own positions does not, and
costs one more score a page: q·μ[page], added to the scores of that page's keys.

Values may be centred too: weights that sum to one give the mean back, Σp (v - μ) + μ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.transforms.base import NOTHING, POSITIONS, Lowered, Params, Sample, Transform, grouped


@dataclass(frozen=True)
class CenterConstant(Transform):
    """The mean of a channel over all positions of the calibration text: of keys after RoPE, or of values.

    Learned: offset [1, HKV, D] float32.
    """

    learns: ClassVar[bool] = True
    turns: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        return {"offset": sample.keys.to(torch.float64).mean(0, keepdim=True).to(torch.float32)}

    def apply(self, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
        offset = params["offset"]
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if len(offset) == 1:
            return y - offset.to(y.dtype)
        assert positions is not None, "a mean by page is taken off at a position"
        return y - offset[positions // POSITIONS].to(y.dtype)

    def score(self, q: Tensor, params: Params) -> Tensor:
        return torch.einsum("thd,phd->thp", q, grouped(params["offset"].to(q.dtype), q.shape[1]))

    def undo(self, o: Tensor, params: Params) -> Tensor:
        return o + grouped(params["offset"].to(o), o.shape[1])

    def lower(self, head_dim: int, params: Params = NOTHING) -> Lowered:
        offset = params.get("offset", torch.zeros(1, 1, head_dim))
        return Lowered(offset=offset[0] if len(offset) == 1 else offset)


@dataclass(frozen=True)
class Center(CenterConstant):
    """The mean of a key channel over the 64 positions of a page: of the mean before RoPE, turned to each of them.

    Where the model's rotary embedding is not known (another convention than rotate-half, or frequencies that change
    with the length), or where the calibration text's keys lie nearer their constant mean, that is taken.
    Learned: offset [pages, HKV, D] float32, or [1, HKV, D].
    """

    keys_only: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        constant = super().learn(sample)
        if sample.rope is None:
            return constant
        keys = sample.keys.to(torch.float64)
        mean = sample.rope.turn(keys, sample.positions, back=True).mean(0)
        pages = -(-max(sample.max_length, int(sample.positions.max()) + 1) // POSITIONS)
        by_page = {"offset": sample.rope.page_means(mean, pages).to(torch.float32)}
        left, left_constant = (self._left(sample, params) for params in (by_page, constant))
        return by_page if left < left_constant else constant

    def _left(self, sample: Sample, params: Params) -> float:
        """The square of what is left of the mean key of a page of positions, the mean over pages and channels."""
        rows = self.apply(sample.keys.to(torch.float64), params, sample.positions)
        page = sample.positions // POSITIONS
        sums = torch.zeros(int(page.max()) + 1, *rows.shape[1:], dtype=rows.dtype).index_add(0, page, rows)
        counts = page.bincount(minlength=len(sums)).clamp_min(1)
        return float((sums / counts[:, None, None]).square().mean())


_SOURCE = "softmax does not see what is added to the scores of all keys alike"
center = Center("center", source=_SOURCE)
center_constant = CenterConstant("center_constant", source=_SOURCE)
