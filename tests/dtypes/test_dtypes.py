"""What holds for every dtype; a new file in kvbench/dtypes is tested here unasked."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import integrate
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvbench.dtypes import Affine, Cast, Codebook, Dtype, Rows, Sketch, Tiers, Trellis, all_dtypes
from kvbench.transforms import Sample

HEAD_DIMS = [64, 80, 96, 128, 256]

# `auto` as a float32 model has it; what is stored with a minimum, or by the page, is test_min_max.py's and
# test_clipped.py's, what learns test_nuq.py's
DTYPES = [
    dtype.resolve(torch.float32)
    for dtype in all_dtypes().values()
    if not dtype.page_tokens and not dtype.learns and dtype.decode != Affine("minimum")
]
# of a codebook's dtypes that differ in their bits alone one, and one of planes, and of bytes
DTYPES = list(
    {
        (
            type(d.decode) if isinstance(d.decode, Codebook | Sketch) else d.name,
            type(d),
            len(d.planes),
            d.code_bits < 8,
        ): d
        for d in DTYPES
    }.values()
)
NOT_AUTO = [dtype for dtype in DTYPES if dtype.name != "auto"]
SCALED = [dtype for dtype in DTYPES if dtype.granularity == "per_token_head"]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
every_scaled_dtype = pytest.mark.parametrize("dtype", SCALED, ids=lambda dtype: dtype.name)


def every_head_dim(test: Callable[..., None]) -> Callable[..., None]:
    """One test for all HEAD_DIMS that a dtype's rows may have: see test_a_head_dim_that_does_not_fit_is_refused."""

    def run(**given: Any) -> None:
        for head_dim in HEAD_DIMS:
            if "dtype" not in given or head_dim % given["dtype"].head_dim_multiple == 0:
                test(head_dim=head_dim, **given)

    signature = inspect.signature(test)
    others = [parameter for name, parameter in signature.parameters.items() if name != "head_dim"]
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = signature.replace(parameters=others)
    run.pytestmark = getattr(test, "pytestmark", [])
    return run


def heavy_tailed(*shape: int) -> torch.Tensor:
    return torch.distributions.StudentT(2.0).sample(shape)


def same(a: Rows, b: Rows) -> bool:
    """Equal bytes, NaN scales included."""
    if (a.scale is None) != (b.scale is None) or not torch.equal(a.codes, b.codes):
        return False
    return a.scale is None or torch.equal(a.scale.reshape(-1).view(torch.uint8), b.scale.reshape(-1).view(torch.uint8))


# ---- sizes


@every_dtype
@every_head_dim
@pytest.mark.parametrize("tokens", [1, 7])
def test_bits_per_value_counts_every_byte(dtype, head_dim, tokens):
    """
    8 * nbytes == values * bits_per_value, exactly: as a quotient, since 4.4 bits at head_dim 80 are no float.
    """
    x = torch.randn(tokens, 3, head_dim)

    rows = dtype.quantize(x)

    nbytes = rows.codes.nbytes + (0 if rows.scale is None else rows.scale.nbytes)
    assert 8 * nbytes / x.numel() == dtype.bits_per_value(head_dim)
    assert nbytes == tokens * 3 * dtype.row_bytes(head_dim)
    assert rows.codes.shape == (tokens, 3, dtype.code_bytes(head_dim))
    assert rows.codes.dtype == torch.uint8
    if rows.scale is not None:
        assert rows.scale.shape == (tokens, 3, *dtype.scales_shape(head_dim))
        assert rows.scale.dtype == dtype.scale_storage


@pytest.mark.parametrize(
    ("name", "row_bytes", "bits"),
    [
        ("fp16", 256, 16),
        ("bf16", 256, 16),
        ("fp8_per_tensor", 128, 8),
        ("fp8_per_token_head", 132, 8.25),
        ("int8_per_token_head", 132, 8.25),
        ("int4_per_token_head", 68, 4.25),
        ("int2_per_token_head", 36, 2.25),
    ],
)
def test_the_seed_s_sizes_at_head_dim_128(name, row_bytes, bits):
    """
    A row of each of the seed's dtypes has the seed's size.
    """
    dtype = all_dtypes()[name]

    assert dtype.row_bytes(128) == row_bytes
    assert dtype.bits_per_value(128) == bits


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_model_s_own_dtype(model_dtype):
    """
    `auto` keeps every bit of the model's values, and counts the bits of the model's dtype.
    """
    auto = all_dtypes()["auto"].resolve(model_dtype)
    x = heavy_tailed(5, 64).to(model_dtype)

    assert auto.bits_per_value(64) == 8 * model_dtype.itemsize
    assert torch.equal(auto.dequantize(auto.quantize(x), model_dtype), x)


@every_dtype
def test_only_auto_depends_on_the_model(dtype):
    """
    A dtype that is resolved stays what it is.
    """
    assert dtype.resolve(torch.bfloat16) == dtype or dtype.name == "auto"


@every_dtype
@pytest.mark.parametrize("head_dim", [0, -64, 66, 81])
def test_a_head_dim_that_does_not_fit_is_refused(dtype, head_dim):
    """
    Codes fill whole words, or an error says which sizes do.
    """
    if head_dim > 0 and head_dim % dtype.head_dim_multiple == 0:
        assert dtype.code_bytes(head_dim) * 8 == head_dim * dtype.code_bits
        return
    with pytest.raises(ValueError, match=rf"head_dim {head_dim} does not fit {dtype.name}"):
        dtype.code_bytes(head_dim)


# ---- packing


# one for each way to pack
PACKED = [dtype for dtype in DTYPES if isinstance(dtype.decode, Affine | Codebook)]
PACKED = list({(d.code_bits, d.word_bits, type(d).pack): d for d in reversed(PACKED)}.values())


def all_codes(dtype: Dtype, *shape: int) -> torch.Tensor:
    if dtype.decode == Affine("none"):
        low = -(1 << dtype.code_bits - 1)
        return torch.randint(low, -low, shape, dtype=torch.int8)
    return torch.randint(0, 1 << dtype.code_bits, shape, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", PACKED, ids=lambda dtype: dtype.name)
@every_head_dim
def test_unpacking_undoes_packing(dtype, head_dim):
    """
    Any codes come back from their bytes.
    """
    codes = all_codes(dtype, 5, 3, head_dim)

    packed = dtype.pack(codes)

    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 3, dtype.code_bytes(head_dim))
    assert torch.equal(dtype.unpack(packed), codes.to(torch.int32))


@pytest.mark.parametrize("dtype", PACKED, ids=lambda dtype: dtype.name)
@every_head_dim
def test_every_bit_of_a_row_belongs_to_one_code(dtype, head_dim):
    """
    Word j holds channels j, j+W, j+2W, ... from its low bits up: each bit of each code is found where that says; of
    3, 5, 6 and 7 bits the upper 4, then 2, then the last, each in words of their own.
    """
    bits = dtype.code_bits
    word_bits = dtype.word_bits if bits < 8 else 8
    planes = [width for width in (4, 2, 1) if bits & width] if bits < 8 else [8]

    for channel in range(0, head_dim, 1 if len(planes) == 1 else 7):
        for bit in range(bits):
            plane = next(i for i in range(len(planes)) if bit >= bits - sum(planes[: i + 1]))
            width, inside = planes[plane], bit - (bits - sum(planes[: plane + 1]))
            words = head_dim * width // word_bits
            codes = torch.zeros(head_dim, dtype=torch.int8 if bits == 8 else torch.uint8)
            codes[channel] = -128 if bit == 7 else 1 << bit
            word, stream = channel % words, channel // words
            # counted from the first byte's low bit
            position = head_dim * sum(planes[:plane]) + word * word_bits + stream * width + inside
            expected = bytearray(dtype.code_bytes(head_dim))
            expected[position // 8] = 1 << position % 8
            assert bytes(dtype.pack(codes).tolist()) == bytes(expected)


@every_dtype
def test_a_view_that_is_not_contiguous_reads_the_same(dtype):
    """
    Codes and scales cut out of larger storage, as pages are, decode like their copies.
    """
    rows = dtype.quantize(torch.randn(4, 6, 96))
    wide = torch.full((4, 6, rows.codes.shape[-1] + 4), 0xFF, dtype=torch.uint8)
    wide[..., :-4] = rows.codes
    scale = None if rows.scale is None else torch.stack([rows.scale, torch.zeros_like(rows.scale)], dim=-1)[..., 0]

    cut = Rows(wide[..., :-4], scale)

    assert torch.equal(dtype.dequantize(cut), dtype.dequantize(rows))
    assert torch.equal(
        dtype.dequantize(Rows(cut.codes.transpose(0, 1), None if scale is None else scale.transpose(0, 1))),
        dtype.dequantize(rows).transpose(0, 1),
    )


@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_row_alone_reads_the_same_at_any_byte(head_dim):
    """
    One token of one head, cut out of storage in which rows of an odd length begin at odd bytes, reads as its copy.
    """
    for dtype in all_dtypes().values():
        if dtype.page_tokens or dtype.name == "auto" or head_dim % dtype.head_dim_multiple:
            continue
        rows = dtype.quantize(torch.randn(3, 1, head_dim))
        wide = torch.zeros(3, 1, rows.codes.shape[-1] | 1, dtype=torch.uint8)
        stored = torch.cat([wide[..., :1], rows.codes, wide], -1)[1:2, :, 1 : 1 + rows.codes.shape[-1]]
        scale = None if rows.scale is None else rows.scale[1:2]

        alone = dtype.dequantize(Rows(stored, scale))
        assert torch.equal(alone, dtype.dequantize(Rows(rows.codes[1:2].clone(), scale))), dtype.name
        assert torch.equal(alone, dtype.dequantize(rows)[1:2]), dtype.name


# ---- rows stand alone


@every_dtype
@every_head_dim
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 3), (2, 5, 1)])
def test_a_row_does_not_depend_on_its_neighbours(dtype, head_dim, shape):
    """
    A batch of rows, odd counts included, is each row alone, to the bit.
    """
    x = heavy_tailed(*shape, head_dim)

    rows = dtype.quantize(x)

    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist():
        at = tuple(index)
        alone = dtype.quantize(x[at])
        assert same(alone, Rows(rows.codes[at], None if rows.scale is None else rows.scale[at]))


@pytest.mark.parametrize("dtype", NOT_AUTO, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float64])
def test_only_the_values_matter_not_the_type_they_come_in(dtype, given):
    """
    A half-precision or double input quantizes as the same values in float32; `auto` alone keeps the type it is given.
    """
    x = torch.randn(5, 96).bfloat16().to(torch.float16)  # values that every type has

    assert same(dtype.quantize(x.to(given)), dtype.quantize(x.to(torch.float32)))


@every_dtype
def test_strided_rows_quantize_as_their_copies(dtype):
    """
    Where a row lies in memory does not change it.
    """
    x = torch.randn(96, 5, 2)

    assert same(dtype.quantize(x.permute(2, 1, 0)), dtype.quantize(x.permute(2, 1, 0).contiguous()))


@every_dtype
@every_head_dim
def test_no_rows_are_no_bytes(dtype, head_dim):
    """
    An empty batch quantizes to nothing and reads as nothing.
    """
    rows = dtype.quantize(torch.empty(0, 2, head_dim))

    assert rows.codes.shape == (0, 2, dtype.code_bytes(head_dim))
    assert dtype.dequantize(rows).shape == (0, 2, head_dim)


@every_scaled_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_head_dim
def test_a_broken_row_stays_visible(dtype, bad, head_dim):
    """
    One NaN or infinity makes its whole row NaN, and no other.
    """
    x = torch.randn(5, head_dim)
    whole = dtype.dequantize(dtype.quantize(x))
    x[2, head_dim // 3] = bad

    values = dtype.dequantize(dtype.quantize(x))

    assert values[2].isnan().all()
    assert torch.equal(values[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_broken_values_without_a_scale():
    """
    16-bit floats keep NaN and infinities; fp16 ends at 65504; fp8_per_tensor saturates infinities and keeps NaN.
    """
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e5, 2.0, -3e38, 65504.0, 0.0])
    dtypes = all_dtypes()

    def read(name: str) -> torch.Tensor:
        return dtypes[name].dequantize(dtypes[name].quantize(x))

    inf, nan = math.inf, math.nan
    bf16 = torch.tensor([nan, inf, -inf, 99840.0, 2.0, x[5].bfloat16().item(), 65536.0, 0.0])
    assert_close(read("fp16"), torch.tensor([nan, inf, -inf, inf, 2.0, -inf, 65504.0, 0.0]), equal_nan=True)
    assert_close(read("bf16"), bf16, rtol=0, atol=0, equal_nan=True)
    assert_close(
        read("fp8_per_tensor"), torch.tensor([nan, 448.0, -448.0, 448.0, 2.0, -448.0, 448.0, 0.0]), equal_nan=True
    )


# ---- what the definitions make of special rows


@every_dtype
@every_head_dim
def test_a_row_of_zeros_reads_as_next_to_nothing(dtype, head_dim):
    """
    Zeros stay zeros, but for codes without a zero: they leave less than a millionth.
    """
    values = dtype.dequantize(dtype.quantize(torch.zeros(3, head_dim)))

    if not isinstance(dtype.decode, Cast | Affine):
        assert values.abs().max() < 1e-6
    else:
        assert torch.equal(values, torch.zeros(3, head_dim))


@pytest.mark.parametrize("value", [5.0, -0.3])
def test_int4_loses_a_row_of_equal_values(value):
    """
    The zero-point ends at 0 and 15, so a row far from zero for its range is read near zero; a Hadamard rotation,
    which int4 is run with, gives such a row a value and zeros, and saves it.
    """
    from kvbench.transforms import all_rotations

    int4, hadamard = all_dtypes()["int4_per_token_head"], all_rotations()["hadamard"]
    x = torch.full((1, 64), value)

    plain = int4.dequantize(int4.quantize(x))
    turned = hadamard.unrotate(int4.dequantize(int4.quantize(hadamard.rotate(x))))

    assert plain.abs().max() <= 15 * 1.01e-6
    assert_close(turned, x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [0.5, 2.0, 100.0])
def test_int4_reads_a_row_of_one_sign_as_far_as_fifteen_steps(offset):
    """
    Values beyond fifteen steps from zero read as fifteen steps.
    """
    int4 = all_dtypes()["int4_per_token_head"]
    x = torch.rand(5, 64) + offset

    rows = int4.quantize(x)
    end = 15 * int4.clean_scale(rows.scale).unsqueeze(-1)
    values = int4.dequantize(rows)

    assert torch.equal(int4.zero_point(rows.scale), torch.zeros(5, dtype=torch.int32))
    beyond = x > end
    assert torch.equal(values[beyond], end.expand_as(values)[beyond])


def test_the_hidden_zero_point_moves_the_scale_by_less_than_two_millionths():
    """
    Fifteen units in the last place of the scale are below 2e-6 of it, and the zero-point is all there.
    """
    int4 = all_dtypes()["int4_per_token_head"]
    x = torch.randn(2000, 64) * torch.randn(2000, 1).exp() + torch.randn(2000, 1)

    rows = int4.quantize(x)

    exact = (x.amax(-1) - x.amin(-1)) / 15
    assert ((int4.clean_scale(rows.scale) - exact).abs() <= 2e-6 * exact).all()
    assert (int4.clean_scale(rows.scale) <= exact).all()
    assert set(int4.zero_point(rows.scale).tolist()) == set(range(16))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6, 1e15])
@every_scaled_dtype
@pytest.mark.parametrize("head_dim", [64, 96])
def test_a_power_of_two_changes_the_scale_alone(dtype, scale, head_dim):
    """
    Rows far above the smallest scale have the same codes when they are doubled, and twice the scale.
    """
    if scale > {torch.uint8: 1e3, torch.float16: 1e3, torch.int16: 1e6}.get(dtype.scale_storage, scale):
        pytest.skip("its scales end before")
    x = torch.randn(5, head_dim) * scale

    once, twice = dtype.quantize(x), dtype.quantize(2 * x)

    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(2 * dtype.clean_scale(once.scale), dtype.clean_scale(twice.scale))


# ---- how far a value moves


@pytest.mark.parametrize("make", [torch.randn, heavy_tailed], ids=["normal", "heavy tails"])
@every_head_dim
def test_no_value_moves_further_than_half_a_step(make, head_dim):
    """
    Half a step of the scale (int8, int4), half a unit in e4m3's last place (fp8).
    """
    x = make(64, head_dim)
    rounding = 1 + 2**-20  # of the float32 arithmetic around the rounding, in steps of up to 255

    for name in ("int8_per_token_head", "int4_per_token_head"):
        dtype = all_dtypes()[name]
        rows = dtype.quantize(x)
        step = dtype.clean_scale(rows.scale).unsqueeze(-1)
        # int4 reads with a scale that lacks up to 2e-6 of itself, fifteen times
        lost = 15 * 2e-6 * step if name.startswith("int4") else 0
        assert ((dtype.dequantize(rows) - x).abs() <= step / 2 * rounding + lost + x.abs() * 2**-22).all()

    for name, scale in (("fp8_per_token_head", None), ("fp8_per_tensor", torch.tensor(0.25))):
        dtype = all_dtypes()[name]
        rows = dtype.quantize(x, scale)
        s = scale if rows.scale is None else rows.scale.unsqueeze(-1)
        inside = x.abs() <= 448 * s
        moved = (dtype.dequantize(rows, tensor_scale=scale) - x).abs()
        # normal numbers have three bits after the point, the smallest steps are 2^-9
        assert (moved <= torch.maximum(x.abs() * 2**-4, s * 2**-10) * rounding)[inside].all()


@pytest.mark.parametrize("name", ["int8_per_token_head", "int4_per_token_head"])
@every_head_dim
def test_integers_err_as_theory_says(name, head_dim):
    """
    Rounding to steps of s leaves an error uniform in ±s/2: its mean square is s²/12 and its mean 0.

    The bound is five standard deviations of such a mean over all values. Two values a row are not uniform: the largest
    magnitude, or the two ends of the range, which make the scale.
    """
    dtype = all_dtypes()[name]
    x = torch.randn(2000, head_dim)

    rows = dtype.quantize(x)
    error = (dtype.dequantize(rows) - x) / dtype.clean_scale(rows.scale).unsqueeze(-1)

    # of a uniform u in ±1/2: var(u²) = 1/180, var(u) = 1/12
    assert abs(12 * error.square().mean() - 1) < 5 * 12 * math.sqrt(1 / 180 / x.numel()) + 2 / head_dim
    assert abs(error.mean()) < 5 * math.sqrt(1 / 12 / x.numel()) + 1e-5


@every_head_dim
def test_int2_errs_as_theory_says(head_dim):
    """
    The mean square error of int2 on Gaussian rows is that of its codebook on one coordinate of a sphere.

    A Gaussian row divided by its norm is uniform on the sphere of radius sqrt(D); one coordinate z of it has the
    density (1 - z²/D)^((D-3)/2) up to a constant. For large D the mean is Lloyd and Max's 0.1175.
    """
    int2 = all_dtypes()["int2_per_token_head"]
    x = torch.randn(200_000 // head_dim, head_dim)

    rows = int2.quantize(x)
    error = ((int2.dequantize(rows) - x) / rows.scale.unsqueeze(-1)).square()

    def density(z: float) -> float:
        return (1 - z * z / head_dim) ** ((head_dim - 3) / 2)

    def square(z: float) -> float:
        return (z - (0.4528 if z < 0.9816 else 1.5104)) ** 2

    def mean(f) -> float:
        def over(g) -> float:
            return sum(integrate.quad(g, a, b)[0] for a, b in ((0, 0.9816), (0.9816, math.sqrt(head_dim))))

        return over(lambda z: f(z) * density(z)) / over(density)

    expected = mean(square)
    spread = math.sqrt(mean(lambda z: square(z) ** 2) - expected**2)
    assert expected == pytest.approx(0.1175, abs=3 / head_dim)
    # five standard deviations, as if values of a row were independent (they are less spread than that)
    assert error.mean().item() == pytest.approx(expected, abs=5 * spread / math.sqrt(x.numel()))


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if not isinstance(dtype.decode, Sketch)], ids=lambda dtype: dtype.name
)
@every_head_dim
def test_every_dtype_beats_the_sign(dtype, head_dim):
    """
    On Gaussian rows no dtype loses more than one bit a value at its best would (Max 1960: a mean square of 1 - 2/pi).

    A sketch, which is right in the mean alone, may.

    An all-zero answer has a relative error of 1 and no direction, so it fails, and so does a shuffle of the channels.
    """
    x = torch.randn(500, head_dim)

    values = dtype.dequantize(dtype.quantize(x))

    relative = (values - x).norm() / x.norm()
    cosine = torch.sum(values * x) / values.norm() / x.norm()
    assert relative < math.sqrt(1 - 2 / math.pi)
    assert cosine > math.sqrt(2 / math.pi)


def test_int2_breaks_on_heavy_tails_and_the_rotation_mends_it():
    """
    A Gaussian codebook with a norm scale fails where a few values carry the norm; spread over all channels they fit.
    """
    from kvbench.transforms import all_rotations

    int2, hadamard = all_dtypes()["int2_per_token_head"], all_rotations()["hadamard"]
    x = heavy_tailed(2000, 128)

    def median_error(values: torch.Tensor) -> float:
        return ((values - x).norm(dim=-1) / x.norm(dim=-1)).median().item()

    plain = median_error(int2.dequantize(int2.quantize(x)))
    turned = median_error(hadamard.unrotate(int2.dequantize(int2.quantize(hadamard.rotate(x)))))

    assert turned < math.sqrt(0.1175) * 1.1
    assert plain > 1.5 * turned


# ---- a second time

# a codebook's scale is the row's norm, and the row's centroids have another: see test_int2_shrinks_a_second_time;
# so with a trellis, whose path is sought at the row's norm, and with tiers, whose scale is searched
ON_A_GRID = [dtype for dtype in DTYPES if not isinstance(dtype.decode, Codebook | Sketch | Tiers | Trellis)]


@pytest.mark.parametrize("dtype", ON_A_GRID, ids=lambda dtype: dtype.name)
@every_head_dim
def test_quantizing_twice_changes_nothing(dtype, head_dim):
    """
    What a page gives back is already on the dtype's grid.
    """
    x = torch.randn(33, head_dim)
    rows = dtype.quantize(x)
    once = dtype.dequantize(rows)

    again = dtype.quantize(once)

    assert torch.equal(again.codes, rows.codes)
    # the scale is divided anew from a rounded product, and int4's lost its low four bits
    assert_close(dtype.dequantize(again), once, rtol=4e-6 if dtype.decode == Affine("in_scale") else 2**-22, atol=0)


def test_int2_shrinks_a_second_time():
    """
    A Lloyd-Max reconstruction has 1 - 0.1175 of the energy, each time.
    """
    int2 = all_dtypes()["int2_per_token_head"]
    x = torch.randn(500, 256)

    once = int2.dequantize(int2.quantize(x))

    assert (once.norm() / x.norm()).item() == pytest.approx(math.sqrt(1 - 0.1175), abs=0.01)
    assert not torch.equal(int2.dequantize(int2.quantize(once)), once)


# ---- the type that is read in


@every_dtype
def test_reading_in_float64_loses_nothing(dtype):
    """
    float32 reads are the float64 reads, rounded once.
    """
    rows = dtype.quantize(heavy_tailed(7, 96))

    exact = dtype.dequantize(rows, torch.float64)

    assert exact.dtype == torch.float64
    assert_close(dtype.dequantize(rows, torch.float32).double(), exact, rtol=2**-23, atol=0)
    assert dtype.dequantize(rows, torch.bfloat16).dtype == torch.bfloat16
    assert_close(dtype.dequantize(rows, torch.bfloat16).double(), exact, rtol=2**-6, atol=0)


class _Unasked(TorchDispatchMode):
    """Inside nothing asks what a tensor on a device holds, and nothing is copied there or back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ({x.device.type for x in tree_leaves(y) if torch.is_tensor(x) and x.dim()} for y in (args, out))
        assert not made or given <= made, f"{func} copies between the host and the device"
        return out


def test_definitions_wait_for_nothing(monkeypatch):
    """
    One of each kind writes and reads rows of a device without a look at them and without a copy from the host, once
    what it makes for the device is there: a CUDA graph can hold it. The device here is torch's `meta`, which has no
    numbers to look at.
    """
    kinds = {type(dtype): dtype for dtype in all_dtypes().values() if not dtype.page_tokens and dtype.name != "auto"}
    for dtype in kinds.values():
        shape = (2, 64)
        rows = torch.randn(64, *shape)
        known = dtype.learn(Sample(rows, rows, torch.arange(64), None, 512)) if dtype.learns else {}
        bound = dtype.bind({name: x.to("meta") for name, x in known.items()}) if dtype.learns else dtype
        scale = torch.ones((), device="meta") if dtype.has_tensor_scale else None
        x = torch.empty(5, *shape, device="meta")
        bound.dequantize(bound.quantize(x, scale), torch.float32, scale)
        with monkeypatch.context() as patch, _Unasked():
            patch.setattr(torch, "tensor", None)
            patch.setattr(torch.Tensor, "new_tensor", None)
            y = bound.dequantize(bound.quantize(x, scale), torch.float32, scale)
        assert y.shape == x.shape, dtype.name
