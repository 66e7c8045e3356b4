"""Rows in blocks, and of 3 bits: written as their definitions say, and read as any other rows."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from kvbench_kernels.tiles import row_offsets

from kvbench.attention import choose
from kvbench.attention import triton as kernels
from kvbench.cache import PagedCache
from kvbench.dtypes import all_dtypes
from kvbench.schemes import Scheme


def beside(name):
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Case, streams = beside("test_attention").Case, beside("test_unpack").streams
GPU = torch.cuda.is_available()
NAMES = [*kernels._BLOCKS, *kernels._PLANES]
# in the interpreter each name once
READ = [*NAMES, "q8_0:q4_0"] if GPU else ["q8_0:q4_0", "nvfp4:mxfp4", "mxfp8", "int3_per_token_head"]


def hard_rows(name, tokens, heads, head_dim):
    """Heavy tails, zeros of both signs, NaN, infinities, scales too small and too large, ties of each rounding."""
    x = torch.distributions.StudentT(2.0).sample((tokens, heads, head_dim))
    x[0], x[1, 0], x[1, 1] = 0, -0.0, 1
    x[2, 0, 3], x[2, 1, 40], x[3, 0, 7] = math.nan, math.inf, -math.inf
    x[3, 1], x[4, 0], x[4, 1] = 6.5e4, -(2.0**-24), x[4, 1] * 1e-6
    at = torch.arange(head_dim)
    # of e2m1, of codes whose scale is 1, and the largest magnitude with both signs
    x[5, 0] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -1.25, -5.0, -0.0, 0, 2, 4, 7])[at % 16]
    x[5, 1] = at % 32 / 2 - 7.5
    x[6, 0] = torch.where(at % 32 == 0, 127.0, at % 31 / 2 - 8)
    x[6, 1] = torch.where(at % 2 == 0, 3.0, -3.0)
    x[7, 0] = torch.where(at % 32 == 9, -8.0, at % 16 / 2 - 4)
    return x.to(torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_definition_s(name, device):
    """
    Turned, each block scaled, rounded, packed and scattered: bit for bit what plain torch writes, in every slot.
    """
    for rotation, head_dim, tokens in (("none", 64, 9), ("randomized_hadamard", 128, 2000 if GPU else 9)):
        scheme = Scheme.parse(name, rotation)
        x = torch.stack([hard_rows(name, tokens, 2, head_dim), hard_rows(name, tokens, 2, head_dim).flip(0, 2)])
        slots = torch.randperm(2 * tokens)[:tokens]
        slots[7] = -1
        caches = []
        for place in ("cpu", device):
            cache = PagedCache([(2, head_dim)], scheme, pages=-(-tokens // 8), page_size=16, device=place)
            for plane in (cache.keys[0], cache.values[0]):
                plane.codes.fill_(0xAB)
                plane.scale.view(torch.uint8).fill_(0x11)
                if plane.tensor_scale is not None:
                    plane.tensor_scale.fill_(0.02)
            caches.append(cache)
        want, got = caches
        want.append(0, x[0], x[1], slots)
        kernels.append(got, 0, x[0].to(device), x[1].to(device), slots.to(device))

        for expected, plane in ((want.keys[0], got.keys[0]), (want.values[0], got.values[0])):
            assert torch.equal(expected.row_bytes, plane.row_bytes.cpu()), (rotation, head_dim)


@pytest.mark.parametrize("heavy", [False, *([True] if GPU else [])])
@pytest.mark.parametrize("name", READ)
def test_decode_is_as_exact_as_sixteen_bits_allow(name, heavy, device):
    """
    One query a sequence, ragged lengths, several splits, pages in any order, unwritten memory NaN.
    """
    case = Case(name, device, seqs=((150, 1), (1, 1), (64, 1)), page_size=64, heavy=heavy)
    case.check()
    case.check(case.q.float() * 1e-6)


@pytest.mark.parametrize("name", READ)
def test_prompts_chunks_and_single_tokens_mix(name, device):
    """
    A whole prompt, a chunk after a cached prefix and a decode step in one batch, rotated both ways.
    """
    Case(name, device, rotation="randomized_hadamard:hadamard", seqs=((20, 20), (70, 9), (90, 1))).check()


@pytest.mark.parametrize("name", READ if GPU else ["nvfp4:q4_0"])
def test_every_shape(name, device):
    """
    Rows of several parts or of half a product, small pages, one query head and many, a window, a softcap and sinks.
    """
    seqs = ((75, 1), (1, 1), (22, 1))
    for heads, head_dim, page_size in (((2, 1), 256, 64), ((3, 1), 128, 16), ((24, 1), 64, 32))[: 3 if GPU else 2]:
        options = {"sliding_window": 35, "softcap": 3.0, "sinks": torch.randn(heads[0], device=device)}
        Case(name, device, heads=heads, head_dim=head_dim, page_size=page_size, seqs=seqs).check(**options)
    if GPU:
        Case(name, device, model=torch.bfloat16, heads=(8, 2), head_dim=128, seqs=((900, 1), (70, 20))).check()
        Case(name, device, heads=(32, 8), head_dim=128, page_size=64, seqs=((8192, 1),)).check(budget=4e-4)


def test_a_broken_block_is_seen(device):
    """
    A value that is not finite makes the outputs of its block's channels NaN, and no others; a key, all of its head.
    """
    case = Case("nvfp4:mxfp4", device, seqs=((40, 1), (17, 1)))
    call = {"scaling": 0.125, "sliding_window": None, "softcap": None, "sinks": None}
    page = int(case.batch.page_table[0, 1])
    values = case.cache.values[0]
    values.scale[page, 1, 3, 1] = 0xFF
    values.codes[page, 1, 3] = 0
    out = kernels.attend(case.q, case.cache, 0, case.batch, **call)

    assert out[0, 2:, 32:].isnan().all()
    assert out[0, 2:, :32].isfinite().all()
    assert out[0, :2].isfinite().all()
    assert out[1].isfinite().all()

    case.cache.keys[0].scale[page, 0, 3, 1] = 0x7F
    assert kernels.attend(case.q, case.cache, 0, case.batch, **call)[0, :2].isnan().all()


def test_values_of_zero_take_their_weight(device):
    """
    A token whose value is all zeros has no scale, but its share of the probability.
    """
    case = Case("q4_0", device, seqs=((40, 1), (17, 1)))
    page = int(case.batch.page_table[0, 1])
    case.cache.values[0].scale[page, :, 2:9] = 0
    case.check()


@pytest.mark.parametrize("name", ["q4_0", "nvfp4", *(["q8_0"] if GPU else [])])
def test_rows_of_magnitudes_far_apart_keep_their_digits(name, device):
    """
    Scales as large as their type holds beside small ones, in a tile: nothing overflows, and the small ones count.
    """
    case = Case(name, device, seqs=((70, 1), (40, 20)), page_size=64)
    for plane in (*case.cache.keys, *case.cache.values):
        scale = plane.scale.view(plane.dtype.scale_type)
        for of, factor in enumerate((1e4, 1e-3)):
            much = (scale[:, :, of::2].float() * factor).clamp(max=torch.finfo(scale.dtype).max)
            scale[:, :, of::2] = much.to(scale.dtype)
    # outputs in float32, which has room for all of them
    case.check(case.q.float(), budget=8e-4, scaling=case.q.shape[-1] ** -0.5 / 1e4)


@triton.jit
def _first_words_kernel(codes_ptr, table_ptr, out_ptr, tokens):
    """One program of 32 tokens and one head: the first 8 of 12 words a row, of 2 heads in pages of 16."""
    token = tl.program_id(0) * 32 + tl.arange(0, 32)
    page = tl.load(table_ptr + token // 16, mask=token < tokens, other=0)
    w = tl.arange(0, 8)
    at = codes_ptr + row_offsets(page, tl.program_id(1), token, 2, 16, 12)[:, None] + w[None, :]
    words = tl.load(at, mask=(token < tokens)[:, None], other=0)
    tl.store(out_ptr + (tl.program_id(1) * tokens + token)[:, None] * 8 + w[None, :], words, (token < tokens)[:, None])


def test_rows_of_24_bytes_are_read_where_they_begin(device):
    """
    Each row's words, of any page: Triton 3.6 would read sixteen bytes at once, at multiples of eight.
    """
    codes = torch.arange(5 * 2 * 16 * 12, dtype=torch.int16, device=device).view(5, 2, 16, 12)
    table, out = torch.tensor([3, 1, 4], dtype=torch.int32, device=device), codes.new_empty(2, 40, 8)
    _first_words_kernel[(2, 2)](codes, table, out, 40, num_warps=1)

    assert torch.equal(out, codes[table.long()].transpose(0, 1).flatten(1, 2)[:, :40, :8])


def test_e2m1_streams_are_its_values(device):
    """
    Every word there is: exact, by assembly as in plain Triton.
    """
    layout = kernels.layout(all_dtypes()["nvfp4"])
    words = torch.arange(65536, dtype=torch.int32)
    values = torch.tensor(all_dtypes()["nvfp4"].decode.centroids, dtype=torch.float64)
    want = torch.stack([values[(words >> 4 * stream) & 15] for stream in range(4)])

    for assembly in (False, *([True] if GPU else [])):
        assert torch.equal(streams(layout, device, assembly=assembly).double() * 2**14, want)


@pytest.mark.parametrize(
    ("pair", "head_dim", "reason"),
    [
        ("q8_0:int8", 64, "no kernel reads q8_0 beside int8_per_token_head"),
        ("int3_per_token_head", 96, "no kernel reads int3_per_token_head of head_dim 96"),
        ("q4_0", 96, "no kernel reads q4_0 of head_dim 96"),
        (
            "uint2_per_channel_64:fp16",
            64,
            "no kernel quantizes or decodes pages as a whole, as uint2_per_channel_64 is",
        ),
    ],
)
def test_what_kernels_do_not_read_is_refused(pair, head_dim, reason, device):
    """
    `triton` says why in one line, and `auto` takes the reference.
    """
    scheme = Scheme.parse(pair, "none")
    with pytest.raises(ValueError, match=f"triton can't serve this cell: {reason}"):
        choose("triton", scheme, torch.float16, device, [head_dim])
    assert choose("auto", scheme, torch.float16, device, [head_dim]) == "reference"
