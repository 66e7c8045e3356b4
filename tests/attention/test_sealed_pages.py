"""Pages that are quantized whole when they leave the window, against plain float64 attention written out."""

import pytest
import torch

from kvbench.attention import Batch, Near, append, attend
from kvbench.cache import PagedCache, PagePool, PageTable, Rings, on_device
from kvbench.dtypes import all_dtypes
from kvbench.schemes import Scheme, Window

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 32, 420
PAGED = [name for name, dtype in all_dtypes().items() if dtype.page_tokens]
OPTIONS = [
    {},
    {"sliding_window": 150},
    {"softcap": 3.0},
    {"sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)},
    {"sliding_window": 100, "softcap": 2.0, "sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)},
]
CENTRED = {"key": "center+hadamard", "value": "hadamard"}


class Held:
    """A packed cache and its rings, NaN where nothing was written."""

    def __init__(self, scheme, known=None):
        page = scheme.page_tokens or 32
        options = {"learned": known, "model_dtype": torch.float64}
        shape = [(KV_HEADS, HEAD_DIM)]
        self.scheme = scheme
        self.packed = PagedCache(shape, scheme, pages=2 * -(-LENGTH // page) + 1, page_size=page, **options)
        self.rings = Rings(scheme.window.sinks, scheme.window.recent, scheme.window.page, page)
        self.pool = PagePool(self.packed.pages, page, self.rings)
        self.exact = PagedCache(shape, scheme.exact(torch.float64), pages=1, page_size=self.rings.page_size, **options)
        for cache in (self.packed, self.exact):
            for plane in (*cache.keys, *cache.values):
                plane.codes.fill_(0xFF)
                if plane.scale is not None:
                    plane.scale.view(torch.uint8).fill_(0xFF)  # and NaN as a scale

    def feed(self, table, q, k, v, **options):
        """Outputs of a piece of a sequence."""
        held = self.pool
        held.trim(table)
        held.extend(table, len(q))
        arrays = Near.arrays(self.rings, [table], [len(q)], self.scheme.page_tokens)
        near = Near.of(on_device(arrays, "cpu"), self.rings.page_size)
        self.exact.grow(self.rings.pages)
        self.exact.copy_pages(self.rings.copies)
        self.rings.copies = []
        batch = Batch.make([table], [len(q)], held.page_size, near=near)
        append(
            self.packed, 0, k, v, batch.slot_mapping, impl="reference", positions=batch.positions, exact=self.exact,
            near=near,
        )  # fmt: skip
        return attend(
            q, self.packed, 0, batch, impl="reference", scaling=0.1, exact=self.exact, window=self.scheme.window,
            **options,
        )  # fmt: skip


def run(scheme, known, q, k, v, counts, **options):
    """Outputs of all tokens of a sequence, fed in pieces of these counts."""
    held, table, done, out = Held(scheme, known), PageTable(), 0, []
    for count in counts:
        piece = slice(done, done + count)
        out.append(held.feed(table, q[piece], k[piece], v[piece], **options))
        done += count
    held.pool.release(table)
    assert held.pool.free_pages == held.packed.pages
    assert len(held.rings._free) == held.rings.pages
    return torch.cat(out)


def rows(scheme, side, params, x):
    """Of all tokens, the rows [T, H, D] as they are in 16 bits, and as their pages give them back: both transformed."""
    positions = torch.arange(LENGTH)
    own, kept = getattr(scheme, side), getattr(scheme.exact(torch.float64), side)
    exact = kept.dtype.dequantize(kept.dtype.quantize(kept.apply(x, params, positions)), torch.float64)
    packed = exact.clone()
    size = own.dtype.page_tokens
    if not size:
        return exact, own.dtype.dequantize(own.dtype.quantize(own.apply(x, params, positions)), torch.float64)
    for first in range(0, LENGTH - size + 1, size):
        page = exact[first : first + size].clone()
        if first == 0:
            page[: scheme.window.sinks] = page[scheme.window.sinks]
        for head in range(KV_HEADS):
            stored = own.dtype.quantize(page[:, head])
            packed[first : first + size, head] = own.dtype.dequantize(stored, torch.float64)
    return exact, packed


def expected(scheme, known, q, k, v, sliding_window=None, softcap=None, sinks=None):
    """Attention written out, a query at a time."""
    params = known[0] if known else ((), ())
    keys, values = (rows(scheme, side, params[i], x) for i, (side, x) in enumerate((("key", k), ("value", v))))
    queries, lacking = scheme.key.query(q, params[0]), scheme.key.score(q, params[0])
    window, out = scheme.window, torch.zeros(LENGTH, HEADS, HEAD_DIM, dtype=torch.float64)
    for i in range(0, LENGTH, 11):
        first = 0 if sliding_window is None else max(0, i - sliding_window + 1)
        at = torch.arange(first, i + 1)
        recent = i + 1 if window.recent is None else (i // window.page - window.recent) * window.page
        near = ((at < window.sinks) | (at >= recent))[:, None, None]
        key, value = (torch.where(near, exact[at], packed[at]) for exact, packed in (keys, values))
        for h in range(HEADS):
            head = h * KV_HEADS // HEADS
            scores = key[:, head] @ queries[i, h]
            if lacking is not None:
                pages = lacking.shape[-1]
                scores = scores + lacking[i, h, (at // 64).clamp_max(pages - 1)]
            scores = scores * 0.1
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            scores = scores if sinks is None else torch.cat([scores, sinks[h : h + 1]])
            out[i, h] = scores.softmax(0)[: len(at)] @ value[:, head]
    return scheme.value.undo(out, params[1])[::11]


@pytest.fixture
def drawn():
    """Queries, and keys and values of a sequence: float64; a few channels of the keys are wide."""
    q, k, v = (torch.randn(LENGTH, heads, HEAD_DIM, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS))
    k[..., ::9] *= 5
    return q, k, v


@pytest.mark.parametrize("window", [{"recent": 0}, {"sinks": 5, "recent": 1}, {"sinks": 20}], ids=str)
@pytest.mark.parametrize("dtype", PAGED)
def test_a_query_reads_sealed_pages_and_its_ring(drawn, dtype, window):
    """
    A page that left the window is read as one quantization of its 16-bit rows; ring and sinks as they are.
    """
    scheme = Scheme.of({"key": dtype, "value": "int4", "window": window})

    got = run(scheme, None, *drawn, [LENGTH])[::11]

    want = expected(scheme, None, *drawn)
    assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["uint2_per_channel_64", "int4_per_token_head"])
def test_centring_softcaps_and_sink_logits(drawn, dtype, options):
    """
    c(q) is added back to the scores of sealed and of exact rows alike, by page of positions, in float64.
    """
    spec = {"dtype": dtype, "rotation": CENTRED, "window": {"sinks": 3, "recent": 1}}
    scheme = Scheme.of(spec)
    offset = 30 * torch.randn(-(-LENGTH // 64), KV_HEADS, HEAD_DIM)
    known = [(({"offset": offset}, {}), ({},))]
    q, k, v = drawn
    k = k + offset[torch.arange(LENGTH) // 64].double()

    got = run(scheme, known, q, k, v, [LENGTH], **options)[::11]

    want = expected(scheme, known, q, k, v, **options)
    assert (got - want).norm() / want.norm() < 1e-6  # offsets are float32


@pytest.mark.parametrize("window", [{"recent": 0}, {"sinks": 5, "recent": 1}, {"sinks": 3}], ids=str)
@pytest.mark.parametrize("dtype", ["uint2_per_channel_64", "uint4_per_channel_128", "int2_per_token_head"])
def test_a_prompt_at_once_is_the_prompt_in_pieces(drawn, dtype, window):
    """
    What a query reads depends on its position alone, not on what was written with it; the ring never holds more than
    the window and what was written with it.
    """
    scheme = Scheme.of({"key": dtype, "value": dtype, "window": window})
    whole = run(scheme, None, *drawn, [LENGTH])

    torch.testing.assert_close(run(scheme, None, *drawn, [1] * LENGTH), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(run(scheme, None, *drawn, [100, 1, 63, 200, 56]), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [60, 64, 130, 192, 200])
def test_sequences_that_share_a_prefix_share_its_ring(drawn, cut):
    """
    Two continuations of one prefix read what each alone reads, wherever the prefix ends, and what they share is there
    once; nothing is left when all are gone.
    """
    scheme = Scheme.of({"dtype": "uint2_per_channel_64", "window": {"sinks": 3, "recent": 1}})
    q, k, v = drawn
    other = [torch.cat([x[:cut], x[cut:].flip(0)]) for x in drawn]
    held, stem = Held(scheme), PageTable()
    held.feed(stem, q[:cut], k[:cut], v[:cut])
    held.pool.trim(stem)
    before = held.rings.pages - len(held.rings._free)
    fork, copies = held.pool.fork(stem)
    held.packed.copy_pages(copies)
    shared = held.rings.pages - len(held.rings._free)

    first = held.feed(stem, q[cut:], k[cut:], v[cut:])
    second = held.feed(fork, *(x[cut:] for x in other))

    assert shared - before == (1 if cut % held.rings.page_size else 0)
    torch.testing.assert_close(first, run(scheme, None, *drawn, [LENGTH])[cut:], rtol=0, atol=1e-10)
    torch.testing.assert_close(second, run(scheme, None, *other, [LENGTH])[cut:], rtol=0, atol=1e-10)
    for table in (stem, fork):
        held.pool.release(table)
    assert len(held.rings._free) == held.rings.pages
    assert held.pool.free_pages == held.packed.pages


@pytest.mark.parametrize("window", [Window(4, 0), Window(0, 2), Window(20, None), Window(4, 1, 128)], ids=str)
def test_a_ring_holds_the_window_and_no_more(window):
    """
    While a sequence is decoded, tokens in 16 bits are those that the next query reads so, in whole pages of 16.
    """
    rings, table = Rings(window.sinks, window.recent, window.page, 128), PageTable()
    pool = PagePool(20, 128, rings)
    for length in range(1, 1500):
        pool.trim(table)
        pool.extend(table, 1)
        rings.extend(table, length - 1)
        held = 16 * len(table.ring)
        start = min(int(window.starts(torch.tensor([length - 1]))), length - 1) // 16 * 16
        sinks = min(-(-window.sinks // 16) * 16, start)
        assert held == -(-length // 16) * 16 - start + sinks
    assert 16 * rings.pages <= 2 * (window.tokens(1500) + 48)
