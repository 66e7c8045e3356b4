"""The canary is believed dead only where its scores show it."""

from __future__ import annotations

import math

import pytest

from kvbench.results import Metric, upgrade
from kvbench.sweep.canary import verdict


@pytest.mark.parametrize(
    ("name", "unit", "higher", "base", "canary", "expected"),
    [
        ("kld", "nats", False, (0.0, 0.0), (7.7, 0.1), "wrecked"),
        ("kld", "nats", False, (0.0, 0.0), (0.01, 0.1), "unmoved"),
        ("kld", "nats", False, (0.0, 0.0), (math.nan, None), "wrecked"),
        ("same_top", "%", True, (100.0, 0.0), (0.3, 0.1), "wrecked"),
        ("same_top", "%", True, (100.0, 0.0), (99.0, 0.1), "unmoved"),
        ("word_perplexity", "ppl", False, (32.0, 1.0), (math.inf, None), "wrecked"),
        ("word_perplexity", "ppl", False, (32.0, 1.0), (32.0, 1.0), "unmoved"),
        ("ppl_baseline", "ppl", None, (12.0, 1.0), (12.0, 1.0), None),
        ("delta_p", "%", True, (0.0, 0.1), (-30.0, 0.1), None),
        ("kld_max", "nats", False, (0.0, None), (20.0, None), None),
        ("acc", "", True, (0.60, 0.02), (0.25, 0.02), "wrecked"),
        ("acc", "", True, (0.60, 0.02), (0.60, 0.02), "unmoved"),
        # a multiple choice of which the baseline knows hardly more than chance
        ("acc", "", True, (0.27, 0.02), (0.25, 0.02), "undecided"),
        # GSM8K of a small model
        ("exact_match,strict-match", "", True, (0.0, 0.0), (0.0, 0.0), "undecided"),
        ("exact_match,strict-match", "", True, (0.01, 0.006), (0.01, 0.006), "undecided"),
        ("ppl_ratio", "", False, (1.0, 0.0), (3000.0, None), "wrecked"),
        ("f1", "", True, (70.0, 2.0), (0.0, 0.0), "wrecked"),
        ("ter", "", False, (70.0, 2.0), (100.0, 2.0), None),
        # no standard error, no judgement
        ("acc", "", True, (0.6, None), (0.2, None), None),
    ],
)
def test_a_metric_says_what_it_can(name, unit, higher, base, canary, expected):
    """
    Divergence, perplexity and significant losses of accuracy are judged; floors, chance and mere differences are not.
    A metric of version 1 is judged by what its name meant.
    """

    row = {"name": name, "n": 100, "unit": unit, "higher_is_better": higher}

    def metric(value, stderr):
        return Metric(**upgrade([{**row, "value": value, "stderr": stderr}])[0])

    assert verdict(metric(*canary), metric(*base)) == expected
