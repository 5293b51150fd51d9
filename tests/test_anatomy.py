"""Masks against shapes known in closed form, noise against noise of known SD, and the real scanners' data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anatomy import (
    LESION_CLASSES,
    TISSUES,
    brain_mask,
    head_mask,
    intracranial_mask,
    measure_noise_hu,
    tissue_classes,
)
from dicom_series import discover_dicom, read_dicom
from dose import reconstruction_noise

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
AIR, SCALP, BONE, BRAIN, CSF = -1000, -60, 900, 34, 6


def radius(shape: tuple[int, int], pixel_mm: float, half_axes_mm: tuple[float, float]) -> np.ndarray:
    """Elliptic radius (H, W): 1 on an ellipse in the middle of the picture."""
    y, x = (np.arange(n) - (n - 1) / 2 for n in shape)
    return np.hypot(y[:, None] * pixel_mm / half_axes_mm[0], x[None, :] * pixel_mm / half_axes_mm[1])


def ellipse_head(shape=(128, 128), pixel_mm=1.84, slices=1) -> tuple[np.ndarray, np.ndarray]:
    """((S, H, W) HU, inside of the skull): brain in 7 mm of bone in 6 mm of scalp, edges of one pixel."""
    hu = np.full(shape, AIR, np.float64)
    for half_axes, value in (((92, 75), SCALP), ((86, 69), BONE), ((79, 62), BRAIN), ((12, 6), CSF)):
        r = radius(shape, pixel_mm, half_axes)
        hu += np.clip(0.5 + (1 - r) * np.mean(half_axes) / pixel_mm, 0, 1) * (value - hu)
    inside = radius(shape, pixel_mm, (79, 62)) < 1
    return np.repeat(hu[None], slices, axis=0), np.repeat(inside[None], slices, axis=0)


@pytest.fixture(scope="module")
def ge_head():
    folder = DATA / "head_ge_tilted"
    if not folder.is_dir():
        pytest.skip("../shared/data/head_ge_tilted is absent")
    return read_dicom(discover_dicom(folder)[0][0])


@pytest.fixture(scope="module")
def siemens_phantom():
    folder = DATA / "head_phantom_siemens"
    if not folder.is_dir():
        pytest.skip("../shared/data/head_phantom_siemens is absent")
    return read_dicom(discover_dicom(folder)[0][0])


# ---------------------------------------------------------------- closed forms

GRIDS = [((128, 128), 1.84), ((131, 117), 1.7), ((256, 256), 0.92), ((401, 419), 0.5)]


@pytest.mark.parametrize(("shape", "pixel_mm"), GRIDS)
def test_intracranial_mask_of_an_ellipse_equals_it_within_a_pixel(shape, pixel_mm):
    hu, inside = ellipse_head(shape, pixel_mm)
    found = intracranial_mask(hu, (5.0, pixel_mm, pixel_mm))
    margin = 1.0 * pixel_mm  # one pixel to either side of the true edge
    assert found[0][radius(shape, pixel_mm, (79 - margin, 62 - margin)) < 1].all()
    assert not found[0][radius(shape, pixel_mm, (79 + margin, 62 + margin)) > 1].any()
    assert found.dtype == bool and found.shape == inside.shape


@pytest.mark.parametrize(("shape", "pixel_mm"), GRIDS)
def test_head_mask_of_an_ellipse_equals_it_within_two_millimetres_and_a_pixel(shape, pixel_mm):
    hu, _ = ellipse_head(shape, pixel_mm)
    found = head_mask(hu, (5.0, pixel_mm, pixel_mm))[0]
    margin = pixel_mm + 2.0  # the working grid and its smoothing
    assert found[radius(shape, pixel_mm, (92 - margin, 75 - margin)) < 1].all()
    assert not found[radius(shape, pixel_mm, (92 + margin, 75 + margin)) > 1].any()


def test_masks_with_different_row_and_column_spacing_agree_with_the_shape():
    rows, columns = 1.2, 0.6
    y, x = (np.arange(180) - 89.5) * rows, (np.arange(300) - 149.5) * columns
    r = np.hypot(y[:, None], x[None, :])
    hu = np.select([r < 60, r < 67, r < 73], [BRAIN, BONE, SCALP], AIR)[None]
    found = intracranial_mask(hu, (5.0, rows, columns))[0]
    assert found[r < 58.5].all() and not found[r > 61.5].any()


def test_brain_and_tissue_classes_of_an_ellipse_name_every_layer():
    hu, inside = ellipse_head()
    spacing = (5.0, 1.84, 1.84)
    classes, brain = tissue_classes(hu, spacing)[0], brain_mask(hu, spacing)[0]
    for half_axes, name in (
        ((4, 2), "csf"),
        ((40, 40), "brain"),
        ((82.5, 65.5), "bone"),
        ((89, 72), "skin"),
        ((110, 100), "air"),
    ):
        ring = np.abs(radius((128, 128), 1.84, half_axes) - 1) * np.mean(half_axes) < 1
        assert (classes[ring] == TISSUES[name]).all(), name
    assert (brain & ~inside[0]).sum() <= 0.01 * inside.sum()
    assert brain.sum() > 0.95 * inside.sum()


# ---------------------------------------------------------------- noise, gaps, couch, emptiness


@pytest.mark.parametrize(("shape", "pixel_mm"), [((128, 128), 1.84), ((401, 419), 0.5)])
def test_intracranial_mask_with_25_hu_of_noise_stays_the_same(shape, pixel_mm):
    hu, inside = ellipse_head(shape, pixel_mm)
    noisy = hu + np.random.default_rng(0).normal(0, 25, hu.shape)
    found = intracranial_mask(noisy, (5.0, pixel_mm, pixel_mm))
    dice = 2 * (found & inside).sum() / (found.sum() + inside.sum())
    assert dice > 0.97  # the edge alone, a third of a pixel on 230 of 15000 mm2, costs 0.02 at 1.84 mm


@pytest.mark.parametrize("hole_mm", [5, 14])
def test_intracranial_mask_of_an_open_skull_is_closed_across_the_hole(hole_mm):
    hu, inside = ellipse_head()
    x = (np.arange(128) - 63.5) * 1.84
    hole = (np.abs(x) < hole_mm / 2)[None, :] & (radius((128, 128), 1.84, (92, 75)) < 1)
    hole[64:] = False
    hu[0][hole & (hu[0] > 100)] = 30
    found = intracranial_mask(hu, (5.0, 1.84, 1.84))
    assert (found & inside).sum() > 0.97 * inside.sum()
    beyond = radius((128, 128), 1.84, (86, 69)) > 1  # the scalp
    assert not found[0][beyond].any()


def test_intracranial_mask_keeps_calcification_and_blood_but_brain_mask_leaves_calcium_out():
    hu, _ = ellipse_head()
    calcium = np.roll(radius((128, 128), 1.84, (5, 5)) < 1, 12, axis=0)
    blood = np.roll(calcium, 15, axis=1)
    hu[0][calcium], hu[0][blood] = 400, 75
    spacing = (5.0, 1.84, 1.84)
    inside, brain = intracranial_mask(hu, spacing)[0], brain_mask(hu, spacing)[0]
    assert inside[calcium].all() and inside[blood].all()
    assert not brain[calcium].any() and brain[blood].all()


@pytest.mark.parametrize("gap_mm", [0, 12])
def test_head_mask_leaves_the_couch_out(gap_mm):
    hu, _ = ellipse_head((300, 400), 1.0, slices=3)
    top = 150 + 92 + gap_mm  # gap 0: the head lies on it
    hu[:, top : top + 15, 20:380] = 250  # a board of plastic, thicker than the smallest opening
    hu[:, 60:200, 40:43] = -100  # a thin head rest at the side
    found = head_mask(hu, (5.0, 1.0, 1.0))
    assert not found[:, top + 2 :].any()
    assert not found[:, :, 38:45].any()
    assert found[:, 150, 200].all()


def test_head_mask_fills_sinuses():
    hu, _ = ellipse_head()
    hu[0, 58:70, 60:68] = -990
    assert head_mask(hu, (5.0, 1.84, 1.84))[0, 64, 64]


@pytest.mark.parametrize("value", [-1024, 0, 40, 3071])
def test_masks_of_a_uniform_volume_are_empty_or_full_but_never_fail(value):
    hu = np.full((2, 33, 47), value, np.int16)
    spacing = (5.0, 1.8, 1.8)
    assert not intracranial_mask(hu, spacing).any() and not brain_mask(hu, spacing).any()
    assert head_mask(hu, spacing).all() == (value > 0)
    assert np.isnan(measure_noise_hu(hu, spacing))
    assert tissue_classes(hu, spacing).shape == hu.shape


def test_intracranial_mask_without_bone_is_empty():
    hu = np.where(radius((128, 128), 1.84, (80, 70)) < 1, 40, -1000)[None]
    assert not intracranial_mask(hu, (5.0, 1.84, 1.84)).any()
    assert head_mask(hu, (5.0, 1.84, 1.84))[0, 64, 64]


def test_masks_of_a_slice_do_not_depend_on_its_neighbours():
    hu, _ = ellipse_head(slices=1)
    stack = np.concatenate([np.full_like(hu, AIR), hu, np.roll(hu, 4, axis=2)])
    for mask in (intracranial_mask, brain_mask):
        np.testing.assert_array_equal(mask(stack, (5, 1.84, 1.84))[1], mask(hu, (5, 1.84, 1.84))[0])


def test_masks_leave_their_input_alone_and_refuse_a_single_picture():
    hu, _ = ellipse_head()
    hu = hu.astype(np.int16)
    before = hu.copy()
    tissue_classes(hu, (5, 1.84, 1.84))
    np.testing.assert_array_equal(hu, before)
    with pytest.raises(ValueError, match=r"\(slices, rows, columns\)"):
        head_mask(hu[0], (5, 1.84, 1.84))


def test_lesion_classes_stand_in_the_order_of_their_mask_values():
    assert LESION_CLASSES.index("epidural") == 0 and LESION_CLASSES.index("ischemia") == 5


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("sigma_hu", [1.0, 4.0, 15.0])
@pytest.mark.parametrize(("shape", "pixel_mm"), [((128, 128), 1.84), ((256, 256), 0.92), ((480, 450), 0.49)])
@pytest.mark.parametrize("texture", ["white", "reconstruction"])
def test_measure_noise_of_known_noise_gives_its_sd(texture, shape, pixel_mm, sigma_hu):
    rng = np.random.default_rng(7)
    hu, _ = ellipse_head(shape, pixel_mm, slices=3)
    if texture == "white":
        noise = rng.normal(0, sigma_hu, hu.shape)
    else:
        noise = np.stack([reconstruction_noise(shape, sigma_hu, pixel_mm, rng) for _ in hu])
    measured = measure_noise_hu(hu + noise, (5.0, pixel_mm, pixel_mm))
    assert measured == pytest.approx(sigma_hu, rel=0.1)


def test_measure_noise_ignores_gyri():
    rng = np.random.default_rng(3)
    hu, inside = ellipse_head((256, 256), 0.92, slices=4)
    y, x = np.mgrid[:256, :256] * 0.92
    gyri = np.sin(x / 4) * np.sin(y / 5) > 0.55  # grey islands of 10 HU in white matter, 10 mm apart
    hu = hu + 10 * (gyri & inside) + rng.normal(0, 4, hu.shape)
    assert measure_noise_hu(hu, (5.0, 0.92, 0.92)) == pytest.approx(4, rel=0.15)


def test_measure_noise_of_a_scan_without_noise_is_zero():
    hu, _ = ellipse_head()
    hu[hu < 20] = np.where(hu[hu < 20] > -200, BRAIN, hu[hu < 20])  # no ventricle, no scalp
    assert measure_noise_hu(hu, (5.0, 1.84, 1.84)) == pytest.approx(0, abs=0.05)


# ---------------------------------------------------------------- real scanners


def test_intracranial_mask_of_a_real_head_holds_brain_and_no_padding(ge_head):
    inside = intracranial_mask(ge_head.hu, ge_head.spacing_mm)
    values = ge_head.hu[inside]
    assert np.median(values[(values >= 10) & (values <= 60)]) == pytest.approx(31, abs=1)
    assert values.min() > -200  # neither padding nor sinus air
    area_cm2 = inside.sum(axis=(1, 2)) * np.prod(ge_head.spacing_mm[1:]) / 100
    assert area_cm2[10:26].min() > 40 and area_cm2.max() < 200
    head = head_mask(ge_head.hu, ge_head.spacing_mm)
    scalp_mm = 5  # skull and scalp together are thicker everywhere
    for index in (14, 18, 22):
        rows = np.flatnonzero(inside[index].any(axis=1)), np.flatnonzero(head[index].any(axis=1))
        assert rows[0][0] - rows[1][0] > scalp_mm / ge_head.spacing_mm[1]
        assert rows[1][-1] - rows[0][-1] > scalp_mm / ge_head.spacing_mm[1]


def test_measure_noise_of_real_scans_agrees_with_what_is_known(ge_head):
    assert measure_noise_hu(ge_head.hu, ge_head.spacing_mm) == pytest.approx(3.7, rel=0.1)
    folder = DATA / "head_picker_slice"
    if not folder.is_dir():
        pytest.skip("../shared/data/head_picker_slice is absent")
    picker = read_dicom(discover_dicom(folder)[0][0])
    assert measure_noise_hu(picker.hu, picker.spacing_mm) == pytest.approx(2.2, rel=0.1)


def test_measure_noise_of_a_real_phantom_agrees_with_the_difference_of_neighbouring_slices(siemens_phantom):
    hu, spacing = siemens_phantom.hu[8:12], siemens_phantom.spacing_mm
    brain = brain_mask(hu, spacing)
    both = brain[1:] & brain[:-1]
    difference = np.diff(hu.astype(float), axis=0)[both] / np.sqrt(2)
    by_difference = 1.4826 * np.median(np.abs(difference - np.median(difference)))
    assert measure_noise_hu(hu, spacing) == pytest.approx(by_difference, rel=0.2)


def test_head_mask_of_a_real_phantom_leaves_its_board_and_couch_out(siemens_phantom):
    head = head_mask(siemens_phantom.hu, siemens_phantom.spacing_mm)
    inside = intracranial_mask(siemens_phantom.hu, siemens_phantom.spacing_mm)
    lowest = [np.flatnonzero(mask.any(axis=1))[-1] for mask in (head[10], inside[10])]
    assert (lowest[0] - lowest[1]) * siemens_phantom.spacing_mm[1] < 25  # skull and scalp, no board
    assert head[10].any(axis=0).sum() * siemens_phantom.spacing_mm[2] < 200  # the board is 480 mm wide
    assert not (inside & ~head).any()
