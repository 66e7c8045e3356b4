"""What centring learns."""

import pytest
import torch

from kvbench.transforms import Rope, Sample, all_transforms

TOKENS, HEADS, HEAD_DIM = 2048, 2, 16
FREQUENCIES = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)


def turned(x, positions):
    """x [T, H, D] by its position, channel by channel, as the papers write it."""
    out = x.clone()
    for c, f in enumerate(FREQUENCIES.tolist()):
        cos, sin = (positions * f).cos()[:, None], (positions * f).sin()[:, None]
        a, b = x[..., c], x[..., c + HEAD_DIM // 2]
        out[..., c], out[..., c + HEAD_DIM // 2] = a * cos - b * sin, a * sin + b * cos
    return out


def sample(bias, max_length=40000, rope=True, first=0):
    """Keys with this bias before they are turned."""
    positions = torch.arange(first, first + TOKENS)
    keys = turned(bias + torch.randn(TOKENS, HEADS, HEAD_DIM, dtype=torch.float64), positions.double())
    return Sample(keys, None, positions, Rope(FREQUENCIES) if rope else None, max_length)


def left(transform, params, at):
    """The largest mean of a channel that is left in a page of positions of this sample."""
    rows = transform.apply(at.keys, params, at.positions)
    return float(rows.unflatten(0, (-1, 64)).mean(1).abs().max())


def test_a_constant_mean_ages_and_one_by_page_does_not():
    """
    At position 30,000 a mean of 0 to 2047 leaves most of a bias; a page's own positions leave its sampling error.
    """
    bias = 100 * torch.randn(HEADS, HEAD_DIM, dtype=torch.float64)
    center, constant = (all_transforms()[name] for name in ("center", "center_constant"))
    by_page, one = (transform.learn(sample(bias)) for transform in (center, constant))
    late = sample(bias, first=30016)

    assert left(constant, one, late) > 50
    # the fastest pair turns within a page: what is left of it is not in the page's mean
    assert left(center, by_page, late) < 1.5
    assert left(center, by_page, sample(bias)) < 1.5


def test_without_a_known_rotary_embedding_the_mean_is_constant():
    """
    The form is said by what is learned: one offset, not one a page.
    """
    bias = torch.ones(HEADS, HEAD_DIM, dtype=torch.float64)
    params = all_transforms()["center"].learn(sample(bias, rope=False))

    assert params["offset"].shape == (1, HEADS, HEAD_DIM)


def test_a_wrong_convention_is_noticed():
    """
    Keys that are not turned as the frequencies say lie nearer their constant mean, which is taken.
    """
    bias = 100 * torch.randn(HEADS, HEAD_DIM, dtype=torch.float64)
    right = sample(bias)
    interleaved = right.keys.unflatten(-1, (2, -1)).mT.flatten(-2)
    wrong = Sample(interleaved, None, right.positions, right.rope, right.max_length)

    assert len(all_transforms()["center"].learn(wrong)["offset"]) == 1
    assert len(all_transforms()["center"].learn(right)["offset"]) == 625


def test_sums_are_float64():
    """
    A mean of 354 with a spread of 1 is learned to the rounding of the result, from bfloat16 keys.
    """
    keys = (354 + torch.randn(8192, HEADS, HEAD_DIM)).to(torch.bfloat16)
    params = all_transforms()["center_constant"].learn(Sample(keys, None, torch.arange(8192), None, 8192))

    want = keys.double().mean(0)
    assert torch.equal(params["offset"][0], want.float())


@pytest.mark.parametrize("name", ["center", "center_constant"])
def test_kernels_take_an_offset(name):
    """
    Centring and then turning is one offset and one turn; turning first is another form, which they don't take.
    """
    center, hadamard = all_transforms()[name], all_transforms()["hadamard"]
    offset = torch.randn(5, HEADS, HEAD_DIM)
    both = center.lower(HEAD_DIM, {"offset": offset}).then(hadamard.lower(HEAD_DIM))

    assert torch.equal(both.offset, offset)
    assert both.block == HEAD_DIM
    assert hadamard.lower(HEAD_DIM).then(center.lower(HEAD_DIM)) is None
    assert center.lower(HEAD_DIM, {"offset": offset[:1]}).offset.shape == (HEADS, HEAD_DIM)
