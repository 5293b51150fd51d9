import math

import numpy as np
import pytest
import torch

from dose import (
    DOSE_MODELS,
    LAMBDA_ROUTINE,
    reconstruction_noise,
    sigma_calibrated_hu,
    sigma_poisson_hu,
    simulate_calibrated,
    simulate_poisson,
)

SIDE = 400  # 160,000 pixels: the SD is known to 0.18 %, three sigma below the tolerances here


def noise_of(model, level_hu, dose):
    hu = torch.full((1, SIDE, SIDE), float(level_hu))
    return (DOSE_MODELS[model].simulate(hu, dose, torch.Generator().manual_seed(1)) - hu).double().numpy()


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


@pytest.mark.parametrize("model", DOSE_MODELS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 47), (3, 1, 20, 21)])
def test_every_model_keeps_shape_and_repeats_with_its_seed(model, shape):
    hu = torch.full(shape, 35.0)
    first, again, other = (
        DOSE_MODELS[model].simulate(hu, 5.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == hu.shape
    assert torch.equal(first, again)
    assert hu.numel() == 1 or not torch.equal(first, other)


@pytest.mark.parametrize("model", DOSE_MODELS)
@pytest.mark.parametrize("dose", [0.0, -1.0, math.nan, math.inf])
def test_every_model_refuses_an_impossible_dose_naming_it(model, dose):
    with pytest.raises(ValueError, match=f"dose {dose:g}"):
        DOSE_MODELS[model].simulate(torch.zeros(1, 4, 4), dose, torch.Generator())


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
