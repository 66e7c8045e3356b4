"""Who owns which page. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvbench.cache.ranges import Ints, ranges


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than were asked for; nothing was taken."""


@dataclass(slots=True)
class PageTable:
    """One sequence's pages, in order, and how many of its tokens they hold.

    ring: its pages in 16 bits, by their place among its blocks of that size; see `Rings`.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    ring: dict[int, int] = field(default_factory=dict)


def pages_of(tables: Sequence[PageTable], width: int = 0) -> NDArray[np.int32]:
    """[B, most pages] of these sequences, or `width` where that is more, padded with 0."""
    counts = [len(table.pages) for table in tables]
    made = np.zeros((len(tables), max(width, *counts)), dtype=np.int32)
    pages = np.fromiter(chain.from_iterable(table.pages for table in tables), np.int32, sum(counts))
    made[np.arange(made.shape[1]) < np.array(counts)[:, None]] = pages
    return made


def slots_of(pages: NDArray[np.int32], lengths: Ints, counts: Ints, page_size: int) -> Ints:
    """[T] slots (page * page_size + offset) of the last so many tokens of sequences with these page tables [B, N]."""
    positions = ranges(lengths - counts, counts)
    rows = np.repeat(np.arange(len(counts)), counts)
    slots: Ints = pages[rows, positions // page_size].astype(np.int64) * page_size + positions % page_size
    return slots


class Ring(Protocol):
    """What else sequences share and give back beside their pages."""

    def fork(self, table: PageTable, fork: PageTable) -> None: ...
    def trim(self, table: PageTable) -> None: ...
    def release(self, table: PageTable) -> None: ...


class PagePool:
    """A fixed number of pages, each counted by the sequences that share it. rings: of what lies in 16 bits too."""

    def __init__(self, pages: int, page_size: int, rings: Ring | None = None) -> None:
        self.page_size = page_size
        self._rings = rings
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))  # the lowest page is taken first

    @property
    def pages(self) -> int:
        return len(self._references)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def reserve(self, table: PageTable, tokens: int) -> None:
        """Gives `table` pages enough for `tokens` tokens in all.

        Raises:
            OutOfPages: there are not enough; the table is as before.
        """
        wanted = self.pages_for(tokens) - len(table.pages)
        if wanted > len(self._free):
            raise OutOfPages(f"{wanted} pages wanted, {len(self._free)} of {len(self._references)} free")
        if wanted > 0:
            taken = self._free[: -wanted - 1 : -1]
            del self._free[-wanted:]
            for page in taken:
                self._references[page] = 1
            table.pages += taken

    def extend(self, table: PageTable, tokens: int) -> None:
        """Makes `tokens` new tokens part of the sequence; `slots_of` says where they are written.

        Raises:
            OutOfPages: as `reserve`.
        """
        self.reserve(table, table.length + tokens)
        table.length += tokens

    def fork(self, table: PageTable) -> tuple[PageTable, list[tuple[int, int]]]:
        """A second sequence with the same tokens, and the page copies (source, destination) that it needs.

        Full pages are shared; the last one, if it is not full, is copied, for both sequences will write to it.

        Raises:
            OutOfPages: no page for that copy; nothing changed.
        """
        full = table.length // self.page_size
        fork = PageTable(table.pages[:full], table.length)
        if table.length % self.page_size == 0:
            copies = []
        else:
            self.reserve(fork, table.length)
            copies = [(table.pages[full], fork.pages[full])]
        for page in table.pages[:full]:
            self._references[page] += 1
        if self._rings is not None:
            self._rings.fork(table, fork)
        return fork, copies

    def trim(self, table: PageTable) -> None:
        """Gives back what no later token of the sequence reads in 16 bits."""
        if self._rings is not None:
            self._rings.trim(table)

    def release(self, table: PageTable) -> None:
        """Gives the sequence's pages back; one that others share stays theirs."""
        for page in reversed(table.pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
        if self._rings is not None:
            self._rings.release(table)
        table.pages, table.length = [], 0
