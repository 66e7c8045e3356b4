"""Kernels write and read a trellis's rows as the definition does, to the bit."""

import math

import pytest
import torch
from kvbench_kernels import viterbi

from kvbench.attention import trellis as kernels
from kvbench.dtypes import Trellis, all_dtypes
from kvbench.dtypes.trellis import computed_by

# a row of zeros, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")
GPU = torch.cuda.is_available()
DTYPES = [dtype for dtype in all_dtypes().values() if isinstance(dtype.decode, Trellis)]
SHAPES = [(dtype, d) for dtype in DTYPES for d in ([64, 80, 128, 256] if GPU else [48 if dtype.starts else 16])]
ROWS = 3000 if GPU else 1


def rows(head_dim):
    """Gaussian, heavy-tailed, constant, zero, tiny, huge; a single value; as far out as a row can lie; and broken."""
    x = torch.cat([50 * torch.rand(ROWS, 1) * torch.randn(ROWS, head_dim), 1e6 * torch.randn(ROWS, head_dim).sign()])
    x = torch.cat([x, torch.distributions.StudentT(1.5).sample((ROWS, head_dim))])
    one = torch.eye(head_dim)[:1]
    lone = [one * 2.0**42, one.masked_fill(one == 1, math.inf), one.masked_fill(one == 1, math.nan)]
    far = [torch.randn(1, head_dim) * scale for scale in (0, 1e-30, 1e30)]
    return torch.cat([x, torch.full((1, head_dim), 3.0), *far, *lone])


@pytest.mark.parametrize(("dtype", "head_dim"), SHAPES, ids=lambda x: getattr(x, "name", x))
def test_bytes_and_values_are_those_of_the_definition(dtype, head_dim, device):
    """
    Written and read by kernels, and by the definition; where parts end in the middle of a turn of the states too.
    """
    x = rows(head_dim)
    stored = dtype.quantize(x)

    with computed_by(kernels):
        found = dtype.quantize(x.to(device))
        values = dtype.dequantize(found)

    assert torch.equal(found.codes.cpu(), stored.codes)
    assert torch.equal(found.scale.cpu(), stored.scale)
    expected = dtype.dequantize(stored)
    assert torch.equal(values.isnan().cpu(), expected.isnan())
    assert torch.equal(values.nan_to_num().cpu(), expected.nan_to_num())


def test_kernels_take_rows_of_any_shape_and_none(device):
    """
    Half-precision rows of heads and tokens, strided as a model gives them; an empty batch launches nothing.
    """
    dtype = all_dtypes()["tcq2"]
    x = torch.randn(2, 3, 48, device=device, dtype=torch.float16).transpose(0, 1)

    with computed_by(kernels):
        found, empty = dtype.quantize(x), dtype.quantize(x[:0])
        values, none = dtype.dequantize(found), dtype.dequantize(empty)

    assert torch.equal(found.codes, dtype.quantize(x).codes)
    assert torch.equal(values, dtype.dequantize(found))
    assert empty.codes.shape == (0, 2, dtype.code_bytes(48))
    assert none.shape == (0, 2, 48)


def test_what_is_computed_in_float64_is_the_definition_s():
    """
    Kernels compute in float32, and serve nothing else.
    """
    dtype = all_dtypes()["tcq2"]
    stored = dtype.quantize(torch.randn(3, 64))

    with computed_by(kernels):
        values = dtype.dequantize(stored, torch.float64)

    assert values.dtype == torch.float64
    assert torch.equal(values, dtype.dequantize(stored, torch.float64))


@pytest.mark.parametrize("free", [True, False])
def test_of_equal_paths_the_first_bits_decide(free, device):
    """
    Where all states have one value, the path of zeros is taken.
    """
    z = torch.randint(-900, 900, (3, 24), dtype=torch.int32, device=device)
    values = torch.zeros(1, 256, dtype=torch.int32, device=device)

    assert not viterbi.cheapest_paths(z, values, (viterbi.Part(24, 2, 1),), 8, free).any()


def test_parts_that_do_not_fill_a_row_are_refused(device):
    """
    The steps of all parts are those of the row.
    """
    z, values = torch.zeros(2, 64, dtype=torch.int32, device=device), torch.zeros(1, 256, dtype=torch.int32)

    with pytest.raises(ValueError, match="64 steps and values"):
        viterbi.cheapest_paths(z, values.to(device), (viterbi.Part(60, 2, 1),), 8, True)
