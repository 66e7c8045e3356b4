"""What must hold for every value, not for those that someone thought of."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbench.cache.pages import OutOfPages, PagePool, PageTable, pages_of, slots_of
from kvbench.dtypes import Tiers, Trellis, all_dtypes
from kvbench.results import name_of
from kvbench.yaml_text import ConfigError, Loader, apply_setting, read_document

PACKED = [
    d for d in all_dtypes().values() if d.code_bits < 8 and not (d.learns or isinstance(d.decode, Tiers | Trellis))
]
PACKED += [d for d in all_dtypes().values() if isinstance(d.decode, Trellis) and len(d.decode.parts) == 1]
# one for each way to pack
PACKED = list({(d.code_bits, d.word_bits, type(d).pack): d for d in reversed(PACKED)}.values())

# what JSON holds, and a YAML too; YAML has no half characters, and a file none that are not seen
texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u0085\u2028\u2029\ufeff"), max_size=12
)
whole = st.integers(-(2**63), 2**63 - 1)
scalars = st.one_of(st.none(), st.booleans(), whole, st.floats(allow_nan=False), texts)
values = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=12)


# ---- packing


@pytest.mark.parametrize("dtype", PACKED, ids=lambda dtype: dtype.name)
@settings(deadline=None)
@given(data=st.data())
def test_packing_loses_no_code(dtype, data):
    """
    Any codes of any head_dim that fills whole words come back, and take the bytes that are counted for them.
    """
    head_dim = data.draw(st.integers(1, 12)) * dtype.head_dim_multiple
    codes = torch.tensor(
        data.draw(st.lists(st.integers(0, 2**dtype.code_bits - 1), min_size=head_dim, max_size=head_dim)),
        dtype=torch.int32,
    )
    packed = dtype.pack(codes)

    assert torch.equal(dtype.unpack(packed), codes)
    assert packed.numel() == dtype.code_bytes(head_dim)


# ---- pages


class Pages(RuleBasedStateMachine):
    """Sequences that grow, fork and end in any order."""

    TOTAL, SIZE = 12, 4

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.TOTAL, self.SIZE)
        self.tables: list[PageTable] = []

    @rule(tokens=st.integers(0, 20))
    def begin(self, tokens):
        table = PageTable()
        try:
            self.pool.extend(table, tokens)
        except OutOfPages:
            assert table == PageTable()
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.integers(0, 9))
    def grow(self, data, tokens):
        table = data.draw(st.sampled_from(self.tables))
        before = list(table.pages), table.length
        try:
            self.pool.extend(table, tokens)
        except OutOfPages:
            assert (table.pages, table.length) == before
        else:
            counts = np.array([table.length]), np.array([tokens])
            slots = slots_of(pages_of([table]), *counts, self.SIZE).tolist()
            assert len(set(slots)) == len(slots) == tokens
            others = {
                p * self.SIZE + i
                for one in self.tables
                if one is not table
                for p in one.pages
                for i in range(self.SIZE)
            }
            assert not others & set(slots)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        table = data.draw(st.sampled_from(self.tables))
        try:
            fork, copies = self.pool.fork(table)
        except OutOfPages:
            return
        assert fork.length == table.length
        assert len(copies) == (table.length % self.SIZE > 0)
        self.tables.append(fork)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data):
        table = data.draw(st.sampled_from(self.tables))
        self.pool.release(table)
        assert table == PageTable()

    @invariant()
    def every_page_is_free_or_held(self):
        held = {page for table in self.tables for page in table.pages}
        assert len(held) + self.pool.free_pages == self.TOTAL
        assert all(self.pool.pages_for(table.length) <= len(table.pages) for table in self.tables)


TestPages = Pages.TestCase
TestPages.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


# ---- identities


@given(st.dictionaries(texts, values, max_size=4), st.randoms())
def test_a_name_hangs_on_what_is_said_alone(identity, shuffle):
    """
    The order of keys changes no cell's name, nor does a way through JSON; it fits every file system.
    """
    keys = list(identity)
    shuffle.shuffle(keys)

    assert name_of("a slug/of x", {key: identity[key] for key in keys}) == name_of("a slug/of x", identity)
    assert name_of("x", json.loads(json.dumps(identity))) == name_of("x", identity)
    assert len(name_of("é" * 500, identity)) <= 140


@given(st.dictionaries(texts, scalars, min_size=1, max_size=3), st.data())
def test_another_value_is_another_name(identity, data):
    """
    Two identities that differ in a value have two names.
    """
    key = data.draw(st.sampled_from(list(identity)))
    other = identity | {key: [identity[key]]}

    assert name_of("x", other) != name_of("x", identity)


# ---- YAML and --set


def same(a, b):
    """Equal, types too: 1, 1.0 and true are three values."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isclose(a, b)))


@settings(deadline=None)
@given(st.dictionaries(texts, values, max_size=4))
def test_what_is_written_as_yaml_is_read_again(value):
    """
    Whatever a YAML writer makes of a mapping means the same here, quotes and all.
    """
    _, read = read_document(yaml.safe_dump(value, allow_unicode=True, sort_keys=False), "x.yaml", "a mapping")

    assert same(read, value)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_document_or_a_place(text):
    """
    A text is read, or refused in words: nothing else is raised.
    """
    said = ""
    try:
        read_document(text, "x.yaml", "a mapping")
    except ConfigError as error:
        said = str(error)
    assert not said or said.startswith("x.yaml:")


@settings(deadline=None)
@given(values, st.sampled_from(["new", "a.b", "a.c[0]", "list[1]", "list[0].x"]))
def test_a_setting_puts_its_value_in_its_place(value, place):
    """
    The value that a YAML would have stands there, and everything else is as it was.
    """
    data = {"a": {"b": 1, "c": [2]}, "list": [{"x": 3}, 4], "z": 5}
    text = json.dumps(value)
    loc = apply_setting(data, f"{place}={text}")

    found = data
    for step in loc:
        found = found[step]
    assert same(found, yaml.load(text, Loader))
    assert data["z"] == 5
    assert len(data["list"]) == 2


@given(st.text(max_size=30))
def test_any_setting_is_laid_over_or_refused(setting):
    """
    Nothing but a refusal that names the flag comes out of a setting.
    """
    said = ""
    try:
        apply_setting({"a": {"b": 1}, "list": [1]}, setting)
    except ConfigError as error:
        said = str(error)
    assert not said or said.startswith("--set ")
