import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbench.timing import KernelRequest, Shape, load_requests, parse_grid, render, run, shape_of_model
from kvbench.timing.grid import _break_even

CONFIG = Path(__file__).parents[2] / "configs" / "kernels.yaml"
SMALL = KernelRequest(("int4", "int2:int8"), batches=(2,), contexts=(96,), shape=Shape(4, 2, 64, 16), samples=3)


@pytest.mark.parametrize("op", ["decode", "prefill", "mixed", "write"])
def test_the_gate_passes_and_without_a_gpu_nothing_is_timed(op):
    """
    Every operation is compared with its definition; a time appears only where there is a GPU.
    """
    timings = run(replace(SMALL, op=op, batches=(2,) if op != "write" else (5,)))

    assert timings.passed
    assert [row["gate"] for row in timings.rows] == ["ok", "ok"]
    for row in timings.rows:
        assert (row["us"] is not None) == torch.cuda.is_available()
        assert row["rel_error"] < 2e-2


def test_a_wrong_kernel_fails_its_gate_and_shows_no_time(monkeypatch):
    """
    An output of zeros, which a loose absolute tolerance would let pass.
    """
    monkeypatch.setattr("kvbench.attention.triton.attend", lambda q, *_, **__: torch.zeros_like(q))
    timings = run(SMALL)

    assert not timings.passed
    assert all(row["gate"].startswith("failed") and row["us"] is None for row in timings.rows)


def test_rows_in_every_format():
    """
    JSON is the rows; the table shows a dash where nothing was measured.
    """
    timings = run(replace(SMALL, dtypes=("int4",)))

    assert json.loads(render(timings, "json"))[0]["dtype"] == "int4_per_token_head"
    assert render(timings, "csv").splitlines()[1].startswith("decode,int4_per_token_head,randomized_hadamard,2,")
    assert "| int4_per_token_head | randomized_hadamard | 2 |" in render(timings, "md")
    _, head, rule, first, *_ = render(timings, "table").splitlines()
    assert len(head) == len(rule) == len(first)  # numbers end under the end of their heads
    assert head.endswith("rel. error")


def test_break_even_is_the_context_from_which_on_all_are_faster():
    """
    One slow context ends the streak.
    """
    row = {"dtype": "a", "rotation": "none", "batch": 1}
    rows = [{**row, "context": c, "speedup": s} for c, s in ((1, 2.0), (2, 0.5), (4, 1.5), (8, 3.0))]

    assert _break_even(rows)[0]["context"] == 4
    assert _break_even(rows[:2])[0]["context"] is None


def test_grids_are_numbers_lists_and_ranges():
    """
    `k` is 1024; a range doubles.
    """
    assert parse_grid("1,8,32") == (1, 8, 32)
    assert parse_grid("1k..8k") == (1024, 2048, 4096, 8192)
    for wrong in ("", "8..1", "x", "0"):
        with pytest.raises(ValueError, match="is no number"):
            parse_grid(wrong)


def test_the_grid_file_is_valid(tmp_path):
    """
    And one with a mistake says where.
    """
    assert {request.op for request in load_requests(CONFIG)} == {"decode", "prefill", "write"}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("grids:\n  - {op: decode, dtypes: [int4], batch: 1}\n")
    with pytest.raises(ValueError, match=r"grids\[0\]: unknown batch"):
        load_requests(wrong)


def test_a_model_s_config_states_a_shape(tmp_path):
    """
    With and without its own head_dim, and nested under text_config.
    """
    (tmp_path / "config.json").write_text('{"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}')
    assert shape_of_model(tmp_path) == Shape(9, 3, 64, 64)
    (tmp_path / "config.json").write_text('{"text_config": {"num_attention_heads": 4, "head_dim": 256}}')
    assert shape_of_model(tmp_path / "config.json") == Shape(4, 4, 256, 64)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="num_attention_heads"):
        shape_of_model(tmp_path)
