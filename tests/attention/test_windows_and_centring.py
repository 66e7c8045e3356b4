"""Windows of 16-bit rows and centred keys, against plain float64 attention over rows chosen one by one."""

import pytest
import torch

from kvbench.attention import Batch, append, attend, choose
from kvbench.cache import PagedCache, PagePool, PageTable
from kvbench.schemes import Scheme, Window

HEADS, KV_HEADS, HEAD_DIM, LENGTH, PAGE = 4, 2, 32, 210, 16
CENTRED = {"dtype": "int4", "rotation": {"key": "center+hadamard", "value": "hadamard"}}
WINDOWS = [Window(4, 1), Window(0, 0), Window(3, None), Window(1, 2)]


def learned(scheme, pages, spread=30.0):
    """A mean by page of positions, or one for all, as a scheme with `center` first would have learned."""
    keys = tuple(
        {"offset": spread * torch.randn(pages, KV_HEADS, HEAD_DIM)} if t.learns else {} for t in scheme.key.transforms
    )
    return [(keys, tuple({} for _ in scheme.value.transforms))]


def caches(scheme, known):
    """The packed cache, and the one that holds the window's rows; both for all pages of a sequence."""
    pages = -(-LENGTH // PAGE) + 1
    options = {"pages": pages, "page_size": PAGE, "learned": known, "model_dtype": torch.float64}
    shape = [(KV_HEADS, HEAD_DIM)]
    return PagedCache(shape, scheme, **options), PagedCache(shape, scheme.exact(torch.float64), **options)


def run(scheme, known, q, k, v, counts, **options):
    """Outputs of all tokens, fed in pieces of these counts."""
    packed, exact = caches(scheme, known)
    pool, table, done, out = PagePool(packed.pages, PAGE), PageTable(), 0, []
    for count in counts:
        pool.extend(table, count)
        batch = Batch.make([table], [count], PAGE)
        piece = slice(done, done + count)
        for cache in (packed, exact):
            append(cache, 0, k[piece], v[piece], batch.slot_mapping, impl="reference", positions=batch.positions)
        out.append(
            attend(
                q[piece], packed, 0, batch, impl="reference", scaling=0.1, exact=exact, window=scheme.window, **options
            )
        )
        done += count
    return torch.cat(out)


def row(scheme, side, params, x, position, in_window):
    """One row [H, D] as a query sees it: stored and decoded, with the transform undone by hand."""
    kept = scheme.exact(torch.float64) if in_window else scheme.resolve(torch.float64)
    own = getattr(kept, side)
    stored = own.dtype.dequantize(
        own.dtype.quantize(own.apply(x[None], params, torch.tensor([position]))), torch.float64
    )[0]
    for transform, known in reversed(list(zip(own.transforms, params, strict=True))):
        if "offset" in known:
            offset = known["offset"]
            stored = stored + offset[position // 64 if len(offset) > 1 else 0]
        else:
            stored = transform.undo(stored, known)
    return stored


def expected(scheme, known, q, k, v, sliding_window=None, softcap=None, sinks=None):
    """Attention written out, a query at a time; each key is read from where the window's rule says."""
    rule = scheme.window
    rows = {
        near: [
            [row(scheme, side, known[0][i], x[j], j, near) for j in range(LENGTH)]
            for i, (side, x) in enumerate((("key", k), ("value", v)))
        ]
        for near in (True, False)
    }
    out = torch.zeros(LENGTH, HEADS, HEAD_DIM, dtype=torch.float64)
    for i in range(0, LENGTH, 7):
        first = 0 if sliding_window is None else max(0, i - sliding_window + 1)
        recent = i + 1 if rule is None or rule.recent is None else max(0, (i // 64 - rule.recent) * 64)
        near = [rule is not None and (j < rule.sinks or j >= recent) for j in range(first, i + 1)]
        keys = torch.stack([rows[n][0][j] for n, j in zip(near, range(first, i + 1), strict=True)])
        values = torch.stack([rows[n][1][j] for n, j in zip(near, range(first, i + 1), strict=True)])
        for h in range(HEADS):
            scores = keys[:, h * KV_HEADS // HEADS] @ q[i, h] * 0.1
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            scores = scores if sinks is None else torch.cat([scores, sinks[h : h + 1]])
            out[i, h] = scores.softmax(0)[: len(keys)] @ values[:, h * KV_HEADS // HEADS]
    return out[::7]


@pytest.fixture
def drawn():
    """Queries, and keys and values of a sequence: float64."""
    return tuple(torch.randn(LENGTH, heads, HEAD_DIM, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS))


OPTIONS = [
    {},
    {"sliding_window": 90},
    {"softcap": 3.0},
    {"sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)},
    {"sliding_window": 70, "softcap": 2.0, "sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)},
]


@pytest.mark.parametrize("pages", [1, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_centring_changes_no_score(drawn, options, pages):
    """
    With one mean or one a page, q·k is what it was: also where a softcap or a sink logit sees what is added to all.
    """
    scheme = Scheme.of(CENTRED)
    known = learned(scheme, pages)
    q, k, v = drawn
    k = k + 30 * torch.randn(1, KV_HEADS, HEAD_DIM, dtype=torch.float64)

    got = run(scheme, known, q, k, v, [LENGTH], **options)[::7]

    want = expected(scheme, known, q, k, v, **options)
    assert (got - want).norm() / want.norm() < 1e-6  # offsets are float32


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("spec", [{"dtype": "int2"}, CENTRED], ids=str)
def test_a_query_reads_its_window_exactly(drawn, window, spec):
    """
    The first `sinks` keys and those of the query's own page and `recent` before it are the 16-bit rows, others packed.
    """
    scheme = Scheme.of(spec)
    scheme = type(scheme)(scheme.key, scheme.value, window, calibration=scheme.calibration)
    known = learned(scheme, 4, spread=1.0)

    got = run(scheme, known, *drawn, [LENGTH])[::7]

    want = expected(scheme, known, *drawn)
    assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_prompt_at_once_is_the_prompt_token_by_token(drawn, window):
    """
    What a query reads depends on its position alone, not on what was written with it.
    """
    scheme = Scheme.of({**CENTRED, "dtype": "int2"})
    scheme = type(scheme)(scheme.key, scheme.value, window, calibration=scheme.calibration)
    known = learned(scheme, 4)

    whole = run(scheme, known, *drawn, [LENGTH])
    torch.testing.assert_close(run(scheme, known, *drawn, [1] * LENGTH), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(run(scheme, known, *drawn, [100, 1, 63, 46]), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("preset", "head_dim", "expected"),
    [
        ("int4_centered_window", 128, "triton"),
        ("q4_0 none", 128, "triton"),
        ("int3 none", 64, "triton"),
        ("int4+w64s4", 128, "triton"),
        ("int2_per_token_head", 128, "triton"),
        ("int2_per_token_head", 96, "triton"),
        ("int2 none", 128, "triton"),
        ("tcq2 hadamard", 128, "reference"),
    ],
)
def test_an_unproven_kernel_is_taken_only_by_name(monkeypatch, preset, head_dim, expected):
    """
    On a GPU "auto" computes trellises by the reference, and what kernels were proven on by them.
    """
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("kvbench.attention.triton.turn", lambda *_: None)
    scheme, device = Scheme.parse(*preset.split()), torch.device("cuda")

    assert choose("auto", scheme, torch.bfloat16, device, {head_dim}) == expected
    assert choose("triton", scheme, torch.bfloat16, device, {head_dim}) == "triton"
