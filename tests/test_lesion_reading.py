"""The second stage: when it is asked, where its mask lies, what is measured and what is flagged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

import anatomy
import lesions
from anatomy import LESION_CLASSES
from dataset import TYPES, fit_to_square
from inference import Network, Probabilities
from lesion_reading import (
    Call,
    call_scan,
    contradiction,
    describe,
    measure_lesions,
    outline_lesions,
    read_lesions,
    slice_thickness_mm,
)
from scans import discover_phantom, read_phantom
from tests.toy_models import SIZE, BrightSegmenter
from train_segmenter import volume_rule
from volumes import AIR_HU

RULE = {"value": 2.0, "origin": "given"}


@pytest.fixture(scope="module")
def scan():
    """A phantom of 6 slices of 64 x 64."""
    (job,), _ = discover_phantom(1, size=64, slices=6, seed=5)
    return read_phantom(job)


def segmenter(**facts):
    thresholds = {"lesion": {"value": 0.5, "origin": "given"}}
    known = {"classes": ["lesion"], "thresholds": thresholds, "size": SIZE, "input": "clean"}
    return Network(Path("segmenter.pt"), BrightSegmenter(), known | facts)


def images_of(scan):
    return lambda: fit_to_square(scan.hu, scan.spacing_mm, SIZE, AIR_HU)


# ---------------------------------------------------------------- when it is asked


def answer(*scan_probabilities):
    return Probabilities(np.array([scan_probabilities]), np.array([scan_probabilities]))


@pytest.mark.parametrize(("threshold", "positive"), [(0.6, True), (0.601, False), (None, None)])
def test_call_scan_goes_by_the_threshold_of_the_scan(threshold, positive):
    thresholds = {"slice": {"value": 0.0}, "scan": {"value": threshold}}
    facts = {"task": "stroke", "classes": ["stroke"], "thresholds": thresholds}
    called = call_scan(answer(0.6), facts)
    assert called.positive is positive
    assert "stroke probability 0.600" in called.why
    assert ("no threshold" in called.why) == (threshold is None)


@pytest.mark.parametrize(
    ("found", "positive", "name"),
    [
        ((0.4, 0.35, 0.25), False, "normal"),
        ((0.3, 0.35, 0.35), True, "ischemic"),
        ((0.2, 0.1, 0.7), True, "hemorrhagic"),
    ],
)
def test_call_scan_of_types_goes_by_the_likeliest(found, positive, name):
    """Though normal has less than half in all of them, and no threshold was chosen."""
    thresholds = {"slice": {"value": None}, "scan": {"value": None}}
    called = call_scan(answer(*found), {"task": "type", "classes": list(TYPES), "thresholds": thresholds})
    assert called.positive is positive and name in called.why


@pytest.mark.parametrize(
    ("positive", "always", "asked"),
    [(True, False, True), (None, False, True), (False, False, False), (False, True, True)],
)
def test_read_lesions_asks_the_segmenter_unless_the_scan_is_called_normal(scan, positive, always, asked):
    calls = []

    def images():
        calls.append(1)
        return images_of(scan)()

    mask, facts = read_lesions(scan, Call(positive, "said so"), segmenter(), images, always=always)
    assert len(calls) == asked and facts["segmented"] is asked and (mask is not None) is asked
    assert json.loads(json.dumps(facts)) == facts
    assert "said so" in facts["why"]
    assert ("not outlined" in describe(facts)) is not asked
    if asked:
        assert mask.shape == scan.hu.shape and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
        assert f"{facts['volume_ml']:.2f} ml" in describe(facts)
        assert facts["mask_values"] == {"1": "lesion"}


# ---------------------------------------------------------------- where the mask lies


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [((61, 47), (5.0, 0.9, 0.6)), ((96, 128), (5.0, 0.5, 0.5)), ((40, 41), (3.0, 1.1, 1.3))],
)
def test_outline_lesions_puts_a_one_sided_lesion_where_it_is(shape, spacing_mm):
    row, column = np.indices(shape)
    _, row_mm, column_mm = spacing_mm
    centre = (0.3 * shape[0], 0.7 * shape[1])
    radius_mm = 0.15 * min(shape[0] * row_mm, shape[1] * column_mm)
    inside = np.hypot((row - centre[0]) * row_mm, (column - centre[1]) * column_mm) < radius_mm
    hu = np.where(inside, 85, 30).astype(np.int16)[None]  # the edge of what is brighter than 57.5 is its edge
    images = fit_to_square(hu, spacing_mm, SIZE, AIR_HU)
    mask = outline_lesions(BrightSegmenter(), {"value": 0.5}, images, spacing_mm, shape)
    assert mask.shape == hu.shape
    np.testing.assert_allclose(ndimage.center_of_mass(mask[0]), ndimage.center_of_mass(inside), atol=0.5)
    assert mask.sum() == pytest.approx(inside.sum(), rel=0.15)  # its edge is within half a pixel of SIZE


def test_outline_lesions_leaves_out_what_is_smaller_than_the_checkpoint_allows():
    hu = np.full((3, SIZE, SIZE), 30, np.int16)
    hu[0, 4:8, 4:8] = hu[2, 20:22, 20:22] = 85  # 16 and 4 pixels of 0.01 ml
    rule = {"value": 0.5, "least_ml": 0.05}
    mask = outline_lesions(BrightSegmenter(), rule, hu, (10.0, 1.0, 1.0))
    np.testing.assert_array_equal(mask, (hu == 85) & (np.arange(3) == 0)[:, None, None])


# ---------------------------------------------------------------- what is measured


def test_slice_thickness_of_even_gaps_is_the_gap():
    assert slice_thickness_mm(10 + 2.5 * np.arange(5), 1.0).tolist() == [2.5] * 5
    assert slice_thickness_mm([7.0], 5.0).tolist() == [5.0]


def test_slice_thickness_of_uneven_gaps_fills_the_scan():
    positions = [0.0, 4.0, 8.0, 9.0, 16.0]
    found = slice_thickness_mm(positions, 4.0)
    assert found.tolist() == [4.0, 4.0, 2.5, 4.0, 7.0]
    assert found.sum() == 16 + 4 / 2 + 7 / 2  # from half a gap before the first to half a gap behind the last


def test_measure_lesions_agrees_with_the_volumes_of_the_study(scan):
    mask = np.zeros(scan.hu.shape, np.uint8)
    mask[1:3, 20:31, 25:33], mask[4, 40:44, 30:37] = 2, 6
    found = measure_lesions(mask, scan, LESION_CLASSES)
    assert found["volume_ml"] == pytest.approx(lesions.volume_ml(mask, scan.spacing_mm))
    by_class = found["volume_ml_by_class"]
    assert by_class["ischemia"] == pytest.approx(lesions.volume_ml(mask == 6, scan.spacing_mm))
    assert sum(by_class.values()) == pytest.approx(found["volume_ml"])
    assert list(by_class) == list(LESION_CLASSES) and found["lesions"] == 2
    _, row_mm, column_mm = scan.spacing_mm
    areas = [0, 88, 88, 0, 28, 0]
    assert [entry["area_mm2"] for entry in found["slices"]] == pytest.approx(
        [area * row_mm * column_mm for area in areas]
    )


def test_measure_lesions_gives_areas_as_shares_of_the_brain(scan):
    brain = anatomy.brain_mask(scan.hu, scan.spacing_mm)
    right = np.arange(brain.shape[2]) < 32
    found = measure_lesions((brain & right).astype(np.uint8), scan, ["lesion"])
    assert found["area_percent"] == pytest.approx(100 * (brain & right).sum() / brain.sum())
    shares = [100 * (image & right).sum() / image.sum() for image in brain if image.any()]
    assert [entry["area_percent"] for entry in found["slices"] if entry["area_percent"] is not None] == (
        pytest.approx(shares)
    )
    outside = measure_lesions(np.ones(scan.hu.shape, np.uint8), scan, ["lesion"])
    assert outside["area_percent"] == 100  # never more


def test_measure_lesions_without_brain_or_lesion_gives_no_share(scan):
    empty = replace(scan, hu=np.full_like(scan.hu, AIR_HU))
    found = measure_lesions(np.zeros(scan.hu.shape, np.uint8), empty, ["lesion"])
    assert found["area_percent"] is None and found["volume_ml"] == 0 and found["lesions"] == 0
    assert "%" not in describe({"segmented": True, "contradiction": None, **found})


def test_measure_lesions_counts_uneven_gaps_as_they_are(scan):
    positions = (0.0, 4.0, 8.0, 9.0, 16.0, 23.0)
    uneven = replace(scan, positions_mm=positions)
    mask = np.zeros(scan.hu.shape, np.uint8)
    mask[3:5, 10:20, 10:20] = 1  # slices that stand for 4 and 7 mm, where the median gap is 4
    expected = 100 * (4 + 7) * scan.spacing_mm[1] * scan.spacing_mm[2] / 1000
    assert measure_lesions(mask, uneven, ["lesion"])["volume_ml"] == pytest.approx(expected)


# ---------------------------------------------------------------- what is flagged


@pytest.mark.parametrize(
    ("diseased", "volumes_ml", "value"),
    [
        ([1, 1, 0, 0], [8.0, 3.0, 1.0, 0.0], 2.0),
        ([1, 1, 0, 0, 0], [0.0, 3.0, 0.0, 5.0, 0.0], 1.5),
        ([1, 1, 0, 0], [0.0, 3.0, 0.0, 5.0], None),
        ([1, 0, 0], [0.0, 0.0, 0.0], None),
        ([1, 1], [2.0, 3.0], None),
    ],
)
def test_volume_rule_is_chosen_between_scans_with_and_without_a_lesion(diseased, volumes_ml, value):
    rule = volume_rule(np.array(diseased, bool), np.array(volumes_ml), "clean slices")
    assert rule["value"] == value
    assert "val" in rule["origin"] and (value is None or "clean slices" in rule["origin"])


@pytest.mark.parametrize(
    ("positive", "volume_ml", "words"),
    [
        (True, 1.9, "sees a lesion, the segmenter outlines 1.90 ml, below"),
        (True, 2.0, None),
        (False, 1.9, None),
        (False, 2.0, "calls the scan normal, the segmenter outlines 2.00 ml, above"),
        (None, 50.0, None),
    ],
)
def test_contradiction_is_where_volume_and_classifier_disagree(positive, volume_ml, words):
    found = contradiction(positive, volume_ml, RULE)
    assert (found is None) == (words is None)
    assert words is None or words in found
    assert contradiction(positive, volume_ml, None) is None


@pytest.mark.parametrize("value", [None, 0.0])
def test_read_lesions_flags_by_the_rule_of_the_checkpoint(scan, value):
    rule = {"value": value, "origin": "given"}
    _, facts = read_lesions(scan, Call(False, ""), segmenter(volume_rule=rule), images_of(scan), always=True)
    assert (facts["volume_rule"] is None) == (value is None)
    assert (facts["contradiction"] is None) == (value is None)
    assert ("CONTRADICTION" in describe(facts)) == (value is not None)
