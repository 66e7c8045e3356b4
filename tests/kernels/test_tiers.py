"""Keys in tiers and searched scales in kernels: the definition's bytes, and the reference's outputs over them."""

import math

import pytest
import torch
from kvbench_kernels.tiers import rest_words
from torch.utils._python_dispatch import TorchDispatchMode

from kvbench.attention import Batch, append, attend, choose, kernels_lack, waits
from kvbench.cache import PagedCache
from kvbench.schemes import Scheme
from kvbench.transforms import Rope, Sample

GPU = torch.cuda.is_available()
HKV, HQ = 2, 6
TIERS = ["tiers421_per_token_head", "tiers4321_per_token_head", "tiers42_per_token_head"]


def rope(head_dim):
    return Rope(10000.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2)))


def learned(scheme, head_dim, generator):
    """What a head learns of keys with a bias and channels of many spreads."""
    turn, positions = rope(head_dim), torch.arange(256)
    spread = torch.exp(torch.randn(HKV, head_dim, generator=generator))
    bias = 4 * torch.randn(HKV, head_dim, dtype=torch.float64, generator=generator)
    raw = torch.randn(256, HKV, head_dim, generator=generator) * spread
    keys = turn.turn(bias + raw, positions)
    queries = torch.randn(256, HQ, head_dim, generator=generator) * torch.exp(
        torch.randn(HQ, head_dim, generator=generator)
    )
    sample = Sample(keys, queries, positions, turn, 512)
    values = Sample(1 + torch.randn(256, HKV, head_dim, generator=generator), None, positions, None, 512)
    of_values = scheme.value.learn(values) if scheme.value.learns else scheme.value.unlearned
    return [(scheme.key.learn(sample), of_values)], bias, spread


class Case:
    """A packed cache and an exact one, on the device and (as torch writes it) on the CPU; unwritten memory is 0xFF."""

    def __init__(self, scheme, device, head_dim=64, page_size=64, lengths=(150, 70, 30), seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.scheme, self.device, self.head_dim, self.page_size = scheme, device, head_dim, page_size
        known, self.bias, self.spread = learned(scheme, head_dim, generator)
        self.pages = -(-max(lengths) // page_size)
        self.table = torch.randperm(len(lengths) * self.pages, generator=generator).view(len(lengths), -1)
        self.lengths = lengths
        self.caches = {}
        for place in (device, "cpu"):
            kinds = [scheme, *([scheme.exact(torch.float16)] if scheme.window else [])]
            self.caches[str(place)] = []
            for kind in kinds:
                options = {"pages": self.table.numel(), "page_size": page_size, "learned": known}
                cache = PagedCache([(HKV, head_dim)], kind, **options, model_dtype=torch.float16, device=place)
                for plane in (cache.keys[0], cache.values[0]):
                    for tensor in (plane.codes, plane.rest, plane.scale):
                        if tensor is not None:
                            tensor.view(torch.uint8).fill_(0xFF)
                self.caches[str(place)].append(cache)
        for which, length in enumerate(lengths):
            at = torch.arange(length)
            raw = torch.randn(length, HKV, head_dim, generator=generator) * self.spread
            k = rope(head_dim).turn(self.bias + raw, at)
            self.write(which, k, torch.randn(length, HKV, head_dim, generator=generator), at)

    def slots(self, which, positions):
        return self.table[which][positions // self.page_size] * self.page_size + positions % self.page_size

    def write(self, which, k, v, positions, skip=()):
        slots = self.slots(which, positions)
        slots[list(skip)] = -1
        k, v = k.half(), v.half()
        mine, right = self.caches[str(self.device)], self.caches["cpu"]
        rows = [x.to(self.device) for x in (k, v, slots)]
        if self.device.type == "cpu":
            # one cache for both places: the kernels', and the definition's beside it
            right = self.twin()
        options = {"exact": mine[1] if len(mine) > 1 else None, "positions": positions.to(self.device)}
        append(mine[0], 0, *rows, impl="triton", **options)
        options = {"exact": right[1] if len(right) > 1 else None, "positions": positions}
        append(right[0], 0, k, v, slots, impl="reference", **options)

    def twin(self):
        if not hasattr(self, "_twin"):
            import copy

            self._twin = copy.deepcopy(self.caches["cpu"])
        return self._twin

    def pairs(self):
        mine = self.caches[str(self.device)]
        right = self.twin() if self.device.type == "cpu" else self.caches["cpu"]
        for a, b in zip(mine, right, strict=True):
            yield from ((a.keys[0], b.keys[0]), (a.values[0], b.values[0]))

    def check_bytes(self):
        """Every byte of every slot, written or not."""
        for mine, right in self.pairs():
            wrong = mine.row_bytes.cpu() != right.row_bytes
            assert not bool(wrong.any()), f"{int(wrong.any(-1).sum())} of {wrong[..., 0].numel()} rows differ"

    def attend(self, news, budget=8e-4, **options):
        """The kernels' relative error against the float64 oracle over the same bytes."""
        packed, *exact = self.caches[str(self.device)]
        starts = torch.tensor([0, *news]).cumsum(0)
        own = [self.slots(i, torch.arange(n))[-new:] for i, (n, new) in enumerate(zip(self.lengths, news, strict=True))]
        batch = Batch(
            starts.to(self.device, torch.int32),
            torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            self.table.to(self.device, torch.int32),
            torch.cat(own).to(self.device),
            self.page_size,
        )
        q = torch.randn(sum(news), HQ, self.head_dim).half().to(self.device)
        options |= {"scaling": self.head_dim**-0.5, "exact": exact[0] if exact else None, "window": self.scheme.window}
        want = attend(q.double(), packed, 0, batch, impl="reference", **options)
        got = attend(q, packed, 0, batch, impl="triton", **options).double()
        assert got.isfinite().all()
        assert float((got - want).norm() / want.norm()) < budget + self.rounding(q.double(), packed.keys[0])

    def rounding(self, q, keys):
        """By how much scores move where sorted queries are rounded to 11 bits: half a unit of each product, as noise.

        Channels of many spreads make scores large, and what rounding does to them.
        """
        sorted_queries = keys.side.query(q, keys.params)
        k, _ = self.caches[str(self.device)][0].read(0, self.table.flatten().to(self.device), torch.float64)
        k = k.nan_to_num().transpose(1, 2).flatten(0, 1).repeat_interleave(HQ // HKV, 1)  # [N, HQ, D]
        products = torch.einsum("thd,nhd->thn", sorted_queries.square(), k.square())
        return 2.0**-12 * self.head_dim**-0.5 * float(products.mean().sqrt())


def scheme_of(key="tiers421_per_token_head", value="midrise2", rotation="center+rank:randomized_hadamard", window=""):
    return Scheme.parse(f"{key}:{value}{window}", rotation).resolve(torch.float16)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("key", TIERS)
def test_bytes_are_the_definition_s(key, head_dim, device):
    """
    Centred, sorted, searched, packed and scattered by one launch: every byte of every slot, and none of others.

    Rows are heavy-tailed, zeros, of equal values, tiny, huge, with NaN and infinities.
    """
    case = Case(scheme_of(key), device, head_dim, lengths=(30,) if not GPU else (300, 70))
    rows = 12 if not GPU else 260
    x = torch.distributions.StudentT(2.0).sample((2, rows, HKV, head_dim))
    x[:, 0] = 0
    x[:, 1] = 1
    x[:, 2, 0, 3] = math.nan
    x[:, 3, 1, 5] = math.inf
    x[:, 4, 0, head_dim - 1] = -math.inf
    x[:, 5] *= 1e-6
    x[:, 6] = 6e4
    x[:, 7] = torch.arange(head_dim) % 7 / 2 - 1.5
    x[:, 8] *= 300
    case.write(0, x[0], x[1].flip(0), torch.arange(rows), skip=(9,))
    case.check_bytes()


@pytest.mark.parametrize("head_dim", [80, 96])
def test_midrise_values_of_any_length(head_dim, device):
    """
    Rows that are no power of two: the halves of the definition's sums, to the bit.
    """
    scheme = Scheme.parse("midrise2", "hadamard").resolve(torch.float16)
    x = torch.distributions.StudentT(3.0).sample((2, 17, 1, head_dim)).half()
    caches = [PagedCache([(1, head_dim)], scheme, pages=2, page_size=16, device=place) for place in (device, "cpu")]
    for cache in caches:
        for plane in (cache.keys[0], cache.values[0]):
            plane.codes.fill_(1)
            plane.scale.fill_(1)
    slots = torch.randperm(32)[:17]
    append(caches[0], 0, *x.to(device), slots.to(device), impl="triton")
    append(caches[1], 0, *x, slots, impl="reference") if device.type != "cpu" else caches[1].append(0, *x, slots)
    for which in ("keys", "values"):
        mine, right = (getattr(cache, which)[0].row_bytes.cpu() for cache in caches)
        assert torch.equal(mine, right)


@pytest.mark.parametrize(
    ("key", "value", "rotation", "window", "head_dim", "options"),
    [
        ("tiers421_per_token_head", "midrise2", "center+rank:randomized_hadamard", "+w64s4", 64, {}),
        ("tiers421_per_token_head", "midrise2", "center+rank:randomized_hadamard", "+w64s4", 128, {}),
        (
            "tiers421_per_token_head",
            "midrise2",
            "center+rank:randomized_hadamard",
            "+w0s2",
            128,
            {"sliding_window": 40},
        ),
        ("tiers4321_per_token_head", "midrise2", "center+rank:randomized_hadamard", "", 128, {"softcap": 20.0}),
        ("tiers42_per_token_head", "int4", "rank:none", "+s4", 64, {}),
        ("tiers421_per_token_head", "fp16", "center_constant+rank:none", "+w0s2", 128, {"softcap": 20.0}),
        ("int4", "midrise2", "center+rank:hadamard", "+w0s2", 64, {}),
        ("int8", "int8", "center+rank:none", "", 64, {}),
        ("int4", "int4", "center+balance_shift+randomized_hadamard:randomized_hadamard", "+w64s4", 64, {}),
        *([("tiers421_per_token_head", "midrise2", "center+rank_far:hadamard", "+w64s4", 256, {})] if GPU else []),
        # what kernels have no code for is read in a copy of 16 bits; a dense rotation turns queries before
        ("q4_1", "iq4_nl", "hadamard_32:hadamard_64", "+s4", 64, {"sliding_window": 40}),
        ("turboquant3_prod", "turboquant3_mse", "random_rotation", "+w64s4", 64, {"softcap": 20.0}),
        ("clipped3_per_group", "clipped3_per_group", "reorder", "+w64s4", 64, {}),
        (
            "turboquant3_mse",
            "turboquant3_mse",
            "center+random_rotation:random_rotation",
            "+w64s4",
            64,
            {"softcap": 20.0},
        ),
        ("nuq3_per_channel", "nuq3_per_token_head", "center:none", "+s1", 64, {}),
        ("tcq4321", "tcq2", "center+rank_far:randomized_hadamard", "+w64s4", 64, {}),
        ("tcq4321", "tcq2", "center+rank:center_constant+randomized_hadamard", "", 64, {"sliding_window": 40}),
        ("tcq4", "tcq4", "center+balance_shift+randomized_hadamard:randomized_hadamard", "+w64s4", 64, {}),
        ("tcq3", "midrise2", "center+randomized_hadamard:hadamard", "", 64, {"sliding_window": 40}),
    ],
    ids=str,
)
def test_attention_is_the_reference_s(key, value, rotation, window, head_dim, options, device):
    """
    Single tokens, chunks and prompts, over caches that kernels wrote, within what 16 bits allow.
    """
    case = Case(scheme_of(key, value, rotation, window), device, head_dim, lengths=(150, 70, 30) if GPU else (90, 30))
    case.check_bytes()
    last = (1,) if GPU else ()
    case.attend((1, 1, *last), **options)
    case.attend((20, 1, *last), **options)


@pytest.mark.parametrize(
    ("key", "page_size", "head_dim"), [("tiers421_per_token_head", 48, 64), ("tiers4321_per_token_head", 16, 128)]
)
def test_pages_of_any_size(key, page_size, head_dim, device):
    """
    A tile may lie in several pages; two tokens of a row of words then do too.
    """
    case = Case(scheme_of(key), device, head_dim, page_size=page_size, lengths=(70, 33))
    case.attend((1, 1))
    case.attend((9, 1))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_long_prompt_is_spread(head_dim, device):
    """
    From many queries on keys are first put back into the model's order of channels, in 16 bits.
    """
    length = 180 if not GPU else 250  # 540 query rows a KV head and more
    case = Case(scheme_of(window="+w64s4"), device, head_dim, lengths=(length,))
    case.attend((length,), budget=2e-3)


def test_what_kernels_can_t_serve_is_refused(device):
    """
    Values in tiers, and rows that are no power of two long, by name.
    """
    lacks = kernels_lack(Scheme.parse("tiers421_per_token_head", "none"), torch.float16, device)
    assert "values as tiers421_per_token_head" in lacks
    with pytest.raises(ValueError, match="not 96; the reference"):
        rest_words(44222211, 96)
    assert choose("triton", scheme_of(), torch.float16, device) == "triton"


class _Unlooked(TorchDispatchMode):
    """Nothing inside asks what a tensor holds, as a capture into a CUDA graph can't."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique")
        assert not str(func).startswith(looks), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("all_idle", [False, True])
def test_rows_of_a_trellis_are_written_without_a_look(all_idle, device):
    """
    Tokens that are skipped change no byte, and the device alone knows which they are: a graph can hold the step.
    """
    scheme = scheme_of("tcq4321", "tcq2", "center+rank:randomized_hadamard", "+w64s4")
    assert not waits(scheme, "triton")
    assert waits(Scheme.parse("kivi2").resolve(torch.float16), "triton")
    case = Case(scheme, device, lengths=(9,))
    packed, exact = case.caches[str(device)]
    packed.keep_decoded(scheme.dtypes)
    before = [cache.keys[0].row_bytes.clone() for cache in (packed, exact)]
    x, slots = torch.randn(2, 3, HKV, 64, device=device).half(), torch.tensor([-1, 20, -1], device=device)
    slots = slots.fill_(-1) if all_idle else slots

    with _Unlooked():
        packed.append(0, *x, slots, torch.full((3,), 20, device=device))

    changed = [(a.keys[0].row_bytes != b).any(-1).nonzero() for a, b in zip((packed, exact), before, strict=True)]
    assert changed[0].tolist() == ([] if all_idle else [[0, head, 20] for head in range(HKV)])
    assert not len(changed[1])
    torch.testing.assert_close(
        packed.keys[0].decoded[:, :, 20],
        packed.keys[0].read(torch.tensor([0], device=device), torch.float16)[:, :, 20],
        equal_nan=True,
    )
