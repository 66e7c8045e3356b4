"""The draws of lm-eval's bootstrap."""

import random

import pytest
from lm_eval.api import metrics

from kvbench.tasks.draws import Draws, drawn_at_once


@pytest.mark.parametrize("count", [1, 2, 97, 5153])
def test_a_resample_is_what_python_draws(count):
    """
    Each resample has the very elements, in order, that `random.Random` chooses, whatever they are.
    """
    xs = [(i, object()) for i in range(count)]
    ours, python = Draws(3), random.Random(3)

    for _ in range(20):
        assert ours.choices(xs, k=count) == python.choices(xs, k=count)


def test_the_error_of_a_perplexity_is_lm_evals_to_the_bit(monkeypatch):
    """
    A bootstrap's standard error is the same number with these draws and with lm-eval's.
    """
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    error = metrics.stderr_for_metric(metrics.perplexity, 1000)
    xs = [-random.Random(1).expovariate(1 / (1 + i % 7)) for i in range(60)]

    with drawn_at_once():
        ours = error(xs)

    assert ours == error(xs)
