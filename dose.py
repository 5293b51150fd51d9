"""CT dose physics on arrays: what a lower tube current does to an image, and the texture of its noise.

DOSE_MODELS holds every dose model by the name used on the command line. A model takes HU and returns HU;
nothing is clipped and nothing is rounded, so that the noise keeps a mean of zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

POISSON_RANGE_HU = (0.0, 80.0)  # the brain window: intensity 0..1 of the paper's formula
LAMBDA_ROUTINE = 40.0  # the calibrated scale ends at a routine head scan, about 4 HU of noise
INTENSITY_OF_WATER = 1562.0  # puts lambda 40 at 4.1 HU in brain: 1000 / 1562 * sqrt(1562 * 1.04 / 40)
REFERENCE_HU = 40.0  # grey matter; every sigma_hu of this project is stated there
KERNEL_CUTOFF_PER_MM = 0.7  # a standard head kernel has lost all contrast near 7 line pairs per cm


class DoseModel(NamedTuple):
    """One way to simulate a lower dose. `doses` are in the model's own unit (`unit`)."""

    simulate: Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]
    check: Callable[[float], None]  # raises ValueError for a dose outside the model's range
    fraction: Callable[[float], float | None]  # of a routine scan's dose; None where the model has none
    sigma_hu: Callable[[float], float]  # noise SD at REFERENCE_HU, in a scan of this dose
    doses: tuple[float, ...]
    unit: str


def _check_lambda(dose: float, highest: float) -> None:
    if not (math.isfinite(dose) and 0 < dose <= highest):
        allowed = f"in (0, {highest:g}]" if math.isfinite(highest) else "positive"
        raise ValueError(f"dose {dose:g}: lambda must be {allowed}")


def check_poisson(dose: float) -> None:
    """Raise ValueError unless lambda is positive and finite."""
    _check_lambda(dose, math.inf)


def check_calibrated(dose: float) -> None:
    """Raise ValueError unless lambda is in (0, 40]: more than the routine dose cannot be simulated."""
    _check_lambda(dose, LAMBDA_ROUTINE)


def simulate_poisson(
    hu: torch.Tensor,
    dose: float,
    generator: torch.Generator,
    intensity_range_hu: tuple[float, float] = POISSON_RANGE_HU,
) -> torch.Tensor:
    """Low dose by image-domain Poisson counts, I_low = Poisson(lambda I) / lambda.

    hu: (..., H, W) float HU. dose: lambda. I is 0 at the lower and 1 at the upper end of
    intensity_range_hu and goes on above it; below the lower end there are no counts, hence no noise.
    Returns HU of the same shape: mean hu, variance width^2 I / lambda. Raises ValueError if lambda <= 0.
    Source: the formula of "Simulating Low-Dose CT for Stroke Diagnosis", without its clipping."""
    check_poisson(dose)
    low, high = intensity_range_hu
    rate = dose * ((hu - low) / (high - low)).clamp_min(0)
    counts = torch.poisson(rate, generator=generator)
    return hu + (counts - rate) * ((high - low) / dose)


def simulate_calibrated(hu: torch.Tensor, dose: float, generator: torch.Generator) -> torch.Tensor:
    """Low dose by image-domain Poisson counts on a scale whose lambda 40 is a routine head scan.

    hu: (..., H, W) float HU of a routine scan, which already has the noise of lambda 40. dose: lambda in
    (0, 40]. With I = 1562 (1 + HU / 1000) the total variance is to be (1000 / 1562)^2 I / lambda, so the
    noise added is that of 1 / lambda - 1 / 40; lambda 40 returns the input bit for bit.
    Returns HU of the same shape. Raises ValueError outside (0, 40]."""
    check_calibrated(dose)
    if dose == LAMBDA_ROUTINE:
        return hu.clone()
    missing = 1 / (1 / dose - 1 / LAMBDA_ROUTINE)  # the lambda whose noise alone is still to be added
    rate = missing * INTENSITY_OF_WATER * (1 + hu / 1000).clamp_min(0)
    counts = torch.poisson(rate, generator=generator)
    return hu + (counts - rate) * (1000 / INTENSITY_OF_WATER / missing)


def sigma_poisson_hu(dose: float) -> float:
    """Noise SD in HU that lambda adds at 40 HU under `poisson`."""
    low, high = POISSON_RANGE_HU
    return (high - low) * math.sqrt((REFERENCE_HU - low) / (high - low) / dose)


def sigma_calibrated_hu(dose: float) -> float:
    """Noise SD in HU of a scan at lambda under `calibrated`, at 40 HU, its own noise included."""
    return 1000 / INTENSITY_OF_WATER * math.sqrt(INTENSITY_OF_WATER * (1 + REFERENCE_HU / 1000) / dose)


DOSE_MODELS = {
    "calibrated": DoseModel(
        simulate=simulate_calibrated,
        check=check_calibrated,
        fraction=lambda dose: dose / LAMBDA_ROUTINE,
        sigma_hu=sigma_calibrated_hu,
        doses=(1.0, 5.0, 10.0, 20.0, 40.0),
        unit="lambda",
    ),
    "poisson": DoseModel(
        simulate=simulate_poisson,
        check=check_poisson,
        fraction=lambda _dose: None,
        sigma_hu=sigma_poisson_hu,
        doses=(1.0, 5.0, 10.0, 20.0, 40.0),
        unit="lambda",
    ),
}


def reconstruction_noise(
    shape: tuple[int, int], sigma_hu: float, pixel_spacing_mm: float, rng: np.random.Generator
) -> np.ndarray:
    """Noise with the texture of filtered back-projection: power ~ f Hann(f)^2, so neighbours are correlated.

    shape: (H, W) in pixels of pixel_spacing_mm. Returns (H, W) float32 HU, mean 0, SD sigma_hu over an
    ensemble. Source: Riederer, Pelc and Chesler 1978 (the ramp leaves power proportional to frequency)."""
    height, width = shape
    fy = np.fft.fftfreq(height, pixel_spacing_mm)[:, None]
    fx = np.fft.rfftfreq(width, pixel_spacing_mm)[None, :]
    frequency = np.hypot(fy, fx) / KERNEL_CUTOFF_PER_MM
    hann = np.where(frequency < 1, 0.5 + 0.5 * np.cos(np.pi * frequency), 0.0)
    amplitude = np.sqrt(frequency) * hann
    # Parseval over the half spectrum: all columns but the first and the Nyquist one stand for two
    twice = np.full(fx.shape[1], 2.0)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    mean_power = (amplitude**2 * twice).sum() / (height * width)
    white = np.fft.rfft2(rng.standard_normal(shape))
    noise = np.fft.irfft2(white * amplitude, s=shape)
    return (noise * (sigma_hu / math.sqrt(mean_power))).astype(np.float32)
