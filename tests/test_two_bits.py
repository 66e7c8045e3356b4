"""docs/two-bits.md: what docs/generate_two_bits.py writes is what the records say."""

import re
import runpy
from pathlib import Path

import pytest

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
    preset, far, needles = (rows(made[name]()) for name in ("presets", "far", "needles"))

    int4, tcq4 = ([float(x) for x in preset[f"{name}_window"][2:5]] for name in ("int4_centered", "tcq4_balanced"))
    assert "two to four times nearer than int4 on Qwen and Gemma" in text
    assert [round(int4[i] / tcq4[i]) for i in (0, 2)] == [2, 4]

    tiers, trellis = (preset[f"{name}_centered_window"] for name in ("tiers421_far", "tcq4321"))
    assert "nearer on SmolLM2, at a tenth of a bit less" in text
    assert float(trellis[3]) < 0.7 * float(tiers[3])
    assert float(tiers[1][:4]) - float(trellis[1][:4]) == pytest.approx(0.1, abs=0.01)
    for row in (tiers, trellis):
        low, high = (float(x.replace("−", "-")) for x in re.search(r"\((\S+) to (\S+)\)", row[5]).groups())
        assert -3 < low < high < 3

    keys = ("tiers421:midrise2+w64s4", "center+rank_far"), ("tcq4321:tcq2+w64s4", "center+rank")
    assert [needles[key][3::2] for key in keys] == [["80", "80"]] * 2
    found, of_many = re.search(r"on SmolLM2 they find (\d+) and (\d+) % of what 16 bits find", text).groups()
    assert int(found) == round(100 * int(needles[keys[0]][4]) / int(needles["fp16"][4]))
    assert made["many_needles"]().split("`tcq4321:tcq2+w64s4` |")[1].split("|")[8].strip().startswith(of_many)
    assert "grows twofold, and 1.8 times" in text
    assert [f"{float(far[key][-1]):.1f}" for key in keys] == ["2.0", "1.8"]

    two = [float(row[4]) for row in preset.values() if float(row[1][:4]) < 3]
    assert "is at 0.12 or more" in text
    assert min(two) > 0.12
    assert "has 0.047 at 2.49 bits" in text
    assert "| 2.49 | 0.0474 |" in made["by_kind"]()
    assert "a fifth faster than 16 bits" in text
    assert [preset[f"{name}_centered_window"][7] for name in ("int4", "tiers421")] == ["1.22", "1.21"]

    whole = preset["tcq4_balanced_full_window"]
    assert "within 0.005 nats on all three" in text
    assert max(map(float, whole[2:5])) < 0.005
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
