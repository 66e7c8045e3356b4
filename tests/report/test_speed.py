"""Speed stands beside accuracy where a kernel was timed, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbench.render import render
from kvbench.report.speed import NOT_RUN, kernel_tables, speed_column
from kvbench.report.tables import Report
from kvbench.results import Record, Store
from kvbench.schemes import Scheme
from kvbench.timing import Shape, load_requests

RESULTS = Path(__file__).parents[2] / "results"
SCHEMES = [("fp16", "none"), ("int4_per_token_head", "randomized_hadamard"), ("fp16", "hadamard")]
SHAPE = ("query_heads", "kv_heads", "head_dim", "page_size")
ROW = ("prefix", "batch", "context", "dtype", "rotation")


@pytest.fixture(scope="module")
def kernels() -> list[Record]:
    return list(Store(RESULTS / "kernels-h100").load().records.values())


def test_a_column_of_the_size_that_covers_most_schemes(kernels):
    """
    Of the sizes that cover as many, the largest batch at the least context: 32×8k; a scheme that no one timed says so.
    """
    column = speed_column(kernels, SCHEMES)
    rows = [one.facts for one in kernels if one.task == "decode 32×8192" and one.model["name"] == "32/8 heads × 128"]
    (fp16,) = [row for row in rows if row["dtype"] == "fp16" and row["page_size"] == 64]

    assert column.column.lines[0] == "decode 32×8k"
    assert column.cell(SCHEMES[0]) == f"{fp16['us']:.0f} ({fp16['speedup']:.2f} ×)"
    assert column.cell(SCHEMES[2]) == NOT_RUN
    assert "32 query / 8 KV heads, D 128, pages of 64, NVIDIA H100" in column.note


def test_the_model_s_own_shape_comes_first(kernels):
    """
    A model of 8 KV heads of 256 channels is shown the time of that shape.
    """
    assert "D 256" in speed_column(kernels, SCHEMES, [(8, 256)]).note


def test_a_peer_of_the_same_dtype_has_a_column_where_one_was_timed(kernels):
    """
    In its own table alone; the rows beside it, and records that know no such peer, show a dash.
    """
    timed = {"same_dtype_us": 1050.0, "same_dtype_peer": "vllm-triton", "same_dtype_speedup": 9.72}
    one = next(each for each in kernels if each.dtype == "int4_per_token_head" and each.facts["op"] == "decode")
    tables = kernel_tables([replace(one, facts={**one.facts, **timed}), *(each for each in kernels if each != one)])

    (with_column,) = [table for table in tables if ("vs same dtype",) in [header.lines for header in table.columns]]
    column = [header.lines for header in with_column.columns].index(("vs same dtype",))
    shown = [row[column] for row in with_column.rows]
    assert sorted(shown, key=len) == ["-"] * (len(shown) - 1) + ["9.72 × (vllm-triton 1050)"]


def test_no_column_where_nothing_was_timed(kernels):
    """
    Writes are no decode, a failed gate has no time, and a scheme of another table is not this one's.
    """
    gate_failed = [replace(one, facts={**one.facts, "us": None}) for one in kernels]

    assert speed_column([one for one in kernels if one.facts["op"] == "write"], SCHEMES) is None
    assert speed_column(gate_failed, SCHEMES) is None
    assert speed_column(kernels, [("int2_per_token_head", "randomized_hadamard")]) is None


def test_kernels_of_another_folder_stand_beside_accuracy():
    """
    `kvbench report DIR --kernels OTHER`: one more column, and no table of the other folder's.
    """
    (alone, *_), (table, *others) = (
        Report.read(RESULTS / "quickstart", kernels).tables() for kernels in (None, RESULTS / "kernels-h100")
    )
    ((fp16, *_), *_) = [(row[-1], row) for row in table.rows if row[0] == "fp16"]

    assert [header.lines[0] for header in table.columns] == [h.lines[0] for h in alone.columns] + ["decode 32×8k"]
    assert "×" in fp16
    assert not [one for one in others if one.title.startswith("decode")]


def test_a_folder_of_kernels_alone_is_a_report(tmp_path, kernels):
    """
    A table a shape, every number with its samples; a failed gate shows its verdict and no time.
    """
    store = Store(tmp_path)
    for one in kernels[:3]:
        store.save(one, [{"sample": 0, "us": 1.0}])
    cut = dict.fromkeys(("us", "us_p10", "us_p90", "gbps", "share_of_copy", "speedup"))
    facts = {**kernels[3].facts, **cut, "gate": "failed: 1 > 0.1"}
    store.save(replace(kernels[3], status="failed", metrics=(), facts=facts, error="gate failed: 1 > 0.1"), [])
    found = Report.read(tmp_path)
    rows = [row for table in found.tables() for row in table.rows]

    assert len(rows) == 4
    ((failed, *_), *_) = [(row[5:], row) for row in rows if "failed" in row[-1]]
    assert failed[:4] == ["-", "-", "-", "-"]
    assert any(line.startswith("failed:") for line in found.summary())
    assert json.loads(render(found.document(), "json"))


def test_every_committed_time_has_its_samples(kernels):
    """
    The median of a record is that of the samples beside it.
    """
    store = Store(RESULTS / "kernels-h100")
    for record in kernels:
        samples = store.samples(record.cell)["us"]
        assert samples.median() == record.facts["us"]
        assert len(samples) == record.metrics[0].n


def test_the_committed_rows_are_those_of_the_grid_file(kernels):
    """
    `configs/kernels.yaml` states every row of results/kernels-h100, and no other; an op's are of one state of the code.
    """
    stated = {
        (
            one.op,
            one.shape,
            one.prefix,
            batch,
            None if one.op == "write" else context,
            scheme.dtype_name,
            scheme.rotation_name,
        )
        for one in load_requests(RESULTS.parent / "configs" / "kernels.yaml")
        for batch in one.batches
        for context in one.contexts
        for dtype in one.dtypes
        for rotation in one.rotations or (None,)
        for scheme in [Scheme.parse(dtype, rotation).resolve(torch.bfloat16)]
    }
    measured = [
        (row["op"], Shape(*(row[name] for name in SHAPE)), *(row[name] for name in ROW))
        for row in (one.facts for one in kernels)
    ]

    assert len(measured) == len(set(measured))
    assert set(measured) == stated
    states = {(one.facts["op"], json.dumps(one.environment["git"])) for one in kernels}
    assert len(states) == len({op for op, _ in states})
