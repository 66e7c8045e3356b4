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
    Keys that fill one channel of a slow pair at first fill the other later: the order is E[q²]·E[k²]'s over
    the model's positions, and spreads are the deviations there, or up to a third more where those differ by position;
    without a known rotary embedding both are of the text's.
    """
    far, tokens, length = all_transforms()["rank_far"], 2004, 3000
    rope = Rope(10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM))
    wide = torch.tensor([4.0, 3, 2, 1] * 2 + [1.0] * 8, dtype=torch.float64)
    bare, bare_queries = torch.randn(tokens, HKV, HEAD_DIM).double() * wide, torch.randn(tokens, HQ, HEAD_DIM).double()
    at = torch.arange(tokens)
    given = Sample(rope.turn(bare, at), rope.turn(bare_queries, at), at, rope, length)
    squares = [
        [rope.turn(x[4:], torch.full((tokens - 4,), position)).square().mean(0) for position in range(0, length, 10)]
        for x in (bare, bare_queries)
    ]
    keys, queries = (torch.stack(several).mean(0) for several in squares)

    params = far.learn(given)

    weight = (keys * queries.view(HKV, -1, HEAD_DIM).mean(1)).gather(-1, params["order"])
    assert bool((weight.diff(dim=-1) < 1e-3 * weight[:, :1]).all())
    ratio = params["spread"].double() / keys.sqrt().gather(-1, params["order"])
    assert float(ratio.min()) > 0.95
    assert float(ratio.max()) < 1.35
    assert torch.equal(far.learn(replace(given, rope=None))["order"], RANK.learn(given)["order"])


def test_far_makes_room_for_rare_large_keys():
    """
    A channel that is 20 times as wide in one token of a hundred has twice the spread that its mean square gives it.
    """
    given = sample()
    given.keys[::100, :, 5] *= 20

    far, near = (all_transforms()[name].learn(given) for name in ("rank_far", "rank"))

    for head in range(HKV):
        wide, narrow = (float(x["spread"][head][x["order"][head] == 5]) for x in (far, near))
        assert wide > 2 * narrow
