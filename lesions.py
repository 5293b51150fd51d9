"""The numbers by which lesion segmentation is measured: overlap, surfaces, volumes, lesions found.

Masks are (S, H, W), bool or uint8 lesion classes as in anatomy.LESION_CLASSES; spacing_mm is (slice, row,
column). A case is a scan. case_report gives every number of a case as a flat dict, class_report one such dict
per lesion class, summarise the means, medians and intervals of a study.

Binary numbers take every voxel that is not 0 for lesion, 255 (lesion of unknown kind) included; where two
classes meet they are one lesion. What cannot be computed is NaN.

Empty masks. Dice and IoU are NaN where both masks are empty and 0 where one is. A study reports their mean
over positives only, cases whose truth holds a lesion, so that empty predictions on normal scans earn nothing;
`dice_all` counts all cases, both empty as 1, as some papers do. What a network does to normal scans is said
by the volume of its false positives there, and by how many stay clean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import nct
from scipy.stats import t as student

from anatomy import LESION_CLASSES
from intervals import (
    BOOTSTRAP_REPLICATES,
    LEVEL,
    UNKNOWN,
    Interval,
    clopper_pearson,
    patient_bootstraps,
)

UNKNOWN_KIND = 255  # of a lesion whose class nobody has written down
TOLERANCE_MM = 2.0  # two pixels at 256 x 256, half a slice: edges drawn one pixel apart by each reader agree
ROUNDING = 1e-9  # 3 x 0.1 mm is within 0.3 mm
HD_PERCENTILE = 95
TOUCHING = np.ones((3, 3, 3))  # voxels of a lesion touch by faces, edges or corners: 26 neighbours
# A lesion is found if its IoU with all predicted components that touch it is above 0 and at least this
DETECTION_IOU = {"any": 0.0, "iou": 0.1}
SIZE_EDGES_ML = (1.0, 5.0, 20.0)
SIZES = ("under_1_ml", "1_to_5_ml", "5_to_20_ml", "over_20_ml")  # the lower edge belongs to each
LARGE_ML = 5.0  # smaller lesions are so few voxels that a volume error in per cent says little
AGREEMENT_Z = 1.96  # 95 % of differences lie between bias -+ this many SD: Bland & Altman 1986

# ---------------------------------------------------------------- overlap


def dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    """2 |both| / (|truth| + |predicted|) of a case, in voxels. NaN where both are empty, 0 where one is."""
    shared, either = _overlap(truth, predicted)
    return 2 * shared / (shared + either) if either else math.nan


def iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    """|both| / |either| of a case, in voxels. NaN where both are empty, 0 where one is."""
    shared, either = _overlap(truth, predicted)
    return shared / either if either else math.nan


def pixel_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The share of voxels called right, lesion or not: only to compare with systems that report nothing else.

    It flatters. Lesions fill about 1 % of a scan, so that an empty prediction earns about 0.99, the more the
    wider the air around the head."""
    shared, either = _overlap(truth, predicted)
    return 1 - (either - shared) / np.size(truth)


def _overlap(truth: np.ndarray, predicted: np.ndarray) -> tuple[int, int]:
    """Voxels in both masks, and in either."""
    truth, predicted = _pair(truth, predicted)
    return int(np.count_nonzero(truth & predicted)), int(np.count_nonzero(truth | predicted))


# ---------------------------------------------------------------- volumes


def volume_ml(mask: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """The volume of a mask (S, H, W) in ml."""
    _check_mask("mask", mask)
    return int(np.count_nonzero(mask)) * _voxel_ml(spacing_mm)


def volume_error_ml(truth: np.ndarray, predicted: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Predicted minus true volume in ml: above 0 where too much is called lesion, wherever it lies."""
    truth, predicted = _pair(truth, predicted)
    return volume_ml(predicted, spacing_mm) - volume_ml(truth, spacing_mm)


def false_positive_volume_ml(truth: np.ndarray, predicted: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """The volume in ml that is called lesion on a scan without any; NaN on a scan with one."""
    truth, predicted = _pair(truth, predicted)
    return math.nan if truth.any() else volume_ml(predicted, spacing_mm)


class BlandAltman(NamedTuple):
    """Agreement of two measurements in ml: predicted - true has the mean bias, and 95 % lie within limits."""

    n: int
    bias: float
    sd: float
    lower: float
    upper: float
    bias_interval: Interval
    lower_interval: Interval
    upper_interval: Interval


def bland_altman(truth_ml: np.ndarray, predicted_ml: np.ndarray, level: float = LEVEL) -> BlandAltman:
    """Bias and 95 % limits of agreement of volumes (N,) in ml, each with its interval of this level.

    The rows must be independent: one scan per patient. Rows with a NaN count for nothing; SD, limits and
    intervals are NaN for fewer than two. The intervals are exact for normal differences, by Student's t for
    the bias and the noncentral t for the limits, whose usual approximation is too narrow on few scans.
    Source: Bland & Altman 1986; Carkeet 2015 (exact limits)."""
    differences = np.asarray(predicted_ml, np.float64) - np.asarray(truth_ml, np.float64)
    differences = differences[~np.isnan(differences)]
    n = len(differences)
    bias = float(differences.mean()) if n else math.nan
    if n < 2:
        return BlandAltman(n, bias, *[math.nan] * 3, *[UNKNOWN] * 3)
    sd = float(differences.std(ddof=1))
    error = sd / math.sqrt(n)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    around_bias = bias + error * student.ppf(tails, n - 1)
    above = error * nct.ppf(tails, n - 1, AGREEMENT_Z * math.sqrt(n))
    return BlandAltman(
        n,
        bias,
        sd,
        bias - AGREEMENT_Z * sd,
        bias + AGREEMENT_Z * sd,
        *(Interval(float(low), float(high)) for low, high in (around_bias, bias - above[::-1], bias + above)),
    )


def size_name(volume: float) -> str | None:
    """Which of SIZES a volume in ml has; None for no volume at all."""
    return SIZES[int(np.digitize(volume, SIZE_EDGES_ML))] if volume > 0 else None


def components(mask: np.ndarray) -> np.ndarray:
    """(S, H, W) numbers of the 26-connected components of a mask, from 1 on."""
    return ndimage.label(mask, TOUCHING)[0]


def sure_ml(component_at: np.ndarray, sure: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """How many ml of each component are sure; of component 0, which is none, 0. sure: (S, H, W) bool."""
    held = np.bincount(component_at.ravel(), sure.ravel()) * _voxel_ml(spacing_mm)
    held[0] = 0
    return held


def believed(held_ml: np.ndarray, least_ml: float) -> np.ndarray:
    """Which components are lesions by sure_ml: those of which some is sure, and least_ml at least."""
    return (held_ml > 0) & (held_ml >= least_ml - ROUNDING)


def without_specks(
    mask: np.ndarray, sure: np.ndarray, spacing_mm: Sequence[float], least_ml: float
) -> np.ndarray:
    """The mask (S, H, W) of the lesions that are believed: two thresholds, so that they have their edges.

    sure: (S, H, W) bool. Source: Canny 1986 (hysteresis)."""
    component_at = components(mask)
    kept = believed(sure_ml(component_at, sure, spacing_mm), least_ml)
    return np.where(kept[component_at], mask, np.zeros_like(mask))


def _voxel_ml(spacing_mm: Sequence[float]) -> float:
    return float(np.prod(_spacing(spacing_mm))) / 1000  # mm3


# ---------------------------------------------------------------- surfaces


class SurfaceDistances(NamedTuple):
    """From every surface voxel of one mask to the nearest of the other, in mm; no order."""

    from_truth: np.ndarray
    from_predicted: np.ndarray


def surface_distances_mm(
    truth: np.ndarray, predicted: np.ndarray, spacing_mm: Sequence[float]
) -> SurfaceDistances:
    """Distances in mm between the surfaces of two masks (S, H, W), both ways.

    The surface is the mask minus its erosion by the 6 face neighbours; beyond the volume nothing is lesion.
    A volume of one slice has the contour as its surface, not the whole mask. Where a mask is empty it has no
    distances, and those to it are infinite."""
    truth, predicted = _cropped(truth, predicted)
    spacing_mm = _spacing(spacing_mm)
    surfaces = [_surface(mask) for mask in (truth, predicted)]

    def distances(start: np.ndarray, goal: np.ndarray) -> np.ndarray:
        if not start.any() or not goal.any():
            return np.full(np.count_nonzero(start), math.inf)
        return ndimage.distance_transform_edt(~goal, sampling=spacing_mm)[start]

    return SurfaceDistances(distances(*surfaces), distances(*surfaces[::-1]))


def hd95_mm(truth: np.ndarray, predicted: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """The 95th percentile of the surface distances in mm, the larger of both ways. NaN where a mask is empty.

    A missed lesion thus leaves the mean of a study instead of making it infinite: say how many have none.
    Source: Huttenlocher 1993, the partial Hausdorff distance."""
    return _hd95(surface_distances_mm(truth, predicted, spacing_mm))


def surface_dice(
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing_mm: Sequence[float],
    tolerance_mm: float = TOLERANCE_MM,
) -> float:
    """The share of both surfaces' voxels that lie within tolerance_mm of the other surface.

    As Dice, it is NaN where both masks are empty and 0 where one is. Every surface voxel counts alike,
    whatever area it stands for. Raises ValueError if the tolerance is negative. Source: Nikolov 2021."""
    return _surface_dice(surface_distances_mm(truth, predicted, spacing_mm), tolerance_mm)


def _hd95(distances: SurfaceDistances) -> float:
    if not all(map(len, distances)):
        return math.nan
    return max(float(np.percentile(way, HD_PERCENTILE)) for way in distances)


def _surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm {tolerance_mm}: must be 0 or more (the reader's accuracy in mm)")
    both = np.concatenate(distances)
    return float((both <= tolerance_mm * (1 + ROUNDING)).mean()) if len(both) else math.nan


def _surface(mask: np.ndarray) -> np.ndarray:
    neighbours = ndimage.generate_binary_structure(3, 1)
    if len(mask) == 1:
        neighbours[[0, 2]] = False  # no slice above or below to be outside of
    return mask & ~ndimage.binary_erosion(mask, neighbours)


# ---------------------------------------------------------------- lesions


class LesionCounts(NamedTuple):
    """True lesions found (tp) and missed (fn), and predicted components that find none (fp)."""

    tp: int
    fn: int
    fp: int


class MatchedLesions(NamedTuple):
    """The L lesions of a case, and the predicted components that touch them."""

    voxels: np.ndarray  # (L,) of each true lesion
    iou: np.ndarray  # (L,) with the union of all predicted components that touch it
    contacts: np.ndarray  # (K, 2) numbers of a lesion and a component that share voxels
    components: int  # predicted, touching or not

    def found(self, criterion: str) -> np.ndarray:
        """Which lesions are found by a criterion of DETECTION_IOU, (L,) bool. ValueError if it has none."""
        if criterion not in DETECTION_IOU:
            raise ValueError(f"criterion {criterion!r}: must be one of {', '.join(DETECTION_IOU)}")
        return (self.iou > 0) & (self.iou >= DETECTION_IOU[criterion])

    def counts(self, criterion: str) -> LesionCounts:
        """Lesions found and missed, and components that find none. ValueError as in found."""
        found = self.found(criterion)
        lesion, component = self.contacts.T
        right = np.unique(component[found[lesion]])
        return LesionCounts(int(found.sum()), int((~found).sum()), self.components - len(right))


def match_lesions(truth: np.ndarray, predicted: np.ndarray) -> MatchedLesions:
    """Part both masks (S, H, W) into 26-connected components and say which touch.

    A lesion is measured against the union of the components that touch it, so that a lesion predicted in two
    pieces is one lesion found and no false positive. A component over two lesions may find both; its IoU with
    each is less by the other's voxels. A component is a false positive unless it touches a found lesion."""
    truth, predicted = _cropped(truth, predicted)
    lesion_at, lesions = ndimage.label(truth, TOUCHING)
    component_at, components = ndimage.label(predicted, TOUCHING)
    lesion_voxels = np.bincount(lesion_at.ravel(), minlength=lesions + 1)[1:]
    component_voxels = np.bincount(component_at.ravel(), minlength=components + 1)[1:]
    both = truth & predicted
    meeting = (lesion_at[both].astype(np.int64) - 1) * components + component_at[both] - 1
    meeting, voxels = np.unique(meeting, return_counts=True)
    lesion, component = np.divmod(meeting, max(components, 1))
    shared = np.bincount(lesion, voxels, minlength=lesions)
    touching = np.bincount(lesion, component_voxels[component], minlength=lesions)
    overlap = shared / (lesion_voxels + touching - shared)
    return MatchedLesions(lesion_voxels, overlap, np.column_stack([lesion, component]), components)


def lesion_rates(counts: LesionCounts) -> dict[str, float]:
    """precision, recall and f1 over lesions from counts summed over cases; NaN where a denominator is 0."""
    return {name: _share(*ratio) for name, ratio in _lesion_ratios(*counts).items()}


def _lesion_ratios(tp: Any, fn: Any, fp: Any) -> dict[str, tuple[Any, Any]]:
    """Part and whole of each rate, from numbers or from arrays of one shape."""
    return {"precision": (tp, tp + fp), "recall": (tp, tp + fn), "f1": (2 * tp, 2 * tp + fn + fp)}


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


# ---------------------------------------------------------------- one case


def case_report(
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing_mm: Sequence[float],
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, float | int | str | None]:
    """Every binary number of a case as a flat dict of JSON types, its NaN included.

    truth_ml, predicted_ml, size (of SIZES, by truth_ml; None without a lesion), dice, iou, pixel_accuracy,
    hd95_mm, surface_dice, volume_error_ml, volume_error_percent (of truth_ml), false_positive_ml, and for
    each criterion of DETECTION_IOU <criterion>_tp, _fn, _fp, and _tp_<size>, _fn_<size> by the volume of the
    lesion itself. Raises ValueError if the masks are no masks of one shape, or a spacing is not positive."""
    truth, predicted = _pair(truth, predicted)
    accuracy = pixel_accuracy(truth, predicted)  # of the whole volume; nothing else asks what lies outside
    truth, predicted = _cropped(truth, predicted)
    distances = surface_distances_mm(truth, predicted, spacing_mm)
    truth_ml, error_ml = volume_ml(truth, spacing_mm), volume_error_ml(truth, predicted, spacing_mm)
    found = {
        "truth_ml": truth_ml,
        "predicted_ml": volume_ml(predicted, spacing_mm),
        "size": size_name(truth_ml),
        "dice": dice(truth, predicted),
        "iou": iou(truth, predicted),
        "pixel_accuracy": accuracy,
        "hd95_mm": _hd95(distances),
        "surface_dice": _surface_dice(distances, tolerance_mm),
        "volume_error_ml": error_ml,
        "volume_error_percent": 100 * _share(error_ml, truth_ml),
        "false_positive_ml": false_positive_volume_ml(truth, predicted, spacing_mm),
    }
    lesions = match_lesions(truth, predicted)
    sizes = np.digitize(lesions.voxels * _voxel_ml(spacing_mm), SIZE_EDGES_ML)
    for criterion in DETECTION_IOU:
        hits = lesions.found(criterion)
        counts = lesions.counts(criterion)._asdict()
        found |= {f"{criterion}_{name}": count for name, count in counts.items()}
        for number, size in enumerate(SIZES):
            found[f"{criterion}_tp_{size}"] = int((hits & (sizes == number)).sum())
            found[f"{criterion}_fn_{size}"] = int((~hits & (sizes == number)).sum())
    return found


def class_report(
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing_mm: Sequence[float],
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, dict[str, float | int | str | None]]:
    """case_report of each of LESION_CLASSES alone, by name: truth and predicted are (S, H, W) classes.

    What is unknown counts for nothing. Where truth holds a lesion of unknown kind (255) its voxels are
    neither right nor wrong for any class, and a class that truth does not hold beside it is left out, since
    the lesion may be of that class. A voxel predicted as 255 is of no class.
    Raises ValueError for bool masks and for classes that do not exist."""
    for name, mask in (("truth", truth), ("predicted", predicted)):
        _check_mask(name, mask)
        if mask.dtype == bool:
            raise ValueError(f"{name}: is bool and has no classes (take case_report)")
        wrong = mask[((mask > len(LESION_CLASSES)) & (mask != UNKNOWN_KIND)) | (mask < 0)]
        if len(wrong):
            raise ValueError(f"{name}: class {wrong[0]} (0..{len(LESION_CLASSES)} or {UNKNOWN_KIND} exist)")
    known = truth != UNKNOWN_KIND
    found = {}
    for number, name in enumerate(LESION_CLASSES, start=1):
        own = truth == number
        if known.all() or own.any():
            found[name] = case_report(own, (predicted == number) & known, spacing_mm, tolerance_mm)
    return found


# ---------------------------------------------------------------- many cases


def summarise(
    reports: Sequence[dict], patients: Sequence, *, seed: int, replicates: int = BOOTSTRAP_REPLICATES
) -> dict[str, float]:
    """What a study says of its cases: a flat dict of numbers, each <name> with <name>_low and <name>_high.

    reports: of case_report, or of one class of class_report. patients: (N,) the patient of each. Means and
    medians are over cases, intervals of 95 % draw whole patients. Each number is of the cases that have one:

    positives, whose truth holds a lesion: dice, iou, surface_dice, hd95_mm (a missed lesion has none),
        volume_abs_error_ml, each also as <name>_median; volume_error_ml; dice_<size> and
        volume_error_percent_<size>, by the volume of the case; volume_error_percent_large and
        volume_abs_error_percent_large, of cases of at least LARGE_ML.
    negatives: false_positive_ml; clean, the share without a lesion voxel (interval by Clopper and Pearson
        where each case is a patient of its own).
    all: dice_all and iou_all, where both masks empty count as 1; pixel_accuracy.
    lesions, counts summed over cases: <criterion>_precision, _recall, _f1, and _recall_<size>.
    agreement of the volumes of positives: limit_lower_ml, limit_upper_ml, whose intervals, from bland_altman,
        are NaN where a patient has several cases; the bias is volume_error_ml.

    Counts without interval: n_cases, n_patients, n_positive, n_negative, n_hd95_mm, n_large, n_lesions,
    n_<size> and n_lesions_<size>. Raises ValueError unless each report has its patient."""
    if len(reports) != len(patients):
        raise ValueError(f"patients: {len(patients)} of {len(reports)} reports (one for each)")
    patients = np.asarray(patients)
    independent = len(np.unique(patients)) == len(patients)

    def column(name: str) -> np.ndarray:
        return np.array([report[name] for report in reports], np.float64)

    def of(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.where(rows, values, math.nan)

    truth_ml, predicted_ml = column("truth_ml"), column("predicted_ml")
    positive, large = truth_ml > 0, truth_ml >= LARGE_ML
    sizes = np.array([report["size"] for report in reports], object)
    overlaps = {name: column(name) for name in ("dice", "iou")}
    error_ml, error_percent = column("volume_error_ml"), column("volume_error_percent")
    clean = predicted_ml == 0
    medians = {
        **{name: of(positive, values) for name, values in overlaps.items()},
        "surface_dice": of(positive, column("surface_dice")),
        "hd95_mm": column("hd95_mm"),
        "volume_abs_error_ml": of(positive, abs(error_ml)),
    }
    means = {
        **medians,
        "volume_error_ml": of(positive, error_ml),
        "volume_error_percent_large": of(large, error_percent),
        "volume_abs_error_percent_large": of(large, abs(error_percent)),
        **{f"dice_{size}": of(sizes == size, overlaps["dice"]) for size in SIZES},
        **{f"volume_error_percent_{size}": of(sizes == size, error_percent) for size in SIZES},
        "false_positive_ml": column("false_positive_ml"),
        "clean": of(~positive, clean),
        **{f"{name}_all": np.where(np.isnan(values), 1.0, values) for name, values in overlaps.items()},
        "pixel_accuracy": column("pixel_accuracy"),
    }
    # every mean and rate is a ratio of two sums over cases
    ratios = {name: (np.nan_to_num(values), ~np.isnan(values)) for name, values in means.items()}
    for criterion in DETECTION_IOU:
        counts = LesionCounts(*(column(f"{criterion}_{name}") for name in LesionCounts._fields))
        ratios |= {f"{criterion}_{name}": ratio for name, ratio in _lesion_ratios(*counts).items()}
        for size in SIZES:
            tp, fn = (column(f"{criterion}_{name}_{size}") for name in ("tp", "fn"))
            ratios[f"{criterion}_recall_{size}"] = tp, tp + fn

    ids, owners = np.unique(patients, return_inverse=True)
    terms = np.array(list(ratios.values()), np.float64)  # (ratios, part and whole, cases)
    sums = np.zeros((len(ids), *terms.shape[:2]))  # of each patient
    np.add.at(sums, owners, terms.transpose(2, 0, 1))

    def drawn(times: np.ndarray) -> np.ndarray:
        """(R, patients) -> (R, ratios and medians)."""
        parts, wholes = (times @ sums[..., place] for place in (0, 1))
        of_cases = times[:, owners]
        return np.column_stack([parts / wholes, *(_medians(values, of_cases) for values in medians.values())])

    values = [_share(*pair) for pair in terms.sum(2)]
    values += [float(_medians(own, np.ones((1, len(own))))[0]) for own in medians.values()]
    names = [*ratios, *(f"{name}_median" for name in medians)]
    found_in_draws = patient_bootstraps(drawn, len(ids), seed=seed, replicates=replicates)
    estimates = dict(zip(names, zip(values, found_in_draws, strict=True), strict=True))
    if independent:
        exact = clopper_pearson(int((clean & ~positive).sum()), int((~positive).sum()))
        estimates["clean"] = estimates["clean"][0], exact
    agreement = bland_altman(truth_ml[positive], predicted_ml[positive])
    estimates["limit_lower_ml"] = agreement.lower, agreement.lower_interval if independent else UNKNOWN
    estimates["limit_upper_ml"] = agreement.upper, agreement.upper_interval if independent else UNKNOWN

    lesions = {size: int(ratios[f"any_recall_{size}"][1].sum()) for size in SIZES}
    found: dict[str, float] = {
        "n_cases": len(reports),
        "n_patients": len(np.unique(patients)),
        "n_positive": int(positive.sum()),
        "n_negative": int((~positive).sum()),
        "n_hd95_mm": int((~np.isnan(means["hd95_mm"])).sum()),
        "n_large": int(large.sum()),
        "n_lesions": sum(lesions.values()),
        **{f"n_{size}": int((sizes == size).sum()) for size in SIZES},
        **{f"n_lesions_{size}": count for size, count in lesions.items()},
    }
    for name, (value, interval) in estimates.items():
        found |= {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return found


def _medians(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(R,) medians of the values (N,) that are not NaN, each taken times (R, N); NaN of none."""
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # NaN come last
    values, ends = np.append(values[order], math.nan), times[:, order].cumsum(1)
    count = ends[:, -1:] if len(order) else np.zeros((len(times), 1))
    middle = [(ends <= place).sum(1) for place in ((count - 1) // 2, count // 2)]
    return np.where(count[:, 0] > 0, (values[middle[0]] + values[middle[1]]) / 2, math.nan)


# ---------------------------------------------------------------- masks


def _check_mask(name: str, mask: np.ndarray) -> None:
    if mask.dtype.kind not in "bui":
        raise ValueError(f"{name}: {mask.dtype} is no mask (threshold probabilities first)")
    if mask.ndim != 3 or not mask.size:
        raise ValueError(f"{name}: shape {mask.shape} (must be slices, rows, columns)")


def _pair(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as bool. Raises ValueError unless they are masks (S, H, W) of one shape."""
    _check_mask("truth", truth)
    _check_mask("predicted", predicted)
    if truth.shape != predicted.shape:
        raise ValueError(
            f"predicted: shape {predicted.shape}, truth {truth.shape} (bring them to one geometry first)"
        )
    return truth.astype(bool, copy=False), predicted.astype(bool, copy=False)


def _cropped(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as bool, cut to the box around the voxels of either and one voxel more where the volume has it.

    With the margin a lesion of one slice in a scan of many stays apart from a scan of one slice."""
    truth, predicted = _pair(truth, predicted)
    either = truth | predicted
    box = []
    for axis in range(3):
        places = np.flatnonzero(either.any(axis=tuple({0, 1, 2} - {axis})))
        first, last = (places[0], places[-1]) if len(places) else (0, 0)
        box.append(slice(max(first - 1, 0), last + 2))
    return truth[tuple(box)], predicted[tuple(box)]


def _spacing(spacing_mm: Sequence[float]) -> np.ndarray:
    spacing = np.asarray(spacing_mm, np.float64)
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(f"spacing_mm {spacing_mm}: must be three lengths above 0 (slice, row, column)")
    return spacing
