"""Masks and noise from HU: the head, the inside of the skull, the brain, tissue classes.

Every function takes a volume (S, H, W) in HU and its spacing (slice, row, column) in mm. Masks are found
slice by slice, so that a single slice, a tilted stack and uneven gaps all work; only the choice between head
and couch looks at the whole volume. What does not exist gives an empty mask, never an error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

# Lesions in the order of their mask values, 1 to 6
LESION_CLASSES = (
    "epidural",
    "intraparenchymal",
    "intraventricular",
    "subarachnoid",
    "subdural",
    "ischemia",
)

TISSUES = {"air": 0, "skin": 1, "csf": 2, "brain": 3, "bone": 4}  # skin: all soft tissue outside the skull

WORKING_PIXEL_MM = 1.0  # shapes are found on a grid of about this size: fast, and fine enough for a skull
SMOOTHING_MM = 1.0  # leaves a third or less of the noise of one pixel, and a skull of 3 mm visible
EDGE_SMOOTHING_MM = 0.5  # at full resolution: less, because every mm of blur moves the edge by about one mm
HEAD_HU = -250.0  # between air and fat
BONE_HU = 180.0  # above blood (100 HU) with noise, below the thin bone of the temple and the base
BRAIN_HU = (-15.0, 100.0)  # CSF to fresh blood, after smoothing, with room for noise
CSF_HU = 16.0  # between CSF (about 8) and white matter (about 25)
COUCH_MM = 2.5  # head rests are shells thinner than twice this
COUCH_WIDTH_MM = 250.0  # no head is as wide: rows of solid matter this long are a board under it
# Ways to close the skull, tried in turn: (bone from HU on, half width of the holes that are closed in mm,
# smallest core of a chamber in mm2). First sutures and canals, where a chamber of 20 mm counts; then the open
# base and bone thinned by partial volume, where only a whole fossa does, as a muscle or an orbit is smaller;
# at last the orbital roof and the frontal sinus, where it takes most of a brain.
CLOSINGS = ((BONE_HU, 3.0, 150.0), (BONE_HU, 8.0, 1000.0), (120.0, 8.0, 1000.0), (120.0, 16.0, 4000.0))
STRAND_MM = 2.5  # half width of what does not join two chambers: nerves and muscles through a fissure
WHOLE_INSIDE_MM2 = 15000.0  # once this much is found nothing can be missing: about the largest slices
LARGEST_HOLE_MM2 = 200.0  # a calcified plexus is smaller, the bone around the sella larger
SOFT_FRACTION = 0.75  # of a chamber; sinuses are air, orbits are fat
SOFT_HU = (-40.0, 250.0)  # at the edge, half bone at most; neither sinuses nor the fat of orbits


# ---------------------------------------------------------------- masks


def head_mask(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The head without couch and air, its cavities filled: (S, H, W) bool.

    hu: (S, H, W) HU. spacing_mm: (slice, row, column)."""
    hu = _volume(hu)
    coarse, pixel_mm = _working(hu, spacing_mm)
    solid = np.zeros(coarse.shape, bool)
    core = np.zeros(coarse.shape, bool)
    for index, image in enumerate(coarse):
        smooth = ndimage.gaussian_filter(image, _in_pixels(SMOOTHING_MM, pixel_mm))
        solid[index] = _without_board(smooth > HEAD_HU, pixel_mm[1])
        core[index] = _erode(solid[index], COUCH_MM, pixel_mm)
    core = _most_tissue(core, coarse)
    for index in range(len(core)):
        grown = _dilate(core[index], COUCH_MM + pixel_mm.max(), pixel_mm)
        core[index] = ndimage.binary_fill_holes(grown & solid[index])
    return _full_size(core, hu.shape)


def intracranial_mask(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The inside of the skull: (S, H, W) bool. Where the skull is open it may be partial or empty.

    hu: (S, H, W) HU, with noise up to about 25 HU. spacing_mm: (slice, row, column)."""
    hu = _volume(hu)
    coarse, pixel_mm = _working(hu, spacing_mm)
    inside = np.zeros(coarse.shape, bool)
    for index, image in enumerate(coarse):
        solid = image > HEAD_HU
        if solid.any():  # the rest of the picture would only cost time
            box = (index, *_box(solid, margin=2))
            inside[box] = _inside_of_skull(coarse[box], pixel_mm)
    if coarse.shape == hu.shape:
        return inside
    full = _full_size(inside, hu.shape)
    pixel_mm = np.asarray(spacing_mm[1:], float)
    for index in np.flatnonzero(full.any(axis=(1, 2))):
        full[index] = _sharpen(full[index], hu[index], pixel_mm)
    return full


def brain_mask(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Soft tissue and CSF inside the skull: (S, H, W) bool.

    hu: (S, H, W) HU. spacing_mm: (slice, row, column)."""
    hu = _volume(hu)
    inside = intracranial_mask(hu, spacing_mm)
    smooth = _smooth_inside(hu, inside, spacing_mm)
    return inside & (smooth >= BRAIN_HU[0]) & (smooth <= BRAIN_HU[1])


def tissue_classes(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """A class of TISSUES per voxel: (S, H, W) uint8. Everything outside the head counts as air.

    hu: (S, H, W) HU. spacing_mm: (slice, row, column)."""
    hu = _volume(hu)
    inside = intracranial_mask(hu, spacing_mm)
    edge_mm = _in_pixels(EDGE_SMOOTHING_MM, spacing_mm[1:])
    smooth = ndimage.gaussian_filter(hu.astype(np.float32), (0, *edge_mm))
    classes = np.full(hu.shape, TISSUES["air"], np.uint8)
    head = head_mask(hu, spacing_mm) | inside
    classes[head & (smooth > HEAD_HU)] = TISSUES["skin"]
    classes[head & (smooth > BONE_HU)] = TISSUES["bone"]
    smooth = _smooth_inside(hu, inside, spacing_mm)
    soft = inside & (smooth >= BRAIN_HU[0]) & (smooth <= BONE_HU)
    classes[soft] = np.where(smooth[soft] < CSF_HU, TISSUES["csf"], TISSUES["brain"])
    return classes


def _inside_of_skull(image: np.ndarray, pixel_mm: np.ndarray) -> np.ndarray:
    """(h, w) HU on the working grid -> (h, w) bool."""
    smooth = ndimage.gaussian_filter(image, _in_pixels(SMOOTHING_MM, pixel_mm))
    sharp = ndimage.gaussian_filter(image, _in_pixels(EDGE_SMOOTHING_MM, pixel_mm))
    soft = (smooth > SOFT_HU[0]) & (sharp < SOFT_HU[1])
    solid = smooth > HEAD_HU
    sinuses = ndimage.binary_fill_holes(solid) & ~solid  # their own walls may be too thin to be seen
    inside = np.zeros(image.shape, bool)
    for bone_hu, gap, smallest_mm2 in CLOSINGS:
        bone = smooth > bone_hu
        if not bone.any() or inside.sum() * pixel_mm.prod() > WHOLE_INSIDE_MM2:
            break
        walls = _dilate(bone | sinuses, gap, pixel_mm)
        enclosed = ndimage.binary_fill_holes(walls)
        candidate = enclosed & ~walls & ~inside
        if candidate.sum() * pixel_mm.prod() < smallest_mm2:
            continue  # nothing left to find
        closed = _erode(enclosed, gap, pixel_mm)  # the skull and all that it encloses
        cores = _brain_cores(candidate & closed, smooth, smallest_mm2, pixel_mm)
        # Thicker walls and cut strands took this much from the chambers: give back what of it is soft
        reach = _dilate(cores, gap + STRAND_MM + pixel_mm.max(), pixel_mm)
        inside |= _joined(reach & closed & soft, cores)
    return _fill_small_holes(inside, pixel_mm)


def _joined(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The connected parts of mask that hold a seed: what a distance reached through bone is none."""
    parts, count = ndimage.label(mask)
    held = np.zeros(count + 1, bool)
    held[np.unique(parts[seeds])] = True
    held[0] = False
    return held[parts]


def _brain_cores(
    candidate: np.ndarray, smooth: np.ndarray, smallest_mm2: float, pixel_mm: np.ndarray
) -> np.ndarray:
    """The connected parts of candidate that are mostly soft tissue, without fat, strands and small ones."""
    parts, count = ndimage.label(candidate)
    soft = (smooth > BRAIN_HU[0]) & (smooth < BRAIN_HU[1])
    fraction = np.bincount(parts[soft], minlength=count + 1) / np.bincount(parts.ravel()).clip(1)
    fraction[0] = 0
    lean = _fill_small_holes((fraction >= SOFT_FRACTION)[parts] & (smooth > SOFT_HU[0]), pixel_mm)
    parts, _ = ndimage.label(_erode(lean, STRAND_MM, pixel_mm))
    keep = np.bincount(parts.ravel()) * pixel_mm.prod() >= smallest_mm2
    keep[0] = False
    return keep[parts]


def _fill_small_holes(mask: np.ndarray, pixel_mm: np.ndarray) -> np.ndarray:
    """Fill calcifications, vessels and noise, but neither the sella nor the fat of an orbit."""
    holes, _ = ndimage.label(~mask)
    small = np.bincount(holes.ravel()) * pixel_mm.prod() <= LARGEST_HOLE_MM2
    return mask | small[holes]


def _sharpen(mask: np.ndarray, image: np.ndarray, pixel_mm: np.ndarray) -> np.ndarray:
    """Move the edge of a mask that came from the working grid to where the bone begins at full resolution."""
    rows, columns = _box(mask, margin=4)
    mask, image, whole = mask[rows, columns], image[rows, columns], np.zeros(mask.shape, bool)
    sharp = ndimage.gaussian_filter(image.astype(np.float32), _in_pixels(EDGE_SMOOTHING_MM, pixel_mm))
    soft = (sharp > SOFT_HU[0]) & (sharp < SOFT_HU[1])
    near = ndimage.binary_dilation(mask, iterations=2)
    whole[rows, columns] = _fill_small_holes(ndimage.binary_opening(near & soft, iterations=2), pixel_mm)
    return whole


def _without_board(solid: np.ndarray, column_mm: float) -> np.ndarray:
    """Take out the rows, or parts of rows, that are solid over COUCH_WIDTH_MM."""
    length = math.ceil(COUCH_WIDTH_MM / column_mm) | 1  # odd: the two filters undo each other
    if length > solid.shape[1]:
        return solid
    runs = ndimage.minimum_filter1d(solid.astype(np.uint8), length, axis=1, mode="constant")
    runs = ndimage.maximum_filter1d(runs, length, axis=1, mode="constant")
    return solid & (runs == 0)


def _most_tissue(parts_of: np.ndarray, hu: np.ndarray) -> np.ndarray:
    """The connected part, in three dimensions, that holds most tissue denser than water."""
    parts, count = ndimage.label(parts_of, structure=np.ones((3, 3, 3)))
    if not count:
        return parts_of
    dense = np.bincount(parts[hu > 0], minlength=count + 1)
    dense[0] = 0
    return parts == np.argmax(dense) if dense.any() else np.zeros(parts_of.shape, bool)


# ---------------------------------------------------------------- grids and shapes


def _volume(hu: np.ndarray) -> np.ndarray:
    hu = np.asarray(hu)
    if hu.ndim != 3:
        raise ValueError(f"hu has shape {hu.shape}, must be (slices, rows, columns)")
    return hu


def _working(hu: np.ndarray, spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Block means on a grid of about WORKING_PIXEL_MM: ((S, h, w) float32, its (row, column) in mm)."""
    factors = [max(int(WORKING_PIXEL_MM / mm + 0.1), 1) for mm in spacing_mm[1:]]
    rows, columns = (-size % factor for size, factor in zip(hu.shape[1:], factors, strict=True))
    padded = np.pad(hu, ((0, 0), (0, rows), (0, columns)), mode="edge") if rows or columns else hu
    slices, height, width = padded.shape
    blocks = padded.reshape(slices, height // factors[0], factors[0], width // factors[1], factors[1])
    return blocks.mean(axis=(2, 4), dtype=np.float32), np.multiply(spacing_mm[1:], factors)


def _full_size(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of _working for masks."""
    factors = [-(-size // small) for size, small in zip(shape[1:], mask.shape[1:], strict=True)]
    if factors == [1, 1]:
        return mask
    return mask.repeat(factors[0], axis=1).repeat(factors[1], axis=2)[:, : shape[1], : shape[2]].copy()


def _in_pixels(mm: float, pixel_mm: np.ndarray) -> np.ndarray:
    return mm / np.asarray(pixel_mm, float)


def _smooth_inside(hu: np.ndarray, inside: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """(S, H, W) float32, smoothed with pixels inside alone, so that no bone bleeds in; 0 elsewhere."""
    sigma = np.maximum(_in_pixels(SMOOTHING_MM, spacing_mm[1:]), 1.0)  # large pixels need smoothing as well
    smooth = np.zeros(hu.shape, np.float32)
    for index in np.flatnonzero(inside.any(axis=(1, 2))):
        box = (index, *_box(inside[index], margin=0))
        weight = inside[box].astype(np.float32)
        total = ndimage.gaussian_filter(hu[box] * weight, sigma, mode="constant")
        weight = ndimage.gaussian_filter(weight, sigma, mode="constant")
        smooth[box] = np.where(inside[box], total / weight.clip(1e-6), 0)
    return smooth


def _dilate(mask: np.ndarray, mm: float, pixel_mm: np.ndarray) -> np.ndarray:
    if not mask.any():
        return mask
    return ndimage.distance_transform_edt(~mask, sampling=pixel_mm) <= mm


def _erode(mask: np.ndarray, mm: float, pixel_mm: np.ndarray) -> np.ndarray:
    """What lies deeper than mm. What touches the border of the picture goes on beyond it."""
    if mask.all():
        return mask
    return ndimage.distance_transform_edt(mask, sampling=pixel_mm) > mm


def _box(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The rows and columns that hold a non-empty mask, and margin pixels more."""
    return tuple(
        slice(max(int(hit[0]) - margin, 0), int(hit[-1]) + margin + 1)
        for hit in (np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0)))
    )


# ---------------------------------------------------------------- noise


NOISE_PATCH_MM = 5.0  # wider than the grain of CT noise, smaller than a stretch of white matter
NOISE_PATCH_PX = 5  # at least: fewer pixels give no useful SD
NOISE_LAG_MM = 2.2  # CT noise at this distance is nearly independent, while anatomy is still nearly straight
EDGE_DEPTH_MM = 2.0  # from the edge of the brain to the patch: sulci and the blur of the skull
NOISE_SLICES = 12  # evenly spaced through the volume; more change nothing but the time it takes
FEWEST_PATCHES = 100  # fewer say nothing about what is usual
# The most frequent SD is a little below the true one: the SD of few pixels is skewed, and a patch misses the
# coarsest grain. Measured: 0.97 to 1.00 for white noise, 0.94 to 0.98 for that of dose.reconstruction_noise,
# pixels of 0.49 to 1.84 mm.
MODE_CALIBRATION = 1.04
LOWER_HALF_MEAN = 0.3247  # mean of the smaller half of |z| for a normal z: 2 (phi(0) - phi(0.6745)) / 0.5


def measure_noise_hu(hu: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """SD of the noise in the brain, in HU; NaN where there is too little brain to tell.

    hu: (S, H, W) HU. spacing_mm: (slice, row, column). The smaller of two estimates, as anatomy can only
    raise them: the most frequent SD among patches of 5 mm (fails where pixels are so large that a patch holds
    several tissues), and the typical second difference of pixels 2.2 mm apart, along rows and columns (fails
    where tissues bend within that distance)."""
    hu = _volume(hu)
    count = min(len(hu), NOISE_SLICES)
    hu = hu[np.linspace(0, len(hu) - 1, count).round().astype(int)]
    pixel_mm = np.asarray(spacing_mm[1:], float)
    size = np.maximum((NOISE_PATCH_MM / pixel_mm).round(), NOISE_PATCH_PX).astype(int) | 1
    lag = np.maximum((NOISE_LAG_MM / pixel_mm).round(), 1).astype(int)
    depth_mm = (np.maximum(size / 2, lag) * pixel_mm).max() + EDGE_DEPTH_MM
    sds, differences = [np.empty(0)], [np.empty(0)]
    for image, mask in zip(hu, brain_mask(hu, spacing_mm), strict=True):
        if mask.any():
            box = _box(mask, margin=1)
            part = image[box].astype(np.float64)
            deep = _erode(mask[box], depth_mm, pixel_mm)
            sds.append(_local_sd(part, size)[deep])
            differences.append(np.abs(_second_difference(part, lag))[deep])
    sd, difference = np.concatenate(sds), np.concatenate(differences)
    if len(sd) < FEWEST_PATCHES:
        return math.nan
    usual = np.partition(difference, len(difference) // 2)[: len(difference) // 2].mean() / LOWER_HALF_MEAN
    return float(min(MODE_CALIBRATION * _most_frequent(sd), usual))


def _local_sd(image: np.ndarray, size: np.ndarray) -> np.ndarray:
    mean = ndimage.uniform_filter(image, size)
    variance = ndimage.uniform_filter(image**2, size) - mean**2
    return np.sqrt(variance.clip(0) * (size.prod() / (size.prod() - 1)))


def _second_difference(image: np.ndarray, lag: np.ndarray) -> np.ndarray:
    """Second difference along both axes, scaled to keep the SD of independent pixels."""
    for axis, step in enumerate(lag):
        image = np.roll(image, step, axis) - 2 * image + np.roll(image, -step, axis)
    return image / 6  # the variance of 1, -2, 1 is 6 along each axis


def _most_frequent(values: np.ndarray) -> float:
    """Mode of a histogram, smoothed by 3 % of its range: free of ties, still sharp."""
    highest = float(np.quantile(values, 0.95))
    if highest == 0:
        return 0.0
    counts, edges = np.histogram(values, bins=200, range=(0, highest))
    peak = np.argmax(ndimage.gaussian_filter1d(counts.astype(float), 6))
    return float(edges[peak] + edges[peak + 1]) / 2


# Where image quality is measured. Inside the brain by default: a stroke is read there, and at the pixels of a
# training image a skull is so finely structured that noise cannot be told from bone.
MASKS = {"brain": brain_mask, "head": head_mask}
DEFAULT_MASK = "brain"
