"""TurboQuant against its paper: the codebook, the distortion, and a sketch that is right in the mean."""

import itertools
import math

import pytest
import torch
from scipy import integrate
from scipy.stats import norm

from kvbench.dtypes import all_dtypes, turboquant
from kvbench.transforms import all_rotations
from kvbench.transforms.random_rotation import orthogonal

# D_mse of the paper for 1 to 4 bits (theorem 1), and D D_prod (theorem 2)
PAPER_MSE = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
PAPER_PROD = {2: 0.56, 3: 0.18, 4: 0.047}


def means(edges, density):
    """The mean of each cell of a density."""

    def over(f, low, high):
        return integrate.quad(f, low, high)[0]

    return [
        over(lambda z: z * density(z), low, high) / over(density, low, high) for low, high in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_codebook_is_lloyd_and_max_s(bits):
    """
    Integrated by SciPy: each centroid is a unit Gaussian's mean over the values that lie nearest to it.
    """
    book = turboquant.book(bits)
    assert len(book) == 2**bits
    middles = [(a + b) / 2 for a, b in itertools.pairwise(book)]

    for centroid, mean in zip(book, means([-math.inf, *middles, math.inf], norm.pdf), strict=True):
        assert centroid == pytest.approx(mean, abs=2e-7)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_gaussian_s_book_is_as_good_as_the_sphere_s(bits):
    """
    One coordinate of a sphere in 64 dimensions, whose own book Lloyd's steps find: that errs at most 3 % less.
    """

    def density(z):
        return max(0.0, 1 - z * z / 64) ** ((64 - 3) / 2)

    total = integrate.quad(density, -8, 8)[0]

    def error(book):
        edges = [-8, *((a + b) / 2 for a, b in itertools.pairwise(book)), 8]
        cells = zip(edges, edges[1:], book, strict=False)
        return sum(integrate.quad(lambda z, c=c: (z - c) ** 2 * density(z), a, b)[0] for a, b, c in cells) / total

    own = list(turboquant.book(bits))
    for _ in range(20):
        own = means([-8, *((a + b) / 2 for a, b in itertools.pairwise(own)), 8], density)

    assert error(own) < error(turboquant.book(bits)) < 1.03 * error(own)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_distortion_is_the_paper_s(bits):
    """
    Rows of one outlier in any channel, turned at random, err by the D_mse of the paper's theorem 1 for unit vectors.
    """
    dtype, rotation = all_dtypes()[f"turboquant{bits}_mse"], all_rotations()["random_rotation"]
    x = torch.randn(2048, 128) + 80 * torch.eye(128).repeat(16, 1)

    read = rotation.unrotate(dtype.dequantize(dtype.quantize(rotation.rotate(x))).double())
    error = (read - x).square().sum(-1) / x.double().square().sum(-1)

    assert error.mean().item() == pytest.approx(PAPER_MSE[bits], rel=0.2)  # it gives one or two digits


@pytest.mark.parametrize("name", ["turboquant3_mse", "turboquant3_prod"])
def test_codes_are_the_nearest_centroids(name):
    """
    By hand: each value over norm / sqrt(D), the nearest of the book; norms as float16; of the sketch sign and length.
    """
    dtype = all_dtypes()[name]
    x = torch.distributions.StudentT(3.0).sample((4, 64))
    rows = dtype.quantize(x)
    codes = dtype.unpack(rows.codes)
    sketched = name.endswith("prod")
    book = turboquant.book(2 if sketched else 3)

    for i, row in enumerate(x.double().tolist()):
        unit = math.sqrt(sum(v * v for v in row) / 64)
        scale, *norms = rows.scale[i].reshape(-1).tolist()
        assert scale == torch.tensor(unit).half().item()
        want = [min(range(len(book)), key=lambda c, v=v: abs(v / unit - book[c])) for v in row]
        if not sketched:
            assert codes[i].tolist() == want
            continue
        left = torch.tensor([v - book[c] * scale for v, c in zip(row, want, strict=True)], dtype=torch.float64)
        signs = [int(dot >= 0) for dot in (turboquant.projection(64) @ left).tolist()]
        assert codes[i].tolist() == [c << 1 | sign for c, sign in zip(want, signs, strict=True)]
        assert norms == [left.norm().half().item()]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_sketch_is_right_in_the_mean(bits, monkeypatch):
    """
    Over 250 projections the product of a query and a sketched row is the exact one, and its variance the paper's.

    Five standard errors of the mean; without the sketch the same product is off by more than that.
    """
    dtype, plain = (
        all_dtypes()[f"turboquant{bits}_prod"],
        turboquant.TurboQuantMse(
            "plain", bits - 1, turboquant.Codebook(turboquant.book(bits - 1)), "per_token_head", ""
        ),
    )
    x = torch.randn(8, 128)
    q = x + 0.5 * torch.randn(8, 128)  # what a key is asked by that matches it: there shrinking shows
    exact = (q * x).sum(-1, dtype=torch.float64)
    drawn = []
    for seed in range(250):
        s = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        monkeypatch.setattr(turboquant, "projection", lambda *_, s=s: s)
        drawn.append((q * dtype.dequantize(dtype.quantize(x), torch.float64)).sum(-1) - exact)
    off = torch.stack(drawn)  # [projections, rows]

    spread = off.std(0) / math.sqrt(len(off))
    assert (off.mean(0).abs() < 5 * spread).all()
    without = (q * plain.dequantize(plain.quantize(x), torch.float64)).sum(-1) - exact
    assert without.mean().abs() > 5 * spread.mean() / math.sqrt(8)
    # D_prod / |q|²: of unit vectors, times D
    variance = (off.square().mean(0) / q.square().sum(-1) / x.square().sum(-1) * 128).mean().item()
    assert variance == pytest.approx(PAPER_PROD[bits], rel=0.25)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_by_hand(bits):
    """
    A norm is 16 bits a row, two with a sketch; its signs are one of the bits.
    """
    for head_dim in (64, 128):
        assert all_dtypes()[f"turboquant{bits}_mse"].bits_per_value(head_dim) == bits + 16 / head_dim
        assert all_dtypes()[f"turboquant{bits}_prod"].bits_per_value(head_dim) == bits + 32 / head_dim


@pytest.mark.parametrize("head_dim", [64, 81])
def test_the_rotation_is_orthogonal_and_drawn_once(head_dim):
    """
    Q Qᵀ is the identity to float64's precision; entries are those of an even draw, and the same at every call.
    """
    matrix = orthogonal(head_dim)

    assert (matrix @ matrix.T - torch.eye(head_dim)).abs().max() < 1e-13
    assert matrix.std().item() == pytest.approx(head_dim**-0.5, rel=0.05)
    assert matrix.mean().abs() < 5 * head_dim**-1.5
    torch.manual_seed(7)
    orthogonal.cache_clear()
    assert torch.equal(orthogonal(head_dim), matrix)
