import math

import pytest
import torch
from kvbench_kernels import attention, decode, prefill, tuning
from kvbench_kernels.attention import attend
from kvbench_kernels.hadamard import Turn
from kvbench_kernels.tuning import Tuning
from kvbench_kernels.tuning import choose_prefill_tuning as choose

from kvbench.attention import Batch
from kvbench.attention import attend as reference
from kvbench.attention import triton as kernels
from kvbench.cache import PagedCache
from kvbench.dtypes import all_dtypes
from kvbench.schemes import Scheme
from kvbench.transforms import all_rotations

GPU = torch.cuda.is_available()
# `auto` is one of the 16-bit types; bf16 products and casts are wrong in the interpreter
DTYPES = [name for name in kernels._ROUNDINGS if name != "auto" and (GPU or name != "bf16")]


class Case:
    """A cache with NaN wherever nothing was written, and a batch over shuffled pages."""

    def __init__(
        self,
        dtype,
        device,
        *,
        rotation="none",
        heads=(4, 2),
        head_dim=64,
        page_size=16,
        seqs=((5, 5), (37, 1)),
        heavy=False,
        model=torch.float16,
    ):
        hq, hkv = heads
        self.cache = PagedCache(
            [(hkv, head_dim)],
            Scheme.parse(dtype, rotation),
            pages=2 + sum(-(-n // page_size) for n, _ in seqs),
            page_size=page_size,
            model_dtype=model,
            device=device,
        )
        for plane in (*self.cache.keys, *self.cache.values):
            plane.codes.fill_(0xFF)  # NaN in every floating-point code
            if plane.scale is not None:
                plane.scale.view(torch.uint8).fill_(0xFF)
            if plane.tensor_scale is not None:
                plane.tensor_scale.fill_(0.02)
        pages = torch.randperm(self.cache.keys[0].codes.shape[0]).tolist()
        width = max(-(-n // page_size) for n, _ in seqs)
        table, slots = [], []
        for length, new in seqs:
            own = [pages.pop() for _ in range(-(-length // page_size))]
            table.append(own + [0] * (width - len(own)))
            every = torch.tensor(
                [own[t // page_size] * page_size + t % page_size for t in range(length)], device=device
            )
            x = (
                torch.randn(2, length, hkv, head_dim)
                if not heavy
                else torch.distributions.StudentT(2.0).sample((2, length, hkv, head_dim))
            )
            self.cache.append(0, x[0].to(model).to(device), x[1].to(model).to(device), every)
            slots.append(every[length - new :])
        new = torch.tensor([0] + [n for _, n in seqs])
        self.batch = Batch(
            new.cumsum(0).to(torch.int32).to(device),
            torch.tensor([n for n, _ in seqs], dtype=torch.int32, device=device),
            torch.tensor(table, dtype=torch.int32, device=device),
            torch.cat(slots),
            page_size,
        )
        self.q = torch.randn(int(new.sum()), hq, head_dim).to(model).to(device)

    def check(self, q=None, budget=None, **options):
        """The kernel's relative L2 error and cosine against the float64 oracle."""
        q = self.q if q is None else q
        options = {"scaling": self.q.shape[-1] ** -0.5, **options}
        want = reference(q.double(), self.cache, 0, self.batch, impl="reference", **options)
        got = kernels.attend(
            q, self.cache, 0, self.batch, **{"sliding_window": None, "softcap": None, "sinks": None, **options}
        ).double()
        assert got.isfinite().all()
        error = float((got - want).norm() / want.norm())
        # half a unit in the last place of the output and of the weights, and of the values where they are rounded
        assert error < (
            budget or (8e-4 if self.q.dtype == torch.float16 and "bf16" not in self.cache.scheme.dtype_name else 8e-3)
        )
        assert float(torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)) > 0.9999


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy-tailed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_as_exact_as_sixteen_bits_allow(dtype, heavy, device):
    """
    One query a sequence, ragged lengths, several splits, pages in any order, unwritten memory NaN.
    """
    Case(dtype, device, seqs=((150, 1), (1, 1), (64, 1)), page_size=64, heavy=heavy).check()


@pytest.mark.parametrize("dtype", ["int4_per_token_head", "int2_per_token_head"])
def test_errors_do_not_add_up_over_a_long_context(dtype, device):
    """
    Outputs shrink as attention spreads over a context, and an error that all tokens share does not: none is left.

    On a GPU the context is one whose products, cut off and not rounded, would show.
    """
    length = 4096 if device.type == "cpu" else 131072
    batch = 1 if device.type == "cpu" else 33
    case = Case(dtype, device, seqs=((length, 1),), heads=(2, 2), page_size=64)
    # keys and values of int2 are whole numbers in a ratio met to fp16's rounding, 2^-11, which shows at any length
    budget = (4e-4**2 + 2 * 2.0**-22) ** 0.5 if dtype == "int2_per_token_head" else 4e-4
    if batch > 1:  # the same sequence often: pairs enough that a program has 8k tokens or more
        case.batch = Batch(
            torch.arange(batch + 1, dtype=torch.int32, device=device),
            case.batch.seq_lens.repeat(batch),
            case.batch.page_table.repeat(batch, 1),
            case.batch.slot_mapping.repeat(batch),
            64,
        )
        case.q = case.q.repeat(batch, 1, 1)
    case.check(case.q.float(), budget=budget)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_chunks_and_single_tokens_mix(dtype, device):
    """
    A whole prompt, a chunk after a cached prefix and a decode step in one batch.
    """
    Case(dtype, device, seqs=((20, 20), (70, 9), (90, 1))).check()


@pytest.mark.parametrize("dtype", ["fp16", "int8_per_token_head", "int4_per_token_head", "int2_per_token_head"])
def test_many_short_sequences_are_one_launch(dtype, device, monkeypatch):
    """
    Where no split is worth its launch, sequences of one new token are computed with the others, in short tiles.
    """
    case = Case(dtype, device, seqs=((20, 20), (70, 9), (90, 1), (1, 1)))
    chosen = []
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "multiprocessors", lambda: 1)
    monkeypatch.setattr(prefill, "choose_prefill_tuning", lambda *a, **k: chosen.append(choose(*a, **k)) or chosen[-1])
    monkeypatch.setattr(attention, "MANY", 0)
    monkeypatch.setattr(attention, "decode", None)

    case.check()

    bits = max(plane.dtype.code_bits for plane in (case.cache.keys[0], case.cache.values[0]))
    assert chosen == [tuning.SHORT_TILES[bits]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_prompts_read_a_spread_copy(dtype, device, monkeypatch):
    """
    Whether every program unpacks the cache or it is spread in memory once, scales and rotation included.
    """
    monkeypatch.setattr("kvbench_kernels.prefill.SPREAD_ROWS", 1)
    Case(dtype, device, seqs=((70, 40), (23, 5), (66, 1)), heads=(4, 1)).check()
    for rotation, head_dim in (("randomized_hadamard", 64), ("hadamard", 96)):
        Case(dtype, device, rotation=rotation, head_dim=head_dim, seqs=((70, 40), (23, 5)), heads=(2, 1)).check()


@pytest.mark.parametrize("magnitudes", [(1e4, 1e-4), (1e-6, 1e-6)], ids=str)
def test_spread_rows_keep_their_digits(magnitudes, device, monkeypatch):
    """
    Rows of magnitudes far apart share a tile: neither overflows in fp16, and the small ones count.
    """
    monkeypatch.setattr("kvbench_kernels.prefill.SPREAD_ROWS", 1)
    case = Case("int8", device, seqs=((40, 40), (40, 20)))
    for plane in (*case.cache.keys, *case.cache.values):
        plane.scale[:, :, 0::2] *= magnitudes[0]
        plane.scale[:, :, 1::2] *= magnitudes[1]
    # outputs in float32, which has room for all of them
    case.check(case.q.float(), budget=8e-4, scaling=case.q.shape[-1] ** -0.5 / max(magnitudes))


@pytest.mark.parametrize("head_dim", [80, 96, 128, 192, 256, 512])
def test_every_head_dim(head_dim, device):
    """
    Where D is no power of two, tiles are padded and the result is not.
    """
    for dtype in ("int4", "fp8_per_token"):
        Case(dtype, device, head_dim=head_dim, heads=(2, 1), seqs=((33, 1), (9, 9))).check()


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2), (16, 1), (24, 1)], ids=str)
def test_every_group_of_query_heads(heads, device):
    """
    Groups of 1, 3, 16 and 24 query heads share a KV head.
    """
    Case("int8", device, heads=heads, seqs=((40, 1), (21, 1))).check()
    Case("int2", device, heads=heads, seqs=((40, 1), (21, 6))).check()


@pytest.mark.parametrize("heads", [(3, 1), (8, 2), (8, 1), (9, 1)], ids=str)
def test_short_rows_lie_side_by_side(heads, device):
    """
    Rows of eight words, two in a row of a product for up to eight heads: as exact, whatever the pages and turn.
    """
    options = {"sliding_window": 35, "softcap": 3.0, "sinks": torch.randn(heads[0], device=device)}
    seqs = ((75, 1), (1, 1), (22, 1))
    Case("int2", device, heads=heads, seqs=seqs).check(**options)
    Case("int2", device, heads=heads, page_size=64, seqs=seqs).check(**options)
    Case("int2", device, rotation="randomized_hadamard", heads=heads, page_size=64, seqs=seqs).check()
    Case("int4", device, rotation="hadamard", heads=heads, head_dim=32, seqs=seqs).check()


def test_a_row_of_one_token_is_as_exact(device):
    """
    The other token's place does not count, however low the one token's score.
    """
    case = Case("int2", device, heads=(8, 1), seqs=((1, 1), (33, 1)))
    case.q *= 300
    case.check()


@pytest.mark.parametrize("heads", [1, 2, 4], ids=str)
def test_parts_of_a_tile_have_columns_of_their_own(heads, device, monkeypatch):
    """
    With up to four heads a KV head: four or two parts, of which the last may have no token, whatever the head_dim.
    """
    monkeypatch.setattr(decode, "choose_tuning", lambda *_: Tuning(64, 2, 2, least=64))
    for dtype, head_dim in (("int4", 96), ("int2", 128), ("int8", 64)):
        case = Case(dtype, device, heads=(heads, 1), head_dim=head_dim, seqs=((70, 1), (1, 1), (130, 1)), page_size=64)
        case.check()
        case.q *= 300  # the one token's score may be far below 0
        case.check(softcap=2.0, sinks=torch.randn(heads, device=device))


def test_columns_without_a_token_yet_wait_for_theirs(device, monkeypatch):
    """
    A window that begins in a tile's last part, so that the others' columns see their first token a tile later, all of
    whose scores are far below 0.
    """
    monkeypatch.setattr(decode, "choose_tuning", lambda *_: Tuning(64, 2, 2, least=64))
    case = Case("int8", device, heads=(1, 1), seqs=((130, 1),), page_size=64)
    slots = (case.batch.page_table[0][:, None] * 64 + torch.arange(64, device=device)).flatten()[:130].long()
    keys, values = torch.randn(2, 130, 1, 64, device=device).half()
    case.cache.append(0, 3 + keys / 3, values, slots)
    case.q.fill_(-4.0)
    case.check(sliding_window=70)


def test_sums_of_whole_numbers_hold_the_largest_rows(device):
    """
    All channels of int8's keys at 127 or -127, under queries as large as their group's largest number.
    """
    case = Case("int8", device, heads=(4, 1), head_dim=512, seqs=((40, 1),), page_size=64)
    keys = case.cache.keys[0]
    keys.codes.fill_(127)
    keys.codes[:, :, ::2].fill_(0x81)
    keys.scale.fill_(2e-4)
    case.q.fill_(1.9990234375)
    case.check()


def test_a_scheduler_gets_a_second_program_where_splits_stay_long(monkeypatch):
    """
    Of 64 tokens a tile: 16 tiles a split suffice, 8 do not, nor 16 beside tokens in 16 bits or of 16 query heads.
    """
    monkeypatch.setattr(tuning, "multiprocessors", lambda: 132)
    cut = Tuning(64, 3, 4, crowded=8)

    assert [cut.splits(64, tokens) for tokens in (8192, 16384)] == [8, 16]
    assert cut.splits(64, 16384, further=1) == cut.splits(64, 16384, heads=16) == 8


def test_int2_gets_a_third_program_up_to_four_heads(monkeypatch):
    """
    Its registers suffice then; not with tokens in 16 bits or centres by page, nor keys in tiers over the same values.
    """
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    int2, tiers = (kernels.layout(all_dtypes()[f"{name}_per_token_head"]) for name in ("int2", "tiers421"))

    assert tuning.choose_tuning(int2, int2, 128, 4, True).crowded == 12
    for k, heads, plain in ((int2, 5, True), (int2, 4, False), (tiers, 4, True)):
        assert tuning.choose_tuning(k, int2, 128, heads, plain).crowded == 0


@pytest.mark.parametrize("programs", [1, 6, 12, 50], ids=str)
@pytest.mark.parametrize("heads", [(4, 1), (3, 1)], ids=str)
def test_any_number_of_splits_is_merged(programs, heads, device, monkeypatch):
    """
    Few splits, whose heads share a program of the merge, and more than it takes at once; some have no tokens.
    """
    monkeypatch.setattr("kvbench_kernels.tuning.multiprocessors", lambda: 2)
    monkeypatch.setattr(decode, "choose_tuning", lambda *_: Tuning(16, 2, programs, least=16))
    case = Case("int4", device, rotation="randomized_hadamard", heads=heads, seqs=((801, 1), (40, 1)))
    case.check(sinks=torch.randn(heads[0], device=device))


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_every_page_size(page_size, device):
    """
    Pages smaller than a tile, and larger.
    """
    Case("int4", device, page_size=page_size, seqs=((130, 1), (30, 1))).check()
    Case("fp16", device, page_size=page_size, seqs=((130, 4), (30, 1))).check()


@pytest.mark.parametrize(
    "options",
    [{"sliding_window": 20}, {"softcap": 3.0}, {"sinks": True}, {"sliding_window": 7, "softcap": 2.0, "sinks": True}],
    ids=str,
)
def test_windows_softcaps_and_sinks(options, device):
    """
    Each alone and all together, in decode and in chunks.
    """
    for dtype, seqs in (("int4", ((100, 1), (30, 1))), ("int2", ((100, 8), (30, 1))), ("fp16", ((100, 1), (9, 9)))):
        case = Case(dtype, device, seqs=seqs, page_size=64)
        case.check(**{**options, **({"sinks": torch.randn(4, device=device)} if "sinks" in options else {})})


def test_alibi_adds_its_slope_times_the_distance(device):
    """
    As a bias on every score, in decode and in chunks.
    """
    for seqs in (((50, 1), (20, 1)), ((50, 10), (20, 20))):
        case = Case("int8", device, seqs=seqs)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
        batch, plane = case.batch, (case.cache.keys[0], case.cache.values[0])
        got = attend(
            case.q,
            kernels.side(plane[0]),
            kernels.side(plane[1]),
            batch.page_table,
            batch.seq_lens,
            batch.query_starts,
            scale=0.125,
            alibi_slopes=slopes,
        ).double()
        for b, (start, end, length) in enumerate(batch.spans):
            pages = batch.page_table[b].to(torch.int64)
            k, v = (
                x.transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(2, 1)
                for x in case.cache.read(0, pages, torch.float64)
            )
            position = torch.arange(length - (end - start), length, device=device)[:, None]
            distance = (torch.arange(length, device=device)[None] - position).double()
            score = (
                torch.einsum("thd,nhd->htn", case.q[start:end].double(), k) * 0.125
                + slopes.double()[:, None, None] * distance
            )
            want = torch.einsum("htn,nhd->thd", score.masked_fill(distance > 0, -math.inf).softmax(-1), v)
            assert float((got[start:end] - want).norm() / want.norm()) < 8e-4


@pytest.mark.parametrize("spread_rows", [1, 512], ids=["spread", "paged"])
def test_a_bias_among_new_tokens_makes_a_tree(spread_rows, device, monkeypatch):
    """
    -inf between branches: each new token sees the context, its ancestors and itself; the bias also weighs them.
    """
    monkeypatch.setattr("kvbench_kernels.prefill.SPREAD_ROWS", spread_rows)
    parents = (-1, 0, 0, 1, 2, 2)
    bias = torch.full((6, 6), -math.inf)
    for i, parent in enumerate(parents):
        bias[i] = bias[parent] if parent >= 0 else bias[i]
        bias[i, i] = 0.1 * i
    bias = bias.to(device)
    case = Case("int4", device, seqs=((70, 6), (6, 6), (40, 3), (30, 1)))
    batch = case.batch
    sides = kernels.side(case.cache.keys[0]), kernels.side(case.cache.values[0])
    got = attend(
        case.q, *sides, batch.page_table, batch.seq_lens, batch.query_starts, scale=0.125, qq_bias=bias
    ).double()
    for b, (start, end, length) in enumerate(batch.spans):
        pages = batch.page_table[b].to(torch.int64)
        k, v = (
            x.transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(2, 1)
            for x in case.cache.read(0, pages, torch.float64)
        )
        score = torch.einsum("thd,nhd->htn", case.q[start:end].double(), k) * 0.125
        score[:, :, length - (end - start) :] += bias[: end - start, : end - start].double()
        future = (
            torch.arange(length, device=device)[None]
            > torch.arange(length - (end - start), length, device=device)[:, None]
        )
        want = torch.einsum("htn,nhd->thd", score.masked_fill(future, -math.inf).softmax(-1), v)
        assert float((got[start:end] - want).norm() / want.norm()) < 8e-4


def test_a_sequence_without_tokens_gives_zeros(device):
    """
    And leaves its neighbours' outputs alone.
    """
    case = Case("int8", device, seqs=((40, 1), (17, 1)))
    sides = kernels.side(case.cache.keys[0]), kernels.side(case.cache.values[0])
    empty = case.batch.seq_lens.clone()
    empty[0] = 0
    full, half, again = (
        attend(case.q, *sides, case.batch.page_table, lens, case.batch.query_starts, scale=0.125)
        for lens in (case.batch.seq_lens, empty, case.batch.seq_lens)
    )
    assert torch.equal(half[0], torch.zeros_like(half[0]))
    assert torch.equal(half[1], full[1])
    assert torch.equal(again, full)


def test_a_graph_can_be_replayed(device):
    """
    Every replay gives what the call itself gave.
    """
    if not GPU:
        pytest.skip("graphs are the GPU's")
    case = Case("int4", device, rotation="randomized_hadamard", seqs=((900, 1), (17, 1)))
    call = {"scaling": 0.125, "sliding_window": None, "softcap": None, "sinks": None}
    want = kernels.attend(case.q, case.cache, 0, case.batch, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [kernels.attend(case.q, case.cache, 0, case.batch, **call) for _ in range(2)]
    for _ in range(3):
        for out in got:
            out.zero_()
        graph.replay()
        assert all(torch.equal(out, want) for out in got)


def test_keys_and_values_may_differ(device):
    """
    Any pair of dtypes and rotations.
    """
    for pair in ("int4:int2", "fp8_per_tensor:int8", "fp16:int4"):
        for seqs in (((60, 1), (31, 1)), ((60, 12), (31, 1))):
            Case(pair, device, rotation="randomized_hadamard:hadamard", seqs=seqs).check()


# of those that turn rows alike, one
LOWERED = {(type(one), one.block(64)): name for name, one in all_rotations().items() if one.lower(64)}


@pytest.mark.parametrize("rotation", LOWERED.values())
def test_rotated_caches_give_unrotated_outputs(rotation, device):
    """
    Queries are turned like the keys and outputs turned back, for a D that is no power of two as well.
    """
    for head_dim in (64, 96):
        Case("int4", device, rotation=rotation, head_dim=head_dim, seqs=((40, 1), (17, 1))).check()
        Case("int2", device, rotation=rotation, head_dim=head_dim, seqs=((40, 3), (17, 1))).check()


def test_queries_may_be_strided_and_of_any_magnitude(device):
    """
    A view into a fused projection; scores of 1e-6 and of 1e3 times the usual queries.
    """
    case = Case("int4", device, seqs=((40, 1), (17, 1)))
    fused = torch.randn(2, 4, 3, 64, device=device, dtype=torch.float16)
    case.check(fused[:, :, 1])
    case.check(case.q.float() * 1e-6)
    case.check((case.q.float() * 1e3).to(torch.float32), budget=1e-2)


@pytest.mark.skipif(not GPU, reason="the interpreter's bf16 casts truncate")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bf16_models(dtype, device):
    """
    Queries and outputs in bf16.
    """
    Case(dtype, device, model=torch.bfloat16, seqs=((100, 1), (30, 1))).check()
    Case(dtype, device, model=torch.bfloat16, seqs=((100, 20), (30, 1))).check()


def test_a_broken_row_is_seen(device):
    """
    A key or value that is not finite makes the outputs that read it NaN, and no others.
    """
    case = Case("int4", device, seqs=((40, 1), (17, 1)))
    page = int(case.batch.page_table[0, 1])
    case.cache.values[0].scale[page, 1, 3] = math.nan
    out = kernels.attend(
        case.q, case.cache, 0, case.batch, scaling=0.125, sliding_window=None, softcap=None, sinks=None
    )
    assert out[0, 2:].isnan().all()
    assert out[0, :2].isfinite().all()
    assert out[1].isfinite().all()


def test_wrong_tensors_are_refused(device):
    """
    The launcher says what does not fit.
    """
    case = Case("int4", device)
    k, v = kernels.side(case.cache.keys[0]), kernels.side(case.cache.values[0])
    with pytest.raises(ValueError, match="query heads"):
        attend(
            case.q[:, :3],
            k,
            v,
            case.batch.page_table,
            case.batch.seq_lens,
            case.batch.query_starts,
            scale=1.0,
            v_turn=Turn(),
        )
    with pytest.raises(ValueError, match="bytes"):
        attend(case.q[..., :32], k, v, case.batch.page_table, case.batch.seq_lens, case.batch.query_starts, scale=1.0)
