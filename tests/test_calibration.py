import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

import calibration
import metrics

NAMES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def scored(rng):
    targets = (rng.random(300) < 0.3).astype(float)
    return targets, expit(rng.normal(2 * targets - 1, 1.0))


# ---------------------------------------------------------------- one probability


def test_ece_of_perfect_and_of_contrary_probabilities():
    targets = np.array([0, 0, 1, 1])
    assert calibration.expected_calibration_error(targets, targets.astype(float)) == 0
    assert calibration.expected_calibration_error(targets, 1.0 - targets) == 1
    assert calibration.expected_calibration_error([1, 0, 0, 0], np.full(4, 0.25)) == pytest.approx(0)


def test_reliability_equals_scikit_learn_and_adds_up_to_the_ece(scored):
    rows = calibration.reliability(*scored, bins=10)
    frequency, confidence = calibration_curve(*scored, n_bins=10)
    filled = [row for row in rows if row.n]
    np.testing.assert_allclose([row.frequency for row in filled], frequency)
    np.testing.assert_allclose([row.confidence for row in filled], confidence)
    assert [row.low for row in rows[1:]] == [row.high for row in rows[:-1]]
    assert (rows[0].low, rows[-1].high) == (0, 1)
    rows = calibration.reliability(*scored)
    gaps = [row.n * abs(row.frequency - row.confidence) / 300 for row in rows if row.n]
    assert sum(gaps) == pytest.approx(calibration.expected_calibration_error(*scored))


def test_reliability_counts_0_and_1_and_shows_empty_bins():
    rows = calibration.reliability([0, 1, 1, math.nan], np.array([0, 1, 1, 0.5]), bins=4)
    assert [row.n for row in rows] == [1, 0, 0, 2]
    assert math.isnan(rows[1].confidence) and math.isnan(rows[1].frequency)
    assert rows[3].frequency == rows[3].confidence == 1


@pytest.mark.parametrize("score", [1.2, -0.1])
def test_scores_that_are_no_probabilities_are_refused(score):
    for number in (calibration.reliability, calibration.expected_calibration_error):
        with pytest.raises(ValueError, match="must be probabilities"):
            number([0, 1], [0.5, score])


def test_brier_and_log_loss_equal_scikit_learn(scored):
    assert calibration.brier(*scored) == pytest.approx(brier_score_loss(*scored))
    assert calibration.log_loss(*scored) == pytest.approx(sklearn_log_loss(*scored))


@pytest.mark.parametrize("name", ["brier", "log_loss", "expected_calibration_error"])
def test_numbers_of_probabilities_know_what_they_do_not_know(name, scored):
    number = getattr(calibration, name)
    more = np.insert(scored[0], 3, math.nan), np.insert(scored[1], 3, 0.9)
    assert number(*more) == number(*scored)
    assert math.isnan(number([], []))
    assert math.isnan(number([math.nan], [0.5]))
    assert math.isnan(number([1, 0], [math.nan, 0.5]))


# ---------------------------------------------------------------- RSNA


@pytest.fixture
def six(rng):
    targets = (rng.random((50, 6)) < 0.3).astype(float)
    return targets, rng.random((50, 6))


def test_rsna_log_loss_is_the_weighted_mean_over_7(six):
    targets, probabilities = six
    each = [sklearn_log_loss(t, p, labels=[0, 1]) for t, p in zip(targets.T, probabilities.T, strict=True)]
    expected = (sum(each[:5]) + 2 * each[5]) / 7
    assert calibration.rsna_log_loss(*six, NAMES) == pytest.approx(expected)


def test_rsna_log_loss_goes_by_name_whatever_the_order(six, rng):
    order = rng.permutation(6)
    shuffled = [values[:, order] for values in six]
    expected = calibration.rsna_log_loss(*six, NAMES)
    assert calibration.rsna_log_loss(*shuffled, [NAMES[n] for n in order]) == pytest.approx(expected)
    assert calibration.rsna_log_loss(*shuffled, NAMES) != pytest.approx(expected)
    more = [np.column_stack([np.ones(50), values]) for values in six]
    assert calibration.rsna_log_loss(*more, ("ischemia", *NAMES)) == pytest.approx(expected)


def test_rsna_log_loss_of_one_half_is_log_2_whatever_is_unknown(six, rng):
    targets = np.where(rng.random((50, 6)) < 0.4, math.nan, six[0])
    assert calibration.rsna_log_loss(targets, np.full((50, 6), 0.5), NAMES) == pytest.approx(math.log(2))
    assert math.isnan(calibration.rsna_log_loss(np.full((2, 6), math.nan), np.zeros((2, 6)), NAMES))


def test_rsna_log_loss_weighs_what_is_known():
    """Row 1 knows any and epidural, row 2 any alone: (2 a + e + 2 b) / 5."""
    targets, probabilities = np.full((2, 6), math.nan), np.full((2, 6), 0.9)
    targets[:, 5], targets[0, 0] = [1, 0], 1
    probabilities[:, 5], probabilities[0, 0] = [0.8, 0.4], 0.3
    expected = -(2 * math.log(0.8) + math.log(0.3) + 2 * math.log(0.6)) / 5
    assert calibration.rsna_log_loss(targets, probabilities, NAMES) == pytest.approx(expected)


def test_rsna_log_loss_clips_as_kaggle_does():
    sure = np.ones((1, 6), np.float32)
    found = calibration.rsna_log_loss(np.zeros((1, 6)), sure, NAMES)
    assert found == pytest.approx(-math.log(1e-15), rel=1e-3)  # 1 - 1e-15 has 3 digits in float64
    assert calibration.rsna_log_loss(np.ones((1, 6)), sure, NAMES) == pytest.approx(0, abs=1e-12)


def test_rsna_log_loss_without_one_of_the_six_is_refused(six):
    with pytest.raises(ValueError, match="subdural missing"):
        calibration.rsna_log_loss(*six, [name.replace("subdural", "ischemia") for name in NAMES])


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_temperature_of_binary_logits_is_found_again(rng, truth):
    logits = rng.normal(0, 2, 20000)
    targets = (rng.random(20000) < expit(logits)).astype(float)
    found = calibration.fit_temperature(logits * truth, targets, "binary")
    assert found == pytest.approx(truth, rel=0.06)  # 3 SE of 20,000 rows


@pytest.mark.parametrize("truth", [0.5, 3.0])
def test_temperature_of_a_softmax_is_found_again(rng, truth):
    logits = rng.normal(0, 2, (10000, 3))
    drawn = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # Gumbel's trick: a draw of the softmax
    found = calibration.fit_temperature(logits * truth, np.eye(3)[drawn], "softmax")
    assert found == pytest.approx(truth, rel=0.06)


@pytest.mark.parametrize("kind", ["binary", "softmax"])
def test_temperature_is_the_minimum_of_the_log_loss(rng, kind):
    logits = rng.normal(0, 3, (60, 4))
    targets = np.eye(4)[(logits / 2 + rng.gumbel(size=logits.shape)).argmax(axis=1)]

    def loss(log_t):
        found = calibration.calibrated(logits, math.exp(log_t[0]), kind)
        return (
            sklearn_log_loss(targets.ravel(), found.ravel())
            if kind == "binary"
            else sklearn_log_loss(targets.argmax(1), found)
        )

    oracle = minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12})
    found = calibration.fit_temperature(logits, targets, kind)
    assert loss([math.log(found)]) <= oracle.fun + 1e-8


def test_temperature_leaves_unknown_targets_out(rng):
    logits = rng.normal(0, 2, (80, 3))
    targets = np.eye(3)[rng.integers(0, 3, 80)]
    for kind in ("binary", "softmax"):
        more = np.vstack([logits, np.full((9, 3), 50.0)]), np.vstack([targets, np.full((9, 3), math.nan)])
        assert calibration.fit_temperature(*more, kind) == calibration.fit_temperature(logits, targets, kind)


def test_temperature_of_separable_logits_stays_in_its_range():
    low, high = calibration.TEMPERATURE_RANGE
    targets = np.array([0.0, 1.0])
    for logits, end in ((np.array([-1.0, 1.0]), low), (np.array([1.0, -1.0]), high)):
        found = calibration.fit_temperature(logits, targets, "binary")
        assert low <= found <= high
        assert found == pytest.approx(end, rel=0.2)


def test_temperature_without_a_class_is_1_and_of_nan_is_nan():
    nan = math.nan
    assert calibration.fit_temperature([1.0, -2.0], [1, 1], "binary") == 1
    assert calibration.fit_temperature([1.0, -2.0], [nan, 1], "binary") == 1
    assert calibration.fit_temperature(np.empty((0, 3)), np.empty((0, 3)), "softmax") == 1
    assert calibration.fit_temperature(np.eye(3), np.eye(3)[[0, 1, 1]], "softmax") == 1
    assert math.isnan(calibration.fit_temperature([nan, 1.0], [0, 1], "binary"))


def test_calibrated_keeps_the_auc_and_the_likeliest_class(rng, scored):
    logits = rng.normal(0, 4, 300)
    for temperature in (0.3, 5.0):
        found = calibration.calibrated(logits, temperature, "binary")
        assert metrics.auc(scored[0], found) == metrics.auc(scored[0], logits)
        classes = rng.normal(0, 4, (50, 3))
        found = calibration.calibrated(classes, temperature, "softmax")
        np.testing.assert_array_equal(found.argmax(1), classes.argmax(1))
        np.testing.assert_allclose(found.sum(1), 1)


def test_calibrated_probabilities_lower_the_error_of_a_sure_network(rng):
    logits = rng.normal(0, 2, 4000)
    targets = (rng.random(4000) < expit(logits)).astype(float)
    temperature = calibration.fit_temperature(4 * logits, targets, "binary")
    before, after = (
        calibration.expected_calibration_error(targets, calibration.calibrated(4 * logits, t, "binary"))
        for t in (1.0, temperature)
    )
    assert after < 0.03 < 0.1 < before  # 0.03: 15 bins of 4000 rows, by chance alone
