"""CT artifacts for stress tests: a head that moves, detectors out of calibration, metal that starves rays.

ARTIFACTS holds every artifact by its name on the command line: HU, a severity in (0, 1], a seed for every
slice and the size of a pixel -> HU. Each is made in the sinogram of the scanner `head-soft`, and only the
change of the sinogram is reconstructed and added to the image: HU, kernel and noise of the scan stay, and a
severity near 0 changes nothing. Sizes are in mm, so that a seed gives the same artifact at any matrix; slices
with one seed move together, and share their rings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from anatomy import head_mask
from dose import (
    HEAD_RADIUS_MM,
    LEAST_COUNT,
    RAYS_AT_ONCE,
    SCANNERS,
    Scanner,
    check_pixel,
    fitted,
    flux,
    line_integrals,
    to_attenuation,
)
from stage import stable_seed
from tomography import Geometry, fbp, project

SCANNER = SCANNERS["head-soft"]
SEVERITIES = tuple(step / 12 for step in range(1, 13))  # of the stress test


def scan_seed(seed: int, series_uid: str) -> int:
    """The seed for all slices of one scan: the same for every artifact, severity, run and machine."""
    return stable_seed("artifact", seed, series_uid)


def _reconstructed(
    lines: torch.Tensor,
    scanner: Scanner,
    shape: Sequence[int],
    pixel_mm: float,
    kernel: str,
    resampled_mm: float | None,
) -> torch.Tensor:
    """Changes of line integrals (B, views, detectors) -> changes of HU (B, H, W)."""
    mu = fbp(lines, scanner.geometry, tuple(shape), pixel_mm, kernel, resampled_mm)
    return mu * (1000 / (scanner.mu_water_per_mm - scanner.mu_air_per_mm))


# ---------------------------------------------------------------- motion

MOTION_MM, MOTION_DEG = 4.0, 4.0  # at severity 1: the skull blurs into the brain, the scan would be repeated
MOVE_BETWEEN = (0.25, 0.75)  # of the scan, the middle of the move: at its ends it would change little
MOVE_LASTS = (0.02, 0.5)  # of the scan: from a jerk to a slow drift
PIXEL_DETECTORS = 3  # rays for a pixel's width are enough for an image that has no more detail


def motion(hu: torch.Tensor, severity: float, seeds: Sequence[int], pixel_mm: float) -> torch.Tensor:
    """A rigid move in the plane during the scan: what it adds to hu (B, H, W) HU.

    At severity 1 the head ends 4 mm away and turned by 4 degrees about the centre of the image; when it
    moves, where to, and how fast is drawn. All that is in the image moves."""
    scanner = fitted(SCANNER, pixel_mm)
    coarser = max(1, int(pixel_mm / (PIXEL_DETECTORS * scanner.geometry.pitch_mm)))
    geometry = scanner.geometry._replace(pitch_mm=scanner.geometry.pitch_mm * coarser)
    scanner = scanner._replace(geometry=geometry)
    lines = project(to_attenuation(hu, scanner), pixel_mm, geometry)
    changes = []
    for one, seed in zip(lines, seeds, strict=True):
        rng = np.random.default_rng((seed, 1))
        middle, lasts = rng.uniform(*MOVE_BETWEEN), math.exp(rng.uniform(*np.log(MOVE_LASTS)))
        first_view, direction = rng.uniform(), rng.uniform(0, 2 * math.pi)
        turn = severity * math.radians(MOTION_DEG) * rng.choice((-1, 1))
        # rays of parallel beams are the same half a turn later: a scan may begin at any view
        time = (torch.arange(geometry.views, dtype=torch.float64) / geometry.views - first_view) % 1
        done = ((time - middle) / lasts + 0.5).clamp(0, 1)
        done = done**2 * (3 - 2 * done)
        shift = severity * MOTION_MM * torch.tensor([math.cos(direction), math.sin(direction)])
        changes.append(moved(one, geometry, done[:, None] * shift, done * turn) - one)
    # The image has its kernel's blur already: a second one would leave its edges where they were. But finer
    # detail than pixels hold, which comes of interpolation, would make a pattern
    return _reconstructed(torch.stack(changes), scanner, hu.shape[1:], pixel_mm, "ram-lak", pixel_mm)


def moved(
    lines: torch.Tensor, geometry: Geometry, shift_mm: torch.Tensor, turn: torch.Tensor
) -> torch.Tensor:
    """The line integrals of a head in another place at every view, exact for parallel beams.

    lines: (views, detectors). shift_mm: (views, 2) along x and y, after a turn about the centre. turn:
    (views,) in radians, from x to y."""
    views, count = lines.shape
    place = torch.arange(views) - turn.cpu() * (views / math.pi)
    reach = math.ceil(abs(turn).max().item() * views / math.pi) + 1
    # half a turn on the same rays are measured from the other side
    around = torch.cat([lines[-reach:].flip(1), lines, lines[:reach].flip(1)])
    left = place.floor().long()
    share = (place - left).to(lines)[:, None]
    left = (left + reach).to(lines.device)
    turned = torch.lerp(around[left], around[left + 1], share)
    angles = geometry.angles()
    pixels = (shift_mm[:, 0] * angles.cos() + shift_mm[:, 1] * angles.sin()) / geometry.pitch_mm
    length = 2 ** math.ceil(math.log2(count + 2 * abs(pixels).max().item() + 1))
    phase = -2 * math.pi * torch.fft.rfftfreq(length, dtype=torch.float64) * pixels[:, None]
    delay = torch.polar(torch.ones_like(phase), phase).to(lines.device, torch.complex64)
    return torch.fft.irfft(torch.fft.rfft(turned, length) * delay, length)[:, :count]


# ---------------------------------------------------------------- rings

ELEMENT_MM = 0.6  # width of a detector at the centre of rotation; errors belong to whole detectors
RING_ERROR = 0.04  # of a bad detector's signal, at severity 1: rings of 20 to 60 HU
SMALL_ERROR = 0.05  # of all other detectors (SD), relative to that: what a calibration leaves
BAD_PLACES, BAD_RUN = (
    (4, 9),
    (1, 3),
)  # from, to: how many in a head's width, and neighbours that fail together
LEAST_RADIUS_MM = 10.0  # nearer the centre a detector makes a blot rather than a ring
DRIFTING, DRIFT_LASTS = (
    0.5,
    0.3,
)  # share of bad places whose error comes up during the scan, and how long that is


def rings(hu: torch.Tensor, severity: float, seeds: Sequence[int], pixel_mm: float) -> torch.Tensor:
    """Detectors whose gain is wrong: circles about the centre of rotation, to be added to hu (B, H, W) HU.

    At severity 1 bad detectors read up to 4 % too much or too little, and all others 0.2 % (SD). Some
    drift, so that their rings fade along the circle."""
    scanner = fitted(SCANNER, pixel_mm)
    geometry = scanner.geometry
    count = geometry.covering(*hu.shape[1:], pixel_mm)
    element = max(1, round(ELEMENT_MM / geometry.pitch_mm))
    wide = 2 * int(HEAD_RADIUS_MM / geometry.pitch_mm / element)  # detectors that see a head
    time = np.arange(2 * geometry.views) / (2 * geometry.views)
    changes = []
    for seed in seeds:
        rng = np.random.default_rng((seed, 2))
        error = np.tile(SMALL_ERROR * rng.standard_normal(wide), (2 * geometry.views, 1))
        for _ in range(rng.integers(*BAD_PLACES, endpoint=True)):
            place = rng.uniform(LEAST_RADIUS_MM, HEAD_RADIUS_MM) * rng.choice((-1, 1))
            first = int(wide / 2 + place / (element * geometry.pitch_mm))
            size = rng.uniform(0.6, 1) * rng.choice((-1, 1))
            begins = rng.uniform(0, 1 - DRIFT_LASTS) if rng.uniform() < DRIFTING else -DRIFT_LASTS
            grown = ((time - begins) / DRIFT_LASTS).clip(0, 1)
            error[:, first : first + rng.integers(*BAD_RUN, endpoint=True)] += size * grown[:, None]
        gains = torch.from_numpy(severity * RING_ERROR * error).float().repeat_interleave(element, 1)
        changes.append(gain_change(_centred(gains, count)))
    lines = torch.stack(changes).to(hu.device)
    return _reconstructed(
        lines, scanner, hu.shape[1:], pixel_mm, scanner.kernel, scanner.resampled_mm(pixel_mm)
    )


def gain_change(gains: torch.Tensor) -> torch.Tensor:
    """Change of the line integrals in a scan of a whole turn, of which a ray is measured from either side.

    gains: (2 views, detectors) logarithm of how much too strong a detector's signal is. Returns (views,
    detectors): a detector that is wrong at a distance from the centre makes a circle of that radius."""
    there, back = gains.chunk(2)
    return -(there + back.flip(1)) / 2


def _centred(values: torch.Tensor, count: int) -> torch.Tensor:
    """Cut or pad the last axis to count, keeping the middle; half a step is given away to the left."""
    missing = count - values.shape[-1]
    return F.pad(values, (missing // 2, missing - missing // 2))


# ---------------------------------------------------------------- starvation

METAL_PER_MM = 0.65  # attenuation of steel at 70 keV, NIST XCOM
METAL_MM = 5.0  # diameter of the pieces at severity 1: clips, screws, electrodes
METAL_APART_DEG = (90.0, 180.0)  # the two of them, seen from the middle of the head
BONE_HU = 300.0  # metal sits on the skull; where there is none, on the skin
SCATTER = 0.02  # photons that reach a ray behind metal from beside it, of those behind the head alone


def starvation(hu: torch.Tensor, severity: float, seeds: Sequence[int], pixel_mm: float) -> torch.Tensor:
    """Two pieces of metal on the skull, to be added with their streaks to hu (B, H, W) HU.

    At severity 1 they are 5 mm wide. Behind both of them hardly a photon is left but scattered ones: noise
    along the rays and a dark band between the pieces. A slice without a head stays as it is."""
    scanner = fitted(SCANNER, pixel_mm)
    geometry = scanner.geometry
    lines = line_integrals(to_attenuation(hu, scanner), pixel_mm, geometry).cpu()
    open_beam = flux(scanner, lines.shape[-1]).double() * scanner.merged
    offsets, angles = geometry.offsets_mm(lines.shape[-1]), geometry.angles()[:, None]
    changes = torch.zeros(lines.shape)
    for image, behind, change, seed in zip(hu.cpu().numpy(), lines, changes, seeds, strict=True):
        rng = np.random.default_rng((seed, 3))
        first = rng.uniform(0, 2 * math.pi)
        second = first + math.radians(rng.uniform(*METAL_APART_DEG)) * rng.choice((-1, 1))
        metal = torch.zeros(lines.shape[1:], dtype=torch.float64)
        for x, y in _on_the_skull(image, (first, second), pixel_mm):
            aside = offsets - (x * angles.cos() + y * angles.sin())
            within = ((severity * METAL_MM / 2) ** 2 - aside**2).clamp_min(0)
            metal += 2 * within.sqrt() * METAL_PER_MM
        hit = metal > 0
        photons = (open_beam * torch.exp(-behind))[hit].numpy()
        change[hit] = torch.from_numpy(
            _starved(photons, torch.exp(-metal[hit]).numpy(), scanner, rng)
        ).float()
    return _reconstructed(
        changes.to(hu.device), scanner, hu.shape[1:], pixel_mm, scanner.kernel, scanner.resampled_mm(pixel_mm)
    )


def _starved(
    photons: np.ndarray, share: np.ndarray, scanner: Scanner, rng: np.random.Generator
) -> np.ndarray:
    """Change of line integrals (N,) where only a share of the photons (N,) passes the metal.

    Those that pass and those that do not are independent Poisson numbers, so the noise that the scan has
    already is not added again."""
    passed, lost = rng.poisson(photons * share), rng.poisson(photons * (1 - share))
    scattered = rng.poisson(SCATTER * photons * (1 - share))
    missing = np.sqrt(1 - share**2) * scanner.electronic_sd * math.sqrt(scanner.merged)
    measured = passed + scattered + missing * rng.standard_normal(share.shape)
    return np.log(np.maximum(passed + lost, LEAST_COUNT) / np.maximum(measured, LEAST_COUNT))


def _on_the_skull(
    image: np.ndarray, directions: Sequence[float], pixel_mm: float
) -> list[tuple[float, float]]:
    """(x, y) mm of the outermost bone of a head in each direction, of the skin where there is no bone."""
    head = head_mask(image[None], (pixel_mm, pixel_mm, pixel_mm))[0]
    if not head.any():
        return []
    kind = head * (1 + (image > BONE_HU))  # 2 is bone
    row, column = (places.mean() for places in np.nonzero(head))
    steps = np.arange(0, math.hypot(*image.shape), 0.5)
    places = []
    for direction in directions:
        line = np.array([row + steps * math.sin(direction), column + steps * math.cos(direction)])
        passed = ndimage.map_coordinates(kind, line, order=0)
        outermost = line[:, np.flatnonzero(passed == passed.max())[-1]]
        y, x = (outermost - (np.array(image.shape) - 1) / 2) * pixel_mm
        places.append((x, y))
    return places


# ---------------------------------------------------------------- every artifact by its name

Artifact = Callable[[torch.Tensor, float, Sequence[int], float], torch.Tensor]


def _artifact(*parts: Artifact) -> Artifact:
    def added(hu: torch.Tensor, severity: float, seeds: Sequence[int], pixel_mm: float) -> torch.Tensor:
        check_severity(severity)
        check_pixel(pixel_mm)
        if hu.ndim != 4 or hu.shape[1] != 1 or len(seeds) != len(hu):
            raise ValueError(
                f"slices of shape {tuple(hu.shape)} with {len(seeds)} seeds: must be (B, 1, H, W) and B"
            )
        out = hu.clone()
        rays = SCANNER.geometry.views * SCANNER.geometry.covering(*hu.shape[-2:], pixel_mm)
        for some in torch.arange(len(hu)).split(max(1, RAYS_AT_ONCE // rays)):
            some_seeds = [seeds[place] for place in some]
            for part in parts:
                out[some, 0] += part(hu[some, 0], severity, some_seeds, pixel_mm)
        return out

    return added


def check_severity(severity: float) -> None:
    """Raise ValueError unless a severity is in (0, 1]."""
    if not (math.isfinite(severity) and 0 < severity <= 1):
        raise ValueError(f"severity {severity:g}: must be in (0, 1]")


# name -> (hu (B, 1, H, W), severity, seeds, pixel_mm) -> HU
ARTIFACTS: dict[str, Artifact] = {
    "motion": _artifact(motion),
    "rings": _artifact(rings),
    "starvation": _artifact(starvation),
    "combined": _artifact(motion, rings, starvation),
}
