"""Tiers whose channels take up each other's errors: of all rows of codes, one that moves scores less than the nearest.

GPTQ (https://arxiv.org/abs/2210.17323) does so to weights. An error e of a stored key moves a query's score by q·e, in
the mean square by e·M e with M the queries' second moments, and where queries favour some directions the errors of
several channels can be made to cancel: each channel's error is taken up by those behind it, as M says. Rows are read
as those of the tiers are; they are written a channel after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvbench.dtypes import e5m3
from kvbench.dtypes.base import STEPS, Rows, Tiers
from kvbench.dtypes.tiers import TiersPerTokenHead, search, tiers421_per_token_head
from kvbench.transforms.base import Params, Sample

DAMPING = 0.02  # share of the queries' mean square that each channel has at least


@dataclass(frozen=True)
class TiersFedBack(TiersPerTokenHead):
    """The scale is that of the tiers without feedback; then each channel is rounded in turn, and its error taken up.

    With y what is left of the row at channel c and s the scale times its step: the code of y[c] / s - 1/2, clamped and
    rounded, halves to even; the error is (y[c] - decoded) · 1/up[c, c], and y[j] loses error · up[c, j] for each j > c.
    Products, differences and the rounded inverses of s and of up[c, c] are single float32 operations.
    up: [HKV, D, D], of rows [..., HKV, D]; without it, nothing is taken up.
    Learned: up, the upper Cholesky factor of M's inverse; M over queries at any of the model's positions.
    """

    up: Tensor | None = field(default=None, compare=False, repr=False)
    learns: ClassVar[bool] = True
    reads_queries: ClassVar[bool] = True
    reads_anywhere: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        assert sample.queries is not None, "it reads queries"
        heads, head_dim = sample.keys.shape[1:]
        q = sample.queries.to(torch.float64).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)  # [HKV, T', D]
        moments = q.mT @ q / q.shape[1]
        ridge = (DAMPING * moments.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(1e-30)
        moments += ridge[:, None, None] * torch.eye(head_dim, dtype=torch.float64)
        return {"up": torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).to(torch.float32)}

    def bind(self, params: Params) -> Self:
        return replace(self, up=params["up"]) if params else self

    def quantize(self, x: Tensor, tensor_scale: Tensor | None = None) -> Rows:
        widths = self.tiers.by_channel(x.shape[-1])
        codes, scale = search(x, widths, tuple(STEPS[bits] for bits in widths))
        if self.up is None:
            return Rows(self.pack(codes), scale)
        up = self.up.to(x.device)
        whole = scale != e5m3.NAN
        left = x.to(torch.float32).masked_fill(~whole.unsqueeze(-1), 0)
        gain = e5m3.decode(scale).masked_fill(~whole, 1)
        inverse = {bits: 1 / (gain * STEPS[bits]) for bits in set(widths)}
        found = []
        for c, bits in enumerate(widths):
            half = 2.0 ** (bits - 1)
            z = (left[..., c] * inverse[bits] - 0.5).clamp(-half, half - 1).round()
            found.append(z + half)
            error = (left[..., c] - (z + 0.5) * (gain * STEPS[bits])) * (1 / up[:, c, c])
            left[..., c + 1 :] -= error.unsqueeze(-1) * up[:, c, c + 1 :]
        codes = torch.stack(found, -1).masked_fill(~whole.unsqueeze(-1), 0)
        return Rows(self.pack(codes.to(torch.uint8)), scale)


tiers421_feedback = TiersFedBack(
    "tiers421_feedback",
    2,
    Tiers(tiers421_per_token_head.tiers.widths),
    "per_token_head",
    f"{tiers421_per_token_head.source}; error feedback as in GPTQ, https://arxiv.org/abs/2210.17323",
)
