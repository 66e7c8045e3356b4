"""Balancing: keys and their queries brought to one spread, which leaves every score as it is.

With k' = A k and q' = A⁻ᵀ q, q'·k' = q·k. Noise of one size in each channel of k' moves the scores least where the
second moments of both are equal: A E[k kᵀ] Aᵀ = A⁻ᵀ E[q qᵀ] A⁻¹. `center` comes before it: then they are covariances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.transforms.base import NOTHING, Lowered, Params, Sample, Transform, grouped

RIDGE = 1e-6  # share of the mean second moment that each direction has at least: a channel that is never used divides
LEAST = 1e-30  # where all is zero


@dataclass(frozen=True)
class Balance(Transform):
    """Each channel of the keys times (E[q²] / E[k²])^¼, over the positions and the query heads of a group.

    Learned: forward, backward [HKV, D] float64.
    """

    keys_only: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    reads_queries: ClassVar[bool] = True

    def learn(self, sample: Sample) -> Params:
        q, k = (moments(x, sample.keys.shape[1]).diagonal(dim1=-2, dim2=-1) for x in both(sample))
        forward = (q / k) ** 0.25
        return {"forward": forward, "backward": 1 / forward}

    def apply(self, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return y * params["forward"].to(y)

    def query(self, q: Tensor, params: Params) -> Tensor:
        return (q * grouped(params["backward"][None], q.shape[1]).to(q.device)).to(q.dtype)


@dataclass(frozen=True)
class BalanceFar(Balance):
    """As `balance`, with both means over all of the model's positions, few of which the calibration text reaches.

    Where the rotary embedding is not known, it is `balance`. Learned: forward, backward [HKV, D] float64.
    """

    def learn(self, sample: Sample) -> Params:
        if sample.rope is None:
            return super().learn(sample)
        q, k = (sample.rope.mean_square(x, sample.positions, sample.max_length) for x in both(sample))
        q = q.view(len(k), -1, k.shape[-1]).mean(1)
        q, k = (x + (RIDGE * x.mean(-1, keepdim=True)).clamp_min(LEAST) for x in (q, k))
        forward = (q / k) ** 0.25
        return {"forward": forward, "backward": 1 / forward}


@dataclass(frozen=True)
class BalanceShift(BalanceFar):
    """As `balance_far`, each factor the nearest power of two, which changes no bit of a key or a query but exponents.

    So kernels need no code for it: keys and queries are multiplied before, exactly. Learned: forward, backward.
    """

    def learn(self, sample: Sample) -> Params:
        forward = super().learn(sample)["forward"].log2().round().exp2()
        return {"forward": forward, "backward": 1 / forward}

    def lower(self, head_dim: int, params: Params = NOTHING) -> Lowered | None:
        return Lowered(shift=params.get("forward", torch.ones(1, head_dim)).to(torch.float32))


@dataclass(frozen=True)
class BalanceFull(Balance):
    """Keys times A = M^½, M the geometric mean of E[q qᵀ] and E[k kᵀ]⁻¹: M E[k kᵀ] M = E[q qᵀ].

    Learned: forward, backward [HKV, D, D] float64.
    """

    def learn(self, sample: Sample) -> Params:
        q, k = (moments(x, sample.keys.shape[1]) for x in both(sample))
        root = power(k, 0.5)
        unroot = power(k, -0.5)
        mean = unroot @ power(root @ q @ root, 0.5) @ unroot
        return {"forward": power(mean, 0.5), "backward": power(mean, -0.5)}

    def apply(self, x: Tensor, params: Params, positions: Tensor | None) -> Tensor:
        # summed in float64, whose rounding does not depend on how many rows there are once it is float32
        y = torch.einsum("thd,hed->the", x.to(torch.float64), params["forward"].to(x.device))
        return y.to(torch.promote_types(x.dtype, torch.float32))

    def query(self, q: Tensor, params: Params) -> Tensor:
        backward = params["backward"].to(q.device).repeat_interleave(q.shape[1] // len(params["backward"]), dim=0)
        return torch.einsum("thd,hed->the", q.to(torch.float64), backward).to(q.dtype)


@dataclass(frozen=True)
class BalanceFullFar(BalanceFull):
    """As `balance_full`, with both moments over all of the model's positions, few of which the text reaches.

    Where the rotary embedding is not known, it is `balance_full`. Learned: forward, backward [HKV, D, D] float64.
    """

    def learn(self, sample: Sample) -> Params:
        if sample.rope is not None:
            q, k = (sample.anywhere(x) for x in both(sample))
            sample = replace(sample, queries=q, keys=k)
        return super().learn(sample)


def both(sample: Sample) -> tuple[Tensor, Tensor]:
    """The queries and the keys of a sample."""
    assert sample.queries is not None, "it reads queries"
    return sample.queries, sample.keys


def moments(x: Tensor, heads: int) -> Tensor:
    """[heads, D, D] float64: the mean of x xᵀ of x [T, H, D] over positions and groups of H / heads, with a ridge."""
    rows = x.to(torch.float64).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)  # [heads, T * group, D]
    moment = rows.mT @ rows / rows.shape[1]
    ridge = (RIDGE * moment.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(LEAST)
    whole: Tensor = moment + ridge[:, None, None] * torch.eye(x.shape[-1], dtype=torch.float64)
    return whole


def power(matrix: Tensor, exponent: float) -> Tensor:
    """[..., D, D]: a symmetric positive definite matrix to a power."""
    values, vectors = torch.linalg.eigh(matrix)
    whole: Tensor = (vectors * values.clamp_min(LEAST).pow(exponent)[..., None, :]) @ vectors.mT
    return whole


_SOURCE = (
    "SmoothQuant's migration between two factors of a product, https://arxiv.org/abs/2211.10438, of queries and keys"
)
balance = Balance("balance", source=_SOURCE)
balance_far = BalanceFar("balance_far", source=f"{_SOURCE}; RoPE, https://arxiv.org/abs/2104.09864")
balance_shift = BalanceShift("balance_shift", source=f"{_SOURCE}; RoPE, https://arxiv.org/abs/2104.09864")
balance_full = BalanceFull("balance_full", source=f"{_SOURCE}; the matrix form")
balance_full_far = BalanceFullFar(
    "balance_full_far", source=f"{_SOURCE}; the matrix form; RoPE, https://arxiv.org/abs/2104.09864"
)
