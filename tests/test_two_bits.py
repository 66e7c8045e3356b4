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
    assert "two to four times nearer on Qwen and Gemma in fewer bits" in text
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
    assert "has 0.048 at 2.49 bits" in text
    assert "| 2.49 | 0.0483 |" in made["by_kind"]()
