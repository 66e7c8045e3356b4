"""What ranking learns, and that it leaves scores as they are."""

import pytest
import torch
from torch.testing import assert_close

from kvbench.schemes import Scheme
from kvbench.transforms import Sample, all_transforms

RANK = all_transforms()["rank"]
TOKENS, HKV, HQ, HEAD_DIM = 2000, 2, 6, 16


def sample():
    """Keys and queries whose channels differ in spread, each in its own way."""
    keys = torch.randn(TOKENS, HKV, HEAD_DIM) * torch.exp(torch.randn(HKV, HEAD_DIM))
    queries = torch.randn(TOKENS, HQ, HEAD_DIM) * torch.exp(torch.randn(HQ, HEAD_DIM))
    return Sample(keys, queries, torch.arange(TOKENS), None, TOKENS)


def test_channels_stand_in_the_order_of_their_weight():
    """
    E[q²]·E[k²] from the fifth token on, over all query heads that read a KV head; each channel then has a spread of 1.
    """
    given = sample()
    params = RANK.learn(given)

    for head in range(HKV):
        weights = []
        for c in range(HEAD_DIM):
            q = given.queries[4:, head * HQ // HKV : (head + 1) * HQ // HKV, c].double()
            weights.append(float(q.square().mean() * given.keys[4:, head, c].double().square().mean()))
        assert params["order"][head].tolist() == sorted(range(HEAD_DIM), key=lambda c: -weights[c])
    rows = RANK.apply(given.keys, params, None)
    assert_close(rows[4:].double().square().mean(0), torch.ones(HKV, HEAD_DIM, dtype=torch.float64), rtol=1e-5, atol=0)


def test_scores_do_not_change():
    """
    Queries times spreads and keys over them: the same products, to float64's precision.
    """
    given = sample()
    params = RANK.learn(given)
    q, k = given.queries.double(), given.keys.double()
    exact = {**params, "spread": params["spread"].double()}

    mine = torch.einsum("thd,thd->th", RANK.query(q, exact), RANK.apply(k, exact, None).repeat_interleave(3, 1))

    assert_close(mine, torch.einsum("thd,thd->th", q, k.repeat_interleave(3, 1)), rtol=0, atol=1e-9)


def test_a_channel_that_never_moves_divides_nothing_by_zero():
    """
    Of a channel of zeros, and of a head of zeros, rows are finite; equal weights keep their order.
    """
    given = sample()
    given.keys[:, 0, 3] = 0
    given.keys[:, 1] = 0
    params = RANK.learn(given)

    assert RANK.apply(given.keys, params, None).isfinite().all()
    assert params["order"][0, -1] == 3
    assert params["order"][1].tolist() == list(range(HEAD_DIM))


def test_values_cannot_have_it():
    """
    It is made of queries, which values never meet.
    """
    with pytest.raises(ValueError, match="'rank' on values"):
        Scheme.parse("tiers421_per_token_head", "rank")
