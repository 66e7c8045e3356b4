"""What the pages hold: packed codes and scales, one plane each for a layer's keys and values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbench.cache.device import on_device
from kvbench.dtypes import Cast, Dtype, Rows
from kvbench.schemes import Layers, Scheme, Side
from kvbench.transforms import Params

DECODED_AT_ONCE = 1024  # pages

# of each layer, what the transforms of its keys learned, and their dtype, and those of its values
Learned = Sequence[tuple[tuple[Params, ...], tuple[Params, ...]]]


@dataclass
class Plane:
    """The stored keys, or the stored values, of one layer.

    params: what the side's transforms learned of the layer, and its dtype. dtype: what rows become, as it learned.
    codes: [P, HKV, S, word_bytes] uint8. rest: [P, HKV, S, bytes] uint8, what of codes follows these; None if nothing.
    scale: [P, HKV, S, *scales_shape], or [P, HKV, *scales_shape] where pages are quantized whole; None for no scale.
    tensor_scale: scalar float32 where the dtype has one scale a layer, else None.
    decoded: [P, HKV, S, D] float16, what the rows are read as, for kernels that have no code for them; None without.
    launched: what an implementation made of this plane once, by name; for as long as its tensors are these.
    """

    side: Side
    params: tuple[Params, ...]
    head_dim: int
    codes: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None
    rest: Tensor | None = None
    decoded: Tensor | None = None
    launched: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    dtype: Dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.side.dtype.bind(self.params[-1]) if self.side.dtype.learns else self.side.dtype

    def rows(self, pages: Tensor) -> Rows:
        """The stored rows [N, HKV, S] of these pages [N]."""
        codes = self.codes[pages]
        if self.rest is not None:
            codes = torch.cat([codes, self.rest[pages]], dim=-1)
        return Rows(codes, None if self.scale is None else self.scale[pages])

    def read(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, HKV, S, D] decoded rows of these pages [N], computed in `dtype`."""
        return self._read(self.rows(pages), dtype)

    def _read(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """[N, HKV, S, D] of rows [N, HKV, S], or [N, HKV, D] of rows [N, HKV]."""
        if not self.dtype.learns:
            return self.dtype.dequantize(rows, dtype, self.tensor_scale)
        if rows.codes.dim() == 3:
            return self.dtype.dequantize(rows, dtype)
        # what a head's channels have learned is told by the last dimension but one
        scale = None if rows.scale is None else rows.scale.transpose(1, 2)
        return self.dtype.dequantize(Rows(rows.codes.transpose(1, 2), scale), dtype).transpose(1, 2)

    def write(self, where: Any, rows: Rows, at_all: Tensor | None = None) -> None:
        """Store rows; where: an index into [P, HKV, S], or into [P] for pages that are quantized whole.

        at_all: scalar bool, whether anything is stored, for who does not look what it is.
        """

        def put(tensor: Tensor, new: Tensor) -> None:
            tensor[where] = new if at_all is None else torch.where(at_all, new, tensor[where])

        words = self.codes.shape[-1]
        put(self.codes, rows.codes[..., :words])
        if self.rest is not None:
            put(self.rest, rows.codes[..., words:])
        if self.scale is not None:
            assert rows.scale is not None
            put(self.scale, rows.scale)
        if self.decoded is not None:
            put(self.decoded, self._read(rows, torch.float32).to(torch.float16))

    @property
    def row_bytes(self) -> Tensor:
        """[P, HKV, S, bytes] uint8: all that rows are, one after the other."""
        parts = [self.codes, *(x for x in (self.rest,) if x is not None)]
        if self.scale is not None:
            parts.append(self.scale.view(*self.codes.shape[:3], -1).view(torch.uint8))
        return torch.cat(parts, dim=-1)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        held = (self.codes, self.rest, self.scale, self.tensor_scale, self.decoded)
        return sum(t.nbytes for t in held if t is not None)


def unlearned(scheme: Scheme, layers: int) -> Learned:
    """What the transforms of a scheme know that learned nothing."""
    return [(key.unlearned, value.unlearned) for key, value in (scheme.layer(i, layers) for i in range(layers))]


@dataclass
class _Stack:
    """One tensor [layers, P, ...] for planes of one shape on a device, of each of which it holds that field."""

    tensor: Tensor
    name: str
    planes: list[Plane]
    device: torch.device

    @property
    def pages(self) -> Tensor:
        """[layers, P, n]: in elements of eight bytes where a page is so many, which are copied sooner than its own."""
        flat = self.tensor.flatten(2)
        return flat.view(torch.int64) if flat.shape[2] * flat.element_size() % 8 == 0 else flat


class PagedCache:
    """Packed keys and values of all layers, in pages.

    layers: (KV heads, head_dim) of each. scheme: how they are stored; `auto` becomes `model_dtype`.
    learned: what the transforms of each layer's keys learned, and those of its values; None where none learns.
    device: of all layers, or of each its own.
    destroyed: zeros are stored instead of all keys and values: the canary of a sweep, which must break every score.

    Raises:
        ValueError: layers or a head_dim that the scheme can't take, a scheme that learns without what it learned, or
            pages of another size than its dtypes quantize whole.
    """

    def __init__(
        self,
        layers: Layers,
        scheme: Scheme,
        *,
        pages: int,
        page_size: int,
        learned: Learned | None = None,
        model_dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device] = "cpu",
        destroyed: bool = False,
    ) -> None:
        self.scheme = scheme.resolve(model_dtype)
        self.devices = of_layers(device, len(layers))
        self.page_size = page_size
        self.destroyed = destroyed

        self.pages = pages
        self.scheme.check(layers)
        if self.scheme.page_tokens not in (0, page_size):
            raise ValueError(
                f"{scheme.label} quantizes pages of {self.scheme.page_tokens} tokens, and the cache's have {page_size}"
            )
        if learned is None:
            if scheme.learns:
                raise ValueError(f"{scheme.label} learns from a text: give the cache what it learned")
            learned = unlearned(scheme, len(layers))
        # layers of one shape and dtype on a device lie in one tensor each, so that few calls copy a page of all of them
        self._stacks: list[_Stack] = []

        def planes(which: int) -> list[Plane]:
            sides = [self.scheme.layer(i, len(layers))[which] for i in range(len(layers))]
            kinds = [(side.dtype, *shape, at) for side, shape, at in zip(sides, layers, self.devices, strict=True)]
            found: list[Plane | None] = [None] * len(layers)
            for kind in dict.fromkeys(kinds):
                dtype, heads, head_dim, device = kind
                members = [i for i, other in enumerate(kinds) if other == kind]
                shape: tuple[int, ...] = (len(members), pages, heads, page_size)
                words, rest = dtype.word_bytes(head_dim), None
                codes = torch.empty(*shape, words, dtype=torch.uint8, device=device)
                if more := dtype.code_bytes(head_dim) - words:
                    rest = torch.empty(*shape, more, dtype=torch.uint8, device=device)
                scales = None
                if (scales_shape := dtype.scales_shape(head_dim)) is not None:
                    shape = shape[: 3 if dtype.page_tokens else 4]
                    scales = torch.empty(*shape, *scales_shape, dtype=dtype.scale_storage, device=device)
                own = []
                for i, layer in enumerate(members):
                    scale = None if scales is None else scales[i]
                    one = torch.ones((), device=device) if dtype.has_tensor_scale else None
                    known = tuple({n: t.to(device) for n, t in params.items()} for params in learned[layer][which])
                    behind = None if rest is None else rest[i]
                    own.append(Plane(sides[layer], known, head_dim, codes[i], scale, one, behind))
                    found[layer] = own[-1]
                for name, tensor in (("codes", codes), ("rest", rest), ("scale", scales)):
                    if tensor is not None:
                        self._stacks.append(_Stack(tensor, name, own, device))
            return [plane for plane in found if plane is not None]

        self.keys, self.values = planes(0), planes(1)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(plane.nbytes for plane in (*self.keys, *self.values))

    def nbytes_on(self, device: torch.device) -> int:
        """Bytes allocated there."""
        planes = zip((*self.keys, *self.values), (*self.devices, *self.devices), strict=True)
        return sum(plane.nbytes for plane, at in planes if at == device)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token's keys and values over all layers, from the pages as allocated.

        A scale that a whole layer shares belongs to no token and is left out.
        """
        planes = [*self.keys, *self.values]
        pages = sum(t.nbytes for plane in planes for t in (plane.codes, plane.rest, plane.scale) if t is not None)
        return pages / (self.pages * self.page_size)

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        slot_mapping: Tensor,
        positions: Tensor | None = None,
        skips: bool | None = None,
    ) -> None:
        """Transform and quantize new tokens, and write them to their slots; what is quantized by page, `seal` writes.

        k, v: [T, HKV, D], any floating dtype.
        slot_mapping: [T] int64, page * page_size + offset; -1 skips the token.
        positions: [T] int64 within their sequences; needed where a transform goes by position.
        skips: whether a token is skipped, for who knows; nobody looks, which would wait for the device.
        """
        if self.destroyed:
            k, v = torch.zeros_like(k), torch.zeros_like(v)
        any_kept = None
        if skips is not False and len(slot_mapping):
            # a skipped token is written as the first one that is not, once more
            kept = slot_mapping >= 0
            any_kept, first = kept.any(), kept.to(torch.uint8).argmax()
            taken = torch.where(kept, torch.arange(len(kept), device=kept.device), first)
            k, v, slot_mapping = k[taken], v[taken], slot_mapping[taken].clamp_min(0)
            positions = None if positions is None else positions[taken]
        page, offset = slot_mapping // self.page_size, slot_mapping % self.page_size
        for plane, x in ((self.keys[layer], k), (self.values[layer], v)):
            if plane.dtype.page_tokens:
                continue
            rows = plane.dtype.quantize(plane.side.apply(x, plane.params, positions), plane.tensor_scale)
            plane.write((page, slice(None), offset), rows, any_kept)

    def seal(self, layer: int, exact: PagedCache, pages: Tensor, slots: Tensor, first: Tensor) -> None:
        """Quantize pages that are full, where that is done by page, from their rows in 16 bits.

        pages: [N] int64, of this cache. slots: [N, S] int64, of `exact`, whose rows are transformed alike.
        first: [N] bool, sequences' first pages: their sinks, which are never read here, do not widen a range.
        """
        sinks = min(self.scheme.window.sinks if self.scheme.window else 0, self.page_size - 1)
        for plane, stored in ((self.keys[layer], exact.keys[layer]), (self.values[layer], exact.values[layer])):
            if not plane.dtype.page_tokens:
                continue
            page, offset = slots // exact.page_size, slots % exact.page_size
            assert isinstance(stored.dtype.decode, Cast)
            precise = torch.promote_types(stored.dtype.decode.storage or torch.float32, torch.float32)
            rows = stored.dtype.dequantize(Rows(stored.codes[page, :, offset], None), precise).transpose(1, 2)
            rows[first, :, :sinks] = rows[first, :, sinks : sinks + 1]  # [N, HKV, S, D]
            plane.write(pages, plane.dtype.quantize(rows))

    def keep_decoded(self, dtypes: Collection[Dtype], empty: bool = False) -> None:
        """From now on rows of these dtypes are kept decoded too, in 16 bits, as they are written.

        empty: nothing was written before, so there is nothing to decode now.
        """
        for plane, device in zip((*self.keys, *self.values), (*self.devices, *self.devices), strict=True):
            if plane.decoded is None and plane.side.dtype in dtypes:
                with torch.inference_mode(False):
                    shape = (1, *plane.codes.shape[:3], plane.head_dim)
                    made = torch.zeros(shape, dtype=torch.float16, device=plane.codes.device)
                for first in range(0, 0 if empty else self.pages, DECODED_AT_ONCE):
                    pages = torch.arange(first, min(first + DECODED_AT_ONCE, self.pages), device=made.device)
                    made[0][pages] = plane.read(pages, torch.float32).to(torch.float16)
                plane.decoded = made[0]
                self._stacks.append(_Stack(made, "decoded", [plane], device))

    def grow(self, pages: int) -> None:
        """Has so many pages at least; those that are there keep what they hold."""
        if pages <= self.pages:
            return
        for stack in self._stacks:
            # no tensor of inference mode, which could not be changed outside it
            with torch.inference_mode(False):
                larger = stack.tensor.new_empty(stack.tensor.shape[0], pages, *stack.tensor.shape[2:])
                larger[:, : self.pages] = stack.tensor
            stack.tensor = larger
            for i, plane in enumerate(stack.planes):
                setattr(plane, stack.name, larger[i])
                plane.launched.clear()
        self.pages = pages

    def read(self, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decoded keys and values of whole pages, as they are stored: transformed.

        pages: [N] int64. Returns k, v: [N, HKV, S, D], computed in `dtype`; slots never written hold anything.
        """
        k, v = (plane.read(pages, dtype) for plane in (self.keys[layer], self.values[layer]))
        return k, v

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination), in all layers."""
        if not copies:
            return
        flat = np.fromiter(chain.from_iterable(copies), np.int64, 2 * len(copies))
        at = {device: on_device([flat], device)[0].view(-1, 2) for device in dict.fromkeys(self.devices)}
        for stack in self._stacks:
            source, destination = at[stack.device].unbind(1)
            pages = stack.pages
            pages[:, destination] = pages[:, source]


def fitting_tokens(
    layers: Layers,
    scheme: Scheme,
    free_bytes: Mapping[torch.device, int],
    *,
    page_size: int,
    device: torch.device | str | Sequence[torch.device] = "cpu",
    learned: Learned | None = None,
) -> tuple[int, float]:
    """Tokens of the largest cache that fits so many bytes, which was allocated to prove it; and its bytes a token.

    The scheme is resolved. Every page counts whole. free_bytes: of each device that has layers; the one that holds the
    fewest pages decides. device, learned: see PagedCache.

    Raises:
        torch.OutOfMemoryError: a device has less.
    """
    devices = of_layers(device, len(layers))
    pages = min(
        # a scale that a whole layer shares is four bytes more a layer and side
        max(0, free_bytes[at] - 8 * devices.count(at)) // int(token_bytes * page_size)
        for at, token_bytes in by_device(devices, scheme.layer_bytes(layers)).items()
    )
    cache = PagedCache(layers, scheme, pages=pages, page_size=page_size, device=device, learned=learned)
    assert all(cache.nbytes_on(at) <= free_bytes[at] for at in devices)
    return pages * page_size, cache.bytes_per_token


def of_layers(device: torch.device | str | Sequence[torch.device], layers: int) -> tuple[torch.device, ...]:
    """The device of each layer."""
    if isinstance(device, (str, torch.device)):
        return (torch.device(device),) * layers
    return tuple(device)


def by_device(devices: Sequence[torch.device], each: Sequence[float]) -> dict[torch.device, float]:
    """What layers take, summed by their devices."""
    found = dict.fromkeys(devices, 0.0)
    for device, amount in zip(devices, each, strict=True):
        found[device] += amount
    return found
