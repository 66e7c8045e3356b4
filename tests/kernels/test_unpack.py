import pytest
import torch
import triton
import triton.language as tl
from kvbench_kernels.layout import Layout
from kvbench_kernels.unpack import HALVES_BASES, UNSIGNED, masked, masked_unit, unpack, unpack_halves

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
    """One program per N words: their streams, in one of the forms; "halves" put together, without the constant."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    words = tl.load(words_ptr + at)
    for stream in tl.static_range(16 // BITS):
        if FORM == "masked" or FORM == "upper":
            value = masked(words, stream, BITS, FORM == "upper", ASSEMBLY)
        elif FORM == "halves":
            lower, upper = unpack_halves(words, stream, ASSEMBLY)
            value = (lower.to(tl.float32) - HALVES_BASES[stream] + 16 * upper.to(tl.float32)).to(tl.float16)
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


def test_halves_hold_the_code_and_its_upper_bit(device):
    """
    The two-instruction form for keys: 2^n + code, and whether the code is 2 or 3.
    """
    layout = kernels.layout(all_dtypes()["int2_per_token_head"])
    got = streams(layout, device, assembly=False, form="halves")
    words = torch.arange(65536, dtype=torch.int32)
    for stream in range(8):
        code = (words >> (2 * stream)) & 3
        assert torch.equal(got[stream].to(torch.int32), code + 16 * (code >> 1))


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
        forms |= {"upper", "halves"}
    for form in forms:
        plain, fast = (streams(layout, device, assembly=on, form=form) for on in (False, True))
        assert torch.equal(plain.isnan(), fast.isnan())
        assert torch.equal(plain.nan_to_num().view(torch.int16), fast.nan_to_num().view(torch.int16))


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
