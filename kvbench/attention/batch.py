"""A batch of sequences without padding: where each one's new tokens and pages are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbench.cache import PageTable, Rings, on_device
from kvbench.cache.pages import pages_of, slots_of
from kvbench.cache.ranges import Ints


@dataclass(frozen=True, eq=False)
class Near:
    """Where a batch's rows in 16 bits lie, in a cache of their own with pages of `page_size`.

    slots: [T] int64, of the new tokens. table: [B, blocks] int64, which of `pages` [N] int64 each sequence has for each
    of its blocks of `page_size` tokens; N for none.
    seals: packed pages [n] int64 that are full now, their tokens' slots here [n, S], and which are a sequence's first
    [n]; None for none.
    """

    slots: Tensor
    table: Tensor
    pages: Tensor
    page_size: int
    seals: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], page_size: int) -> Self:
        """Of `arrays` on a device."""
        slots, table, pages, *seals = tensors
        return cls(slots, table, pages, page_size, (seals[0], seals[1], seals[2]) if seals else None)

    @staticmethod
    def arrays(
        rings: Rings, tables: Sequence[PageTable], counts: Sequence[int] | Ints, page_tokens: int
    ) -> list[NDArray[Any]]:
        """The fields, of sequences that have just grown by so many tokens each, whose rings grow with them.

        page_tokens: of the pages that are quantized whole; 0 where none is.
        """
        slots, rows, seals = [], [], []
        for table, count in zip(tables, np.asarray(counts).tolist(), strict=True):
            slots.append(rings.extend(table, table.length - count))
            rows.append(rings.row(table))
            if page_tokens:
                seals += rings.seals(table, table.length - count, page_tokens)
        padded = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
        for whole, row in zip(padded, rows, strict=True):
            whole[: len(row)] = row
        pages, index = np.unique(padded, return_inverse=True)
        index = index.reshape(padded.shape)
        if pages[0] < 0:  # none
            pages, index = pages[1:], np.where(index == 0, len(pages) - 1, index - 1)
        arrays: list[NDArray[Any]] = [np.concatenate(slots), index, pages]
        if seals:
            arrays += [
                np.array([seal.page for seal in seals]),
                np.stack([seal.slots for seal in seals]),
                np.array([seal.first for seal in seals]),
            ]
        return arrays

    def to(self, device: torch.device) -> Self:
        """The same on another device."""

        def there(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        seals = None if self.seals is None else tuple(map(there, self.seals))
        moved = {name: there(getattr(self, name)) for name in ("slots", "table", "pages")}
        return replace(self, **moved, seals=seals)  # type: ignore[arg-type]  # three, as before

    def rows(self, sequences: Sequence[int], first_keys: Sequence[int], length: int) -> Tensor:
        """[n, blocks] of `table`, of some sequences, each from its first key's block on; of `length` keys at most."""
        blocks = torch.arange(-(-length // self.page_size))
        firsts = torch.tensor(first_keys)[:, None] // self.page_size
        index = (firsts + blocks).clamp_max(self.table.shape[1] - 1).to(self.table.device)
        return self.table[torch.tensor(sequences, device=self.table.device)].gather(1, index)


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences whose T new tokens stand one after another.

    query_starts: [B+1] int32, the first new token of each sequence. seq_lens: [B] int32, tokens with the new ones.
    page_table: [B, most pages] int32, padded with 0. slot_mapping: [T] int64, where the new tokens are written.
    near: where the rows in 16 bits lie; None where they lie in the same slots as the packed ones, or nowhere.
    """

    query_starts: Tensor
    seq_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    page_size: int
    near: Near | None = None

    @classmethod
    def make(
        cls,
        tables: Sequence[PageTable],
        counts: Sequence[int] | Ints,
        page_size: int,
        device: torch.device | str = "cpu",
        near: Near | None = None,
    ) -> Self:
        """The batch of these sequences, which have just grown by so many tokens each."""
        starts, lengths, pages, slots = on_device(cls.arrays(tables, counts, page_size), device)
        return cls(starts, lengths, pages, slots, page_size, near)

    @staticmethod
    def arrays(tables: Sequence[PageTable], counts: Sequence[int] | Ints, page_size: int) -> list[NDArray[Any]]:
        """The first four fields of `make`."""
        pages = pages_of(tables)
        lengths = np.array([table.length for table in tables], dtype=np.int64)
        counts = np.asarray(counts, dtype=np.int64)
        starts = np.append(0, np.cumsum(counts))
        return [starts.astype(np.int32), lengths.astype(np.int32), pages, slots_of(pages, lengths, counts, page_size)]

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        names = ("query_starts", "seq_lens", "page_table", "slot_mapping")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, near=None if self.near is None else self.near.to(device))

    @cached_property
    def skips(self) -> bool:
        """Whether a new token is written nowhere."""
        return bool((self.slot_mapping < 0).any())

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """For each sequence: its first new token, the end of its new tokens, its length."""
        starts = self.query_starts.tolist()
        return list(zip(starts[:-1], starts[1:], self.seq_lens.tolist(), strict=True))

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64 positions of the new tokens within their sequences."""
        tokens = len(self.slot_mapping)
        starts, ends = self.query_starts[:-1].to(torch.int64), self.query_starts[1:]
        # of a sequence, the position of its first new token less that token's place in the batch
        shift = self.seq_lens - ends
        shifts = torch.repeat_interleave(shift, ends - starts, output_size=tokens)
        return shifts + torch.arange(tokens, device=shifts.device)

    @cached_property
    def pages_read(self) -> tuple[Tensor, Tensor]:
        """Distinct pages [N] int64 that the sequences hold, and each one's among them, one after another."""
        counts = [-(-length // self.page_size) for _, _, length in self.spans]
        held = torch.arange(self.page_table.shape[1]) < torch.tensor(counts)[:, None]
        used = self.page_table[held.to(self.page_table.device)].to(torch.int64)
        distinct, index = torch.unique(used, return_inverse=True)
        return distinct, index
