"""The tests are as sure as they say: by simulation with a known truth, or computed exactly."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower, normal_sample_size_one_tail

from kvbench.report.verdicts import Comparison as Row
from kvbench.report.verdicts import Paired, judge
from kvbench.stats import (
    ALPHA,
    PSEUDO_FLIPS,
    Difference,
    compare_answers,
    compare_distances,
    compare_means,
    compare_scores,
    documents_to_decide,
    documents_to_see,
    holm,
    mcnemar,
    mcnemar_power,
    parse_margin,
    ratio_of_medians,
    smallest_drop,
    smallest_mean,
)

REPETITIONS = 2000


MARGIN = 0.01


def judged(differences, margin=MARGIN):
    """The verdicts of one report: a family of comparisons of shares."""
    row = Row("toy", "int4", "none", "task", "acc", "fp16 · none", unit="share", higher_is_better=True)
    return [one.verdict for one in judge([Paired(row, one, margin, "") for one in differences])]


def flips(worse, better, n):
    return compare_answers(np.concatenate([-np.ones(worse), np.ones(better), np.zeros(n - worse - better)]))


def binomial_error(p, repetitions=REPETITIONS):
    """Three standard errors of a simulated rate."""
    return 3 * np.sqrt(p * (1 - p) / repetitions)


def test_no_effect_is_seldom_called_one():
    """
    Where nothing differs, at most 5 % of the reports of 8 comparisons call anything WORSE or BETTER.
    """
    draw = np.random.default_rng(1)
    wrong = 0
    for _ in range(REPETITIONS):
        moved = draw.binomial(500, [0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2])
        worse = draw.binomial(moved, 0.5)
        verdicts = judged([flips(w, m - w, 500) for w, m in zip(worse, moved, strict=True)], margin=None)
        wrong += bool({"WORSE", "BETTER"} & set(verdicts))

    assert wrong / REPETITIONS <= ALPHA


def test_no_effect_on_means_is_seldom_called_one():
    """
    The same of means over skewed differences, such as those of perplexities.
    """
    draw = np.random.default_rng(2)
    p = [
        compare_means(d).p
        for d in draw.exponential(size=(REPETITIONS, 100)) - draw.exponential(size=(REPETITIONS, 100))
    ]
    reports = np.reshape(p, (-1, 8))

    assert np.mean([min(holm(report)) < ALPHA for report in reports]) <= ALPHA + binomial_error(ALPHA, len(reports))


def test_the_tests_are_those_of_scipy_and_statsmodels():
    """
    The t-test, clustered and weighted least squares, exact McNemar and Holm give to 11 digits what the libraries give.
    """
    draw = np.random.default_rng(25)
    d, groups, weights = draw.normal(0.1, 1, 200), draw.integers(0, 40, 200), draw.integers(1, 50, 200)
    t = scipy_stats.ttest_1samp(d, 0)
    clusters = {"cov_type": "cluster", "cov_kwds": {"groups": groups}, "use_t": True}
    fit = sm.WLS(d, np.ones(200), weights=weights).fit(**clusters)

    plain, clustered = compare_means(d), compare_means(d, groups, weights.astype(float))

    def numbers(one):
        return one.p, one.ci_low, one.ci_high

    assert numbers(plain) == pytest.approx((t.pvalue, *t.confidence_interval(1 - ALPHA)), rel=1e-11)
    assert numbers(clustered) == pytest.approx((fit.pvalues[0], *fit.conf_int(ALPHA)[0]), rel=1e-11)
    for worse, better in [(0, 0), (0, 1), (1, 1), (3, 0), (7, 8), (7, 9), (300, 12)]:
        expected = scipy_stats.binomtest(worse, worse + better).pvalue if worse + better else 1.0
        assert mcnemar(worse, better) == pytest.approx(expected, rel=1e-11)
    tried = {"permutation_type": "samples", "n_resamples": np.inf}
    for few in (d[:9], np.array([-100.0, 0.0, 0.0, 99.0, -99.0]), np.array([1.0, -1.0])):
        signs = scipy_stats.permutation_test((few,), np.mean, **tried).pvalue
        assert compare_scores(few).p == pytest.approx(max(signs, compare_means(few).p), rel=1e-11)
    p = draw.random(30) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-11)
    assert holm([]) == []


@pytest.mark.parametrize(("n", "discordance", "drop"), [(5, 0.3, 0.2), (64, 0.05, 0.05), (1319, 0.06, 0.02)])
def test_the_power_of_mcnemar_is_a_sum_over_flips(n, discordance, drop):
    """
    Of every number of flips its chance, times that of a split that is significant, by scipy's binomial distribution.
    """
    expected = 0.0
    for moved in range(n + 1):
        worse = np.arange(moved + 1)
        p = scipy_stats.binom.cdf(np.minimum(worse, moved - worse), moved, 0.5) if moved else np.ones(1)
        significant = p <= ALPHA / 2
        chance = scipy_stats.binom.pmf(worse, moved, (discordance + drop) / (2 * discordance))[significant].sum()
        expected += scipy_stats.binom.pmf(moved, n, discordance) * chance

    assert mcnemar_power(n, discordance, drop) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 255])
def test_documents_of_a_t_test_are_statsmodels(alpha):
    """
    `documents_to_see` is the fewest at which its t-test has the power, and its normal approximation above a thousand.
    """
    few, many = documents_to_see(1.0, 0.3, alpha), documents_to_see(1.0, 0.01, alpha)

    power = [TTestPower().power(0.3, n, alpha / 2, alternative="larger") for n in (few - 1, few)]
    assert power[0] < 0.8 <= power[1]
    assert many == np.ceil(normal_sample_size_one_tail(0.01, 0.8, alpha / 2))


@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 20])
def test_the_power_is_what_the_plan_says(alpha):
    """
    A drop of 2 points with 6 % discordant answers at n=1319 is seen as often as `mcnemar_power` says, within 3 points.
    """
    draw = np.random.default_rng(3)
    worse, better, _ = draw.multinomial(1319, [0.04, 0.02, 0.94], size=REPETITIONS).T

    seen = np.mean([flips(w, b, 1319).p < alpha for w, b in zip(worse, better, strict=True)])

    assert seen == pytest.approx(mcnemar_power(1319, 0.06, 0.02, alpha), abs=0.03)


def test_the_smallest_drop_is_seen_four_times_in_five():
    """
    1.8 points at n=1319 with 5 % discordant answers; none where six flips of six would not be significant.
    """
    drop = smallest_drop(1319, 0.05)

    assert drop == pytest.approx(0.018, abs=0.0005)
    assert mcnemar_power(1319, 0.05, drop) == pytest.approx(0.8, abs=0.005)
    assert smallest_drop(1319, 0.05, ALPHA / 20) > drop
    assert smallest_drop(5, 0.05) is None


def test_the_smallest_difference_of_a_mean_is_seen_four_times_in_five():
    """
    The same for means, by simulation; two documents show nothing at a corrected level.
    """
    draw = np.random.default_rng(4)
    size = smallest_mean(8, 2.0)

    seen = np.mean([compare_means(d).p < ALPHA for d in draw.normal(size, 2.0, size=(REPETITIONS, 8))])

    assert seen == pytest.approx(0.8, abs=binomial_error(0.8))
    assert smallest_mean(2, 2.0, ALPHA / 100) is None


def size_of_equivalence(n, discordance, margin):
    """The exact probability that a share that drops by the margin is called EQUIVALENT."""
    to_worse = (discordance + margin) / (2 * discordance)
    low, high = scipy_stats.binom.ppf((1e-7, 1 - 1e-7), n, discordance).astype(int)
    total = 0.0
    for moved in range(low, high + 1):
        worse = np.arange(moved + 1)
        # what compare_answers computes from worse and better flips, for all of them at once
        count = n + len(PSEUDO_FLIPS)
        mean = (moved - 2 * worse) / count
        error = np.sqrt((moved + len(PSEUDO_FLIPS) - count * mean**2) / (count - 1) / count)
        reach = scipy_stats.t.ppf(1 - ALPHA / 2, count - 1) * error
        called = (mean - reach > -margin) & (mean + reach < margin)
        chance = scipy_stats.binom.pmf(worse[called], moved, to_worse).sum()
        total += scipy_stats.binom.pmf(moved, n, discordance) * chance
    return total


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("discordance", [1.0001, 1.2, 1.5, 3.0, 6.0])
def test_a_drop_as_large_as_the_margin_is_seldom_called_equivalent(margin, discordance):
    """
    At most 5 % of the time, rare and one-sided flips included. discordance: in margins; 1 where all flips are worse.
    """
    for n in (50, 100, 150, 250, 400, 700, 1319, 2000):
        assert size_of_equivalence(n, discordance * margin, margin) <= ALPHA


def test_the_size_above_is_that_of_the_verdict():
    """
    The exact computation agrees with verdicts on simulated documents.
    """
    draw = np.random.default_rng(5)
    worse, better, _ = draw.multinomial(1319, [0.02, 0.0, 0.98], size=REPETITIONS).T

    called = [judged([flips(w, b, 1319)], 0.02)[0] == "EQUIVALENT" for w, b in zip(worse, better, strict=True)]

    expected = size_of_equivalence(1319, 0.02 * 1.0001, 0.02)
    assert np.mean(called) == pytest.approx(expected, abs=binomial_error(expected))


def test_a_mean_that_moved_by_the_margin_is_seldom_called_equivalent():
    """
    The same for means.
    """
    draw = np.random.default_rng(6)
    found = [compare_means(d) for d in draw.normal(MARGIN, 0.02, size=(REPETITIONS, 40))]

    assert np.mean([one.ci_low > -MARGIN and one.ci_high < MARGIN for one in found]) <= ALPHA


def test_clustered_documents_do_not_inflate_errors():
    """
    Twenty questions about each of 40 texts: no effect is called one in about 5 %, as independent rows in far more.
    """
    draw = np.random.default_rng(7)
    groups = np.repeat(np.arange(40), 20)
    rows = draw.normal(size=(1000, 40)).repeat(20, axis=1) + draw.normal(size=(1000, 800))

    clustered = np.mean([compare_means(row, groups).p < ALPHA for row in rows])
    naive = np.mean([compare_means(row).p < ALPHA for row in rows])

    assert clustered <= ALPHA + binomial_error(ALPHA, 1000)
    assert naive > 0.4


def test_clustered_answers_do_not_inflate_errors():
    """
    A question asked five times is one question: McNemar would call no effect one far too often.
    """
    draw = np.random.default_rng(8)
    groups = np.repeat(np.arange(150), 5)
    rows = draw.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(1000, 150)).repeat(5, axis=1)

    clustered = np.mean([compare_answers(row, groups).p < ALPHA for row in rows])
    naive = np.mean([compare_answers(row).p < ALPHA for row in rows])

    assert clustered <= ALPHA + binomial_error(ALPHA, 1000)
    assert naive > 0.2


def test_a_named_cluster_holds_the_error():
    """
    Forty passages of ten questions with an intra-class correlation of .2: no effect is called one in 5 % of the tests
    where the passage is named, in a fifth and more where each question passes for independent.
    """
    draw = np.random.default_rng(24)
    passages = np.repeat(np.arange(40), 10)
    rows = np.sqrt(0.2) * draw.normal(size=(1000, 40)).repeat(10, axis=1) + np.sqrt(0.8) * draw.normal(size=(1000, 400))
    answers = np.select([rows < -1.3, rows > 1.3], [-1.0, 1.0])

    named = np.mean([compare_answers(row, passages).p < ALPHA for row in answers])
    unnamed = np.mean([compare_means(row).p < ALPHA for row in rows])

    assert named <= ALPHA + binomial_error(ALPHA, 1000)
    assert unnamed > 0.2


def test_tokens_are_clustered_by_document():
    """
    Weighed by tokens, the mean is that over tokens, and its error is that of tokens clustered by document.
    """
    draw = np.random.default_rng(9)
    lengths = draw.integers(50, 500, size=30)
    documents = np.repeat(np.arange(30), lengths)
    tokens = draw.normal(size=30)[documents] + draw.normal(size=len(documents))
    fit = sm.OLS(tokens, np.ones_like(tokens)).fit(cov_type="cluster", cov_kwds={"groups": documents}, use_t=True)
    means = np.array([tokens[documents == i].mean() for i in range(30)])

    found = compare_means(means, weights=lengths.astype(float))

    assert found.test == "clustered t"
    assert found.mean == pytest.approx(tokens.mean())
    low, high = fit.conf_int()[0]
    # statsmodels corrects for few observations too: (N - 1) / (N - 1) of documents, (N - 1) / N of tokens
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high), rel=1e-3)


def test_of_few_documents_nothing_is_sure():
    """
    Ten answers of which none moved have an interval of some width; one document has no interval at all.
    """
    ten = flips(0, 0, 10)

    assert ten.p == 1
    assert ten.ci_low < -0.2
    assert ten.ci_high > 0.2
    one = compare_means(np.array([0.1]))
    assert (one.p, one.ci_low, one.ci_high) == (None, -np.inf, np.inf)


def test_equal_numbers_are_equal():
    """
    Differences of exactly 0 have p = 1, and an interval of no width.
    """
    same = compare_means(np.zeros(8))

    assert (same.p, same.ci_low, same.ci_high) == (1, 0, 0)


@pytest.mark.parametrize(("n", "p"), [(2, 0.5), (5, 0.0625), (8, 2 / 2**8)])
def test_a_difference_without_spread_has_no_interval(n, p):
    """
    Documents that all lose 100 points tell by their signs alone, and nothing says how far off that number is.
    """
    lost = compare_means(np.full(n, -100.0))

    assert (lost.mean, lost.test, lost.p) == (-100, "sign", p)
    assert (lost.ci_low, lost.ci_high) == (-np.inf, np.inf)
    assert documents_to_decide(lost, 1.0) is None


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 12])
def test_few_coarse_scores_are_not_called_sure(n):
    """
    Of an F1 of 0 to 100 that changes by whole steps and is no better anywhere, at most 5 % of the tests call a
    difference; of three documents a t-test calls more.
    """
    draw = np.random.default_rng(20)
    d = draw.choice([-100.0, -99.0, 0.0, 99.0, 100.0], p=[0.2, 0.2, 0.2, 0.2, 0.2], size=(REPETITIONS, n))

    called = [compare_scores(one).p for one in d]

    assert np.mean([p < ALPHA for p in called]) <= ALPHA + binomial_error(ALPHA)
    if n == 3:
        assert np.mean([compare_means(one).p < ALPHA for one in d]) > ALPHA + binomial_error(ALPHA)


def test_two_scores_that_all_but_agree_show_nothing():
    """
    -100 and -99 are two documents, whatever t says; of twenty such it is sure.
    """
    assert compare_means(np.array([-100.0, -99.0])).p < 0.01
    assert compare_scores(np.array([-100.0, -99.0])).p == 0.5
    assert compare_scores(np.array([-100.0, -99.0] * 10)).p < 1e-10


@pytest.mark.parametrize("n", [4, 8, 16, 64])
@pytest.mark.parametrize(("sigma", "least"), [(0.1, 0.93), (0.5, 0.92), (1.0, 0.86)])
def test_the_interval_of_a_distance_holds_the_truth(n, sigma, least):
    """
    Of lognormal distances at least as often as docs/method.md says; at n 8 and sigma 1 t alone in 83 of 100.
    """
    draw = np.random.default_rng(21)
    d, truth = draw.lognormal(0, sigma, size=(REPETITIONS, n)), np.exp(sigma**2 / 2)

    found = [compare_distances(one) for one in d]

    held = np.mean([one.ci_low <= truth <= one.ci_high for one in found])
    assert held >= least
    plain = np.mean([t.ci_low <= truth <= t.ci_high for t in map(compare_means, d)])
    assert held >= plain
    if n == 8 and sigma == 1.0:
        assert plain < 0.85 < 0.87 < held
    # a same-top share falls as a KL divergence rises
    assert [(one.ci_low, one.ci_high) for one in map(compare_distances, -d[:50])] == [
        pytest.approx((-one.ci_high, -one.ci_low)) for one in found[:50]
    ]


def distances(truth, sigma, n, repetitions=REPETITIONS, seed=22):
    """The verdicts of KL divergences whose documents are lognormal and have this mean; the margin is MARGIN."""
    row = Row("toy", "int4", "none", "task", "kld", "fp16 · none", unit="nats", higher_is_better=False)
    d = np.random.default_rng(seed).lognormal(0, sigma, size=(repetitions, n)) * truth / np.exp(sigma**2 / 2)
    return [judge([Paired(row, compare_distances(one), MARGIN, "")])[0] for one in d]


@pytest.mark.parametrize("n", [4, 8, 64])
def test_a_distance_as_large_as_the_margin_is_seldom_called(n):
    """
    A KL divergence of exactly the margin is called EQUIVALENT and WORSE at most 5 % of the time each, without a p.
    """
    found = distances(MARGIN, 0.15, n)

    assert {row.p_holm for row in found} == {None}
    for verdict in ("EQUIVALENT", "WORSE"):
        assert np.mean([row.verdict == verdict for row in found]) <= ALPHA
    assert found[0].verdict == "INCONCLUSIVE" or found[1].verdict == "INCONCLUSIVE"


def test_a_distance_is_called_by_its_margin_alone():
    """
    Far above the margin it is WORSE and far below EQUIVALENT, however sure it is that there is one.
    """
    assert {row.verdict for row in distances(0.15, 0.15, 8, 200)} == {"WORSE"}
    assert {row.verdict for row in distances(0.003, 0.15, 8, 200)} == {"EQUIVALENT"}


@pytest.mark.parametrize("truth", [0.9 * MARGIN, 1.1 * MARGIN])
def test_so_many_documents_decide_a_distance(truth):
    """
    With as many as `documents_to_decide` says, a distance near the margin is called right four times in five.
    """
    d = np.random.default_rng(23).lognormal(0, 0.2, size=8)
    open_case = compare_distances(truth * d / d.mean())
    n = documents_to_decide(open_case, MARGIN)
    sigma = np.sqrt(np.log(1 + (open_case.spread / truth) ** 2))

    found = distances(truth, sigma, n, 500)

    right = "WORSE" if truth > MARGIN else "EQUIVALENT"
    assert np.mean([row.verdict == right for row in found]) >= 0.8 - binomial_error(0.8, 500)


def test_two_equal_losses_prove_nothing():
    """
    Two documents that both lose half a point have an interval around 0 and a p that says the same.
    """
    both = compare_answers(np.array([-0.5, -0.5]), ["a", "b"])

    assert both.ci_low < 0 < both.ci_high
    assert both.p is not None
    assert both.p > 0.05


def test_so_many_documents_decide():
    """
    With as many as `documents_to_decide` says, no difference is called EQUIVALENT and a loss of the margin WORSE, each
    four times in five.
    """
    draw = np.random.default_rng(10)
    open_case = Difference(0.0, -0.04, 0.04, 0.9, 100, "paired t", 0.2, 50, 50)
    n = documents_to_decide(open_case, 0.03)

    equal = [compare_means(d) for d in draw.normal(0, open_case.spread, size=(500, n))]
    lost = [compare_means(d) for d in draw.normal(-0.03, open_case.spread, size=(500, n))]

    assert np.mean([one.ci_low > -0.03 and one.ci_high < 0.03 for one in equal]) >= 0.8 - binomial_error(0.8, 500)
    assert np.mean([one.p < ALPHA for one in lost]) >= 0.8 - binomial_error(0.8, 500)
    assert documents_to_see(1.0, 1.0) == 10  # of the t-test's tables


def test_holm_is_holms():
    """
    The smallest p is multiplied by how many there are, the next by one fewer, and none is below one before it.
    """
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_ratio_of_medians_covers_the_truth():
    """
    95 % of the intervals, or a little fewer for few samples, hold the true ratio of two timings.
    """
    draw = np.random.default_rng(11)
    held = 0
    for seed in range(200):
        low, high = ratio_of_medians(draw.normal(90, 2, 30), draw.normal(100, 2, 30), seed)[1:]
        held += low <= 0.9 <= high

    assert held / 200 >= 0.88


@pytest.mark.parametrize(("text", "value"), [("1pp", 0.01), ("0.5 pp", 0.005), (" 2pp", 0.02)])
def test_a_margin_is_in_points(text, value):
    """
    A number of percentage points.
    """
    assert parse_margin(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1", "1%", "-1pp", "0pp", "100pp", "pp", ""])
def test_another_margin_is_refused(text):
    """
    Without its unit, or outside of 0..100, it is none.
    """
    with pytest.raises(ValueError, match=r"expected a margin in percentage points, such as 1pp"):
        parse_margin(text)
