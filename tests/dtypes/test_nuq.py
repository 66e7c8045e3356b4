"""KVQuant's codebooks: what is learned, what is stored, and what outliers and codebooks are worth."""

import math
import struct

import pytest
import torch
from scipy.cluster.vq import kmeans2

from kvbench.cache import PagedCache
from kvbench.dtypes import all_dtypes, nuq
from kvbench.schemes import Scheme
from kvbench.transforms import Sample

HKV, HQ, HEAD_DIM, TOKENS = 2, 4, 64, 4000


def sample():
    """Keys of a Laplace distribution, each channel with a mean and a spread of its own, and queries."""
    keys = torch.distributions.Laplace(0.0, 1.0).sample((TOKENS, HKV, HEAD_DIM))
    keys = keys * torch.exp(torch.randn(HKV, HEAD_DIM)) + 3 * torch.randn(HKV, HEAD_DIM)
    return Sample(keys, torch.randn(TOKENS, HQ, HEAD_DIM), torch.arange(TOKENS), None, TOKENS)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_by_hand(head_dim):
    """
    Codes; three bytes an outlier, one for each hundred values begun; of values a row's two ends in 16 bits.
    """
    count = {64: 1, 128: 2, 256: 3}[head_dim]
    for bits in (2, 3, 4):
        of_keys = bits + 24 * count / head_dim
        for name, want in (("per_channel", of_keys), ("per_token_head", of_keys + 32 / head_dim)):
            dtype = all_dtypes()[f"nuq{bits}_{name}"]
            rows = dtype.quantize(torch.randn(5, 3, head_dim))
            nbytes = rows.codes.nbytes + (0 if rows.scale is None else rows.scale.nbytes)
            assert dtype.bits_per_value(head_dim) == want == 8 * nbytes / 15 / head_dim


def test_ranges_are_those_of_99_percent_of_a_channel():
    """
    Sorted by hand from the fifth token on: 0.5 % lie beyond each end.
    """
    given = sample()
    params = all_dtypes()["nuq3_per_channel"].learn(given)

    for head, channel in ((0, 0), (1, 63)):
        values = sorted(given.keys[4:, head, channel].tolist())
        beyond = int(len(values) * 0.005)
        assert params["low"][head, channel] == values[beyond]
        assert params["high"][head, channel] == values[-1 - beyond]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_outliers_are_the_first_of_a_row_in_order(head_dim):
    """
    Largest distance first, of equal ones the first, NaN before all: as a stable sort has them, on a GPU too.
    """
    distance = torch.randint(0, 9, (40, head_dim)).float()
    distance[3] = 0.0
    distance[4, 5:9] = torch.inf
    distance[5, 2::7] = torch.nan

    order = distance.sort(dim=-1, descending=True, stable=True).indices
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.equal(nuq.furthest(distance.to(device)).cpu(), order[:, : nuq.outliers(head_dim)])


@pytest.mark.parametrize("bits", [2, 3])
def test_the_codebook_is_a_weighted_k_means(bits):
    """
    SciPy's k-means, from the same start over values drawn by their weights, finds the same centroids to a hundredth.
    """
    values = torch.distributions.Laplace(0.1, 0.2).sample((20_000,)).clamp(-1, 1)
    weights = torch.where(values > 0, 4.0, 1.0)
    start = all_dtypes()[f"nuq{bits}_per_channel"].book

    found = nuq.fitted(values, weights, start)

    repeated = torch.cat([values, *[values[values > 0]] * 3]).double().numpy()
    want, _ = kmeans2(repeated, torch.tensor(start).double().numpy(), iter=200, minit="matrix")
    assert found.tolist() == pytest.approx(want.tolist(), abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_of_keys_is_what_the_definition_says(bits):
    """
    By hand: the nearest centroid in its channel's range, and the one value furthest out of its own as a float16.
    """
    given = sample()
    dtype = all_dtypes()[f"nuq{bits}_per_channel"]
    params = dtype.learn(given)
    bound = dtype.bind(params)
    x = given.keys[:6]
    rows = bound.quantize(x)
    read = bound.dequantize(rows, torch.float64)
    low, high = params["low"].double(), params["high"].double()
    book = params["centroids"].double()

    for t in range(len(x)):
        for head in range(HKV):
            middle, half = (low[head] + high[head]) / 2, (high[head] - low[head]) / 2
            z = (x[t, head].double() - middle) / half
            place = int(z.abs().argmax())
            want = book[(z[:, None] - book).abs().argmin(-1)] * half + middle
            want[place] = x[t, head, place].half().double()
            stored = bytes(rows.codes[t, head, -3:].tolist())
            assert stored == struct.pack("<Be", place, x[t, head, place].half().item())
            # middle and half are float32
            assert torch.allclose(read[t, head], want, rtol=0, atol=1e-6 * float(high.abs().max() + half.max()))


def test_a_row_of_values_is_what_the_definition_says():
    """
    By hand: the value furthest from the mean is kept, the others lie between their own ends, as float16.
    """
    dtype = all_dtypes()["nuq2_per_token_head"]
    x = torch.randn(20, HKV, HEAD_DIM)
    x[..., 7] *= 10
    params = dtype.learn(Sample(x, None, torch.arange(20), None, 20))
    bound = dtype.bind(params)
    rows = bound.quantize(x)
    read = bound.dequantize(rows, torch.float64)
    book = params["centroids"].double()

    for row, got, ends in zip(x.flatten(0, 1), read.flatten(0, 1), rows.scale.flatten(0, 1), strict=True):
        place = int((row - row.mean()).abs().argmax())
        others = torch.arange(HEAD_DIM) != place
        assert ends.tolist() == [row[others].min().half().item(), row[others].max().half().item()]
        low, high = ends.double()
        middle, half = (low + high) / 2, (high - low) / 2
        want = book[((row.double() - middle) / half)[:, None].sub(book).abs().argmin(-1)] * half + middle
        want[place] = row[place].half().double()
        assert torch.allclose(got, want, rtol=0, atol=1e-6)


def test_outliers_and_a_learned_codebook_are_each_worth_something():
    """
    KVQuant's claims in kind, on heavy-tailed channels at 3 bits: the squared error falls with a codebook that was
    learned, and a row's outlier in 16 bits takes off a large part of what is left.
    """
    given = sample()
    dtype = all_dtypes()["nuq3_per_channel"]
    params = dtype.learn(given)
    gaussian = dtype.bind({**params, "centroids": torch.tensor(dtype.book)})
    learned = dtype.bind(params)
    spread = given.keys.std(0)

    def error(bound):
        return (((bound.dequantize(bound.quantize(given.keys)) - given.keys) / spread) ** 2).mean()

    middle, half = (params["high"] + params["low"]) / 2, (params["high"] - params["low"]) / 2
    z = (given.keys - middle) / half
    dense = params["centroids"][(z[..., None] - params["centroids"]).abs().argmin(-1)] * half + middle
    without = (((dense - given.keys) / spread) ** 2).mean()

    assert error(learned) < 0.95 * error(gaussian)
    assert error(learned) < 0.85 * without


def test_a_broken_row_stays_visible():
    """
    A NaN among keys is seen in their score, for its row's outlier is one; a row of values becomes NaN throughout.
    """
    x = torch.randn(4, 2, 64)
    x[1, 1, 5], x[2, 0, 9] = math.nan, math.inf

    for name in ("nuq3_per_channel", "nuq3_per_token_head"):
        dtype = all_dtypes()[name]
        read = dtype.dequantize(dtype.quantize(x))
        broken = read.isnan().any(-1)
        assert broken.nonzero().tolist() == [[1, 1], [2, 0]]


def test_each_head_of_a_cache_has_its_own_ranges():
    """
    What a page gives back is what its rows are one by one, heads and layers as they learned.
    """
    given = sample()
    scheme = Scheme.parse("nuq3_per_channel:nuq3_per_token_head", "none")
    values = Sample(torch.randn(TOKENS, HKV, HEAD_DIM), None, given.positions, None, TOKENS)
    learned = [(scheme.key.learn(given), scheme.value.learn(values))]
    cache = PagedCache([(HKV, HEAD_DIM)], scheme, pages=3, page_size=4, learned=learned)
    k, v = given.keys[:12], values.keys[:12]
    slots = torch.randperm(12)
    cache.append(0, k, v, slots)

    read = cache.read(0, torch.arange(3), torch.float64)

    for x, got, dtype, params in zip((k, v), read, (scheme.key.dtype, scheme.value.dtype), learned[0], strict=True):
        bound = dtype.bind(params[-1])
        want = bound.dequantize(bound.quantize(x), torch.float64)
        assert torch.equal(got.transpose(1, 2).flatten(0, 1)[slots], want)
    with pytest.raises(ValueError, match="learns from a text"):
        PagedCache([(HKV, HEAD_DIM)], scheme, pages=3, page_size=4)


def test_what_a_lesson_hangs_on_is_named():
    """
    A dtype that learns, and a transform that reads what is stored, learn anew for another dtype; others do not.
    """

    def rotation(dtype, transforms):
        return Scheme.parse(dtype, transforms).learning()["rotation"]

    assert rotation("int4", "center:none") == rotation("int8", "center:none") == "center:none"
    assert rotation("nuq3_per_channel:int8", "center:none") != rotation("nuq2_per_channel:int8", "center:none")
    assert rotation("int4", "hadamard+correction:none") != rotation("int8", "hadamard+correction:none")


def test_a_row_that_was_never_written_reads_as_something():
    """
    Bytes of all ones, as memory may hold them, name a place that no row has, and are read without an error.
    """
    for name in ("nuq3_per_channel", "nuq3_per_token_head"):
        dtype = all_dtypes()[name]
        rows = dtype.quantize(torch.randn(2, 64))
        rows.codes.fill_(0xFF)
        assert dtype.dequantize(rows).shape == (2, 64)
