"""Which tokens the next forward pass computes, and in which pages they are written. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvbench.cache import OutOfPages, PagePool, PageTable
from kvbench.cache.ranges import Ints, ranges
from kvbench.runners.transformers.prefix import Tree

Copies = list[tuple[int, int]]  # pages to copy before a pass, (source, destination)


@dataclass(frozen=True, eq=False)
class Chunks:
    """Tokens of some sequences in one pass, an entry each; those that are computed exactly come first.

    segments: which of `tree`. tables: their sequences' pages, these tokens' included. starts: the position of the first
    token. counts: how many.
    """

    tree: Tree
    segments: Ints
    tables: list[PageTable]
    starts: Ints
    counts: Ints

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def tokens(self) -> Ints:
        """[T], one chunk's after another's."""
        done = self.starts - self.tree.start[self.segments]
        tokens = self.tree.tokens[ranges(self.tree.firsts[self.segments] + done, self.counts)]
        return tokens.astype(np.int64, copy=False)

    @property
    def positions(self) -> Ints:
        """[T] of the tokens within their sequences."""
        return ranges(self.starts, self.counts)

    @property
    def completes(self) -> NDArray[np.bool_]:
        """[n], this chunk ends its segment."""
        made: NDArray[np.bool_] = self.starts + self.counts == self.tree.end[self.segments]
        return made

    @property
    def exact(self) -> int:
        """How many are computed exactly."""
        return int(self.tree.exact[self.segments].sum())


@dataclass
class Scheduler:
    """Computes a prefix tree depth first, so that few sequences hold pages at a time.

    batch_tokens: tokens of one pass at most. chunk: of one sequence in one pass, None for no limit.
    A segment starts only when the pool has pages for all of it, and beside others only where enough are left for one
    whole sequence: so a pool with pages for one (`pages_for_one`) computes all, if nothing else takes of them.
    """

    pool: PagePool
    tree: Tree
    batch_tokens: int
    chunk: int | None = None
    _stack: list[int] = field(init=False)  # segments to compute, the next one last
    _tables: dict[int, PageTable] = field(init=False, default_factory=dict)  # of segments begun
    _users: list[int] = field(init=False)  # of a segment, children and endings that want its pages
    _spare: int = field(init=False)
    # of the tree; one at a time they are read faster from lists
    _parent: list[int] = field(init=False)
    _end: list[int] = field(init=False)
    _children: list[int] = field(init=False)
    _bounds: list[int] = field(init=False)

    def __post_init__(self) -> None:
        tree = self.tree
        self._parent, self._end = tree.parent.tolist(), tree.end.tolist()
        self._children, self._bounds = tree.children.order.tolist(), tree.children.bounds.tolist()
        self._users = (tree.children.counts[1:] + tree.ending.counts).tolist()
        self._spare = pages_for_one(tree, tree.longest, self.pool.page_size)
        self._stack = self._following(-1)

    @property
    def finished(self) -> bool:
        """Every segment has been computed."""
        return not self._stack

    def take(self, most: int, others: int = 0) -> tuple[Chunks, Copies]:
        """The next pass, of at most `most` sequences, and the page copies to make before it.

        others: tokens that the pass has besides, of sequences that are being decoded.

        No chunk comes where the pool has no room for the next segment.
        """
        pool, stack, size = self.pool, self._stack, self.pool.page_size
        segments: list[int] = []
        tables: list[PageTable] = []
        counts: list[int] = []
        copies: Copies = []
        unfinished: list[int] = []
        budget = max(1, self.batch_tokens - others)
        most_of_one = self.chunk or budget
        while stack and budget > 0 and len(segments) < most:
            segment = stack[-1]
            end, table, parent = self._end[segment], self._tables.get(segment), self._parent[segment]
            if segments:
                # full pages of what comes before are shared, and its last one is copied
                held = len(table.pages) if table else self._end[parent] // size if parent >= 0 else 0
                new = -(-end // size) - held
                if new and pool.free_pages - new < self._spare:
                    break
            try:
                if table is None:
                    table, copied = (PageTable(), []) if parent < 0 else self.claim(parent)
                    copies += copied
                    self._tables[segment] = table
                pool.reserve(table, end)
            except OutOfPages:
                break
            stack.pop()
            count = min(end - table.length, budget, most_of_one)
            table.length += count
            budget -= count
            segments.append(segment)
            tables.append(table)
            counts.append(count)
            if table.length < end:
                unfinished.append(segment)
        stack += reversed(unfinished)
        if self.tree.exact.any():
            order = sorted(range(len(segments)), key=lambda i: not self.tree.exact[segments[i]])
            segments, counts = [segments[i] for i in order], [counts[i] for i in order]
            tables = [tables[i] for i in order]
        ends = np.array([table.length for table in tables], dtype=np.int64)
        taken = np.array(counts, dtype=np.int64)
        return Chunks(self.tree, np.array(segments, dtype=np.int64), tables, ends - taken, taken), copies

    def computed(self, chunks: Chunks) -> None:
        """The pass of these chunks is over: the children of the segments it completed may start."""
        for table in chunks.tables:
            self.pool.trim(table)
        for segment in chunks.segments[chunks.completes].tolist():
            self._stack += self._following(segment)

    def pages(self, segment: int) -> list[int]:
        """The pages of a computed segment's sequence."""
        return self._tables[segment].pages

    def claim(self, segment: int) -> tuple[PageTable, Copies]:
        """The sequence of one request that ends with a computed segment: the caller's to write to and to release.

        Raises:
            OutOfPages: no page for its copy; nothing changed.
        """
        if self._users[segment] == 1:
            return self._tables.pop(segment), []
        table, copies = self.pool.fork(self._tables[segment])
        self._users[segment] -= 1
        return table, copies

    def drop(self, segment: int, requests: int) -> None:
        """So many requests that end with a computed segment want no more of it."""
        self._users[segment] -= requests
        if self._users[segment] == 0:
            self.pool.release(self._tables.pop(segment))

    def _following(self, segment: int) -> list[int]:
        """A segment's children, the first one last."""
        return self._children[self._bounds[segment + 1] : self._bounds[segment + 2]][::-1]


def pages_for_one(tree: Tree, tokens: int, page_size: int) -> int:
    """Pages that any one of a tree's sequences, of so many tokens at most, needs to be computed.

    Its own, and one for each of its segments: what follows a shared segment writes to a copy of its last page.
    """
    return -(-tokens // page_size) + tree.depth
