"""The fast Walsh-Hadamard transform in registers, bit for bit the butterfly of plain torch (neighbours first)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench_kernels.tuning import rows_a_program


@dataclass(frozen=True)
class Turn:
    """How rows are turned: y = factor * H (signs ∘ x), H in blocks of `block` = 2^m; or back, signs last.

    exponent: factor is 2^-exponent for stored rows, and 2^-(m - exponent) for queries and outputs.
    signs: [D] float32 of ±1 on the kernels' device, or None.
    """

    block: int = 1
    exponent: int = 0
    signs: Tensor | None = None

    @property
    def write_factor(self) -> float:
        return 2.0**-self.exponent

    @property
    def read_factor(self) -> float:
        return 2.0 ** (self.exponent - (self.block.bit_length() - 1))


@triton.jit
def stage(x, HALF: tl.constexpr):
    """[R, N] to [R, N]: each pair (a, b) that lies HALF apart becomes (a + b, a - b)."""
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [R, N // (2 * HALF), 2, HALF]), (0, 1, 3, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [R, N])


@triton.jit
def butterfly_across(x):
    """A tuple of 2^m tiles: each position transformed over the tiles, unnormalised."""
    for m in tl.static_range(4):
        if 1 << m < len(x):
            turned = ()
            for i in tl.static_range(len(x)):
                if (i >> m) % 2 == 0:
                    turned = turned + (x[i] + x[i + (1 << m)],)
                else:
                    turned = turned + (x[i - (1 << m)] - x[i],)
            x = turned
    return x


@triton.jit
def butterfly(x, BLOCK: tl.constexpr):
    """A tuple of [R, SPAN] tiles that follow each other along a row: every BLOCK channels transformed, unnormalised."""
    SPAN: tl.constexpr = x[0].shape[1]
    for m in tl.static_range(10):
        if 1 << m < BLOCK:
            turned = ()
            for i in tl.static_range(len(x)):
                if 1 << m < SPAN:
                    turned = turned + (stage(x[i], 1 << m),)
                elif (i // ((1 << m) // SPAN)) % 2 == 0:
                    turned = turned + (x[i] + x[i + (1 << m) // SPAN],)
                else:
                    turned = turned + (x[i - (1 << m) // SPAN] - x[i],)
            x = turned
    return x


@triton.jit(do_not_specialize=["rows"])
def _rotate_kernel(
    x_ptr,  # [T, H, D] any float, any strides
    signs_ptr,  # [D] float32, or None
    out_ptr,  # [T, H, D], contiguous
    rows,  # T * H
    factor,
    stride_t,
    stride_h,
    stride_d,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    SIGNS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program turns BLOCK_R rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (row < rows)[:, None]
    at = x_ptr + (row // H * stride_t + row % H * stride_h)[:, None]
    d = tl.arange(0, SPAN)[None, :]
    x = ()
    for i in tl.static_range(D // SPAN):
        tile = tl.load(at + (i * SPAN + d) * stride_d, mask=inside, other=0.0).to(tl.float32)
        if signs_ptr is not None and not SIGNS_LAST:
            tile *= tl.load(signs_ptr + i * SPAN + d)
        x = x + (tile,)
    x = butterfly(x, BLOCK)
    for i in tl.static_range(D // SPAN):
        tile = x[i] * factor
        if signs_ptr is not None and SIGNS_LAST:
            tile *= tl.load(signs_ptr + i * SPAN + d)
        tl.store(out_ptr + (row * D)[:, None] + i * SPAN + d, tile.to(out_ptr.dtype.element_ty), mask=inside)


def span(multiple: int) -> int:
    """Channels a tile: the largest power of two up to 16 that divides `multiple`."""
    return min(16, multiple & -multiple)


def rotate(
    x: Tensor, turn: Turn, *, back: bool = False, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Queries [T, H, D] turned like stored keys, or (`back`) outputs turned back; float32 inside.

    dtype: of the result; x's own when not given. out: where it goes, contiguous; may be x itself.
    """
    tokens, heads, head_dim = x.shape
    if out is None:
        out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    block_r = rows_a_program(16)
    _rotate_kernel[(triton.cdiv(tokens * heads, block_r),)](
        x,
        turn.signs,
        out,
        tokens * heads,
        turn.read_factor,
        *x.stride(),
        H=heads,
        D=head_dim,
        BLOCK=turn.block,
        SPAN=span(head_dim),
        SIGNS_LAST=back,
        BLOCK_R=block_r,
        num_warps=1,
    )
    return out
