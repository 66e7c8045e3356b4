"""Whether two cells differ that measured the same documents: tests of paired differences. Imports no torch.

On the distributions of scipy.special: scipy.stats and statsmodels, which tests/test_stats.py holds every one of these
against, take a second to import, and a report of ten thousand comparisons half a minute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALPHA = 0.05  # of a whole report, by Holm
POWER = 0.8
FEW = 12  # clusters of which all signs can be tried
# An interval of a share counts these documents too, two that got worse and two that got better: otherwise ten answers
# of which none moved would show, with an interval of no width, that nothing can. Bonett and Price add one each way
# (https://doi.org/10.1111/j.2044-8317.2011.02030.x); with two the size of the equivalence test stays below 5 % where
# flips are rare and all of one direction as well (tests/test_stats.py computes it).
PSEUDO_FLIPS = (-1.0, -1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    ci_low, ci_high: of 95 %, infinite where nothing says how wide. p: two-sided, of no difference; None where one
    document can't tell, and of a distance, which is never 0. n: documents.
    spread: the standard deviation of one document's difference; where that is 0, with the pseudo-documents.
    worse, better: documents whose difference is below and above 0.
    """

    mean: float
    ci_low: float
    ci_high: float
    p: float | None
    n: int
    test: str
    spread: float
    worse: int
    better: int


def compare_answers(difference: Array, groups: Sequence[Any] | None = None) -> Difference:
    """How a share changed. difference: [n] of scores within 0..1, after less before. groups: as in `compare_means`.

    Right or wrong: exact McNemar, and a paired t interval over the flips and PSEUDO_FLIPS.
    """
    worse, better, n = int((difference < 0).sum()), int((difference > 0).sum()), len(difference)
    whole = bool(np.isin(difference, (-1.0, 0.0, 1.0)).all())
    if whole and _independent(groups):
        return _flips(worse, better, n)
    plain = compare_means(difference, groups)
    pseudo = [f"pseudo {i}" for i in range(len(PSEUDO_FLIPS))]
    clusters = None if groups is None else [*map(str, groups), *pseudo]
    wide = compare_means(np.append(difference, PSEUDO_FLIPS), clusters)
    low, high = _clipped((wide.ci_low, wide.ci_high))
    # differences without any spread would make a t without bound, and a p of 0 of two documents
    sure = plain if plain.spread or plain.p is None else wide
    return replace(plain, p=sure.p, test=sure.test, ci_low=low, ci_high=high, spread=plain.spread or wide.spread)


@lru_cache(maxsize=100_000)
def _flips(worse: int, better: int, n: int) -> Difference:
    counted = np.concatenate([np.zeros(n - worse - better), -np.ones(worse), np.ones(better), PSEUDO_FLIPS])
    spread = float(counted[: -len(PSEUDO_FLIPS)].std(ddof=1) if n > 1 else 0.0) or float(counted.std(ddof=1))
    low, high = _clipped(_interval(float(counted.mean()), _error(counted), len(counted) - 1))
    p = mcnemar(worse, better)
    return Difference((better - worse) / n, low, high, p, n, "McNemar", spread, worse, better)


def mcnemar(worse: int, better: int) -> float:
    """The exact p of so many flips each way: of a fair coin, two-sided."""
    few, all_flips = min(worse, better), worse + better
    return 1.0 if 2 * few >= all_flips - 1 else 2 * float(_at_most(few, all_flips, 0.5))


def _at_most(k: Any, n: Any, p: float) -> Array:
    """The probability of k successes or fewer among n of probability p; 0 for k below 0."""
    k, n = np.asarray(k, float), np.asarray(n, float)
    inside = (k >= 0) & (k < n)
    # the incomplete beta function, which loses no digit of a small probability as 1 less it would
    chance = scipy.special.betainc(np.where(inside, n - k, 1.0), np.where(inside, k + 1, 1.0), 1 - p)
    return np.asarray(np.where(inside, chance, k >= n), float)


def _error(values: Array) -> float:
    """The standard error of a mean."""
    n = len(values)
    return math.sqrt(float(((values - values.mean()) ** 2).mean()) * (n / (n - 1)) / n)


def _interval(mean: float, error: float, df: int) -> tuple[float, float]:
    """Student's of 95 %."""
    tail = ALPHA / 2
    low, high = scipy.special.stdtrit(df, np.array([tail, 1 - tail]))
    return float(low) * error + mean, float(high) * error + mean


def _p_of_t(t: float, df: int) -> float:
    """Two-sided."""
    return 2 * float(scipy.special.stdtr(df, -abs(t)))


def _clipped(interval: Sequence[float]) -> tuple[float, float]:
    low, high = interval
    return max(-1.0, float(low)), min(1.0, float(high))


def compare_means(difference: Array, groups: Sequence[Any] | None = None, weights: Array | None = None) -> Difference:
    """How a mean changed. difference: [n], one a document.

    groups: [n]; documents of one group are not independent. weights: [n], such as a document's tokens: with them the
    mean is that over tokens, and its error is clustered by document.
    Paired t for independent documents of equal weight, else least squares with clustered errors, t with groups - 1.
    """
    n = len(difference)
    worse, better = int((difference < 0).sum()), int((difference > 0).sum())
    equal = weights is None or bool((weights == weights[0]).all())
    clusters = np.arange(n) if groups is None else _codes(tuple(map(str, groups)))
    count = int(clusters.max()) + 1
    mean = float(np.average(difference, weights=weights))
    test = "paired t" if equal and count == n else "clustered t"
    if count < 2:
        return Difference(mean, -math.inf, math.inf, None, n, test, math.inf, worse, better)
    if np.ptp(difference) == 0:  # no spread: t is 0/0, or infinite
        if mean == 0:  # numbers that are equal to the last digit are the same numbers
            return Difference(0.0, 0.0, 0.0, 1.0, n, test, 0.0, worse, better)
        p = mcnemar(count, 0)
        return Difference(mean, -math.inf, math.inf, p, n, "sign", 0.0, worse, better)
    if test == "paired t":
        error = _error(difference)
    else:  # least squares on a constant, with errors that may have anything in common within a cluster
        each = np.ones(n) if weights is None else weights
        sums = np.bincount(clusters, each * (difference - mean))
        error = math.sqrt(float(sums @ sums) * (count / (count - 1))) / float(each.sum())
    low, high = _interval(mean, error, count - 1)
    p = _p_of_t(mean / error, count - 1)
    return Difference(mean, low, high, p, n, test, error * math.sqrt(n), worse, better)


def compare_scores(difference: Array, groups: Sequence[Any] | None = None) -> Difference:
    """How the mean of a score changed whose scale nobody knows: as `compare_means`, and no surer than signs allow.

    Few scores of coarse steps can all but agree by chance, which a t-test takes for certainty. If neither cell is
    better each difference is as likely with the other sign, so up to FEW clusters p is no less than what share of all
    signs gives a mean as far from 0.
    """
    found = compare_means(difference, groups)
    keys = np.arange(len(difference)) if groups is None else _codes(tuple(map(str, groups)))
    sums = np.bincount(keys, difference)
    if found.p is None or len(sums) > FEW or not found.spread:
        return found
    means = np.abs(_signs(len(sums)) @ sums)
    p = float((means >= abs(sums.sum()) * (1 - 1e-12)).mean())
    return replace(found, p=max(found.p, p), test=f"{found.test}, signs")


@cache
def _signs(n: int) -> Array:
    """[2**n, n]: all signs that n numbers can have."""
    return np.asarray(1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1), float)


def compare_distances(
    difference: Array, groups: Sequence[Any] | None = None, weights: Array | None = None
) -> Difference:
    """How far documents are from a baseline that is at no distance from itself, such as a KL divergence: no p.

    That there is a distance is sure beforehand, so only its interval says something. Distances are never negative and
    have a long tail, which a t interval leaves out at the far end: that end is taken on the log scale, by the delta
    method, and the near one from t (benchmarks/coverage.py has how often each holds the truth).
    """
    found = replace(compare_means(difference, groups, weights), p=None, test="interval")
    away = 1 if found.mean > 0 else -1
    if not math.isfinite(found.ci_low) or not found.spread or (away * difference < 0).any():
        return found
    reach = (found.ci_high - found.mean) / abs(found.mean)
    far = found.mean * math.exp(min(reach, 700))
    return replace(found, ci_high=far) if away > 0 else replace(found, ci_low=far)


@lru_cache(maxsize=100)  # the comparisons of a task have the same groups
def _codes(groups: tuple[str, ...]) -> NDArray[np.intp]:
    """A number a document, the same for those of one group."""
    codes: NDArray[np.intp] = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    return codes


def _independent(groups: Sequence[Any] | None) -> bool:
    return groups is None or len(set(groups)) == len(groups)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction for being that many: the smallest by all, the next by one less."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(order))
    raised = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return [float(p) for p in corrected]


def ratio_of_medians(after: Array, before: Array, seed: int = 0) -> tuple[float, float, float]:
    """median(after) / median(before), and its 95 % bootstrap interval; the samples are not paired."""

    def ratio(x: Array, y: Array, axis: int = -1) -> Array:
        return np.asarray(np.median(x, axis=axis) / np.median(y, axis=axis))

    found = scipy.stats.bootstrap((after, before), ratio, vectorized=True, method="percentile", rng=seed)
    low, high = found.confidence_interval
    return float(ratio(after, before)), float(low), float(high)


# ---- what could be seen


def _power(effect: float, n: int, alpha: float) -> float:
    """Of a two-sided paired t-test; the far tail, where scipy's noncentral t is not a number, adds nothing."""
    critical = -scipy.special.stdtrit(n - 1, alpha / 2)
    return 1 - float(scipy.special.nctdtr(n - 1, effect * math.sqrt(n), critical))


def documents_to_see(spread: float, difference: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Documents at which a paired t-test sees a true difference; None where one document's spread is unknown."""
    if not (0 < spread < math.inf and difference):
        return None
    reach = float(scipy.special.ndtri(power) - scipy.special.ndtri(alpha / 2)) * spread
    fewest = max(2, math.ceil((max(reach, 0.0) / abs(difference)) ** 2))
    effect = abs(difference) / spread
    # above a thousand t is normal; at ten spreads the fewest that have one do
    while fewest < 1000 and effect < 10 and _power(effect, fewest, alpha) < power:
        fewest += 1
    return fewest


def documents_to_decide(found: Difference, margin: float | None, family: int = 1) -> int | None:
    """Documents that would decide what is open, with 80 % power.

    family: comparisons in the report. A difference whose interval is away from 0: so many that it is significant, if it
    stays as it is. Else so many that both truths would be called: no difference, and one as wide as the margin.
    Of a distance so many that its interval no longer holds the margin.
    """
    if found.test == "interval":
        wanted = None if margin is None else documents_to_see(found.spread, abs(found.mean) - margin)
    elif found.ci_low > 0 or found.ci_high < 0:
        wanted = documents_to_see(found.spread, found.mean, ALPHA / family)
    elif margin is None:
        return None
    else:
        seen = documents_to_see(found.spread, margin, ALPHA / family)
        # each side of the interval must stay within the margin
        excluded = documents_to_see(found.spread, margin, ALPHA, 1 - (1 - POWER) / 2)
        wanted = max(seen, excluded) if seen and excluded else None
    return None if wanted is None else max(wanted, found.n + 1)


def mcnemar_power(n: int, discordance: float, drop: float, alpha: float = ALPHA) -> float:
    """Probability that exact McNemar sees a true drop of a share.

    n: documents. discordance: share of them that flip, in either direction. alpha: two-sided.
    """
    low, high = np.ceil(scipy.special.bdtrik((1e-9, 1 - 1e-9), n, min(discordance, 1 - 1e-12))).astype(int)
    flips = np.arange(low, high + 1)
    # the most flips to one side that are still significant, of so many in all; -1 where none are
    most = _largest(flips, alpha / 2)
    to_worse = (discordance + drop) / (2 * discordance)
    seen = _at_most(most, flips, to_worse) + _at_most(most, flips, 1 - to_worse)
    chances = np.diff(_at_most(np.arange(low - 1, high + 1), n, discordance))
    return float((chances * seen).sum())


def _largest(flips: NDArray[np.int_], level: float) -> Array:
    """The most heads of so many tosses of a fair coin that are no likelier than `level`; -1 where none are."""
    found = np.floor(scipy.special.bdtrik(level, np.maximum(flips, 1), 0.5))
    found += _at_most(found + 1, flips, 0.5) <= level
    return np.asarray(found - (_at_most(found, flips, 0.5) > level))


@cache
def smallest_drop(n: int, discordance: float, alpha: float = ALPHA) -> float | None:
    """The smallest drop of a share that exact McNemar sees with 80 % power; None where not even one of everything.

    discordance: share of documents that flip; where the drop is larger, the drop.
    """

    def lacking(drop: float) -> float:
        return mcnemar_power(n, max(discordance, drop), drop, alpha) - POWER

    if lacking(1.0) < 0:
        return None
    return _bisect(lacking, 1e-6, 1.0, 1e-5)


@cache
def smallest_mean(n: int, spread: float, alpha: float = ALPHA) -> float | None:
    """The smallest difference of a mean that a paired t-test of n documents sees with 80 % power."""
    if n < 2 or not math.isfinite(spread):
        return None

    def lacking(effect: float) -> float:
        return _power(effect, n, alpha) - POWER

    # solve_power gives up, and says nothing, where n is small and alpha too
    largest = next((2.0**i for i in range(10) if lacking(2.0**i) > 0), None)
    return None if largest is None else _bisect(lacking, 1e-9, largest, 2e-12) * spread


def _bisect(rising: Callable[[float], float], low: float, high: float, within: float) -> float:
    """Where a function is 0 that is below it at `low` and above it at `high`."""
    step = high - low
    while True:
        step /= 2
        middle = low + step
        if rising(middle) < 0:
            low = middle
        if step < within:
            return middle


# ---- margins


def parse_margin(text: str) -> float:
    """0.01 for `1pp`: the difference that does not matter.

    One percentage point of a share, one percent of a perplexity or a time, 0.01 nats of a divergence.

    Raises:
        ValueError: another form, or none above 0 and below 100.
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) *pp", str(text).strip())
    if not found or not 0 < float(found[1]) < 100:
        unit = f": write {text}pp" if re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,9})?", str(text).strip()) else ""
        raise ValueError(f"expected a margin in percentage points, such as 1pp, not '{text}'{unit}")
    return float(found[1]) / 100
