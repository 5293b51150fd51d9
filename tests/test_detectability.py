"""What an image keeps of lesions, tissues, texture and edges, and what a model observer finds in it."""

import math

import numpy as np
import pytest
from scipy import ndimage

import anatomy
import detectability as d
from dose import reconstruction_noise
from low_dose import simulate_scan
from phantom import generate_phantom

PIXEL_MM = 1.5
BRAIN, CSF, BONE = (anatomy.TISSUES[name] for name in ("brain", "csf", "bone"))
INTRAPARENCHYMAL = 2


def white(shape, sd=1.0, seed=0):
    return np.random.default_rng(seed).normal(0, sd, shape).astype(np.float32)


def head(slices=3, shape=(81, 67), lesion_hu=None, kind=INTRAPARENCHYMAL):
    """(truth, lesions, inside, classes): brain of 30 HU in bone, with a square lesion if it has HU."""
    truth = np.full((slices, *shape), 1000, np.float32)
    truth[:, 4:-4, 4:-4] = 30
    lesions = np.zeros(truth.shape, np.uint8)
    if lesion_hu is not None:
        lesions[:, 30:40, 25:33] = kind
        truth[lesions > 0] += lesion_hu
    inside = truth < 500
    return truth, lesions, inside, np.where(inside, BRAIN, BONE).astype(np.uint8)


# ---------------------------------------------------------------- lesions


@pytest.mark.parametrize(("kind", "lesion_hu"), [(INTRAPARENCHYMAL, 28.0), (d.INFARCT, -6.0)])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0, -0.5])
def test_contrast_kept_is_the_share_of_contrast_that_was_left_for_blood_and_infarct(kind, lesion_hu, share):
    truth, lesions, _, classes = head(lesion_hu=lesion_hu, kind=kind)
    image = truth + 5 - (1 - share) * lesion_hu * (lesions > 0)  # a shift of all HU is no loss of contrast
    found = d.lesion_contrasts(image, truth, lesions, classes, PIXEL_MM)
    np.testing.assert_allclose(found.reference_hu, lesion_hu, rtol=1e-6)
    np.testing.assert_allclose(found.contrast_hu, share * lesion_hu, atol=1e-4)
    assert (found.lesion == kind).all()
    assert found.slice_of.tolist() == [0, 1, 2]
    assert d.contrast_kept(found, [kind]) == pytest.approx(share, abs=1e-5)
    assert math.isnan(d.contrast_kept(found, [kind - 1]))


@pytest.mark.parametrize(("kind", "lesion_hu"), [(INTRAPARENCHYMAL, 20.0), (d.INFARCT, -6.0)])
def test_contrast_to_noise_of_white_noise_is_contrast_over_its_sd_and_above_zero(kind, lesion_hu):
    truth, lesions, _, classes = head(slices=60, lesion_hu=lesion_hu, kind=kind)
    found = d.lesion_contrasts(truth + white(truth.shape, 4), truth, lesions, classes, PIXEL_MM)
    assert d.contrast_kept(found, [kind]) == pytest.approx(1, abs=0.05)
    assert d.contrast_to_noise(found, [kind]) == pytest.approx(abs(lesion_hu) / 4, rel=0.05)


def test_contrast_without_noise_has_no_ratio_to_noise():
    truth, lesions, _, classes = head(lesion_hu=20)
    found = d.lesion_contrasts(truth, truth, lesions, classes, PIXEL_MM)
    assert math.isnan(d.contrast_to_noise(found, d.BLOOD))


def test_ring_leaves_out_other_lesions_csf_and_what_is_next_to_the_lesion():
    truth, lesions, _, classes = head(slices=1, lesion_hu=20)
    truth[0, 29, 25:33] = 45  # the blurred edge
    lesions[0, 42:45, 25:33] = d.INFARCT
    truth[0, 42:45, 25:33] = -900
    classes[0, 30:40, 34:37] = CSF
    truth[0, 30:40, 34:37] = -500
    found = d.lesion_contrasts(truth, truth, lesions, classes, pixel_mm=1.0)
    assert found.reference_hu[found.lesion == INTRAPARENCHYMAL] == pytest.approx(20)


def test_blurred_bone_does_not_pass_for_blood_at_the_skull():
    truth, lesions, _, classes = head(slices=1)
    lesions[0, 4:10, 20:50] = 5  # subdural: two of its six rows are at the bone
    truth[lesions > 0] = 60
    image = truth.copy()
    image[0, 4:6] += 200
    found = d.lesion_contrasts(image, truth, lesions, classes, pixel_mm=1.0)
    assert d.contrast_kept(found, d.BLOOD) == pytest.approx(1)


def test_contrast_kept_is_the_slope_and_a_lesion_of_no_contrast_does_not_disturb_it():
    reference = np.array([20.0, 10.0, -0.1])  # blood as bright as its ring now and then
    rows = np.arange(3)
    found = d.LesionContrasts(
        rows, np.ones(3, int), np.array([5, 5, 10]), 0.5 * reference + 0.1, reference, rows
    )
    expected = 0.5 + 0.1 * (5 * 30 - 10 * 0.1) / (5 * 500 + 10 * 0.01)
    assert d.contrast_kept(found, [1]) == pytest.approx(expected)


def test_lesion_without_a_ring_of_brain_is_left_out():
    truth, lesions, _, classes = head(slices=1, lesion_hu=20)
    lesions[classes == BRAIN] = 1
    assert not len(d.lesion_contrasts(truth, truth, lesions, classes, PIXEL_MM).lesion)
    lesions[:] = 0
    assert math.isnan(d.contrast_kept(d.lesion_contrasts(truth, truth, lesions, classes, 1.0), d.BLOOD))


# ---------------------------------------------------------------- tissues and noise


def test_tissue_errors_are_mean_and_root_mean_square_of_each_tissue():
    classes = np.array([[[BRAIN, BRAIN, CSF]]], np.uint8)
    reference = np.array([[[30, 40, 8]]], np.int16)
    found = d.tissue_errors(np.array([[[31.0, 43.0, 7.5]]], np.float32), reference, classes)
    assert found["bias_brain_hu"] == 2
    assert found["rmse_brain_hu"] == pytest.approx(math.sqrt(5))
    assert (found["bias_csf_hu"], found["rmse_csf_hu"]) == (-0.5, 0.5)
    assert math.isnan(found["bias_bone_hu"])
    assert math.isnan(found["rmse_bone_hu"])
    assert len(found) == 2 * len(anatomy.TISSUES)


def test_noise_sd_of_white_noise_is_its_sd_whatever_the_bias():
    truth, _, inside, _ = head(slices=20)
    inside[:, ::3] = False  # few neighbours: the correction for the local mean counts
    noisy = truth + white(truth.shape, 6) + np.linspace(-40, 40, truth.shape[2], dtype=np.float32)
    assert d.noise_sd(noisy, truth, inside, PIXEL_MM) == pytest.approx(6, rel=0.02)
    assert d.noise_sd(truth + 30, truth, inside, PIXEL_MM) == pytest.approx(0, abs=1e-3)


def test_noise_sd_of_scattered_pixels_is_unknown():
    truth, _, inside, _ = head(slices=1)
    inside[:] = False
    assert math.isnan(d.noise_sd(truth, truth, inside, PIXEL_MM))
    inside[0, 20, 20] = True  # equal to its own mean
    assert math.isnan(d.noise_sd(truth + 5, truth, inside, PIXEL_MM))


def test_flat_tissue_leaves_out_edges_and_the_skull():
    truth, lesions, inside, _ = head(slices=1, lesion_hu=30)
    flat = d.flat_tissue(truth, inside, PIXEL_MM)[0]
    assert flat[60, 30]
    assert flat[35, 29]
    assert not flat[30, 29]
    assert not flat[29, 29]
    assert not flat[5, 30]


# ---------------------------------------------------------------- noise power spectrum


@pytest.mark.parametrize(("size", "block_px"), [((64, 96), 16), ((75, 50), 25)])
def test_spectrum_of_white_noise_is_flat_at_variance_times_pixel_area(size, block_px):
    noise = white((60, *size), 3)
    found = d.noise_power_spectrum(noise, np.ones(noise.shape, bool), PIXEL_MM, block_px)
    # the rarest ring is a corner of one cell in a few hundred blocks: SD 6 %
    np.testing.assert_allclose(found.power[1:], 9 * PIXEL_MM**2, rtol=0.25)
    assert found.power[1 : block_px // 2].mean() == pytest.approx(9 * PIXEL_MM**2, rel=0.02)
    assert found.frequencies[block_px // 2] == pytest.approx(block_px // 2 / (block_px * PIXEL_MM))
    assert found.cells.sum() == block_px**2
    assert found.blocks == 60 * (size[0] // block_px) * (size[1] // block_px)


def test_spectrum_integrates_to_the_variance_within_blocks():
    noise = ndimage.gaussian_filter(white((4, 32, 48), 30), (0, 1, 1))
    found = d.noise_power_spectrum(noise, np.ones(noise.shape, bool), PIXEL_MM, 16)
    blocks = noise.reshape(4, 2, 16, 3, 16)
    assert found.variance_hu2() == pytest.approx(blocks.var(axis=(2, 4)).mean(), rel=1e-5)


def test_spectrum_of_filtered_noise_has_the_squared_modulus_of_the_filter():
    sigma = 0.8
    noise = ndimage.gaussian_filter(white((200, 64, 64), 5), (0, sigma, sigma), mode="wrap")
    found = d.noise_power_spectrum(noise, np.ones(noise.shape, bool), PIXEL_MM, 32)
    modulus = np.exp(-2 * (math.pi * sigma * PIXEL_MM * found.frequencies) ** 2)
    low = slice(1, 11)  # above, the blocks' edges leak more than there is
    np.testing.assert_allclose(found.power[low], 25 * PIXEL_MM**2 * modulus[low] ** 2, rtol=0.1)


def test_spectrum_of_reconstruction_noise_rises_and_falls():
    rng = np.random.default_rng(1)
    noise = np.stack([reconstruction_noise((128, 128), 4.0, 1.0, rng) for _ in range(10)])
    power = d.noise_power_spectrum(noise, np.ones(noise.shape, bool), 1.0).power
    peak = power.argmax()
    assert 3 < peak < 12
    assert power[1] < 0.4 * power[peak]
    assert power[14] < 0.4 * power[peak]


def test_spectrum_takes_only_blocks_wholly_inside():
    noise = white((1, 32, 32))
    noise[0, :, 16:] = 1e6
    inside = np.ones(noise.shape, bool)
    inside[0, 31, 16:] = inside[0, 0, 31] = False
    found = d.noise_power_spectrum(noise, inside, 1.0, 16)
    assert found.blocks == 2
    assert found.variance_hu2() < 2
    empty = d.noise_power_spectrum(noise, np.zeros(noise.shape, bool), 1.0, 16)
    assert empty.blocks == 0
    assert np.isnan(empty.power).all()


def test_spectrum_distance_tells_texture_and_not_strength():
    fine, inside = white((40, 64, 64)), np.ones((40, 64, 64), bool)
    coarse = ndimage.gaussian_filter(fine, (0, 3, 3))
    spectra = [d.noise_power_spectrum(noise, inside, 1.0, 32) for noise in (fine, 7 * fine, coarse)]
    assert d.spectrum_distance(spectra[0], spectra[1]) == pytest.approx(0, abs=1e-5)
    assert 0.7 < d.spectrum_distance(spectra[0], spectra[2]) <= 1


# ---------------------------------------------------------------- edges


def ventricle(sd_px, slices=1):
    """A straight edge of 60 HU between rows, blurred: (image, inside)."""
    truth = np.full((slices, 61, 40), 8, np.float32)
    truth[:, 30:] = 68
    return ndimage.gaussian_filter1d(truth, sd_px, axis=1), np.ones(truth.shape, bool)


@pytest.mark.parametrize("blur_px", [1.0, 2.0, 4.0])
def test_gaussian_blur_of_a_gaussian_edge_leaves_the_sharpness_of_its_closed_form(blur_px):
    own_px = 3.0  # wide enough for central differences to be derivatives
    truth, inside = ventricle(own_px)
    image, _ = ventricle(math.hypot(own_px, blur_px))
    found = d.edge_sharpness(image, truth, inside, pixel_mm=0.5)["edge_sharpness_brain"]
    # normal densities: sum N(a) N(b) = 1 / sqrt(2 pi (a^2 + b^2)); 1 % is lost below the threshold
    assert found == pytest.approx(math.sqrt(2 * own_px**2 / (2 * own_px**2 + blur_px**2)), rel=0.02)


def test_noise_and_a_shift_of_hu_leave_sharpness_at_one():
    truth, inside = ventricle(2.0, slices=40)
    found = d.edge_sharpness(truth + white(truth.shape, 10) + 20, truth, inside, pixel_mm=1.0)
    assert found["edge_sharpness_brain"] == pytest.approx(1, abs=0.02)
    assert math.isnan(found["edge_sharpness_skull"])


def test_sharpness_of_the_skull_is_apart_from_that_of_the_brain():
    truth, _, inside, _ = head(slices=2, lesion_hu=30)
    image = truth.copy()
    image[~inside] = 515  # half the step of the bone
    found = d.edge_sharpness(image, truth, inside, PIXEL_MM)
    assert found["edge_sharpness_brain"] == pytest.approx(1)
    assert found["edge_sharpness_skull"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 1, 9), (2, 20, 21)])
def test_sharpness_without_edges_is_unknown(shape):
    flat = np.zeros(shape, np.float32)
    found = d.edge_sharpness(flat, flat, np.ones(shape, bool), 1.0)
    assert all(math.isnan(value) for value in found.values())


# ---------------------------------------------------------------- a row


def test_quality_of_patients_in_parts_is_that_of_all_together():
    truth, lesions, inside, classes = head(slices=6, lesion_hu=20)
    lesions[4:] = 0
    patients = np.array(["b", "b", "a", "a", "c", "c"])
    noisy = truth + white(truth.shape, 5)
    data = (noisy, truth, lesions, inside, classes, patients)
    whole = d.quality_of_patients(*data, np.full(6, PIXEL_MM))
    for place, rows in enumerate((slice(2, 4), slice(0, 2), slice(4, 6))):
        part = d.quality_of_patients(*(values[rows] for values in data), PIXEL_MM)
        assert part.keys() == whole.keys()
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][place : place + 1])
    assert np.isnan(whole["contrast_kept_blood"]).tolist() == [False, False, True]
    assert whole["noise_sd_hu"] == pytest.approx(5, rel=0.1)
    assert np.isnan(whole["contrast_kept_infarct"]).all()


def test_slices_of_a_patient_need_not_be_neighbours():
    truth, lesions, inside, classes = head(slices=4, lesion_hu=20)
    data = (truth + white(truth.shape, 5), truth, lesions, inside, classes)
    apart = d.quality_of_patients(*data, np.array([0, 1, 0, 1]), 1.0)
    order = [0, 2, 1, 3]
    joined = d.quality_of_patients(*(values[order] for values in data), np.array([0, 0, 1, 1]), 1.0)
    for name, values in apart.items():
        np.testing.assert_array_equal(values, joined[name])


def test_one_slice_without_brain_and_without_masks_has_no_figures_but_those_of_its_tissues():
    truth = np.full((1, 33, 31), -1000, np.int16)
    found = d.quality_of_patients(
        *(truth + np.float32(2), truth, None, np.zeros(truth.shape, bool)),
        *(np.zeros(truth.shape, np.uint8), np.zeros(1), 1.0),
    )
    assert found.pop("bias_air_hu") == found.pop("rmse_air_hu") == [2]
    assert all(np.isnan(values).all() for values in found.values())


@pytest.fixture(scope="module")
def scan():
    """A phantom with blood, an infarct: (phantom, inside, classes)."""
    p = generate_phantom(3, size=128, slices=12, lesions=("intraparenchymal", "ischemia"))
    return p, *(make(p.truth, p.spacing_mm) for make in (anatomy.brain_mask, anatomy.tissue_classes))


def test_low_dose_of_a_phantom_has_noise_by_dose_and_keeps_contrast_and_edges(scan):
    p, inside, classes = scan
    found = {}
    for dose in (0.5, 0.1):
        given = {"spacing_mm": p.spacing_mm, "noise_hu": 4.0}
        low = simulate_scan(p.hu, "projection", [dose] * 12, range(12), **given)
        parts = (p.truth, p.mask, inside, classes, np.zeros(12), p.spacing_mm[1])
        found[dose] = {name: values[0] for name, values in d.quality_of_patients(low, *parts).items()}
        assert found[dose]["edge_sharpness_brain"] == pytest.approx(1, abs=0.05)
        assert found[dose]["edge_sharpness_skull"] == pytest.approx(1, abs=0.01)
        assert found[dose]["contrast_kept_blood"] == pytest.approx(1, abs=0.05)
    # sqrt(5), and a little electronic noise
    assert found[0.1]["noise_sd_hu"] / found[0.5]["noise_sd_hu"] == pytest.approx(math.sqrt(5), rel=0.08)
    blurred = ndimage.gaussian_filter(p.truth.astype(np.float32), (0, 1, 1))
    sharpness = d.edge_sharpness(blurred, p.truth, inside, p.spacing_mm[1])
    assert all(0.3 < value < 0.8 for value in sharpness.values())


# ---------------------------------------------------------------- a model observer


@pytest.mark.parametrize("pixel_mm", [0.49, 1.0, 1.84, 3.7])
def test_channels_are_band_passes_of_rising_frequency_that_see_no_level(pixel_mm):
    channels = d.dog_channels(pixel_mm)
    side = channels.shape[-1]
    assert channels.shape == (d.CHANNELS, side, side)
    assert side % 2
    assert side * pixel_mm == pytest.approx(d.PATCH_MM, abs=2 * pixel_mm)
    np.testing.assert_allclose(channels.sum((1, 2)), 0, atol=1e-9)
    np.testing.assert_allclose(np.square(channels).sum((1, 2)) * pixel_mm**2, 1)
    np.testing.assert_allclose(channels, channels[:, ::-1, ::-1], atol=1e-12)
    np.testing.assert_allclose(channels, channels.transpose(0, 2, 1), atol=1e-12)
    widths = [(channel[side // 2] > 0).sum() for channel in channels]
    assert widths == sorted(widths, reverse=True)


def test_places_are_in_brain_away_from_lesion_csf_skull_and_each_other(scan):
    p, inside, classes = scan
    pixel_mm = p.spacing_mm[1]
    places = d.signal_places(inside, classes, p.mask, pixel_mm)
    np.testing.assert_array_equal(places, d.signal_places(inside, classes, p.mask, pixel_mm))
    assert len(places) >= 12
    assert np.bincount(places[:, 0]).max() <= d.PLACES_PER_SLICE
    clear = max(signal.diameter_mm for signal in d.SIGNALS.values()) / 2 + d.CLEAR_MM
    for number, row, column in places:
        away = np.hypot(*(np.indices(classes.shape[1:]) - np.array([row, column])[:, None, None])) * pixel_mm
        assert (classes[number][away < clear] == BRAIN).all()
        assert (p.mask[number][away < clear] == 0).all()
        assert np.isin(classes[number][away < d.PATCH_MM / 2], (BRAIN, CSF)).all()
    seen = np.zeros((len(places), *classes.shape), np.float32)
    for one, place in zip(seen, places, strict=True):
        half = d.dog_channels(pixel_mm).shape[-1] // 2
        one[place[0], place[1] - half : place[1] + half + 1, place[2] - half : place[2] + half + 1] = 1
    assert seen.sum(axis=0).max() == 1


def test_places_in_a_picture_of_brain_alone_leave_room_for_the_patch():
    inside = np.ones((1, 41, 43), bool)
    classes = np.full(inside.shape, BRAIN, np.uint8)
    places = d.signal_places(inside, classes, None, 1.0)
    assert len(places)
    assert d.channel_outputs(classes, places, d.dog_channels(1.0), 1.0).shape == (len(places), d.CHANNELS)
    for small in (inside[:, :9, :9], ~inside):
        assert d.signal_places(small, classes[:, : small.shape[1], : small.shape[2]], None, 1.0).shape == (
            0,
            3,
        )


def test_signal_has_its_contrast_in_the_middle_its_area_and_leaves_the_given_images():
    images, places = np.zeros((2, 81, 81), np.float32), np.array([[1, 40, 41]])
    signal = d.Signal(8.0, 10.0)
    present = d.insert_signals(images, places, signal, 0.5)
    assert not images.any()
    assert not present[0].any()
    assert present[1, 40, 41] == pytest.approx(10, rel=1e-3)
    assert present[1, 40, 41 + 8] == pytest.approx(5, rel=0.01)  # 4 mm from the middle
    # a disk with a normal edge of SD s has the area pi (R^2 + s^2)
    assert present.sum() * 0.25 == pytest.approx(10 * math.pi * (16 + d.EDGE_MM**2), rel=0.01)


def test_channel_outputs_of_a_signal_do_not_depend_on_the_size_of_pixels():
    seen = []
    for pixel_mm in (0.25, 0.5, 1.0):
        side = 2 * round(20 / pixel_mm) + 1
        place = np.array([[0, side // 2, side // 2]])
        present = d.insert_signals(np.zeros((1, side, side)), place, d.SIGNALS["bleed"], pixel_mm)
        seen.append(d.channel_outputs(present, place, d.dog_channels(pixel_mm), pixel_mm)[0])
    np.testing.assert_allclose(seen[1:], [seen[0]] * 2, atol=0.05 * np.abs(seen[0]).max())


def test_place_at_the_border_is_refused():
    images, places = np.zeros((1, 40, 40), np.float32), np.array([[0, 1, 20]])
    with pytest.raises(ValueError, match="leaves the picture"):
        d.insert_signals(images, places, d.SIGNALS["bleed"], 1.0)
    with pytest.raises(ValueError, match="leaves the picture"):
        d.channel_outputs(images, places, d.dog_channels(1.0), 1.0)


def observed(noise_of, contrast_hu, images=1500):
    """hotelling of a disk in noise, 25 patients."""
    side = d.dog_channels(PIXEL_MM).shape[-1]
    places = np.array([[number, side // 2, side // 2] for number in range(images)])
    noise = noise_of((images, side, side))
    present = d.insert_signals(noise, places, d.Signal(8.0, contrast_hu), PIXEL_MM)
    seen = (d.channel_outputs(one, places, d.dog_channels(PIXEL_MM), PIXEL_MM) for one in (present, noise))
    return d.hotelling(*seen, np.arange(images) % 25, seed=1)


def analytic_d_prime(contrast_hu, sd_hu):
    """sqrt(ds^T K^-1 ds) in white noise."""
    channels = d.dog_channels(PIXEL_MM)
    side = channels.shape[-1]
    middle = np.array([[0, side // 2, side // 2]])
    disk = d.insert_signals(np.zeros((1, side, side)), middle, d.Signal(8.0, contrast_hu), PIXEL_MM)
    flat = channels.reshape(len(channels), -1)
    change = flat @ disk.ravel()
    return math.sqrt(change @ np.linalg.pinv(flat @ flat.T * sd_hu**2, rcond=1e-12) @ change)


@pytest.mark.parametrize("contrast_hu", [10.0, -5.0])
def test_observer_in_white_noise_has_the_d_prime_and_auc_of_the_closed_form(contrast_hu):
    expected = analytic_d_prime(contrast_hu, 12)
    found = observed(lambda shape: white(shape, 12, seed=3), contrast_hu)
    assert found.places == 1500
    assert found.d_prime == pytest.approx(expected, rel=0.06)  # of 1500 places; two SD
    assert found.d_low < found.d_prime < found.d_high
    # of a normal score: Phi(d' / sqrt 2)
    assert found.auc == pytest.approx((1 + math.erf(found.d_prime / 2)) / 2, abs=0.01)
    assert found.auc_low < found.auc < found.auc_high


def test_observer_loses_the_square_root_of_dose_in_quantum_noise():
    def quantum(dose):
        rng = np.random.default_rng(round(100 * dose))
        return lambda shape: np.stack(
            [reconstruction_noise(shape[1:], 6 / math.sqrt(dose), PIXEL_MM, rng) for _ in range(shape[0])]
        )

    full, quarter = (observed(quantum(dose), 10.0, images=600).d_prime for dose in (1.0, 0.25))
    assert full / quarter == pytest.approx(2, rel=0.08)  # each of 600 places: SD 3 %


def test_observer_finds_nothing_where_training_on_its_own_test_data_would():
    """Ten channels of noise, few places: a template sees a difference in those that it was trained on."""
    present, absent = white((120, 10), seed=1), white((120, 10), seed=2)
    found = d.hotelling(present, absent, np.arange(120) // 5, seed=0)
    assert abs(found.d_prime) < 0.4
    assert found.auc == pytest.approx(0.5, abs=0.12)


def test_observer_does_not_depend_on_the_scale_of_channels_or_on_repeated_ones():
    present, absent = white((400, 4), seed=1).astype(float) + 0.5, white((400, 4), seed=2).astype(float)
    patients = np.arange(400) % 8
    plain = d.hotelling(present, absent, patients, seed=0)
    scale = np.array([1, 30, 0.2, 5])
    np.testing.assert_allclose(
        d.hotelling(present * scale, absent * scale, patients, seed=0), plain, rtol=1e-6
    )
    twice = (np.hstack([one, one]) for one in (present, absent))
    np.testing.assert_allclose(d.hotelling(*twice, patients, seed=0), plain, rtol=1e-6)


@pytest.mark.parametrize("patients", [[], [1] * 200, [1] * 180 + [2] * 20])
def test_observer_of_too_few_places_to_train_and_test_knows_nothing(patients):
    present, absent = white((len(patients), 5), seed=1) + 3, white((len(patients), 5), seed=2)
    found = d.hotelling(present, absent, np.array(patients), seed=0)
    assert found.places == len(patients)
    assert all(math.isnan(value) for value in found[:-1])


def test_observer_of_no_signal_at_all_knows_nothing():
    outputs = white((200, 3))
    assert math.isnan(d.hotelling(outputs, outputs, np.arange(200) % 4, seed=0).d_prime)
