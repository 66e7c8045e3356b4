"""The byte layout of the seed (vLLM's per-token-head caches), for comparing rows with it to the bit.

A row of the seed is its codes, channel after channel from the low bits of each byte up, and then its scale as a
little-endian float32. Its Hadamard matrix is unnormalised; ours carries a power of two (see transforms/rotation.py), so
scales are multiplied by a power of two and codes stay as they are. The seed's int2 also folds the 1/b of turning
back into the stored scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.dtypes.base import SCALE_BYTES, Codebook, Dtype, Rows, elements
from kvbench.transforms import Rotation


def export_rows(rows: Rows, dtype: Dtype, rotation: Rotation, head_dim: int) -> Tensor:
    """[..., code_bytes + 4] uint8: rows as the seed stores them.

    Raises:
        ValueError: the seed has no per-token-head layout for this dtype.
    """
    _check(dtype)
    assert rows.scale is not None
    scale = rows.scale * _scale_factor(dtype, rotation, head_dim)
    codes = rows.codes
    if dtype.code_bits < 8:
        codes = _pack_in_order(dtype.unpack(codes), dtype.code_bits)
    return torch.cat([codes, scale.unsqueeze(-1).contiguous().view(torch.uint8)], dim=-1)


def import_rows(stored: Tensor, dtype: Dtype, rotation: Rotation, head_dim: int) -> Rows:
    """Our rows of the seed's: stored is [..., code_bytes + 4] uint8. The inverse of `export_rows`.

    Raises:
        ValueError: the seed has no such dtype, or stored's last size is not that of a row.
    """
    _check(dtype)
    code_bytes = dtype.code_bytes(head_dim)
    if stored.shape[-1] != code_bytes + SCALE_BYTES:
        raise ValueError(
            f"a row of {dtype.name} at head_dim {head_dim} has {code_bytes + SCALE_BYTES} bytes, not {stored.shape[-1]}"
        )
    codes = stored[..., :code_bytes].contiguous()
    scale = elements(stored[..., code_bytes:], torch.float32).squeeze(-1)
    if dtype.code_bits < 8:
        codes = dtype.pack(_unpack_in_order(codes, dtype.code_bits))
    return Rows(codes, scale / _scale_factor(dtype, rotation, head_dim))


def _check(dtype: Dtype) -> None:
    if dtype.granularity != "per_token_head" or dtype.scale_storage != torch.float32:
        raise ValueError(f"the seed's byte layout is defined for per-token-head caches, not for {dtype.name}")


def _scale_factor(dtype: Dtype, rotation: Rotation, head_dim: int) -> float:
    """The seed's scale over ours: a power of two, so exact (and the hidden zero-point's bits stay)."""
    factor = 2.0 ** rotation.exponent(head_dim)
    return factor / rotation.block(head_dim) if isinstance(dtype.decode, Codebook) else factor


def _pack_in_order(codes: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, device=codes.device)
    packed: Tensor = (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1).to(torch.uint8)
    return packed


def _unpack_in_order(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, device=packed.device)
    return ((packed.unsqueeze(-1).to(torch.int32) >> shifts) & ((1 << bits) - 1)).flatten(-2)
