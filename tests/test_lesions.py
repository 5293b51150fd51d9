import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import ttest_1samp
from skimage.measure import label
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

import intervals
import lesions
from anatomy import LESION_CLASSES

SPACING = (5.0, 0.9, 0.7)  # slices thicker than pixels, and pixels not square


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def empty(shape=(9, 21, 19)):
    return np.zeros(shape, bool)


def box(first, size, shape=(20, 33, 31)):
    """A box of `size` voxels whose first voxel is `first`."""
    mask = empty(shape)
    mask[tuple(slice(start, start + length) for start, length in zip(first, size, strict=True))] = True
    return mask


def ball(radius_mm, spacing_mm, shape, shift_mm=0.0):
    """A ball around the middle voxel, moved along the columns."""
    axes = [(np.arange(n) - n // 2) * step for n, step in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return z**2 + y**2 + (x - shift_mm) ** 2 <= radius_mm**2


def blobs(rng, share=0.03, shape=(5, 9, 11)):
    """Voxels at random and a box: many lesions of few voxels, and one of many."""
    mask = rng.random(shape) < share
    first = rng.integers(0, 3, 3)
    mask |= box(first, rng.integers(1, 5, 3), shape)
    return mask


PAIRS = [pytest.param(seed, id=f"seed{seed}") for seed in range(8)]


def pair(seed):
    rng = np.random.default_rng(seed)
    return blobs(rng), blobs(rng)


# ---------------------------------------------------------------- overlap


@pytest.mark.parametrize("seed", PAIRS)
def test_overlap_of_random_masks_equals_scikit_learn(seed):
    truth, predicted = pair(seed)
    flat = truth.ravel(), predicted.ravel()
    assert lesions.dice(truth, predicted) == pytest.approx(f1_score(*flat))
    assert lesions.iou(truth, predicted) == pytest.approx(jaccard_score(*flat))
    assert lesions.pixel_accuracy(truth, predicted) == pytest.approx(accuracy_score(*flat))


@pytest.mark.parametrize("axis", range(3))
def test_overlap_of_a_shifted_box_is_the_share_that_stays(axis):
    size, shift = (8, 10, 12), 3
    first = [4, 5, 6]
    truth = box(first, size)
    first[axis] += shift
    predicted = box(first, size)
    stays = (size[axis] - shift) / size[axis]
    assert lesions.dice(truth, predicted) == pytest.approx(stays)
    assert lesions.iou(truth, predicted) == pytest.approx(stays / (2 - stays))


def test_overlap_of_classes_is_of_any_lesion():
    truth, predicted = np.zeros((2, 3, 5), np.uint8), np.zeros((2, 3, 5), np.uint8)
    truth[0, 0, :3], predicted[0, 0, :3] = 2, (5, 6, 255)
    assert lesions.dice(truth, predicted) == lesions.iou(truth, predicted) == 1


def test_overlap_with_empty_masks():
    lesion = box((1, 1, 1), (2, 3, 4), (5, 7, 9))
    nothing = np.zeros_like(lesion)
    for number in (lesions.dice, lesions.iou):
        assert math.isnan(number(nothing, nothing))
        assert number(lesion, nothing) == number(nothing, lesion) == 0


def test_pixel_accuracy_flatters_an_empty_prediction():
    lesion = box((0, 0, 0), (1, 2, 5), (10, 10, 10))
    assert lesions.pixel_accuracy(lesion, np.zeros_like(lesion)) == pytest.approx(0.99)
    wider = np.pad(lesion, 10)
    assert lesions.pixel_accuracy(wider, np.zeros_like(wider)) > 0.9996


# ---------------------------------------------------------------- volumes


def test_volumes_of_boxes_are_exact():
    truth, predicted = box((2, 3, 4), (3, 10, 10)), box((2, 3, 4), (2, 10, 20))
    assert lesions.volume_ml(truth, (5, 0.9, 0.9)) == pytest.approx(300 * 4.05 / 1000)
    assert lesions.volume_error_ml(truth, predicted, (5, 0.9, 0.9)) == pytest.approx(0.405)
    assert lesions.volume_error_ml(predicted, truth, (5, 0.9, 0.9)) == pytest.approx(-0.405)


def test_volume_of_a_ball_is_that_of_a_ball():
    mask = ball(20, (2.5, 0.9, 0.9), (21, 51, 53))
    # its surface of 5027 mm2 in voxels of 2 mm3 leaves about 0.1 %
    assert lesions.volume_ml(mask, (2.5, 0.9, 0.9)) == pytest.approx(4 / 3 * math.pi * 8, rel=0.01)


def test_specks_go_and_what_is_large_enough_stays_as_it_is():
    mask = box((0, 1, 1), (2, 2, 5), (4, 12, 12)).astype(np.uint8) * 3  # 20 voxels of 0.005 ml
    mask[2, 3, 6] = 1  # touches it by a corner: 21 in all
    mask[0, 9, 9] = mask[3, 9, 9] = 5  # alone
    sure = mask > 0
    kept = lesions.without_specks(mask, sure, (5, 1, 1), 0.105)
    assert kept.dtype == mask.dtype and np.array_equal(kept, np.where(mask == 5, 0, mask))
    assert not lesions.without_specks(mask, sure, (5, 1, 1), 0.11).any()
    for least in (0, 0.005):
        assert np.array_equal(lesions.without_specks(mask, sure, (5, 1, 1), least), mask)
    assert not lesions.without_specks(np.zeros_like(mask), sure, (5, 1, 1), 1).any()


def test_lesion_of_which_a_part_is_sure_stays_whole():
    mask = box((0, 1, 1), (2, 2, 5), (4, 12, 12))
    mask[3, 9:11, 9:11] = True
    sure = box((1, 1, 1), (1, 1, 3), (4, 12, 12))  # 3 voxels of 0.005 ml of the first
    whole = np.where(np.arange(4)[:, None, None] < 3, mask, False)
    for least in (0, 0.015):
        assert np.array_equal(lesions.without_specks(mask, sure, (5, 1, 1), least), whole)
    assert not lesions.without_specks(mask, sure, (5, 1, 1), 0.02).any()


def test_false_positive_volume_is_of_negatives_only():
    alarm = box((1, 1, 1), (1, 2, 5), (4, 7, 8))
    nothing = np.zeros_like(alarm)
    assert lesions.false_positive_volume_ml(nothing, alarm, (5, 1, 1)) == pytest.approx(0.05)
    assert lesions.false_positive_volume_ml(nothing, nothing, (5, 1, 1)) == 0
    assert math.isnan(lesions.false_positive_volume_ml(alarm, alarm, (5, 1, 1)))


def test_bland_altman_by_hand():
    found = lesions.bland_altman([10, 20, 30, math.nan], [11, 20, 32, 5])  # differences 1, 0, 2
    assert (found.n, found.bias, found.sd) == (3, 1, 1)
    assert (found.lower, found.upper) == pytest.approx((1 - 1.96, 1 + 1.96))
    student = ttest_1samp([1, 0, 2], 0).confidence_interval(0.95)
    assert found.bias_interval == pytest.approx((student.low, student.high))
    assert found.upper_interval.low < found.upper < found.upper_interval.high
    # the limits lie alike on both sides of the bias, their intervals too
    assert found.bias - found.lower_interval.low == pytest.approx(found.upper_interval.high - found.bias)


def test_bland_altman_of_many_scans_agrees_with_the_approximation_of_its_authors(rng):
    n = 400
    found = lesions.bland_altman(np.zeros(n), rng.normal(0.5, 3, n))
    reach = 1.96 * found.sd * math.sqrt(1 / n + 1.96**2 / (2 * (n - 1)))
    approximate = found.upper - reach, found.upper + reach
    assert found.upper_interval == pytest.approx(approximate, abs=0.1 * reach)


def test_bland_altman_intervals_cover_the_true_limits_on_few_scans(rng):
    rounds, covered = 1000, np.zeros(3)
    truths = 0.5, 0.5 - 1.96 * 3, 0.5 + 1.96 * 3
    for _ in range(rounds):
        found = lesions.bland_altman(np.zeros(6), rng.normal(0.5, 3, 6))
        ends = found.bias_interval, found.lower_interval, found.upper_interval
        covered += [low <= truth <= high for truth, (low, high) in zip(truths, ends, strict=True)]
    np.testing.assert_allclose(covered / rounds, 0.95, atol=0.021)  # 3 SE of 1000 rounds


def test_bland_altman_of_one_scan_and_of_none_is_nan():
    one, none = lesions.bland_altman([1.0], [3.0]), lesions.bland_altman([], [])
    assert (one.n, one.bias, none.n) == (1, 2, 0)
    assert all(math.isnan(number) for number in (one.sd, one.upper, *one.bias_interval, none.bias))


def test_size_names_include_the_lower_edge():
    assert lesions.size_name(0) is None
    found = [lesions.size_name(ml) for ml in (0.01, 0.999, 1, 4.99, 5, 19.9, 20, 150)]
    assert found == list(np.repeat(lesions.SIZES, 2))


# ---------------------------------------------------------------- surfaces


def surface_by_definition(mask):
    """Voxels of the mask with a face neighbour that is not lesion, in mm; (N, 3)."""
    steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if np.abs(step).sum() == 1]
    inside = {tuple(voxel) for voxel in np.argwhere(mask)}
    edge = [v for v in inside if any(tuple(np.add(v, step)) not in inside for step in steps)]
    return np.array(edge) * SPACING


@pytest.mark.parametrize("seed", PAIRS)
def test_surface_distances_equal_brute_force(seed):
    truth, predicted = pair(seed)
    apart = cdist(surface_by_definition(truth), surface_by_definition(predicted))
    oracle = apart.min(axis=1), apart.min(axis=0)
    found = lesions.surface_distances_mm(truth, predicted, SPACING)
    for ours, theirs in zip(found, oracle, strict=True):
        np.testing.assert_allclose(np.sort(ours), np.sort(theirs))
    worst = max(np.percentile(way, 95) for way in oracle)
    assert lesions.hd95_mm(truth, predicted, SPACING) == pytest.approx(worst)
    near = (np.concatenate(oracle) <= 1.1).mean()
    assert lesions.surface_dice(truth, predicted, SPACING, 1.1) == pytest.approx(near)


@pytest.mark.parametrize("axis", range(3))
def test_hd95_of_a_shifted_box_is_the_shift_in_mm(axis):
    """Nothing is farther than the face ahead, and that is a tenth of the surface or more."""
    first = [4, 5, 6]
    truth = box(first, (8, 10, 12))
    first[axis] += 3
    predicted = box(first, (8, 10, 12))
    assert lesions.hd95_mm(truth, predicted, SPACING) == pytest.approx(3 * SPACING[axis])
    assert lesions.surface_dice(truth, predicted, SPACING, 3 * SPACING[axis]) == 1


def test_surfaces_of_nested_balls_are_the_difference_of_radii_apart():
    spacing, shape = (2.0, 0.8, 0.8), (31, 75, 77)
    small, large = (ball(radius, spacing, shape) for radius in (16, 22))
    # either surface lies within a voxel of the true one: 2.3 mm is its diagonal
    assert lesions.hd95_mm(small, large, spacing) == pytest.approx(6, abs=1.2)
    assert lesions.surface_dice(small, large, spacing, 3.5) == 0
    assert lesions.surface_dice(small, large, spacing, 8.5) == 1
    assert lesions.dice(small, large) == pytest.approx(2 * 16**3 / (16**3 + 22**3), abs=0.01)


def test_dice_of_shifted_balls_is_the_volume_of_their_lens():
    radius, shift, spacing = 20.0, 9.0, (1.5, 1.0, 0.9)
    truth, predicted = (ball(radius, spacing, (41, 61, 71), move) for move in (0, shift))
    lens = 1 - 3 * shift / (4 * radius) + shift**3 / (16 * radius**3)  # share of a ball, closed form
    assert lesions.dice(truth, predicted) == pytest.approx(lens, abs=0.005)


def test_surface_distances_of_two_plates_are_their_gap_and_the_tolerance_includes_it():
    spacing = (0.1, 1, 1)
    plates = [box((place, 3, 3), (1, 7, 9)) for place in (4, 7)]
    for way in lesions.surface_distances_mm(*plates, spacing):
        np.testing.assert_allclose(way, np.full(63, 0.3))
    assert lesions.surface_dice(*plates, spacing, 0.3) == 1  # though 3 * 0.1 > 0.3 in floating point
    assert lesions.surface_dice(*plates, spacing, 0.2999) == 0


def test_hd95_looks_both_ways():
    truth = box((8, 8, 8), (3, 5, 5))
    predicted = truth | box((8, 28, 8), (2, 2, 3))
    assert lesions.surface_distances_mm(truth, predicted, SPACING).from_truth.max() == 0
    ways = [lesions.hd95_mm(*both, SPACING) for both in ((truth, predicted), (predicted, truth))]
    assert ways[0] == ways[1] > 15 * 0.9


def test_hd95_leaves_out_a_twentieth_of_the_surface():
    truth = box((8, 4, 4), (1, 20, 20))
    predicted = truth | box((8, 32, 30), (1, 1, 1))
    assert lesions.hd95_mm(truth, predicted, SPACING) == 0
    assert lesions.surface_distances_mm(truth, predicted, SPACING).from_predicted.max() > 8


def test_surfaces_with_empty_masks():
    lesion, nothing = box((2, 3, 4), (2, 4, 5)), empty((20, 33, 31))
    for both in ((lesion, nothing), (nothing, lesion), (nothing, nothing)):
        assert math.isnan(lesions.hd95_mm(*both, SPACING))
    assert (
        lesions.surface_dice(lesion, nothing, SPACING) == lesions.surface_dice(nothing, lesion, SPACING) == 0
    )
    assert math.isnan(lesions.surface_dice(nothing, nothing, SPACING))
    assert np.isinf(lesions.surface_distances_mm(lesion, nothing, SPACING).from_truth).all()


def test_surface_of_one_slice_is_its_contour_and_of_a_thin_lesion_in_a_scan_all_of_it():
    outer, inner = box((0, 2, 2), (1, 9, 9), (1, 13, 14)), box((0, 4, 4), (1, 5, 5), (1, 13, 14))
    contour = lesions.surface_distances_mm(outer, inner, (5, 0.9, 0.9))
    assert list(map(len, contour)) == [32, 16]
    np.testing.assert_allclose(contour.from_predicted, 1.8)
    thin = lesions.surface_distances_mm(
        *(np.pad(mask, ((1, 1), (0, 0), (0, 0))) for mask in (outer, inner)), SPACING
    )
    assert list(map(len, thin)) == [81, 25]
    assert not thin.from_predicted.any()


def test_surface_reaches_to_the_edge_of_the_volume():
    """A lesion cut by the end of the scan has its surface there, wherever the volume is padded."""
    truth, predicted = box((0, 0, 0), (4, 9, 8), (9, 12, 12)), box((0, 1, 0), (5, 9, 8), (9, 12, 12))
    wide = [np.pad(mask, 3) for mask in (truth, predicted)]
    assert lesions.hd95_mm(truth, predicted, SPACING) == lesions.hd95_mm(*wide, SPACING)
    assert lesions.surface_dice(truth, predicted, SPACING) == lesions.surface_dice(*wide, SPACING)


@pytest.mark.parametrize("tolerance_mm", [-1, math.nan])
def test_surface_dice_refuses_a_tolerance_that_is_none(tolerance_mm):
    lesion = box((2, 3, 4), (2, 4, 5))
    with pytest.raises(ValueError, match="must be 0 or more"):
        lesions.surface_dice(lesion, lesion, SPACING, tolerance_mm)


# ---------------------------------------------------------------- lesions


def components_by_definition(mask):
    """Sets of voxels that touch by face, edge or corner."""
    left, found = {tuple(map(int, voxel)) for voxel in np.argwhere(mask)}, []
    steps = list(itertools.product((-1, 0, 1), repeat=3))
    while left:
        grown, new = set(), {left.pop()}
        while new:
            grown |= new
            new = {(z + i, y + j, x + k) for z, y, x in new for i, j, k in steps} & left
            left -= new
        found.append(grown)
    return found


def counts_by_definition(truth, predicted, least):
    lesion_sets, component_sets = components_by_definition(truth), components_by_definition(predicted)
    found = []
    for lesion in lesion_sets:
        union = set().union(*(component for component in component_sets if component & lesion))
        overlap = len(lesion & union) / len(lesion | union)
        if overlap > 0 and overlap >= least:
            found.append(lesion)
    invented = [component for component in component_sets if not any(component & lesion for lesion in found)]
    return len(found), len(lesion_sets) - len(found), len(invented)


@pytest.mark.parametrize("criterion", lesions.DETECTION_IOU)
def test_counts_of_matched_lesions_equal_brute_force(criterion):
    total = np.zeros(3)
    for seed in range(20):
        truth, predicted = pair(seed)
        oracle = counts_by_definition(truth, predicted, lesions.DETECTION_IOU[criterion])
        assert lesions.match_lesions(truth, predicted).counts(criterion) == oracle
        total += oracle
        sizes = np.bincount(label(truth, connectivity=3).ravel())[1:]
        assert sorted(lesions.match_lesions(truth, predicted).voxels) == sorted(sizes)
    assert total.min() > 10  # the masks had something to find, to miss and to invent


def test_lesions_that_meet_at_a_corner_are_one_and_with_a_gap_two():
    mask = empty((3, 5, 5))
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert len(lesions.match_lesions(mask, mask).voxels) == 1
    mask[1, 1, 1], mask[2, 2, 2] = False, True
    assert len(lesions.match_lesions(mask, mask).voxels) == 2


def test_one_component_over_two_lesions_finds_both():
    truth = box((2, 2, 2), (2, 4, 4)) | box((2, 2, 10), (2, 4, 4))
    predicted = box((2, 2, 2), (2, 4, 12))
    assert lesions.match_lesions(truth, predicted).counts("any") == (2, 0, 0)
    found = lesions.match_lesions(truth, predicted)
    np.testing.assert_allclose(found.iou, 1 / 3)  # each against the whole component
    assert found.counts("iou") == (2, 0, 0)


def test_one_component_over_a_large_and_a_tiny_lesion_finds_the_large_by_iou():
    truth = box((2, 2, 2), (2, 4, 9)) | box((2, 2, 13), (1, 1, 1))
    predicted = box((2, 2, 2), (2, 4, 12))
    assert lesions.match_lesions(truth, predicted).counts("any") == (2, 0, 0)
    assert lesions.match_lesions(truth, predicted).counts("iou") == (1, 1, 0)


def test_one_lesion_in_two_pieces_is_found_once_without_false_positive():
    truth = box((2, 2, 2), (2, 4, 12))
    predicted = box((2, 2, 2), (2, 4, 1)) | box((2, 2, 13), (2, 4, 1))
    for criterion in lesions.DETECTION_IOU:
        assert lesions.match_lesions(truth, predicted).counts(criterion) == (1, 0, 0)
    np.testing.assert_allclose(lesions.match_lesions(truth, predicted).iou, 1 / 6)  # the pieces together


def test_lesion_grazed_is_found_by_any_and_missed_by_iou_with_a_false_positive():
    truth, predicted = box((2, 2, 2), (2, 4, 4)), box((3, 5, 5), (3, 4, 4))
    assert lesions.match_lesions(truth, predicted).counts("any") == (1, 0, 0)
    assert lesions.match_lesions(truth, predicted).counts("iou") == (0, 1, 1)


def test_lesion_at_iou_of_a_tenth_is_found():
    truth, predicted = box((0, 0, 0), (1, 1, 10)), box((0, 0, 0), (1, 1, 1))
    assert lesions.match_lesions(truth, predicted).counts("iou") == (1, 0, 0)
    assert lesions.match_lesions(box((0, 0, 0), (1, 1, 11)), predicted).counts("iou") == (0, 1, 1)


def test_counts_of_matched_lesions_with_empty_masks():
    two, nothing = box((0, 0, 0), (1, 2, 2)) | box((9, 9, 9), (1, 1, 1)), empty((20, 33, 31))
    for criterion in lesions.DETECTION_IOU:
        assert lesions.match_lesions(two, nothing).counts(criterion) == (0, 2, 0)
        assert lesions.match_lesions(nothing, two).counts(criterion) == (0, 0, 2)
        assert lesions.match_lesions(nothing, nothing).counts(criterion) == (0, 0, 0)


def test_lesion_rates_of_summed_counts():
    cases = [lesions.LesionCounts(3, 1, 0), lesions.LesionCounts(0, 0, 2)]
    found = lesions.lesion_rates(lesions.LesionCounts(*np.sum(cases, axis=0)))
    assert found == pytest.approx({"precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9})
    nothing = lesions.lesion_rates(lesions.LesionCounts(0, 0, 0))
    assert set(nothing) == set(found) and all(map(math.isnan, nothing.values()))


def test_criterion_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'most': must be one of any, iou"):
        lesions.match_lesions(empty(), empty()).counts("most")


# ---------------------------------------------------------------- one case


def test_case_report_holds_the_numbers_of_the_functions():
    truth = box((2, 2, 2), (4, 12, 12), (12, 40, 40)) | box((9, 30, 30), (1, 2, 2), (12, 40, 40))
    predicted = box((2, 2, 4), (4, 12, 12), (12, 40, 40)) | box((9, 3, 35), (2, 2, 2), (12, 40, 40))
    found = lesions.case_report(truth, predicted.astype(np.uint8) * 6, SPACING, tolerance_mm=1.0)
    both = truth, predicted
    expected = {
        "truth_ml": lesions.volume_ml(truth, SPACING),
        "predicted_ml": lesions.volume_ml(predicted, SPACING),
        "size": "1_to_5_ml",
        "dice": lesions.dice(*both),
        "iou": lesions.iou(*both),
        "pixel_accuracy": lesions.pixel_accuracy(*both),
        "hd95_mm": lesions.hd95_mm(*both, SPACING),
        "surface_dice": lesions.surface_dice(*both, SPACING, 1.0),
        "volume_error_ml": lesions.volume_error_ml(*both, SPACING),
        "volume_error_percent": 100 * 4 / 580,
        **{"any_tp": 1, "any_fn": 1, "any_fp": 1, "iou_tp": 1, "iou_fn": 1, "iou_fp": 1},
        **{"any_tp_1_to_5_ml": 1, "any_fn_under_1_ml": 1, "any_tp_under_1_ml": 0, "iou_fn_over_20_ml": 0},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(found["false_positive_ml"])
    for criterion, name in itertools.product(lesions.DETECTION_IOU, ("tp", "fn")):
        by_size = [found[f"{criterion}_{name}_{size}"] for size in lesions.SIZES]
        assert sum(by_size) == found[f"{criterion}_{name}"]


def test_case_report_has_the_same_columns_of_json_types_whatever_is_empty():
    lesion = box((2, 2, 2), (4, 12, 12))
    nothing = np.zeros_like(lesion)
    reports = [lesions.case_report(*both, SPACING) for both in itertools.product((lesion, nothing), repeat=2)]
    perfect, missed, invented, empty_both = reports
    assert all(list(found) == list(perfect) for found in reports)
    assert json.loads(json.dumps(perfect)).keys() == perfect.keys()
    assert (perfect["dice"], perfect["hd95_mm"], perfect["volume_error_percent"]) == (1, 0, 0)
    assert (missed["dice"], missed["volume_error_percent"], missed["any_fn"]) == (0, -100, 1)
    assert invented["size"] is None and invented["false_positive_ml"] == perfect["truth_ml"]
    assert math.isnan(empty_both["dice"]) and empty_both["pixel_accuracy"] == 1


def test_case_report_does_not_depend_on_where_the_lesion_lies(rng):
    """It is cut to the lesions, one voxel wider: nothing beyond may count, and nothing within be lost."""
    truth, predicted = blobs(rng), blobs(rng)
    found = lesions.case_report(truth, predicted, SPACING)
    for widths in (((3, 4), (0, 9), (8, 0)), ((0, 7), (5, 0), (0, 3))):
        wide = lesions.case_report(np.pad(truth, widths), np.pad(predicted, widths), SPACING)
        assert wide.pop("pixel_accuracy") > found["pixel_accuracy"]
        assert wide == pytest.approx({name: found[name] for name in wide}, nan_ok=True)


def test_class_report_measures_each_class_alone():
    shape = (6, 20, 20)
    truth = np.zeros(shape, np.uint8)
    truth[1:4, 2:8, 2:8], truth[1:4, 12:18, 2:8] = 2, 5
    predicted = truth.copy()
    predicted[predicted == 5] = 1  # found, but called epidural
    found = lesions.class_report(truth, predicted, SPACING)
    assert list(found) == list(LESION_CLASSES)
    assert found["intraparenchymal"]["dice"] == 1
    assert (found["subdural"]["dice"], found["subdural"]["any_fn"]) == (0, 1)
    assert found["epidural"]["false_positive_ml"] == found["subdural"]["truth_ml"] > 0
    assert math.isnan(found["ischemia"]["dice"])
    for number, name in enumerate(LESION_CLASSES, 1):
        assert found[name] == pytest.approx(
            lesions.case_report(truth == number, predicted == number, SPACING), nan_ok=True
        )
    assert lesions.case_report(truth, predicted, SPACING)["dice"] == 1


def test_class_report_counts_what_is_of_unknown_kind_for_nothing():
    truth = np.zeros((6, 20, 20), np.uint8)
    truth[1:4, 2:8, 2:8], truth[1:4, 12:18, 2:8] = 2, 255
    predicted = np.where(truth > 0, 2, 0).astype(np.uint8)
    found = lesions.class_report(truth, predicted, SPACING)
    assert list(found) == ["intraparenchymal"]  # the other lesion may be of any other class
    assert (found["intraparenchymal"]["dice"], found["intraparenchymal"]["any_fp"]) == (1, 0)


def test_class_report_refuses_masks_without_classes_and_classes_that_do_not_exist():
    classes = np.zeros((2, 4, 5), np.uint8)
    with pytest.raises(ValueError, match="predicted: is bool"):
        lesions.class_report(classes, classes > 0, SPACING)
    with pytest.raises(ValueError, match=r"truth: class 7 \(0..6 or 255 exist\)"):
        lesions.class_report(classes + 7, classes, SPACING)


@pytest.mark.parametrize(
    ("truth", "predicted", "spacing", "message"),
    [
        (empty((3, 4, 5)), empty((3, 5, 4)), SPACING, "bring them to one geometry"),
        (empty((3, 4, 5)), np.full((3, 4, 5), 0.2), SPACING, "predicted: float64 is no mask"),
        (empty((4, 5)), empty((4, 5)), SPACING, "must be slices, rows, columns"),
        (empty((3, 4, 5)), empty((3, 4, 5)), (5, 0, 1), "three lengths above 0"),
        (empty((3, 4, 5)), empty((3, 4, 5)), (0.9, 0.9), "three lengths above 0"),
        (empty((3, 4, 5)), empty((3, 4, 5)), (5, math.nan, 1), "three lengths above 0"),
    ],
)
def test_case_report_refuses_what_it_cannot_measure(truth, predicted, spacing, message):
    with pytest.raises(ValueError, match=message):
        lesions.case_report(truth, predicted, spacing)


# ---------------------------------------------------------------- many cases


@pytest.fixture(scope="module")
def study():
    """Reports of 24 scans: two thirds with a lesion of growing size, shifted, grown, missed or beset."""
    rng, reports = np.random.default_rng(3), []
    for case in range(24):
        truth, predicted = empty((8, 40, 40)), empty((8, 40, 40))
        if case % 3:
            size = 3 + case
            truth = box((1, 2, 2), (4, size, size), truth.shape)
            if case != 7:
                predicted = box((1, 3, 2), (4, size, size + rng.integers(0, 4)), truth.shape)
        if case % 4 == 1:
            predicted = predicted | box((6, 35, 35), (2, 3, 3), truth.shape)
        reports.append(lesions.case_report(truth, predicted, (5, 2, 2)))
    return reports


def test_summary_by_hand(study):
    found = lesions.summarise(study, range(24), seed=0, replicates=50)
    positive = [report for report in study if report["truth_ml"]]
    negative = [report for report in study if not report["truth_ml"]]
    dices = [report["dice"] for report in positive]
    assert (found["n_cases"], found["n_patients"]) == (24, 24)
    assert (found["n_positive"], found["n_negative"], found["n_lesions"]) == (16, 8, 16)
    assert found["dice"] == pytest.approx(np.mean(dices))
    assert found["dice_median"] == pytest.approx(np.median(dices))
    alarms = [report for report in negative if report["predicted_ml"]]
    assert found["dice_all"] == pytest.approx((sum(dices) + len(negative) - len(alarms)) / 24)
    assert found["iou_all"] < found["dice_all"]
    assert found["clean"] == 1 - len(alarms) / 8
    exact = intervals.clopper_pearson(8 - len(alarms), 8)
    assert (found["clean_low"], found["clean_high"]) == exact
    assert found["false_positive_ml"] == pytest.approx(len(alarms) * 18 * 0.02 / 8)
    assert found["n_hd95_mm"] == 15  # one was missed
    assert found["any_recall"] == 15 / 16
    alarms = sum(report["any_fp"] for report in study)
    assert found["any_precision"] == 15 / (15 + alarms)
    assert found["any_f1"] == 30 / (30 + 1 + alarms)
    errors = [report["volume_error_percent"] for report in positive if report["truth_ml"] >= 5]
    assert found["volume_error_percent_large"] == pytest.approx(np.mean(errors))
    assert found["n_large"] == len(errors) > 0
    large = [report["dice"] for report in positive if report["truth_ml"] >= 20]
    assert found["dice_over_20_ml"] == pytest.approx(np.mean(large))
    assert found["n_over_20_ml"] == found["n_lesions_over_20_ml"] == len(large) > 0


def test_summary_takes_its_intervals_from_drawing_patients(study):
    patients = np.arange(24) // 2
    found = lesions.summarise(study, patients, seed=5)
    positive = np.array([report["truth_ml"] > 0 for report in study])
    dices = np.array([report["dice"] for report in study])
    terms = np.column_stack([np.where(positive, dices, 0), positive])
    expected = intervals.bootstrap_sums(terms, patients, lambda sums: sums[0] / sums[1], seed=5)
    assert (found["dice_low"], found["dice_high"]) == expected
    for name in ("dice", "dice_median", "hd95_mm", "any_f1", "iou_recall", "clean", "volume_error_ml"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    # Bland and Altman's rows are independent; here two scans share a patient
    assert math.isnan(found["limit_upper_ml_low"]) and not math.isnan(found["limit_upper_ml"])


def test_summary_of_scans_taken_four_times_is_no_surer(study):
    once = lesions.summarise(study, np.arange(24), seed=1, replicates=200)
    often = lesions.summarise(study * 4, np.tile(np.arange(24), 4), seed=1, replicates=200)
    for name in ("dice", "dice_median", "any_f1", "pixel_accuracy"):
        assert often[name] == pytest.approx(once[name])
        assert often[f"{name}_low"] == pytest.approx(once[f"{name}_low"])
        assert often[f"{name}_high"] == pytest.approx(once[f"{name}_high"])


def test_summary_states_the_agreement_of_volumes_of_positives(study):
    found = lesions.summarise(study, np.arange(24), seed=0, replicates=50)
    volumes = np.array([(r["truth_ml"], r["predicted_ml"]) for r in study if r["truth_ml"]]).T
    agreement = lesions.bland_altman(*volumes)
    assert found["volume_error_ml"] == pytest.approx(agreement.bias)
    assert (found["limit_lower_ml"], found["limit_upper_ml"]) == (agreement.lower, agreement.upper)
    assert (found["limit_upper_ml_low"], found["limit_upper_ml_high"]) == agreement.upper_interval
    assert found["volume_abs_error_ml"] >= abs(found["volume_error_ml"])


def test_summary_has_the_same_columns_whatever_is_there(study):
    full = lesions.summarise(study, range(24), seed=0, replicates=20)
    for some in ([], study[:1], study[1:2]):
        found = lesions.summarise(some, range(len(some)), seed=0, replicates=20)
        assert list(found) == list(full)
        assert found["n_cases"] == len(some)
    assert math.isnan(lesions.summarise([], [], seed=0)["dice"])


def test_summary_without_a_patient_for_each_report_is_refused(study):
    with pytest.raises(ValueError, match="patients: 3 of 24 reports"):
        lesions.summarise(study, [1, 2, 3], seed=0)


# ---------------------------------------------------------------- MONAI, where it is installed


@pytest.fixture
def monai():
    return pytest.importorskip("monai.metrics")


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
@pytest.mark.parametrize("seed", PAIRS)
def test_numbers_equal_those_of_monai(monai, seed):
    truth, predicted = pair(seed)
    both = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (predicted, truth)]
    ours = lesions.case_report(truth, predicted, SPACING, tolerance_mm=1.3)
    given = {"include_background": True, "spacing": SPACING}
    assert ours["dice"] == pytest.approx(monai.compute_dice(*both).item())
    theirs = monai.compute_hausdorff_distance(*both, percentile=95, **given).item()
    assert ours["hd95_mm"] == pytest.approx(theirs, rel=1e-5)  # float32
    theirs = monai.compute_surface_dice(*both, class_thresholds=[1.3], **given).item()
    assert ours["surface_dice"] == pytest.approx(theirs, rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning:monai", "ignore:the prediction of class 0")
def test_surface_dice_of_a_missed_lesion_is_0_as_monai_has_it(monai):
    lesion = box((2, 3, 4), (2, 4, 5))
    both = [torch.from_numpy(mask[None, None]) for mask in (np.zeros_like(lesion), lesion)]
    theirs = monai.compute_surface_dice(
        *both, class_thresholds=[2.0], include_background=True, spacing=SPACING
    )
    assert theirs.item() == lesions.surface_dice(lesion, np.zeros_like(lesion), SPACING, 2.0) == 0
