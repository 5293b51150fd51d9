"""What a low-dose or denoised head CT keeps of what is read in it. Arrays in, numbers out.

Contrast of lesions, error of each tissue, noise and its power spectrum, sharpness of edges, and how well a
model observer finds a faint bleed or infarct. RMSE and PSNR reward a smooth image, which may have lost the
lesion; these numbers show it. What cannot be computed is NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import norm

import anatomy
from intervals import bootstrap_auc, bootstrap_sums
from metrics import auc

INFARCT = 1 + anatomy.LESION_CLASSES.index("ischemia")  # in a mask
BLOOD = tuple(range(1, INFARCT))  # the classes before it

# ---------------------------------------------------------------- lesions

RING_MM = (2.0, 8.0)  # from the lesion: beyond its blurred edge, still the same tissue
FEWEST_RING_PX = 12  # the SD of fewer pixels is off by more than 20 %


class LesionContrasts(NamedTuple):
    """A row for each lesion class in each slice that holds it, (L,) each; see lesion_contrasts."""

    slice_of: np.ndarray  # int, which of the images
    lesion: np.ndarray  # int, mask class
    pixels: np.ndarray  # int, of the lesion that were measured
    contrast_hu: np.ndarray  # lesion minus ring: blood above 0, infarct below
    reference_hu: np.ndarray  # the same in the reference
    noise_hu: np.ndarray  # SD of image - reference in the ring


def lesion_contrasts(
    images: np.ndarray, reference: np.ndarray, lesions: np.ndarray, classes: np.ndarray, pixel_mm: float
) -> LesionContrasts:
    """Mean HU of each lesion minus that of the brain around it, in image and reference.

    images, reference: (N, H, W) HU. lesions: (N, H, W) mask classes, 1 to 6. classes: (N, H, W) of
    anatomy.TISSUES, of the reference. The ring is brain RING_MM from the lesion, without any other lesion.
    What lies at the skull counts for neither, as blurred bone would pass for blood. A lesion with nothing
    left, or with fewer than FEWEST_RING_PX pixels of ring, is left out."""
    rows = []
    reach = math.ceil(RING_MM[1] / pixel_mm) + 1
    deep = _deep(np.isin(classes, (anatomy.TISSUES["csf"], anatomy.TISSUES["brain"])), pixel_mm)
    for number in np.flatnonzero((lesions > 0).any(axis=(1, 2))):
        for kind in np.intersect1d(lesions[number], (*BLOOD, INFARCT)):
            where = np.argwhere(lesions[number] == kind)
            low, high = (where.min(axis=0) - reach).clip(0), where.max(axis=0) + reach + 1
            box = (number, slice(low[0], high[0]), slice(low[1], high[1]))
            lesion = lesions[box] == kind
            distance = ndimage.distance_transform_edt(~lesion, sampling=pixel_mm)
            ring = (distance >= RING_MM[0]) & (distance <= RING_MM[1]) & deep[box] & (lesions[box] == 0)
            ring &= classes[box] == anatomy.TISSUES["brain"]
            lesion &= deep[box]
            if not lesion.any() or np.count_nonzero(ring) < FEWEST_RING_PX:
                continue
            image, truth = images[box].astype(np.float64), reference[box].astype(np.float64)
            contrasts = (one[lesion].mean() - one[ring].mean() for one in (image, truth))
            rows.append(
                (number, kind, np.count_nonzero(lesion), *contrasts, (image - truth)[ring].std(ddof=1))
            )
    columns = np.array(rows, np.float64).reshape(-1, len(LesionContrasts._fields)).T
    return LesionContrasts(*columns[:3].astype(int), *columns[3:])


def contrast_kept(found: LesionContrasts, kinds: Sequence[int]) -> float:
    """How much of the contrast of lesions of these classes is left: 1 all, 0 none, below 0 inverted.

    The slope of contrast_hu on reference_hu through 0, weighted by area: unlike a mean of ratios it stands
    lesions of nearly no contrast, and noise does not bias it, as the reference has none."""
    own = np.isin(found.lesion, kinds)
    weight = found.pixels[own] * found.reference_hu[own]
    total = weight @ found.reference_hu[own]
    return float(weight @ found.contrast_hu[own] / total) if total else math.nan


def contrast_to_noise(found: LesionContrasts, kinds: Sequence[int]) -> float:
    """Contrast to noise ratio of lesions of these classes, weighted by area; NaN without noise.

    Contrast counts in the direction of the reference, so that a visible infarct is above 0 as blood is."""
    own = np.isin(found.lesion, kinds)
    weight = found.pixels[own]
    noise = math.sqrt(weight @ np.square(found.noise_hu[own]))
    contrast = weight @ (found.contrast_hu[own] * np.sign(found.reference_hu[own]))
    return float(contrast / (noise * math.sqrt(weight.sum()))) if noise else math.nan


def _deep(inside: np.ndarray, pixel_mm: float) -> np.ndarray:
    """(N, H, W) bool: what lies anatomy.EDGE_DEPTH_MM within inside, where little of a blurred skull is."""
    side = 2 * math.ceil(anatomy.EDGE_DEPTH_MM / pixel_mm) + 1
    return ndimage.minimum_filter(inside.astype(np.uint8), (1, side, side), mode="nearest") > 0


# ---------------------------------------------------------------- tissues and noise


def tissue_errors(images: np.ndarray, reference: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """rmse_<tissue>_hu and bias_<tissue>_hu over all voxels of each of anatomy.TISSUES; NaN where none is.

    images, reference: (N, H, W) HU. classes: (N, H, W) of anatomy.TISSUES. The bias is the mean error."""
    error = (images.astype(np.float64) - reference).ravel()
    where, size = classes.ravel(), len(anatomy.TISSUES)
    with np.errstate(invalid="ignore"):
        count = np.bincount(where, minlength=size)
        bias = np.bincount(where, error, size) / count
        rmse = np.sqrt(np.bincount(where, np.square(error), size) / count)
    return {
        f"{name}_{tissue}_hu": float(values[number])
        for name, values in (("rmse", rmse), ("bias", bias))
        for tissue, number in anatomy.TISSUES.items()
    }


# At pixels of 1.8 mm nine in ten of those within brain have less, and most of those along CSF more
BRAIN_EDGE_HU_PER_MM = 3.0


def flat_tissue(reference: np.ndarray, inside: np.ndarray, pixel_mm: float) -> np.ndarray:
    """(N, H, W) bool: the part of inside without edges of the reference and away from the skull.

    There an error is noise and not a blurred edge. reference: (N, H, W) HU; inside: (N, H, W) bool."""
    flat = np.zeros(inside.shape, bool)
    rows, columns = _gradients(reference.astype(np.float32), pixel_mm)
    flat[:, 1:-1, 1:-1] = rows**2 + columns**2 < BRAIN_EDGE_HU_PER_MM**2
    return flat & _deep(inside, pixel_mm)


LOCAL_MM = 15.0  # a shift wider than this is bias; the grain of CT noise, denoised or not, is much finer


def noise_sd(images: np.ndarray, reference: np.ndarray, inside: np.ndarray, pixel_mm: float) -> float:
    """SD in HU of image - reference inside the mask, after its mean over LOCAL_MM is taken out.

    images, reference: (N, H, W) HU; inside: (N, H, W) bool, best of flat_tissue. Without the local mean, as
    HU that are off in a whole tissue or slice are bias and not noise; exact for white noise. Against the
    truth, fine structure that a denoiser took away counts as noise; between two images of the same slices
    with noise of their own, divided by sqrt(2), it is noise alone."""
    weight = inside.astype(np.float32)
    error = np.where(inside, images - reference, 0).astype(np.float32)
    size = (1, *2 * [round(LOCAL_MM / pixel_mm) | 1])
    near = ndimage.uniform_filter(weight, size, mode="constant")[inside].clip(1e-6)
    rest = error[inside] - ndimage.uniform_filter(error, size, mode="constant")[inside] / near
    # a mean of n pixels takes 1 / n of the variance of white noise with it
    free = (1 - 1 / (near.astype(np.float64) * math.prod(size))).clip(0).sum()
    return math.sqrt(np.square(rest, dtype=np.float64).sum() / free) if free > 0.5 else math.nan


# ---------------------------------------------------------------- noise power spectrum

BLOCK_MM = 30.0  # the lowest frequency is 1 / 30 per mm; larger blocks rarely fit into the brain


class Spectrum(NamedTuple):
    """Noise power by radial frequency, (K,) each, from 0 to the corner of the frequency plane."""

    frequencies: np.ndarray  # per mm
    power: np.ndarray  # HU^2 mm^2, mean over the cells of a ring; NaN where no block lies inside
    cells: np.ndarray  # how many cells of the plane a ring has
    blocks: int  # that were averaged

    def variance_hu2(self) -> float:
        """The integral of the power over the plane: the variance of the noise within a block."""
        return float(self.power @ self.cells * self.frequencies[1] ** 2)


def noise_power_spectrum(
    noise: np.ndarray, inside: np.ndarray, pixel_mm: float, block_px: int | None = None
) -> Spectrum:
    """Mean over the blocks that lie wholly inside the mask, each without its mean.

    noise: (N, H, W) HU, image - truth, or the difference of two realisations over sqrt(2). inside: (N, H, W)
    bool. pixel_mm: of all slices; of a set of scans the mean. block_px: pixels a side, at least 2; by default
    BLOCK_MM. White noise has its variance times the area of a pixel at all frequencies above 0. Source:
    Siewerdsen, Cunningham & Jaffray 2002; no window, as CT noise has no power near frequency 0 to leak."""
    size = block_px or max(round(BLOCK_MM / pixel_mm), 2)

    def blocks(images: np.ndarray) -> np.ndarray:
        count, rows, columns = images.shape
        cut = images[:, : rows - rows % size, : columns - columns % size]
        cut = cut.reshape(count, rows // size, size, columns // size, size)
        return cut.transpose(0, 1, 3, 2, 4).reshape(-1, size, size)

    chosen = blocks(noise)[blocks(inside).all((1, 2))].astype(np.float64)
    chosen = chosen - chosen.mean((1, 2), keepdims=True)
    power = np.square(np.abs(np.fft.fft2(chosen))).sum(0) * (pixel_mm / size) ** 2
    step = np.fft.fftfreq(size) * size
    ring = np.hypot(step[:, None], step).round().astype(int).ravel()
    cells = np.bincount(ring)
    mean = np.bincount(ring, power.ravel()) / cells / (len(chosen) or math.nan)
    return Spectrum(np.arange(len(cells)) / (size * pixel_mm), mean, cells, len(chosen))


def spectrum_distance(one: Spectrum, other: Spectrum) -> float:
    """Share of noise power that lies at another radial frequency: 0 for the same texture, 1 for none.

    From the lowest frequency above 0 to Nyquist's; both of the same blocks. How strong the noise is does not
    matter."""
    shares = []
    for spectrum in (one, other):
        nyquist = math.isqrt(spectrum.cells.sum()) // 2
        power = (spectrum.power * spectrum.cells)[1 : nyquist + 1]
        shares.append(power / power.sum())
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


# ---------------------------------------------------------------- edges

SKULL_EDGE_HU_PER_MM = 50.0  # the inner table has hundreds of HU in a pixel or two


def edge_sharpness(
    images: np.ndarray, reference: np.ndarray, inside: np.ndarray, pixel_mm: float
) -> dict[str, float]:
    """How much of the gradient of true edges is left: edge_sharpness_brain and edge_sharpness_skull.

    images, reference: (N, H, W) HU; inside: (N, H, W) bool, the brain. 1: as sharp as the reference, below
    1 blurred. brain: edges of ventricles, cisterns and lesions within the mask; skull: its inner table, just
    outside. They are apart, since a skull has ten times the gradient. Each is the slope of the image's
    gradient, along the direction of the reference's, on the size of the latter. Noise does not bias it, as
    edges, direction and size come from the noise-free reference alone."""
    deep = _deep(inside, pixel_mm)
    around = ~_deep(~inside, pixel_mm) & ~inside
    truth = _gradients(reference.astype(np.float32), pixel_mm)
    size2 = truth[0] ** 2 + truth[1] ** 2
    found = {}
    for name, place, least in (
        ("brain", deep, BRAIN_EDGE_HU_PER_MM),
        ("skull", around, SKULL_EDGE_HU_PER_MM),
    ):
        edges = np.nonzero(place[:, 1:-1, 1:-1] & (size2 >= least**2))
        across = _gradients(images, pixel_mm, edges)
        along = across[0] @ truth[0][edges].astype(np.float64) + across[1] @ truth[1][edges]
        total = size2[edges].sum(dtype=np.float64)
        found[f"edge_sharpness_{name}"] = float(along / total) if total else math.nan
    return found


def _gradients(
    images: np.ndarray, pixel_mm: float, at: tuple[np.ndarray, ...] = (...,)
) -> tuple[np.ndarray, np.ndarray]:
    """Central differences of (N, H, W) along rows and columns in HU per mm, without the border; at: some."""
    pairs = ((images[:, 2:, 1:-1], images[:, :-2, 1:-1]), (images[:, 1:-1, 2:], images[:, 1:-1, :-2]))
    return tuple((after[at] - before[at]) / np.float32(2 * pixel_mm) for after, before in pairs)


# ---------------------------------------------------------------- one row of a study


def quality_of_patients(
    images: np.ndarray,
    reference: np.ndarray,
    lesions: np.ndarray | None,
    inside: np.ndarray,
    classes: np.ndarray,
    patients: np.ndarray,
    pixel_mm: np.ndarray | float,
) -> dict[str, np.ndarray]:
    """All figures of each patient, name -> (patients,) in order of id; NaN where a patient has none.

    images, reference: (N, H, W) HU. lesions: (N, H, W) mask classes, or None where no masks are known.
    inside: (N, H, W) bool, brain. classes: (N, H, W) of anatomy.TISSUES. patients: (N,). pixel_mm: of all, or
    (N,). The slices of a patient must come together; results of several calls can be put end to end.

    rmse_ and bias_<tissue>_hu, noise_sd_hu, edge_sharpness_brain, edge_sharpness_skull, and for blood and
    infarct contrast_kept_ and cnr_."""
    patients = np.asarray(patients)
    pixels = np.broadcast_to(np.asarray(pixel_mm, np.float64), len(patients))
    found: dict[str, list[float]] = {}
    for patient in np.unique(patients):
        rows = np.flatnonzero(patients == patient)
        if rows[-1] - rows[0] + 1 == len(rows):
            rows = slice(rows[0], rows[-1] + 1)  # a view: nothing is copied
        image, truth, brain, tissue = (values[rows] for values in (images, reference, inside, classes))
        # scans of one patient differ in their pixels by a few per cent: less than what is made of them here
        side = float(pixels[rows].mean())
        own = tissue_errors(image, truth, tissue)
        own["noise_sd_hu"] = noise_sd(image, truth, flat_tissue(truth, brain, side), side)
        own |= edge_sharpness(image, truth, brain, side)
        lesion = np.zeros(image.shape, np.uint8) if lesions is None else lesions[rows]
        contrasts = lesion_contrasts(image, truth, lesion, tissue, side)
        for name, kinds in (("blood", BLOOD), ("infarct", (INFARCT,))):
            own[f"contrast_kept_{name}"] = contrast_kept(contrasts, kinds)
            own[f"cnr_{name}"] = contrast_to_noise(contrasts, kinds)
        for name, value in own.items():
            found.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in found.items()}


# ---------------------------------------------------------------- a model observer


class Signal(NamedTuple):
    """A faint disk."""

    diameter_mm: float
    contrast_hu: float


SIGNALS = {
    "bleed": Signal(
        8.0, 10.0
    ),  # a quarter of a millilitre, half diluted: fresh blood has 30 HU more than brain
    "infarct": Signal(12.0, -5.0),  # a lacune is below 15 mm; 2 % more water, as in the first hours
}
EDGE_MM = 1.0  # SD of the edge of a signal: the blur of a standard head kernel and of the slice's thickness
PATCH_MM = 28.0  # across the disk that the observer looks at: the largest signal and 8 mm of brain around it
CLEAR_MM = 2.0  # between the edge of a signal and the nearest CSF, bone or lesion
PLACES_PER_SLICE = 3  # the two hemispheres and a spare; more would crowd into each other's patches
# The dense channels of Abbey & Barrett 2001: 0.005 per pixel, 1.4 and 1.67. A pixel is 0.49 mm, as in a head
# scan of 512 x 512. They reach from 0.01 to 0.35 per mm, where a standard kernel has lost half its contrast.
CHANNELS = 10
LOWEST_PER_MM = 0.005 / 0.49
CHANNEL_RATIO = 1.4
CHANNEL_WIDTH = 1.67


def dog_channels(pixel_mm: float) -> np.ndarray:
    """Dense difference-of-Gaussians channels, (CHANNELS, side, side), each of sum 0 and of norm 1 in mm.

    side: PATCH_MM in pixels, odd. In frequency a channel is exp(-(f / QS)^2 / 2) - exp(-(f / S)^2 / 2), Q
    CHANNEL_WIDTH and S LOWEST_PER_MM times a power of CHANNEL_RATIO; here its transform, cut off by the disk
    within the patch. Without its sum, as the level of the brain around a signal says nothing."""
    side = 2 * _half_patch(pixel_mm) + 1
    distance2 = np.square((np.arange(side) - side // 2) * pixel_mm)
    distance2 = distance2[:, None] + distance2
    disk = distance2 <= (side / 2 * pixel_mm) ** 2
    channels = []
    for number in range(CHANNELS):
        narrow = LOWEST_PER_MM * CHANNEL_RATIO**number
        wide, thin = (
            w * w * np.exp(-2 * (math.pi * w) ** 2 * distance2) for w in (CHANNEL_WIDTH * narrow, narrow)
        )
        channel = wide - thin
        channel = (channel - channel[disk].mean()) * disk
        channels.append(channel / (np.linalg.norm(channel) * pixel_mm))
    return np.array(channels)


def _half_patch(pixel_mm: float) -> int:
    return round(PATCH_MM / 2 / pixel_mm)


def signal_places(
    inside: np.ndarray, classes: np.ndarray, lesions: np.ndarray | None, pixel_mm: float
) -> np.ndarray:
    """Where signals go: (M, 3) int of slice, row, column; at most PLACES_PER_SLICE in a slice.

    inside: (N, H, W) bool, brain; classes: (N, H, W) of anatomy.TISSUES; lesions: (N, H, W) or None; all of
    the truth, so that places do not depend on dose. In each slice those deepest in brain tissue without
    lesion or CSF, such that the largest of SIGNALS has CLEAR_MM around it, the observer sees no skull, and
    patches neither overlap nor leave the picture. The same input gives the same places."""
    free = inside & (classes == anatomy.TISSUES["brain"])
    if lesions is not None:
        free &= lesions == 0
    soft = np.isin(classes, (anatomy.TISSUES["csf"], anatomy.TISSUES["brain"]))
    half = _half_patch(pixel_mm)
    least = max(signal.diameter_mm for signal in SIGNALS.values()) / 2 + CLEAR_MM
    places = []
    for number in np.flatnonzero(free.any(axis=(1, 2))):
        depth = _depth_mm(free[number], pixel_mm)
        depth[_depth_mm(soft[number], pixel_mm) < PATCH_MM / 2 + CLEAR_MM] = 0
        for edge in (depth[:half], depth[-half:], depth[:, :half], depth[:, -half:]):
            edge[:] = 0
        for _ in range(PLACES_PER_SLICE):
            row, column = np.unravel_index(depth.argmax(), depth.shape)
            if depth[row, column] < least:
                break
            places.append((number, row, column))
            taken = (slice(max(at - 2 * half, 0), at + 2 * half + 1) for at in (row, column))
            depth[tuple(taken)] = 0
    return np.array(places, int).reshape(-1, 3)


def _depth_mm(mask: np.ndarray, pixel_mm: float) -> np.ndarray:
    """Distance of each pixel (H, W) to the nearest outside the mask; the border of the picture is outside."""
    return ndimage.distance_transform_edt(np.pad(mask, 1), sampling=pixel_mm)[1:-1, 1:-1]


def _around(places: np.ndarray, half: int, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Indices into (N, H, W) of the squares around places, each (M, 2 half + 1, 2 half + 1) by broadcast."""
    grid = np.arange(-half, half + 1)
    number, row, column = (places[:, axis, None, None] for axis in range(3))
    rows, columns = row + grid[:, None], column + grid
    if any(((at < 0) | (at >= size)).any() for at, size in ((rows, shape[1]), (columns, shape[2]))):
        raise ValueError("places: a patch leaves the picture (take those of signal_places)")
    return number, rows, columns


def insert_signals(images: np.ndarray, places: np.ndarray, signal: Signal, pixel_mm: float) -> np.ndarray:
    """A copy of images (N, H, W) HU with the signal added at places (M, 3) of signal_places; float32.

    A disk with the edge of a normal distribution of SD EDGE_MM, added after the noise: 10 HU over 8 mm take
    0.2 % of the photons of a ray, which changes the SD of its noise by 0.1 %; so one noise serves with and
    without signal. Raises ValueError for a place too near the border."""
    half = math.ceil((signal.diameter_mm / 2 + 3 * EDGE_MM) / pixel_mm)  # 0.1 % is left
    distance = np.arange(-half, half + 1) * pixel_mm
    distance = np.hypot(distance[:, None], distance)
    disk = signal.contrast_hu * norm.cdf((signal.diameter_mm / 2 - distance) / EDGE_MM)
    present = np.array(images, np.float32)
    present[_around(places, half, images.shape)] += disk.astype(np.float32)
    return present


def channel_outputs(
    images: np.ndarray, places: np.ndarray, channels: np.ndarray, pixel_mm: float
) -> np.ndarray:
    """What each channel sees at each place, (M, C) float64.

    images: (N, H, W) HU; places: (M, 3) of signal_places; channels: (C, side, side) of dog_channels. Outputs
    are integrals over mm, so that scans with different pixels can be put end to end. Of images minus truth
    (without signal, in both) the observer knows the background, and what limits it is noise and what a
    denoiser does wrong; of the images themselves anatomy limits it as well. Raises ValueError for a place too
    near the border."""
    patches = images[_around(places, channels.shape[-1] // 2, images.shape)].astype(np.float64)
    return (
        patches.reshape(len(places), channels[0].size) @ channels.reshape(len(channels), -1).T * pixel_mm**2
    )


class Detectability(NamedTuple):
    """How well the observer tells present from absent, with intervals of 95 % over patients."""

    d_prime: float
    d_low: float
    d_high: float
    auc: float
    auc_low: float
    auc_high: float
    places: int


# Per channel, in each half. With as many the template loses a tenth of d', with ten times as many a
# hundredth: Reed, Mallett & Brennan 1974.
TRAINING_PLACES = 5
SMALLEST_SHARE = 1e-10  # of the largest eigenvalue: below it channels are the same but for rounding


def hotelling(present: np.ndarray, absent: np.ndarray, patients: np.ndarray, *, seed: int) -> Detectability:
    """Channelised Hotelling observer on the outputs of the same places with and without signal.

    present, absent: (M, C) of channel_outputs; patients: (M,) whose place it is; seed: of the bootstrap. The
    template K^-1 (mean difference), K the mean covariance of both, is trained on one half of the patients and
    applied to the other, both ways: on its own data it would look better than it is. Scores are in SD of the
    training half about its middle, so that both halves make one set; d' is the difference of means over the
    root of the mean variance. All NaN where a half has fewer than TRAINING_PLACES per channel, or no signal.
    Templates stand still in the bootstrap. Source: Barrett & Myers 2004, chapter 13."""
    _, owners = np.unique(np.asarray(patients), return_inverse=True)
    second = owners % 2 == 1
    unknown = Detectability(*6 * [math.nan], len(owners))
    if min(second.sum(), (~second).sum()) < TRAINING_PLACES * present.shape[1]:
        return unknown
    scores = np.empty((2, len(owners)))
    for training in (second, ~second):
        means = present[training].mean(0), absent[training].mean(0)
        noise = (np.cov(present[training], rowvar=False) + np.cov(absent[training], rowvar=False)) / 2
        template = np.linalg.pinv(noise, rcond=SMALLEST_SHARE, hermitian=True) @ (means[0] - means[1])
        spread = math.sqrt(max(template @ noise @ template, 0))
        if spread == 0:
            return unknown
        for row, outputs in enumerate((present, absent)):
            scores[row, ~training] = (outputs[~training] - (means[0] + means[1]) / 2) @ template / spread
    moments = np.column_stack([np.ones(len(owners)), *scores, *np.square(scores)])
    targets = np.repeat([1, 0], len(owners))
    return Detectability(
        _d_prime(moments.sum(0)),
        *bootstrap_sums(moments, owners, _d_prime, seed=seed),
        auc(targets, scores.ravel()),
        *bootstrap_auc(targets, scores.ravel(), np.tile(owners, 2), seed=seed),
        len(owners),
    )


def _d_prime(sums: np.ndarray) -> float:
    """From the sums of 1, score present, score absent, and their squares."""
    present, absent, present2, absent2 = sums[1:] / sums[0]
    variance = (present2 - present**2 + absent2 - absent**2) / 2
    return float((present - absent) / math.sqrt(variance)) if variance > 0 else math.nan
