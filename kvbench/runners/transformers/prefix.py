"""Which prefixes requests share: a tree of token segments, each computed once. Integers only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Tokens = Sequence[int]
MIN_SHARED = 8  # tokens of a prefix that is worth a segment of its own


@dataclass(eq=False)
class Segment:
    """Tokens that one or more requests have in common after their parent's tokens.

    start: the position of its first token. ending: the requests that end with this segment.
    exact: it is computed over exact keys and values, whatever the cache stores (see "prefill_exact").
    """

    parent: Segment | None
    start: int
    tokens: Tokens
    children: list[Segment] = field(default_factory=list)
    ending: list[int] = field(default_factory=list)
    exact: bool = False

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.tokens)

    @property
    def path(self) -> list[Segment]:
        """The segments of a sequence that ends with this one, in order."""
        found: list[Segment] = []
        segment: Segment | None = self
        while segment is not None:
            found.append(segment)
            segment = segment.parent
        return found[::-1]


def segments(roots: Sequence[Segment]) -> Iterator[Segment]:
    """Every segment of a tree, a parent before its children."""
    stack = list(roots)
    while stack:
        segment = stack.pop()
        yield segment
        stack += segment.children


def longest(roots: Sequence[Segment]) -> int:
    """Tokens of the longest sequence of a tree."""
    return max((segment.end for segment in segments(roots)), default=0)


def depth(roots: Sequence[Segment]) -> int:
    """The most segments that one sequence of a tree is made of."""
    found: dict[Segment | None, int] = {None: 0}
    for segment in segments(roots):
        found[segment] = found[segment.parent] + 1
    return max(found.values())


def build_tree(sequences: Sequence[Tokens], min_shared: int = MIN_SHARED) -> list[Segment]:
    """Roots of the prefix tree of token sequences (none empty), in lexicographic order.

    min_shared: a prefix is split off where it saves at least this many tokens of each of its requests, for every
    segment is one more sequence in a batch.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    shared = [0] + [_common(sequences[a], sequences[b]) for a, b in itertools.pairwise(order)]
    roots: list[Segment] = []
    # intervals low..high of `order` whose sequences share their first `depth` tokens, which `parent` ends with
    intervals: list[tuple[int, int, int, Segment | None]] = [(0, len(order), 0, None)]
    while intervals:
        low, high, depth, parent = intervals.pop()
        while low < high:
            tokens = sequences[order[low]]
            if len(tokens) == depth:
                assert parent is not None, "a sequence is empty"
                parent.ending.append(order[low])
                low += 1
                continue
            following = low + 1
            end = len(tokens)
            while following < high and shared[following] >= depth + min_shared:
                end = min(end, shared[following])
                following += 1
            segment = Segment(parent, depth, tokens[depth:end])
            (roots if parent is None else parent.children).append(segment)
            intervals.append((low, following, end, segment))
            low = following
    return roots


def _common(a: Tokens, b: Tokens) -> int:
    """Number of leading tokens that are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
