"""Which prefixes requests share."""

import random

import pytest

from kvbench.runners.transformers.prefix import build_tree


def paths(roots):
    """For each request, the tokens along its path from a root, and all segments."""
    found, segments = {}, []
    stack = [(root, []) for root in roots]
    while stack:
        segment, before = stack.pop()
        assert segment.start == len(before)
        assert segment.tokens
        tokens = before + list(segment.tokens)
        segments.append(segment)
        for request in segment.ending:
            found[request] = tokens
        stack += [(child, tokens) for child in segment.children]
    return found, segments


@pytest.mark.parametrize("min_shared", [1, 3, 8])
def test_every_request_is_the_path_to_its_segment(min_shared):
    """
    Along its path every request finds exactly its tokens, for random requests that share prefixes of all lengths.
    """
    rng = random.Random(0)
    for _ in range(100):
        stems = [[rng.randrange(3) for _ in range(rng.randrange(1, 20))] for _ in range(3)]
        requests = [rng.choice(stems) + [rng.randrange(3) for _ in range(rng.randrange(6))] for _ in range(12)]
        found, segments = paths(build_tree(requests, min_shared))

        assert [found[i] for i in range(len(requests))] == requests
        # a segment that several requests pass saves at least min_shared tokens of each
        shared = [s for s in segments if s.children or len(s.ending) > 1]
        assert all(len(s.tokens) >= min_shared for s in shared)


def test_the_choices_of_a_question_share_it():
    """
    Four answers to one question after common shots: shots and question are computed once.
    """
    shots, questions = list(range(100)), [list(range(200, 220)), list(range(300, 330))]
    requests = [shots + question + [500 + choice] * 3 for question in questions for choice in range(4)]
    _, segments = paths(build_tree(requests))

    assert sum(len(s.tokens) for s in segments) == 100 + 20 + 30 + 8 * 3


def test_equal_requests_are_one_segment():
    """
    A request that comes twice, or that is a prefix of another, adds no tokens.
    """
    requests = [list(range(20)), list(range(20)), list(range(12))]
    found, segments = paths(build_tree(requests))

    assert sum(len(s.tokens) for s in segments) == 20
    assert len(found) == 3
