"""What the pages hold."""

import pytest
import torch

from kvbench.cache import PagedCache
from kvbench.cache.paged import fitting_tokens
from kvbench.dtypes import all_dtypes
from kvbench.schemes import Scheme
from kvbench.transforms import Sample, all_rotations

ROWS = [
    name
    for name, dtype in all_dtypes().items()
    if not (dtype.page_tokens or dtype.learns) and 32 % dtype.head_dim_multiple == 0
]
# each dtype under its own rotation, and each rotation
SCHEMES = [*map(Scheme.parse, ROWS), *(Scheme.parse("int4", rotation) for rotation in all_rotations())]
SCHEMES.append(Scheme.parse("int4:int2"))
IDS = [f"{s.dtype_name}-{s.rotation_name}" for s in SCHEMES]
WHOLE = [Scheme.parse(name, "none") for name, dtype in all_dtypes().items() if dtype.page_tokens]
LAYERS = [(2, 64), (1, 96)]


def filled(scheme, page_size=4, pages=5, tokens=11, **options):
    """A cache whose memory was NaN, with `tokens` tokens written to every layer, and what was written."""
    cache = PagedCache(LAYERS, scheme, pages=pages, page_size=page_size, **options)
    for plane in (*cache.keys, *cache.values):
        plane.codes.fill_(0xFF)  # NaN in every floating-point type
        if plane.scale is not None:
            plane.scale.view(torch.uint8).fill_(0xFF)  # and NaN as a scale
    written = []
    slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(0))[:tokens]
    for layer, (heads, head_dim) in enumerate(LAYERS):
        k, v = torch.randn(2, tokens, heads, head_dim)
        cache.append(layer, k, v, slots)
        written.append((k, v))
    return cache, written, slots


@pytest.mark.parametrize("scheme", SCHEMES + WHOLE, ids=str)
def test_the_largest_cache_fits_and_a_page_more_does_not(scheme):
    """
    Its bytes are within those given, by less than a page.
    """
    scheme, free, page_size = scheme.resolve(torch.float32), 100_000, scheme.page_tokens or 16
    tokens, token_bytes = fitting_tokens(LAYERS, scheme, {torch.device("cpu"): free}, page_size=page_size)
    cache = PagedCache(LAYERS, scheme, pages=tokens // page_size, page_size=page_size)

    assert tokens % page_size == 0
    assert token_bytes == scheme.token_bytes(LAYERS)
    assert cache.nbytes <= free < cache.nbytes + token_bytes * page_size + 8 * len(LAYERS)


@pytest.mark.parametrize("scheme", SCHEMES + WHOLE, ids=str)
def test_memory_is_the_packed_size(scheme):
    """
    8 * nbytes == values * bits_per_value, exactly; a scale a tensor is four bytes more a layer and side.
    """
    pages, page_size = 5, scheme.page_tokens or 4
    cache = PagedCache(LAYERS, scheme, pages=pages, page_size=page_size)
    slots = pages * page_size
    scheme = scheme.resolve(torch.float32)
    bits = sum(slots * heads * head_dim * 2 * scheme.bits_per_value(head_dim) for heads, head_dim in LAYERS)
    scales = 4 * len(LAYERS) * sum(side.dtype.has_tensor_scale for side in scheme.sides)

    assert 8 * (cache.nbytes - scales) == bits
    assert cache.nbytes - scales == slots * scheme.token_bytes(LAYERS)
    assert cache.bytes_per_token == scheme.token_bytes(LAYERS)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_a_slot_gives_back_what_its_dtype_made_of_it(scheme):
    """
    Reading a slot gives the rotated row after one quantization, to the bit, wherever it stands.
    """
    cache, written, slots = filled(scheme)
    scheme = cache.scheme
    for layer, rows in enumerate(written):
        read = cache.read(layer, torch.arange(5), torch.float32)
        for x, got, side in zip(rows, read, scheme.sides, strict=True):
            expected = side.dtype.dequantize(side.dtype.quantize(side.apply(x)))
            flat = got.transpose(1, 2).flatten(0, 1)  # [slots, HKV, D]
            assert torch.equal(flat[slots], expected)


def test_a_cache_has_the_pages_that_its_dtypes_quantize():
    """
    Another size is refused, with both.
    """
    with pytest.raises(ValueError, match="quantizes pages of 64 tokens, and the cache's have 16"):
        PagedCache(LAYERS, Scheme.parse("kivi2"), pages=2, page_size=16)


def test_a_cache_that_grows_keeps_its_pages():
    """
    Rows that were there read as before, in all layers, and new pages can be written.
    """
    cache, _, _ = filled(Scheme.parse("int4:int2"))
    before = [cache.read(layer, torch.arange(5), torch.float32) for layer in range(len(LAYERS))]
    cache.grow(9)
    cache.copy_pages([(1, 8)])

    assert cache.pages == 9
    assert cache.nbytes == 9 * 4 * cache.scheme.token_bytes(LAYERS)
    for layer, rows in enumerate(before):
        for x, old in zip(cache.read(layer, torch.tensor([0, 1, 2, 3, 4, 8]), torch.float32), rows, strict=True):
            torch.testing.assert_close(x[:5], old, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(x[5], old[1], rtol=0, atol=0, equal_nan=True)


def test_padding_slots_are_not_written():
    """
    A slot of -1 skips its token, and no other slot changes.
    """
    cache, _, slots = filled(Scheme.parse("int4"))
    before = [plane.codes.clone() for plane in (*cache.keys, *cache.values)]
    k, v = torch.randn(2, 3, 2, 64)
    cache.append(0, k, v, torch.tensor([-1, -1, -1]))

    assert all(torch.equal(plane.codes, old) for plane, old in zip((*cache.keys, *cache.values), before, strict=True))

    cache.append(0, k, v, torch.tensor([-1, int(slots[0]), -1]))
    changed = (cache.keys[0].codes != before[0]).flatten(-1).any(-1).any(1).flatten()
    assert changed.nonzero().flatten().tolist() == [int(slots[0])]


def test_copying_a_page_copies_all_layers():
    """
    After a copy both pages read the same, in keys and values of every layer.
    """
    cache, _, _ = filled(Scheme.parse("int4:int2"), tokens=20)
    cache.copy_pages([(1, 3)])
    for layer in range(len(LAYERS)):
        for x in cache.read(layer, torch.tensor([1, 3]), torch.float32):
            assert torch.equal(x[0], x[1])


@pytest.mark.parametrize("name", ["turboquant3_prod:tcq2", "q4_1:iq4_nl", "nuq3_per_channel:nuq3_per_token_head"])
def test_rows_kept_decoded_are_what_reading_gives(name):
    """
    After writes, copies of pages and growth, in 16 bits; what was there before is decoded when the keeping begins.
    """
    scheme = Scheme.parse(name, "none")
    rows = [
        Sample(torch.randn(256, *shape), torch.randn(256, *shape), torch.arange(256), None, 256) for shape in LAYERS
    ]
    learned = [tuple(s.learn(x) if s.learns else s.unlearned for s in (scheme.key, scheme.value)) for x in rows]
    cache, _, slots = filled(scheme, learned=learned, page_size=16)
    before = cache.nbytes
    cache.keep_decoded(scheme.dtypes)
    assert cache.nbytes == before + 2 * 80 * 2 * sum(heads * width for heads, width in LAYERS)
    unwritten = torch.tensor(sorted(set(range(80)) - set(slots.tolist())))[:8]
    for layer, (heads, width) in enumerate(LAYERS):
        cache.append(layer, *torch.randn(2, 8, heads, width), unwritten)
    cache.grow(7)
    cache.copy_pages([(0, 6)])
    written = torch.cat([slots, unwritten, unwritten[unwritten < 16] + 96])
    for plane in (*cache.keys, *cache.values):
        want, got = (
            x.transpose(1, 2).flatten(0, 1)[written]
            for x in (plane.read(torch.arange(7), torch.float32), plane.decoded)
        )
        assert got.dtype == torch.float16
        torch.testing.assert_close(got, want.half(), rtol=2**-10, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_a_destroyed_cache_gives_back_zeros(scheme):
    """
    The canary stores zeros whatever is written.
    """
    cache, _, slots = filled(scheme, destroyed=True)
    pages = torch.arange(cache.pages)
    for read in cache.read(0, pages, torch.float64):
        stored = read.transpose(1, 2).flatten(0, 1)[slots]
        assert stored.numel() > 0
        assert stored.abs().max() < 1e-5  # int2 has no zero: its scale is at its floor


def test_per_tensor_scale_reaches_both_writing_and_reading():
    """
    With a calibrated scale, values far beyond 448 survive the cache that would saturate them at a scale of 1.
    """
    cache = PagedCache([(1, 64)], Scheme.parse("fp8_per_tensor"), pages=1, page_size=4)
    x = 10000 * torch.randn(4, 1, 64)
    for plane in (*cache.keys, *cache.values):
        plane.tensor_scale.copy_(plane.dtype.calibrate(x))
    cache.append(0, x, x, torch.arange(4))
    k, _ = cache.read(0, torch.tensor([0]), torch.float32)

    error = (k[0].transpose(0, 1) - x).norm() / x.norm()
    assert error < 2**-4 / 3**0.5 * 1.2  # half a step of e4m3's three mantissa bits, spread evenly


def test_a_head_dim_that_does_not_fit_is_named():
    """
    A head_dim that does not fill the words of a dtype is refused with the dtype and what it needs.
    """
    with pytest.raises(ValueError, match="head_dim 20 does not fit int2_per_token_head: it needs a multiple of 8"):
        PagedCache([(1, 20)], Scheme.parse("int2"), pages=1, page_size=4)
