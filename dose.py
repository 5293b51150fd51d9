"""CT dose physics on arrays: what a lower tube current does to an image, and the texture of its noise.

DOSE_MODELS holds every dose model by the name used on the command line. A model takes HU and returns HU;
nothing is clipped and nothing is rounded, so that the noise keeps a mean of zero. SCANNERS holds the scanners
that the projection models simulate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tomography import Geometry, backproject, fbp, fbp_variance, filtered, project, ramp

POISSON_RANGE_HU = (0.0, 80.0)  # the brain window: intensity 0..1 of the paper's formula
LAMBDA_ROUTINE = 40.0  # the calibrated scale ends at a routine head scan, about 4 HU of noise
INTENSITY_OF_WATER = 1562.0  # puts lambda 40 at 4.1 HU in brain: 1000 / 1562 * sqrt(1562 * 1.04 / 40)
REFERENCE_HU = 40.0  # grey matter; every sigma_hu of this project is stated there
KERNEL_CUTOFF_PER_MM = 0.7  # a standard head kernel has lost all contrast near 7 line pairs per cm


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


# ---------------------------------------------------------------- the projection domain


class Scanner(NamedTuple):
    """A scanner at its full dose.

    photons: per ray, in the middle of the bow-tie filter. electronic_sd: of the detector's own noise, in
    photons. quantum_hu, electronic_hu: noise SD that the two leave in standard_head. per_series:
    whether photons are scaled to the noise that a series is found to have. merged: how many views one stands
    for, see fitted."""

    geometry: Geometry
    kernel: str
    photons: float
    electronic_sd: float
    bow_tie: bool
    mu_water_per_mm: float
    quantum_hu: float
    electronic_hu: float
    mu_air_per_mm: float = 0.0
    per_series: bool = False
    largest_pixel_mm: float = 0.65  # that it makes itself: 330 mm on 512 pixels, for a head
    merged: int = 1

    def resampled_mm(self, pixel_mm: float) -> float | None:
        """The pixel size if an image of such pixels must have been resampled, else None."""
        return pixel_mm if pixel_mm > self.largest_pixel_mm else None


BOW_TIE = (  # mm off axis, flux; head filter
    (0.0, 28.0, 56.0, 75.0, 94.0, 112.0, 140.0),
    (1.0, 0.91, 0.64, 0.43, 0.26, 0.16, 0.10),
)
ELECTRONIC_SD = math.sqrt(10)  # photons, of a current detector
HEAD_SCAN = Geometry(views=984, pitch_mm=0.3)
FAN_SCAN = Geometry(views=2000, pitch_mm=1.0, detectors=888, source_mm=595.0, detector_mm=1085.0)
LODOPAB_SCAN = Geometry(views=1000, pitch_mm=260 * math.sqrt(2) / 513, detectors=513)
SCANNERS = {
    # photons such that standard_head has 4 HU of noise
    "head-soft": Scanner(HEAD_SCAN, "soft", 5.53e5, ELECTRONIC_SD, True, 0.019, 4.0, 0.1, per_series=True),
    "head-hann": Scanner(HEAD_SCAN, "hann", 3.52e6, ELECTRONIC_SD, True, 0.019, 4.0, 0.04, per_series=True),
    # the fan-beam scanner of the anatomy-aware denoising system
    "mayo-abdomen": Scanner(
        FAN_SCAN, "ram-lak", 1e5, ELECTRONIC_SD, False, 0.019, 23.2, 1.32, largest_pixel_mm=1.0
    ),
    # LoDoPaB-CT (Leuschner et al. 2021), bins over the diagonal of 260 mm
    "lodopab": Scanner(
        LODOPAB_SCAN, "hann", 4096.0, 0.0, False, 0.02, 48.5, 0.0, mu_air_per_mm=2e-5, largest_pixel_mm=1.0
    ),
}
HEAD_AXES_MM = (75.0, 92.0)  # half the width and length of standard_head
SKULL_MM, SKULL_HU = 7.0, 1000.0
HEAD_RADIUS_MM = 100.0  # views must be dense enough for the edge of a head
FEWEST_COUNTS = 50.0  # below, photons are drawn: the normal distribution misses 7 % of the variance at 25
LEAST_COUNT = 0.5  # a starved ray counts half a photon: its logarithm stays finite
NOISE_RANGE_HU = (2.0, 20.0)  # of a head scan; what was measured outside it says little about photons
RAYS_AT_ONCE = 2**24  # 64 MB a sinogram


def standard_head(size: int, pixel_mm: float) -> torch.Tensor:
    """(size, size) HU: an ellipse of 150 x 184 mm at 40 HU in a skull of 7 mm; doses are calibrated in it."""
    centred = (torch.arange(size) - (size - 1) / 2) * pixel_mm
    x, y = centred[None, :], centred[:, None]
    outer = (x / HEAD_AXES_MM[0]) ** 2 + (y / HEAD_AXES_MM[1]) ** 2 <= 1
    inner = (x / (HEAD_AXES_MM[0] - SKULL_MM)) ** 2 + (y / (HEAD_AXES_MM[1] - SKULL_MM)) ** 2 <= 1
    return torch.where(inner, REFERENCE_HU, torch.where(outer, SKULL_HU, -1000.0))


def to_attenuation(hu: torch.Tensor, scanner: Scanner) -> torch.Tensor:
    """HU -> attenuation per mm, never below 0."""
    per_hu = (scanner.mu_water_per_mm - scanner.mu_air_per_mm) / 1000
    return (scanner.mu_water_per_mm + hu * per_hu).clamp_min(0)


def to_hu(mu: torch.Tensor, scanner: Scanner) -> torch.Tensor:
    """The inverse of to_attenuation: attenuation per mm -> HU."""
    return (mu - scanner.mu_water_per_mm) * (1000 / (scanner.mu_water_per_mm - scanner.mu_air_per_mm))


def fitted(scanner: Scanner, pixel_mm: float) -> Scanner:
    """The same scanner with fewer views where pixels are too large to tell them apart.

    A view of it stands for several neighbouring ones: noise of the same size and texture at the frequencies
    that the pixels hold, in a fraction of the time."""
    views, turns = scanner.geometry.views, scanner.geometry.turns
    enough = math.pi * HEAD_RADIUS_MM / pixel_mm * (turns / 2)
    merged = max(n for n in (1, 2, 4, 8) if n == 1 or (views % (n * turns) == 0 and views / n >= enough))
    return scanner._replace(geometry=scanner.geometry._replace(views=views // merged), merged=merged)


def flux(scanner: Scanner, count: int) -> torch.Tensor:
    """(count,) photons of each detector with nothing in the beam, at full dose."""
    if not scanner.bow_tie:
        return torch.full((count,), scanner.photons)
    offsets = scanner.geometry.offsets_mm(count).abs().numpy()
    return torch.from_numpy(scanner.photons * np.interp(offsets, *BOW_TIE)).float()


def line_integrals(mu: torch.Tensor, pixel_mm: float, geometry: Geometry) -> torch.Tensor:
    """tomography.project from fewer rays, interpolated: (B, H, W) -> (B, views, detectors).

    Good enough for the size of noise, which depends on line integrals through exp(p / 2): a quarter of the
    views and detectors 1.2 mm apart change it by 0.4 % RMS in a head, and single rays along the edge of the
    skull by several percent."""
    batch, height, width = mu.shape
    count = geometry.covering(height, width, pixel_mm)
    enough = 120 * geometry.turns  # a view every 0.75 degrees
    views, turns = geometry.views, geometry.turns
    fewer = max(n for n in (1, 2, 4) if n == 1 or (views % (n * turns) == 0 and views / n >= enough))
    coarser = max(1, int(1.2 / geometry.pitch_centre_mm))
    coarse = geometry._replace(
        views=geometry.views // fewer,
        pitch_mm=geometry.pitch_mm * coarser,
        detectors=2 * (count // (2 * coarser) + 1) + 1,
    )
    if fewer * coarser == 1:
        return project(mu, pixel_mm, geometry)
    lines = project(mu, pixel_mm, coarse)
    after = lines[:, :1].flip(2) if geometry.parallel else lines[:, :1]  # the view after the last one
    lines = _stretched(torch.cat([lines, after], 1), torch.arange(geometry.views) / fewer, 1)
    places = geometry.offsets_mm(count) / coarse.pitch_centre_mm + (coarse.detectors - 1) / 2
    return _stretched(lines, places, 2)


def _stretched(values: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """Linear interpolation of values along an axis at fractional places inside it."""
    left = places.floor().long().clamp(0, values.shape[axis] - 2)
    shape = [1] * values.ndim
    shape[axis] = -1
    share = (places - left).to(values).reshape(shape)
    left = left.to(values.device)
    return torch.lerp(values.index_select(axis, left), values.index_select(axis, left + 1), share)


def series_flux(
    hu: torch.Tensor,
    inside: torch.Tensor,
    pixel_mm: float,
    noise_hu: float,
    scanner: Scanner,
    image_pixel_mm: float | None = None,
) -> float:
    """How many times a preset's photons a series was taken with, from its noise.

    hu: (S, H, W), a few slices, at pixels of pixel_mm. inside: (S, H, W) bool, where noise_hu was measured,
    on pixels of image_pixel_mm (default: pixel_mm). Solved in closed form, within NOISE_RANGE_HU; 1 where
    there is nothing to measure, or where the scanner's photons are not scaled (Scanner.per_series)."""
    if not scanner.per_series or not math.isfinite(noise_hu) or noise_hu <= 0 or not inside.any():
        return 1.0
    image_pixel_mm = image_pixel_mm or pixel_mm
    scanner = fitted(scanner, image_pixel_mm)
    some = inside.flatten(1).any(dim=1).cpu()
    lines = line_integrals(to_attenuation(hu[some], scanner), pixel_mm, scanner.geometry).cpu()
    spread = torch.exp(lines) / flux(scanner, lines.shape[-1])
    variances = torch.stack([spread, (scanner.electronic_sd * spread) ** 2]) / scanner.merged
    points = torch.stack([_points(where) for where in inside[some].cpu()]) * pixel_mm
    resampled_mm = scanner.resampled_mm(image_pixel_mm)
    found = fbp_variance(
        variances, scanner.geometry, points.expand(2, *points.shape), scanner.kernel, resampled_mm
    )
    hu_per_mu = 1000 / (scanner.mu_water_per_mm - scanner.mu_air_per_mm)
    q, e = (found.mean(dim=(1, 2)) * hu_per_mu**2).tolist()
    variance = float(np.clip(noise_hu, *NOISE_RANGE_HU)) ** 2  # = q / flux + e / flux^2
    return float((q + math.sqrt(q**2 + 4 * e * variance)) / (2 * variance))


def _points(inside: torch.Tensor) -> torch.Tensor:
    """200 pixels spread over a mask (H, W), as (200, 2): x and y in pixels from the centre of the image."""
    places = inside.nonzero().flip(1)
    some = torch.linspace(0, len(places) - 1, 200).round().long()  # enough for the mean of a smooth variance
    return places[some] - (torch.tensor(inside.shape).flip(0) - 1) / 2


def _counts(hu: torch.Tensor, pixel_mm: float, scanner: Scanner, flux_factor: float) -> torch.Tensor:
    """Photons expected behind hu (B, H, W) at full dose: (B, views, detectors)."""
    lines = line_integrals(to_attenuation(hu, scanner), pixel_mm, scanner.geometry)
    return flux(scanner, lines.shape[-1]).to(lines) * flux_factor * torch.exp(-lines)


class NoiseImages(NamedTuple):
    """What any lower dose of a slice is made of, in HU: I(d) = I + sqrt((1 - d) / d) quantum
    + sqrt((1 - d^2) / d^2) electronic + (1 / d - 1) bias.

    quantum: (B, K, H, W), K realisations. electronic: (B, 1, H, W). bias: (B, 1, H, W), of the logarithm.
    counts: (B,) of the most starved ray at full dose. Source: Yu et al. 2012."""

    quantum: torch.Tensor
    electronic: torch.Tensor
    bias: torch.Tensor
    counts: torch.Tensor


def noise_images(
    hu: torch.Tensor,
    seeds: Sequence[int],
    pixel_mm: float,
    scanner: Scanner,
    flux_factor: float = 1.0,
    realisations: int = 1,
) -> NoiseImages:
    """Reconstruct the noise of a full-dose scan alone. hu: (B, 1, H, W) HU, one seed each.

    Raises ValueError for a bad pixel_mm."""
    check_pixel(pixel_mm)
    scanner = fitted(scanner, pixel_mm)
    counts = _counts(hu[:, 0], pixel_mm, scanner, flux_factor)
    white = _white((realisations + 1, *counts.shape[1:]), seeds, hu.device) / math.sqrt(scanner.merged)
    rays = torch.cat(
        [
            white[:, :-1] / counts.sqrt()[:, None],
            white[:, -1:] * (scanner.electronic_sd / counts)[:, None],
            1 / (2 * counts)[:, None],
        ],
        1,
    )
    images = _reconstructed(rays.flatten(0, 1), scanner, hu.shape[-2:], pixel_mm)
    images = images.reshape(len(hu), realisations + 2, *hu.shape[-2:])
    return NoiseImages(images[:, :-2], images[:, -2:-1], images[:, -1:], counts.amin(dim=(1, 2)))


def add_noise(
    hu: torch.Tensor, images: NoiseImages, doses: Sequence[float], seeds: Sequence[int]
) -> torch.Tensor:
    """Any dose from noise images at the cost of a multiply and an add.

    hu: (B, 1, H, W) HU; a dose fraction and a seed each. Returns (B, 1, H, W) HU; dose 1 adds nothing.
    The realisations are mixed with random weights whose squares sum to 1, which is a new realisation with the
    same covariance; the electronic one has a random sign. Raises ValueError for a dose outside (0, 1]."""
    for fraction in doses:
        check_fraction(fraction)
    shares, signs = [], []
    for seed in seeds:
        draw = torch.randn(images.quantum.shape[1] + 1, generator=torch.Generator().manual_seed(seed))
        shares.append(draw[:-1] / draw[:-1].norm())
        signs.append(draw[-1].sign())
    dose = torch.tensor(doses, dtype=torch.float64)
    quantum = (torch.sqrt((1 - dose) / dose)[:, None] * torch.stack(shares)).to(hu)
    electronic = (torch.sqrt((1 - dose**2) / dose**2) * torch.stack(signs)).to(hu)
    bias = (1 / dose - 1).to(hu)
    low = torch.addcmul(hu, electronic[:, None, None, None], images.electronic)
    low.addcmul_(bias[:, None, None, None], images.bias)
    for share, realisation in zip(quantum.unbind(1), images.quantum.unbind(1), strict=True):
        low[:, 0].addcmul_(share[:, None, None], realisation)
    return low


def simulate_projection(
    hu: torch.Tensor,
    doses: Sequence[float],
    seeds: Sequence[int],
    pixel_mm: float,
    flux_factor: float = 1.0,
    *,
    scanner: Scanner = SCANNERS["head-soft"],
    log_bias: bool = True,
) -> torch.Tensor:
    """Low dose by noise insertion: only the noise that is missing is reconstructed and added to the image.

    hu: (B, 1, H, W) HU of full-dose slices with pixels of pixel_mm, which already have the noise of dose 1; a
    dose fraction and a seed each. flux_factor: see series_flux. Returns (B, 1, H, W) HU; dose 1 returns the
    input bit for bit. The variance added is (1/d - 1) of the quantum and (1/d^2 - 1) of the electronic noise.
    log_bias: also add what the logarithm of few counts adds to the mean. Where a ray keeps fewer than
    FEWEST_COUNTS photons, photons are drawn one by one. Raises ValueError for a dose outside (0, 1] or a bad
    pixel_mm. Source: Yu et al. 2012."""
    for dose in doses:
        check_fraction(dose)
    check_pixel(pixel_mm)
    out = hu.clone()
    todo = [place for place, dose in enumerate(doses) if dose < 1]
    rays = scanner.geometry.views * scanner.geometry.covering(*hu.shape[-2:], pixel_mm)
    step = max(1, RAYS_AT_ONCE // rays)
    for first in range(0, len(todo), step):
        places = todo[first : first + step]
        part, some_seeds = hu[places, 0], [seeds[place] for place in places]
        dose = torch.tensor([doses[place] for place in places], dtype=torch.float64)
        noise = _missing_noise(part, dose, some_seeds, pixel_mm, flux_factor, scanner, log_bias)
        out[places] += noise[:, None]
    return out


def _missing_noise(hu, dose, seeds, pixel_mm, flux_factor, scanner, log_bias) -> torch.Tensor:
    """What simulate_projection adds to hu (B, H, W) at dose (B,): (B, H, W) HU."""
    merged = fitted(scanner, pixel_mm)
    counts = _counts(hu, pixel_mm, merged, flux_factor)
    fraction = dose.to(counts)[:, None, None]
    quantum, electronic = (1 - fraction) / fraction, (1 - fraction**2) / fraction**2
    variance = quantum / counts + electronic * (scanner.electronic_sd / counts) ** 2
    change = _white((1, *counts.shape[1:]), seeds, hu.device)[:, 0] * (variance / merged.merged).sqrt()
    if log_bias:
        change += variance / 2  # of a logarithm, to second order
    noise = _reconstructed(change, merged, hu.shape[-2:], pixel_mm)
    for place in ((fraction * counts).amin(dim=(1, 2)) < FEWEST_COUNTS).nonzero()[:, 0].tolist():
        one = slice(place, place + 1)
        counts = _counts(hu[one], pixel_mm, scanner, flux_factor)  # of every ray: starving is not averaged
        change = _thinned(counts, dose[place].item(), scanner, seeds[place])
        noise[one] = _reconstructed(change, scanner, hu.shape[-2:], pixel_mm)
    return noise


def simulate_reprojection(
    hu: torch.Tensor,
    doses: Sequence[float],
    seeds: Sequence[int],
    pixel_mm: float,
    flux_factor: float = 1.0,
    *,
    scanner: Scanner = SCANNERS["mayo-abdomen"],
) -> torch.Tensor:
    """Low dose by scanning the image anew: projected, counted, and reconstructed, image and noise.

    As simulate_projection, but the slice is treated as free of noise, gets the blur and the noise of the
    simulated scanner at every dose, 1 included, and loses its own kernel."""
    for dose in doses:
        check_fraction(dose)
    check_pixel(pixel_mm)
    geometry = scanner.geometry
    out = torch.empty_like(hu)
    for place, (dose, seed) in enumerate(zip(doses, seeds, strict=True)):
        lines = project(to_attenuation(hu[place], scanner), pixel_mm, geometry)
        open_beam = dose * flux_factor * flux(scanner, lines.shape[-1]).to(lines)
        generator = torch.Generator().manual_seed(seed)
        counts = torch.poisson((open_beam * torch.exp(-lines)).cpu(), generator)
        counts += scanner.electronic_sd * torch.randn(counts.shape, generator=generator)
        noise = -torch.log(counts.clamp_min(LEAST_COUNT).to(lines) / open_beam) - lines
        # noise alone is resampled: a slice of large pixels has been already
        of_slice = ramp(geometry, lines.shape[-1], scanner.kernel)
        of_noise = ramp(geometry, lines.shape[-1], scanner.kernel, scanner.resampled_mm(pixel_mm))
        both = filtered(lines, geometry, of_slice) + filtered(noise, geometry, of_noise)
        out[place] = to_hu(backproject(both, geometry, hu.shape[-2:], pixel_mm), scanner)
    return out


def _thinned(counts: torch.Tensor, dose: float, scanner: Scanner, seed: int) -> torch.Tensor:
    """Change of the line integrals when only a share of the photons is kept: exact at any count, (V, D).

    The photons that are kept and those that are lost are independent Poisson numbers."""
    generator = torch.Generator().manual_seed(seed)
    expected = counts.cpu()
    kept, lost = torch.poisson(dose * expected, generator), torch.poisson((1 - dose) * expected, generator)
    missing = math.sqrt(1 - dose**2) * scanner.electronic_sd  # the scan has its own electronic noise already
    measured = kept + missing * torch.randn(kept.shape, generator=generator)
    ratio = (kept + lost).clamp_min(LEAST_COUNT) * dose / measured.clamp_min(LEAST_COUNT)
    return ratio.log().to(counts)


def _white(shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """(B, *shape) standard normal numbers; drawn on the CPU, so that a GPU sees the same noise."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(device)


def _reconstructed(
    rays: torch.Tensor, scanner: Scanner, shape: Sequence[int], pixel_mm: float
) -> torch.Tensor:
    """Changes of line integrals (B, views, detectors) -> changes of HU (B, H, W)."""
    mu = fbp(
        rays,
        scanner.geometry,
        tuple(shape),
        pixel_mm,
        scanner.kernel,
        scanner.resampled_mm(pixel_mm),
    )
    return mu * (1000 / (scanner.mu_water_per_mm - scanner.mu_air_per_mm))


def check_fraction(dose: float) -> None:
    """Raise ValueError unless a dose fraction is in (0, 1]."""
    if not (math.isfinite(dose) and 0 < dose <= 1):
        raise ValueError(f"dose {dose:g}: a fraction of the scan's own dose must be in (0, 1]")


def check_pixel(pixel_mm: float) -> None:
    """Raise ValueError unless a pixel has a size: line integrals are lengths."""
    if not (math.isfinite(pixel_mm) and pixel_mm > 0):
        raise ValueError(f"pixel spacing {pixel_mm:g} mm: projecting needs it (give the scan's PixelSpacing)")


# ---------------------------------------------------------------- every model by its name


class DoseModel(NamedTuple):
    """One way to get a lower dose. `doses` are in the model's own unit (`unit`)."""

    # (hu (B, 1, H, W), doses, seeds, pixel_mm, flux_factor) -> HU; None where nothing is simulated
    simulate: Callable[..., torch.Tensor] | None
    check: Callable[[float], None]  # raises ValueError for a dose outside the model's range
    fraction: Callable[[float], float | None]  # of a routine scan's dose; None where the model has none
    sigma_hu: Callable[[float], float]  # noise SD at REFERENCE_HU, in a scan of this dose
    doses: tuple[float, ...]
    unit: str
    scanner: Scanner | None = None  # of noise insertion: what series_flux and noise_images need


def _slice_by_slice(simulate: Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]) -> Callable:
    def each(hu, doses, seeds, _pixel_mm=math.nan, _flux_factor=1.0):
        generator = torch.Generator(hu.device)
        return torch.stack(
            [
                simulate(image, dose, generator.manual_seed(seed))
                for image, dose, seed in zip(hu, doses, seeds, strict=True)
            ]
        )

    return each


def _with_scanner(simulate: Callable, scanner: Scanner) -> Callable:
    def simulated(hu, doses, seeds, pixel_mm, flux_factor=1.0):
        return simulate(hu, doses, seeds, pixel_mm, flux_factor, scanner=scanner)

    return simulated


def _sigma_hu(scanner: Scanner) -> Callable[[float], float]:
    return lambda dose: math.sqrt(scanner.quantum_hu**2 / dose + (scanner.electronic_hu / dose) ** 2)


LAMBDAS = (1.0, 5.0, 10.0, 20.0, 40.0)
FRACTIONS = (0.025, 0.1, 0.25, 0.5, 1.0)

DOSE_MODELS = {
    "calibrated": DoseModel(
        simulate=_slice_by_slice(simulate_calibrated),
        check=check_calibrated,
        fraction=lambda dose: dose / LAMBDA_ROUTINE,
        sigma_hu=sigma_calibrated_hu,
        doses=LAMBDAS,
        unit="lambda",
    ),
    "poisson": DoseModel(
        simulate=_slice_by_slice(simulate_poisson),
        check=check_poisson,
        fraction=lambda _dose: None,
        sigma_hu=sigma_poisson_hu,
        doses=LAMBDAS,
        unit="lambda",
    ),
    # real low-dose images beside the full-dose ones, where a data set has them
    "measured": DoseModel(
        simulate=None,
        check=check_fraction,
        fraction=lambda dose: dose,
        sigma_hu=_sigma_hu(SCANNERS["head-soft"]),
        doses=(0.25,),
        unit="fraction",
    ),
}
# the plain names are a head scanner, and the scanner of the anatomy-aware denoising system
for _kind, _simulate, _plain in (
    ("projection", simulate_projection, "head-soft"),
    ("reprojection", simulate_reprojection, "mayo-abdomen"),
):
    for _name, _scanner in SCANNERS.items():
        DOSE_MODELS[_kind if _name == _plain else f"{_kind}-{_name}"] = DoseModel(
            simulate=_with_scanner(_simulate, _scanner),
            check=check_fraction,
            fraction=lambda dose: dose,
            sigma_hu=_sigma_hu(_scanner),
            doses=FRACTIONS,
            unit="fraction",
            scanner=_scanner if _kind == "projection" else None,
        )
SIMULATED = tuple(name for name, model in DOSE_MODELS.items() if model.simulate is not None)


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
