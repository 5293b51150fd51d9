"""Dose models: closed forms first, then direct photon counting as the reference of noise insertion."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from anatomy import brain_mask, head_mask, measure_noise_hu
from dataset import fit_to_square
from dose import (
    BOW_TIE,
    DOSE_MODELS,
    FEWEST_COUNTS,
    LAMBDA_ROUTINE,
    LEAST_COUNT,
    NOISE_RANGE_HU,
    SCANNERS,
    SIMULATED,
    add_noise,
    fitted,
    flux,
    line_integrals,
    noise_images,
    reconstruction_noise,
    series_flux,
    sigma_calibrated_hu,
    sigma_poisson_hu,
    simulate_calibrated,
    simulate_poisson,
    simulate_projection,
    simulate_reprojection,
    standard_head,
    to_attenuation,
    to_hu,
)
from phantom import generate_phantom
from scans import READERS, read_scan
from tomography import Geometry, fbp, fbp_variance, project

SIDE = 400  # 160,000 pixels: the SD is known to 0.18 %, three sigma below the tolerances here
IMAGE_MODELS = ("calibrated", "poisson")
PROJECTING = [name for name in SIMULATED if name not in IMAGE_MODELS]


def noise_of(model, level_hu, dose):
    hu = torch.full((1, 1, SIDE, SIDE), float(level_hu))
    return (DOSE_MODELS[model].simulate(hu, [dose], [1], math.nan) - hu).double().numpy()


@pytest.mark.parametrize("dose", [1, 5, 10, 20])
@pytest.mark.parametrize("level_hu", [0, 40, 1000])
def test_calibrated_adds_exactly_the_variance_that_is_missing(dose, level_hu):
    noise = noise_of("calibrated", level_hu, dose)
    width = 1000 / 1562
    expected = width**2 * 1562 * (1 + level_hu / 1000) * (1 / dose - 1 / LAMBDA_ROUTINE)
    assert noise.var() == pytest.approx(expected, rel=0.02)
    assert abs(noise.mean()) < 4 * math.sqrt(expected) / SIDE


@pytest.mark.parametrize("dose", [1, 5, 10, 20, 40])
def test_poisson_has_the_variance_of_the_papers_formula_and_no_bias(dose):
    noise = noise_of("poisson", 40, dose)
    assert noise.var() == pytest.approx(80**2 * 0.5 / dose, rel=0.02)
    assert abs(noise.mean()) < 4 * math.sqrt(80**2 * 0.5 / dose) / SIDE


def test_poisson_clips_neither_above_nor_below_and_keeps_what_has_no_counts():
    hu = torch.tensor([-1024.0, -5.0, 79.0, 1500.0]).repeat_interleave(20000)[None]
    low = simulate_poisson(hu, 1.0, torch.Generator().manual_seed(3))
    means = low.reshape(4, -1).mean(1)
    assert torch.equal(low.reshape(4, -1)[:2], hu.reshape(4, -1)[:2])
    assert means[2].item() == pytest.approx(79, abs=2.5)  # clipping to 0..1 would cost about 18 HU here
    assert means[3].item() == pytest.approx(1500, abs=12)
    assert low.max() > 1500


def test_poisson_on_a_stated_range_scales_with_its_width():
    hu = torch.full((1, SIDE, SIDE), 0.0)
    low = simulate_poisson(hu, 10.0, torch.Generator().manual_seed(2), intensity_range_hu=(-1000.0, 1000.0))
    assert low.double().var().item() == pytest.approx(2000**2 * 0.5 / 10, rel=0.02)


def test_calibrated_at_the_routine_dose_is_the_input_bit_for_bit():
    hu = torch.randn(2, 1, 17, 31) * 300
    low = simulate_calibrated(hu, 40.0, torch.Generator().manual_seed(0))
    assert torch.equal(low, hu)
    assert low.data_ptr() != hu.data_ptr()


def test_calibrated_in_air_adds_nothing():
    hu = torch.full((1, 50, 50), -1024.0)
    assert torch.equal(simulate_calibrated(hu, 1.0, torch.Generator().manual_seed(0)), hu)


@pytest.mark.parametrize("model", SIMULATED)
@pytest.mark.parametrize("shape", [(1, 1), (33, 47), (20, 21)])
def test_every_model_keeps_shape_and_repeats_with_its_seed_alone_or_in_a_batch(model, shape):
    hu = torch.full((3, 1, *shape), 35.0)
    low = DOSE_MODELS[model].doses[1]
    simulate = DOSE_MODELS[model].simulate
    first, again = (simulate(hu, [low] * 3, [1, 2, 1], 2.0) for _ in range(2))
    assert first.shape == hu.shape
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    torch.testing.assert_close(first[0], first[2], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(first[1:2], simulate(hu[1:2], [low], [2], 2.0), rtol=1e-5, atol=1e-2)
    assert shape == (1, 1) or not torch.allclose(first[0], first[1], atol=0.5)


@pytest.mark.parametrize("model", SIMULATED)
@pytest.mark.parametrize("dose", [0.0, -1.0, math.nan, math.inf])
def test_every_model_refuses_an_impossible_dose_naming_it(model, dose):
    with pytest.raises(ValueError, match=f"dose {dose:g}"):
        DOSE_MODELS[model].simulate(torch.zeros(1, 1, 4, 4), [dose], [0], 1.0)
    with pytest.raises(ValueError, match=f"dose {dose:g}"):
        DOSE_MODELS[model].check(dose)


def test_measured_simulates_nothing_and_checks_its_fractions():
    assert DOSE_MODELS["measured"].simulate is None
    assert "measured" not in SIMULATED
    with pytest.raises(ValueError, match="dose 1.5"):
        DOSE_MODELS["measured"].check(1.5)


def test_calibrated_refuses_more_than_the_routine_dose():
    with pytest.raises(ValueError, match="40"):
        simulate_calibrated(torch.zeros(1, 4, 4), 41.0, torch.Generator())


def test_sigma_of_a_dose_is_what_is_measured():
    assert sigma_calibrated_hu(40) == pytest.approx(4.08, abs=0.01)
    assert sigma_calibrated_hu(1) == pytest.approx(25.8, abs=0.05)
    assert sigma_poisson_hu(1) == pytest.approx(56.6, abs=0.05)
    added = noise_of("calibrated", 40, 5).std()
    assert math.hypot(added, sigma_calibrated_hu(40)) == pytest.approx(sigma_calibrated_hu(5), rel=0.01)
    assert noise_of("poisson", 40, 5).std() == pytest.approx(sigma_poisson_hu(5), rel=0.01)


def test_fraction_of_lambda_is_relative_to_the_routine_dose():
    assert [DOSE_MODELS["calibrated"].fraction(dose) for dose in (1, 20, 40)] == [0.025, 0.5, 1.0]
    assert DOSE_MODELS["poisson"].fraction(5) is None


@pytest.mark.parametrize("shape", [(64, 64), (63, 80), (81, 33)])
def test_reconstruction_noise_has_its_sd_and_no_mean(shape):
    rng = np.random.default_rng(0)
    noise = np.stack([reconstruction_noise(shape, 4.0, 0.5, rng) for _ in range(60)])
    assert noise.std() == pytest.approx(4.0, rel=0.02)
    assert np.abs(noise.mean(axis=(1, 2))).max() < 1e-3  # the ramp passes no mean at all
    assert noise.dtype == np.float32


def test_reconstruction_noise_spectrum_is_ramp_times_hann_squared():
    rng = np.random.default_rng(0)
    pixel = 0.5
    power = np.mean(
        [np.abs(np.fft.fft2(reconstruction_noise((128, 128), 1.0, pixel, rng))) ** 2 for _ in range(200)],
        axis=0,
    )
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128, pixel), np.fft.fftfreq(128, pixel)))
    inside = (frequency > 0.05) & (frequency < 0.6)
    expected = frequency * (0.5 + 0.5 * np.cos(np.pi * frequency / 0.7)) ** 2
    ratio = power[inside] / expected[inside]
    bins = np.digitize(frequency[inside], np.linspace(0.05, 0.6, 12))
    means = np.array([ratio[bins == number].mean() for number in np.unique(bins)])
    assert np.abs(means / means.mean() - 1).max() < 0.05
    assert power[frequency > 0.71].max() < 1e-6 * power.max()


# ---------------------------------------------------------------- the projection domain

PIXEL_MM = 236 / 128
HEAD = standard_head(128, PIXEL_MM)[None, None]
# a quarter of the rays of head-soft, with the same cut-off frequency, and twice its noise
FEW_RAYS = SCANNERS["head-soft"]._replace(geometry=Geometry(views=492, pitch_mm=0.6), kernel="hann")
REALISATIONS = 48


def ellipse(size, pixel_mm, half_width_mm=50.0, half_length_mm=60.0):
    """(size, size) bool: by default the ellipse in which the presets are calibrated."""
    place = (torch.arange(size) - (size - 1) / 2) * pixel_mm
    return (place[None] / half_width_mm) ** 2 + (place[:, None] / half_length_mm) ** 2 <= 1


def sd(images, where):
    """Root mean variance over realisations (R, ..., H, W), inside a mask."""
    return images.double().flatten(0, -3)[:, where].square().mean().sqrt().item()


def counted(hu, dose, scanner, pixel_mm, realisations, seed=0):
    """Noise of a scan made photon by photon: (R, 1, H, W) HU, the reference of this file."""
    lines = project(to_attenuation(hu[:, 0], scanner), pixel_mm, scanner.geometry)
    open_beam = dose * flux(scanner, lines.shape[-1])
    rng = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(realisations):
        counts = torch.poisson(open_beam * torch.exp(-lines), rng)
        counts += scanner.electronic_sd * torch.randn(counts.shape, generator=rng)
        change = -torch.log(counts.clamp_min(LEAST_COUNT) / open_beam) - lines
        mu = fbp(
            change, scanner.geometry, hu.shape[-2:], pixel_mm, scanner.kernel, scanner.resampled_mm(pixel_mm)
        )
        images.append(to_hu(mu, scanner) - to_hu(torch.zeros(()), scanner))
    return torch.stack(images)


@pytest.fixture(scope="module")
def full_dose():
    return counted(HEAD, 1.0, FEW_RAYS, PIXEL_MM, REALISATIONS, seed=1)


@pytest.fixture(scope="module")
def direct():
    """The same head at lower doses, counted: dose -> (R, 1, H, W)."""
    return {dose: counted(HEAD, dose, FEW_RAYS, PIXEL_MM, REALISATIONS, seed=2) for dose in (0.25, 0.025)}


def radial_power(images, size=48, bins=8):
    """Noise power per radial frequency bin in the middle of (R, 1, H, W)."""
    start = (images.shape[-1] - size) // 2
    middle = images[:, 0, start : start + size, start : start + size].double()
    power = torch.fft.fft2(middle).abs().square().mean(0)
    frequency = torch.fft.fftfreq(size).double()
    radius = torch.hypot(frequency[:, None], frequency[None])
    place = (radius * 2 * bins).long()
    return torch.stack([power[(place == i) & (radius > 0)].mean() for i in range(bins)])


@pytest.mark.parametrize("dose", [0.25, 0.025])
def test_noise_inserted_into_a_full_dose_scan_is_that_of_counting_fewer_photons(full_dose, direct, dose):
    """SD within 2 %, spectrum within 10 % in every bin; the scan it starts from has its own noise."""
    doses, seeds = [dose] * REALISATIONS, list(range(REALISATIONS))
    low = simulate_projection(HEAD + full_dose, doses, seeds, PIXEL_MM, scanner=FEW_RAYS) - HEAD
    where = ellipse(128, PIXEL_MM)
    assert sd(low, where) == pytest.approx(sd(direct[dose], where), rel=0.02)
    assert sd(low, where) == pytest.approx(sd(full_dose, where) / math.sqrt(dose), rel=0.05)
    ratio = radial_power(low) / radial_power(direct[dose])
    assert (ratio - 1).abs().max() < 0.1


def test_noise_inserted_has_the_bias_of_the_logarithm_of_few_counts(direct):
    where = ellipse(128, PIXEL_MM)
    expected = direct[0.025].mean(0)[0, where].mean()
    assert expected > 0.3  # 0.4 HU at 2.5 %

    def mean(log_bias):
        low = simulate_projection(
            HEAD.repeat(REALISATIONS, 1, 1, 1),
            [0.025] * REALISATIONS,
            list(range(REALISATIONS)),
            PIXEL_MM,
            scanner=FEW_RAYS,
            log_bias=log_bias,
        )
        return (low - HEAD).mean(0)[0, where].mean()

    assert abs(mean(log_bias=True) - expected) < 0.1
    assert abs(mean(log_bias=False)) < 0.1
    assert abs(mean(log_bias=False) - expected) > 0.3


@pytest.mark.parametrize("dose", [0.25, 0.025])
def test_noise_images_give_the_same_low_dose_as_counting(direct, dose):
    images = noise_images(HEAD, [5], PIXEL_MM, FEW_RAYS, realisations=REALISATIONS)
    one_by_one = [
        add_noise(HEAD, images._replace(quantum=images.quantum[:, i : i + 1]), [dose], [i])
        for i in range(REALISATIONS)
    ]
    low, where = torch.cat(one_by_one) - HEAD, ellipse(128, PIXEL_MM)
    missing = math.sqrt(sd(direct[dose], where) ** 2 * (1 - dose))
    assert sd(low, where) == pytest.approx(missing, rel=0.02)
    assert abs(low.mean(0)[0, where].mean() - direct[dose].mean(0)[0, where].mean()) < 0.3
    ratio = radial_power(low) / radial_power(direct[dose]) / (1 - dose)
    assert (ratio - 1).abs().max() < 0.1


def test_realisations_mixed_by_different_seeds_keep_the_variance_and_are_hardly_correlated():
    images = noise_images(HEAD, [3], PIXEL_MM, FEW_RAYS, realisations=16)
    dose, where = 0.25, ellipse(128, PIXEL_MM)
    images = images._replace(bias=torch.zeros_like(images.bias))
    low = torch.stack([add_noise(HEAD, images, [dose], [seed]) for seed in range(40)])[:, 0] - HEAD
    electronic = sd(images.electronic, where) ** 2 * (1 / dose**2 - 1)
    expected = math.sqrt((1 / dose - 1) * sd(images.quantum, where) ** 2 + electronic)
    assert sd(low, where) == pytest.approx(expected, rel=0.02)
    correlation = torch.corrcoef(low[:, 0, where].double())
    off = correlation[~torch.eye(40, dtype=bool)]
    assert off.abs().mean() < 0.3  # of random directions in 16 dimensions: 0.2
    assert off.abs().max() < 0.95
    again = add_noise(HEAD, images, [dose], [7]) - HEAD
    assert torch.equal(again, low[7][None])


def test_noise_images_of_a_batch_are_those_of_its_slices_with_their_seeds():
    hu = torch.cat([HEAD, HEAD.flip(3) * 0.9, HEAD])
    together = noise_images(hu, [1, 2, 3], PIXEL_MM, FEW_RAYS, realisations=2)
    assert together.quantum.shape == (3, 2, 128, 128)
    assert together.electronic.shape == together.bias.shape == (3, 1, 128, 128)
    for i in range(3):
        alone = noise_images(hu[i : i + 1], [i + 1], PIXEL_MM, FEW_RAYS, realisations=2)
        for part, own in zip(together, alone, strict=True):
            torch.testing.assert_close(part[i], own[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together.quantum[0], together.quantum[2], atol=1)
    low = add_noise(hu, together, [0.1, 1.0, 0.5], [4, 5, 6])
    torch.testing.assert_close(
        low[2:], add_noise(hu[2:], type(alone)(*(p[2:] for p in together)), [0.5], [6])
    )


@pytest.mark.parametrize("dose", [0.7, 0.25, 0.1, 0.025])
def test_projection_adds_quantum_and_electronic_variance_as_it_should(dose):
    """(1/d - 1) quantum + (1/d^2 - 1) electronic, each in closed form, within 2 %.

    A detector of ten times the electronic noise, so that both parts count: 28 % of the variance at 2.5 %."""
    scanner = SCANNERS["head-soft"]._replace(electronic_sd=10 * SCANNERS["head-soft"].electronic_sd)
    size, pixel_mm, count = 64, 236 / 64, 48
    hu = standard_head(size, pixel_mm)[None, None]
    where = ellipse(size, pixel_mm)
    quantum, electronic = closed_form_variances(hu, where, pixel_mm, scanner)
    expected = (1 / dose - 1) * quantum + (1 / dose**2 - 1) * electronic
    batch = hu.repeat(count, 1, 1, 1)
    low = simulate_projection(
        batch, [dose] * count, list(range(count)), pixel_mm, scanner=scanner, log_bias=False
    )
    assert sd(low - hu, where) ** 2 == pytest.approx(expected, rel=0.02)
    images = noise_images(hu, [1], pixel_mm, scanner, realisations=4)
    assert sd(images.quantum, where) ** 2 == pytest.approx(quantum, rel=0.06)  # of 4 realisations
    assert sd(images.electronic, where) ** 2 == pytest.approx(electronic, rel=0.12)  # of one


def closed_form_variances(hu, where, pixel_mm, scanner):
    """Mean variance in HU^2 that photons and electronics leave in a mask, through tomography.fbp_variance."""
    scanner = fitted(scanner, pixel_mm)
    lines = project(to_attenuation(hu[:, 0], scanner), pixel_mm, scanner.geometry)[0].double()
    counts = flux(scanner, lines.shape[-1]).double() * torch.exp(-lines)
    rows, columns = where.nonzero(as_tuple=True)
    points = torch.stack([columns, rows], 1)[::3] - (where.shape[0] - 1) / 2
    per_hu = 1000 / (scanner.mu_water_per_mm - scanner.mu_air_per_mm)
    return [
        per_hu**2
        * fbp_variance(
            variance / scanner.merged,
            scanner.geometry,
            points * pixel_mm,
            scanner.kernel,
            scanner.resampled_mm(pixel_mm),
        )
        .mean()
        .item()
        for variance in (1 / counts, (scanner.electronic_sd / counts) ** 2)
    ]


@pytest.mark.parametrize("model", [name for name in SIMULATED if name.startswith("projection")])
def test_projection_at_full_dose_is_the_input_bit_for_bit(model):
    hu = torch.randn(2, 1, 20, 23, generator=torch.Generator().manual_seed(0)) * 500
    low = DOSE_MODELS[model].simulate(hu, [1.0, 0.5], [0, 1], 1.0)
    assert torch.equal(low[0], hu[0])
    assert not torch.equal(low[1], hu[1])
    images = noise_images(hu, [0, 1], 1.0, DOSE_MODELS[model].scanner)
    assert torch.equal(add_noise(hu, images, [1.0, 1.0], [0, 1]), hu)


@pytest.mark.parametrize(("photons", "fewest"), [(1e5, 5), (1.2e6, 60)], ids=["counted", "normal"])
def test_few_photons_behind_metal_match_direct_counting_in_mean_and_variance(photons, fewest):
    """On either side of FEWEST_COUNTS: mean within 3 % of the SD, variance within 4 %, streaks 6 %."""
    scanner = FEW_RAYS._replace(photons=photons)
    metal = ellipse(128, PIXEL_MM, 20.0, 20.0).roll(8, 1)
    hu = torch.where(metal, 3000.0, HEAD)
    dose, count = 0.025, 32
    lines = project(to_attenuation(hu[:, 0], scanner), PIXEL_MM, scanner.geometry)
    behind = dose * (flux(scanner, lines.shape[-1]) * torch.exp(-lines)).min().item()
    assert behind == pytest.approx(fewest, rel=0.1)
    assert (behind < FEWEST_COUNTS) == (fewest < 50)
    batch = hu.repeat(count, 1, 1, 1)
    low = simulate_projection(batch, [dose] * count, list(range(count)), PIXEL_MM, scanner=scanner) - hu
    assert torch.isfinite(low).all()
    direct = counted(hu, dose, scanner, PIXEL_MM, count, seed=3)
    full = counted(hu, 1.0, scanner, PIXEL_MM, count // 2, seed=4)
    tissue, streaks = ellipse(128, PIXEL_MM) & ~metal, ellipse(128, PIXEL_MM, 60, 6) & ~metal
    for where, tolerance in ((tissue, 0.04), (streaks, 0.06)):
        missing = sd(direct - direct.mean(0), where) ** 2 - sd(full - full.mean(0), where) ** 2
        assert sd(low - low.mean(0), where) ** 2 == pytest.approx(missing, rel=tolerance)
        bias = direct.mean(0)[0, where].mean() - full.mean(0)[0, where].mean()
        assert abs(low.mean(0)[0, where].mean() - bias) < 0.03 * sd(direct, where)


def test_counted_photons_bring_only_the_electronic_noise_that_is_missing():
    """Half the dose of a poor scan, where electronics leave more noise than photons: variance within 4 %."""
    scanner, count = FEW_RAYS._replace(photons=4600.0, electronic_sd=6.0), 32
    lines = project(to_attenuation(HEAD[:, 0], scanner), PIXEL_MM, scanner.geometry)
    assert 0.5 * (flux(scanner, lines.shape[-1]) * torch.exp(-lines)).min() < FEWEST_COUNTS
    batch = HEAD.repeat(count, 1, 1, 1)
    low = simulate_projection(batch, [0.5] * count, list(range(count)), PIXEL_MM, scanner=scanner) - HEAD
    direct, full = (counted(HEAD, dose, scanner, PIXEL_MM, count, seed=5) for dose in (0.5, 1.0))
    where = ellipse(128, PIXEL_MM)
    missing = sd(direct - direct.mean(0), where) ** 2 - sd(full - full.mean(0), where) ** 2
    assert sd(low - low.mean(0), where) ** 2 == pytest.approx(missing, rel=0.04)


def test_an_opaque_object_stays_finite_and_leaves_the_other_slices_alone():
    opaque = torch.where(ellipse(128, PIXEL_MM, 60, 60), 30000.0, HEAD)
    both = torch.cat([HEAD, opaque])
    low = simulate_projection(both, [0.1, 0.1], [1, 2], PIXEL_MM, scanner=FEW_RAYS)
    assert torch.isfinite(low).all()
    alone = simulate_projection(HEAD, [0.1], [1], PIXEL_MM, scanner=FEW_RAYS)
    torch.testing.assert_close(low[:1], alone, rtol=1e-4, atol=1e-2)
    anew = simulate_reprojection(both, [0.1, 0.1], [1, 2], PIXEL_MM, scanner=FEW_RAYS)
    assert torch.isfinite(anew).all()


def test_noise_in_the_skull_is_nearly_flat_and_outside_it_is_as_the_bow_tie_says():
    tie, none = FEW_RAYS, FEW_RAYS._replace(bow_tie=False)
    with_tie, without = (
        noise_images(HEAD, [0], PIXEL_MM, scanner, realisations=24).quantum for scanner in (tie, none)
    )
    centre = ellipse(128, PIXEL_MM, 20, 20)
    rim = ellipse(128, PIXEL_MM, 60, 75) & ~ellipse(128, PIXEL_MM, 50, 62)
    outside = ellipse(128, PIXEL_MM, 112, 112) & ~ellipse(128, PIXEL_MM, 100, 100)
    assert sd(with_tie, rim) / sd(with_tie, centre) == pytest.approx(1, abs=0.15)
    assert sd(without, rim) / sd(without, centre) < 0.85
    assert sd(with_tie, outside) > 1.1 * sd(without, outside)
    for where in (centre, rim, outside):
        for images, scanner in ((with_tie, tie), (without, none)):
            variance, _ = closed_form_variances(HEAD, where, PIXEL_MM, scanner)
            assert sd(images, where) == pytest.approx(math.sqrt(variance), rel=0.02)


def test_flux_follows_the_bow_tie_between_its_points():
    scanner = SCANNERS["head-soft"]
    photons = flux(scanner, 1001)
    offsets = scanner.geometry.offsets_mm(1001)
    assert photons[500] == pytest.approx(scanner.photons)
    for place_mm, share in zip(*BOW_TIE, strict=True):
        nearest = (offsets - place_mm).abs().argmin()
        assert photons[nearest] == pytest.approx(share * scanner.photons, rel=0.01)
        assert photons[nearest] == photons[1000 - nearest]
    assert (flux(SCANNERS["mayo-abdomen"], 888) == SCANNERS["mayo-abdomen"].photons).all()


def test_fewer_views_at_large_pixels_leave_noise_of_the_same_size_and_texture():
    scanner = SCANNERS["head-soft"]
    merged = fitted(scanner, PIXEL_MM)
    assert (merged.merged, merged.geometry.views) == (4, 246)
    assert fitted(scanner, 0.46).merged == 1
    assert fitted(SCANNERS["mayo-abdomen"], 0.7).geometry.views % 4 == 0

    def noise(fitted_scanner):
        lines = line_integrals(to_attenuation(HEAD[:, 0], scanner), PIXEL_MM, fitted_scanner.geometry)
        rays = torch.exp(lines / 2) / flux(fitted_scanner, lines.shape[-1]).sqrt()
        draw = torch.Generator().manual_seed(6)
        images = [
            fbp(
                rays * torch.randn(8, *rays.shape[1:], generator=draw) / math.sqrt(fitted_scanner.merged),
                fitted_scanner.geometry,
                (128, 128),
                PIXEL_MM,
                scanner.kernel,
                PIXEL_MM,
            )
            for _ in range(6)
        ]
        return torch.cat(images)[:, None]

    fewer, all_views, where = noise(merged), noise(scanner), ellipse(128, PIXEL_MM)
    assert sd(fewer, where) == pytest.approx(sd(all_views, where), rel=0.02)
    assert (radial_power(fewer) / radial_power(all_views) - 1).abs().max() < 0.1


def test_noise_for_resampled_pixels_is_noise_of_fine_pixels_resampled_by_the_cache():
    """By dataset.fit_to_square; SD within 3 %, spectrum within 10 % in every bin below 0.8 of Nyquist."""
    size, fine_mm, coarse_mm = 384, 0.6, 2.4
    scanner = FEW_RAYS._replace(geometry=FEW_RAYS.geometry._replace(views=492 * 2))
    fine = noise_images(standard_head(size, fine_mm)[None, None], [1], fine_mm, scanner, realisations=24)
    small = standard_head(size // 4, coarse_mm)[None, None]
    coarse = noise_images(small, [2], coarse_mm, scanner, realisations=24).quantum[0][:, None]
    # integers, as the function takes HU: scaled, so that rounding them costs nothing
    volume = (fine.quantum[0] * 1000).round().int().numpy()
    resampled = torch.from_numpy(fit_to_square(volume, (1, fine_mm, fine_mm), size // 4, 0))[:, None] / 1000
    where = ellipse(size // 4, coarse_mm)
    assert sd(coarse, where) == pytest.approx(sd(resampled, where), rel=0.03)
    ratio = radial_power(coarse, size=36, bins=6) / radial_power(resampled, size=36, bins=6)
    assert (ratio - 1).abs().max() < 0.1
    assert sd(resampled, where) < 0.8 * sd(fine.quantum, ellipse(size, fine_mm))


@pytest.mark.parametrize("name", SCANNERS)
def test_presets_leave_the_noise_they_state_in_the_standard_head(name):
    scanner, size, pixel_mm = SCANNERS[name], 336, 0.6
    where = ellipse(size, pixel_mm)
    images = noise_images(standard_head(size, pixel_mm)[None, None], [1], pixel_mm, scanner, realisations=2)
    assert sd(images.quantum, where) == pytest.approx(scanner.quantum_hu, rel=0.02)
    assert sd(images.electronic, where) == pytest.approx(scanner.electronic_hu, rel=0.02)
    models = [model for model in DOSE_MODELS.values() if model.scanner is scanner]
    assert len(models) == 1
    total = math.hypot(scanner.quantum_hu / math.sqrt(0.1), scanner.electronic_hu / 0.1)
    assert models[0].sigma_hu(0.1) == pytest.approx(total)


@pytest.mark.parametrize("truth", [0.5, 2.0])
def test_series_flux_finds_the_flux_that_left_a_noise(truth):
    """Measured on the scan's own pixels, given at those or, as the cache has them, at larger ones."""
    scanner = SCANNERS["head-soft"]._replace(electronic_sd=60.0)  # two HU of noise at full flux
    hu, where = standard_head(336, 0.6)[None, None], ellipse(336, 0.6)
    images = noise_images(hu, [1], 0.6, scanner, truth, realisations=4)
    measured = math.hypot(sd(images.quantum, where), sd(images.electronic, where))
    assert series_flux(hu[:, 0], where[None], 0.6, measured, scanner) == pytest.approx(truth, rel=0.03)
    small, inside = standard_head(112, 1.8)[None], ellipse(112, 1.8)[None]
    assert series_flux(small, inside, 1.8, measured, scanner, 0.6) == pytest.approx(truth, rel=0.04)


def test_series_flux_where_there_is_nothing_to_measure_is_one():
    where, scanner = ellipse(128, PIXEL_MM)[None], SCANNERS["head-soft"]
    assert series_flux(HEAD[:, 0], where, PIXEL_MM, math.nan, scanner) == 1
    assert series_flux(HEAD[:, 0], where, PIXEL_MM, 0.0, scanner) == 1
    assert series_flux(HEAD[:, 0], where & False, PIXEL_MM, 4.0, scanner) == 1
    assert series_flux(HEAD[:, 0], where, PIXEL_MM, 4.0, SCANNERS["lodopab"]) == 1


def test_series_flux_takes_no_noise_beyond_what_head_scans_have():
    where, scanner = ellipse(128, PIXEL_MM)[None], SCANNERS["head-soft"]
    for end, beyond in zip(NOISE_RANGE_HU, (0.1, 400.0), strict=True):
        kept = series_flux(HEAD[:, 0], where, PIXEL_MM, end, scanner)
        assert series_flux(HEAD[:, 0], where, PIXEL_MM, beyond, scanner) == kept


@pytest.mark.parametrize("name", SCANNERS)
def test_line_integrals_from_fewer_rays_keep_the_size_of_the_noise(name):
    """sqrt(exp(p)): 0.5 % RMS, 2 % in 98.5 of 100 rays; single rays along the skull's edge go astray more."""
    scanner = SCANNERS[name]
    made = generate_phantom(3, size=128, slices=5, noise_hu=4.0)
    mu = to_attenuation(torch.from_numpy(made.hu[2:4]).float(), scanner)
    exact = project(mu, made.spacing_mm[1], scanner.geometry)
    error = ((line_integrals(mu, made.spacing_mm[1], scanner.geometry) - exact) / 2).exp() - 1
    through = error[exact > 1].abs()
    assert through.square().mean().sqrt() < 0.005
    assert (through > 0.02).double().mean() < 0.015
    assert error[exact > 1].mean().abs() < 0.001
    assert error[exact == 0].abs().max() < 0.1


@pytest.mark.parametrize("size", [128, 192])
def test_reprojection_of_a_noise_free_head_at_full_flux_keeps_its_hu(size):
    """HU -> mu -> sinogram -> FBP -> HU: less than 3 HU off in the brain, and 0.2 HU away from bone.

    Also where pixels are so large that the noise is made as if it had been resampled."""
    made = generate_phantom(3, size=size, slices=7, noise_hu=0.0)
    pixel_mm = made.spacing_mm[1]
    hu = torch.from_numpy(made.truth[4:5]).float()[:, None]
    brain = brain_mask(made.truth, made.spacing_mm)[4]
    deep = brain & ellipse(size, pixel_mm, 40, 50).numpy()
    for name, scanner in SCANNERS.items():
        noiseless = scanner._replace(photons=1e12, electronic_sd=0.0)
        low = simulate_reprojection(hu, [1.0], [0], pixel_mm, scanner=noiseless)
        bias = (low - hu)[0, 0].numpy()
        assert abs(bias[brain].mean()) < 3, name
        assert abs(bias[deep].mean()) < 0.2, name


def test_reprojection_has_the_noise_of_counting_at_every_dose(direct):
    scanner, count = FEW_RAYS, 16
    doses, seeds = [0.025] * count, list(range(count))
    low = simulate_reprojection(HEAD.repeat(count, 1, 1, 1), doses, seeds, PIXEL_MM, scanner=scanner)
    where = ellipse(128, PIXEL_MM)
    noise = low - low.mean(0)
    expected = sd(direct[0.025] - direct[0.025].mean(0), where) * math.sqrt(1 - 1 / count)
    assert sd(noise, where) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", SCANNERS)
def test_noise_is_made_on_the_device_of_its_input(name):
    """Tensors without values refuse to meet those of another device, as a GPU would."""
    hu = torch.zeros(2, 1, 12, 9, device="meta")
    images = noise_images(hu, [0, 1], 2.0, SCANNERS[name], realisations=2)
    assert {part.device.type for part in images} == {"meta"}
    assert add_noise(hu, images, [0.1, 0.5], [0, 1]).device.type == "meta"


def test_attenuation_and_back_is_the_identity_and_air_and_water_are_where_they_belong():
    for scanner in SCANNERS.values():
        hu = torch.tensor([-1000.0, 0.0, 40.0, 3000.0])
        mu = to_attenuation(hu, scanner)
        torch.testing.assert_close(to_hu(mu, scanner), hu, rtol=1e-5, atol=1e-2)
        assert mu[0] == pytest.approx(scanner.mu_air_per_mm, abs=1e-9)
        assert mu[1] == pytest.approx(scanner.mu_water_per_mm)
        assert to_attenuation(torch.tensor(-2000.0), scanner) == 0


@pytest.mark.parametrize("model", PROJECTING)
@pytest.mark.parametrize("dose", [1.5, 100.0])
def test_fractions_above_one_are_refused(model, dose):
    with pytest.raises(ValueError, match=rf"dose {dose:g}: .* \(0, 1\]"):
        DOSE_MODELS[model].simulate(torch.zeros(1, 1, 8, 8), [dose], [0], 1.0)


@pytest.mark.parametrize("model", PROJECTING)
@pytest.mark.parametrize("pixel_mm", [0.0, -0.5, math.nan, math.inf])
def test_a_pixel_without_a_size_is_refused_saying_what_is_needed(model, pixel_mm):
    with pytest.raises(ValueError, match="PixelSpacing"):
        DOSE_MODELS[model].simulate(torch.zeros(1, 1, 8, 8), [0.5], [0], pixel_mm)


def test_noise_images_refuse_a_pixel_without_a_size_and_add_noise_an_impossible_dose():
    with pytest.raises(ValueError, match="PixelSpacing"):
        noise_images(torch.zeros(1, 1, 8, 8), [0], math.nan, FEW_RAYS)
    images = noise_images(torch.zeros(1, 1, 8, 8), [0], 1.0, FEW_RAYS)
    for dose in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"dose {dose:g}"):
            add_noise(torch.zeros(1, 1, 8, 8), images, [dose], [0])


# ---------------------------------------------------------------- what nobody here wrote


def test_noise_of_the_fda_repeats_follows_dose_as_the_model_says(real_data):
    """Simulated by others: the SD of the repeats goes as 1 / sqrt(dose), and as quantum + electronic."""
    sds = {}
    for folder in sorted((real_data / "fda_dose_repeats" / "fbp").glob("dose_*")):
        variances = []
        for kind in ("signal_absent", "signal_present"):
            repeats = np.stack([read_slice(path) for path in sorted((folder / kind).glob("*.raw"))])
            assert repeats.shape == (10, 256, 256)
            variances.append(repeats.var(0, ddof=1)[48:208, 48:208].mean())
        sds[int(folder.name.removeprefix("dose_")) / 100] = math.sqrt(np.mean(variances))
    assert {0.1, 1.0} <= set(sds)
    model = DOSE_MODELS["projection"].sigma_hu
    for dose, found in sds.items():
        assert found / sds[1.0] == pytest.approx(1 / math.sqrt(dose), rel=0.02)
        assert found / sds[1.0] == pytest.approx(model(dose) / model(1.0), rel=0.02)


def read_slice(path: Path) -> np.ndarray:
    """One image of a MetaImage series: 256 x 256 little-endian int16, as its .mhd says."""
    return np.fromfile(path, "<i2").reshape(256, 256).astype(np.float64)


def real_slices(folder):
    """The three slices with most brain: HU (3, H, W), brain and head (both bool), spacing, their noise."""
    jobs, _ = READERS["dicom"].discover(folder)
    scan = read_scan(jobs[0])
    brain = brain_mask(scan.hu, scan.spacing_mm)
    middle = brain.sum((1, 2)).argsort()[-3:]
    hu, head = scan.hu[middle], head_mask(scan.hu, scan.spacing_mm)[middle]
    arrays = (torch.from_numpy(array) for array in (hu.astype(np.float32), brain[middle], head))
    return *arrays, scan.spacing_mm, measure_noise_hu(hu, scan.spacing_mm)


def test_a_quarter_of_the_dose_doubles_the_noise_of_a_real_head_and_moves_no_mean(real_data):
    hu, brain, _, spacing_mm, own = real_slices(real_data / "head_ge_tilted")
    scanner = SCANNERS["head-soft"]
    factor = series_flux(hu, brain, spacing_mm[1], own, scanner)
    low = simulate_projection(hu[:, None], [0.25] * 3, [1, 2, 3], spacing_mm[1], factor, scanner=scanner)[
        :, 0
    ]
    added = (low - hu)[brain].double()
    assert math.hypot(own, added.std().item()) / own == pytest.approx(2, rel=0.02)
    assert measure_noise_hu(low.numpy(), spacing_mm) / own == pytest.approx(2, rel=0.07)
    assert abs(added.mean().item()) < 0.1


def test_a_quarter_of_the_dose_doubles_the_noise_of_a_real_head_phantom(real_data):
    """A scan of 17 HU of noise: its quarter has so few photons that electronics and the logarithm show.

    Without the board under it, through which the scanner, as it is modelled here, would see nothing."""
    hu, brain, head, spacing_mm, own = real_slices(real_data / "head_phantom_siemens")
    hu = torch.where(head, hu, -1000.0)
    scanner = SCANNERS["head-soft"]
    factor = series_flux(hu, brain, spacing_mm[1], own, scanner)
    added = {
        bias: simulate_projection(
            hu[:, None], [0.25] * 3, [1, 2, 3], spacing_mm[1], factor, scanner=scanner, log_bias=bias
        )[:, 0]
        - hu
        for bias in (True, False)
    }
    assert math.hypot(own, added[True][brain].std().item()) / own == pytest.approx(2, rel=0.07)
    assert measure_noise_hu((hu + added[True]).numpy(), spacing_mm) / own == pytest.approx(2, rel=0.07)
    assert abs(added[False][brain].mean().item()) < 0.3
    assert 0.3 < added[True][brain].mean().item() < 1.5  # 3 / (2 N), reconstructed
