"""What a record says, how its numbers are shown, and what it is called."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from kvbench.results import Metric, headline, kernel_task, name_of, shown_megabytes, shown_metric, upgrade


def test_a_name_depends_on_content_alone():
    """
    A cell's name is the same on every machine and for any order of keys, and another for another value.
    """
    name = name_of("Toy int4:int2 / a", {"b": (1, 2), "a": None})

    assert name == name_of("Toy int4:int2 / a", {"a": None, "b": [1, 2]})
    assert name == "toy-int4-int2-a-ee743f2fa2"
    assert name != name_of("Toy int4:int2 / a", {"a": None, "b": [2, 1]})


@pytest.mark.parametrize(
    ("value", "stderr", "unit", "text"),
    [
        (0.88931, 0.00862, "", "0.889 ± 0.009"),
        (0.85712, 0.0134, "", "0.857 ± 0.013"),
        (0.0031, 0.00021, "nats", "0.0031 ± 0.0002"),
        (98.37, 0.42, "%", "98.4 ± 0.4 %"),
        (38.3, 5.1, "", "38 ± 5"),
        (4203.0, 210256.0, "ppl", "4.2e+03 ± 2e+05"),
        (0.5, None, "", "0.5"),
        (12.34567, None, "ppl", "12.35"),
        (0.0, None, "", "0"),
        (0.0, 0.0, "", "0"),
        (-1.2e-7, None, "nats", "-1.20e-07"),
        (math.inf, None, "ppl", "inf"),
        (math.nan, 0.1, "", "nan"),
    ],
)
def test_a_number_is_shown_to_its_uncertainty(value, stderr, unit, text):
    """
    The standard error has one digit, or two where it begins with 1, and the value as many places.
    """
    assert shown_metric(Metric("m", value, stderr, 10, unit)) == text


def test_a_table_shows_the_numbers_that_readers_trust():
    """
    Of a divergence the mean, same-top and perplexity; of perplexities the words'; of a group its own. Records of
    version 1 did not say so, and are read as if they did.
    """

    def names(*all_names: str) -> list[str]:
        rows = [
            {"name": name, "value": 1.0, "stderr": None, "n": 1, "unit": "", "higher_is_better": None}
            for name in all_names
        ]
        return [metric.name for metric in headline([Metric(**row) for row in upgrade(rows)])]

    assert names("kld", "kld_p99", "delta_p", "rms_delta_p", "same_top", "ppl", "ppl_ratio") == [
        "kld",
        "same_top",
        "ppl",
        "ppl_ratio",
    ]
    assert names("word_perplexity", "byte_perplexity", "bits_per_byte") == ["word_perplexity"]
    assert names("exact_match,strict-match", "exact_match,flexible-extract") == [
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    ]
    assert names("acc", "sub/acc") == ["acc"]
    assert names("kld_max") == ["kld_max"]


def test_results_and_reports_load_without_torch():
    """
    A table can be made where no model can run, and fast.
    """
    code = (
        "import sys, kvbench.results, kvbench.report.tables; print({'torch', 'pandas', 'pydantic'} & set(sys.modules))"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "set()\n"


def test_a_kernel_s_size_is_spelled_in_one_place():
    """
    Sequences × tokens of each; a write has tokens alone.
    """
    assert kernel_task({"op": "decode", "batch": 32, "context": 8192}) == "decode 32×8192"
    assert kernel_task({"op": "write", "batch": 64, "context": None}) == "write 64"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (4_295_032_832, "4295.0"),
        (299_008, "0.3"),
        (100_000, "0.1"),
        (99_999, "0.1"),
        (34_816, "0.0348"),
        (96, "9.6e-05"),
    ],
)
def test_few_bytes_are_not_shown_as_none(nbytes, text):
    """
    Megabytes have one decimal, and from 0.1 down three digits: what a small kernel reads is never 0.0.
    """
    assert shown_megabytes(nbytes) == text
