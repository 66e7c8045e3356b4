"""A terminal's tables: what fits is shown, what does not is named, and no value is cut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvbench.measured import read
from kvbench.render import Column, Document, Table, text
from kvbench.report.compare import compare
from kvbench.report.comparison_text import document as compared
from kvbench.report.tables import Report

RESULTS = Path(__file__).parents[2] / "results"
SCHEMES = [("fp16", "none"), ("int4_per_token_head:int2_per_token_head", "randomized_hadamard:hadamard")]
COLUMNS = [
    Column(("dtype",), numeric=False, prose=True, group=True),
    Column(("metric",), numeric=False),
    Column(("value",), drop=1),
    Column(("n",), drop=2),
    Column(("verdict",), numeric=False, verdict=True, prose=True),
]
ROWS = [
    ["fp16", "acc", "0.62 ± 0.07", "48", "INCONCLUSIVE (n≥14000)"],
    ["fp16", "kld", "0.0031 ± 0.0002", "4", "WORSE"],
    [
        "int4_per_token_head:int2_per_token_head",
        "kld",
        "1.1 ± 0.2",
        "4",
        "INVALID: 4 documents here, 2 there",
    ],
]


@pytest.fixture(scope="module")
def documents():
    """The committed quickstart's report and comparison."""
    folder = RESULTS / "quickstart"
    measured = read(folder)
    return [Report.read(folder).document(), compared(measured, compare(measured))]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_committed_sweep_fits(documents, width):
    """
    Report and comparison have no line that is wider than the terminal; each table begins with the verdict.
    """
    for one in documents:
        lines = text.render(one, width).splitlines()

        assert max(map(len, lines)) <= width
        assert any(line.startswith("verdict ") for line in lines)


@pytest.mark.parametrize(
    ("width", "there", "absent"),
    [
        (80, ["dtype, rotation", "bits/", "kld"], ["same_top"]),
        (120, ["kld", "same_top", "perplexity"], ["acc"]),
        (200, ["kld", "perplexity", "acc"], []),
    ],
)
def test_each_tasks_first_metric_comes_before_anothers_second(documents, width, there, absent):
    """
    At 80 columns, beside verdict, names and bits, there is the distance from the baseline; at 120 both tasks are.
    """
    head = text.render(documents[0], width).split("─", maxsplit=1)[0]

    assert all(name in head for name in there)
    assert not any(name in head for name in absent)


@pytest.mark.parametrize("width", [30, 44, 60, 80, None])
def test_values_are_whole_or_their_column_is_named(width):
    """
    At every width each value stands in one piece, or its column is named as not shown.
    """
    shown = text.table(COLUMNS, ROWS, width)
    dropped = re.findall(r"not shown in \d+ columns: (.*?);", shown.replace("\n  ", " "))

    for place, column in enumerate(COLUMNS):
        if column.lines[0] not in ", ".join(dropped).split(", "):
            for row in ROWS:
                words = row[place].split() if column.prose else [row[place]]
                assert all(part in shown for word in words for part in re.split(r"(?<=:)", word))


def test_in_80_columns_scores_are_seen_beside_the_distance():
    """
    Of the widest committed sweep, with a name of 24 letters for its score, the verdict, the scheme, its bits and two
    metrics are there: the first task's and the KL divergence. A comparison has its difference and interval.
    """
    shown = text.render(Report.read(RESULTS / "qwen").document(), 80)

    head = shown.split("─", maxsplit=1)[0]
    assert all(name in head for name in ("verdict", "dtype, rotation", "bits/", "gsm8k", "strict-match", "kld"))
    folder = read(RESULTS / "qwen")
    other = text.render(compared(folder, compare(folder)), 80).split("─", maxsplit=1)[0]
    assert all(name in other for name in ("verdict", "task, metric", "difference", "95 % interval"))
    assert re.search(r"fp8_per_tensor +8\.00 +0\.103 ± 0\.008 +0\.45 ± 0\.03\n", shown)


def test_what_says_nothing_is_left_out_of_a_joined_column():
    """
    Where there is room a rotation has its own column; where there is none it goes below its dtype, but not `none`.
    """
    columns = [Column(("dtype",), numeric=False, prose=True), Column(("rotation",), numeric=False, joins="none")]
    rows = [["fp16", "none"], ["int4_per_token_head", "hadamard"]]

    assert text.table(columns, rows, 40).splitlines()[2].split() == ["fp16", "none"]
    assert text.table(columns, rows, 20).splitlines()[2:] == ["fp16", "int4_per_token_head", "hadamard"]


def test_columns_go_in_their_order_and_groups_before_them():
    """
    First names that rows have in common stand above these, then the column with the highest `drop` goes, then the next.
    """
    widths = (200, 80, 60, 44)
    heads = [text.table(COLUMNS, ROWS, width).splitlines()[0].split() for width in widths]

    assert heads == [
        ["verdict", "dtype", "metric", "value", "n"],
        ["verdict", "dtype", "metric", "value", "n"],
        ["verdict", "metric", "value", "n"],
        ["verdict", "metric", "value", "n"],
    ]
    assert text.table(COLUMNS, ROWS, 30).splitlines()[0].split() == ["verdict", "metric"]
    assert text.table(COLUMNS, ROWS, 44).count("fp16") == 1


def test_verdicts_have_a_color_where_the_terminal_does():
    """
    WORSE is red, INCONCLUSIVE yellow, in the verdict's column alone; without color no escape is written.
    """
    one = Document(sections=[Table("WORSE", COLUMNS, ROWS)])

    assert re.search(r"\x1b\[31mWORSE +\x1b\[0m", text.render(one, color=True))
    assert text.render(one, color=True).count("\x1b[33m") == 1
    assert "\x1b" not in text.render(one)


@pytest.mark.parametrize("count", ["5 WORSE; 1 EQUIVALENT", "WORSE kld; 2 EQUIVALENT"])
def test_a_count_of_verdicts_is_as_red_as_the_worst(count):
    """
    The first verdict named decides.
    """
    assert "\x1b[31m" in text.table([Column(("verdict",), numeric=False, verdict=True)], [[count]], color=True)


def test_no_line_breaks_inside_a_number():
    """
    A number stays with its unit and its error.
    """
    line = "needle 0.0031 ± 0.0002 nats n=80, peak memory 12.4 GiB, margin 1 pp, 3 × 8k tokens of 4 texts"
    for width in range(24, 60):
        broken = text.wrapped(line, width)
        assert " ".join(part.strip() for part in broken) == line
        assert not [part for part in broken if re.search(r"(\d|±|×)$", part)]
        assert not [part for part in broken if re.match(r" *(±|×|nats|GiB|pp)", part)]
