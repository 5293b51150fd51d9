import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score, roc_curve

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


@pytest.mark.parametrize("name", ["auc", "youden_threshold"])
def test_scores_that_are_no_numbers_have_no_auc_and_no_threshold(name):
    assert math.isnan(getattr(metrics, name)(np.array([0, 0, 1, 1]), np.full(4, math.nan)))


# ---------------------------------------------------------------- classification


def test_auc_with_ties_equals_scikit_learn(scored):
    assert metrics.auc(*scored) == pytest.approx(roc_auc_score(*scored), abs=1e-12)


@pytest.mark.parametrize("targets", [np.zeros(5), np.ones(5)])
def test_auc_and_threshold_of_one_class_are_nan(targets):
    scores = np.linspace(0, 1, 5)
    assert math.isnan(metrics.auc(targets, scores))
    assert math.isnan(metrics.youden_threshold(targets, scores))
    assert all(
        math.isnan(end) for end in metrics.bootstrap_auc(targets, scores, np.arange(5), seed=0, replicates=20)
    )


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


def test_youden_threshold_reaches_the_best_point_of_the_roc_curve(scored):
    false_rate, sensitivity, _ = roc_curve(*scored)
    found = metrics.rates(*scored, metrics.youden_threshold(*scored))
    assert found["sens"] + found["spec"] - 1 == pytest.approx((sensitivity - false_rate).max())


def test_youden_threshold_of_separable_scores_lies_between_them():
    assert metrics.youden_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])) == pytest.approx(
        0.4
    )


def test_ece_of_perfect_and_of_contrary_probabilities():
    targets = np.array([0, 0, 1, 1])
    assert metrics.expected_calibration_error(targets, targets.astype(float)) == 0
    assert metrics.expected_calibration_error(targets, 1.0 - targets) == 1
    assert metrics.expected_calibration_error(np.array([1, 0, 0, 0]), np.full(4, 0.25)) == pytest.approx(0)


def test_bootstrap_interval_draws_patients_not_slices(rng):
    patients = np.repeat(np.arange(30), 40)
    targets = np.repeat(rng.random(30) < 0.5, 40).astype(float)
    shared = np.repeat(rng.normal(0, 1, 30), 40)  # all slices of a patient err together
    scores = targets + shared
    low, high = metrics.bootstrap_auc(targets, scores, patients, seed=1)
    narrow_low, narrow_high = metrics.bootstrap_auc(targets, scores, np.arange(len(targets)), seed=1)
    assert high - low > 3 * (narrow_high - narrow_low)
    assert low < metrics.auc(targets, scores) < high


def test_bootstrap_interval_repeats_with_its_seed_and_equals_a_plain_loop(scored):
    targets, scores = scored
    patients = np.arange(len(targets)) // 10
    found = metrics.bootstrap_auc(targets, scores, patients, seed=5, replicates=200)
    assert found == metrics.bootstrap_auc(targets, scores, patients, seed=5, replicates=200)
    draws = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), size=200)
    values = []
    for draw in draws:
        rows = np.repeat(np.arange(len(targets)), draw[patients])
        values.append(roc_auc_score(targets[rows], scores[rows]))
    assert found == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


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


def test_scan_scores_take_the_largest_slice_and_know_what_they_do_not_know():
    nan = math.nan
    values, series = [0.1, 0.9, 0.2, 1, nan, nan, 0], [0, 0, 1, 2, 2, 3, 3]
    found = metrics.scan_scores(values, series)
    np.testing.assert_array_equal(found, [0.9, 0.2, 1.0, nan])


def test_shown_prints_what_cannot_be_computed_as_not_available():
    assert [metrics.shown(value) for value in (0.12345, None, math.nan)] == ["0.123", "n/a", "n/a"]
