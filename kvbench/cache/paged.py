"""What the pages hold: packed codes and scales, one plane each for a layer's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.dtypes import Dtype, Rows
from kvbench.schemes import Scheme
from kvbench.transforms import Rotation


def to_device(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[len(values)] on the device; where that is a GPU, the copy waits for nothing that runs there."""
    made = torch.as_tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else made.to(device)


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
    destroyed: zeros are stored instead of all keys and values: the canary of a sweep, which must wreck every score.

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

        self.pages = pages
        # layers of one shape lie in one tensor each, so that few calls copy a page of all of them
        self._stacks: list[Tensor] = []

        def planes(dtype: Dtype, rotation: Rotation) -> list[Plane]:
            found: list[Plane | None] = [None] * len(layers)
            for heads, head_dim in dict.fromkeys(layers):
                members = [i for i, layer in enumerate(layers) if layer == (heads, head_dim)]
                shape = (len(members), pages, heads, page_size)
                codes = torch.empty(*shape, dtype.code_bytes(head_dim), dtype=torch.uint8, device=device)
                self._stacks.append(codes)
                scales = None
                if dtype.granularity == "per_token_head":
                    scales = torch.empty(shape, dtype=torch.float32, device=device)
                    self._stacks.append(scales)
                for i, layer in enumerate(members):
                    scale = None if scales is None else scales[i]
                    one = torch.ones((), device=device) if dtype.granularity == "per_tensor" else None
                    found[layer] = Plane(dtype, rotation, head_dim, codes[i], scale, one)
            return [plane for plane in found if plane is not None]

        self.keys = planes(self.scheme.key, self.scheme.key_rotation)
        self.values = planes(self.scheme.value, self.scheme.value_rotation)

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
        if self.destroyed:
            k, v = torch.zeros_like(k), torch.zeros_like(v)
        kept = slot_mapping >= 0
        if not bool(kept.all()):
            k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
        page, offset = slot_mapping // self.page_size, slot_mapping % self.page_size
        for plane, x in ((self.keys[layer], k), (self.values[layer], v)):
            rows = plane.dtype.quantize(plane.rotation.rotate(x), plane.tensor_scale)
            plane.codes[page, :, offset] = rows.codes
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
        flat = to_device([page for copy in copies for page in copy], torch.int64, self._stacks[0].device)
        source, destination = flat.view(-1, 2).unbind(1)
        for stack in self._stacks:
            stack[:, destination] = stack[:, source]


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
