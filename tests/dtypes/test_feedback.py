"""Error feedback: what is learned of queries, what a row's channels take up of each other, and what that is worth."""

import numpy as np
import pytest
import torch

from kvbench.dtypes import all_dtypes, e5m3
from kvbench.dtypes.base import STEPS
from kvbench.schemes import Side
from kvbench.transforms import Rope, Sample

HKV, HQ, HEAD_DIM, TOKENS = 2, 6, 32, 600
FEEDBACK, PLAIN = (all_dtypes()[name] for name in ("tiers421_feedback", "tiers421_per_token_head"))


def sample(rope=None, length=TOKENS):
    """Keys, and queries that favour some directions."""
    favoured = torch.randn(HKV, HEAD_DIM, HEAD_DIM) * torch.logspace(0, -1.5, HEAD_DIM)
    queries = torch.einsum("thgd,hed->thge", torch.randn(TOKENS, HKV, HQ // HKV, HEAD_DIM), favoured).flatten(1, 2)
    return Sample(torch.randn(TOKENS, HKV, HEAD_DIM), queries, torch.arange(TOKENS), rope, length)


def test_rows_by_hand():
    """
    A channel after another in single float32 operations; a broken row has codes 0 and the scale NaN.
    """
    dtype = FEEDBACK.bind(FEEDBACK.learn(sample()))
    x = torch.randn(3, HKV, HEAD_DIM)
    x[2, 1, 5] = torch.nan
    rows = dtype.quantize(x)
    codes, scales = dtype.unpack(rows.codes), PLAIN.quantize(x).scale

    one = np.float32(1)
    for row in range(3):
        for head in range(HKV):
            assert rows.scale[row, head] == scales[row, head]
            if (row, head) == (2, 1):
                assert rows.scale[row, head] == e5m3.NAN
                assert not codes[row, head].any()
                continue
            left, up = x[row, head].numpy().copy(), dtype.up[head].numpy()
            for c, bits in enumerate(dtype.tiers.by_channel(HEAD_DIM)):
                step = np.float32(e5m3.decode(scales[row, head]).item()) * np.float32(STEPS[bits])
                half = np.float32(2 ** (bits - 1))
                z = np.round(np.clip(left[c] * (one / step) - np.float32(0.5), -half, half - 1))
                assert codes[row, head, c] == z + half
                error = (left[c] - (z + np.float32(0.5)) * step) * (one / up[c, c])
                for j in range(c + 1, HEAD_DIM):
                    left[j] = left[j] - error * up[c, j]


def test_scores_move_less():
    """
    Scores err less than without, and no less than each channel's error times what of queries there those behind it
    can't take up: 1 / up². Codes that end too soon are what lies between. Values err more for it.
    """
    given = sample()
    dtype = FEEDBACK.bind(FEEDBACK.learn(given))
    errors = [one.dequantize(one.quantize(given.keys)) - given.keys for one in (PLAIN, dtype)]
    queries = given.queries.unflatten(1, (HKV, -1))
    plain, fed = (torch.einsum("thgd,nhd->hgtn", queries, error).square().mean((1, 2, 3)) for error in errors)
    each = errors[0].square().mean(0)  # [HKV, D]
    left = (each / dtype.up.diagonal(dim1=1, dim2=2).square()).sum(-1)

    assert (left < fed).all()
    assert (fed < plain).all()
    assert errors[1].square().mean() > errors[0].square().mean()


def test_it_learns_of_queries_at_any_position():
    """
    Where the rotary embedding is known, moments are those of queries turned to all of the model's positions.
    """
    rope = Rope(torch.tensor([0.5] * (HEAD_DIM // 2), dtype=torch.float64))
    ratios = []
    for given in (sample(rope, 4000), sample()):
        given.queries[..., : HEAD_DIM // 2] *= 3  # of each pair that is turned, the first channel
        up = Side.of(FEEDBACK, "center").learn(given)[-1]["up"].double()
        a, b = torch.linalg.inv(up.mT @ up).diagonal(dim1=1, dim2=2).chunk(2, -1)
        ratios.append((a / b).mean())

    # turned to everywhere, both channels of a pair are alike
    assert ratios[0] == pytest.approx(1, rel=0.1)
    assert ratios[1] > 5


@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_takes_the_bits_of_tiers(head_dim):
    """
    Nothing is stored of what was learned, and unlearned it is the tiers.
    """
    x = torch.randn(4, HKV, head_dim)
    assert FEEDBACK.bits_per_value(head_dim) == PLAIN.bits_per_value(head_dim)
    assert torch.equal(FEEDBACK.quantize(x).codes, PLAIN.quantize(x).codes)
