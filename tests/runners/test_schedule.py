"""What the forward passes compute, and where it is written."""

import random

import pytest

from kvbench.cache import PagePool
from kvbench.cache.pages import pages_of, slots_of
from kvbench.runners.transformers.prefix import Flat, build_tree
from kvbench.runners.transformers.schedule import Scheduler, pages_for_one


def simulate(requests, *, pages, page_size=4, batch_tokens=16, chunk=None, most=100):
    """Runs the passes over a list as memory; what each request reads along its pages in the end, and the passes."""
    pool = PagePool(pages, page_size)
    memory = [None] * (pages * page_size)
    scheduler = Scheduler(pool, build_tree(Flat.of(requests), 3), batch_tokens, chunk)
    read, passes = {}, []
    while not scheduler.finished:
        chunks, copies = scheduler.take(most)
        assert len(chunks), "no room for the next segment"
        for source, destination in copies:
            memory[destination * page_size : (destination + 1) * page_size] = memory[
                source * page_size : (source + 1) * page_size
            ]
        slots = slots_of(pages_of(chunks.tables), chunks.starts + chunks.counts, chunks.counts, page_size)
        for token, slot in zip(chunks.tokens.tolist(), slots.tolist(), strict=True):
            memory[slot] = token
        passes.append(chunks.counts.tolist())
        scheduler.computed(chunks)
        for segment, table, completes in zip(chunks.segments, chunks.tables, chunks.completes, strict=True):
            if completes:
                held = [page * page_size + i for page in table.pages for i in range(page_size)][: table.length]
                for request in scheduler.tree.ending[segment]:
                    read[request] = [memory[slot] for slot in held]
                    scheduler.drop(segment, 1)
    assert pool.free_pages == pages
    return read, passes


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_every_request_finds_its_tokens_in_its_pages(chunk):
    """
    Whatever is shared, copied, cut or reused, each request's pages hold its own tokens when it ends; all come back.
    """
    rng = random.Random(0)
    for _ in range(60):
        stems = [[rng.randrange(50) for _ in range(rng.randrange(1, 25))] for _ in range(3)]
        requests = [rng.choice(stems) + [rng.randrange(50) for _ in range(rng.randrange(9))] for _ in range(15)]
        read, passes = simulate(requests, pages=60, chunk=chunk)

        assert [read[i] for i in range(len(requests))] == requests
        for counts in passes:
            assert sum(counts) <= 16
            assert chunk is None or all(count <= chunk for count in counts)


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_pages_for_one_sequence_are_enough_for_all(chunk):
    """
    However requests branch and nest, the pages that the longest needs alone, shared prefixes counted, never run out.
    """
    rng = random.Random(1)
    for _ in range(200):
        stems = [[rng.randrange(50) for _ in range(rng.randrange(9, 60))] for _ in range(3)]
        requests = [[*rng.choice(stems)[: rng.randint(1, 60)], rng.randrange(50)] for _ in range(15)]
        requests += [[*stems[0][: 4 * i + 1], 99] for i in range(rng.randrange(9))]  # each a little longer
        page_size = rng.choice([1, 4, 16])
        pages = pages_for_one(build_tree(Flat.of(requests), 3), max(map(len, requests)), page_size)
        read, _ = simulate(requests, pages=pages, page_size=page_size, chunk=chunk)

        assert [read[i] for i in range(len(requests))] == requests


def test_few_pages_are_enough_for_many_requests():
    """
    Depth first: a hundred requests pass through the pages of a few.
    """
    shots = list(range(24))
    requests = [[*shots, 100 + i, *range(200, 206)] for i in range(100)]
    read, _ = simulate(requests, pages=20)

    assert [read[i] for i in range(100)] == requests
