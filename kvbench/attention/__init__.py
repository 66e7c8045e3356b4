"""Attention over the paged cache. `attend` is the one way in; which implementation runs is always said."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvbench.attention import reference
from kvbench.attention.batch import Batch, Near
from kvbench.cache import PagedCache
from kvbench.dtypes import Dtype
from kvbench.dtypes.trellis import computed_by
from kvbench.schemes import Scheme, Window

Implementation = Literal["reference", "triton"]

__all__ = [
    "Batch",
    "Implementation",
    "Near",
    "append",
    "attend",
    "choose",
    "in_copies",
    "kernels_lack",
    "waits",
]

_BY_DEFINITION: WeakKeyDictionary[PagedCache, bool] = WeakKeyDictionary()


# transforms and dtypes whose kernels were changed since all of their tests passed on a GPU; see results/README.md
UNPROVEN: set[str] = set()


def choose(
    wanted: Literal["auto"] | Implementation,
    scheme: Scheme,
    compute_dtype: torch.dtype,
    device: torch.device,
    head_dims: Collection[int] = (),
) -> Implementation:
    """What "auto" is: the kernels on a GPU wherever they can serve, else the reference. Any other choice is kept.

    A scheme with an unproven transform or dtype is computed by the reference unless "triton" is asked for.
    head_dims: of the layers, where they are known.

    Raises:
        ValueError: "triton" for what the kernels can't serve.
    """
    if wanted == "reference" or (wanted == "auto" and device.type != "cuda"):
        return "reference"
    if wanted == "auto" and _unproven(scheme):
        return "reference"
    lacking = kernels_lack(scheme, compute_dtype, device, head_dims, copies=wanted == "triton")
    if lacking and wanted == "triton":
        raise ValueError(f"attention: triton can't serve this cell: {lacking}")
    return "reference" if lacking else "triton"


def _unproven(scheme: Scheme) -> bool:
    """Whether a scheme asks for a kernel that has not passed all of its tests on a GPU."""
    return any(({side.dtype.name} | {one.name for one in side.transforms}) & UNPROVEN for side in scheme.all_sides)


def kernels_lack(
    scheme: Scheme,
    compute_dtype: torch.dtype,
    device: torch.device,
    head_dims: Collection[int] = (),
    copies: bool = False,
) -> str:
    """Why the kernels can't serve a scheme, for a person; empty where they can.

    copies: where they can read in a copy of 16 bits what they have no code for, as "triton" does and "auto" does not.
    """
    # imported here, for Triton decides on import whether it interprets
    from kvbench.attention import triton

    return triton.lacking(scheme.resolve(compute_dtype), compute_dtype, device, head_dims, copies)


def append(
    cache: PagedCache,
    layer: int,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    *,
    impl: Implementation,
    positions: Tensor | None = None,
    exact: PagedCache | None = None,
    near: Near | None = None,
    skips: bool | None = None,
) -> None:
    """Transform and quantize new tokens and write them to their slots: the same bytes by either implementation.

    k, v: [T, HKV, D], any floating dtype. slot_mapping: [T] int64, page * page_size + offset; -1 skips the token.
    positions: [T] int64 within their sequences; needed where a transform goes by position.
    exact: gets the same rows, transformed alike, in 16 bits. near: where, if not in the same slots; and which pages are
    full now, and quantized whole. skips: whether a slot is -1, where that is known: nobody looks.
    """
    if not _by_definition(cache, impl):
        assert near is None, "kernels read both copies in the same slots"
        from kvbench.attention import triton

        triton.append(cache, layer, k, v, slot_mapping, positions, exact)
        return
    with _computing(k.device):
        cache.append(layer, k, v, slot_mapping, positions, skips)
    if exact is not None and near is None:
        append(exact, layer, k, v, slot_mapping, impl=impl, positions=positions, skips=skips)
    elif exact is not None and near is not None:
        exact.append(layer, k, v, near.slots, positions, skips=False)
        if near.seals is not None:
            cache.seal(layer, exact, *near.seals)


def waits(scheme: Scheme, impl: Implementation) -> bool:
    """Whether a pass looks at what the device computed, so that no CUDA graph can hold it. The scheme is resolved."""
    if impl == "reference":
        return True
    from kvbench.attention import triton

    sides = scheme.all_sides
    return not (all(map(triton.writes, sides)) or all(map(triton.flows, sides)))


def in_copies(scheme: Scheme, impl: Implementation) -> list[Dtype]:
    """The dtypes whose rows are read in a copy of 16 bits: see `PagedCache.keep_decoded`."""
    if impl == "reference":
        return []
    from kvbench.attention import triton

    return [dtype for dtype in scheme.dtypes if triton.in_copy(dtype)]


def _by_definition(cache: PagedCache, impl: Implementation) -> bool:
    """Whether the definitions write and read this cache's rows; by kernels only what attention makes of them."""
    if impl == "reference":
        return True
    if cache not in _BY_DEFINITION:  # asked for each layer of each pass
        from kvbench.attention import triton

        _BY_DEFINITION[cache] = not all(map(triton.writes, cache.scheme.all_sides))
    return _BY_DEFINITION[cache]


@contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """Inside the block kernels write and read trellis rows where there is a GPU: the definition's bytes and values."""
    if device.type != "cuda":
        yield
        return
    # imported here, for Triton decides on import whether it interprets
    from kvbench.attention import trellis

    with computed_by(trellis):
        yield


def attend(
    q: Tensor,
    cache: PagedCache,
    layer: int,
    batch: Batch,
    *,
    impl: Implementation,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    exact: PagedCache | None = None,
    window: Window | None = None,
) -> Tensor:
    """Attention outputs [T, HQ, D], in q's dtype, of queries that read only the cache.

    q: [T, HQ, D], not transformed, the new tokens of `batch`, whose keys and values are in the cache already.
    scaling: factor of the scores. sliding_window: a query sees itself and the window - 1 tokens before it.
    softcap: c in c·tanh(score / c). sinks: [HQ], one more logit a head that takes probability and gives nothing.
    exact: the same rows in 16 bits, transformed alike, in the same pages and slots, or where `batch.near` says.
    window: which of them a query reads instead of the cache's: a key before `window.sinks`, or at or after
    `window.starts` of the query's position.
    impl: "reference" computes with torch operations, in float64 where q is float64 and in float32 otherwise; "triton"
    is the kernels, for half-precision queries on a GPU (or in Triton's interpreter). What they have no code for they
    read as float16, to which rows are decoded as they are written.
    """
    if sinks is not None and any("offset" in params for params in cache.values[layer].params):
        raise ValueError(
            f"values centred ({cache.values[layer].side.name}) under sink logits, which take part of a query's weight, "
            "would give outputs short of that part of the mean: leave center_constant out of the values"
        )
    if impl == "triton":
        from kvbench.attention import triton

    implementation = triton.attend if impl == "triton" else reference.attend
    with _computing(q.device) if _by_definition(cache, impl) else nullcontext():
        return implementation(
            q,
            cache,
            layer,
            batch,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            exact=exact,
            window=window,
        )
