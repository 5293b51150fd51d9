"""Two networks read a scan: a classifier says whether there is a lesion, a segmenter then outlines it.

The segmenter is asked only where the classifier does not call the scan normal. Where the two contradict each
other, by the volume that validation chose, that is said; what the classifier says stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from torch import nn

import anatomy
import lesions
from dataset import TASKS, from_square
from inference import Network, Probabilities, lesion_mask, lesion_probabilities
from volumes import Scan

NORMAL = "normal"  # the class of an exclusive task that has no lesion


class Call(NamedTuple):
    """What a classifier says of a scan. positive: None where it has no threshold; why: in words."""

    positive: bool | None
    why: str


class LesionReading(NamedTuple):
    """What the segmenter says of a scan. facts: JSON types.

    mask: (S, H, W) uint8 on the pixels of the scan, None where it was not asked."""

    mask: np.ndarray | None
    facts: dict[str, Any]


def read_lesions(
    scan: Scan,
    called: Call,
    segmenter: Network,
    images: Callable[[], np.ndarray],
    *,
    always: bool = False,
) -> LesionReading:
    """The second stage. called: what the first says, see call_scan. always: outline normal scans too.

    images: gives (S, size, size) HU of the scan, fitted to the segmenter's size and denoised where it learnt
    so; called only where it is asked.
    facts: segmented, why, volume_rule, contradiction (in words, or None), and where it was asked threshold,
    mask_values and what measure_lesions gives."""
    rule = segmenter.facts.get("volume_rule")
    if rule is not None and rule["value"] is None:
        rule = None
    facts = {"segmented": always or called.positive is not False, "why": called.why, "volume_rule": rule}
    if not facts["segmented"]:
        return LesionReading(None, facts | {"contradiction": None})
    if called.positive is False:
        facts["why"] += "; outlined all the same"
    threshold = segmenter.facts["thresholds"]["lesion"]
    mask = outline_lesions(segmenter.network, threshold, images(), scan.spacing_mm, scan.hu.shape[1:])
    classes = segmenter.facts["classes"]
    measured = measure_lesions(mask, scan, classes)
    facts |= {
        "contradiction": contradiction(called.positive, measured["volume_ml"], rule),
        "threshold": threshold,
        "mask_values": {str(value): name for value, name in enumerate(classes, start=1)},
        **measured,
    }
    return LesionReading(mask, facts)


def call_scan(found: Probabilities, facts: dict) -> Call:
    """What a classifier says of one scan: by its threshold, or of exclusive classes the likeliest.

    found: of one scan, as inference.read gives it. facts: of the classifier's checkpoint."""
    task = TASKS[facts["task"]]
    if task.exclusive:
        likeliest = facts["classes"][int(found.scans[0].argmax())]
        return Call(likeliest != NORMAL, f"the classifier's likeliest class is {likeliest}")
    score, threshold = float(task.positive(found.scans)[0]), facts["thresholds"]["scan"]["value"]
    said = f"{task.finding} probability {score:.3f}"
    if threshold is None:
        return Call(None, f"{said}; the classifier has no threshold, so that every scan is outlined")
    return Call(score >= threshold, f"{said}, the classifier's threshold is {threshold:.3f}")


def outline_lesions(
    network: nn.Module,
    rule: Mapping[str, Any],
    images: np.ndarray,
    spacing_mm: Sequence[float],
    shape: Sequence[int] | None = None,
) -> np.ndarray:
    """Lesions of a whole scan: (S, rows, columns) uint8, see inference.lesion_mask.

    rule: facts["thresholds"]["lesion"] of the segmenter's checkpoint, with value, sure and least_ml. images:
    (S, size, size) HU. shape: (rows, columns) of the scan where fit_to_square made the images, whose masks
    are then brought back to its pixels: probabilities are, so that edges are no stairs. spacing_mm: (slice,
    row, column) of what is returned."""
    mask = np.empty((len(images), *(shape or images.shape[1:])), np.uint8)
    sure = np.empty(mask.shape, bool)
    for some, found in lesion_probabilities(network, images):
        if shape is not None:
            found = from_square(found, shape, spacing_mm)
        mask[some] = lesion_mask(found, rule["value"])
        sure[some] = found.sum(1) >= rule.get("sure", rule["value"])
    return lesions.without_specks(mask, sure, spacing_mm, rule.get("least_ml", 0.0))


def slice_thickness_mm(positions_mm: Sequence[float], gap_mm: float) -> np.ndarray:
    """(S,) how much of the patient each slice stands for: half the gap to either neighbour, at both ends the
    whole gap; gap_mm for a slice alone. For even gaps it is the gap."""
    if len(positions_mm) == 1:
        return np.array([float(gap_mm)])
    gaps = np.diff(positions_mm)
    return (np.append(gaps[:1], gaps) + np.append(gaps, gaps[-1:])) / 2


def measure_lesions(mask: np.ndarray, scan: Scan, classes: Sequence[str]) -> dict[str, Any]:
    """Volumes, areas and number of the lesions in a mask (S, H, W) on the pixels of a scan, as JSON types.

    volume_ml, and by class: uneven gaps count as they are, a tilt does not change them. area_percent: of the
    brain of the scan, and in slices of that slice, None where there is neither brain nor lesion; what is
    called lesion counts as brain. lesions: parts that touch nowhere, classes alike. classes: of the values
    1, 2, ..."""
    brain = anatomy.brain_mask(scan.hu, scan.spacing_mm) | (mask > 0)
    pixel_mm2 = scan.spacing_mm[1] * scan.spacing_mm[2]
    thickness = slice_thickness_mm(scan.positions_mm, scan.spacing_mm[0])

    def area_mm2(inside: np.ndarray) -> np.ndarray:
        return pixel_mm2 * np.count_nonzero(inside, axis=(1, 2))

    def volume_ml(areas: np.ndarray) -> float:
        return float(areas @ thickness) / 1000  # mm3

    areas, whole = area_mm2(mask > 0), area_mm2(brain)
    return {
        "volume_ml": volume_ml(areas),
        "volume_ml_by_class": {
            name: volume_ml(area_mm2(mask == value)) for value, name in enumerate(classes, start=1)
        },
        "area_percent": _percent(float(areas @ thickness), float(whole @ thickness)),
        "lesions": int(ndimage.label(mask > 0, lesions.TOUCHING)[1]),
        "slices": [
            {"index": index, "area_mm2": float(area), "area_percent": _percent(area, all_of_it)}
            for index, (area, all_of_it) in enumerate(zip(areas, whole, strict=True))
        ],
    }


def _percent(part: float, whole: float) -> float | None:
    return float(100 * part / whole) if whole else None


def contradiction(positive: bool | None, volume_ml: float, rule: dict | None) -> str | None:
    """In words, where what is outlined is not what the classifier says; None where it is, or nobody can tell.

    rule: volume_rule of a segmenter's checkpoint, {value in ml, origin}: that much is a lesion. It flags,
    and no answer of either network changes."""
    if positive is None or rule is None or positive == (volume_ml >= rule["value"]):
        return None
    found = f"{volume_ml:.2f} ml, {'below' if positive else 'above'} the {rule['value']:.2f} ml of a lesion"
    said = "sees a lesion" if positive else "calls the scan normal"
    return f"the classifier {said}, the segmenter outlines {found}: look for yourself"


def describe(facts: dict[str, Any]) -> str:
    """The facts of read_lesions in a line."""
    if not facts["segmented"]:
        return f"lesions: not outlined, {facts['why']}"
    area = "" if facts["area_percent"] is None else f", {facts['area_percent']:.1f} % of the brain"
    line = f"lesions: {facts['lesions']}, {facts['volume_ml']:.2f} ml{area}"
    return line + (f"; CONTRADICTION: {facts['contradiction']}" if facts["contradiction"] else "")
