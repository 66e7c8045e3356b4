import pytest
import torch
import triton
import triton.language as tl
from kvbench_kernels.layout import Layout
from kvbench_kernels.unpack import SYMMETRIC4, TABLE, UNSIGNED, masked, masked_unit, unpack
from kvbench_kernels.whole import in_upper_bytes, whole, whole_halves, whole_unit, whole_values

from kvbench.attention import triton as kernels
from kvbench.dtypes import Affine, Codebook, Rows, all_dtypes, e5m3

GPU = torch.cuda.is_available()
PACKED = [d for d in all_dtypes().values() if d.code_bits <= 8 and d.name in kernels._ROUNDINGS]


@triton.jit
def _unpack_kernel(
    words_ptr,  # [N] int16
    out_ptr,  # [16 / BITS, N] fp16
    step,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    FORM: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    N: tl.constexpr,
):
    """One program per N words: their streams, in one of the forms."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    words = tl.load(words_ptr + at)
    for stream in tl.static_range(16 // BITS):
        if FORM == "whole":
            value = whole_halves(words, stream, CODEBOOK, ASSEMBLY)
        elif FORM == "masked" or FORM == "upper":
            value = masked(words, stream, BITS, FORM == "upper", ASSEMBLY)
        else:
            value = unpack(words, tl.full([1], step, tl.float16), stream, KIND, BITS, CODEBOOK, ASSEMBLY)
        tl.store(out_ptr + stream * N * tl.num_programs(0) + at, value)


def streams(layout, device, *, assembly, form="unpack"):
    """The streams of every word there is, [16 / bits, 65536] fp16."""
    words = torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16)
    out = torch.full((16 // layout.bits, 65536), float("nan"), dtype=torch.float16, device=device)
    block = 1024 if GPU else 65536
    _unpack_kernel[(65536 // block,)](
        words, out, layout.step, layout.kind, layout.bits, layout.codebook, form, assembly, block
    )  # fmt: skip
    return out.cpu()


@pytest.mark.parametrize("dtype", PACKED, ids=lambda d: d.name)
def test_streams_are_the_dtype_s_values(dtype, device):
    """
    Every word there is, against the definition: exact, or the nearest fp16 number of a codebook's value.
    """
    layout = kernels.layout(dtype)
    got = streams(layout, device, assembly=False).double() * layout.unit
    words = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    scale = torch.ones(65536)
    if dtype.decode == Affine("in_scale"):
        # a zero-point in the middle, which is what streams are relative to
        middle = 1 << (dtype.code_bits - 1)
        scale = (scale.view(torch.int32) | middle).view(torch.float32)
    if dtype.scale_storage == torch.uint8:
        scale = torch.full((65536,), int(e5m3.floor(torch.ones(()))), dtype=torch.uint8)
    rows = Rows(words.view(torch.uint8).view(65536, 2), scale if dtype.granularity == "per_token_head" else None)
    want = dtype.dequantize(rows, torch.float64).T
    if isinstance(dtype.decode, Codebook):
        # fp16's own spacing there: a centroid may be 0, where only 0 will do
        assert bool(((got - want).abs() <= 2.0**-10 * want.abs()).all())
    else:
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@triton.jit
def _whole_kernel(rows_ptr, out_ptr, CODEBOOK: tl.constexpr, ASSEMBLY: tl.constexpr, N: tl.constexpr):
    """One program: rows [N, 32] of bytes as whole numbers [N, 8, 16 words], stream by stream."""
    at = (tl.program_id(0) * N + tl.arange(0, N))[:, None]
    k = tl.arange(0, 32)[None, :]
    tiles = whole(tl.load(rows_ptr + at * 32 + k), CODEBOOK, ASSEMBLY)
    for i in tl.static_range(4):
        word, stream = k // 4 * 2 + i // 2, k % 4 * 2 + i % 2
        tl.store(out_ptr + at * 128 + stream * 16 + word, tiles[i])


def whole_numbers(layout, device, *, assembly):
    """Those of every word there is, in rows of 16: [4096, 8 streams, 16]."""
    rows = torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16).view(torch.int8).view(4096, 32)
    out = torch.zeros(4096, 8, 16, dtype=torch.int8, device=device)
    block = 64 if GPU else 4096
    _whole_kernel[(4096 // block,)](rows, out, layout.codebook, assembly, block, num_warps=1)
    return out.cpu()


def test_whole_numbers_are_the_values_to_fp16_s_rounding(device):
    """
    Every word there is: as numbers of 8 bits int2's are in the ratio of its centroids, each to 2^-11 of itself.
    """
    layout = kernels.layout(all_dtypes()["int2_per_token_head"])
    got = whole_numbers(layout, device, assembly=False)
    words = torch.arange(65536, dtype=torch.int32).view(4096, 1, 16)
    code = (words >> (2 * torch.arange(8))[None, :, None]) & 3
    want = torch.tensor(layout.codebook, dtype=torch.float64)[code]

    assert whole_values(layout.codebook) == (10, 3)
    assert bool(((got * whole_unit(layout.codebook) - want).abs() <= 2.0**-11 * want.abs()).all())
    in_halves = streams(layout, device, assembly=False, form="whole").view(8, 4096, 16).transpose(0, 1)
    assert torch.equal(in_halves, got.half())


def test_values_without_a_ratio_of_small_whole_numbers_have_none():
    """
    1 to 127.5, and what is not symmetric, are left to a table.
    """
    assert whole_values((-127.5, -1.0, 1.0, 127.5)) is None
    assert Layout.of_codebook((-127.5, -1.0, 1.0, 127.5)).kind == TABLE.value
    assert whole_values((-3.0, -1.0, 1.0, 2.0)) is None
    assert whole_values((-1.5, -0.5, 0.5, 1.5)) == (3, 1)
    assert not in_upper_bytes((-9.0, -1.0, 1.0, 9.0))


@pytest.mark.parametrize("bits", [2, 4])
def test_masked_codes_are_exact_multiples(bits, device):
    """
    Every word there is: a code, or its upper bit, times the stream's unit.
    """
    layout = Layout(UNSIGNED.value, bits)
    words = torch.arange(65536, dtype=torch.int32)
    for form, mask in (("masked", (1 << bits) - 1), ("upper", 2)):
        got = streams(layout, device, assembly=False, form=form).double()
        for stream in range(16 // bits):
            code = (words >> (bits * stream)) & mask
            assert torch.equal(got[stream], code * masked_unit(bits, stream))


@pytest.mark.skipif(not GPU, reason="inline assembly does not run in the interpreter")
@pytest.mark.parametrize("dtype", PACKED, ids=lambda d: d.name)
def test_assembly_gives_the_plain_bits(dtype, device):
    """
    Every word there is, through both branches.
    """
    layout = kernels.layout(dtype)
    forms = {"unpack"}
    if dtype.code_bits in (2, 4):
        forms.add("masked")
    if isinstance(dtype.decode, Codebook):
        forms.add("upper")
    for form in forms:
        plain, fast = (streams(layout, device, assembly=on, form=form) for on in (False, True))
        assert torch.equal(plain.isnan(), fast.isnan())
        assert torch.equal(plain.nan_to_num().view(torch.int16), fast.nan_to_num().view(torch.int16))
    if layout.kind == SYMMETRIC4.value:
        assert in_upper_bytes(layout.codebook)
        plain, fast = (streams(layout, device, assembly=on, form="whole") for on in (False, True))
        assert torch.equal(plain, fast)
        plain, fast = (whole_numbers(layout, device, assembly=on) for on in (False, True))
        assert torch.equal(plain, fast)


def test_any_codebook_is_decoded(device):
    """
    Four and sixteen values without symmetry: the nearest fp16 numbers.
    """
    for values in ((-1.0, 0.1, 0.2, 3.0), tuple(i * i / 7 - 3 for i in range(16))):
        layout = Layout.of_codebook(values)
        got = streams(layout, device, assembly=False)
        words = torch.arange(65536, dtype=torch.int32)
        for stream in range(16 // layout.bits):
            code = (words >> (layout.bits * stream)) & ((1 << layout.bits) - 1)
            assert torch.equal(got[stream], torch.tensor(values).half()[code])


def test_what_no_kernel_decodes_is_refused():
    """
    By name, with what to do.
    """
    with pytest.raises(ValueError, match="no kernel decodes kind 3 at 8 bits"):
        Layout(3, 8)
    with pytest.raises(ValueError, match="has 4 values"):
        Layout(5, 2, (1.0,))
