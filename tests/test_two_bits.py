"""docs/two-bits.md: what docs/generate_two_bits.py writes is what the records say."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from kvbench.dtypes import all_dtypes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made():
    return runpy.run_path(str(ROOT / "docs" / "generate_two_bits.py"))


def test_the_generated_tables_are_those_of_the_records(made):
    """
    `make docs` would change nothing.
    """
    assert made["page"]() == (ROOT / "docs" / "two-bits.md").read_text(encoding="utf-8")


def rows(table):
    """A table's cells, a list a row, by what is in the first column or, where that says too little, the first two."""
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {tuple(row[:2]): row for row in cells} | {row[0]: row for row in cells}


def test_what_the_first_screen_says_is_in_the_tables_below(made):
    """
    Of the presets: who is nearest by how much, what SmolLM2 finds of needles, what grows over 32k tokens, Gemma.
    """
    text = " ".join((ROOT / "docs" / "two-bits.md").read_text(encoding="utf-8").split("## Tiers")[0].split())
    preset, far, needles = (rows(made[name]()) for name in ("presets", "far_more", "needles"))

    int4, tcq4 = ([float(x) for x in preset[f"{name}_window"][2:5]] for name in ("int4_centered", "tcq4_balanced"))
    assert "two to four times nearer than int4 on Qwen and Gemma" in text
    assert [round(int4[i] / tcq4[i]) for i in (0, 2)] == [2, 4]

    tiers, trellis = (preset[f"{name}_centered_window"] for name in ("tiers421_far", "tcq4321"))
    assert "nearer on all three models, most on SmolLM2, at a tenth of a bit less" in text
    shares = [float(a) / float(b) for a, b in zip(trellis[2:5], tiers[2:5], strict=True)]
    assert max(shares) < 1
    assert min(shares) == shares[1]
    assert float(tiers[1][:4]) - float(trellis[1][:4]) == pytest.approx(0.1, abs=0.01)
    for row in (tiers, trellis):
        low, high = (float(x.replace("−", "-")) for x in re.search(r"\((\S+) to (\S+)\)", row[5]).groups())
        assert -3 < low < high < 3

    keys = ("tiers421:midrise2+w64s4", "center+rank_far"), ("tcq4321:tcq2+w64s4", "center+rank")
    assert [needles[key][3::2] for key in keys] == [["80", "80"]] * 2
    found, of_many = re.search(r"on SmolLM2 they find (\d+) and (\d+) % of what 16 bits find", text).groups()
    assert int(found) == round(100 * int(needles[keys[0]][4]) / int(needles["fp16"][4]))
    assert made["many_needles"]().split("`tcq4321:tcq2+w64s4` |")[1].split("|")[8].strip().startswith(of_many)
    assert "their KLD grows 1.5 and 1.1 times" in text
    assert [f"{float(far[key][-1].split()[0]):.1f}" for key in keys] == ["1.5", "1.1"]

    two = [float(row[4]) for row in preset.values() if float(row[1][:4]) < 3]
    assert "is at 0.12 or more" in text
    assert min(two) > 0.12
    assert "has 0.047 at 2.49 bits" in text
    assert "| 2.49 | 0.0474 |" in made["by_kind"]()
    assert "0.045 of documents that did not choose it" in text
    pairs = [
        [float(x) for x in re.split(", ", cell)]
        for row in rows(made["held"]()).values()
        for cell in row[3:]
        if re.match(r"\d", cell)
    ]
    assert "0.0474, 0.0445" in made["held"]()
    assert "within 20 % for every preset and model, sooner less than more" in text
    assert all(other == pytest.approx(one, rel=0.2) for one, other in pairs)
    assert sum(other < one for one, other in pairs) > len(pairs) / 2
    assert "a fifth faster than 16 bits" in text
    assert [preset[f"{name}_centered_window"][7] for name in ("int4", "tiers421")] == ["1.22", "1.21"]

    whole = preset["tcq4_balanced_full_window"]
    assert "within 0.005 nats on all three (on other documents too)" in text
    assert max(map(float, whole[2:5])) < 0.005
    place = made["FIELD"]["place"](made["Scheme"].parse("tcq4_balanced_full_window"))
    other = [loss for key, loss in made["_losses"]("two-bits-held").items() if key[1:] == place]
    assert len(other) == 3
    assert max(other) <= 0.005
    assert whole[5].endswith("=")


def test_four_bits_beside_16_and_8_in_one_run_are_what_the_page_says(made):
    """
    GSM8K of `tcq4_balanced_full_window`: its share, the differences and their intervals, and the verdicts at 2 points.
    """
    text = " ".join((ROOT / "docs" / "two-bits.md").read_text(encoding="utf-8").split())
    run, dtype = made["read"](ROOT / "results" / "two-bits-four"), "tcq4+w64s4"
    shares, differences = [], []
    for base in (None, made["INT8"]):
        (row,) = [
            row
            for row in made["compare"](run, baseline=base, margin="2pp").rows
            if row.metric == made["SCORE"] and row.dtype == dtype
        ]
        assert row.verdict == "EQUIVALENT"
        points = [f"{100 * x:+.1f}".replace("-", "−") for x in (row.difference, row.ci_low, row.ci_high)]
        differences.append(f"{points[0]}{'' if base is None else ' points'} ({points[1]} to {points[2]})")
        shares += [row.value, row.baseline]

    share, exact, int8 = (f"{100 * x:.1f}" for x in (shares[0], shares[1], shares[3]))
    assert f"answers {share} % where they answer {exact} and {int8}: {' and '.join(differences)}" in text


def test_what_the_page_says_of_decode_steps_is_in_the_records(made):
    """
    Microseconds of a layer's step that int2 saves and windows take back, and how near the second run's rates are.
    """
    text = " ".join((ROOT / "docs" / "two-bits.md").read_text(encoding="utf-8").split())
    rates = [
        {place: metrics["decode"]["value"] for place, metrics in made["records"](run, "8 × 8k").items()}
        for run in ("two-bits-speed", "two-bits-speed-repeat")
    ]

    def saved(a, b):
        """Of a layer's step of 8 sequences, by model: what b takes less than a."""
        us = {place: 8e6 / rate for place, rate in rates[0].items()}
        models = {made["SHAPE"]: 36, "qwen2.5-coder-1.5b-instruct": 28}
        return [round((us[model, *a] - us[model, *b]) / layers) for model, layers in models.items()]

    exact, int4, int2 = (
        ("fp16", "none"),
        ("int4_per_token_head", "randomized_hadamard"),
        ("int2_per_token_head", "hadamard"),
    )
    tiers, window = (
        made["FIELD"]["place"](made["Scheme"].parse(f"{name}_centered_window")) for name in ("tiers421", "int4")
    )
    found = (*saved(exact, int2), *saved(tiers, int2), *saved(window, int4))
    assert (
        "int2 saves {} µs a layer on the shape and {} on the 1.5B, and tiers with centres and their window "
        "take {} and {} µs of it back, int4's {} and {} beside plain int4".format(*found)
        in text
    )

    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    shown = [f"{rates[0][made['SHAPE'], *place]:,.0f}" for place in (window, tiers, exact)]
    assert "decode at {} in int4 and at {} in tiers of 2.45 bits, where 16 bits decode at {} (".format(*shown) in readme

    assert "gave every decode rate again to 0.2 %; the 1.5B was timed once" in text
    assert all(rate == pytest.approx(rates[0][place], rel=0.002) for place, rate in rates[1].items())


def test_what_the_page_says_of_reading_trellises_is_in_the_record(made):
    """
    The prototype beside the best 16-bit kernels, its ratio, tokens, error and prediction; the times of ways of reading.
    """
    text = " ".join((ROOT / "docs" / "two-bits.md").read_text(encoding="utf-8").split())
    run = json.loads((ROOT / "results" / "reading-h200.json").read_text(encoding="utf-8"))
    assert {row["gate"] for row in run["rows"] if not row["way"].startswith(("a copy", "masks"))} == {"ok"}
    us = {row["way"]: row["us"] for row in run["rows"] if row["dtype"] == "tcq2"}
    steps = [row for row in run["rows"] if row["way"].startswith("decode")]
    best = min(row["us"] for row in steps)
    exact, int2 = run["peers"]
    size = all_dtypes()["tcq2"].code_bytes(128) + 2
    assert (
        f"in {best:.0f} µs on an H200, where the best 16-bit kernels take {exact['best_16bit_us']:.0f} (torch's, "
        f"cuDNN) and {exact['us']:.0f} µs (kvbench's) and `int2` {int2['us']:.0f} in the same run: "
        f"{exact['best_16bit_us'] / best:.2f} times as fast as 16 bits, with {256 / size:.1f} times the tokens" in text
    )
    assert "agrees with float64 within 2^-11" in text
    assert max(row["error"] for row in steps) <= 2**-11
    assert f"all of them {us['2 a lookup, 32 tables']:.0f} µs" in text
    assert f"lanes wait for each other: {us['2 a lookup, 1 table']:.0f} µs" in text
    assert f"in the mean, and {us['4 a lookup, as int8']:.0f} µs" in text
    assert f"windows round right): {us['polynomial']:.0f} µs" in text
    cached = [time for way, time in us.items() if way.startswith("Triton") and "L1" in way]
    assert f"take {min(cached):.0f} to {max(cached):.0f} µs" in text
    assert f"without conflicts: {us['Triton, 1 a lookup, 32 tables']:.0f} µs" in text
    over = {
        row["way"]: (row["us"], max(row["predicted"].values()))
        for row in run["rows"]
        if row.get("predicted") and "L1" not in row["way"]
    }
    assert f"took up to {max(a / b for a, b in over.values()):.1f} times as long" in text
    masks = over["masks of codes of 2 bits, no trellis"]
    assert f"({masks[0]:.0f} µs, where their bytes take {masks[1]:.0f})" in text


def energies(name, rows, parts):
    """Of each row's parts the energy of what a dtype errs by, and their own: [rows, parts, 2]."""
    dtype = all_dtypes()[name]
    errors = dtype.dequantize(dtype.quantize(rows)) - rows
    pairs = zip(errors.split(parts, -1), rows.split(parts, -1), strict=True)
    return torch.stack([torch.stack([x.square().sum((-2, -1)) for x in pair], -1) for pair in pairs], 1)


def test_what_the_page_says_of_rows_is_what_dtypes_do_to_them():
    """
    Of tiers in a trellis and uniform ones the decibels of each width's part, and what heavy tails cost `tcq2`.
    """
    text = " ".join((ROOT / "docs" / "two-bits.md").read_text(encoding="utf-8").split())
    generator = torch.Generator().manual_seed(0)
    rows = {width: torch.randn(3000, 1, width, generator=generator) for width in (64, 128)}

    parts = re.search(
        r"err by ([\d.]+), ([\d.]+) and ([\d.]+) dB, where uniform tiers have ([\d.]+), ([\d.]+) and ([\d.]+):", text
    )
    for said, name in zip((parts.groups()[:3], parts.groups()[3:]), ("tcq421", "tiers421_per_token_head"), strict=True):
        error, own = energies(name, rows[64], (16, 32, 16)).sum(0).T
        assert (10 * torch.log10(own / error)).tolist() == pytest.approx([float(x) for x in said], abs=0.2)

    said = re.search(r"errs by ([\d.]+) decibels more at head_dim 64, ([\d.]+) at 128", text).groups()
    for width, more in zip((64, 128), map(float, said), strict=True):
        # two degrees: a normal number over the root of an exponential one
        heavy = rows[width] / torch.empty_like(rows[width]).exponential_(generator=generator).sqrt()
        ratios = [energies("tcq2", x, width)[:, 0] for x in (rows[width], heavy)]
        medians = [(10 * torch.log10(x[:, 1] / x[:, 0])).median() for x in ratios]
        assert float(medians[0] - medians[1]) == pytest.approx(more, abs=0.2)
