"""Numbers for tables: image quality in HU, classification, calibration, intervals. Arrays in, numbers out.

IMAGE_METRICS and CLASSIFICATION_METRICS hold them by column name. What cannot be computed, such as an AUC
with one class absent, is NaN; tables print it as n/a."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from skimage.metrics import structural_similarity

RANGE_HU = (0.0, 80.0)  # the brain window, in which head CT is read; PSNR and SSIM are stated there
ECE_BINS = 15  # Guo et al. 2017
BOOTSTRAP_REPLICATES = 2000

# ---------------------------------------------------------------- image quality


def mse_hu2(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Mean squared error in HU^2 inside mask. image, reference, mask: (H, W). NaN if the mask is empty."""
    if not mask.any():
        return math.nan
    return float(np.square(image[mask].astype(np.float64) - reference[mask]).mean())


def rmse_hu(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Root mean squared error in HU inside mask."""
    return math.sqrt(mse_hu2(image, reference, mask))


def window_mse_hu2(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Mean squared error in HU^2 inside mask, both images clipped to RANGE_HU."""
    low, high = RANGE_HU
    return mse_hu2(image.clip(low, high), reference.clip(low, high), mask)


def psnr_of(mse: np.ndarray | float) -> np.ndarray:
    """Mean squared error in HU^2 of images clipped to RANGE_HU -> PSNR in dB; infinite for 0."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10((RANGE_HU[1] - RANGE_HU[0]) ** 2 / np.asarray(mse, np.float64))


def ssim(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Mean SSIM over mask, both images clipped to RANGE_HU. Source: Wang 2004 (Gaussian, sigma 1.5)."""
    if not mask.any():
        return math.nan
    low, high = RANGE_HU
    _, local = structural_similarity(
        image.clip(low, high).astype(np.float64),
        reference.clip(low, high).astype(np.float64),
        data_range=high - low,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(local[mask].mean())


class ImageMetric(NamedTuple):
    """A number per slice, and what becomes of its mean over a patient's slices."""

    of_slice: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
    of_patient: Callable[[np.ndarray], np.ndarray] = np.asarray


IMAGE_METRICS = {
    "mse": ImageMetric(mse_hu2),
    # of the patient's error, not of single slices: where nothing lies inside RANGE_HU a slice has none
    "psnr": ImageMetric(window_mse_hu2, psnr_of),
    "ssim": ImageMetric(ssim),
    "rmse_hu": ImageMetric(rmse_hu),
}


def image_quality(
    images: np.ndarray, reference: np.ndarray, masks: np.ndarray, patients: np.ndarray
) -> dict[str, float]:
    """Every IMAGE_METRICS entry inside masks, averaged over a patient's slices, then over patients.

    images, reference, masks: (N, H, W); patients: (N,). Slices with an empty mask, and patients without any
    other, count for nothing; NaN if nothing is left."""
    found = {}
    for name, metric in IMAGE_METRICS.items():
        triples = zip(images, reference, masks, strict=True)
        values = np.array([metric.of_slice(*triple) for triple in triples])
        means = metric.of_patient(patient_means(values, patients))
        found[name] = float(means.mean()) if len(means) else math.nan
    return found


def shown(value: float | None, digits: int = 3) -> str:
    """A number as a table shows it; what could not be computed is n/a."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def patient_means(values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Each patient's mean over slices, (patients,), in order of id. NaN slices count for nothing."""
    values, patients = np.asarray(values, np.float64), np.asarray(patients)
    known = ~np.isnan(values)
    return np.array([values[known & (patients == patient)].mean() for patient in np.unique(patients[known])])


# ---------------------------------------------------------------- classification


def auc(targets: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half. targets: (N,) of 0 and 1.

    NaN if a class is absent or a score is NaN."""
    if np.isnan(scores).any():
        return math.nan
    weights = np.ones((1, len(scores)))
    return float(_weighted_auc(np.asarray(targets), np.asarray(scores), weights)[0])


def _weighted_auc(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of the same scores under each row of weights: (R, N) -> (R,), NaN where a class has no weight."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    weights = weights[:, order]
    positive = np.add.reduceat(weights * (targets[order] == 1), starts, axis=1)
    negative = np.add.reduceat(weights * (targets[order] == 0), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def bootstrap_auc(
    targets: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    seed: int,
    replicates: int = BOOTSTRAP_REPLICATES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the AUC when patients, not slices, are drawn anew with replacement.

    targets, scores, patients: (N,). Replicates that drew one class only are left out; (NaN, NaN) if all."""
    targets, scores = np.asarray(targets), np.asarray(scores)
    _, group = np.unique(np.asarray(patients), return_inverse=True)
    count = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=replicates)
    chunk = max(1, 4_000_000 // len(scores))  # about 100 MB of weights at a time
    values = np.concatenate(
        [
            _weighted_auc(targets, scores, draws[start : start + chunk][:, group])
            for start in range(0, replicates, chunk)
        ]
    )
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def youden_threshold(targets: np.ndarray, scores: np.ndarray) -> float:
    """The threshold with the largest sensitivity + specificity (Youden 1950), halfway between two scores.

    Call score >= threshold positive. NaN if a class is absent."""
    targets, scores = np.asarray(targets), np.asarray(scores, np.float64)
    positives, negatives = (targets == 1).sum(), (targets == 0).sum()
    if positives == 0 or negatives == 0 or np.isnan(scores).any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.diff(ranked, append=-np.inf) != 0)  # the last place of each run of ties
    sensitivity = np.cumsum(targets[order] == 1)[last] / positives
    false_rate = np.cumsum(targets[order] == 0)[last] / negatives
    best = last[np.argmax(sensitivity - false_rate)]
    return float((ranked[best] + ranked[best + 1]) / 2) if best + 1 < len(ranked) else float(ranked[best])


def expected_calibration_error(targets: np.ndarray, scores: np.ndarray) -> float:
    """ECE over ECE_BINS equal bins: the mean |frequency - confidence|. Source: Guo et al. 2017."""
    targets, scores = np.asarray(targets, np.float64), np.asarray(scores, np.float64)
    if not len(scores):
        return math.nan
    bins = np.minimum((scores * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, targets, ECE_BINS) - np.bincount(bins, scores, ECE_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def rates(targets: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """acc, sens, spec, prec and f1 of calling score >= threshold positive; NaN where a denominator is 0."""
    targets, called = np.asarray(targets) == 1, np.asarray(scores) >= threshold
    true_positive, false_positive = int((called & targets).sum()), int((called & ~targets).sum())
    false_negative, true_negative = int((~called & targets).sum()), int((~called & ~targets).sum())

    def share(part: int, whole: int) -> float:
        return part / whole if whole and not math.isnan(threshold) else math.nan

    return {
        "acc": share(true_positive + true_negative, len(targets)),
        "sens": share(true_positive, true_positive + false_negative),
        "spec": share(true_negative, true_negative + false_positive),
        "prec": share(true_positive, true_positive + false_positive),
        "f1": share(2 * true_positive, 2 * true_positive + false_positive + false_negative),
    }


CLASSIFICATION_METRICS = ("acc", "auc", "auc_low", "auc_high", "sens", "spec", "prec", "f1", "ece")


def classification(
    targets: np.ndarray, scores: np.ndarray, patients: np.ndarray, *, threshold: float, seed: int
) -> dict[str, float]:
    """All CLASSIFICATION_METRICS of binary probabilities. Rows whose target is NaN count for nothing."""
    known = ~np.isnan(np.asarray(targets, np.float64))
    targets, scores, patients = (np.asarray(values)[known] for values in (targets, scores, patients))
    if not len(targets):
        return dict.fromkeys(CLASSIFICATION_METRICS, math.nan)
    low, high = bootstrap_auc(targets, scores, patients, seed=seed)
    return {
        **rates(targets, scores, threshold),
        "auc": auc(targets, scores),
        "auc_low": low,
        "auc_high": high,
        "ece": expected_calibration_error(targets, scores),
    }


def scan_scores(values: np.ndarray, series_of: np.ndarray) -> np.ndarray:
    """The scan's score as the largest of its slices, (N,) -> (series,), in order of series number.

    For targets the same rule holds: one positive slice makes the scan positive; an unknown slice makes it
    unknown unless another one is positive."""
    values, series_of = np.asarray(values, np.float64), np.asarray(series_of)
    result = []
    for number in np.unique(series_of):
        own = values[series_of == number]
        known = own[~np.isnan(own)]
        unknown = np.isnan(own).any() and not (known == 1).any()
        result.append(math.nan if unknown else known.max())
    return np.array(result)
