"""Which tokens the next forward pass computes, and in which slots they are written. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbench.cache import OutOfPages, PagePool, PageTable
from kvbench.runners.transformers.prefix import Segment, depth, longest

Copies = list[tuple[int, int]]  # pages to copy before a pass, (source, destination)


@dataclass(eq=False)
class Work:
    """A segment being computed: its sequence's pages, and how many of its tokens are done."""

    segment: Segment
    table: PageTable | None = None
    done: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence in one pass. start: the position of the first; slots: where each is written."""

    segment: Segment
    table: PageTable
    start: int
    tokens: Sequence[int]
    slots: list[int]

    @property
    def completes(self) -> bool:
        """This chunk ends its segment."""
        return self.start + len(self.tokens) == self.segment.end


@dataclass
class _Open:
    """A computed segment whose pages are still wanted by `users` children and endings."""

    table: PageTable
    users: int


@dataclass
class Scheduler:
    """Computes a prefix tree depth first, so that few sequences hold pages at a time.

    batch_tokens: tokens of one pass at most. chunk: of one sequence in one pass, None for no limit.
    A segment starts only when the pool has pages for all of it, and beside others only where enough are left for one
    whole sequence: so a pool with pages for one (`pages_for_one`) computes all, if nothing else takes of them.
    """

    pool: PagePool
    roots: Sequence[Segment]
    batch_tokens: int
    chunk: int | None = None
    _stack: list[Work] = field(init=False)
    _open: dict[Segment, _Open] = field(init=False, default_factory=dict)
    _spare: int = field(init=False)

    def __post_init__(self) -> None:
        self._stack = [Work(root) for root in reversed(self.roots)]
        self._spare = pages_for_one(self.roots, longest(self.roots), self.pool.page_size)

    @property
    def finished(self) -> bool:
        """Every segment has been computed."""
        return not self._stack

    def take(self, most: int, others: int = 0) -> tuple[list[Chunk], Copies]:
        """The next pass, of at most `most` sequences, and the page copies to make before it.

        others: tokens that the pass has besides, of sequences that are being decoded.

        No chunk comes where the pool has no room for the next segment.
        """
        chunks: list[Chunk] = []
        copies: Copies = []
        unfinished: list[Work] = []
        budget = max(1, self.batch_tokens - others)
        while self._stack and budget > 0 and len(chunks) < most:
            work = self._stack.pop()
            segment = work.segment
            held = segment.start // self.pool.page_size if work.table is None else len(work.table.pages)
            new = self.pool.pages_for(segment.end) - held
            if chunks and new and self.pool.free_pages - new < self._spare:
                self._stack.append(work)
                break
            try:
                if work.table is None:
                    work.table, copied = self._inherit(segment)
                    copies += copied
                self.pool.reserve(work.table, segment.end)
            except OutOfPages:
                self._stack.append(work)
                break
            count = min(len(segment.tokens) - work.done, budget, self.chunk or budget)
            slots = self.pool.extend(work.table, count)
            tokens = segment.tokens[work.done : work.done + count]
            chunks.append(Chunk(segment, work.table, segment.start + work.done, tokens, slots))
            work.done += count
            budget -= count
            if chunks[-1].completes:
                self._open[segment] = _Open(work.table, len(segment.children) + len(segment.ending))
            else:
                unfinished.append(work)
        self._stack += reversed(unfinished)
        return chunks, copies

    def computed(self, chunks: Sequence[Chunk]) -> None:
        """The pass of these chunks is over: the children of the segments it completed may start."""
        for chunk in chunks:
            self.pool.trim(chunk.table)
            if chunk.completes:
                self._stack += [Work(child) for child in reversed(chunk.segment.children)]

    def pages(self, segment: Segment) -> list[int]:
        """The pages of a computed segment's sequence."""
        return self._open[segment].table.pages

    def claim(self, segment: Segment) -> tuple[PageTable, Copies]:
        """The sequence of one request that ends with a computed segment: the caller's to write to and to release.

        Raises:
            OutOfPages: no page for its copy; nothing changed.
        """
        entry = self._open[segment]
        if entry.users == 1:
            del self._open[segment]
            return entry.table, []
        table, copies = self.pool.fork(entry.table)
        entry.users -= 1
        return table, copies

    def drop(self, segment: Segment) -> None:
        """One request that ends with a computed segment wants no more of it."""
        entry = self._open[segment]
        entry.users -= 1
        if entry.users == 0:
            self.pool.release(entry.table)
            del self._open[segment]

    def _inherit(self, segment: Segment) -> tuple[PageTable, Copies]:
        return (PageTable(), []) if segment.parent is None else self.claim(segment.parent)


def pages_for_one(roots: Sequence[Segment], tokens: int, page_size: int) -> int:
    """Pages that any one of a tree's sequences, of so many tokens at most, needs to be computed.

    Its own, and one for each of its segments: what follows a shared segment writes to a copy of its last page.
    """
    return -(-tokens // page_size) + depth(roots)
