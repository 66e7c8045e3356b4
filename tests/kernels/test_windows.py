"""Exact tokens beside a packed history, and centred keys, against float64 over the same bytes."""

import math

import pytest
import torch
from kvbench_kernels import decode as decode_module
from kvbench_kernels.attention import attend
from kvbench_kernels.center import Center
from kvbench_kernels.exact import Exact
from kvbench_kernels.layout import Side
from kvbench_kernels.store import store
from kvbench_kernels.tuning import Tuning

from kvbench.attention import triton as kernels
from kvbench.dtypes import all_dtypes
from kvbench.dtypes.base import Rows
from kvbench.transforms import all_rotations

GPU = torch.cuda.is_available()
# `auto` is one of the 16-bit types; bf16 products and casts are wrong in the interpreter
DTYPES = [name for name in kernels._ROUNDINGS if name != "auto" and (GPU or name != "bf16")]
POSITIONS = 64  # of a page of centres


def guarded(x, fill=math.nan):
    """x between two further rows of `fill`, in one piece of memory: what is read beside x shows in the outputs."""
    room = torch.full((x.shape[0] + 2, *x.shape[1:]), fill, dtype=x.dtype, device=x.device)
    room[1:-1] = x
    return room[1:-1]


class Case:
    """Packed and exact rows of the same tokens, written by one launch, and queries at the ends of sequences.

    What was never written is NaN, in the packed pages and in the exact ones, and so is what lies beside the centres;
    beside the page table lies a page that was never written.
    """

    def __init__(
        self,
        device,
        key="int4_per_token_head",
        value=None,
        *,
        rotation="hadamard",
        heads=(4, 2),
        head_dim=64,
        page_size=16,
        seqs=((37, 1), (150, 1), (1, 1), (64, 1)),
        window=None,  # first tokens, pages, tokens a page
        centers=0,
        heavy=False,
        model=torch.float16,
    ):
        self.device, self.heads, self.seqs, self.window, self.model = device, heads, seqs, window, model
        self.page_size, self.head_dim = page_size, head_dim
        self.dtypes = [all_dtypes()[name] for name in (key, value or key)]
        self.rule = all_rotations()[rotation]
        self.turn = kernels.turn(self.rule, head_dim, device)
        width = max(-(-n // page_size) for n, _ in seqs)
        pages = len(seqs) * width + 2
        *used, _, spare = torch.randperm(pages).tolist()
        self.table = guarded(torch.tensor(used, dtype=torch.int32, device=device).view(-1, width), spare)
        hkv = heads[1]
        self.sides = [self._side(dtype, pages) for dtype in self.dtypes]
        exact = torch.full((2, pages, hkv, page_size, head_dim), math.nan, dtype=model, device=device)
        self.exact = None if window is None else Exact(exact[0], exact[1], *window)
        offset = torch.randn(centers, hkv, head_dim, device=device) * 5 if centers else None
        self.center = None
        if centers:
            center = Center.make(offset, self.turn, POSITIONS)
            self.center = Center(guarded(center.offset), guarded(center.parts), POSITIONS)
        self.rows = []
        for b, (length, _) in enumerate(seqs):
            shape = (2, length, hkv, head_dim)
            x = torch.distributions.StudentT(2.0).sample(shape) if heavy else torch.randn(shape)
            if centers:
                x[0] += offset.cpu()[torch.clamp(torch.arange(length) // POSITIONS, max=centers - 1)]
            self.write(b, x.to(device, model))
        new = torch.tensor([0] + [n for _, n in seqs])
        self.starts = new.cumsum(0).to(device, torch.int32)
        self.lengths = torch.tensor([n for n, _ in seqs], dtype=torch.int32, device=device)
        self.q = torch.randn(int(new.sum()), heads[0], head_dim).to(device, model)

    def _side(self, dtype, pages):
        shape = (pages, self.heads[1], self.page_size)
        codes = torch.full((*shape, dtype.code_bytes(self.head_dim)), 0xFF, dtype=torch.uint8, device=self.device)
        scale = None
        if dtype.granularity == "per_token_head":
            broken = torch.full((*shape, dtype.scale_storage.itemsize), 0xFF, dtype=torch.uint8, device=self.device)
            scale = broken.view(dtype.scale_storage)[..., 0]  # NaN
        elif dtype.granularity == "per_tensor":
            scale = torch.full((), 0.02, device=self.device)
        storage = getattr(dtype.decode, "storage", None)
        return Side(codes, scale, kernels.layout(dtype), storage or torch.float16)

    def slots(self, b, length):
        at = torch.arange(length, device=self.device)
        return self.table[b, at // self.page_size].long() * self.page_size + at % self.page_size

    def write(self, b, x):
        """All of sequence b: keys and values [2, N, HKV, D] before they are centred."""
        length = x.shape[1]
        roundings = [kernels.rounding(dtype) for dtype in self.dtypes]
        positions = torch.arange(length, device=self.device)
        options = {"center": self.center, "positions": positions, "exact": self.exact}
        store(x[0], x[1], *self.sides, *roundings, self.slots(b, length), k_turn=self.turn, v_turn=self.turn, **options)

    def read(self, b, length):
        """Keys and values of sequence b in float64, packed and exact: four times [N, HKV, D], turned."""
        slots = self.slots(b, length)
        page, at = slots // self.page_size, slots % self.page_size
        found = []
        for dtype, side in zip(self.dtypes, self.sides, strict=True):
            row_scale = side.scale[page, :, at] if side.scale_dims == 1 else None
            one = side.scale if side.scale_dims == 0 else None
            found.append(dtype.dequantize(Rows(side.codes[page, :, at], row_scale), torch.float64, one))
        exact = () if self.exact is None else (self.exact.k, self.exact.v)
        return [*found, *(x[page, :, at].double() for x in exact)]

    def want(self, scaling, window=0, softcap=0.0, sinks=None):
        """[T, HQ, D] float64, a query at a time, its keys chosen by the rule as it is written down."""
        out = []
        group = self.heads[0] // self.heads[1]
        start = 0
        for b, (length, new) in enumerate(self.seqs):
            k, v, *exact = self.read(b, length)
            j = torch.arange(length, device=self.device)
            for t in range(new):
                i = length - new + t
                own_k, own_v = k, v
                if self.window is not None:
                    first, recent, page = self.window
                    near = i + 1 if recent is None else max(0, (i // page - recent) * page)
                    is_exact = ((j < first) | (j >= near))[:, None, None]
                    own_k, own_v = torch.where(is_exact, exact[0], k), torch.where(is_exact, exact[1], v)
                q = self.q[start + t].double()
                turned = self.rule.rotate_query(q)
                score = torch.einsum("hd,nhd->hn", turned, own_k.repeat_interleave(group, 1))
                if self.center is not None:
                    offset = self.center.offset.double()[torch.clamp(j // POSITIONS, max=self.center.last)]
                    score += torch.einsum("hd,nhd->hn", q, offset.repeat_interleave(group, 1))
                score *= scaling
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                seen = (j <= i) & (j > i - window) if window else j <= i
                score = score.masked_fill(~seen[None], -math.inf)
                if sinks is not None:
                    score = torch.cat([score, sinks.double()[:, None]], 1)
                weight = score.softmax(1)[:, :length]
                mixed = torch.einsum("hn,nhd->hd", weight[:, : i + 1], own_v[: i + 1].repeat_interleave(group, 1))
                out.append(self.rule.unrotate(mixed))
            start += new
        return torch.stack(out)

    def attend(self, **options):
        return attend(
            self.q,
            *self.sides,
            self.table,
            self.lengths,
            self.starts,
            k_turn=self.turn,
            v_turn=self.turn,
            exact=self.exact,
            center=self.center,
            **options,
        )

    def check(self, budget=None, **options):
        """Half a unit in the last place of 16 bits for the output, the weights and the values."""
        options = {"scale": self.head_dim**-0.5, **options}
        got = self.attend(**options).double()
        want = self.want(options.pop("scale"), **options)
        assert got.isfinite().all()
        error = float((got - want).norm() / want.norm())
        assert error < (budget or (8e-4 if self.model == torch.float16 and self.dtypes[0].name != "bf16" else 8e-3))


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy-tailed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_reads_the_window_exactly(dtype, heavy, device):
    """
    First tokens and the newest pages in 16 bits, the rest packed, for contexts shorter and longer than the window.
    """
    Case(device, dtype, window=(4, 1, 16), heavy=heavy).check()


@pytest.mark.parametrize(
    "window", [(0, 0, 16), (4, 0, 64), (0, 2, 32), (40, 1, 16), (200, 3, 64), (4, None, 64)], ids=str
)
def test_every_window(window, device):
    """
    Without first tokens, without whole pages, with more first tokens than one tile, or than the context.
    """
    for page_size, length in ((16, 150), (64, 90), (128, 130)):
        options = {"page_size": page_size, "seqs": ((length, 1), (9, 1))}
        Case(device, "int4_per_token_head", "int2_per_token_head", window=window, **options).check()


@pytest.mark.parametrize("heads", [(3, 1), (8, 2), (9, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_windows_of_every_shape(heads, head_dim, device):
    """
    Groups of 3, 4, 9 and 16 query heads; rows that lie side by side in a tile, and rows that fill none.
    """
    options = {"heads": heads, "head_dim": head_dim, "window": (4, 1, 16), "seqs": ((70, 1),), "centers": 2}
    for dtype in ("int4_per_token_head", "int2_per_token_head", "int8_per_token_head"):
        Case(device, dtype, **options).check()


@pytest.mark.parametrize("rotation", ["none", "randomized_hadamard"])
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 8.0}, {"sinks": True}, {"window": 90}, {"window": 30, "softcap": 4.0, "sinks": True}],
    ids=str,
)
def test_what_centring_took_from_the_scores_is_added_back(rotation, centers, options, device):
    """
    One centre where a softcap or sink logits see it, and one a page of positions always, packed keys and exact ones.
    """
    options = {**options, **({"sinks": torch.randn(4, device=device)} if "sinks" in options else {})}
    for window in (None, (4, 1, 16)):
        shape = {"heads": (4, 1), "seqs": ((37, 1), (150, 1))}
        case = Case(device, "int8_per_token_head", rotation=rotation, centers=centers, window=window, **shape)
        case.check(**options)


def test_large_centres_keep_their_digits(device):
    """
    Scores of ±1000 from centres a hundred times wider than the keys: their differences from page to page are exact.
    """
    case = Case(device, "int8_per_token_head", heads=(2, 1), centers=4, seqs=((230, 1),), window=(4, 0, 64))
    case.center = Center.make(case.center.offset * 40, case.turn)
    case.check()


@pytest.mark.parametrize("programs", [1, 6, 50], ids=str)
def test_splits_share_exact_and_packed_tokens(programs, device, monkeypatch):
    """
    However many splits there are: some of exact tokens alone, one of both kinds, some of packed ones, some of none.
    """
    monkeypatch.setattr("kvbench_kernels.tuning.multiprocessors", lambda: 2)
    monkeypatch.setattr(decode_module, "choose_tuning", lambda *_: Tuning(32, 2, programs, least=32))
    options = {"heads": (4, 1), "seqs": ((801, 1), (40, 1), (150, 1)), "centers": 5}
    Case(device, window=(7, 6, 16), **options).check(sinks=torch.randn(4, device=device))


@pytest.mark.parametrize("dtype", ["int4_per_token_head", "int2_per_token_head", "int8_per_token_head"])
def test_small_values_keep_their_digits_beside_exact_ones(dtype, device):
    """
    A packed weight includes its value's scale, here 2^-14 or less, and an exact one does not; both are in one sum.
    """
    case = Case(device, dtype, window=(4, 1, 16), seqs=((150, 1), (37, 1)))
    for b, (length, _) in enumerate(case.seqs):
        case.write(
            b,
            torch.randn(2, length, 2, 64, device=device)
            * torch.tensor([1, 2**-13], device=device)[:, None, None, None],
        )
    case.q = case.q.float()  # and so are outputs, which are below the least of 16 bits
    case.check()


def test_no_token_gives_zeros(device):
    """
    A sequence of no tokens has no window either; its neighbours' outputs stay.
    """
    case = Case(device, window=(4, 1, 16), seqs=((40, 1), (17, 1)), centers=2)
    full = case.attend(scale=0.125)
    case.lengths[0] = 0
    half = case.attend(scale=0.125)
    assert torch.equal(half[0], torch.zeros_like(half[0]))
    assert torch.equal(half[1], full[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centers", [0, 1, 3])
def test_centred_bytes_are_the_definition_s(dtype, centers, device):
    """
    Subtracted in float32, then turned, rounded and packed: bit for bit; and the turned rows in 16 bits beside them.
    """
    rule = all_rotations()["randomized_hadamard"]
    definition = all_dtypes()[dtype]
    x = torch.distributions.StudentT(2.0).sample((2, 150, 2, 96)).to(torch.float16)
    x[:, 7] = 0
    x[:, 8] = -2.5
    case = Case(device, dtype, rotation=rule.name, head_dim=96, seqs=((150, 1),), window=(0, 0, 64), centers=centers)
    case.write(0, x.to(device))
    slots = case.slots(0, 150)
    page, at = slots // case.page_size, slots % case.page_size
    wanted = x.float()
    if centers:
        offset = case.center.offset.cpu()[torch.clamp(torch.arange(150) // POSITIONS, max=centers - 1)]
        wanted[0] -= offset
    for side, exact, rows in zip(case.sides, (case.exact.k, case.exact.v), wanted, strict=True):
        turned = rule.rotate(rows)
        one = None if side.scale_dims != 0 else side.scale.cpu()
        expected = definition.quantize(turned, one)
        assert torch.equal(expected.codes, side.codes[page, :, at].cpu())
        if expected.scale is not None:
            scales = (expected.scale, side.scale[page, :, at].cpu())
            assert torch.equal(*(scale.unsqueeze(-1).view(torch.uint8) for scale in scales))
        assert torch.equal(turned.half(), exact[page, :, at].cpu())


def test_what_does_not_fit_is_refused(device):
    """
    An exact copy of other slots, centres of other heads, values no 16 bits hold, pages without positions.
    """
    case = Case(device, window=(4, 1, 16), centers=2)
    with pytest.raises(ValueError, match="the packed cache's slots"):
        Exact(case.exact.k[:1], case.exact.v, 4, 1).check(case.sides[0], 64)
    with pytest.raises(ValueError, match="offsets are"):
        Center.make(torch.zeros(1, 3, 64, device=device)).check(case.sides[0], 64)
    with pytest.raises(ValueError, match="beyond what is multiplied in 16 bits"):
        Center.make(torch.full((1, 2, 64), 1e5, device=device))
    x = torch.zeros(1, 2, 64, device=device)
    rounding = kernels.rounding(case.dtypes[0])
    with pytest.raises(ValueError, match="need the positions"):
        store(x, x, *case.sides, rounding, rounding, case.slots(0, 1), center=case.center)


MIXED = ((70, 70), (150, 9), (90, 1), (37, 20))  # a prompt, chunks after a cached prefix, a decode step


@pytest.fixture(params=["spread", "paged"])
def prefill_way(request, monkeypatch):
    """Both ways to read a prompt's keys: spread in memory once, or unpacked by every program."""
    monkeypatch.setattr("kvbench_kernels.prefill.SPREAD_ROWS", 1 if request.param == "spread" else 10**9)
    monkeypatch.setattr("kvbench_kernels.prefill.SPREAD_RATIO", 10**9)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_tile_have_windows_of_their_own(dtype, prefill_way, device):
    """
    Prompts, chunks and single tokens in one batch: each query's exact keys follow from its own position.
    """
    Case(device, dtype, window=(4, 1, 16), seqs=MIXED).check()


@pytest.mark.parametrize("window", [(0, 0, 64), (70, 1, 32), (3, 9, 16), (0, 0, 16), (4, None, 64)], ids=str)
def test_prompts_with_every_window(window, prefill_way, device):
    """
    More first tokens than a tile, pages smaller and larger than what a program's rows span, and no first tokens.
    """
    Case(device, "int4_per_token_head", "int2_per_token_head", heads=(3, 1), window=window, seqs=MIXED).check()


@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("window", [None, (4, 1, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 8.0, "sinks": True}], ids=str)
def test_prompts_over_centred_keys(centers, window, options, prefill_way, device):
    """
    Centres are added to spread keys, or to scores: with a sliding window, a softcap and sink logits too.
    """
    options = {**options, **({"sinks": torch.randn(4, device=device)} if "sinks" in options else {})}
    # a spread key has its centre again, five times as wide, and is rounded to 16 bits with it
    case = Case(device, "int8_per_token_head", centers=centers, window=window, seqs=MIXED)
    case.check(budget=8e-4 if prefill_way == "paged" else 2e-3, **options)


@pytest.mark.parametrize("window", [None, (4, 0, 64)], ids=str)
@pytest.mark.parametrize("centers", [2, 6])
def test_prompts_over_fewer_or_more_centres_than_pages(centers, window, prefill_way, device):
    """
    The last centre is that of all later pages, and those are left out that no page has; three query heads a KV head.
    """
    case = Case(device, "int8_per_token_head", heads=(6, 2), centers=centers, window=window, seqs=((230, 9), (70, 2)))
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)  # strides of another order
    case.check(budget=8e-4 if prefill_way == "paged" else 2e-3)


@pytest.mark.parametrize("window", [None, (4, 0, 64)], ids=str)
def test_prompts_keep_the_digits_of_large_centres(window, device, monkeypatch):
    """
    Scores of ±1000 from centres a hundred times wider than the keys: their differences from page to page are exact.
    """
    monkeypatch.setattr("kvbench_kernels.prefill.SPREAD_ROWS", 10**9)
    case = Case(device, "int8_per_token_head", heads=(2, 1), centers=4, seqs=((230, 20),), window=window)
    case.center = Center.make(case.center.offset * 40, case.turn)
    case.check()


@pytest.mark.skipif(not GPU, reason="the interpreter's bf16 casts truncate")
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_bf16_models_keep_bf16_windows(rotation, device, monkeypatch):
    """
    Queries, outputs and exact rows in bf16, in decode, chunks and long prompts.
    """
    for seqs in (((150, 1), (37, 1)), MIXED):
        Case(device, rotation=rotation, model=torch.bfloat16, window=(4, 1, 16), seqs=seqs, centers=3).check()
    monkeypatch.setattr("kvbench_kernels.prefill.SPREAD_ROWS", 1)
    Case(device, rotation=rotation, model=torch.bfloat16, window=(4, 1, 16), seqs=MIXED, centers=3).check()
