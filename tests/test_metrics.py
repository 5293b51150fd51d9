import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    classification_report,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

import calibration
import intervals
import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def scored(rng):
    targets = (rng.random(300) < 0.3).astype(float)
    return targets, np.round(1 / (1 + np.exp(-rng.normal(targets, 1.0))), 2)  # rounded: many ties


# ---------------------------------------------------------------- image quality


def test_image_metrics_inside_a_full_mask_equal_scikit_image(rng):
    reference = rng.uniform(-20, 100, (61, 47))
    image = reference + rng.normal(0, 9, reference.shape)
    mask = np.ones(reference.shape, bool)
    a, b = image.clip(0, 80), reference.clip(0, 80)
    found = metrics.image_quality(image[None], reference[None], mask[None], np.array(["a"]))
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=80))
    oracle = structural_similarity(
        a, b, data_range=80, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1].mean()
    assert found["ssim"] == pytest.approx(oracle)
    assert found["mse"] == pytest.approx(((image - reference) ** 2).mean())


def test_rmse_counts_only_what_is_inside_the_mask():
    reference = np.zeros((8, 8))
    image = reference.copy()
    image[:4] = 3.0
    image[4:] = 1000.0
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    assert metrics.rmse_hu(image, reference, mask) == pytest.approx(3.0)


def test_rmse_of_int16_does_not_wrap():
    image, reference = np.full((4, 4), 3000, np.int16), np.full((4, 4), -1024, np.int16)
    assert metrics.rmse_hu(image, reference, np.ones((4, 4), bool)) == pytest.approx(4024)


def test_image_quality_of_equal_images_is_perfect():
    image, full = np.full((1, 16, 16), 40.0), np.ones((1, 16, 16), bool)
    found = metrics.image_quality(image, image, full, np.array(["a"]))
    assert found == {"mse": 0, "psnr": math.inf, "ssim": pytest.approx(1), "rmse_hu": 0}


def test_patient_means_weigh_patients_not_slices():
    values, patients = [1.0, 1.0, 1.0, 5.0, math.nan, math.nan], ["a", "a", "a", "b", "b", "c"]
    assert metrics.patient_means(values, patients).tolist() == [1.0, 5.0]
    assert metrics.patient_means([math.nan], ["a"]).tolist() == []


def test_image_quality_averages_patients_and_leaves_empty_masks_out(rng):
    reference = np.full((5, 20, 20), 40.0)
    sd = np.array([2.0, 2.0, 2.0, 10.0, 99.0])[:, None, None]
    images = reference + sd * np.where(np.indices((20, 20)).sum(0) % 2, 1.0, -1.0)
    masks = np.ones(images.shape, bool)
    masks[4] = False
    found = metrics.image_quality(images, reference, masks, np.array(["a", "a", "a", "b", "c"]))
    assert found["rmse_hu"] == pytest.approx(6)
    assert found["mse"] == pytest.approx((4 + 100) / 2)
    assert found["psnr"] == pytest.approx(np.mean([20 * math.log10(80 / 2), 20 * math.log10(80 / 10)]))
    assert set(found) == set(metrics.IMAGE_METRICS)
    nothing = metrics.image_quality(images, reference, np.zeros_like(masks), np.arange(5))
    assert all(math.isnan(value) for value in nothing.values())


def test_psnr_of_a_slice_outside_the_range_does_not_spoil_its_patient():
    reference = np.stack([np.full((12, 12), 40.0), np.full((12, 12), 900.0)])
    images = reference + np.where(np.indices((12, 12)).sum(0) % 2, 8.0, -8.0)
    found = metrics.image_quality(images, reference, np.ones(images.shape, bool), np.array(["a", "a"]))
    assert found["psnr"] == pytest.approx(10 * math.log10(80**2 / 32))


# ---------------------------------------------------------------- classification


def test_auc_with_ties_equals_scikit_learn(scored):
    assert metrics.auc(*scored) == pytest.approx(roc_auc_score(*scored), abs=1e-12)


NUMBERS = {  # each (targets, scores) -> float
    "auc": metrics.auc,
    "average_precision": metrics.average_precision,
    "youden_threshold": metrics.youden_threshold,
    "threshold_at_specificity": lambda t, s: metrics.threshold_at_specificity(t, s, 0.9),
    "sensitivity_at_specificity": lambda t, s: metrics.sensitivity_at_specificity(t, s, 0.9),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("targets", "scores"),
    [
        (np.zeros(5), np.linspace(0, 1, 5)),
        (np.ones(5), np.linspace(0, 1, 5)),
        (np.array([0, 0, 1, 1]), np.array([0.1, 0.2, math.nan, 0.3])),
        (np.array([1.0]), np.array([0.5])),
        (np.array([]), np.array([])),
        (np.array([0, math.nan]), np.array([0.1, 0.5])),
    ],
    ids=["no positive", "no negative", "NaN score", "one row", "no row", "unknown"],
)
def test_numbers_that_cannot_be_computed_are_nan(name, targets, scores):
    assert math.isnan(NUMBERS[name](targets, scores))


@pytest.mark.parametrize("name", NUMBERS)
def test_unknown_targets_count_for_nothing(name, scored):
    more = np.insert(scored[0], [0, 150], math.nan), np.insert(scored[1], [0, 150], [1.0, math.nan])
    assert NUMBERS[name](*more) == NUMBERS[name](*scored)


def test_average_precision_with_ties_equals_scikit_learn(scored):
    assert metrics.average_precision(*scored) == pytest.approx(average_precision_score(*scored), abs=1e-12)


def test_average_precision_of_a_constant_score_is_the_prevalence(scored):
    assert metrics.average_precision(scored[0], np.zeros(300)) == pytest.approx(scored[0].mean())


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.95, 1.0])
def test_sensitivity_at_specificity_is_the_best_of_scikit_learns_roc_curve(scored, specificity):
    false_rate, sensitivity, _ = roc_curve(*scored, drop_intermediate=False)
    best = sensitivity[1 - false_rate >= specificity - 1e-12].max()
    assert metrics.sensitivity_at_specificity(*scored, specificity) == pytest.approx(best)
    found = metrics.rates(*scored, metrics.threshold_at_specificity(*scored, specificity))
    assert found["sens"] == pytest.approx(best)
    assert found["spec"] >= specificity - 1e-12


def test_sensitivity_at_90_of_ten_negatives_allows_the_one_alarm():
    targets, scores = np.repeat([0, 1], [10, 2]), np.append(np.arange(10) / 10, [0.85, 0.86])
    assert metrics.sensitivity_at_specificity(targets, scores, 0.9) == 1
    assert metrics.sensitivity_at_specificity(targets, scores, 0.95) == 0


def test_threshold_at_specificity_takes_no_alarm_that_finds_nothing():
    targets, scores = np.array([0, 0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.8])
    assert metrics.threshold_at_specificity(targets, scores, 0.5) == pytest.approx(0.6)


def test_threshold_at_a_specificity_out_of_reach_calls_nothing():
    targets, scores = np.array([0, 1, 0, 1]), np.array([0.7, 0.7, 0.2, 0.1])
    threshold = metrics.threshold_at_specificity(targets, scores, 0.9)
    assert 0.7 < threshold < 0.7001
    assert metrics.sensitivity_at_specificity(targets, scores, 0.9) == 0


@pytest.mark.parametrize("specificity", [0.0, 90, -0.1, math.nan])
def test_specificity_outside_its_range_is_refused(scored, specificity):
    for number in (metrics.threshold_at_specificity, metrics.sensitivity_at_specificity):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            number(*scored, specificity)


def test_threshold_between_neighbouring_floats_still_parts_them():
    below = 0.5
    above = np.nextafter(below, 1)
    for low, high in ((below, above), (above, np.nextafter(above, 1))):
        targets, scores = np.array([0, 1]), np.array([low, high])
        assert metrics.rates(targets, scores, metrics.youden_threshold(targets, scores))["acc"] == 1


def test_rates_equal_scikit_learn(scored):
    targets, scores = scored
    called = scores >= 0.55
    found = metrics.rates(targets, scores, 0.55)
    assert found["acc"] == pytest.approx(accuracy_score(targets, called))
    assert found["sens"] == pytest.approx(recall_score(targets, called))
    assert found["spec"] == pytest.approx(recall_score(targets, called, pos_label=0))
    assert found["prec"] == pytest.approx(precision_score(targets, called))
    assert found["f1"] == pytest.approx(f1_score(targets, called))


def test_rates_without_a_threshold_are_all_nan(scored):
    assert all(math.isnan(value) for value in metrics.rates(*scored, math.nan).values())


def test_rates_of_scores_that_are_no_numbers_are_nan_and_unknown_targets_count_for_nothing(scored):
    assert all(math.isnan(value) for value in metrics.rates([1, 0], [math.nan, 0.2], 0.5).values())
    more = np.append(scored[0], math.nan), np.append(scored[1], 1.0)
    assert metrics.rates(*more, 0.5) == metrics.rates(*scored, 0.5)


def test_youden_threshold_reaches_the_best_point_of_the_roc_curve(scored):
    false_rate, sensitivity, _ = roc_curve(*scored)
    found = metrics.rates(*scored, metrics.youden_threshold(*scored))
    assert found["sens"] + found["spec"] - 1 == pytest.approx((sensitivity - false_rate).max())


def test_youden_threshold_of_separable_scores_lies_between_them():
    assert metrics.youden_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])) == pytest.approx(
        0.4
    )


def test_classification_leaves_unknown_targets_out(scored):
    targets, scores = scored
    patients = np.arange(len(targets)) // 10
    more = np.concatenate([targets, [math.nan] * 20]), np.concatenate([scores, np.ones(20)])
    found = metrics.classification(*more, np.arange(320) // 10, threshold=0.5, seed=0)
    assert found["auc"] == pytest.approx(roc_auc_score(targets, scores))
    assert tuple(found) != () and set(found) == set(metrics.CLASSIFICATION_METRICS)
    assert found["acc"] == metrics.classification(targets, scores, patients, threshold=0.5, seed=0)["acc"]
    nothing = metrics.classification([math.nan], [0.5], ["a"], threshold=0.5, seed=0)
    assert all(math.isnan(value) for value in nothing.values())


def report_of(scored, patients, **more):
    return metrics.report(*scored, patients, **{"threshold": 0.5, "seed": 0, **more})


def test_report_of_scans_takes_delong_and_exact_intervals(scored):
    patients = np.arange(300)
    found = report_of(scored, patients, null_scores=np.linspace(0, 1, 300))
    assert found.items() >= metrics.classification(*scored, patients, threshold=0.5, seed=0).items()
    assert (found["n"], found["n_positive"], found["n_patients"]) == (300, scored[0].sum(), 300)
    delong = intervals.delong_auc(*scored)
    assert (found["delong_low"], found["delong_high"]) == (delong.low, delong.high)
    positives = int(scored[0].sum())
    exact = intervals.clopper_pearson(round(found["sens"] * positives), positives)
    assert (found["sens_low"], found["sens_high"]) == exact
    assert found["spec_low"] < found["spec"] < found["spec_high"]
    assert found["ap"] == metrics.average_precision(*scored)
    assert found["sens_at_95"] == metrics.sensitivity_at_specificity(*scored, 0.95) <= found["sens_at_90"]
    assert found["brier"] == calibration.brier(*scored)
    assert found["log_loss"] == calibration.log_loss(*scored)
    assert found["auc_null"] == metrics.auc(scored[0], np.linspace(0, 1, 300))


def test_report_of_slices_draws_patients(scored):
    targets, scores = (np.tile(values, 4) for values in scored)
    few, many = report_of((targets, scores), np.tile(np.arange(300), 4)), report_of(scored, np.arange(300))
    assert math.isnan(few["delong_low"]) and math.isnan(few["delong_high"])
    assert "auc_null" not in few
    for name in ("sens", "spec"):  # every scan four times says no more than once
        widths = [found[f"{name}_high"] - found[f"{name}_low"] for found in (few, many)]
        assert widths[0] == pytest.approx(widths[1], rel=0.15)


@pytest.mark.parametrize(
    ("targets", "scores"),
    [([0, 0, 0], [0.1, 0.2, 0.3]), ([1], [0.5]), ([math.nan], [0.5]), ([], []), ([0, 1], [0.1, math.nan])],
)
def test_report_has_the_same_columns_where_little_can_be_computed(scored, targets, scores):
    found = report_of((np.array(targets, float), np.array(scores, float)), np.arange(len(targets)))
    assert set(found) == set(report_of(scored, np.arange(300)))
    assert math.isnan(found["auc"]) and math.isnan(found["ap"]) and math.isnan(found["delong_high"])


# ---------------------------------------------------------------- several classes


@pytest.fixture
def typed(rng):
    targets = rng.choice(3, 200, p=[0.6, 0.15, 0.25])
    logits = rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[targets]
    return targets.astype(float), calibration.calibrated(logits, 1.0, "softmax")


def test_confusion_matrix_and_class_rates_equal_scikit_learn(typed):
    targets, called = typed[0], typed[1].argmax(axis=1)
    matrix = metrics.confusion_matrix(targets, called, 3)
    np.testing.assert_array_equal(matrix, confusion_matrix(targets, called))
    found = metrics.class_rates(matrix)
    oracle = classification_report(targets, called, output_dict=True)
    for name, theirs in (("sens", "recall"), ("prec", "precision"), ("f1", "f1-score")):
        np.testing.assert_allclose(found[name], [oracle[f"{number}.0"][theirs] for number in range(3)])
    spec = [recall_score(targets != number, called != number) for number in range(3)]
    np.testing.assert_allclose(found["spec"], spec)
    assert found["acc"] == pytest.approx(oracle["accuracy"])


def test_macro_auc_equals_scikit_learn_and_is_nan_without_a_class(typed):
    oracle = roc_auc_score(*typed, multi_class="ovr", average="macro")
    assert metrics.macro_auc(*typed) == pytest.approx(oracle, abs=1e-12)
    there = typed[0] != 1
    assert math.isnan(metrics.macro_auc(typed[0][there], typed[1][there]))


def test_multiclass_report_by_hand():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [1, 0, 0]])
    targets = np.array([0, 1, 2, 2, math.nan])
    found = metrics.multiclass_report(targets, probabilities, ("normal", "ischemic", "hemorrhagic"))
    assert found["acc"] == 0.75
    assert found["sens_hemorrhagic"] == 0.5 and found["prec_ischemic"] == 0.5 and found["f1_normal"] == 1
    assert found["spec_ischemic"] == pytest.approx(2 / 3)
    assert found["brier"] == pytest.approx((0.06 + 0.24 + 1.04 + 0.06) / 4)
    assert found["ece"] == pytest.approx((2 * 0.2 + abs(1 - 1.2)) / 4)  # bins of 0.8 and 0.6
    assert found["auc"] == pytest.approx((1 + 5 / 6 + found["auc_hemorrhagic"]) / 3)


def test_multiclass_report_of_nothing_and_of_nan_is_nan(typed):
    classes = ("normal", "ischemic", "hemorrhagic")
    full = metrics.multiclass_report(*typed, classes)
    assert not any(map(math.isnan, full.values()))
    for targets, probabilities in (
        ([math.nan], [[0.2, 0.3, 0.5]]),
        ([0, 1, 2], [[0.2, 0.3, 0.5], [math.nan] * 3, [1, 0, 0]]),
    ):
        found = metrics.multiclass_report(np.array(targets), np.array(probabilities), classes)
        assert set(found) == set(full) and all(map(math.isnan, found.values()))


def test_class_numbers_of_unknown_rows_are_nan():
    nan = math.nan
    found = metrics.class_numbers([[0, 1, 0], [nan, nan, nan], [1, 0, 0], [0, nan, 1]])
    np.testing.assert_array_equal(found, [1, nan, 0, nan])


# ---------------------------------------------------------------- scans and positions


def test_scan_scores_take_the_largest_slice_and_know_what_they_do_not_know():
    nan = math.nan
    values, series = [0.1, 0.9, 0.2, 1, nan, nan, 0], [0, 0, 1, 2, 2, 3, 3]
    found = metrics.scan_scores(values, series)
    np.testing.assert_array_equal(found, [0.9, 0.2, 1.0, nan])


def test_relative_positions_run_from_0_to_1_along_each_scan():
    found = metrics.relative_positions([-40, 10, 60, 3, 0, 5, 20], [0, 0, 0, 7, 2, 2, 2])
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0, 0.25, 1])


def test_positional_null_finds_the_height_of_lesions_and_no_more(rng):
    """Positives lie around 0.6 (SD 0.1): the fitted frequency is theirs, blurred by the bandwidth."""
    train = rng.random(20000)
    frequency = np.exp(-0.5 * ((train - 0.6) / 0.1) ** 2) / 2
    positions = np.linspace(0.1, 0.9, 33)
    found = metrics.positional_null(train, rng.random(20000) < frequency, positions)
    width = math.hypot(0.1, metrics.POSITION_BANDWIDTH)
    expected = np.exp(-0.5 * ((positions - 0.6) / width) ** 2) / 2 * 0.1 / width
    np.testing.assert_allclose(found, expected, atol=0.03)  # 3 SE of 2500 slices in the kernel


def test_positional_null_equals_the_kernel_sum_at_its_grid(rng):
    train, targets = rng.integers(0, 1001, 50) / 1000, rng.random(50) < 0.4
    positions = np.array([0, 0.123, 1])
    kernel = np.exp(-0.5 * ((positions[:, None] - train) / metrics.POSITION_BANDWIDTH) ** 2)
    expected = (kernel * targets).sum(1) / kernel.sum(1)
    np.testing.assert_allclose(metrics.positional_null(train, targets, positions), expected)


def test_positional_null_of_unknown_targets_and_of_wrong_positions():
    nan = math.nan
    assert metrics.positional_null([0.1, 0.9], [1, nan], [0.5]).tolist() == [1]
    assert np.isnan(metrics.positional_null([0.5], [nan], [0.5, 0.6])).all()
    for train, asked in (([3.0], [0.5]), ([0.5], [-0.1]), ([nan], [0.5])):
        with pytest.raises(ValueError, match=r"0\.\.1 along the scan"):
            metrics.positional_null(train, [1], asked)


def test_positional_null_has_no_auc_where_height_says_nothing_and_one_where_it_does(rng):
    series = np.repeat(np.arange(200), 30)
    positions = metrics.relative_positions(np.tile(5.0 * np.arange(30), 200), series)
    train, test = series < 100, series >= 100
    for targets, low, high in (
        ((rng.random(6000) < 0.2), 0.45, 0.55),  # 3 SE of 600 positives, 2400 negatives
        ((rng.random(6000) < 0.6 * (abs(positions - 0.5) < 0.2)), 0.8, 0.9),
    ):
        scores = metrics.positional_null(positions[train], targets[train], positions[test])
        assert low < metrics.auc(targets[test], scores) < high


def test_shown_prints_what_cannot_be_computed_as_not_available():
    assert [metrics.shown(value) for value in (0.12345, None, math.nan)] == ["0.123", "n/a", "n/a"]
