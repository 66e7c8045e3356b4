"""Figures in the tables of README and docs are those of the committed records, verdicts those of the reports."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch

from kvbench.dtypes import all_dtypes
from kvbench.measured import read
from kvbench.report.compare import compare
from kvbench.results import Store
from kvbench.schemes import Scheme

ROOT = Path(__file__).parents[1]
MATRIX = {"SmolLM2": "matrix-smollm2", "Gemma": "matrix-gemma3"}
RUNS = MATRIX | {"Qwen": "qwen"}
SIGNS = {"▼": "WORSE", "=": "EQUIVALENT", "?": "INCONCLUSIVE"}
METRICS = {
    "KLD": ("divergence", "kld"),
    "ppl ×": ("divergence", "ppl_ratio"),
    "GSM8K": ("gsm8k", "exact_match,strict-match"),
    "GSM8K, as a chat": ("gsm8k-chat", "exact_match,strict-match"),
    "LAMBADA": ("lambada_openai", "acc"),
    "needle": ("needle", "acc"),
}


def table(path, first):
    """The rows below the head that begins with `first`, cells without bold."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    rows = []
    for line in [lines[start], *lines[start + 2 :]]:
        if not line.strip().startswith("|"):
            break
        rows.append([cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])])
    return rows


def in_one_line(page):
    """A page's text, whatever its line breaks."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def rows_of(record):
    """The rows of a record in results/."""
    return json.loads((ROOT / "results" / record).read_text(encoding="utf-8"))["rows"]


@cache
def comparisons(folder):
    return compare(read(ROOT / "results" / folder))


def digits(text):
    """What is shown and half a unit of its last place."""
    number = re.match(r"[−-]?\d+(\.\d+)?", text)[0].replace("−", "-")
    return float(number), 0.51 * 10 ** -len(number.partition(".")[2])


def agrees(shown, value):
    number, half = digits(shown)
    return abs(number - value) <= half


def main_rows():
    for first in ("SmolLM2", "Qwen"):
        head, *rows = table("README.md", f"| dtype | rotation | smaller | {first}")
        dtype = ""
        for row in rows:
            dtype = row[0] or dtype
            for name, cell in zip(head[3:], row[3:], strict=True):
                model, _, metric = name.partition("<br>")
                if cell != "–":
                    yield dtype, row[1], model, metric, cell


@pytest.mark.parametrize(("dtype", "rotation", "model", "metric", "cell"), list(main_rows()))
def test_the_tables_of_caches_are_those_of_the_records(dtype, rotation, model, metric, cell):
    """
    Each number to the place it is shown to, each sign its verdict.
    """
    found = comparisons(RUNS[model])
    place = (*METRICS[metric], dtype, rotation)
    value, _, sign = cell.partition(" %" if "%" in cell else " ")
    row = next((row for row in found.rows if (row.task, row.metric, row.dtype, row.rotation) == place), None)
    if row is None:  # the baseline itself
        assert (dtype, rotation) == ("fp16", "none")
        actual = next(row.baseline for row in found.rows if (row.task, row.metric) == place[:2])
    else:
        assert row.verdict == SIGNS[sign.strip()], place
        actual = row.value
    if metric == "needle":
        assert value == f"{round(actual * 80)}/80"
    else:
        assert agrees(value, 100 * actual if "%" in cell else actual), (place, actual)


def test_the_example_of_compare_is_of_its_report():
    """
    Each row of README's comparison is one of SmolLM2's compare.md, without the column of the test.
    """
    lines = [line for line in (ROOT / "results/matrix-smollm2/compare.md").read_text().splitlines() if line[:2] == "| "]
    there = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    rows = table("README.md", "| dtype | rotation | task | metric |")[1:]

    assert len(rows) == 5
    for row in rows:
        assert row in [cells[:10] + cells[11:] for cells in there], row


def test_the_count_of_verdicts_is_that_of_the_reports():
    """
    docs/method.md counts what the two compare.md hold, and names how many were tested.
    """
    head, *rows = table("docs/method.md", "| model | WORSE |")
    for model, *counts in rows:
        found = comparisons(MATRIX[model])
        assert [int(count) for count in counts] == [sum(row.verdict == name for row in found.rows) for name in head[1:]]
    text = (ROOT / "docs/method.md").read_text()
    assert {(len(comparisons(name).judged), len(comparisons(name).family)) for name in MATRIX.values()} == {(289, 255)}
    assert "289 comparisons each against" in text
    assert "255 of them tested" in " ".join(text.split())


@cache
def kernels():
    """By operation, sizes and shape: the rows of results/kernels-h100."""
    rows = [
        json.loads(path.read_text()) for path in sorted((ROOT / "results/kernels-h100/cells").glob("*/record.json"))
    ]
    names = ("op", "batch", "context", "query_heads", "kv_heads", "head_dim", "page_size", "dtype", "rotation")
    return {tuple(row["facts"][name] for name in names): row["facts"] for row in rows if row["status"] == "done"}


def decode(name, batch=32, context=8192, shape=(32, 8, 128, 64)):
    """The timing of a dtype, whose name may be short, under its own rotation."""
    dtype = name if name in all_dtypes() else f"{name}_per_token_head"
    shape = ("decode", batch, context, *shape)
    rotations = [all_dtypes()[dtype].default_rotation, "hadamard", "randomized_hadamard"]
    return next(kernels()[(*shape, dtype, one)] for one in rotations if (*shape, dtype, one) in kernels())


def test_the_kernels_speed_in_the_readme_is_that_of_the_records():
    """
    Microseconds, ratio to the best 16-bit attention and share of the copy bandwidth, to the place shown.
    """
    head, times, ratios, shares = table("README.md", "| | fp16 | fp8_per_token_head")
    for name, us, ratio, share in zip(head[1:], times[1:], ratios[1:], shares[1:], strict=True):
        row = decode(name)
        assert agrees(us, row["us"]), (name, row["us"])
        assert agrees(ratio, row["speedup"]), (name, row["speedup"])
        assert agrees(share, 100 * row["share_of_copy"]), (name, row["share_of_copy"])


def kernel_cells():
    head, *rows = table("docs/kernels.md", "| | 1×8k | 1×32k |")
    for name, *cells in rows[1:]:
        for size, cell in zip(head[1:], cells, strict=True):
            if cell != "–":
                yield name.partition(",")[0], size, cell


@pytest.mark.parametrize(("dtype", "size", "cell"), list(kernel_cells()))
def test_the_decode_times_in_the_docs_are_those_of_the_records(dtype, size, cell):
    """
    Of each size and dtype microseconds, and where they stand beside it the share of copy and the ratio. Where two times
    stand, the second is of all samples, those of a rising clock included.
    """
    batch, context = size.removesuffix("k").split("×")
    row = decode(dtype, int(batch), 1024 * int(context))
    every = re.search(r"\(([\d.]+)\)", cell)
    assert agrees(every[1] if every else cell, row["us"]), row["us"]
    if found := re.search(r"\((\d+) %; ([\d.]+)×\)", cell):
        assert agrees(found[1], 100 * row["share_of_copy"]), row["share_of_copy"]
        assert agrees(found[2], row["speedup"]), row["speedup"]


def test_what_is_left_to_copy_speed_is_that_of_the_records():
    """
    The time and the share of copy of four dtypes at 32×8k.
    """
    for name, _, _, us, share in table("docs/kernels.md", "| | bytes a token and head |")[1:]:
        assert agrees(us, decode(name)["us"]), name
        assert agrees(share, 100 * decode(name)["share_of_copy"]), name


SHAPES = {
    "MHA 32/32": (32, 32, 128, 64),
    "GQA 16 (64/4)": (64, 4, 128, 64),
    "MQA 32/1": (32, 1, 128, 64),
    "D 64": (32, 8, 64, 64),
    "D 256 (16/8)": (16, 8, 256, 64),
    "pages of 16": (32, 8, 128, 16),
    "pages of 128": (32, 8, 128, 128),
}


def test_the_other_shapes_are_those_of_the_records():
    """
    Share of copy and ratio of each dtype, and the peer's own time.
    """
    head, *rows = table("docs/kernels.md", "| | SDPA, µs | fp16 |")
    assert [row[0] for row in rows] == list(SHAPES)
    for name, peer, *cells in rows:
        for dtype, cell in zip(head[2:], cells, strict=True):
            row = decode(dtype, shape=SHAPES[name])
            share, ratio = re.match(r"(\d+) % \(([\d.]+)×\)", cell).groups()
            assert agrees(share, 100 * row["share_of_copy"]), (name, dtype, row["share_of_copy"])
            assert agrees(ratio, row["speedup"]), (name, dtype, row["speedup"])
        # it was timed beside each grid of rows
        assert any(agrees(peer, decode(one, shape=SHAPES[name])["best_16bit_us"]) for one in head[2:]), name


def test_the_noise_of_keys_is_the_committed_one():
    """docs/method.md's int4 noise is the worst layer's of results/keys, the perplexity the reports'."""
    models = {"SmolLM2-135M": "smollm2-135m-instruct", "Gemma-3-270M": "gemma3-270m"}
    models |= {f"Qwen2.5-Coder-{size}B": f"qwen2.5-coder-{size.lower()}b-instruct" for size in ("0.5", "1.5")}
    runs = dict(zip(models, ("matrix-smollm2", "matrix-gemma3", "keys-int4-qwen0.5b", "qwen"), strict=True))
    rows = table("docs/method.md", "| | noise | rotated | centred |")[1:]

    assert [row[0] for row in rows] == list(models)
    for name, *shown in rows:
        layers = json.loads((ROOT / "results" / "keys" / f"{models[name]}.json").read_text(encoding="utf-8"))["layers"]
        noise = ("int4_noise", "int4_noise_rotated", "int4_noise_centred")
        assert shown[:3] == [f"{max(layer['keys'][field] for layer in layers):.2f}" for field in noise]
        report = json.loads((ROOT / "results" / runs[name] / "report.json").read_text(encoding="utf-8"))
        rotated = "randomized_hadamard" if name == "Qwen2.5-Coder-1.5B" else "hadamard"
        for text, rotation in zip(shown[3:], ("none", rotated), strict=True):
            (value,) = (
                row["value"]
                for row in report
                if (row["dtype"], row["rotation"], row["metric"]) == ("int4_per_token_head", rotation, "ppl_ratio")
            )
            assert float(text) == pytest.approx(value, abs=digits(text)[1])


def test_the_excess_of_a_repeated_speed_is_the_measured_one():
    """docs/method.md's milliseconds a step by which the repeat is slower are those of results/throughput."""
    store = Store(ROOT / "results/throughput")
    text = in_one_line("docs/method.md")
    shown = re.search(r"by ([\d.]+), ([\d.]+) and ([\d.]+) ms a step", text).groups()
    steps, prompts = {}, {}
    for name, record in store.load().records.items():
        if record.dtype in ("fp16", "again"):
            (row,) = store.samples(name).to_dict("records")
            steps[record.task, record.dtype] = 1e3 * row["decode_seconds"] / 127
            prompts[record.task, record.dtype] = row["prefill_seconds"]
    for figure, name in zip(shown, ("32 × 1k", "8 × 8k", "1 × 32k"), strict=True):
        assert agrees(figure, steps[name, "again"] - steps[name, "fp16"]), name
        assert prompts[name, "again"] == pytest.approx(prompts[name, "fp16"], rel=5e-3)


def test_hflms_times_by_batch_are_the_measured_ones():
    """docs/method.md's seconds of HFLM on PIQA by batch size are those of results/hflm."""
    text = in_one_line("docs/method.md")
    rows = rows_of("hflm/engine-h200-piqa-3.json")
    shown = re.search(r"took it ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+) s in batches of 64", text).groups()
    theirs = [row["seconds"] for row in rows if row["cell"].startswith("HFLM")]
    assert all(agrees(figure, value) for figure, value in zip(shown, theirs, strict=True))


def test_what_quantized_cells_take_beside_fp16_is_the_measured_ratio():
    """docs/method.md's least and most of quantized cells' times over fp16's are those of results/hflm."""
    text = in_one_line("docs/method.md")
    rows = rows_of("hflm/engine-h200-in-turn.json")
    found, repeated = {}, {}
    for task in ("arc_easy", "piqa", "lambada_openai"):
        own = [row for row in rows if row["task"] == task and not row["cell"].startswith("HFLM")]
        *found[task], repeated[task] = (row["seconds"] / own[0]["seconds"] for row in own[1:])
    shown = re.search(
        r"takes ([\d.]+) to ([\d.]+) of the time on ARC-Easy, ([\d.]+) to ([\d.]+) on PIQA "
        r"and ([\d.]+) to ([\d.]+) on LAMBADA",
        text,
    ).groups()
    measured = [end(ratios) for ratios in found.values() for end in (min, max)]
    assert all(agrees(figure, value) for figure, value in zip(shown, measured, strict=True))
    shown = re.search(r"In turn they differ by ([\d.]+), ([\d.]+) and ([\d.]+) %", text).groups()
    assert all(agrees(figure, 100 * abs(ratio - 1)) for figure, ratio in zip(shown, repeated.values(), strict=True))


def test_what_short_tiles_take_is_the_measured_time():
    """docs/method.md's microseconds a layer are those of results/short-h200.json, each of the fastest tile."""
    rows = rows_of("short-h200.json")
    text = in_one_line("docs/method.md")
    shown = re.search(
        r"take a layer (\d+) µs in 16 bits, (\d+) in int8, (\d+) in int4 and (\d+) in int2", text
    ).groups()
    for figure, name in zip(shown, ("fp16", "int8", "int4", "int2"), strict=True):
        assert int(figure) == round(
            min(r["us"] for r in rows if (r["batch"], r["dtype"]) == ("arc", name) and r["tile"])
        )


def test_what_a_graph_takes_is_the_measured_time():
    """docs/method.md's steps of one graph at two times, and of equal cells, are those of results/checks-h200."""
    rows = rows_of("checks-h200/graphs.json")
    text = in_one_line("docs/method.md")
    found = {(row["experiment"], row["graph"]): row["ms"] for row in rows}
    shown = re.search(r"took ([\d.]+) ms a step, seconds later ([\d.]+), and another ([\d.]+) and then ([\d.]+)", text)
    names = (
        ("1 captured anew, same pool", "0"),
        ("2 instantiated anew", "the first again"),
        ("6 runner after runner", "0, again"),
        ("6 runner after runner", "0, the first of them"),
    )
    assert all(agrees(figure, found[name]) for figure, name in zip(shown.groups(), names, strict=True))


@pytest.mark.parametrize("file", ["acts", "acts-one-connection", "acts-settled"])
def test_launches_on_many_streams_alone_make_kernels_begin_later(file):
    """docs/method.md's states of a GPU, and what changes them, are those of results/checks-h200, with one queue too."""
    rows = rows_of(f"checks-h200/{file}.json")
    text = in_one_line("docs/method.md")
    fast_us, fast, slow_us, slow = re.search(
        r"takes ([\d.]+) µs a kernel and a step of SmolLM2 ([\d.]+) ms.* streams they take ([\d.]+) µs and ([\d.]+) ms",
        text,
    ).groups()
    acts = [row for row in rows if "before" in row]
    assert len({row["act"] for row in acts}) == 20
    for row in acts:
        many = row["act"] == "launches on eight more"
        assert row["after"]["step_ms"] == pytest.approx(float(slow if many else fast), rel=0.02), row["act"]
        if file != "acts-one-connection":
            assert row["after"]["kernel_us"] == pytest.approx(float(slow_us if many else fast_us), rel=0.06), row["act"]


def test_a_speed_repeats_once_contexts_have_changed():
    """docs/method.md's steps of cells one after another, with and without that, are those of results/checks-h200."""
    rows = rows_of("checks-h200/acts.json")
    text = in_one_line("docs/method.md")
    three, fourth, four, share = re.search(
        r"first three take ([\d.]+) ms a step and the fourth ([\d.]+)\..* took ([\d.]+) ms each, within ([\d.]+) %",
        text,
    ).groups()
    # the second repeat of each, for the first finds a GPU that has just been idle
    steps = {
        name: [row["steps_ms"][1] for row in rows if row.get("throughput") == name]
        for name in ("as they are", "a context")
    }
    assert all(
        agrees(figure, value) for figure, value in zip([three] * 3 + [fourth], steps["as they are"], strict=True)
    )
    assert all(agrees(four, value) for value in steps["a context"])
    assert 100 * (max(steps["a context"]) / min(steps["a context"]) - 1) < float(share)


def test_a_speed_repeats_as_throughput_stands():
    """
    docs/method.md's steps of twelve cells, the A/A of a sweep, a state's own factor and what settling takes are of
    results/, and README's tokens per second are that sweep's.
    """
    text = in_one_line("docs/method.md")
    step, share, decode, prefill, cost, factor = re.search(
        r"took ([\d.]+) ms in both repeats, within ([\d.]+) %.*? decode within ([\d.]+) % .*? prompts within ([\d.]+) %"
        r".*? costs a cell ([\d.]+) s .*? varies by a factor of ([\d.]+);",
        text,
    ).groups()
    rows = rows_of("checks-h200/acts-settled.json")
    steps = [one for row in rows if "throughput" in row for one in row["steps_ms"]]
    assert len(steps) == 24
    assert agrees(step, median(steps))
    assert 100 * (max(steps) / min(steps) - 1) < float(share)
    settled = rows_of("checks-h200/settles.json")
    assert all(row["could"] for row in settled)
    assert agrees(cost, median(row["seconds"] for row in settled))

    records = Store(ROOT / "results/throughput-h200").load().records.values()
    kernels = [record.facts["kernel_us"] for record in records]
    assert agrees(factor, max(kernels) / min(kernels))
    found = {(one.dtype, one.task, metric.name): metric.value for one in records for metric in one.metrics}
    for name, figure in (("decode", decode), ("prefill", prefill)):
        off = [
            abs(found["again", task, name] / found["fp16", task, name] - 1) for task in ("32 × 1k", "8 × 8k", "1 × 32k")
        ]
        assert agrees(figure, 100 * max(off))
    readme = in_one_line("README.md")
    said = re.search(
        r"one H200 holds ([\d.]+) million tokens in 16 bits, ([\d.]+) in int8, ([\d.]+) in int4 and ([\d.]+) in int2, "
        r"and 8 sequences of 8192 tokens decode at (\d+), (\d+), (\d+) and (\d+) tokens/s",
        readme,
    ).groups()
    dtypes = ("fp16", "int8_per_token_head", "int4_per_token_head", "int2_per_token_head")
    for dtype, tokens, rate in zip(dtypes, said[:4], said[4:], strict=True):
        assert agrees(tokens, found[dtype, "8 × 8k", "memory_holds"] / 1e6)
        assert agrees(rate, found[dtype, "8 × 8k", "decode"])
    gain, fast, slow = re.search(
        r"decodes ([\d.]+) × as fast under plain int4 \((\d+) against (\d+) tokens", readme
    ).groups()
    assert (fast, slow) == (said[6], said[4])
    assert agrees(gain, found[dtypes[2], "8 × 8k", "decode"] / found["fp16", "8 × 8k", "decode"])


def test_joined_products_changed_no_score():
    """docs/method.md's cells in turn have the scores of the cells before, to the last digit."""
    before, after = (rows_of(f"hflm/engine-h200{name}.json") for name in ("", "-in-turn"))
    scores = {(row["task"], row["cell"]): row["metrics"] for row in before}
    cells = [row for row in after if not row["cell"].startswith("HFLM")]
    assert len(cells) == 15
    assert all(row["metrics"] == scores[row["task"], row["cell"]] for row in cells)


def test_what_bounds_gsm8k_is_the_measured_time():
    """docs/method.md's times of GSM8K beside HFLM, in a profile, and of long requests again, are those of results/."""
    text = in_one_line("docs/method.md")
    rows = rows_of("hflm/engine-h200-in-turn-gsm8k.json")
    theirs = min(row["seconds"] for row in rows if row["cell"].startswith("HFLM"))
    ours = next(row["seconds"] for row in rows if row["cell"] == "fp16")
    times, wanted = re.search(r"are (\d+) times as fast as HFLM's.*? were wanted, in ([\d.]+) s", text).groups()
    assert agrees(times, theirs / ours)
    assert agrees(wanted, theirs / 25)
    profile = json.loads((ROOT / "results/checks-h200/gsm8k-designs.json").read_text(encoding="utf-8"))["profile_ms"]
    shown = re.search(
        r"bound by matrix products, ([\d.]+) s at about 700 TFLOP/s, with ([\d.]+) s of attention", text
    ).groups()
    for figure, kind in zip(shown, ("matrix products", "attention"), strict=True):
        assert agrees(figure, profile["prompts"][kind] / 1e3)
    fp16, int4 = rows_of("long/qwen3-8b-h200-again.json")
    said = re.search(
        r"fp16's step is ([\d.]+) ms, attention ([\d.]+) of it, and int4's ([\d.]+) ms, attention ([\d.]+) of it: "
        r"([\d.]+) ×.*? the rest, ([\d.]+) ms of matrix products.*? and ([\d.]+) of small kernels",
        text,
    ).groups()
    meant = (fp16["step_ms"], fp16["step_ms_of"]["attention"], int4["step_ms"], int4["step_ms_of"]["attention"])
    rest = (int4["decode_ratio"], int4["step_ms_of"]["matrix products"], int4["step_ms_of"]["other layers' arithmetic"])
    assert all(map(agrees, said, (*meant, *rest)))


def test_what_a_busy_host_leaves_of_a_gpu_is_the_measured_share():
    """docs/method.md's shares of a GPU's work on a host with other work, and that host's loops, are of results/host."""
    text = in_one_line("docs/method.md")
    off, low, high, worst, best, quiet, fast, slow = map(
        float,
        re.search(
            r"works as long in each cell, within ([\d.]+) %, .*? time (\d+) to (\d+) % in four cells of the eighteen "
            r"and (\d+) to (\d+) % in the others.*? took ([\d.]+) s later in run b and ([\d.]+) to ([\d.]+) s around",
            text,
        ).groups(),
    )
    runs = [
        {(row["task"], row["cell"]): row for row in rows_of(f"host/{name}.json")}
        for name in ("busy-h200", "busy-h200-a", "busy-h200-b")
    ]
    for key, row in runs[1].items():
        same = [run[key]["busy"] for run in runs if key in run]
        assert max(same) / min(same) - 1 < off / 100, (key, row["busy"])
    shares = sorted(100 * row["share"] for run in runs[1:] for row in run.values())
    assert [round(one) for one in (shares[0], shares[-5], shares[-4], shares[-1])] == [worst, best, low, high]
    loops = {
        line.split(" loop")[0]: [float(one) for one in re.findall(r"0\.\d+", line.split(" load")[0])]
        for line in (ROOT / "results/host/busy-h200-b.txt").read_text().splitlines()
    }
    around = [*loops["before-busy"], *loops["after-busy"]]
    assert [round(one, 2) for one in (median(loops["before-engine"]), min(around), max(around))] == [quiet, fast, slow]


def test_what_compiling_takes_is_the_measured_time():
    """docs/kernels.md's seconds of Triton's stages, of the longest kernel and of presets are of compiling.json."""
    text = in_one_line("docs/kernels.md")
    record = json.loads((ROOT / "results/checks-h200/compiling.json").read_text())
    kernels = record["kernels"].values()
    stages = ("init", "ttir", "ttgir", "llir", "ptx", "cubin")
    whole, passes = (sum(one[name] for one in kernels for name in names) for names in (stages, ("ttgir",)))
    count = sum(one["kernels"] for one in kernels)
    assert f"Of {whole:.0f} s for {count} kernels of this folder's tests" in text
    assert f"{passes:.0f} were Triton's passes over tiles" in text
    assert f"took up to {max(one['longest'] for one in kernels):.0f} s on that machine" in text
    presets = re.findall(r"(\d+) s under `(\w+)` \((\d+)", text)
    took = {
        scheme: [one for kernel in compiled.values() for one in kernel]
        for scheme, compiled in record["presets"]["schemes"].items()
    }
    assert presets == [(f"{sum(took[name]):.0f}", name, str(len(took[name]))) for _, name, _ in presets]
    assert {name for _, name, _ in presets} == set(took)
    writes = record["presets"]["schemes"]["tiers421_centered_window"]["_store_kernel"]
    assert "write of tiers compiled four times, 8 s each" in text
    assert [int(one) for one in writes] == [0, 8, 8, 8, 8]


def test_what_sealing_takes_is_the_measured_time():
    """docs/kernels.md's steps that fill a page and others are those of results/checks-h200/sealing.json."""
    text = in_one_line("docs/kernels.md")
    plain, window = re.search(r"take int4 ([\d.]+ and [\d.]+) µs, with a window ([\d.]+ and [\d.]+)\.", text).groups()
    reference = re.search(r"`kivi2` takes ([\d.]+) ms in such a step and ([\d.]+) in another", text).groups()
    rows = rows_of("checks-h200/sealing.json")
    times = {row["scheme"]: [median(row["us"][name]) for name in ("sealing", "else")] for row in rows}
    assert all(map(agrees, plain.split(" and "), times["int4"]))
    assert all(map(agrees, window.split(" and "), times["int4+w64s4"]))
    assert all(map(agrees, reference, [one / 1e3 for one in times["kivi2"]]))


def test_no_clock_goes_with_a_gpus_state():
    """docs/method.md's megahertz in both states are those of results/checks-h200/states.json."""
    rows = rows_of("checks-h200/states.json")
    text = in_one_line("docs/method.md")
    ends = re.search(r"own cycles were (\d+) to (\d+) MHz in both states", text).groups()
    # work of one's own or of another process lowers the clock for a moment
    quiet = [row for row in rows if not {"matmul", "heavy"} & set(row["while"].split())]
    assert [int(end) for end in ends] == [round(end(row["counted_mhz"] for row in quiet)) for end in (min, max)]
    states = [
        {row["kernel_us"] > 1.1 for row in quiet if (row["counted_mhz"] > 1959) == above} for above in (True, False)
    ]
    assert states == [{True, False}] * 2


def test_what_lies_between_a_graphs_kernels_is_the_measured_gap():
    """docs/method.md's steps and gaps of graphs are those of results/throughput-graphs-h200.json."""
    rows = rows_of("throughput-graphs-h200.json")
    text = in_one_line("docs/method.md")
    step, others = re.search(r"took ([\d.]+) ms a step and the next three ([\d.]+)", text).groups()
    gap, wider, kernels = re.search(
        r"gap was ([\d.]+) µs in the first and ([\d.]+) µs in the others, (\d+)", text
    ).groups()
    assert len(rows) == 4
    assert agrees(step, rows[0]["steps"][1])
    assert agrees(gap, rows[0]["median_gap_us"])
    assert all(agrees(others, row["steps"][1]) and agrees(wider, row["median_gap_us"]) for row in rows[1:])
    assert int(kernels) == round(rows[2]["launches"] / 30)
    assert all(
        a[2] == b[2] and abs(a[0] - b[0]) < 0.05 * a[0] + 0.7
        for a, b in zip(rows[0]["kernels"], rows[1]["kernels"], strict=True)
    )


def test_the_hosts_work_is_what_was_measured():
    """CHANGELOG's milliseconds of ARC-Easy's requests are those of results/host."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    shown = re.search(r"ARC-Easy's (\d+) requests: (\d+) → (\d+) ms", text).groups()
    before, after = (rows_of(f"host/{name}.json")[0] for name in ("before", "after"))
    measured = [before["requests"], 1e3 * before["seconds"], 1e3 * after["seconds"]]
    assert [int(figure) for figure in shown] == [round(value) for value in measured]


def test_the_answers_beside_hflm_are_the_committed_ones():
    """docs/method.md's seconds, ratios and scores of GSM8K are those of results/hflm, its counts of texts too."""
    found = json.loads((ROOT / "results/hflm/answers-h100.json").read_text(encoding="utf-8"))
    rows = table("docs/method.md", "| | seconds | × HFLM |")[1:]
    sides = [found["sides"][name] for name in ("HFLM", "HFLM again", "fp16", "fp16 A/A", "int8")]
    for (_, seconds, times, *scores), side in zip(rows, sides, strict=True):
        assert agrees(seconds, side["seconds"])
        assert agrees(times, side["times_hflm"])
        for shown, value in zip(scores, side["metrics"].values(), strict=True):
            assert agrees(shown, value)
    texts = [found["apart"][pair]["texts"] for pair in ("HFLM - fp16", "HFLM - HFLM again", "fp16 - fp16 A/A")]
    assert texts == [63, 53, 59]
    for gap in ("gap_kvbench", "gap_plain"):
        assert found["gaps"][gap]["within_2_bfloat16_steps"] == 63


def test_the_bias_of_qwens_keys_is_the_measured_one():
    """README's mean of 354 and 239 spreads are layer 0's in results/keys."""
    record = json.loads((ROOT / "results/keys/qwen2.5-coder-1.5b-instruct.json").read_text(encoding="utf-8"))
    text = in_one_line("README.md")
    assert "mean is 354, 239 times its spread" in text
    assert round(record["layers"][0]["keys"]["mean"]) == 354
    assert "up to 239.4 times the spread (layer 0)" in record["prediction"]


SCHEMES = {
    "int8_per_token_head": ("int8_per_token_head", "none"),
    "`int8_centered`": ("int8_per_token_head", "center:none"),
    "int4_per_token_head, randomized_hadamard": ("int4_per_token_head", "randomized_hadamard"),
    "`int4_centered`": ("int4_per_token_head", "center+randomized_hadamard:randomized_hadamard"),
    "`int4_centered_window`": ("int4_per_token_head+w64s4", "center+randomized_hadamard:randomized_hadamard"),
    "the same, one mean for all positions": (
        "int4_per_token_head+w64s4",
        "center_constant+randomized_hadamard:randomized_hadamard",
    ),
    "int2_per_token_head, hadamard": ("int2_per_token_head", "hadamard"),
    "`int2_centered_window`": ("int2_per_token_head+w64s4", "center+randomized_hadamard:randomized_hadamard"),
    "`tiers421_centered_window`": (
        "tiers421_per_token_head:midrise2_per_token_head+w64s4",
        "center+rank:randomized_hadamard",
    ),
    "`tcq4321_centered_window`": ("tcq4321:tcq2+w64s4", "center+rank:randomized_hadamard"),
}


def test_the_schemes_that_survive_are_those_of_the_records():
    """README's bits are Scheme.nbytes' over 8192 tokens, its divergences and scores those of results/schemes."""
    rows = [row for row in comparisons("schemes").rows if row.model.startswith("qwen")]
    values = {(row.task, row.metric, row.dtype, row.rotation): row.value for row in rows}
    layers = ((2, 128),) * 28
    rows = table("README.md", "| scheme | bits, at 8k tokens |")[1:]
    assert [row[0] for row in rows] == list(SCHEMES)
    for name, bits, near, far, score in rows:
        scheme = Scheme.parse(*SCHEMES[name])
        assert agrees(bits, 8 * scheme.nbytes(layers, 8192, torch.bfloat16) / (8192 * 28 * 2 * 2 * 128)), name
        assert agrees(near, values["divergence", "kld@1536-2048", *SCHEMES[name]]), name
        assert agrees(far, values["divergence-32k", "kld@24576-32768", *SCHEMES[name]]), name
        if score != "–":
            assert agrees(score, 100 * values["gsm8k", "exact_match,strict-match", *SCHEMES[name]]), name
    small = {(row.metric, row.dtype, row.rotation): row.value for row in comparisons("schemes-smollm2").rows}
    text = in_one_line("README.md")
    shown = re.search(r"does most of it: ([\d.]+), ([\d.]+) centred, ([\d.]+) with the window", text).groups()
    order = ("int4_per_token_head, randomized_hadamard", "`int4_centered`", "`int4_centered_window`")
    for figure, name in zip(shown, order, strict=True):
        assert agrees(figure, small["kld@1536-2048", *SCHEMES[name]]), name


def test_what_windows_and_centres_cost_is_the_measured_time():
    """docs/kernels.md's times are those of results/windows-h100.json, each behind its gate."""
    rows = json.loads((ROOT / "results/windows-h100.json").read_text(encoding="utf-8"))
    assert {row["gate"] for row in rows} == {"ok"}
    times = {(row["op"], row["batch"], row["context"], row["dtype"], row["rotation"]): row["us"] for row in rows}
    sizes = (("decode", 8, 8192), ("decode", 32, 8192), ("decode", 1, 32768), ("write", 4096, 0))
    forms = (
        ("int4_per_token_head", "hadamard"),
        ("int4_per_token_head", "center_constant+hadamard:hadamard"),
        ("int4_per_token_head", "center+hadamard:hadamard"),
        ("int4_per_token_head+w64s4", "hadamard"),
        ("int4_per_token_head+w64s4", "center+hadamard:hadamard"),
    )
    for (_, *cells), form in zip(table("docs/kernels.md", "| `hadamard` | 8×8k |")[1:], forms, strict=True):
        for cell, size in zip(cells, sizes, strict=True):
            if cell != "–":
                found = [
                    times[key] for key in times if key[:2] == size[:2] and key[3:] == form and key[2] in (size[2], None)
                ]
                assert len(found) == 1
                assert agrees(cell, found[0]), (form, size, found)


def test_what_grows_over_32k_tokens_is_that_of_the_records():
    """Each divergence by position, its growth, and what a window is worth at both ends."""
    rows = [row for row in comparisons("schemes").rows if row.model.startswith("qwen") and row.task == "divergence-32k"]
    values = {(row.metric, row.dtype, row.rotation): row.value for row in rows}
    spans = ("1024-2048", "2048-8192", "8192-16384", "16384-24576", "24576-32768")
    near, far, grown = {}, {}, {}
    for name, *figures, times in table("docs/method.md", "| scheme | 1k to 2k |")[1:]:
        found = [values[f"kld@{span}", *SCHEMES[name]] for span in spans]
        assert all(map(agrees, figures, found)), name
        near[name], far[name], grown[name] = found[0], found[-1], found[-1] / found[0]
        assert agrees(times, grown[name]), (name, grown[name])
    words = in_one_line("docs/method.md")
    plain, window, mean = "`int4_centered`", "`int4_centered_window`", "the same, one mean for all positions"
    assert f"and it has {grown[window]:.2f}. One mean" in words
    assert f"the same codes grow by {grown[mean]:.2f}, and 8 bits under means" in words
    assert f"by {grown['`int8_centered`']:.2f} alone. Without a window int4's codes grow by {grown[plain]:.2f}" in words
    tiers, trellis = "`tiers421_centered_window`", "`tcq4321_centered_window`"
    readme = in_one_line("README.md")
    assert f"their KLD grows by {grown[tiers]:.1f} and {grown[trellis]:.1f} times, int4's behind" in readme
    assert f"the window by {grown[window]:.2f}. One mean for all positions ages, by {grown[mean]:.1f}." in readme
    two_bits = in_one_line("docs/two-bits.md")
    int2 = far["`int2_centered_window`"]
    assert f"give `tiers421` {far[tiers]:.4f} in the last part and `int2` {int2:.4f}" in two_bits
    starts, ends = near[plain] / near[window], far[plain] / far[window]
    assert f"lose {starts:.1f} times as much at the start and {ends:.1f} times at the end" in words


def test_the_trial_s_figures_come_again():
    """Each figure *here* is a record's, near the trial's but for two that are nearer 16 bits; four are as was asked."""
    runs = {"tcq2+w64s4": "two-bits"}
    nearer = {
        ("`int8_per_token_head`", "qwen2.5-coder-1.5b-instruct"),
        ("`tcq3_centered_window`", "smollm2-135m-instruct"),
    }
    rows = table("docs/method.md", "| scheme | trial: Qwen2.5-Coder-1.5B | here |")[1:]
    assert len(rows) == 10
    shown = {}
    for label, *figures in rows:
        name = re.search(r"`([\w+]+)`", label)[1]
        centred = {"key": "center+randomized_hadamard", "value": "randomized_hadamard"}
        scheme = Scheme.parse(name, centred if "centred" in label else None)
        found = of_model(runs.get(name, "field"))
        models = ("qwen2.5-coder-1.5b-instruct", "smollm2-135m-instruct")
        for model, trial, here in zip(models, figures[::2], figures[1::2], strict=True):
            if here == "–":
                continue
            value = found[model, scheme.columns()["dtype"], scheme.columns()["rotation"]]["kld@1536-2048"]
            assert agrees(here, value), (label, model, value)
            assert 0.7 < value / float(trial) < 1.25 or (label, model) in nearer, label
            shown[name, model] = value
    limits = {"int8_centered": 0.002, "int4_centered": 0.025, "int4_centered_window": 0.006}
    for name, limit in (limits | {"int2_centered_window": 0.09}).items():
        assert shown[name, "qwen2.5-coder-1.5b-instruct"] <= limit


# ---- docs/two-bits.md


def of_model(folder):
    """By model, dtype and rotation: the divergence of the records of results/FOLDER."""
    found = {}
    for path in (ROOT / "results" / folder / "cells").glob("*/record.json"):
        row = json.loads(path.read_text())
        if row["task"] == "divergence":
            metrics = {one["name"]: one["value"] for one in row["metrics"]}
            found[row["model"]["name"], row["dtype"], row["rotation"]] = metrics
    return found


def distortions():
    """By code, bits, state bits and width of rows: decibels and bits a value, of results/trellis/distortion.json."""
    rows = rows_of("trellis/distortion.json")
    return {(row["code"], row["bits"], row["state_bits"], row["width"]): row for row in rows}


def test_the_trellis_s_decibels_are_those_of_the_record():
    """
    Each figure of both tables, to the place it is shown to; a dash is what was not measured.
    """
    found = distortions()
    head, *rows = table("docs/two-bits.md", "| bits | states |")
    assert len(rows) == 5
    for bits, states, *shown in rows:
        for name, cell in zip(head[2:], shown, strict=True):
            state_bits = int(re.search(r"2\^(\d+)", states)[1])
            code = {"evenly": "cosets", "random": "permutation", "1MAD": "1MAD", "limit": "limit"}[name.split()[0]]
            row = found[(code, int(bits), None if code == "limit" else state_bits, 4096)]
            assert agrees(cell, row["db"]), (bits, states, name, row["db"])
    for name, *shown in table("docs/two-bits.md", "| dtype | bits, D=64 |")[1:]:
        for width, (bits, decibels) in zip((64, 128), zip(shown[::2], shown[1::2], strict=True), strict=True):
            row = found[("stored", int(name.strip("`")[3:]), 8, width)]
            assert float(bits) == row["bits_per_value"]
            assert agrees(decibels, row["db"])


def test_what_a_trellis_is_worth_is_that_of_the_records():
    """
    KLD over all positions and over the later ones, and the bits, of each row of docs/two-bits.md that has both.
    """
    keys = {"4, 2 and 1": "xa152", "4, 3, 2 and 1": "xb2222", "4, 3 and 2": "xc323", "`tcq4321`": "xd134"}
    records = [json.loads(path.read_text()) for path in (ROOT / "results/two-bits-smollm2/cells").glob("*/record.json")]
    found = {(row["dtype"], row["rotation"]): {m["name"]: m["value"] for m in row["metrics"]} for row in records}
    rows = table("docs/two-bits.md", "| keys | values | window |")[1:]
    assert len(rows) == 13
    for key, value, window, _, *shown in rows:
        names = [short for text, short in keys.items() if key.startswith(text)]
        name = names[0] if names else re.search(r"`(\w+)`", key)[1]
        value = "xe2nostart" if "without" in value else value.strip("`")
        dtype = f"{name}:{value}+{window}"
        dtype = dtype.replace("tiers421", "tiers421_per_token_head").replace("midrise2", "midrise2_per_token_head")
        extra = "+correction" if "correction" in key else "+eighths" if "rotated" in key else ""
        row = found[dtype, f"center+rank{extra}:randomized_hadamard"]
        for cell, metric in zip(shown, ("kld", "kld@512-1024"), strict=True):
            assert agrees(cell, row[metric]), (dtype, metric, row[metric])


def test_the_ablation_on_a_larger_model_is_that_of_the_records():
    """Bits, divergences and ratio of perplexities of each row of docs/two-bits.md's second table; none is left out."""
    found = {key[1:]: metrics for key, metrics in of_model("two-bits").items()}
    rows, layers = table("docs/two-bits.md", "| dtype | transforms of keys |")[1:], ((2, 128),) * 28
    seen = set()
    for dtype, keys, bits, *shown in rows:
        dtype, keys = dtype.strip("`"), keys.strip("`")
        (place,) = [at for at in found if at[0] == dtype and at[1].split(":")[0] == keys]
        scheme = Scheme.parse(*place)
        assert agrees(bits, 8 * scheme.nbytes(layers, 8192, torch.bfloat16) / (8192 * 28 * 2 * 2 * 128)), place
        for cell, metric in zip(shown, ("kld", "kld@1536-2048", "ppl_ratio"), strict=True):
            assert agrees(cell, found[place][metric]), (place, metric)
        seen.add(place)
    assert {at for at in found if at != ("fp16", "none") and not at[0].startswith(("canary", "again"))} <= seen


def test_what_readme_says_of_gsm8k_is_measured():
    """The answers of three presets beside 16 bits, with their intervals, and the needles of those at two bits."""
    text = in_one_line("README.md")
    rows = [row for row in comparisons("schemes").rows if row.model.startswith("qwen")]
    place = {(row.task, row.metric, row.dtype, row.rotation): row for row in rows}
    gsm8k = "gsm8k", "exact_match,strict-match"

    window = place[*gsm8k, *SCHEMES["`int4_centered_window`"]]
    share, exact, low, high = re.search(
        r"a value answer ([\d.]+) % where 16 bits answered ([\d.]+) in that run "
        r"\(95 % interval (−[\d.]+) to \+([\d.]+)",
        text,
    ).groups()
    assert agrees(share, 100 * window.value)
    assert agrees(exact, 100 * window.baseline)
    assert agrees(low, 100 * window.ci_low)
    assert agrees(high, 100 * window.ci_high)

    tiers, trellis = (SCHEMES[f"`{name}_centered_window`"] for name in ("tiers421", "tcq4321"))
    less, *interval, more, low, high = re.search(
        r"keys in tiers answer ([\d.]+) points less \(95 % interval (−[\d.]+) to \+([\d.]+)\), at 2.35 in a trellis "
        r"([\d.]+) more \((−[\d.]+) to \+([\d.]+)\), and both find all 80 needles",
        text,
    ).groups()
    for scheme, figures in ((tiers, (f"−{less}", *interval)), (trellis, (more, low, high))):
        row = place[*gsm8k, *scheme]
        assert all(map(agrees, figures, (100 * (row.value - row.baseline), 100 * row.ci_low, 100 * row.ci_high)))
        assert place["needle", "acc", *scheme].value == 1


def test_the_trellis_s_constants_are_those_that_were_found():
    """
    The search's record has the multipliers and curves of the dtypes.
    """
    from kvbench.dtypes.trellis import FOUR, THREE, TWO

    record = json.loads((ROOT / "results/trellis/distortion.json").read_text())["constants"]
    found = {row["bits"]: row for row in record if row["state_bits"] == 8}
    for part in (TWO, THREE, FOUR):
        assert found[part.bits]["multiplier"] == part.multiplier
        assert [tuple(pair) for pair in found[part.bits]["curve"]] == list(part.curve)


def test_the_first_screen_says_whose_speed_it_is():
    """README's first bullets: plain int4 and its peer of one record, the centred window of another run."""
    text = in_one_line("README.md")
    plain, peer, ratio, window, beside = re.search(
        r"over plain int4 takes (\d+) µs where torch's fastest 16-bit attention \(cuDNN\) takes (\d+) µs .*?, "
        r"([\d.]+) × less; with centred keys and the window it takes (\d+) µs "
        r"\(in another run, where plain int4 took (\d+)\)",
        text,
    ).groups()
    row = decode("int4_per_token_head")
    assert row["best_16bit_peer"] == "sdpa-cudnn"
    assert all(map(agrees, (plain, peer, ratio), (row["us"], row["best_16bit_us"], row["speedup"])))
    rows = json.loads((ROOT / "results/windows-h100.json").read_text(encoding="utf-8"))
    times = {(row["dtype"], row["rotation"]): row["us"] for row in rows if (row["batch"], row["context"]) == (32, 8192)}
    assert agrees(window, times["int4_per_token_head+w64s4", "center+hadamard:hadamard"])
    assert agrees(beside, times["int4_per_token_head", "hadamard"])


def test_what_another_calibration_text_changes_is_that_of_the_records():
    """
    Each divergence of the table in docs/method.md, to the place it is shown to; what the sentence below it adds, too.
    """
    records = [json.loads(p.read_text()) for p in (ROOT / "results/schemes-cpu/cells").glob("*/record.json")]
    found = {
        (row["model"]["name"], row["dtype"], row["rotation"]): next(m for m in row["metrics"] if m["name"] == "kld")
        for row in records
    }
    models = {"SmolLM2-135M": "smollm2-135m-instruct", "Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b-instruct"}
    texts = ("", "+c8192-1a59b821", "+c8192-dc1eba8a")
    _, *rows = table("docs/method.md", "| model | scheme | the text that ships |")
    shown = 0
    for model, scheme, *values in rows:
        columns = Scheme.parse(scheme.strip("`")).columns()
        for text, value in zip(texts, values, strict=True):
            if value != "–":
                metric = found[models[model], columns["dtype"] + text, columns["rotation"]]
                assert agrees(value, metric["value"]), (model, scheme, text, metric["value"])
                shown += 1
    assert shown == 11

    def of(dtype, rotation="center+randomized_hadamard:randomized_hadamard"):
        return found["smollm2-135m-instruct", dtype, rotation]["value"]

    int4, int2 = "int4_per_token_head+w64s4", "int2_per_token_head+w64s4"
    balanced = [f"center+{name}+randomized_hadamard:randomized_hadamard" for name in ("balance", "balance_full")]
    words = in_one_line("docs/method.md")
    assert "has 0.0338 and 0.0341" in words
    assert [round(of(f"again {i} of int4_per_token_head"), 4) for i in (1, 2)] == [0.0338, 0.0341]
    assert "0.0016 (`balance`) and 0.0020 (`balance_full`), of int2's 0.058 0.054 and 0.066" in words
    assert [round(of(int4, rotation), 4) for rotation in balanced] == [0.0016, 0.0020]
    assert [round(of(int2, rotation), 3) for rotation in balanced] == [0.054, 0.066]
    assert round(of(f"{int2}+l0=int8_per_token_head"), 3) == 0.058
    qwen = found[
        "qwen2.5-coder-0.5b-instruct",
        f"int4_per_token_head{texts[1]}",
        "center+randomized_hadamard:randomized_hadamard",
    ]
    assert (round(qwen["value"], 3), round(qwen["stderr"], 3)) == (0.082, 0.039)


def test_the_presets_on_three_models_are_those_of_the_records():
    """
    Each divergence of the table in docs/method.md, of documents that are one for a model; the shares below it, too.
    """
    names = {"SmolLM2-135M": "smollm2", "Gemma-3-270M": "gemma3", "Qwen2.5-Coder-0.5B": "qwen2.5"}
    # of the same documents, and of the first that has it
    folders = ("presets", "schemes-cpu", "two-bits-smollm2")
    found, documents = {}, {}
    for path in [p for folder in folders for p in sorted((ROOT / f"results/{folder}/cells").glob("*/record.json"))]:
        row = json.loads(path.read_text())
        model = next(name for name, begins in names.items() if row["model"]["name"].startswith(begins))
        metric = next(m for m in row["metrics"] if m["name"] == "kld")
        found.setdefault((model, row["dtype"], row["rotation"]), metric)
        documents.setdefault(model, set()).add(row["facts"]["documents_sha256"])
    assert [len(one) for one in documents.values()] == [1, 1, 1]

    head, *rows = table("docs/method.md", "| scheme | SmolLM2-135M | Gemma-3-270M |")

    def of(model, scheme):
        columns = Scheme.parse(scheme).columns()
        return found[model, columns["dtype"], columns["rotation"]]

    shown = 0
    for scheme, *values in rows:
        name = scheme.strip("`") if scheme.startswith("`") else "int2_centered_window+l0=int8_per_token_head"
        for model, value in zip(head[1:], values, strict=True):
            if value != "–":
                assert agrees(value, of(model, name)["value"]), (model, name)
                shown += 1
    assert shown >= 35

    def less(model, scheme, than):
        return round(100 * (1 - of(model, scheme)["value"] / of(model, than)["value"]))

    steps = (
        ("int8_centered", "int8_per_token_head"),
        ("int4_centered", "int4_per_token_head"),
        ("int4_centered_window", "int4_centered"),
    )
    shares = [
        [less(model, *step) for step in steps] for model in ("Gemma-3-270M", "Qwen2.5-Coder-0.5B", "SmolLM2-135M")
    ]
    words = in_one_line("docs/method.md")
    assert shares == [[73, 71, 87], [91, 97, 88], [56, 42, 95]]
    assert "73 % off what int8 loses and 71 % off what int4 does, and the window 87 % off" in words
    assert "they take 91, 97 and 88 %, on SmolLM2 56, 42 and 95 %" in words
    two, mended = (
        of(qwen := "Qwen2.5-Coder-0.5B", "int2_centered_window"),
        "int2_centered_window+l0=int8_per_token_head",
    )
    assert "(0.454 ± 0.304), and one layer, the first, makes 85 % of its loss" in words
    assert (round(two["value"], 3), round(two["stderr"], 3)) == (0.454, 0.304)
    assert less(qwen, mended, "int2_centered_window") == 85


@pytest.mark.parametrize(
    ("folder", "model", "count"), [("smollm2", "SmolLM2-135M", 29), ("qwen0.5b", "Qwen2.5-Coder-0.5B", 12)]
)
def test_the_tables_beside_llama_cpp_are_those_of_the_records(folder, model, count):
    """
    Each divergence to the place it is shown to; where llama.cpp stopped the record says so; all of one set of tokens.
    """
    record, theirs, ours = beside_llama_cpp(folder)
    alike = {(row["dtype"], row["rotation"]): row["kld"] for row in record.get("alike", [])}

    def agree(shown, value):
        return abs(float(shown) - value) <= 0.02 * value if "e" in shown else agrees(shown, value)

    _, *rows = table("docs/method.md", f"| {model}, keys | values |")
    assert len(rows) == len({key[1:] for key in theirs}) == count
    for keys, values, rotated, file, float32, own, *same in [[cell.strip("`") for cell in row] for row in rows]:
        place = keys, values, rotated.startswith("yes"), "without flash" not in rotated
        scheme = keys if keys == values else f"{keys}:{values}", "hadamard:none" if place[2] else "none"
        for weights, cell in (("file", file), ("float32", float32)):
            row = theirs.get((weights, *place), {})
            assert ("error" in row) == (cell == "stops")
            assert cell in ("–", "stops") or agree(cell, row["kld"]), (place, row)
        assert own == "–" or agree(own, ours[scheme]["kld"]), scheme
        assert same in ([], ["–"]) or agree(same[0], alike[scheme]), scheme
    records = (ROOT / f"results/llama-cpp-{folder}/cells").glob("*/record.json")
    hashes = {json.loads(path.read_text())["facts"]["documents_sha256"] for path in records}
    assert hashes == {record["documents_sha256"]}


def beside_llama_cpp(folder):
    """The record of results/llama-cpp-FOLDER, its rows by weights and cache, and kvbench's cells by scheme."""
    path = ROOT / f"results/llama-cpp-{folder}"
    record = json.loads((path / "llama-cpp.json").read_text(encoding="utf-8"))
    theirs = {
        (row["weights"], *(row["cache"][name] for name in ("keys", "values", "hadamard", "flash"))): row
        for row in record["rows"]
    }
    return record, theirs, {cell.scheme: cell.values for cell in read(path).cells if cell.dtype != "canary"}


def test_what_is_said_beside_llama_cpp_is_that_of_the_records():
    """Perplexities and divergences of docs/method.md's text below its tables."""
    _, theirs, ours = beside_llama_cpp("smollm2")
    words = in_one_line("docs/method.md")
    exact = theirs["float32", "fp16", "fp16", False, True]["ppl"], ours["fp16", "none"]["ppl"]
    assert f"perplexity on SmolLM2 is {exact[0]:.4f} and {exact[1]:.4f}" in words
    assert f"perplexity becomes {theirs['file', 'fp16', 'fp16', False, True]['ppl']:.1f}" in words
    assert "under `q4_0` 0.160 for 0.108" in words
    assert "the 16-bit cache itself is 0.0038 away (2.4e-07 on float32 weights)" in words
    assert "keys come out 5.2 nats away, where the definition's cost 0.014" in words
    assert round(ours["q5_1:fp16", "none"]["kld"], 3) == 0.014
    _, qwen, _ = beside_llama_cpp("qwen0.5b")
    rotated = qwen["float32", "q4_0", "q4_0", True, True]["kld_by_document"]
    assert "on the two documents it has {:.2f} and {:.2f} nats there".format(*rotated) in words


@pytest.mark.parametrize(("gpu", "folder"), [("H100", "throughput-70b"), ("H200", "throughput-70b-h200")])
def test_a_model_over_two_gpus_is_as_fast_as_its_records_say(gpu, folder):
    """
    Prefill, decoding and the longest context, of each dtype that was measured, on two GPUs that were held to agree.
    """
    cells = {one.dtype: one for one in Store(ROOT / "results" / folder).load().records.values()}
    rows = table("docs/method.md", f"| two {gpu} |")[1:]

    assert [row[0] for row in rows] == ["fp16", "int8_per_token_head", "int4_per_token_head"]
    for dtype, *said in rows:
        values = {metric.name: metric.value for metric in cells[dtype].metrics}
        assert said == [f"{values['prefill']:,.0f}", f"{values['decode']:.1f}", f"{values['longest_context']:,.0f}"]
        assert [gpu in one["name"] for one in cells[dtype].environment["gpus"]] == [True, True]
        assert cells[dtype].facts["agreement"]["typical"] < cells[dtype].facts["agreement"]["tolerance"]


def test_a_model_split_over_two_gpus_is_the_same_model():
    """
    Scores, answers and states equal to the bit in each dtype, and the speeds of the record.
    """
    found = json.loads((ROOT / "results/devices/split.json").read_text(encoding="utf-8"))
    rows = table("docs/method.md", "| eight layers, tokens/s |")[1:]

    assert [row[0] for row in rows] == list(found["schemes"]) == ["fp16", "int8", "int4", "int2"]
    for dtype, *said in rows:
        one, two = (found["schemes"][dtype][f"over_{count}"] for count in (1, 2))
        scoring, decode = ([each[f"{what}_tokens_per_s"] for each in (one, two)] for what in ("scoring", "decode"))
        times = scoring[1] / scoring[0]
        assert said == [*(f"{rate:,.0f}" for rate in scoring), f"{times:.2f}", *(f"{rate:.0f}" for rate in decode)]
        assert (one["layers"], two["layers"]) == ([8], [4, 4])
        equal = found["schemes"][dtype]["equal"]
        assert all(what["equal"] for what in equal.values())
        assert equal["hidden_states"]["of"] == 33_554_432


def test_what_is_said_of_executors_is_that_of_their_records():
    """
    What a cell costs, what a kill costs, and that all three give the same records.
    """
    words = in_one_line("docs/method.md")
    scale, kills, equal = (
        json.loads((ROOT / f"results/executors/{name}.json").read_text(encoding="utf-8"))
        for name in ("executors", "cluster-kills", "cluster-equal")
    )
    dead = kills["kills"]

    assert scale["cells"] == 10_020
    assert f"each waits {scale['worker_waits_ms_a_cell']:.1f} ms" in words
    assert f"10 020 cells take {scale['overhead_percent']:.2f} % longer" in words
    assert f"spends {scale['parent_ms_a_cell']:.1f} ms a cell" in words
    assert f"{scale['parent_processor_ms_a_cell']:.1f} ms of it the processor's" in words
    assert f"laid out in {scale['laid_out_seconds']:.1f} s" in words
    plans = json.loads((ROOT / "results/executors/plan.json").read_text(encoding="utf-8"))["plan"]
    took = sorted(one["processor_seconds"] for one in plans)[len(plans) // 2]
    assert f"all of `kvbench plan` takes {took:.1f} s of the processor" in words
    assert f"the report takes {scale['report']['seconds']:.1f} s" in words
    assert f"{scale['report']['peak_bytes_so_far'] / 1e9:.1f} GB" in words
    assert sum(dead["kills"].values()) == 30
    counts = "({worker} workers, {driver} times the command, {node} nodes)".format(**dead["kills"])
    assert f"{counts} in sweeps of {dead['cells']} cells" in words
    assert f"and {dead['begun'] - dead['cells']} cells were begun again" in words
    assert dead["lost_doubled_or_changed"] == 0
    assert not equal["equal"]["differ"]
    assert set(equal["equal"]["cells"].values()) == {26}


def test_what_is_said_of_four_gpus_is_that_of_the_record():
    """Cells, their work, how long they took together, and what went before the first."""
    words = in_one_line("docs/method.md")
    run = json.loads((ROOT / "results/devices/scale-h100.json").read_text(encoding="utf-8"))["runs"]["4"]
    work, took = run["work_seconds"], run["cells_seconds"]

    assert (run["exit"], run["failed"]) == (0, 0)
    assert f"{run['cells']} cells of Qwen2.5-Coder-1.5B with {work} s of work in {took} s" in words
    assert f"{work / took:.1f} of four workers were busy" in words
    assert f"took {run['start_seconds']:.0f} s before its first cell" in words


def test_what_is_said_of_two_gpus_is_that_of_the_record():
    """Of the same cells on one and on two: seconds, how many times as fast, whose work was more, and by what."""
    words = in_one_line("docs/method.md")
    record = json.loads((ROOT / "results/devices/scale-h200.json").read_text(encoding="utf-8"))
    one, two, fast = record["runs"]["1"], record["runs"]["2"], record["times_as_fast"]["2"]
    work, took = two["work_seconds"], two["cells_seconds"]

    assert not any(run["exit"] or run["failed"] for run in (one, two))
    assert f"two H200 did {two['cells']} cells of Qwen2.5-Coder-1.5B in {took} s from the first cell on" in words
    assert f"one of them in {one['cells_seconds']} s: {fast['cells_seconds']:.2f} × as fast" in words
    assert (
        f"{fast['seconds']:.2f} × with the {one['start_seconds']:.0f} s before that cell, and every metric equal"
        in words
    )
    assert set(record["equal_metrics"].values()) == {two["cells"]}
    assert f"{work / took:.2f} of two workers were busy, but with more work: {work} s in place of" in words
    assert (
        f"of {one['work_seconds']}, since {two['kernels_compiled']} kernels were compiled on two and none on" in words
    )
    assert one["kernels_compiled"] == 0
    cells = [[end - begin for begin, end in (run["cells_at"][name] for run in (two, one))] for name in one["cells_at"]]
    alike = [pair for pair in cells if abs(pair[0] - pair[1]) < 0.5]
    assert len(cells) - len(alike) == 4
    sums = [sum(seconds) for seconds in zip(*alike, strict=True)]
    assert f"the other {len(alike)} took {sums[0]:.1f} and {sums[1]:.1f} s" in words
