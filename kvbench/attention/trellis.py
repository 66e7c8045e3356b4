"""Where trellis dtypes meet kernels: what a row's string of bits is, as the data that the launchers take."""

from __future__ import annotations

from functools import lru_cache

import torch
from kvbench_kernels import trellis, viterbi
from torch import Tensor

from kvbench.dtypes.base import Rows
from kvbench.dtypes.trellis import FINE, LARGEST, REACH, SMALLEST, UNIT, TrellisPerTokenHead, steps_of, table


def serves(dtype: TrellisPerTokenHead, computed: torch.dtype) -> bool:
    """Whether kernels write and read rows of this dtype, computed as the definition does in that dtype."""
    return dtype.trellis.state_bits == viterbi.STATE_BITS and computed != torch.float64


def quantize(dtype: TrellisPerTokenHead, x: Tensor) -> Rows:
    """The definition's rows of x [..., D], in a few launches."""
    codes, scale = trellis.write(x.reshape(-1, x.shape[-1]), code(dtype, x.shape[-1], x.device))
    return Rows(codes.view(*x.shape[:-1], codes.shape[-1]), scale.view(x.shape[:-1]))


def dequantize(dtype: TrellisPerTokenHead, rows: Rows, head_dim: int) -> Tensor:
    """[..., D] float32: the definition's values, in one launch."""
    assert rows.scale is not None
    flat = rows.codes.reshape(-1, rows.codes.shape[-1])
    values = trellis.read(flat, rows.scale.reshape(-1), head_dim, code(dtype, head_dim, flat.device))
    return values.view(*rows.codes.shape[:-1], head_dim)


@lru_cache(maxsize=64)
def code(dtype: TrellisPerTokenHead, head_dim: int, device: torch.device) -> trellis.Code:
    """A dtype's strings of bits for rows of so many channels."""
    parts = dtype.trellis.parts
    steps = steps_of(dtype.trellis, head_dim, torch.device("cpu"))
    widths = torch.tensor([part.bits for part in parts])[steps.part]
    ends = widths.cumsum(0)
    last = 8 * torch.arange(1, dtype.code_bytes(head_dim) + 1)  # bits up to each byte's end
    at = torch.searchsorted(ends, last).clamp_max(head_dim - 1)

    def integers(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=torch.int32)

    return trellis.Code(
        parts=tuple(viterbi.Part(p.eighths * head_dim // 8, p.bits, p.weight) for p in parts),
        values=table(dtype.trellis, torch.int32, device),
        channel=integers(steps.channel),
        step=integers(steps.step),
        part=integers(steps.part),
        weight=integers(steps.weight),
        word=integers(steps.word),
        shift=integers(steps.shift),
        byte_step=integers(at),
        byte_bits=integers(widths[at]),
        byte_down=integers(ends[at] - last),
        start_bits=dtype.start_bits,
        mantissa=dtype.scale_form[0],
        bias=dtype.scale_form[1],
        nan=dtype.broken,
        zero=dtype.starts,
        unit=UNIT,
        fine=FINE,
        reach=REACH,
        largest=LARGEST,
        smallest=SMALLEST,
    )
