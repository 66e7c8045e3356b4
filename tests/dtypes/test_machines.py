"""Bytes do not depend on the machine that writes them."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kvbench.dtypes import Dtype, all_dtypes

DTYPES = [dtype.resolve(torch.float32) for dtype in all_dtypes().values() if not dtype.learns]


class GpuCasts(TorchFunctionMode):
    """Inside, NaN becomes in float16 what a GPU's cast makes of it: all bits but the sign."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_cast = func is torch.Tensor.to and args[0].dtype == torch.float32 and out.dtype == torch.float16
        return out.view(torch.int16).masked_fill(args[0].isnan(), 0x7FFF).view(torch.float16) if is_cast else out


def rows(dtype: Dtype, normal: int) -> torch.Tensor:
    """[rows, 128], or whole pages of them: normal, heavy-tailed, constant, zero, and with NaN and ±inf."""
    odd = torch.stack([torch.full((128,), value) for value in (3.7, 0.0, math.nan)] + [torch.randn(128)] * 2)
    odd[3, 5], odd[4, 77] = math.inf, -math.inf
    x = torch.cat([torch.randn(normal, 128), torch.distributions.StudentT(1.5).sample((normal, 128)), odd])
    return x.unflatten(0, (1, -1)).repeat(1, dtype.page_tokens, 1)[:, : dtype.page_tokens] if dtype.page_tokens else x


def written(dtype: Dtype, x: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of what is stored of x, and of what is read back."""
    stored = dtype.quantize(x)
    values = dtype.dequantize(stored).nan_to_num(12345.0)
    parts = [part for part in (stored.codes, stored.scale, values) if part is not None]
    return [part.cpu().contiguous().view(torch.uint8) for part in parts]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.scale_storage == torch.float16], ids=lambda d: d.name)
def test_a_broken_row_has_one_pattern(dtype):
    """
    NaN in a stored scale has the same bits where a cast gives others, as a GPU's does.
    """
    x = rows(dtype, 2)
    want = written(dtype, x)
    with GpuCasts():
        got = written(dtype, x)

    assert all(map(torch.equal, want, got))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with a CPU")
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.granularity != "none"], ids=lambda d: d.name)
def test_a_gpu_writes_the_same_bytes(dtype):
    """
    Quotients, roundings, sums and broken rows are those of a CPU, and the values too.
    """
    x = rows(dtype, 1000)

    assert all(map(torch.equal, written(dtype, x), written(dtype, x.cuda())))
