"""Whether the kernels write a real model's keys and values as the definitions do: byte by byte, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvbench.attention import append, choose, kernels_lack
from kvbench.cache import PagedCache
from kvbench.dtypes import all_dtypes
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.transforms import all_rotations

PAGE_SIZE = 16


@dataclass(frozen=True)
class Parity:
    """One scheme over all layers. rows: of keys and of values; wrong_rows: those of which a byte differs."""

    dtype: str
    rotation: str
    layers: int
    rows: int
    wrong_rows: int
    first_wrong_layer: int | None


def parity(loaded: TransformersModel, tokens: list[int]) -> Iterator[Parity]:
    """For each dtype × rotation that kernels write, how the model's own keys and values of `tokens` are stored.

    The keys and values are those of the exact cache. The kernels write them on the model's device, and
    PagedCache.append on the CPU.

    Raises:
        ValueError: the model computes in 32 bits, which the kernels don't.
    """
    runner = loaded.runner(Scheme.parse("auto"), page_size=PAGE_SIZE)
    choose("triton", runner.scheme, loaded.model.dtype, loaded.model.device)
    runner.hidden_states([tokens])
    pages = torch.arange(-(-len(tokens) // PAGE_SIZE), device=loaded.model.device)
    dtype = loaded.model.dtype
    exact = [
        [x.transpose(1, 2).flatten(0, 1)[: len(tokens)] for x in runner.stored.read(layer, pages, dtype)]
        for layer in range(len(loaded.info.layers))
    ]
    head_dims = {head_dim for _, head_dim in loaded.info.layers}
    for name in all_dtypes():
        for rotation in all_rotations():
            scheme = Scheme.parse(name, rotation)
            # Triton's interpreter gets bf16 wrong
            wrong_here = name == "auto" or (name == "bf16" and loaded.model.device.type == "cpu")
            if not wrong_here and not kernels_lack(scheme, dtype, loaded.model.device, head_dims):
                yield _compare(loaded, scheme, exact, len(pages))


def _compare(loaded: TransformersModel, scheme: Scheme, exact: list[list[torch.Tensor]], pages: int) -> Parity:
    rows = wrong_rows = 0
    first: int | None = None
    for layer, (k, v) in enumerate(exact):
        shape = loaded.info.layers[layer]
        caches = [
            PagedCache([shape], scheme, pages=pages, page_size=PAGE_SIZE, model_dtype=loaded.model.dtype, device=device)
            for device in (loaded.model.device, torch.device("cpu"))
        ]
        slots = torch.arange(len(k))
        append(caches[0], 0, k, v, slots.to(k.device), impl="triton")
        append(caches[1], 0, k.cpu(), v.cpu(), slots, impl="reference")
        for a, b in zip(
            (caches[0].keys[0], caches[0].values[0]), (caches[1].keys[0], caches[1].values[0]), strict=True
        ):
            # [tokens, HKV]: pages are in order, so slot t is token t
            wrong = (a.row_bytes.cpu() != b.row_bytes).any(-1).transpose(1, 2).flatten(0, 1)[: len(k)]
            rows += wrong.numel()
            wrong_rows += int(wrong.sum())
            if first is None and bool(wrong.any()):
                first = layer
    return Parity(scheme.dtype_name, scheme.rotation_name, len(exact), rows, wrong_rows, first)
