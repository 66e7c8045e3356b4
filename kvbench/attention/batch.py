"""A batch of sequences without padding: where each one's new tokens and pages are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from kvbench.cache import PageTable, to_device


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences whose T new tokens stand one after another.

    query_starts: [B+1] int32, the first new token of each sequence. seq_lens: [B] int32, tokens with the new ones.
    page_table: [B, most pages] int32, padded with 0. slot_mapping: [T] int64, where the new tokens are written.
    """

    query_starts: Tensor
    seq_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    page_size: int

    @classmethod
    def make(
        cls,
        tables: Sequence[PageTable],
        slots: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The batch of these sequences (already extended) with the slots of their new tokens."""
        width = max(len(table.pages) for table in tables)
        lengths = [table.length for table in tables]
        pages = [page for table in tables for page in (*table.pages, *[0] * (width - len(table.pages)))]
        starts = accumulate((len(s) for s in slots), initial=0)
        return cls(
            to_device([*starts], torch.int32, device),
            to_device(lengths, torch.int32, device),
            to_device(pages, torch.int32, device).view(len(tables), width),
            to_device([slot for s in slots for slot in s], torch.int64, device),
            page_size,
        )

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
    def pages_read(self) -> tuple[Tensor, list[Tensor]]:
        """Distinct pages [N] int64 that the sequences hold, and for each sequence the indices of its own among them."""
        used = [
            pages[: -(-length // self.page_size)]
            for pages, (_, _, length) in zip(self.page_table, self.spans, strict=True)
        ]
        distinct, index = torch.unique(torch.cat(used).to(torch.int64), return_inverse=True)
        return distinct, list(index.split([len(pages) for pages in used]))
