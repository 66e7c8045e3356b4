"""What the logit correction learns, and what it adds to scores."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvbench.attention import Batch, attend
from kvbench.cache import PagedCache
from kvbench.cache.pages import PagePool, PageTable
from kvbench.schemes import Scheme, Window
from kvbench.transforms import Sample, all_transforms

TOKENS, HEADS, GROUP, HEAD_DIM = 2048, 2, 2, 64
correction = all_transforms()["correction"]


def sample(stored, keys, documents=4):
    positions = torch.arange(TOKENS).repeat(documents)
    queries = torch.randn(len(positions), HEADS * GROUP, HEAD_DIM)
    return Sample(keys, queries, positions, None, TOKENS, 1 / 8, stored)


def factor_of(stored, keys):
    return correction.learn(sample(stored, keys))["factor"]


def test_its_sign_is_that_of_the_code():
    """
    Where a key is what is stored and noise, the stored score lacks half the noise's variance; where what is stored is
    the key and noise, it has as much too much. Relative to |k|² of what is stored, as theory says to a fifth.
    """
    shape = (4 * TOKENS, HEADS, HEAD_DIM)
    stored, noise = torch.randn(shape), 0.3 * torch.randn(shape)
    ideal = 0.5 / 8 * 0.09 / HEAD_DIM  # scaling/2 · σ² / E[|k|²]

    fitted = factor_of(lambda x: x - noise[: len(x)], stored[:TOKENS].repeat(4, 1, 1) + noise[:TOKENS].repeat(4, 1, 1))
    rounded = factor_of(lambda x: x + noise[: len(x)], stored)

    assert_close(fitted / ideal, torch.ones(4), rtol=0, atol=0.2)
    assert_close(rounded / ideal, torch.full((4,), -1 / 1.09), rtol=0, atol=0.2)


def test_what_is_stored_as_it_is_needs_none():
    """
    An exact cache has the factor 0.
    """
    keys = torch.randn(4 * TOKENS, HEADS, HEAD_DIM)

    assert not factor_of(lambda x: x, keys).any()


def test_pieces_of_documents_are_left_out():
    """
    What follows from a position other than 0 on has keys that are not there.
    """
    keys = torch.randn(4 * TOKENS, HEADS, HEAD_DIM)
    whole = sample(lambda x: 0.9 * x, keys)
    first = replace(whole, keys=keys[:TOKENS], queries=whole.queries[:TOKENS], positions=whole.positions[:TOKENS])
    later = replace(whole, positions=torch.cat([whole.positions[:TOKENS], whole.positions[TOKENS:] + 5]))

    assert torch.equal(correction.learn(later)["factor"], correction.learn(first)["factor"])


def test_keys_that_a_layer_does_not_read_do_not_count():
    """
    Behind a sliding window of 100 tokens: what rows are stored as that no query of the later half reads is nothing.
    """
    keys = torch.randn(TOKENS, HEADS, HEAD_DIM)
    seen = TOKENS // 2 - 99

    def stored(rows):
        return torch.cat([0.5 * rows[:seen], rows[seen:]])

    whole = sample(stored, keys, documents=1)
    assert not correction.learn(replace(whole, window=100))["factor"].any()
    assert correction.learn(replace(whole, window=101))["factor"].any()
    assert correction.learn(whole)["factor"].any()


@pytest.mark.parametrize("window", [None, Window(4, 0)], ids=["packed", "window"])
def test_attention_lifts_the_keys_it_reads_packed(window):
    """
    Scores of packed keys get factor · |q|² · |k|² before scaling, those of keys in 16 bits nothing.
    """
    scheme = replace(Scheme.parse("int4", "hadamard+correction:none"), window=window)
    tokens, page = 150, 16
    factor = torch.tensor([0.01, -0.02, 0.005, 0.0])
    learned = [(({}, {"factor": factor}), ())]
    shapes = [(HEADS, HEAD_DIM)]
    k, v = torch.randn(2, tokens, HEADS, HEAD_DIM, dtype=torch.float64)
    q = torch.randn(tokens, HEADS * GROUP, HEAD_DIM, dtype=torch.float64)
    made = [
        PagedCache(shapes, one, pages=10, page_size=page, learned=learned, model_dtype=torch.float64)
        for one in (scheme, scheme.exact(torch.float64))
    ]
    table = PageTable()
    PagePool(10, page).extend(table, tokens)
    batch = Batch.make([table], [tokens], page)
    for cache in made:
        cache.append(0, k, v, batch.slot_mapping, torch.arange(tokens))
    exact = None if window is None else made[1]

    got = attend(q, made[0], 0, batch, impl="reference", scaling=0.2, exact=exact, window=window)

    pages = torch.tensor(table.pages)
    both = [[x.transpose(1, 2).flatten(0, 1)[:tokens] for x in cache.read(0, pages, torch.float64)] for cache in made]
    near = torch.zeros(tokens, tokens, dtype=torch.bool)
    if window is not None:
        near = (torch.arange(tokens) < 4) | (torch.arange(tokens) >= torch.arange(tokens)[:, None] // 64 * 64)
    turned = scheme.key.query(q, learned[0][0])
    for head in range(HEADS * GROUP):
        (packed, packed_v), (kept, kept_v) = ([x[:, head // GROUP] for x in one] for one in both)
        own = turned[:, head]
        lifted = own @ packed.T + factor[head].double() * own.square().sum(-1)[:, None] * packed.square().sum(-1)
        scores = torch.where(near, own @ kept.T, lifted) * 0.2
        p = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf).softmax(-1)
        want = (p * ~near) @ packed_v + (p * near) @ kept_v
        assert_close(got[:, head], want)
