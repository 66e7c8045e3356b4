"""The oracle: attention over the packed cache in plain torch operations, in float64 where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kvbench.attention.batch import Batch
from kvbench.cache import PagedCache, on_device
from kvbench.schemes import Window
from kvbench.transforms.base import POSITIONS

QUERY_CHUNK = 512  # queries of a sequence whose scores are held at once
FREE_SCORES = 2**16  # padded scores that cost no more than another call


@dataclass(frozen=True)
class _Group:
    """Sequences computed together: B of them, padded to N pages.

    chunks: of their new tokens. pages: [B, N] int64, which of the batch's distinct pages.
    first_key: [B] int64, the position of the first key read. lengths: [B] int64. keys: most that one has from there on.
    near: [B, blocks] int64, which of the pages in 16 bits, from the first key's on; None where they lie as the others.
    places: what `place` found, for the next layer.
    """

    chunks: list[_Chunk]
    pages: Tensor
    first_key: Tensor
    lengths: Tensor
    keys: int
    near: Tensor | None
    places: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def place(self, shape: tuple[int, int, int], sealed: int = 1, exact: bool = False) -> Tensor:
        """[B, HKV, L] int64: which of rows [pages, HKV, S] of this shape each key's is, the last page's where none is.

        sealed: so many tokens are written at once. exact: of the rows in 16 bits.
        """
        key = (shape, sealed, exact)
        if key not in self.places:
            count, heads, size = shape
            place = torch.arange(self.keys, device=self.lengths.device)
            pages = self.near if exact and self.near is not None else self.pages
            absent = self.first_key[:, None] + place >= self.lengths[:, None] // sealed * sealed
            page = pages[:, place // size].masked_fill(absent, count - 1)
            head = torch.arange(heads, device=page.device)[:, None]
            self.places[key] = (page[:, None] * heads + head) * size + place % size
        return self.places[key]


@dataclass(frozen=True)
class _Chunk:
    """Some new tokens of each sequence of a group, padded to T. A padded entry repeats a real one.

    tokens: [B, T] int64, which of the batch's tokens. positions: [B, T] int64, of them.
    real: [n] int64, which of the B·T entries are not padded. seen: keys of the group after which no query sees one.
    """

    tokens: Tensor
    positions: Tensor
    real: Tensor
    seen: int


def attend(
    q: Tensor,
    cache: PagedCache,
    layer: int,
    batch: Batch,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    exact: PagedCache | None,
    window: Window | None,
) -> Tensor:
    """See kvbench.attention.attend."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys_as, values_as = cache.keys[layer], cache.values[layer]
    queries = keys_as.side.query(q.to(dtype), keys_as.params)  # [T, HQ, D]
    lacking = keys_as.side.score(q.to(dtype), keys_as.params)  # [T, HQ, P]
    if lacking is not None and lacking.shape[-1] == 1 and softcap is None and sinks is None:
        lacking = None  # softmax does not see it
    lift = keys_as.side.lift(queries, keys_as.params)  # [T, HQ]
    read = [_with_zeros(cache, layer, batch.pages_read[0], dtype)]
    if exact is not None:
        read.append(_with_zeros(exact, layer, batch.pages_read[0] if batch.near is None else batch.near.pages, dtype))
    # what is quantized by page is not there before its page is full
    sealed = [cache.page_size if plane.dtype.page_tokens else 1 for plane in (keys_as, values_as)]
    out = torch.empty_like(queries)
    for group in _groups(batch, sliding_window):
        keys = group.first_key[:, None] + torch.arange(group.keys, device=q.device)  # [B, L] positions
        # [B, HKV, L, D] of k and v, packed and exact: copied once, which at long contexts is most of a decode step
        rows = [[_flat(x)[group.place(_shape(x), each)] for x, each in zip(read[0], sealed, strict=True)]]
        rows += [[_flat(x)[group.place(_shape(x), exact=True)] for x in both] for both in read[1:]]
        for chunk in group.chunks:
            tokens, positions, seen = chunk.tokens, chunk.positions, chunk.seen
            visible = keys[:, None, :seen] <= positions[:, :, None]  # [B, T, L]
            if sliding_window is not None:
                visible &= keys[:, None, :seen] > positions[:, :, None] - sliding_window
            near = None
            if window is not None and exact is not None:
                near = keys[:, None, :seen] >= window.starts(positions)[:, :, None]
                near = (near | (keys[:, None, :seen] < window.sinks))[:, None]  # [B, 1, T, L]
            mixed = _softmax_attention(
                queries[tokens].transpose(1, 2),
                [[x[:, :, :seen] for x in both] for both in rows],
                near,
                visible[:, None],
                None if lacking is None else _by_key(lacking[tokens], keys[:, :seen]),
                None if lift is None else lift[tokens].transpose(1, 2)[..., None],
                scaling,
                softcap,
                sinks,
            )
            out[tokens.flatten()[chunk.real]] = mixed.transpose(1, 2).flatten(0, 1)[chunk.real]
    return values_as.side.undo(out, values_as.params).to(q.dtype)


def _with_zeros(cache: PagedCache, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v [pages + 1, HKV, S, D] of these pages, and a page of zeros, which stands where there is none."""
    k, v = cache.read(layer, functional.pad(pages, (0, 1)), dtype)
    k[-1], v[-1] = 0, 0
    return k, v


def _shape(x: Tensor) -> tuple[int, int, int]:
    """All dimensions of rows but the last."""
    return x.shape[0], x.shape[1], x.shape[2]


def _flat(x: Tensor) -> Tensor:
    """Rows one after another."""
    return x.reshape(-1, x.shape[-1])


def _by_key(lacking: Tensor, keys: Tensor) -> Tensor:
    """[B, HQ, T, L] of what scores lack [B, T, HQ, P], for the keys at these positions [B, L]."""
    pages = lacking.shape[-1]
    which = (keys // POSITIONS).clamp_max(pages - 1)  # P = 1: all alike; a padded key may lie beyond the last page
    index = which[:, None, None].expand(-1, lacking.shape[2], lacking.shape[1], -1)
    return lacking.transpose(1, 2).gather(-1, index)


def _softmax_attention(
    q: Tensor,
    rows: Sequence[Sequence[Tensor]],
    near: Tensor | None,
    visible: Tensor,
    lacking: Tensor | None,
    lift: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, HQ, T, D] of q: [B, HQ, T, D] over k and v: [B, HKV, L, D] where visible: [B, 1, T, L].

    rows: k and v as they are packed, and where near: [B, 1, T, L] as they are in the window.
    lacking: [B, HQ, T, L], added to the scores before scaling, or None. lift: [B, HQ, T, 1], added to those of packed
    keys, times the square of their length, or None.
    """
    k, v = rows[0]
    # on a GPU torch would copy k and v for each query head, which took most of a decode step
    if not q.is_cuda and all(one is None for one in (softcap, sinks, lacking, lift, near)):
        out: Tensor = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out
    scores = _per_query(q, k.mT)  # [B, HQ, T, L]
    if lift is not None:
        squares = k.square().sum(-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = scores + lift * squares[:, :, None]
    if near is not None:
        scores = torch.where(near, _per_query(q, rows[1][0].mT), scores)
    if lacking is not None:
        scores = scores + lacking
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = scores.softmax(-1)[..., : k.shape[2]]
    if near is None:
        return _per_query(p, v)
    return _per_query(p.masked_fill(near, 0), v) + _per_query(p.masked_fill(~near, 0), rows[1][1])


def _per_query(x: Tensor, y: Tensor) -> Tensor:
    """[B, HQ, T, N] of x [B, HQ, T, M] and y [B, HKV, M, N]: each query head's product with its KV head's.

    y is not copied for each: on a GPU a KV head's query heads are rows of one product, which reads y once, elsewhere
    they come one at a time, which keeps the bits of a CPU's results.
    """
    if x.is_cuda:
        rows: Tensor = x.unflatten(1, (y.shape[1], -1)).flatten(2, 3) @ y
        return rows.view(*x.shape[:-1], y.shape[-1])
    heads = x.unflatten(1, (y.shape[1], -1)).unbind(2)
    return torch.stack([head @ y for head in heads], 2).flatten(1, 2)


# a pass asks for the same groups in every layer, and at most two windows alternate
@lru_cache(maxsize=4)
def _groups(batch: Batch, sliding_window: int | None) -> list[_Group]:
    """The batch's sequences, those of similar shape together."""
    device = batch.page_table.device
    spans = np.array(batch.spans).reshape(-1, 3)
    pages, counts = batch.pages_read[1].cpu().numpy(), -(-spans[:, 2] // batch.page_size)
    first_pages = np.cumsum(counts) - counts  # of each sequence, in `pages`
    groups = []
    for members in _similar(batch.spans):
        start, end, length = spans[members].T
        new = end - start
        padded = np.arange(new.max())
        real = padded < new[:, None]
        padded = np.minimum(padded, new[:, None] - 1)
        positions = (length - new)[:, None] + padded
        first = np.zeros_like(new) if sliding_window is None else np.maximum(0, length - new + 1 - sliding_window)
        skipped = first // batch.page_size  # whole pages that no query sees
        first_keys = skipped * batch.page_size
        own = np.arange((counts[members] - skipped).max()) + skipped[:, None]
        there = own < counts[members][:, None]
        own = np.where(there, pages[np.where(there, first_pages[members][:, None] + own, 0)], 0)
        seen = positions - first_keys[:, None] + 1
        cuts = range(0, real.shape[1], QUERY_CHUNK)
        kept = [np.flatnonzero(real[:, cut : cut + QUERY_CHUNK]) for cut in cuts]
        arrays = [start[:, None] + padded, positions, own, first_keys, length, *kept]
        tokens, places, own_pages, firsts, lengths, *entries = on_device(arrays, device)
        chunks = [
            _Chunk(rows, at, entry, int(seen[:, cut : cut + QUERY_CHUNK].max()))
            for rows, at, entry, cut in zip(
                tokens.split(QUERY_CHUNK, 1), places.split(QUERY_CHUNK, 1), entries, cuts, strict=True
            )
        ]
        near = None
        if batch.near is not None:
            near = batch.near.rows(members, first_keys.tolist(), int(length.max()))
        groups.append(_Group(chunks, own_pages, firsts, lengths, int((length - first_keys).max()), near))
    return groups


def _similar(spans: list[tuple[int, int, int]]) -> Iterator[list[int]]:
    """Indices of sequences (first new token, end of the new tokens, length) that lose little by padding together."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i][1] - spans[i][0], spans[i][2]))
    members: list[int] = []
    most_new = longest = scores = 0
    for i in order:
        start, end, length = spans[i]
        new = end - start
        padded = (len(members) + 1) * max(most_new, new) * max(longest, length)
        if members and padded > 2 * (scores + new * length) + FREE_SCORES:
            yield members
            members, most_new, longest, scores = [], 0, 0, 0
        members.append(i)
        most_new, longest, scores = max(most_new, new), max(longest, length), scores + new * length
    if members:
        yield members
