"""What balancing learns, and what it does to scores."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvbench.dtypes import all_dtypes
from kvbench.schemes import Side
from kvbench.transforms import Rope, Sample, all_transforms

TOKENS, GROUP, HEADS, HEAD_DIM = 4096, 3, 2, 16
every_balance = pytest.mark.parametrize("name", ["balance", "balance_far", "balance_full", "balance_full_far"])


def sample():
    """Queries and keys whose channels are mixed and differ in size a thousand times, each KV head in its own way."""
    sizes = torch.logspace(-1.5, 1.5, HEAD_DIM, dtype=torch.float64)
    k = torch.randn(TOKENS, HEADS, HEAD_DIM, dtype=torch.float64) * sizes
    q = torch.randn(TOKENS, HEADS, GROUP, HEAD_DIM, dtype=torch.float64) * sizes.flip(0).roll(3)
    k, q = (torch.einsum("th...d,hde->th...e", x, torch.randn(HEADS, HEAD_DIM, HEAD_DIM).double()) for x in (k, q))
    return Sample(k, q.flatten(1, 2), torch.arange(TOKENS), None, TOKENS)


def moments(x):
    rows = x.unflatten(1, (HEADS, -1)).transpose(0, 1).flatten(1, 2)
    return rows.mT @ rows / rows.shape[1]


def applied(name, sample):
    transform = all_transforms()[name]
    params = transform.learn(sample)
    return transform.query(sample.queries, params), transform.apply(sample.keys, params, sample.positions)


@every_balance
def test_scores_do_not_change(name):
    """
    Each query head's balanced queries times its KV head's balanced keys are the products of before, in float64.
    """
    given = sample()
    q, k = applied(name, given)

    def scores(q, k):
        return torch.einsum("thd,thd->th", q, k.repeat_interleave(GROUP, dim=1))

    want = scores(given.queries, given.keys)
    # relative to the scores' size: the ridge bounds how far A may stretch
    assert_close(scores(q, k) / want.std(), want / want.std(), rtol=0, atol=1e-9)


def test_channels_of_queries_and_keys_have_one_spread():
    """
    Diagonal: the mean square of each channel is the same for both, to the ridge.
    """
    q, k = (moments(x).diagonal(dim1=-2, dim2=-1) for x in applied("balance", sample()))

    assert_close(q, k, rtol=1e-4, atol=0)


def test_far_channels_have_one_spread_over_all_positions():
    """
    Queries and keys turned to every position of the model: a channel's mean square over these is the same in both.
    """
    q, k = (x.diagonal(dim1=-2, dim2=-1) for x in far_moments("balance_far"))

    assert_close(q, k, rtol=1e-2, atol=0)


def test_far_moments_are_nearly_one_matrix_over_all_positions():
    """
    Learned at 800 places: queries and keys turned to every position differ far less than under the text's own moments.
    """

    def apart(name):
        q, k = far_moments(name)
        return float((q - k).norm() / q.norm())

    assert apart("balance_full_far") < apart("balance_full") / 5


def far_moments(name):
    """[HKV, D, D] of queries and of keys, once balanced: the mean over positions from 0 to 3000."""
    given, length = sample(), 3000
    rope = Rope(10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM))
    given = Sample(given.keys[:200], given.queries[:200], torch.arange(200), rope, length)
    far = all_transforms()[name]
    params = far.learn(given)
    q, k = (rope.turn(x, given.positions, back=True) for x in (given.queries, given.keys))
    places = [torch.full((200,), position) for position in range(0, length, 20)]
    turned = [(far.query(rope.turn(q, at), params), far.apply(rope.turn(k, at), params, at)) for at in places]
    return [torch.stack([moments(pair[i]) for pair in turned]).mean(0) for i in (0, 1)]


def test_whole_moments_are_one_matrix():
    """
    Full: E[q qᵀ] = E[k kᵀ], channels across too, to the ridge.
    """
    q, k = (moments(x) for x in applied("balance_full", sample()))

    assert_close(q, k, rtol=0, atol=1e-3 * float(k.diagonal(dim1=-2, dim2=-1).mean()))


def test_noise_of_one_size_moves_scores_less():
    """
    What such noise does to a score is tr E[q qᵀ] · tr E[k kᵀ]: less under `balance`, and least under `balance_full`,
    where it is the square of tr (K^½ Q K^½)^½, below which no A gets.
    """
    given = sample()

    def harm(q, k):
        return moments(q).diagonal(dim1=-2, dim2=-1).sum(-1) * moments(k).diagonal(dim1=-2, dim2=-1).sum(-1)

    as_it_is, diagonal, full = (
        harm(*pair) for pair in ((given.queries, given.keys), applied("balance", given), applied("balance_full", given))
    )
    least = torch.linalg.eigvals(moments(given.queries) @ moments(given.keys)).real.sqrt().sum(-1) ** 2

    assert (diagonal < 0.9 * as_it_is).all()
    assert (full < 0.9 * diagonal).all()
    assert_close(full, least, rtol=1e-3, atol=0)


@every_balance
def test_a_channel_that_nobody_uses_stays_finite(name):
    """
    Keys or queries of zeros in a channel, or in all of them, learn finite numbers.
    """
    given = sample()
    given.keys[..., 3] = 0
    given.queries[..., 5] = 0
    params = all_transforms()[name].learn(given)
    assert all(tensor.isfinite().all() for tensor in params.values())

    given.keys.zero_()
    assert all(tensor.isfinite().all() for tensor in all_transforms()[name].learn(given).values())


@every_balance
def test_kernels_do_not_take_it(name):
    """
    What they can't compute they refuse, and `auto` takes the reference.
    """
    assert all_transforms()[name].lower(HEAD_DIM) is None


def test_shifts_are_the_nearest_powers_of_two():
    """
    Those of `balance_far`, rounded: keys and queries keep every bit of their mantissas, and scores as they are.
    """
    rope = Rope(torch.linspace(1, 0.01, HEAD_DIM // 2, dtype=torch.float64))
    given = replace(sample(), rope=rope)
    far, near = (all_transforms()[name].learn(given)["forward"] for name in ("balance_far", "balance_shift"))

    assert (near.log2() % 1 == 0).all()
    assert ((near / far).log2().abs() <= 0.5).all()
    x = given.keys.to(torch.bfloat16)
    assert torch.equal(x * near.to(torch.bfloat16), (x.double() * near).to(torch.bfloat16))
    side = Side.of(all_dtypes()["int8_per_token_head"], "center+balance_shift+hadamard")
    assert torch.equal(side.lower(HEAD_DIM, ({}, {"forward": near}, {})).shift, near.float())
    assert Side.of(side.dtype, "balance_shift+center").lower(HEAD_DIM) is None
    assert Side.of(side.dtype, "balance_shift+rank").lower(HEAD_DIM) is None
