import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm, ttest_1samp
from sklearn.metrics import f1_score, recall_score, roc_auc_score

import intervals


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def scored(rng):
    targets = (rng.random(300) < 0.3).astype(float)
    return targets, np.round(1 / (1 + np.exp(-rng.normal(targets, 1.0))), 2)  # rounded: many ties


def placement_delong(targets, scores):
    """(auc, variance, placements of positives, of negatives) from all pairs, as DeLong 1988 defines them."""
    positives, negatives = scores[targets == 1], scores[targets == 0]
    wins = np.array([[(x > y) + (x == y) / 2 for y in negatives] for x in positives], float)
    v10, v01 = wins.mean(axis=1), wins.mean(axis=0)
    s10 = sum((v10 - wins.mean()) ** 2) / (len(v10) - 1)
    s01 = sum((v01 - wins.mean()) ** 2) / (len(v01) - 1)
    return wins.mean(), s10 / len(v10) + s01 / len(v01), v10, v01


# ---------------------------------------------------------------- patient bootstrap


def test_bootstrap_interval_draws_patients_not_slices(rng):
    patients = np.repeat(np.arange(30), 40)
    targets = np.repeat(rng.random(30) < 0.5, 40).astype(float)
    shared = np.repeat(rng.normal(0, 1, 30), 40)  # all slices of a patient err together
    scores = targets + shared
    low, high = intervals.bootstrap_auc(targets, scores, patients, seed=1)
    narrow_low, narrow_high = intervals.bootstrap_auc(targets, scores, np.arange(len(targets)), seed=1)
    assert high - low > 3 * (narrow_high - narrow_low)
    assert low < roc_auc_score(targets, scores) < high


def test_bootstrap_interval_repeats_with_its_seed_and_equals_a_plain_loop(scored, rng):
    targets, scores = scored
    patients = rng.permutation(len(targets)) // 10
    found = intervals.bootstrap_auc(targets, scores, patients, seed=5, replicates=200)
    assert found == intervals.bootstrap_auc(targets, scores, patients, seed=5, replicates=200)
    draws = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), size=200)
    values = []
    for draw in draws:
        rows = np.repeat(np.arange(len(targets)), draw[patients])
        values.append(roc_auc_score(targets[rows], scores[rows]))
    assert tuple(found) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


def test_draws_one_at_a_time_are_those_of_one_call():
    together = np.random.default_rng(3).multinomial(50, np.full(50, 1 / 50), size=20)
    np.testing.assert_array_equal(list(intervals.patient_draws(50, 3, 20)), together)


@pytest.mark.parametrize("targets", [np.zeros(5), np.ones(5), np.full(5, math.nan)])
def test_bootstrap_of_one_class_is_nan(targets):
    found = intervals.bootstrap_auc(targets, np.linspace(0, 1, 5), np.arange(5), seed=0, replicates=20)
    assert all(map(math.isnan, found))


def test_bootstrap_of_nothing_and_of_scores_that_are_no_numbers_is_nan():
    nothing = intervals.bootstrap_auc(np.array([]), np.array([]), np.array([]), seed=0)
    broken = intervals.bootstrap_auc([0, 1, 1], [0.1, math.nan, 0.3], [0, 1, 2], seed=0, replicates=20)
    assert all(map(math.isnan, (*nothing, *broken)))


def test_bootstrap_of_one_patient_has_no_width(scored):
    found = intervals.bootstrap_auc(*scored, np.zeros(300), seed=0, replicates=20)
    assert tuple(found) == pytest.approx((roc_auc_score(*scored),) * 2, abs=1e-12)


@pytest.mark.parametrize(
    ("terms", "statistic", "oracle"),
    [
        (lambda t, c: [t & c, t], lambda sums: sums[0] / sums[1], recall_score),
        (lambda t, c: [t & c, t, c], lambda sums: 2 * sums[0] / (sums[1] + sums[2]), f1_score),
    ],
    ids=["sensitivity", "f1"],
)
def test_bootstrap_of_sums_equals_a_plain_loop(scored, terms, statistic, oracle):
    targets, called = scored[0] == 1, scored[1] >= 0.55
    patients = np.arange(300) % 25
    columns = np.column_stack(terms(targets, called))
    found = intervals.bootstrap_sums(columns, patients, statistic, seed=2, replicates=150)
    values = []
    for times in intervals.patient_draws(25, 2, 150):
        rows = np.repeat(np.arange(300), times[patients].astype(int))
        values.append(oracle(targets[rows], called[rows]))
    assert tuple(found) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


def test_bootstrap_leaves_replicates_without_a_value_out():
    terms, patients = np.array([[1, 1], [0, 0]]), np.array(["a", "b"])  # a quarter draws b twice: 0 / 0
    found = intervals.bootstrap_sums(terms, patients, lambda sums: sums[0] / sums[1], seed=0, replicates=50)
    assert found == (1, 1)


def test_bootstrap_of_many_numbers_is_that_of_each(scored, rng):
    parts, wholes = rng.random((25, 2)), np.ones((25, 2))
    parts[:20, 0] = wholes[:20, 0] = 0  # 0 / 0 where only these were drawn
    parts[:, 1] = wholes[:, 1] = 0

    def shares(times):
        return times @ parts / (times @ wholes)

    found = intervals.patient_bootstraps(shares, 25, seed=2, replicates=150)
    assert found[1] == pytest.approx(intervals.UNKNOWN, nan_ok=True)
    alone = intervals.patient_bootstrap(lambda times: shares(times[None])[0, 0], 25, seed=2, replicates=150)
    assert found[0] == pytest.approx(alone)
    nothing = intervals.patient_bootstraps(lambda times: np.zeros((len(times), 3)), 0, seed=2)
    assert np.isnan(nothing).all()
    assert len(nothing) == 3


# ---------------------------------------------------------------- DeLong


@pytest.mark.parametrize("digits", [1, 2, 9])
@pytest.mark.parametrize("n", [5, 41])
def test_delong_equals_its_definition_over_all_pairs(rng, n, digits):
    targets = (np.arange(n) % 3 == 0).astype(float)
    scores = np.round(rng.normal(targets, 1.0), digits)
    found = intervals.delong_auc(targets, scores)
    area, variance, _, _ = placement_delong(targets, scores)
    assert (found.auc, found.variance) == pytest.approx((area, variance), abs=1e-12)
    assert found.auc == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)


def test_delong_interval_is_symmetric_in_the_logit(scored):
    found = intervals.delong_auc(*scored, level=0.9)
    odds = [math.log(p / (1 - p)) for p in (found.low, found.auc, found.high)]
    assert odds[2] - odds[1] == pytest.approx(odds[1] - odds[0])
    slope = 1 / (found.auc * (1 - found.auc))
    assert odds[2] - odds[1] == pytest.approx(norm.ppf(0.95) * slope * math.sqrt(found.variance))


@pytest.mark.parametrize("area", [0.8, 0.85, 0.9, 0.95])
def test_delong_interval_of_60_scans_covers_the_truth_as_often_as_it_says(area):
    """Binormal scores. 3000 samples measure a true 95 % within 1.2 points (3 SE). 20,000 put the logit
    interval at 95.8, 95.8, 95.6 and 94.8 %, the symmetric one at 93.2, 92.3, 90.8 and 87.1 %."""
    rng, samples = np.random.default_rng(11), 3000
    targets = np.repeat([1.0, 0.0], 30)
    shift = math.sqrt(2) * norm.ppf(area)
    covered = 0
    for scores in rng.normal(shift * targets, 1.0, (samples, 60)):
        found = intervals.delong_auc(targets, scores)
        covered += found.low <= area <= found.high
    assert 0.93 <= covered / samples <= 0.97


def test_delong_of_separated_classes_takes_pairs_that_share_no_scan():
    targets = np.repeat([1, 0], [30, 40])
    found = intervals.delong_auc(targets, targets.astype(float))
    assert (found.auc, found.variance, found.high) == (1, 0, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 30))
    contrary = intervals.delong_auc(targets, 1.0 - targets)
    assert (contrary.low, contrary.high) == pytest.approx((0, 1 - found.low))


def test_delong_of_a_constant_score_knows_little():
    found = intervals.delong_auc(np.repeat([1, 0], 10), np.zeros(20))
    assert found.auc == 0.5
    assert found.low == pytest.approx(1 - found.high)
    assert found.low < 0.25


@pytest.mark.parametrize(
    ("targets", "scores"),
    [
        ([1, 1, 1], [0.1, 0.2, 0.3]),
        ([0], [0.5]),
        ([], []),
        ([math.nan, 1], [0.5, 0.5]),
        ([0, 0, 1, 1], [0.1, math.nan, 0.2, 0.3]),
    ],
    ids=["one class", "one row", "no row", "unknown", "NaN score"],
)
def test_delong_that_cannot_be_computed_is_nan(targets, scores):
    targets, scores = np.array(targets, float), np.array(scores, float)
    assert all(map(math.isnan, intervals.delong_auc(targets, scores)))
    assert all(map(math.isnan, intervals.delong_difference(targets, scores, scores)))


def test_delong_with_one_positive_has_an_auc_but_no_interval():
    found = intervals.delong_auc(np.array([1, 0, 0]), np.array([0.5, 0.1, 0.9]))
    assert found.auc == 0.5
    assert all(map(math.isnan, found[1:]))


def test_delong_leaves_unknown_targets_out(scored):
    more = np.append(scored[0], math.nan), np.append(scored[1], math.nan)
    assert intervals.delong_auc(*more) == intervals.delong_auc(*scored)


def test_delong_difference_equals_the_covariance_of_the_placements(scored, rng):
    targets, a = scored
    b = np.round(a + rng.normal(0, 0.2, len(a)), 2)
    found = intervals.delong_difference(targets, a, b, level=0.9)
    area_a, var_a, v10_a, v01_a = placement_delong(targets, a)
    area_b, var_b, v10_b, v01_b = placement_delong(targets, b)
    covariance = np.cov(v10_a, v10_b)[0, 1] / len(v10_a) + np.cov(v01_a, v01_b)[0, 1] / len(v01_a)
    error = math.sqrt(var_a + var_b - 2 * covariance)
    assert found.difference == pytest.approx(area_a - area_b, abs=1e-12)
    assert found.standard_error == pytest.approx(error, abs=1e-12)
    assert found.p == pytest.approx(2 * norm.sf(abs(area_a - area_b) / error))
    assert (found.low + found.high) / 2 == pytest.approx(found.difference)
    assert (found.high - found.low) / 2 == pytest.approx(norm.ppf(0.95) * error)


def test_delong_of_several_readers_is_that_of_their_mean_placements(scored, rng):
    targets, a = scored
    readers = np.round(a + rng.normal(0, 0.2, (3, len(a))), 2)
    areas, _, v10, v01 = zip(*(placement_delong(targets, own) for own in readers), strict=True)
    v10, v01 = np.mean(v10, axis=0), np.mean(v01, axis=0)
    found = intervals.delong_auc(targets, readers)
    assert found.auc == pytest.approx(np.mean(areas))
    assert found.variance == pytest.approx(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))
    of_one = intervals.delong_difference(targets, readers[:1], a)
    assert of_one == intervals.delong_difference(targets, readers[0], a)
    area, _, w10, w01 = placement_delong(targets, a)
    spread = intervals.delong_difference(targets, readers, a)
    error = math.sqrt((v10 - w10).var(ddof=1) / len(v10) + (v01 - w01).var(ddof=1) / len(v01))
    assert spread[:2] == pytest.approx((np.mean(areas) - area, error))


def test_delong_difference_turns_with_its_order(scored, rng):
    targets, a = scored
    b = rng.random(len(a))
    there, back = intervals.delong_difference(targets, a, b), intervals.delong_difference(targets, b, a)
    assert (there.difference, there.low, there.p) == pytest.approx((-back.difference, -back.high, back.p))


def test_delong_p_of_equal_classifiers_is_uniform():
    """Two equally good readers of 40 scans: p <= 0.05 in 5 % of 1500 samples, within 3 SE (1.7 points)."""
    rng, targets = np.random.default_rng(2), np.repeat([1.0, 0.0], 20)
    shared = rng.normal(targets, 1.0, (1500, 40))
    a, b = (shared + rng.normal(0, 0.7, shared.shape) for _ in range(2))
    rejected = [intervals.delong_difference(targets, *pair).p <= 0.05 for pair in zip(a, b, strict=True)]
    assert 0.033 <= np.mean(rejected) <= 0.067


def test_delong_difference_without_variance_says_so():
    targets = np.repeat([1, 0], 5)
    apart = targets.astype(float)
    assert intervals.delong_difference(targets, apart, 10 * apart) == (0, 0, 0, 0, 1)
    found = intervals.delong_difference(targets, apart, np.zeros(10))
    assert found[:2] == (0.5, 0)
    assert all(map(math.isnan, found[2:]))


# ---------------------------------------------------------------- proportions and families of tests


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (59, 60)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_clopper_pearson_equals_scipy(successes, trials, level):
    oracle = binomtest(successes, trials).proportion_ci(level, method="exact")
    found = intervals.clopper_pearson(successes, trials, level)
    assert tuple(found) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_clopper_pearson_without_trials_is_nan():
    assert all(map(math.isnan, intervals.clopper_pearson(0, 0)))


def constrained_score(gained, lost, trials, delta):
    """Tango's statistic, P(lost) from the likelihood maximised over a fine grid instead of in closed form."""
    grid = np.linspace(max(0, -delta), (1 - delta) / 2, 2_000_001)[1:-1]
    likelihood = gained * np.log(grid + delta) + lost * np.log(grid)
    likelihood += (trials - gained - lost) * np.log1p(-2 * grid - delta)
    share = grid[np.argmax(likelihood)]
    return (gained - lost - trials * delta) / math.sqrt(trials * (2 * share + delta * (1 - delta)))


@pytest.mark.parametrize(
    ("gained", "lost", "trials"), [(12, 2, 44), (1, 6, 80), (3, 3, 30), (0.4, 2.3, 25.5)]
)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_paired_proportions_end_where_the_score_of_the_maximum_likelihood_does(gained, lost, trials, level):
    found, z = intervals.paired_proportions(gained, lost, trials, level), norm.ppf((1 + level) / 2)
    assert constrained_score(gained, lost, trials, found.low) == pytest.approx(z, abs=1e-4)
    assert constrained_score(gained, lost, trials, found.high) == pytest.approx(-z, abs=1e-4)
    assert found.p == pytest.approx(2 * norm.sf(abs(gained - lost) / math.sqrt(gained + lost)))


@pytest.mark.parametrize("trials", [1, 40, 1000])
def test_paired_proportions_without_a_change_have_a_closed_form(trials):
    reach = norm.ppf(0.975) ** 2 / (trials + norm.ppf(0.975) ** 2)
    assert tuple(intervals.paired_proportions(0, 0, trials)) == pytest.approx((-reach, reach, 1))


def test_paired_proportions_turn_with_their_order_and_hold_to_their_range():
    all_gained = intervals.paired_proportions(10, 0, 10)
    assert all_gained.high == 1 and 0 < all_gained.low < 0.6
    lost = intervals.paired_proportions(0, 10, 10)
    assert lost == pytest.approx((-1, -all_gained.low, all_gained.p))
    assert all(map(math.isnan, intervals.paired_proportions(0, 0, 0)))


def test_paired_proportions_cover_the_truth_as_often_as_they_say():
    """P(gained) 0.02, P(lost) 0.07, 60 trials: 4000 samples measure 95 % within 1 point (3 SE); Wald 91.2."""
    draws = np.random.default_rng(1).multinomial(60, [0.02, 0.07, 0.91], 4000)
    found = [intervals.paired_proportions(gained, lost, 60) for gained, lost, _ in draws]
    assert np.mean([own.low <= -0.05 <= own.high for own in found]) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (6, 0), (3, 9), (4, 4), (120, 90)])
def test_mcnemar_is_the_exact_binomial(lost, gained):
    oracle = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert intervals.mcnemar(lost, gained) == pytest.approx(oracle)


def test_holm_of_a_worked_example():
    np.testing.assert_allclose(intervals.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_holm_is_bounded_by_the_raw_p_and_by_bonferroni(rng):
    p = rng.random(20) ** 3
    adjusted = intervals.holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(20 * p, 1)).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_holm_counts_what_could_not_be_tested():
    np.testing.assert_allclose(intervals.holm([math.nan, 0.02]), [math.nan, 0.04])
    assert intervals.holm([0.02]).tolist() == [0.02]
    assert intervals.holm([]).tolist() == []


def test_holm_keeps_the_family_wise_error():
    """Ten independent true nulls: a rejection at 0.05 in 4.9 % of families; 3 SE of 2000 are 1.5 points."""
    samples = np.random.default_rng(0).normal(size=(2000, 10, 12))
    p = ttest_1samp(samples, 0, axis=2).pvalue
    assert 0.034 <= np.mean([(intervals.holm(family) <= 0.05).any() for family in p]) <= 0.065
