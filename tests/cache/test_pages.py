"""Who owns which page."""

import random

import numpy as np
import pytest

from kvbench.cache import OutOfPages, PagePool, PageTable
from kvbench.cache.pages import pages_of, slots_of


def grow(pool, table, tokens):
    """The slots of so many new tokens."""
    pool.extend(table, tokens)
    counts = np.array([table.length]), np.array([tokens])
    return slots_of(pages_of([table]), *counts, pool.page_size).tolist()


def test_every_token_has_a_slot_of_its_own():
    """
    However sequences grow in turns, no two tokens share a slot.
    """
    pool = PagePool(pages=12, page_size=4)
    tables = [PageTable() for _ in range(3)]
    slots = []
    for step in range(5):
        for i, table in enumerate(tables):
            slots += grow(pool, table, (step + i) % 4)

    assert len(slots) == sum(table.length for table in tables) == len(set(slots))


def test_pages_come_back_when_their_last_owner_leaves():
    """
    A page that a fork shares stays taken until both sequences are released.
    """
    pool = PagePool(pages=6, page_size=4)
    table = PageTable()
    pool.extend(table, 10)
    fork, copies = pool.fork(table)

    assert fork.pages[:2] == table.pages[:2]
    assert copies == [(table.pages[2], fork.pages[2])]
    assert pool.free_pages == 2

    pool.release(table)
    assert pool.free_pages == 3
    pool.release(fork)
    assert pool.free_pages == 6


def test_a_fork_of_full_pages_copies_nothing():
    """
    Sequences that end at a page's end share all pages, and the next token of each goes to a page of its own.
    """
    pool = PagePool(pages=6, page_size=4)
    table = PageTable()
    pool.extend(table, 8)
    fork, copies = pool.fork(table)

    assert copies == []
    assert grow(pool, table, 1) != grow(pool, fork, 1)


def test_running_out_changes_nothing():
    """
    An extension or a fork that does not fit raises, and table and pool are as before.
    """
    pool = PagePool(pages=2, page_size=4)
    table = PageTable()
    pool.extend(table, 7)

    with pytest.raises(OutOfPages):
        pool.extend(table, 2)
    with pytest.raises(OutOfPages):
        pool.fork(table)
    assert (table.length, len(table.pages), pool.free_pages) == (7, 2, 0)


def test_random_use_never_loses_or_doubles_a_page():
    """
    After any mixture of extending, forking and releasing, every page is free or owned, and all come back.
    """
    rng = random.Random(0)
    pool = PagePool(pages=40, page_size=4)
    tables = []
    for _ in range(2000):
        action = rng.random()
        try:
            if action < 0.3 or not tables:
                tables.append(PageTable())
                pool.extend(tables[-1], rng.randrange(1, 9))
            elif action < 0.5:
                tables.append(pool.fork(rng.choice(tables))[0])
            elif action < 0.75:
                pool.extend(rng.choice(tables), rng.randrange(1, 6))
            else:
                pool.release(tables.pop(rng.randrange(len(tables))))
        except OutOfPages:
            pass
        owned = {page for table in tables for page in table.pages}
        assert len(owned) + pool.free_pages == 40
        # a page that a sequence may still write to is its own
        open_pages = [table.pages[table.length // 4] for table in tables if table.length % 4]
        assert len(open_pages) == len(set(open_pages))
    for table in tables:
        pool.release(table)
    assert pool.free_pages == 40
