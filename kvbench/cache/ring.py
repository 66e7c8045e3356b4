"""Rings: which tokens of each sequence lie in 16 bits beside the packed pages, and where. Integers only.

A ring's pages are its own, and small: those of a sequence are taken as it grows and given back as its window passes
them, so 16 bits are spent on the first tokens and on the newest alone. Sequences that share a prefix share its ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbench.cache.pages import PageTable

MOST_TOKENS = 16  # of a page in 16 bits
Copies = list[tuple[int, int]]


@dataclass(frozen=True)
class Seal:
    """A page of a sequence that is full: it can be quantized whole.

    page: in the packed cache. slots: where its tokens lie in 16 bits. first: it is its sequence's first.
    """

    page: int
    slots: NDArray[np.int64]
    first: bool


class Rings:
    """The rings of all sequences of a pool, in `pages` pages of `page_size` tokens; more are made when none is free.

    sinks: first tokens that stay. recent, window_page: whole pages before the one of the next token that stay; with
    recent None none but the sinks does.
    copies: pages to copy before anything is written, (source, destination).
    """

    def __init__(self, sinks: int, recent: int | None, window_page: int, packed_page_size: int) -> None:
        self.page_size = math.gcd(packed_page_size, MOST_TOKENS)
        self.pages = 0
        self.copies: Copies = []
        self._sinks = sinks
        self._recent = recent
        self._window_page = window_page
        self._references: list[int] = []
        self._free: list[int] = []

    def extend(self, table: PageTable, start: int) -> NDArray[np.int64]:
        """Slots in 16 bits of a sequence's tokens from `start` to its end."""
        size = self.page_size
        for block in range(start // size, -(-table.length // size)):
            if block not in table.ring:
                table.ring[block] = self._take()
        return self.slots(table, start, table.length)

    def slots(self, table: PageTable, start: int, end: int) -> NDArray[np.int64]:
        """Slots in 16 bits of a sequence's tokens from `start` to before `end`, which are in its ring."""
        size = self.page_size
        pages = np.array([table.ring[block] for block in range(start // size, -(-end // size))], dtype=np.int64)
        slots: NDArray[np.int64] = (pages[:, None] * size + np.arange(size)).reshape(-1)
        skipped = start % size
        return slots[skipped : skipped + end - start]

    def row(self, table: PageTable) -> NDArray[np.int32]:
        """Of each of a sequence's blocks of `page_size` tokens, its page in 16 bits, or -1."""
        row = np.full(-(-table.length // self.page_size), -1, dtype=np.int32)
        row[list(table.ring)] = list(table.ring.values())
        return row

    def trim(self, table: PageTable) -> None:
        """Gives back what no token after the sequence's end reads in 16 bits."""
        size = self.page_size
        start = table.length
        if self._recent is not None:
            start = max(0, (start // self._window_page - self._recent) * self._window_page)
        for block in [b for b in table.ring if b * size >= self._sinks and (b + 1) * size <= start]:
            self._give_back(table.ring.pop(block))

    def fork(self, table: PageTable, fork: PageTable) -> None:
        """The second sequence's ring: full pages are shared, the one being filled is copied."""
        for block, page in table.ring.items():
            if (block + 1) * self.page_size <= table.length:
                self._references[page] += 1
                fork.ring[block] = page
            else:
                fork.ring[block] = self._take()
                self.copies.append((page, fork.ring[block]))

    def release(self, table: PageTable) -> None:
        """Gives the sequence's ring back."""
        for page in table.ring.values():
            self._give_back(page)
        table.ring = {}

    def seals(self, table: PageTable, before: int, page_tokens: int) -> list[Seal]:
        """The sequence's pages of so many tokens that became full since it had `before` tokens."""
        return [
            Seal(table.pages[i], self.slots(table, i * page_tokens, (i + 1) * page_tokens), i == 0)
            for i in range(before // page_tokens, table.length // page_tokens)
        ]

    def _take(self) -> int:
        if not self._free:
            more = max(8, self.pages // 2)
            self._free = list(range(self.pages + more - 1, self.pages - 1, -1))
            self._references += [0] * more
            self.pages += more
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _give_back(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)
