"""Which prefixes requests share."""

from collections import Counter
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.runners.transformers.prefix import Flat, build_tree, unshared

SHORT = st.lists(st.integers(0, 2), min_size=1, max_size=12)
# sequences that begin with one of a few stems, some of them twice
REQUESTS = st.lists(SHORT, min_size=1, max_size=3).flatmap(
    lambda stems: st.lists(st.builds(list.__add__, st.sampled_from(stems), SHORT | st.just([])), max_size=12)
)


def tokens_of(tree, segment):
    """The tokens of a segment."""
    first = tree.firsts[segment]
    return tree.tokens[first : first + tree.end[segment] - tree.start[segment]].tolist()


def nested(tree, segment=-1):
    """What follows a segment, in order: (tokens, requests that end there, what follows) of each child."""
    return [(tokens_of(tree, s), tree.ending[s], nested(tree, s)) for s in tree.children[segment + 1]]


def expected(requests, chosen, start, min_shared):
    """The same by definition: what begins alike for `min_shared` tokens goes together as far as it is alike."""
    groups = {}
    for i in sorted(chosen, key=requests.__getitem__):
        alone = len(requests[i]) < start + min_shared
        groups.setdefault(i if alone else tuple(requests[i][: start + min_shared]), []).append(i)
    found = []
    for group in groups.values():
        columns = zip(*(requests[i] for i in group), strict=False)
        shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        ending = [i for i in group if requests[i] == shared]
        rest = [i for i in group if requests[i] != shared]
        found.append((shared[start:], ending, expected(requests, rest, len(shared), min_shared)))
    return found


@settings(max_examples=150)
@given(REQUESTS, st.integers(1, 4), st.integers(0, 40))
def test_depths_that_save_too_little_are_given_up(requests, min_shared, worth):
    """
    Nothing is shared from that depth on, from which on all sharing saves fewer tokens than it must; above it all is.
    """
    sequences = Flat.of(requests)
    whole, tree = build_tree(sequences, min_shared), build_tree(sequences, min_shared, worth)
    shared = [len(whole.path(i)) - 1 for i in range(len(whole))]
    used = Counter(segment for leaf in whole.leaf for segment in whole.path(leaf))
    saved = [
        sum((used[i] - 1) * (whole.end[i] - whole.start[i]) for i in range(len(whole)) if shared[i] >= depth)
        for depth in range(whole.depth)
    ]
    cut = next((depth for depth, tokens in enumerate(saved) if 0 < tokens < worth), None)

    assert tree.depth == (whole.depth if cut is None else cut + 1)
    tokens = [int((one.end - one.start).sum()) for one in (whole, tree)]
    assert tokens[1] - tokens[0] == (0 if cut is None else saved[cut])
    for request, leaf in zip(requests, tree.leaf.tolist(), strict=True):
        assert [token for segment in tree.path(leaf) for token in tokens_of(tree, segment)] == request


@settings(max_examples=150)
@given(REQUESTS, st.integers(1, 6))
def test_requests_go_together_as_far_as_they_are_alike(requests, min_shared):
    """
    The tree made by sorting is the one that its definition gives a request at a time, in the same order.
    """
    tree = build_tree(Flat.of(requests), min_shared)

    assert nested(tree) == expected(requests, range(len(requests)), 0, min_shared)
    assert (tree.parent < range(len(tree))).all()
    for request, leaf in zip(requests, tree.leaf.tolist(), strict=True):
        assert [token for segment in tree.path(leaf) for token in tokens_of(tree, segment)] == request
    assert tree.depth == max((len(tree.path(leaf)) for leaf in tree.leaf.tolist()), default=0)
    assert tree.longest == max(map(len, requests), default=0)


def test_the_choices_of_a_question_share_it():
    """
    Four answers to one question after common shots: shots and question are computed once.
    """
    shots, questions = list(range(100)), [list(range(200, 220)), list(range(300, 330))]
    requests = [shots + question + [500 + choice] * 3 for question in questions for choice in range(4)]
    tree = build_tree(Flat.of(requests))

    assert (tree.end - tree.start).sum() == 100 + 20 + 30 + 8 * 3


def test_equal_requests_are_one_segment():
    """
    A request that comes twice, or that is a prefix of another, adds no tokens.
    """
    tree = build_tree(Flat.of([list(range(20)), list(range(20)), list(range(12))]))

    assert (tree.end - tree.start).sum() == 20
    assert tree.leaf[0] == tree.leaf[1] != tree.leaf[2]


@pytest.mark.parametrize("token", [0, 255, 256, 2**31])
def test_any_token_id_sorts_as_a_number(token):
    """
    Siblings stand in the order of their token ids, however many bytes these have.
    """
    tree = build_tree(Flat.of([[token + 1], [token]]))

    assert nested(tree) == [([token], [1], []), ([token + 1], [0], [])]


def test_leaves_follow_what_they_share():
    """
    A segment of its own for some requests comes after their shared prefix, and those requests end with it.
    """
    sequences = Flat.of([[1, 2, 3, 7, 8], [1, 2, 3, 9], [1, 2, 3]])
    tree = build_tree(sequences._replace(lengths=np.array([3, 3, 3])), min_shared=1)
    requests = np.array([0, 1])
    both = tree.with_leaves(tree.leaf[requests], sequences.firsts[requests] + 3, np.array([2, 1]), requests)

    assert nested(both) == [([1, 2, 3], [2], [([7, 8], [0], []), ([9], [1], [])])]


def test_unshared_requests_are_roots():
    """
    Without sharing, each request is a segment.
    """
    assert nested(unshared(Flat.of([[5, 6], [5, 6]]))) == [([5, 6], [0], []), ([5, 6], [1], [])]
