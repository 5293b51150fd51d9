"""The synthetic head: its anatomy in HU, its noise, its lesions and what it promises about its arrays."""

import functools
import json

import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_multiotsu
from skimage.morphology import convex_hull_image

from phantom import HEMORRHAGES, LESION_CLASSES, MIN_AREA_MM2, Phantom, generate_phantom

SEEDS = (3, 11, 42)
BONE_HU = 300


@functools.cache
def phantom(seed: int, *kinds: str, size: int | tuple[int, int] = 96, slices: int = 12) -> Phantom:
    """Shared among tests, which must not write to it. No kinds: a healthy head."""
    return generate_phantom(seed, size=size, slices=slices, lesions=kinds)


def code(kind: str) -> int:
    return 1 + LESION_CLASSES.index(kind)


def inside_skull(truth: np.ndarray) -> np.ndarray:
    """(H, W) what a ring of bone encloses, at a level above the skull base."""
    bone = truth > BONE_HU
    return ndimage.binary_fill_holes(bone) & ~bone


@pytest.mark.parametrize("seed", SEEDS)
def test_truth_of_a_healthy_head_has_the_hu_of_csf_white_grey_and_bone(seed):
    truth = phantom(seed, size=256, slices=9).truth[4]  # ventricles and basal ganglia
    inside = ndimage.binary_erosion(inside_skull(truth), iterations=3)
    brain = truth[inside & (truth > 0) & (truth < 60)]
    low, high = threshold_multiotsu(brain, 3)
    csf, white, grey = (
        np.median(brain[part]) for part in (brain < 12, (brain > low) & (brain < high), brain > high)
    )
    assert 4 <= csf <= 12
    assert 26 <= white <= 32  # Otsu's middle class holds a few mixed pixels: 1 HU more than pure white matter
    assert 36 <= grey <= 41
    bone = truth[truth > BONE_HU]
    assert 500 <= np.median(bone) <= 1500
    assert bone.max() <= 2000


@pytest.mark.parametrize("seed", SEEDS)
def test_truth_shows_sinuses_eyes_fat_and_air_at_the_skull_base(seed):
    lowest = phantom(seed, size=256, slices=9).truth[0]
    head = ndimage.binary_fill_holes(lowest > -300)
    sinuses = head & (lowest < -700)
    assert sinuses.sum() > 200  # pixels of 0.85 mm2
    assert (head & (lowest > -120) & (lowest < -60)).sum() > 1000  # fat
    assert lowest[0, 0] == -1000


def test_brain_is_nearly_symmetric_but_not_a_mirror_image():
    truth = phantom(3).truth[6].astype(float)
    near = np.abs(truth - truth[:, ::-1])
    assert np.median(near[inside_skull(truth)]) > 0.5


@pytest.mark.parametrize("noise_hu", [4.0, 12.0])
def test_noise_of_the_image_has_the_sd_asked_for(noise_hu):
    p = generate_phantom(5, size=128, slices=6, lesions=(), noise_hu=noise_hu)
    noise = (p.hu - p.truth)[p.truth > -900].astype(float)  # HU stop at -1024: air is cut off
    assert noise.std() == pytest.approx(noise_hu, rel=0.05)
    assert abs(noise.mean()) < 0.05 * noise_hu


def test_noise_at_fine_pixels_is_correlated_between_neighbours_and_not_between_slices():
    p = generate_phantom(5, size=400, slices=2, lesions=())
    noise = (p.hu - p.truth)[:, 150:250, 150:250].astype(float)
    assert np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1] > 0.3
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1


def test_noise_of_zero_leaves_the_truth():
    p = generate_phantom(5, size=32, slices=3, noise_hu=0)
    np.testing.assert_array_equal(p.hu, p.truth)


def test_same_arguments_give_the_same_scan():
    a, b = (generate_phantom(17, size=48, slices=4, lesions=("subdural", "ischemia")) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y


def test_different_seeds_give_different_heads():
    a, b = (phantom(seed).truth[6] for seed in (1, 2))
    assert np.mean((a > BONE_HU) != (b > BONE_HU)) > 0.01


def test_noise_does_not_depend_on_the_lesions_nor_the_lesions_on_the_noise():
    a = generate_phantom(9, size=48, slices=4, lesions=("epidural",), noise_hu=4)
    b = generate_phantom(9, size=48, slices=4, lesions=("epidural",), noise_hu=25)
    np.testing.assert_array_equal(a.truth, b.truth)
    np.testing.assert_array_equal(a.mask, b.mask)


@pytest.mark.parametrize(
    ("size", "slices"), [(16, 1), (33, 1), ((45, 71), 3), ((71, 45), 5), (64, 2), (50, 40)]
)
def test_any_matrix_and_slice_count_give_arrays_of_that_shape(size, slices):
    p = generate_phantom(4, size=size, slices=slices)
    height, width = (size, size) if isinstance(size, int) else size
    assert p.hu.shape == p.truth.shape == p.mask.shape == (slices, height, width)
    assert (p.hu.dtype, p.truth.dtype, p.mask.dtype) == (np.int16, np.int16, np.uint8)
    assert len(p.slice_labels) == slices
    assert p.spacing_mm[1] == p.spacing_mm[2] == pytest.approx(236 / min(height, width))
    assert (p.truth > BONE_HU).any()


def test_affine_maps_voxels_to_lps_with_the_field_of_view_centred():
    p = phantom(3, size=(96, 120))
    row_mm = p.spacing_mm[1]
    right_front_low = p.affine @ (0, 0, 0, 1)
    left_back_high = p.affine @ (119, 95, 11, 1)
    np.testing.assert_allclose((left_back_high - right_front_low)[:2], [119 * row_mm, 95 * row_mm])
    np.testing.assert_allclose((left_back_high + right_front_low)[:2], 0, atol=1e-4)
    assert (left_back_high - right_front_low)[2] == pytest.approx(11 * p.spacing_mm[0])


def test_orientation_is_face_up_and_vertex_last():
    p = phantom(3, size=128, slices=24)
    area = (p.truth > -300).sum((1, 2))
    assert area[-1] < 0.4 * area[10]
    air = ndimage.binary_fill_holes(p.truth[1] > -300) & (p.truth[1] < -700)
    rows, _ = np.nonzero(air)
    assert (rows < 64).mean() > 0.5  # the nose is in front


@pytest.mark.parametrize("seed", range(6))
def test_labels_say_what_the_masks_hold(seed):
    p = generate_phantom(seed, size=64, slices=8)
    for plane, labels in [(p.mask, p.labels), *zip(p.mask, p.slice_labels, strict=True)]:
        assert set(labels) == {*LESION_CLASSES, "any"}
        for kind in LESION_CLASSES:
            assert labels[kind] == int((plane == code(kind)).any())
        assert labels["any"] == max(labels[kind] for kind in HEMORRHAGES)
    assert {lesion["kind"] for lesion in p.lesions} == {kind for kind in LESION_CLASSES if p.labels[kind]}
    assert json.loads(json.dumps(p.lesions)) == p.lesions


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", LESION_CLASSES)
def test_lesion_on_request_is_the_only_one_and_lies_in_the_skull(kind, seed):
    p = phantom(seed, kind)
    assert [k for k in LESION_CLASSES if p.labels[k]] == [kind]
    where = p.mask > 0
    assert p.truth[where].min() >= -100 and p.truth[where].max() <= 130
    for plane, mask in zip(p.truth, where, strict=True):
        if mask.any():
            assert not (mask & ~convex_hull_image(plane > BONE_HU)).any()
    for plane, mask in zip(p.truth[5:10], where[5:10], strict=True):  # here the ring of bone is closed
        assert not (mask & ~inside_skull(plane)).any()
    volume_ml = where.sum() * np.prod(p.spacing_mm) / 1000
    assert [lesion["volume_ml"] for lesion in p.lesions] == [pytest.approx(volume_ml, abs=0.001)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", LESION_CLASSES)
def test_lesion_has_the_contrast_of_its_kind(kind, seed):
    with_lesion, healthy = phantom(seed, kind), phantom(seed)
    where = with_lesion.mask > 0
    if kind == "ischemia":  # against the same tissue: mass effect moves some pixels, the median stays
        change = np.median(with_lesion.truth[where].astype(float) - healthy.truth[where])
        assert -12 <= change <= -4
        assert -12 <= with_lesion.lesions[0]["contrast_hu"] <= -4
    else:
        core = with_lesion.truth[where]
        core = core[core >= np.median(core)]  # the other half is rim, mixed with its surroundings
        assert 45 <= np.median(core) <= 85
        assert 10 <= with_lesion.lesions[0]["contrast_hu"] <= 42
        assert np.median(core) > np.median(healthy.truth[where]) + 10


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["subdural", "epidural"])
def test_extra_axial_clot_touches_the_inner_table_along_its_length(kind, seed):
    p = phantom(seed, kind, size=160)
    touching = total = 0
    for truth, mask in zip(p.truth, p.mask == code(kind), strict=True):
        if mask.sum() * p.spacing_mm[1] ** 2 < 150:
            continue
        from_bone_mm = ndimage.distance_transform_edt(truth < BONE_HU) * p.spacing_mm[1]
        assert from_bone_mm[mask].min() < 4
        touching += (mask & (from_bone_mm < 5)).sum()
        total += mask.sum()
    assert touching > 0.2 * total > 0


def test_epidural_is_a_lens_and_subdural_a_crescent():
    def solidity(kind: str, seed: int) -> float:
        masks = phantom(seed, kind, size=160).mask == code(kind)
        largest = masks[masks.sum((1, 2)).argmax()]
        return largest.sum() / convex_hull_image(largest).sum()

    epidural, subdural = ([solidity(kind, seed) for seed in SEEDS] for kind in ("epidural", "subdural"))
    assert min(epidural) > max(subdural)


def test_intraventricular_blood_replaces_csf_and_subarachnoid_blood_lies_outside_the_ventricles():
    healthy = phantom(11, size=160).truth
    for kind in ("intraventricular", "subarachnoid"):
        mask = phantom(11, kind, size=160).mask == code(kind)
        assert np.median(healthy[mask]) < 28  # CSF, mixed with its surroundings


def test_two_lesions_come_together_and_blood_wins():
    p = phantom(5, "ischemia", "intraparenchymal")
    assert p.labels["ischemia"] == p.labels["intraparenchymal"] == p.labels["any"] == 1
    alone = phantom(5, "ischemia")
    assert alone.labels["any"] == 0


def test_class_of_a_slice_is_never_smaller_than_the_least_area():
    for seed, kind in [(seed, kind) for seed in SEEDS for kind in LESION_CLASSES]:
        p = phantom(seed, kind)
        areas_mm2 = (p.mask > 0).sum((1, 2)) * p.spacing_mm[1] * p.spacing_mm[2]
        assert areas_mm2[areas_mm2 > 0].min() >= MIN_AREA_MM2


def test_lesions_span_sizes_from_small_to_large():
    volumes = [
        phantom(seed, "intraparenchymal", size=48, slices=8).lesions[0]["volume_ml"] for seed in range(12)
    ]
    assert max(volumes) > 5 * min(volumes)


def test_about_half_of_the_seeds_are_normal():
    normal = sum(not generate_phantom(seed, size=32, slices=5).mask.any() for seed in range(60))
    assert 20 <= normal <= 40  # binomial with p = 1/2: 2.6 standard deviations


def test_large_subdural_shifts_the_brain_but_not_the_skull():
    with_lesion, healthy = (phantom(3, *kinds, size=128) for kinds in (("subdural",), ()))
    bone = healthy.truth > 1000
    change = np.abs(with_lesion.truth[bone].astype(int) - healthy.truth[bone])
    assert change.max() < 40  # blood instead of CSF in what a pixel of the inner table holds of either
    free = (with_lesion.mask == 0) & (healthy.truth > 0) & (healthy.truth < 60)
    assert (with_lesion.truth[free] != healthy.truth[free]).mean() > 0.05


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 15}, "15"),
        ({"size": (64, 8)}, "8"),
        ({"size": (64, 64, 64)}, "64, 64, 64"),
        ({"size": 32.5}, "32.5"),
        ({"slices": 0}, "0"),
        ({"slices": 2.5}, "2.5"),
        ({"noise_hu": -1.0}, "-1"),
        ({"noise_hu": float("nan")}, "nan"),
        ({"lesions": ["tumour"]}, "tumour"),
        ({"lesions": "subdural"}, "'s'"),
    ],
)
def test_bad_argument_is_refused_with_its_value(arguments, named):
    with pytest.raises(ValueError, match="must be") as error:
        generate_phantom(0, **arguments)
    assert named in str(error.value)
