"""What ranking learns, and that it leaves scores as they are."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvbench.schemes import Scheme
from kvbench.transforms import Rope, Sample, all_transforms

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


def test_far_ranks_channels_as_they_are_at_all_positions():
    """
    Keys that fill one channel of a slow pair at the first positions fill the other later: each one's spread is the root
    of its mean square over the model's positions; where the rotary embedding is not known, over the text's.
    """
    far, tokens, length = all_transforms()["rank_far"], 104, 3000
    rope = Rope(10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM))
    bare = sample().keys[:tokens].double() + torch.tensor([2.0] * 8 + [0.0] * 8, dtype=torch.float64)
    at = torch.arange(tokens)
    given = Sample(rope.turn(bare, at), sample().queries[:tokens], at, rope, length)
    squares = [rope.turn(bare[4:], torch.full((tokens - 4,), position)).square().mean(0) for position in range(length)]

    params = far.learn(given)

    spread = torch.stack(squares).mean(0).sqrt().gather(-1, params["order"])
    assert_close(params["spread"].double(), spread, rtol=1e-6, atol=0)
    assert torch.equal(far.learn(replace(given, rope=None))["order"], RANK.learn(given)["order"])
