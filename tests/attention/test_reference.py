"""Attention over the packed cache against a plain float64 computation written apart from it."""

import math
from dataclasses import replace

import pytest
import torch

from kvbench.attention import Batch, attend
from kvbench.attention.reference import _per_query
from kvbench.cache import PagedCache, PagePool, PageTable
from kvbench.dtypes import all_dtypes
from kvbench.schemes import Scheme
from kvbench.transforms import all_rotations

ROWS = [
    name
    for name, dtype in all_dtypes().items()
    if not (dtype.page_tokens or dtype.learns) and 16 % dtype.head_dim_multiple == 0
]
# each dtype under its own rotation, and each rotation
SCHEMES = [*map(Scheme.parse, ROWS), *(Scheme.parse("int4", rotation) for rotation in all_rotations())]
SCHEMES.append(Scheme.parse("int4:int2"))
IDS = [f"{s.dtype_name}-{s.rotation_name}" for s in SCHEMES]


def normal(*shape):
    """Standard normal values."""
    return torch.randn(*shape, dtype=torch.float64)


def heavy_tailed(*shape):
    """Student-t values with 3 degrees of freedom, which no codebook for a Gaussian expects."""
    return torch.distributions.StudentT(3.0).sample(shape).to(torch.float64)


def one_head(q, k, v, scaling, window=None, softcap=None, sink=None):
    """Outputs of queries q [T, D], the last T of the L tokens with keys k and values v [L, D], one at a time."""
    outputs = []
    for t in range(len(q)):
        position = len(k) - len(q) + t
        begin = 0 if window is None else max(0, position - window + 1)
        scores = [float(q[t] @ k[j]) * scaling for j in range(begin, position + 1)]
        if softcap is not None:
            scores = [softcap * math.tanh(s / softcap) for s in scores]
        weights = [math.exp(s) for s in scores]
        total = sum(weights) + (0 if sink is None else math.exp(sink))
        outputs.append(sum(w / total * v[begin + j] for j, w in enumerate(weights)))
    return torch.stack(outputs)


def stored(side, x):
    """What a row of x is after the cache, turned back."""
    dtype = side.dtype.resolve(x.dtype)
    return side.undo(dtype.dequantize(dtype.quantize(side.apply(x)), torch.float64))


def write(cache, pool, k, v, new):
    """Sequences of keys k and values v, lists of [L, HKV, D], written to layer 0; the batch of their last tokens."""
    tables = []
    for keys, values, count in zip(k, v, new, strict=True):
        table = PageTable()
        before = len(keys) - count
        pool.extend(table, before)
        slots = Batch.make([table], [before], cache.page_size).slot_mapping
        cache.append(0, keys[:before], values[:before], slots)
        pool.extend(table, count)
        tables.append(table)
    batch = Batch.make(tables, new, cache.page_size)
    last_k = torch.cat([x[len(x) - n :] for x, n in zip(k, new, strict=True)])
    last_v = torch.cat([x[len(x) - n :] for x, n in zip(v, new, strict=True)])
    cache.append(0, last_k, last_v, batch.slot_mapping)
    return batch


def check(scheme, draw, heads=(6, 2), head_dim=16, page_size=4, lengths=(9, 1, 13), new=(3, 1, 13), **options):
    """Relative L2 error and cosine of `attend` in float64 against `one_head`."""
    query_heads, kv_heads = heads
    k = [draw(length, kv_heads, head_dim) for length in lengths]
    v = [draw(length, kv_heads, head_dim) for length in lengths]
    q = draw(sum(new), query_heads, head_dim)
    cache = PagedCache([(kv_heads, head_dim)], scheme, pages=16, page_size=page_size, model_dtype=torch.float64)
    for plane in (*cache.keys, *cache.values):
        plane.codes.fill_(0xFF)  # NaN in every floating-point type: what was never written must not be read
        if plane.scale is not None:
            plane.scale.view(torch.uint8).fill_(0xFF)  # and NaN as a scale
    batch = write(cache, PagePool(16, page_size), k, v, new)
    got = attend(q, cache, 0, batch, impl="reference", scaling=head_dim**-0.5, **options)

    sinks = options.get("sinks")
    parts = []
    for keys, values, queries in zip(k, v, q.split(new), strict=True):
        keys = stored(scheme.key, keys)
        values = stored(scheme.value, values)
        per_head = [
            one_head(
                queries[:, h],
                keys[:, h * kv_heads // query_heads],
                values[:, h * kv_heads // query_heads],
                head_dim**-0.5,
                options.get("sliding_window"),
                options.get("softcap"),
                None if sinks is None else float(sinks[h]),
            )
            for h in range(query_heads)
        ]
        parts.append(torch.stack(per_head, dim=1))
    expected = torch.cat(parts)
    assert got.dtype == torch.float64
    error = (got - expected).norm() / expected.norm()
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0)
    return float(error), float(cosine)


@pytest.mark.parametrize("draw", [normal, heavy_tailed])
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_attention_reads_what_the_dtype_stored(scheme, draw):
    """
    Every dtype × rotation: outputs are those of plain attention over the decoded, turned-back rows.
    """
    error, cosine = check(scheme, draw)

    # both decode the same codes; what differs is the order of float64 sums
    assert error < 1e-12
    assert cosine > 1 - 1e-12


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_any_group_and_head_dim(heads, head_dim):
    """
    Groups and head_dims that are no power of two change nothing in the definition.
    """
    error, _ = check(Scheme.parse("int4"), normal, heads=heads, head_dim=head_dim)

    assert error < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 5},
        {"sliding_window": 100},
        {"softcap": 2.0},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -2.0], dtype=torch.float64)},
        {"sliding_window": 4, "softcap": 3.0, "sinks": torch.linspace(-1, 1, 6, dtype=torch.float64)},
    ],
    ids=str,
)
def test_windows_softcaps_and_sinks(options):
    """
    Sliding windows, softcapped scores and sink logits, alone and together.
    """
    error, _ = check(Scheme.parse("int8"), normal, **options)

    assert error < 1e-12


def test_long_prompts_are_cut_into_chunks_of_queries(monkeypatch):
    """
    Holding the scores of a few queries at a time changes nothing.
    """
    monkeypatch.setattr("kvbench.attention.reference.QUERY_CHUNK", 3)
    error, _ = check(Scheme.parse("fp16"), normal, lengths=(20,), new=(17,), sliding_window=6)

    assert error < 1e-12


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_writing_then_reading_a_prompt_is_feeding_it_token_by_token(scheme):
    """
    One pass over a prompt = its tokens one after another through the cache, in float32, for every dtype × rotation.
    """
    tokens, heads, head_dim = 19, 2, 32
    k, v = torch.randn(2, tokens, heads, head_dim)
    q = torch.randn(tokens, 4, head_dim)

    def run(counts):
        cache = PagedCache([(heads, head_dim)], scheme, pages=8, page_size=4)
        pool, table, done, out = PagePool(8, 4), PageTable(), 0, []
        for count in counts:
            pool.extend(table, count)
            batch = Batch.make([table], [count], 4)
            cache.append(0, k[done : done + count], v[done : done + count], batch.slot_mapping)
            out.append(attend(q[done : done + count], cache, 0, batch, impl="reference", scaling=0.2))
            done += count
        return torch.cat(out)

    whole = run([tokens])
    torch.testing.assert_close(run([1] * tokens), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(run([7, 1, 11]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries_are_computed_in_float32(dtype):
    """
    A 16-bit query gives the float32 result, rounded once.
    """
    k, v = torch.randn(2, 1, 9, 2, 32).unbind(0)
    cache = PagedCache([(2, 32)], Scheme.parse("int4"), pages=4, page_size=4)
    batch = write(cache, PagePool(4, 4), list(k), list(v), [3])
    q = torch.randn(3, 4, 32).to(dtype)

    half = attend(q, cache, 0, batch, impl="reference", scaling=0.2)
    full = attend(q.float(), cache, 0, batch, impl="reference", scaling=0.2)
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_query_heads_share_what_they_read(tokens):
    """
    No key is copied for a query head, and products are those of copies, to the bit: numbers that were committed stay.
    """
    q, k, p = torch.randn(3, 12, tokens, 64), torch.randn(3, 2, 90, 64), torch.rand(3, 12, tokens, 90)
    copied = k.repeat_interleave(6, dim=1)

    assert torch.equal(_per_query(q, k.mT), q @ copied.mT)
    assert torch.equal(_per_query(p, k), p @ copied)


def test_a_pass_looks_once_whether_tokens_are_skipped():
    """
    On a GPU to look waits for all that runs there, so a layer that is told does not.
    """
    cache = PagedCache([(2, 32)], Scheme.parse("int4"), pages=4, page_size=4)
    k = torch.randn(3, 2, 32)
    batch = Batch.make([PageTable([0], 3)], [3], 4)
    told, found = (replace(batch, slot_mapping=torch.tensor(slots)) for slots in ([0, 1, 2], [0, -1, 2]))

    assert (told.skips, found.skips) == (False, True)
    cache.append(0, k, k, told.slot_mapping, skips=told.skips)
    with pytest.raises(RuntimeError, match="look"):
        cache.append(0, k, k, _Unread(told.slot_mapping))
    cache.append(0, k, k, _Unread(told.slot_mapping), skips=False)


class _Unread(torch.Tensor):
    """A tensor that can't be asked for a truth."""

    def __bool__(self):
        raise RuntimeError("to look waits")
