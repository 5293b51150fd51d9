import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.metrics import recall_score, roc_auc_score

import comparisons
import intervals
import metrics
from comparisons import KINDS, Comparison, Difference, compare, paired, read

SPREAD = math.sqrt(0.6**2 + 0.6**2 + 0.4**2)  # of simulated scores of a class: patient, row, reading
SHIFT, CUT = 1.6, 0.6  # of positives; the threshold
AUC = norm.cdf(SHIFT / (math.sqrt(2) * SPREAD))  # 0.886
SENS = norm.cdf((SHIFT - CUT) / SPREAD)  # 0.857


def simulated(rng, patients=80, *, slices=1, seeds=1, drop=0.0, replicates=200):
    """Two readings a, b of the same rows, half of the patients sick; positives of a score lower by drop."""
    owners = np.repeat(np.arange(patients), slices)
    targets = (owners < patients // 2) & ((slices == 1) | (rng.random(len(owners)) < 0.6))
    shared = rng.normal(0, 0.6, patients)[owners] + rng.normal(SHIFT * targets, 0.6)
    a, b = (shared + rng.normal(0, 0.4, (seeds, len(owners))) for _ in range(2))
    return tuple(read(targets, scores, owners, CUT, 0, replicates) for scores in (a - drop * targets, b))


def drop_for(kind, loss):
    """By how much positives must score lower to lose that much."""
    if kind == "auc":
        return SHIFT - math.sqrt(2) * SPREAD * norm.ppf(AUC - loss)
    return SHIFT - CUT - SPREAD * norm.ppf(SENS - loss)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def slices(rng):
    """(targets, patients, scores_a (3, N), scores_b (3, N)) of 40 patients, with ties and unknown targets."""
    patients = rng.permutation(np.arange(400) % 40)
    targets = ((patients < 25) & (rng.random(400) < 0.5)).astype(float)
    targets[:10] = math.nan
    base = rng.normal(np.nan_to_num(targets), 1.0)
    return targets, patients, *(np.round(base + rng.normal(0, 0.5, (3, 400)), 1) for _ in range(2))


# ---------------------------------------------------------------- differences


def test_difference_of_scans_is_delongs_of_the_mean_over_seeds(rng):
    a, b = simulated(rng, 90, seeds=3)
    found = compare(a, b)
    oracle = np.mean([[roc_auc_score(own.targets, s) for s in own.scores] for own in (a, b)], axis=1)
    assert (found.auc.a, found.auc.b) == pytest.approx(tuple(oracle))
    delong = intervals.delong_difference(a.targets, a.scores, b.scores)
    assert found.auc.estimate == pytest.approx(delong.difference)
    assert found.auc.standard_error == pytest.approx(delong.standard_error)
    assert found.auc.p == pytest.approx(delong.p, abs=0.01)  # t of 44 instead of normal
    per_seed = [np.subtract(*(roc_auc_score(a.targets, own.scores[k]) for own in (a, b))) for k in range(3)]
    assert found.auc.seed_sd == pytest.approx(np.std(per_seed, ddof=1))
    assert (found.method, found.patients, found.auc.n, found.sens.n) == ("DeLong", 90, 90, 45)


def test_difference_of_slices_has_the_error_of_a_plain_bootstrap(slices):
    targets, patients, a, b = slices
    found = paired(targets, a, b, patients, [0.4, 0.5, 0.6], [0.5] * 3, 3, 60)
    known = ~np.isnan(targets)
    values = []
    for times in intervals.patient_draws(40, 3, 60):
        rows = np.repeat(np.flatnonzero(known), times[patients[known]].astype(int))
        of = [
            [
                np.mean([roc_auc_score(targets[rows], s[rows]) for s in scores]),
                *(
                    np.mean(
                        [
                            recall_score(targets[rows], s[rows] >= t, pos_label=own)
                            for s, t in zip(scores, cuts, strict=True)
                        ]
                    )
                    for own in (1, 0)
                ),
            ]
            for scores, cuts in ((a, (0.4, 0.5, 0.6)), (b, (0.5, 0.5, 0.5)))
        ]
        values.append(np.subtract(*of))
    errors = np.std(values, axis=0, ddof=1)
    assert [getattr(found, kind).standard_error for kind in KINDS] == pytest.approx(list(errors))
    assert (found.method, found.patients, found.auc.n) == ("patient bootstrap", 40, 390)


def test_difference_of_rates_of_scans_with_one_seed_is_mcnemars_and_tangos(rng):
    a, b = simulated(rng, 200, drop=0.2)
    found = compare(a, b).sens
    own = a.targets == 1
    right_a, right_b = (reading.scores[0, own] >= CUT for reading in (a, b))
    gained, lost = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    expected = intervals.paired_proportions(gained, lost, 100)
    assert (found.low, found.high, found.p) == pytest.approx(tuple(expected))
    assert found.estimate == pytest.approx((gained - lost) / 100)
    assert found.low < found.estimate < found.high


def test_difference_turns_with_its_order(slices):
    targets, patients, a, b = slices
    there = paired(targets, a, b, patients, 0.5, 0.5, 0, 100)
    back = paired(targets, b, a, patients, 0.5, 0.5, 0, 100)
    for kind in KINDS:
        one, other = getattr(there, kind), getattr(back, kind)
        assert (one.low, one.high, one.p) == pytest.approx((-other.high, -other.low, other.p), abs=1e-9)


@pytest.mark.parametrize("count", [1, 6])
def test_identical_readings_differ_by_nothing_for_sure(rng, count):
    a, _ = simulated(rng, 20, slices=count, seeds=3)
    for kind in KINDS:
        found = getattr(compare(a, read(a.targets, a.scores, a.patients, CUT, 0, 200)), kind)
        assert (found.estimate, found.low, found.high, found.p, found.seed_sd) == (0, 0, 0, 1, 0)


@pytest.mark.parametrize("count", [1, 5])
def test_readings_that_both_separate_are_not_known_to_be_equal(count):
    patients = np.repeat(np.arange(60), count)
    targets = (patients < 20).astype(float)
    found = paired(targets, targets, 2 * targets, patients, 0.5, 0.5, 0, 50)
    reach = norm.ppf(0.975) ** 2 / (20 + norm.ppf(0.975) ** 2)  # Tango's without a change, 20 sick patients
    for kind in ("auc", "sens"):
        own = getattr(found, kind)
        assert (own.estimate, own.p) == (0, 1)
        assert (own.low, own.high) == pytest.approx((-reach, reach), abs=1e-6)
        assert own.standard_error == pytest.approx(reach / norm.ppf(0.975), abs=1e-6)
    assert found.spec.high < found.sens.high  # 40 healthy patients


def test_one_network_is_set_against_every_seed_of_the_other(rng):
    a, b = simulated(rng, 60, seeds=3)
    single = read(b.targets, b.scores[0], b.patients, CUT, 0, 200)
    found = compare(a, single).auc
    repeated = compare(a, read(b.targets, b.scores[[0, 0, 0]], b.patients, CUT, 0, 200)).auc
    assert found == pytest.approx(repeated)
    alone = compare(read(a.targets, a.scores[1], a.patients, CUT, 0, 200), single)
    assert math.isnan(alone.auc.seed_sd) and math.isnan(alone.sens.seed_sd)
    two = read(b.targets, b.scores[:2], b.patients, CUT, 0, 200)
    with pytest.raises(ValueError, match="3 and 2 training seeds"):
        compare(a, two)


@pytest.mark.parametrize("count", [1, 4])
def test_difference_without_positives_is_nan_but_for_specificity(rng, count):
    patients = np.repeat(np.arange(30), count)
    a, b = rng.random((2, 3, len(patients)))
    found = paired(np.zeros(len(patients)), a, b, patients, 0.5, 0.5, 0, 50)
    for kind in ("auc", "sens"):
        assert np.isnan(getattr(found, kind)[:-1]).all()
    assert found.spec.low < found.spec.estimate < found.spec.high


def test_difference_with_a_score_that_is_no_number_is_nan(rng):
    a, b = simulated(rng, 30, seeds=2)
    broken = a.scores.copy()
    broken[1, 3] = math.nan
    found = compare(read(a.targets, broken, a.patients, CUT, 0, 200), b)
    assert all(
        math.isnan(getattr(found, kind).estimate) and math.isnan(getattr(found, kind).p) for kind in KINDS
    )


def test_unknown_targets_count_for_nothing(slices):
    targets, patients, a, b = slices
    known = ~np.isnan(targets)
    whole = paired(targets, a, b, patients, 0.5, 0.5, 0, 50)
    part = paired(targets[known], a[:, known], b[:, known], patients[known], 0.5, 0.5, 0, 50)
    assert whole == part


def test_readings_of_other_rows_are_refused(rng):
    a, b = simulated(rng, 20)
    with pytest.raises(ValueError, match="targets or patients"):
        compare(a, read(1 - b.targets, b.scores, b.patients, CUT, 0, 200))
    with pytest.raises(ValueError, match="seed or replicates"):
        compare(a, read(b.targets, b.scores, b.patients, CUT, 1, 200))
    with pytest.raises(ValueError, match="do not fit"):
        read(a.targets, a.scores[:, 1:], a.patients, CUT, 0)
    with pytest.raises(ValueError, match="thresholds"):
        read(a.targets, a.scores, a.patients, [CUT, CUT], 0)
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        read(a.targets + 1, a.scores, a.patients, CUT, 0)


def test_a_p_that_underflows_is_not_0():
    targets, noise = np.repeat([1.0, 0.0], 5000), np.random.default_rng(0).normal(size=10_000)
    found = paired(targets, noise, targets * 20 + noise, np.arange(10_000), 5, 5, 0)
    assert 0 < found.auc.p < 1e-300
    assert 0 < found.sens.p < 1e-300


@pytest.mark.parametrize(("patients", "count"), [(80, 1), (50, 5)])
def test_difference_of_equal_readings_is_called_significant_as_often_as_it_says(patients, count):
    """400 studies: 5 % and 3 SE (3.3 points). 800 to 4000 of them give 2.8 to 6.5 %."""
    rng, studies = np.random.default_rng(5), 400
    found = [compare(*simulated(rng, patients, slices=count)) for _ in range(studies)]
    for kind in KINDS:
        assert 0.01 <= np.mean([getattr(study, kind).p <= 0.05 for study in found]) <= 0.083
        assert np.mean([own.low <= 0 <= own.high for own in (getattr(s, kind) for s in found)]) >= 0.917


def test_difference_finds_a_planted_drop(rng):
    a, b = simulated(rng, 200, slices=2, seeds=3, drop=0.6)
    found = compare(a, b)
    assert found.auc.high < 0 and found.auc.p < 1e-4
    assert found.sens.high < 0 and found.sens.p < 1e-4
    assert found.spec.p > 0.01  # negatives are as before


# ---------------------------------------------------------------- non-inferiority


@pytest.mark.parametrize("kind", ["auc", "sens"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_non_inferiority_is_seldom_claimed_when_the_loss_is_the_margin(kind, seeds):
    """600 studies of 80 + 80 scans: 2.8 % in large simulations, within 3 SE (2 points)."""
    rng, margin = np.random.default_rng(3), comparisons.MARGINS[kind]
    drop = drop_for(kind, margin)
    found = [getattr(compare(*simulated(rng, 160, seeds=seeds, drop=drop)), kind) for _ in range(600)]
    assert np.mean([own.estimate for own in found]) == pytest.approx(-margin, abs=0.005)
    assert np.mean([comparisons.non_inferior(own.low, margin) for own in found]) <= 0.048


@pytest.mark.parametrize(("kind", "margin"), [("auc", 0.06), ("sens", 0.15)])
def test_power_is_how_often_equal_readings_are_shown_non_inferior(kind, margin):
    """Of 500 studies: 3 SE are 7 points. It and the number of patients fit what larger studies reach."""
    rng = np.random.default_rng(4)
    found = [getattr(compare(*simulated(rng, 80)), kind) for _ in range(500)]
    said = np.mean([comparisons.power(own, margin) for own in found])
    assert 0.5 < said < 0.8
    assert np.mean([own.low > -margin for own in found]) == pytest.approx(said, abs=0.07)
    needed = np.median([comparisons.patients_for_power(80, own, margin) for own in found])
    larger = [getattr(compare(*simulated(rng, int(needed))), kind) for _ in range(500)]
    assert np.mean([own.low > -margin for own in larger]) == pytest.approx(0.8, abs=0.07)


def test_power_of_a_normal_error_is_its_formula():
    found = Difference(-0.01, -0.01 - 1.96 * 0.02, -0.01 + 1.96 * 0.02, 0.02, 0.6, 0.01, 0.8, 0.81, 100)
    assert comparisons.power(found, 0.05) == pytest.approx(norm.cdf(0.05 / 0.02 - 1.96))
    needed = comparisons.patients_for_power(100, found, 0.05)
    assert needed == math.ceil(100 * (0.02 * (1.96 + norm.ppf(0.8)) / 0.05) ** 2)


def difference(low, high):
    error = (high - low) / 3.92
    return Difference((low + high) / 2, low, high, error, 0.5, 0.0, 0.8, 0.8, 50)


def comparison(low, high):
    return Comparison(*[difference(low, high)] * 3, patients=50, method="DeLong")


def test_outcome_of_an_interval_by_its_place_to_the_margin():
    cases = [(-0.01, 0.02), (-0.03, 0.01), (-0.09, -0.03), (-0.02, 0.1), (math.nan, math.nan)]
    found = [comparisons.outcome(difference(*ends), 0.02) for ends in cases]
    assert found == ["non-inferior", "inconclusive", "inferior", "inconclusive", "unknown"]
    with pytest.raises(ValueError, match="margin"):
        comparisons.non_inferior(0.1, -0.02)


def test_lowest_dose_stops_at_the_first_failure_from_the_highest_down():
    ladder = {0.5: (-0.015, 0.01), 1.0: (-0.01, 0.01), 0.25: (-0.05, 0.01), 0.1: (-0.01, 0.01)}
    found = comparisons.lowest_dose(list(ladder), [comparison(*ends) for ends in ladder.values()], "auc")
    assert (found.dose, found.difference) == (0.5, difference(-0.015, 0.01))
    assert (found.failed_dose, found.how, found.margin) == (0.25, "inconclusive", 0.02)
    assert found.power == comparisons.power(difference(-0.05, 0.01), 0.02)
    assert found.patients == 50 < found.patients_needed
    wide = comparisons.lowest_dose(list(ladder), [comparison(*e) for e in ladder.values()], "sens", 0.06)
    assert (wide.dose, wide.how, wide.failed) == (0.1, "", None)
    assert math.isnan(wide.failed_dose)


def test_lowest_dose_of_a_ladder_that_fails_at_once_is_nan():
    found = comparisons.lowest_dose([1.0, 0.5], [comparison(-0.3, -0.2), comparison(0, 0.1)], "spec")
    assert math.isnan(found.dose) and found.difference is None
    assert (found.failed_dose, found.how) == (1.0, "inferior")
    nothing = comparisons.lowest_dose([1.0], [comparison(math.nan, math.nan)], "auc")
    assert nothing.how == "unknown" and math.isnan(nothing.power) and math.isnan(nothing.patients_needed)


def test_lowest_dose_refuses_what_is_no_ladder():
    with pytest.raises(ValueError, match="each once"):
        comparisons.lowest_dose([1.0, 1.0], [comparison(0, 0.1)] * 2, "auc")
    with pytest.raises(ValueError, match="kind"):
        comparisons.lowest_dose([1.0], [comparison(0, 0.1)], "accuracy")


def test_holm_counts_within_a_family():
    rows = [
        {"task": "a", "arm": 1, "p": 0.01},
        {"task": "b", "arm": 1, "p": 0.03},
        {"task": "a", "arm": 2, "p": 0.04},
        {"task": "a", "arm": 3, "p": math.nan},
    ]
    found = comparisons.with_holm(rows, ["task"])
    assert [row["p_holm"] for row in found] == pytest.approx([0.03, 0.03, 0.08, math.nan], nan_ok=True)
    assert "p_holm" not in rows[0]
    assert [row["p_holm"] for row in comparisons.with_holm(rows[:2], [])] == pytest.approx([0.02, 0.03])


# ---------------------------------------------------------------- flips


def test_flips_are_of_the_majority_of_seeds_largest_change_first():
    targets = [1, 1, 0, 0, math.nan, 1]
    before = np.array([[0.9, 0.8, 0.6, 0.1, 0.9, 0.2]] * 3)
    after = np.array(
        [
            [0.1, 0.1, 0.1, 0.2, 0.1, 0.9],
            [0.2, 0.9, 0.2, 0.2, 0.1, 1.0],
            [0.1, 0.9, 0.2, 0.9, 0.1, 0.1],
        ]
    )
    patients = np.array(list("abcdef"), dtype=object)
    found = comparisons.flips(*(read(targets, scores, patients, 0.5, 0) for scores in (before, after)))
    assert [(flip.row, flip.patient, flip.target) for flip in found.lost] == [(0, "a", 1)]
    assert [(flip.row, flip.patient, flip.target) for flip in found.gained] == [(5, "f", 1), (2, "c", 0)]
    assert found.lost[0][3:] == pytest.approx((0.9, 0.4 / 3))
    assert found.n == 5
    assert found.p == 1.0


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (7, 2), (3, 3)])
def test_flips_p_is_the_exact_binomial(lost, gained):
    calls = np.repeat([[1, 0], [0, 1], [1, 1]], [lost, gained, 10], axis=0).T.astype(float)
    targets = np.ones(calls.shape[1])
    patients = np.arange(len(targets))
    found = comparisons.flips(*(read(targets, scores, patients, 0.5, 0) for scores in calls))
    assert (len(found.lost), len(found.gained)) == (lost, gained)
    oracle = binomtest(lost, lost + gained).pvalue if lost + gained else 1
    assert found.p == pytest.approx(oracle)


def test_flips_of_slices_have_no_p_and_a_nan_score_is_refused(slices):
    targets, patients, a, b = slices
    first, second = (read(targets, scores, patients, 0.5, 0) for scores in (a, b))
    found = comparisons.flips(first, second)
    assert found.lost and math.isnan(found.p)
    with pytest.raises(ValueError, match="NaN"):
        comparisons.flips(first, read(targets, b * math.nan, patients, 0.5, 0))


# ---------------------------------------------------------------- one condition, strata, decisions


def test_estimates_of_scans_are_delongs_and_exact(rng):
    a, _ = simulated(rng, 70)
    found = comparisons.estimates(a)
    area = intervals.delong_auc(a.targets, a.scores[0])
    assert found["auc"][:3] == pytest.approx((area.auc, area.low, area.high))
    hits = int((a.scores[0, a.targets == 1] >= CUT).sum())
    assert found["sens"][:3] == pytest.approx((hits / 35, *intervals.clopper_pearson(hits, 35)))
    assert math.isnan(found["auc"].seed_sd) and found["spec"].n == 35


def test_estimates_of_slices_are_those_of_the_patient_bootstrap(slices):
    targets, patients, a, _ = slices
    found = comparisons.estimates(read(targets, a[0], patients, 0.5, 4, 150))
    known = ~np.isnan(targets)
    rows = targets[known], a[0, known], patients[known]
    assert found["auc"][1:3] == pytest.approx(tuple(intervals.bootstrap_auc(*rows, seed=4, replicates=150)))
    terms = np.column_stack([(rows[0] == 1) & (rows[1] >= 0.5), rows[0] == 1])
    sens = intervals.bootstrap_sums(terms, rows[2], lambda s: s[0] / s[1], seed=4, replicates=150)
    assert found["sens"][1:3] == pytest.approx(tuple(sens))


def test_estimates_of_slices_all_called_right_count_patients():
    patients = np.repeat(np.arange(30), 8)
    targets = (patients < 12).astype(float)
    found = comparisons.estimates(read(targets, targets, patients, 0.5, 0, 50))
    for kind, trials in (("auc", 12), ("sens", 12), ("spec", 18)):
        assert found[kind][:3] == pytest.approx((1, *intervals.clopper_pearson(trials, trials)))


def test_strata_set_their_positives_against_all_negatives(slices):
    targets, patients, a, b = slices
    reading = read(targets, a, patients, 0.5, 0, 60)
    mask = (patients % 3 == 0) & (targets == 1)
    found = comparisons.strata(reading, {"third": mask, "all": targets == 1, "none": np.zeros(400, bool)})
    chosen = mask | (targets == 0)
    oracle = np.mean([roc_auc_score(targets[chosen], scores[chosen]) for scores in a])
    assert found["third"]["auc"].value == pytest.approx(oracle)
    assert found["third"]["sens"].value == pytest.approx((a[:, mask] >= 0.5).mean())
    assert found["third"]["sens"].n == mask.sum()
    whole = comparisons.estimates(reading)
    assert found["all"] == {kind: whole[kind] for kind in ("auc", "sens")}
    assert np.isnan(found["none"]["auc"][:3]).all() and found["none"]["sens"].n == 0
    other = read(targets, b, patients, 0.5, 0, 60)
    within = compare(*(comparisons.within(own, mask) for own in (reading, other)))
    assert within.spec.estimate == compare(reading, other).spec.estimate
    with pytest.raises(ValueError, match="mask"):
        comparisons.within(reading, mask[1:])


def test_predictive_values_at_the_studys_prevalence_are_shares_of_calls(rng):
    a, _ = simulated(rng, 100)
    called, sick = a.scores[0] >= CUT, a.targets == 1
    found = comparisons.predictive_values(a, 0.5)  # half of the simulated patients are sick
    assert found["ppv"].value == pytest.approx(sick[called].mean())
    assert found["npv"].value == pytest.approx((~sick)[~called].mean())
    assert found["ppv"].low < found["ppv"].value < found["ppv"].high
    rare = comparisons.predictive_values(a, 0.01)
    assert rare["ppv"].high < found["ppv"].low and rare["npv"].low > found["npv"].high


def test_predictive_value_without_a_false_alarm_is_not_sure():
    targets = np.repeat([1.0, 0.0], 20)
    found = comparisons.predictive_values(read(targets, targets, np.arange(40), 0.5, 0, 50), 0.1)["ppv"]
    low = intervals.clopper_pearson(20, 20).low
    assert found[:3] == pytest.approx((1, comparisons.ppv(low, low, 0.1), 1))


def test_predictive_values_broadcast_and_refuse():
    assert comparisons.ppv(0.9, 0.8, 0.5) == pytest.approx(0.9 / 1.1)
    assert comparisons.npv(0.9, 0.8, 0.5) == pytest.approx(0.8 / 0.9)
    assert comparisons.ppv(np.ones(3), np.array([1, 0.5, 0]), 0.2) == pytest.approx([1, 1 / 3, 0.2])
    assert math.isnan(comparisons.ppv(0.0, 1.0, 0.2))
    with pytest.raises(ValueError, match="prevalence"):
        comparisons.npv(0.9, 0.8, 1.0)


def test_threshold_drift_is_the_shift_of_the_scores(rng):
    a, _ = simulated(rng, 100, seeds=3)
    tuned = comparisons.retuned(a)
    drifted = read(a.targets, a.scores + 0.5, a.patients, tuned.thresholds, 0)
    found = comparisons.threshold_drift(drifted)
    assert found.shift == pytest.approx((0.5, 0, 3), abs=1e-9)
    assert found.sens_stored.mean > found.sens_tuned.mean and found.spec_stored.mean < found.spec_tuned.mean
    assert found.sens_tuned.mean == pytest.approx(tuned.values[1].mean())


def test_threshold_drift_by_specificity_and_by_validation(rng):
    a, validation = simulated(rng, 200, seeds=2)
    found = comparisons.threshold_drift(a, specificity=0.9)
    assert found.spec_tuned.mean >= 0.9
    curves = [metrics.sensitivity_at_specificity(a.targets, scores, 0.9) for scores in a.scores]
    assert found.sens_tuned.mean == pytest.approx(np.mean(curves))
    honest = comparisons.retuned(a, validation=validation)
    assert honest.thresholds.tolist() == comparisons.retuned(validation).thresholds.tolist()
    with pytest.raises(ValueError, match="1 networks, must be 2"):
        comparisons.retuned(a, validation=simulated(rng, 20)[0])


def test_seed_summary_says_what_it_has():
    assert comparisons.seed_summary([1.0, 2.0, 3.0]) == (2, 1, 3)
    assert comparisons.seed_summary([0.8]) == pytest.approx((0.8, math.nan, 1), nan_ok=True)
    assert math.isnan(comparisons.seed_summary([0.8, math.nan]).mean)
    assert comparisons.seed_summary([]) == pytest.approx((math.nan, math.nan, 0), nan_ok=True)


def test_rows_of_a_comparison_are_a_table(rng):
    rows = compare(*simulated(rng, 40, seeds=2)).rows()
    assert [row["kind"] for row in rows] == list(KINDS)
    assert {"estimate", "low", "high", "p", "seed_sd", "a", "b", "n", "method", "patients"} <= set(rows[0])
    assert all("p_holm" in row for row in comparisons.with_holm(rows, ["method"]))


def test_reading_without_known_rows_is_nan():
    reading = read([math.nan] * 4, np.zeros((2, 4)), np.arange(4), 0.5, 0, 20)
    found = comparisons.estimates(reading)
    assert all(np.isnan(own[:3]).all() and own.n == 0 for own in found.values())
    assert all(math.isnan(own.value) for own in comparisons.predictive_values(reading, 0.1).values())
    assert math.isnan(compare(reading, read(reading.targets, np.ones(4), np.arange(4), 0.5, 0, 20)).auc.p)
    assert all(math.isnan(own.mean) for own in comparisons.threshold_drift(reading)[1:])


def test_compare_of_known_rows_that_agree_is_no_difference_whatever_the_unknown_ones_say():
    targets = np.array([1, 1, 0, 0, np.nan])
    one = read(targets, [0.9, 0.4, 0.3, 0.6, 0.1], np.arange(5), 0.5, seed=0)
    other = read(targets, [0.9, 0.4, 0.3, 0.6, 0.8], np.arange(5), 0.5, seed=0)
    found = compare(one, other)
    for difference in (found.auc, found.sens, found.spec):
        assert (difference.low, difference.high, difference.p) == (0, 0, 1)
