"""Numbers for tables: image quality in HU, and what a classifier gets right. Arrays in, numbers out.

IMAGE_METRICS and CLASSIFICATION_METRICS hold them by column name. What cannot be computed, such as an AUC
with one class absent, is NaN; tables print it as n/a. How far probabilities can be believed is in
calibration.py, how sure a number is in intervals.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from skimage.metrics import structural_similarity

from calibration import brier, expected_calibration_error, known_rows, log_loss
from intervals import bootstrap_auc, bootstrap_sums, clopper_pearson, delong_auc

RANGE_HU = (0.0, 80.0)  # the brain window, in which head CT is read; PSNR and SSIM are stated there

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


# ---------------------------------------------------------------- classification, two classes


class _Roc(NamedTuple):
    """Counts at every threshold: cuts are the distinct scores, falling; a score >= cut is called positive."""

    cuts: np.ndarray
    hits: np.ndarray  # positives called positive
    alarms: np.ndarray  # negatives called positive

    def threshold(self, place: int) -> float:
        """What calls as cuts[place] does, halfway to the next score, so that near ones are called alike."""
        if place + 1 == len(self.cuts):
            return float(self.cuts[place])
        upper, lower = self.cuts[place], self.cuts[place + 1]
        middle = (upper + lower) / 2
        return float(middle if middle > lower else upper)  # neighbouring floats have nothing between them


def _roc(targets: np.ndarray, scores: np.ndarray) -> _Roc | None:
    """None if a class is absent or a score is NaN."""
    targets, scores = known_rows(targets, scores)
    scores = scores.astype(np.float64)
    if np.isnan(scores).any() or not (targets == 1).any() or not (targets == 0).any():
        return None
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last place of each run of ties
    return _Roc(ranked[last], *(np.cumsum(targets[order] == value)[last] for value in (1, 0)))


def auc(targets: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half. targets: (N,) of 0 and 1.

    NaN if a class is absent or a score is NaN."""
    roc = _roc(targets, scores)
    if roc is None:
        return math.nan
    twice = np.diff(roc.alarms, prepend=0) * (roc.hits + np.append(0, roc.hits[:-1]))  # trapezoids, exact
    return float(twice.sum() / (2 * roc.hits[-1] * roc.alarms[-1]))


def average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve as steps: the mean precision at each positive, ties as one.

    NaN if a class is absent or a score is NaN."""
    roc = _roc(targets, scores)
    if roc is None:
        return math.nan
    precision = roc.hits / (roc.hits + roc.alarms)
    return float((np.diff(roc.hits, prepend=0) * precision).sum() / roc.hits[-1])


def youden_threshold(targets: np.ndarray, scores: np.ndarray) -> float:
    """The threshold with the largest sensitivity + specificity (Youden 1950), halfway between two scores.

    Call score >= threshold positive. NaN if a class is absent or a score is NaN."""
    roc = _roc(targets, scores)
    if roc is None:
        return math.nan
    return roc.threshold(int(np.argmax(roc.hits / roc.hits[-1] - roc.alarms / roc.alarms[-1])))


def threshold_at_specificity(targets: np.ndarray, scores: np.ndarray, specificity: float) -> float:
    """The threshold of largest sensitivity among those of at least this specificity, in (0, 1].

    Choose it on validation. Call score >= threshold positive; where no score is specific enough the threshold
    lies just above all. NaN if a class is absent or a score is NaN."""
    roc = _roc(targets, scores)
    if roc is None:
        return math.nan
    place = _place_at_specificity(roc, specificity)
    return float(np.nextafter(roc.cuts[0], np.inf)) if place is None else roc.threshold(place)


def sensitivity_at_specificity(targets: np.ndarray, scores: np.ndarray, specificity: float) -> float:
    """Sensitivity where the ROC curve of these very scores has at least this specificity, in (0, 1].

    It describes the curve; how a threshold carries over from validation is what rates() says. NaN if a class
    is absent or a score is NaN."""
    roc = _roc(targets, scores)
    if roc is None:
        return math.nan
    place = _place_at_specificity(roc, specificity)
    return 0.0 if place is None else float(roc.hits[place] / roc.hits[-1])


def _place_at_specificity(roc: _Roc, specificity: float) -> int | None:
    """The first cut of largest sensitivity at this specificity; None where every cut has too many alarms."""
    if not 0 < specificity <= 1:
        raise ValueError(f"specificity {specificity}: must be in (0, 1]")
    allowed = np.count_nonzero(
        roc.alarms <= (1 - specificity) * roc.alarms[-1] + 1e-9
    )  # 1 - 0.9 is below 0.1
    return int(np.argmax(roc.hits[:allowed])) if allowed else None


def rates(targets: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """acc, sens, spec, prec and f1 of calling score >= threshold positive; NaN where a denominator is 0.

    All NaN if the threshold or a score is."""
    targets, scores = known_rows(targets, scores)
    known = not (math.isnan(threshold) or np.isnan(scores).any())
    targets, called = targets == 1, scores >= threshold
    true_positive, false_positive = int((called & targets).sum()), int((called & ~targets).sum())
    false_negative, true_negative = int((~called & targets).sum()), int((~called & ~targets).sum())

    def share(part: int, whole: int) -> float:
        return part / whole if whole and known else math.nan

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
    targets, scores, patients = known_rows(targets, scores, patients)
    low, high = bootstrap_auc(targets, scores, patients, seed=seed)
    return {
        **rates(targets, scores, threshold),
        "auc": auc(targets, scores),
        "auc_low": low,
        "auc_high": high,
        "ece": expected_calibration_error(targets, scores),
    }


def report(
    targets: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    threshold: float,
    seed: int,
    null_scores: np.ndarray | None = None,
) -> dict[str, float]:
    """What a study says of binary probabilities beside the columns of classification(): a flat dict.

    targets, scores, patients: (N,), slices or scans; rows whose target is NaN count for nothing. threshold:
    chosen on validation. null_scores: (N,) of positional_null, whose AUC is then auc_null.

    Adds n, n_positive, n_patients, ap, sens_at_90 and sens_at_95 (sensitivity at that specificity of this
    ROC curve), brier, log_loss, and intervals of 95 %: sens_low .. spec_high, by Clopper and Pearson where
    each row is a patient of its own, else by the patient bootstrap; delong_low, delong_high, NaN where a
    patient has several rows, since DeLong's rows are independent."""
    rows = (scores, patients) if null_scores is None else (scores, patients, null_scores)
    targets, scores, patients, *null = known_rows(targets, *rows)
    independent = len(np.unique(patients)) == len(patients)
    area = delong_auc(targets, scores) if independent else None
    found = {
        "n": len(targets),
        "n_positive": int((targets == 1).sum()),
        "n_patients": len(np.unique(patients)),
        **classification(targets, scores, patients, threshold=threshold, seed=seed),
        "delong_low": area.low if area else math.nan,
        "delong_high": area.high if area else math.nan,
        "ap": average_precision(targets, scores),
        "sens_at_90": sensitivity_at_specificity(targets, scores, 0.90),
        "sens_at_95": sensitivity_at_specificity(targets, scores, 0.95),
        "brier": brier(targets, scores),
        "log_loss": log_loss(targets, scores),
    }
    right = (scores >= threshold) == (targets == 1)
    for name, own in (("sens", targets == 1), ("spec", targets == 0)):
        if math.isnan(found[name]):
            ends = math.nan, math.nan
        elif independent:
            ends = clopper_pearson(int((right & own).sum()), int(own.sum()))
        else:
            terms = np.column_stack([right & own, own])
            ends = bootstrap_sums(terms, patients, lambda sums: sums[0] / sums[1], seed=seed)
        found[f"{name}_low"], found[f"{name}_high"] = ends
    if null:
        found["auc_null"] = auc(targets, null[0])
    return found


# ---------------------------------------------------------------- classification, several exclusive classes


def class_numbers(targets: np.ndarray) -> np.ndarray:
    """(N, C) with 1 for the true class -> its number (N,) float64, NaN where any column is unknown."""
    targets = np.asarray(targets, np.float64)
    return np.where(np.isnan(targets).any(axis=1), np.nan, np.nan_to_num(targets).argmax(axis=1))


def confusion_matrix(targets: np.ndarray, called: np.ndarray, count: int) -> np.ndarray:
    """(count, count) int: row the true class, column the called one. targets, called: (N,) class numbers."""
    targets, called = (values.astype(int) for values in known_rows(targets, called))
    return np.bincount(targets * count + called, minlength=count * count).reshape(count, count)


def class_rates(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """acc (), and sens, spec, prec and f1 (C,) of each class against the rest; NaN for a denominator of 0."""
    matrix = np.asarray(matrix, np.float64)
    hits, true, called, total = matrix.diagonal(), matrix.sum(1), matrix.sum(0), matrix.sum()

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.full(np.shape(whole), math.nan), where=whole > 0)

    return {
        "acc": share(hits.sum(), total),
        "sens": share(hits, true),
        "spec": share(total - true - called + hits, total - true),
        "prec": share(hits, called),
        "f1": share(2 * hits, true + called),
    }


def macro_auc(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over classes of the AUC of each against the rest.

    targets: (N,) class numbers; probabilities: (N, C). NaN if a class is absent: the mean over the others
    would be another number."""
    targets, probabilities = known_rows(targets, probabilities)
    return float(np.mean([auc(targets == number, column) for number, column in enumerate(probabilities.T)]))


def multiclass_report(
    targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> dict[str, float]:
    """A flat dict of a softmax classifier that calls its likeliest class.

    targets: (N,) class numbers, NaN for unknown; probabilities: (N, C). acc, auc (macro, one against the
    rest), ece (of the called class: is it right as often as it is sure? Guo et al. 2017), brier (summed over
    classes, 0..2, Brier 1950), and per class sens, spec, prec, f1 and auc, as sens_<class>. All NaN if a
    probability is."""
    targets, probabilities = known_rows(targets, probabilities)
    finite = len(targets) and not np.isnan(probabilities).any()
    called = probabilities.argmax(axis=1)
    per_class = class_rates(confusion_matrix(targets, called, len(classes)))
    truth = np.arange(len(classes)) == np.asarray(targets)[:, None]
    found = {"acc": float(per_class.pop("acc")), "auc": macro_auc(targets, probabilities)}
    found["ece"] = expected_calibration_error(called == targets, probabilities.max(axis=1))
    found["brier"] = float(np.square(probabilities - truth).sum(axis=1).mean()) if finite else math.nan
    for number, name in enumerate(classes):
        found |= {f"{rate}_{name}": float(values[number]) for rate, values in per_class.items()}
        found[f"auc_{name}"] = auc(truth[:, number], probabilities[:, number])
    return found if finite else dict.fromkeys(found, math.nan)


# ---------------------------------------------------------------- scans, and what position alone says


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


POSITION_BANDWIDTH = 0.05  # of the scan's length: 8 mm of 160, which a lesion spans; 2 slices of 5 mm
POSITION_STEP = 0.001  # fiftieth of the bandwidth, to which training positions are rounded


def relative_positions(positions_mm: np.ndarray, series_of: np.ndarray) -> np.ndarray:
    """Where a slice lies along its scan, (N,): 0 the lowest of its series, 1 the highest, 0.5 if alone."""
    positions_mm = np.asarray(positions_mm, np.float64)
    ids, owners = np.unique(np.asarray(series_of), return_inverse=True)
    low, high = np.full(len(ids), np.inf), np.full(len(ids), -np.inf)
    np.minimum.at(low, owners, positions_mm)
    np.maximum.at(high, owners, positions_mm)
    length = (high - low)[owners]
    return np.divide(positions_mm - low[owners], length, out=np.full(len(owners), 0.5), where=length > 0)


def positional_null(
    train_positions: np.ndarray, train_targets: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Scores (M,) of slices from their relative position alone: how often training was positive there.

    train_positions (N,), positions (M,): 0..1 along the scan; train_targets (N,), NaN counts for nothing.
    Gaussian kernel regression (Nadaraya & Watson 1964) of POSITION_BANDWIDTH; NaN without known targets. Its
    AUC belongs beside each AUC of slices, since lesions have their heights. Of a scan the null's score is the
    largest of its slices, as scan_scores has it: it knows how densely and how far the scan covers the
    likely heights, and nothing else."""
    train_targets, train_positions = known_rows(train_targets, train_positions)
    for values in (train_positions, positions):
        if not ((np.asarray(values) >= 0) & (np.asarray(values) <= 1)).all():
            raise ValueError("positions: must be in 0..1 along the scan (see relative_positions)")
    grid = np.linspace(0, 1, round(1 / POSITION_STEP) + 1)
    if not len(train_targets):
        return np.full(len(positions), math.nan)
    place = np.rint(train_positions / POSITION_STEP).astype(int)
    kernel = np.exp(-0.5 * np.square((grid[:, None] - grid) / POSITION_BANDWIDTH))
    count, positive = (np.bincount(place, weights, len(grid)) for weights in (None, train_targets))
    return np.interp(positions, grid, (kernel @ positive) / (kernel @ count))
