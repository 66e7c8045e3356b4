"""What the pages hold: packed codes and scales, one plane each for a layer's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes import Dtype, Rows
from kvbench.rotations import Rotation
from kvbench.schemes import Scheme


@dataclass
class Plane:
    """The stored keys, or the stored values, of one layer.

    codes: [P, HKV, S, code_bytes] uint8. scale: [P, HKV, S] float32, or None where rows have none.
    tensor_scale: scalar float32 where the dtype has one scale a layer, else None.
    """

    dtype: Dtype
    rotation: Rotation
    head_dim: int
    codes: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.tensor_scale) if t is not None)


class PagedCache:
    """Packed keys and values of all layers, in pages.

    layers: (KV heads, head_dim) of each. scheme: how they are stored; `auto` becomes `model_dtype`.
    destroyed: every code is stored as zero: the canary of a sweep, which must wreck every score.

    Raises:
        ValueError: a head_dim that the scheme's dtypes can't take.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int]],
        scheme: Scheme,
        *,
        pages: int,
        page_size: int,
        model_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        destroyed: bool = False,
    ) -> None:
        self.scheme = scheme.resolve(model_dtype)
        self.page_size = page_size
        self.destroyed = destroyed

        def plane(dtype: Dtype, rotation: Rotation, heads: int, head_dim: int) -> Plane:
            shape = (pages, heads, page_size)
            return Plane(
                dtype,
                rotation,
                head_dim,
                torch.empty(*shape, dtype.code_bytes(head_dim), dtype=torch.uint8, device=device),
                torch.empty(shape, dtype=torch.float32, device=device)
                if dtype.granularity == "per_token_head"
                else None,
                torch.ones((), dtype=torch.float32, device=device) if dtype.granularity == "per_tensor" else None,
            )

        self.keys = [plane(self.scheme.key, self.scheme.key_rotation, *layer) for layer in layers]
        self.values = [plane(self.scheme.value, self.scheme.value_rotation, *layer) for layer in layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(plane.nbytes for plane in (*self.keys, *self.values))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token's keys and values over all layers, from the pages as allocated.

        A scale that a whole layer shares belongs to no token and is left out.
        """
        planes = [*self.keys, *self.values]
        pages = sum(t.nbytes for plane in planes for t in (plane.codes, plane.scale) if t is not None)
        return pages / (planes[0].codes.shape[0] * self.page_size)

    def append(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Rotate and quantize new tokens, and write them to their slots.

        k, v: [T, HKV, D], any floating dtype.
        slot_mapping: [T] int64, page * page_size + offset; -1 skips the token.
        """
        kept = slot_mapping >= 0
        if not bool(kept.all()):
            k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
        page, offset = slot_mapping // self.page_size, slot_mapping % self.page_size
        for plane, x in ((self.keys[layer], k), (self.values[layer], v)):
            rows = plane.dtype.quantize(plane.rotation.rotate(x), plane.tensor_scale)
            codes = torch.zeros_like(rows.codes) if self.destroyed else rows.codes
            plane.codes[page, :, offset] = codes
            if plane.scale is not None:
                assert rows.scale is not None
                plane.scale[page, :, offset] = rows.scale

    def read(self, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decoded keys and values of whole pages, as they are stored: rotated.

        pages: [N] int64. Returns k, v: [N, HKV, S, D], computed in `dtype`; slots never written hold anything.
        """
        k, v = (
            plane.dtype.dequantize(
                Rows(plane.codes[pages], None if plane.scale is None else plane.scale[pages]), dtype, plane.tensor_scale
            )
            for plane in (self.keys[layer], self.values[layer])
        )
        return k, v

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination), in all layers."""
        if not copies:
            return
        source, destination = torch.tensor(copies, device=self.keys[0].codes.device).unbind(1)
        for plane in (*self.keys, *self.values):
            for stored in (plane.codes, plane.scale):
                if stored is not None:
                    stored[destination] = stored[source]


def kv_bytes_per_token(layers: Sequence[tuple[int, int]], scheme: Scheme) -> int:
    """Bytes of one token's keys and values over all layers. The scheme is resolved."""
    return sum(heads * scheme.row_bytes(head_dim) for heads, head_dim in layers)


def fitting_tokens(
    layers: Sequence[tuple[int, int]],
    scheme: Scheme,
    free_bytes: int,
    *,
    page_size: int,
    device: torch.device | str = "cpu",
) -> tuple[int, float]:
    """Tokens of the largest cache that fits so many bytes, which was allocated to prove it; and its bytes a token.

    The scheme is resolved. Every page counts whole.

    Raises:
        torch.OutOfMemoryError: the device has less.
    """
    page_bytes = kv_bytes_per_token(layers, scheme) * page_size
    # a scale that a whole layer shares is four bytes more a layer and side
    pages = max(0, free_bytes - 8 * len(layers)) // page_bytes
    cache = PagedCache(layers, scheme, pages=pages, page_size=page_size, device=device)
    assert cache.nbytes <= free_bytes
    return pages * page_size, cache.bytes_per_token
