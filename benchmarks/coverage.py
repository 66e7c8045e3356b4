"""How often a 95 % interval of a mean holds the truth, where the numbers have long tails and are few.

    python benchmarks/coverage.py [REPETITIONS]

Student's t, scipy's BCa bootstrap, and what `kvbench compare` takes for a distance: t at the near end, the log scale at
the far one. Prints a row a distribution and number of documents; docs/method.md has the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from kvbench.stats import compare_distances, compare_means

# how documents are drawn, and their true mean
DOCUMENTS: dict[str, tuple[Callable[[Any, int], Any], float]] = {
    "normal, as wide as its mean": (lambda draw, n: draw.normal(1, 1, n), 1.0),
    "lognormal, σ 0.1": (lambda draw, n: draw.lognormal(0, 0.1, n), np.exp(0.005)),
    "lognormal, σ 0.5": (lambda draw, n: draw.lognormal(0, 0.5, n), np.exp(0.125)),
    "lognormal, σ 1": (lambda draw, n: draw.lognormal(0, 1, n), np.exp(0.5)),
    "exponential": (lambda draw, n: draw.exponential(1, n), 1.0),
}
SIZES = (4, 8, 16, 64)


def intervals(documents: Any) -> dict[str, tuple[float, float]]:
    """By name of the method, both ends."""
    t, distance = compare_means(documents), compare_distances(documents)
    bca = stats.bootstrap((documents,), np.mean, method="BCa", n_resamples=1999, rng=1).confidence_interval
    return {
        "t": (t.ci_low, t.ci_high),
        "BCa": (bca.low, bca.high),
        "t and log scale": (distance.ci_low, distance.ci_high),
    }


def coverage(name: str, n: int, repetitions: int) -> dict[str, float]:
    """By method, the share of intervals that hold the truth."""
    draw = np.random.default_rng(0)
    made, truth = DOCUMENTS[name]
    found = [intervals(made(draw, n)) for _ in range(repetitions)]
    return {method: float(np.mean([one[method][0] <= truth <= one[method][1] for one in found])) for method in found[0]}


def main() -> None:
    """Prints the table."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    methods = ("t", "BCa", "t and log scale")
    print(f"| documents | n | {' | '.join(methods)} |\n|:---|---:|{'---:|' * len(methods)}")
    for name in DOCUMENTS:
        for n in SIZES:
            found = coverage(name, n, repetitions)
            print(f"| {name} | {n} | {' | '.join(f'{found[method]:.3f}' for method in methods)} |", flush=True)


if __name__ == "__main__":
    main()
