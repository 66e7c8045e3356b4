import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvbench.attention import triton
from kvbench.render import render
from kvbench.timing import KernelRequest, Shape, document, load_requests, parse_grid, run, shape_of_model
from kvbench.timing.clock import throttle_reasons
from kvbench.timing.grid import _break_even
from kvbench.timing.spans import Span, alone

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


@pytest.mark.parametrize("op", ["decode", "prefill", "mixed", "write"])
def test_centred_schemes_with_windows_pass_the_gate(op):
    """
    What transforms learn is learned from keys with a bias; exact rows are checked like packed ones.
    """
    request = replace(
        SMALL,
        op=op,
        dtypes=("int4+w0s4",),
        rotations=("center+hadamard:hadamard", "center_constant:none"),
        contexts=(150,),
    )
    timings = run(request)

    assert [row["gate"] for row in timings.rows] == ["ok", "ok"]


def test_what_no_kernel_serves_is_a_row_with_its_reason(monkeypatch):
    """
    It ends nothing for the others, is neither a failed gate nor a passed one, and has no numbers.
    """
    lacking = triton.lacking
    monkeypatch.setattr(
        triton, "lacking", lambda scheme, *rest: "no kernel" if "int2" in scheme.dtype_name else lacking(scheme, *rest)
    )
    timings = run(SMALL)

    assert timings.passed
    assert [row["gate"] for row in timings.rows] == ["ok", "refused: no kernel"]
    assert timings.rows[1]["rel_error"] is timings.rows[1]["us"] is None
    assert "was refused: no kernel" in render(document([timings]), "table")
    assert not run(replace(SMALL, dtypes=("int2",))).passed


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

    assert json.loads(render(document([timings]), "json"))[0]["dtype"] == "int4_per_token_head"
    assert (
        render(document([timings]), "csv")
        .splitlines()[1]
        .startswith("decode,int4_per_token_head,randomized_hadamard,2,")
    )
    assert "| int4_per_token_head | randomized_hadamard | 2 |" in render(document([timings]), "md")
    _, head, rule, first, *_ = render(document([timings]), "table").splitlines()
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
    for config in (CONFIG, CONFIG.with_name("kernels-window.yaml")):
        assert {request.op for request in load_requests(config)} == {"decode", "prefill", "write"}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("grids:\n  - {op: decode, dtypes: [int4], batch: 1}\n")
    with pytest.raises(ValueError, match=r"wrong.yaml:2:34: grids\[0\]: unknown key 'batch': did you mean batches\?"):
        load_requests(wrong)
    wrong.write_text("name: x\ndtypes: [int4]\ntasks: [divergence]\n")
    with pytest.raises(ValueError, match=r"wrong.yaml is a sweep's: kvbench sweep .*wrong.yaml; kernels have grids"):
        load_requests(wrong)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("{dtypes: [[int8]]}", r":1:19: grids\[0\]\.dtypes\[0\]: expected text, not \['int8'\]"),
        ("{dtypes: int8}", r":1:18: grids\[0\]\.dtypes: expected a list"),
        ("{dtypes: [int9]}", r":1:19: grids\[0\].dtypes\[0\]: unknown dtype 'int9'"),
        ("{dtypes: [int8], batches: 010}", r":1:35: 010 is no plain number"),
        ("{dtypes: [int8], batches: ١}", r":1:35: grids\[0\]\.batches: '١' is no number"),
        ("{dtypes: [int8], prefix: '1,2'}", r":1:34: grids\[0\]\.prefix: expected one number"),
        ("{dtypes: [int8], op: x}", r":1:30: grids\[0\]\.op: expected 'decode'"),
        ("{dtypes: [int8], shape: {head_dim: -1}}", r":1:44: grids\[0\]\.shape\.head_dim: expected a number above 0"),
        ("{dtypes: [int8], shape: {query_heads: 7}}", r":1:9: grids\[0\]: 7 query heads are no multiple of 8"),
        ("{dtypes: [int8], samples: 1000000}", r":1:35: grids\[0\]\.samples: expected a number of at most 10000"),
    ],
)
def test_a_wrong_grid_is_named_by_its_place(tmp_path, grid, said):
    """
    File, line, column and path, whatever kind of value stands where.
    """
    (tmp_path / "wrong.yaml").write_text(f"grids: [{grid}]\n")

    with pytest.raises(ValueError, match=f"wrong.yaml{said}"):
        load_requests(tmp_path / "wrong.yaml")


def test_a_head_dim_that_fills_no_words_is_refused_at_once():
    """
    Kernels read 16-bit words: 63 channels of 8 bits fill none, and failed when their turn came.
    """
    with pytest.raises(ValueError, match=r"head_dim 63 does not fill the 16-bit words.*multiple of 2"):
        KernelRequest(("int8",), shape=Shape(head_dim=63)).check(gpu=False)


@pytest.mark.parametrize("value", ['"32"', "[32]", "true", "-4", "0", "1e3", "{}"])
def test_heads_that_are_no_number_are_refused(tmp_path, value):
    """
    One line with the file, the field and the value.
    """
    (tmp_path / "config.json").write_text(f'{{"num_attention_heads": {value}, "hidden_size": 576}}')

    with pytest.raises(ValueError, match=r"config\.json: num_attention_heads: expected a whole number"):
        shape_of_model(tmp_path)


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


def test_counters_go_to_the_cell_whose_kernels_they_are_of():
    """
    As ncu prints its raw page: its own lines first, units below names, thousands with commas, n/a where there is none.
    """
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "counters.py"))
    names = ["Kernel Name", "Grid Size", *script["METRICS"].values()]
    lines = [["_decode_kernel(int *)", "(8, 1, 1)", *["1,500"] * 99], ["merge_kernel", "", *["2.5"] * 99]]
    lines += [["_store_kernel", "", *["n/a"] * 99]]
    text = "\n".join(",".join(f'"{one}"' for one in line[: len(names)]) for line in [names, [""] * 99, *lines])

    kernels = script["counted"]("==PROF== Connected\n" + text)
    rows = script["together"]([{"op": "decode"}, {"op": "write"}], kernels)

    assert [(row["op"], row["kernel"]) for row in rows] == [
        ("decode", "_decode_kernel"),
        ("decode", "merge_kernel"),
        ("write", "_store_kernel"),
    ]
    assert (rows[0]["us"], rows[1]["issue"], rows[2]["issue"]) == (1.5, 2.5, None)
    with pytest.raises(ValueError, match="2 kernels more than those of the cells"):
        script["together"]([{"op": "decode"}], kernels + kernels[:1])


def test_what_runs_beside_another_kernel_counts_once():
    """
    Of a span that begins while one runs only what is left when that has ended; of one within it nothing.
    """
    found = [Span(0, 10, "a"), Span(2, 5, "b"), Span(8, 14, "c"), Span(20, 21, "d")]

    assert alone(found) == [10, 0, 4, 1]


def test_the_clocks_asked_for_are_those_of_the_gpu_that_is_timed(monkeypatch):
    """
    NVML counts all GPUs and torch those that it may see, so the GPU is asked for by what it is called in both.
    """
    asked = []
    nvml = SimpleNamespace(
        NVMLError=ValueError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid),
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 4,
        nvmlClocksThrottleReasonSwPowerCap=4,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="6d0f-31"))

    assert throttle_reasons() == ("power cap",)
    assert asked == ["GPU-6d0f-31"]
