"""Which prefixes requests share: a tree of token segments, each computed once. Integers only.

All of it is made by sorting and by operations on whole arrays, for requests come by the ten thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvbench.cache.ranges import Grouped, Ints, ranges, starts_of

MIN_SHARED = 8  # tokens of a prefix that is worth a segment of its own


class Flat(NamedTuple):
    """Token sequences one after another: tokens [T]; of each sequence where its first token stands, and its length."""

    tokens: NDArray[np.integer]
    firsts: Ints
    lengths: Ints

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Self:
        """These sequences."""
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        tokens = np.fromiter(chain.from_iterable(sequences), np.int64, int(lengths.sum()))
        return cls(tokens, starts_of(lengths), lengths)


@dataclass(eq=False)
class Tree:
    """Segments: tokens that one or more requests have in common after their parent's tokens. A segment is a number.

    tokens: [T], of all requests. firsts: [N], where each segment's first token stands in it.
    parent: [N], a lower number, or -1 for a root; siblings are in lexicographic order.
    start, end: [N], the position of its first token and the one after its last.
    leaf: [requests], the segment that each ends with.
    exact: [N] bool, computed over exact keys and values, whatever the cache stores (see "prefill_exact").
    """

    tokens: NDArray[np.integer]
    firsts: Ints
    parent: Ints
    start: Ints
    end: Ints
    leaf: Ints
    exact: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.exact = np.zeros(len(self.parent), dtype=bool)

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def children(self) -> Grouped:
        """By segment, those that follow it; the roots follow -1."""
        return Grouped.by(self.parent, -1, len(self) + 1)

    @cached_property
    def ending(self) -> Grouped:
        """By segment, the requests that end with it."""
        return Grouped.by(self.leaf, 0, len(self))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.end.max(initial=0))

    @property
    def depth(self) -> int:
        """The most segments that one sequence is made of."""
        found, above = 0, np.arange(len(self))
        while len(above):
            found, above = found + 1, self.parent[above]
            above = above[above >= 0]
        return found

    def path(self, segment: int) -> list[int]:
        """The segments of a sequence that ends with this one, in order."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = int(self.parent[segment])
        return found[::-1]

    def with_leaves(self, parent: Ints, firsts: Ints, lengths: Ints, requests: Ints) -> Tree:
        """A segment more for each of these requests, with so many tokens, which it ends with then."""
        leaf = self.leaf.copy()
        leaf[requests] = np.arange(len(self), len(self) + len(requests))
        start = self.end[parent]
        return replace(
            self,
            firsts=np.concatenate([self.firsts, firsts]),
            parent=np.concatenate([self.parent, parent]),
            start=np.concatenate([self.start, start]),
            end=np.concatenate([self.end, start + lengths]),
            leaf=leaf,
        )


def unshared(sequences: Flat) -> Tree:
    """A tree in which every sequence is a root of its own."""
    tokens, firsts, lengths = sequences
    count = len(lengths)
    return Tree(tokens, firsts, np.full(count, -1), np.zeros_like(lengths), lengths, np.arange(count))


def build_tree(sequences: Flat, min_shared: int = MIN_SHARED, worth: int = 0) -> Tree:
    """The prefix tree of token sequences (none empty).

    min_shared: a prefix is split off where it saves at least this many tokens of each of its requests, for every
    segment is one more sequence in a batch.
    worth: tokens that segments so many deep and deeper save in all, with fewer of which nothing is shared there: a
    segment is computed in a pass after its parent's.
    """
    assert sequences.lengths.all(), "a sequence is empty"
    order = _lexicographic(sequences)
    first, length = sequences.firsts[order], sequences.lengths[order]
    shared = _shared(sequences.tokens, first, length)
    tree, saved = _levels(sequences.tokens, order, first, length, shared, min_shared, None)
    # what is lost by sharing nothing from a depth on
    lost = np.cumsum(saved[::-1])[::-1]
    if deep := np.flatnonzero((lost > 0) & (lost < worth)).tolist():
        tree, _ = _levels(sequences.tokens, order, first, length, shared, min_shared, deep[0])
    return tree


def _levels(
    tokens: NDArray[np.integer],
    order: Ints,
    first: Ints,
    length: Ints,
    shared: Ints,
    min_shared: int,
    depth: int | None,
) -> tuple[Tree, list[int]]:
    """The tree of sequences in their order, each with its `shared` tokens with the one before; tokens saved by depth.

    depth: from which on nothing is shared; None: wherever min_shared tokens are.
    """
    leaf = np.empty(len(order), dtype=np.int64)
    found: list[tuple[Ints, Ints, Ints, Ints]] = []
    saved: list[int] = []
    count = 0
    # the sequences that go on, in order, each after its segment `parent`, which ends at position `start`
    places, parent, start = np.arange(len(order)), np.full(len(order), -1), np.zeros(len(order), dtype=np.int64)
    while len(places):
        # a segment begins at another parent, or where too little is shared with the sequence before
        begins = np.ones(len(places), dtype=bool)
        if len(found) != depth:
            begins[1:] = (parent[1:] != parent[:-1]) | (shared[places[1:]] < start[1:] + min_shared)
        own = np.flatnonzero(begins)
        end = np.minimum.reduceat(np.where(begins, length[places], shared[places]), own)
        found.append((first[places[own]] + start[own], parent[own], start[own], end))
        saved.append(int(((np.diff(own, append=len(places)) - 1) * (end - start[own])).sum()))
        which = np.cumsum(begins) - 1
        parent, start = count + which, end[which]
        count += len(own)
        ended = length[places] == start
        leaf[order[places[ended]]] = parent[ended]
        places, parent, start = places[~ended], parent[~ended], start[~ended]
    none = np.empty(0, dtype=np.int64)
    firsts, parents, starts, ends = (np.concatenate(column) for column in zip((none,) * 4, *found, strict=True))
    return Tree(tokens, firsts, parents, starts, ends, leaf), saved


def _lexicographic(sequences: Flat) -> Ints:
    """The sequences' order; of equal ones the first comes first."""
    # token ids are not negative, so they are in the order of their bytes from the highest on
    raw = sequences.tokens.astype(">u4").tobytes()
    ends = sequences.firsts + sequences.lengths
    keys = [raw[4 * first : 4 * end] for first, end in zip(sequences.firsts.tolist(), ends.tolist(), strict=True)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _shared(tokens: NDArray[np.integer], first: Ints, length: Ints) -> Ints:
    """How many leading tokens each sequence has in common with the one before it."""
    most = np.minimum(length[1:], length[:-1])
    differing = np.flatnonzero(tokens[ranges(first[1:], most)] != tokens[ranges(first[:-1], most)])
    begins = starts_of(most)
    # of each pair, the first place that differs; beyond its own places where none does
    place = np.append(differing, most.sum())[np.searchsorted(differing, begins)]
    return np.concatenate([[0], np.minimum(place - begins, most)]) if len(length) else length
