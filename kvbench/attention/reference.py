"""The oracle: attention over the packed cache in plain torch operations, in float64 where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.attention.batch import Batch
from kvbench.cache import PagedCache

QUERY_CHUNK = 512  # queries of a sequence whose scores are held at once
FREE_SCORES = 2**16  # padded scores that cost no more than another call


@dataclass(frozen=True)
class _Group:
    """Sequences computed together: B of them, padded to T new tokens and to N pages. A padded entry repeats a real one.

    tokens: [B, T] int64, which of the batch's tokens. real: [B, T] bool, false where padded.
    pages: [B, N] int64, which of the batch's distinct pages. positions: [B, T] int64 of the new tokens.
    first_key: [B] int64, the position of the first key read. lengths: [B] int64.
    """

    tokens: Tensor
    real: Tensor
    pages: Tensor
    positions: Tensor
    first_key: Tensor
    lengths: Tensor


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
) -> Tensor:
    """See kvbench.attention.attend."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = cache.scheme.key_rotation.rotate_query(q.to(dtype))  # [T, HQ, D]
    all_k, all_v = cache.read(layer, batch.pages_read[0], dtype)  # [pages, HKV, S, D]
    out = torch.empty_like(queries)
    for group in _groups(batch, sliding_window):
        length = int((group.lengths - group.first_key).max())
        keys = group.first_key[:, None] + torch.arange(length, device=q.device)  # [B, L] positions
        k, v = (x[group.pages].transpose(1, 2).flatten(2, 3)[:, :, :length] for x in (all_k, all_v))  # [B, HKV, L, D]
        unwritten = keys >= group.lengths[:, None]
        if bool(unwritten.any()):
            k, v = (x.masked_fill(unwritten[:, None, :, None], 0) for x in (k, v))
        for tokens, real, positions in zip(
            group.tokens.split(QUERY_CHUNK, 1),
            group.real.split(QUERY_CHUNK, 1),
            group.positions.split(QUERY_CHUNK, 1),
            strict=True,
        ):
            seen = int((positions - group.first_key[:, None]).max()) + 1  # the keys after these no query sees
            visible = keys[:, None, :seen] <= positions[:, :, None]  # [B, T, L]
            if sliding_window is not None:
                visible &= keys[:, None, :seen] > positions[:, :, None] - sliding_window
            mixed = _softmax_attention(
                queries[tokens].transpose(1, 2),
                k[:, :, :seen],
                v[:, :, :seen],
                visible[:, None],
                scaling,
                softcap,
                sinks,
            )
            out[tokens[real]] = mixed.transpose(1, 2)[real]
    return cache.scheme.value_rotation.unrotate(out).to(q.dtype)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """[B, HQ, T, D] of q: [B, HQ, T, D] over k and v: [B, HKV, L, D] where visible: [B, 1, T, L]."""
    if softcap is None and sinks is None:
        out: Tensor = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT * scaling  # [B, HQ, T, L]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = scores.softmax(-1)[..., : k.shape[2]]
    return p @ v


# a pass asks for the same groups in every layer, and at most two windows alternate
@lru_cache(maxsize=4)
def _groups(batch: Batch, sliding_window: int | None) -> list[_Group]:
    """The batch's sequences, those of similar shape together."""
    device = batch.page_table.device
    own_pages = [own.to("cpu") for own in batch.pages_read[1]]
    groups = []
    for members in _similar(batch.spans):
        most_new = max(end - start for start, end, _ in (batch.spans[i] for i in members))
        tokens, real, positions, pages, first_keys, lengths = [], [], [], [], [], []
        for i in members:
            start, end, length = batch.spans[i]
            new = end - start
            padded = torch.arange(most_new).clamp_max(new - 1)
            tokens.append(start + padded)
            real.append(torch.arange(most_new) < new)
            positions.append(length - new + padded)
            first = 0 if sliding_window is None else max(0, length - new + 1 - sliding_window)
            skipped = first // batch.page_size  # whole pages that no query sees
            pages.append(own_pages[i][skipped:])
            first_keys.append(skipped * batch.page_size)
            lengths.append(length)
        groups.append(
            _Group(
                torch.stack(tokens).to(device),
                torch.stack(real).to(device),
                torch.nn.utils.rnn.pad_sequence(pages, batch_first=True).to(device),
                torch.stack(positions).to(device),
                torch.tensor(first_keys, device=device),
                torch.tensor(lengths, device=device),
            )
        )
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
