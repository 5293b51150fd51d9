"""What a scan is: HU with its geometry, what reads one and what is refused; the way out to NIfTI."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from anatomy import LESION_CLASSES, measure_noise_hu
from stage import atomic_write

AIR_HU = -1024  # what padding becomes; also the lowest HU kept
MAX_HU = 3071  # the 12-bit range of CT: above it there is only metal
OUTSIDE_FOV_HU = -1500  # scanners mark what they did not image by -1500, -2000, -2048, -3024; air is -1000
LABEL_NAMES = (*LESION_CLASSES[:5], "any", "ischemia")
ASSUMED_SLICE_SPACING_MM = 5.0  # routine head protocol, for files that tell no spacing at all


SAME_POSITION_MM = 0.01  # headers print positions to 0.01 mm or better
SAME_ORIENTATION = 0.01  # in direction cosines, about half a degree
GAP_TOLERANCE = 0.01  # relative; less is rounding
BESIDE_TOLERANCE_MM = 0.5  # about a pixel
MAX_SIDE_PX = 4096  # no CT matrix is larger; refuses damaged headers before memory is allocated
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
AIR_RANGE_HU = (-1100, -700)  # air with noise, or the lungs and cushions of a tightly cropped picture
TISSUE_RANGE_HU = (-20, 100)  # water to fresh blood
MIN_FRACTION = 0.005  # of the picture; real slices, even of hollow phantoms, have several times that
JUNK_NAMES = {".ds_store", "thumbs.db", "desktop.ini"}
SKIPPED = "nothing to do, it is skipped"
ASSUMED_HU = "values that are not plausible as HU were taken as HU (--assume-hu)"
ASSUMED_WINDOW = "grey levels were taken as HU of an assumed window (--assume-window)"


class ScanError(ValueError):
    """A file or series that cannot be used: one line "<file>: <what is wrong> (<fix>)" and a short code."""

    def __init__(self, file: str | Path, what: str, fix: str, code: str):
        super().__init__(file, what, fix, code)  # all of them, so that the error survives pickling
        self.file, self.what, self.fix, self.code = shown(file), what, fix, code

    def __str__(self) -> str:
        return f"{self.file}: {self.what} ({self.fix})"


class Rejected(NamedTuple):
    """One file that no job uses. `case` is its folder, `code` a short name to count by."""

    case: str
    file: str
    code: str
    reason: str


# What a healthy export holds beside its CT slices: worth naming, no reason to distrust the rest.
EXPECTED_CODES = frozenset(
    (
        *("localizer", "secondary_capture", "colour", "not_ct", "dicomdir", "other_file", "not_axial"),
        *("other_series", "duplicate_row", "no_image", "filler", "label_alone", "mask_alone", "painted"),
    )
)


class Job(NamedTuple):
    """One series to read. series_uid is the pseudonym under which its Scan will be stored."""

    source: str
    series_uid: str
    case: str
    inputs: Any  # whatever the reader's `read` needs; picklable
    assume_hu: bool = False  # take values that hu_fault doubts as they are, and say so in the repairs
    # centre and width in HU that 8-bit pictures are taken to have been windowed with, said so in the repairs
    assume_window: tuple[float, float] | None = None


class Reader(NamedTuple):
    """One raw format: discover(...) -> (jobs, rejected) from headers alone, read(job) -> Scan."""

    discover: Callable[..., tuple[list[Job], list[Rejected]]]
    read: Callable[[Job], Scan]


@dataclass(frozen=True, eq=False, kw_only=True)
class Scan:
    """One CT series in HU with its geometry, in the order of ascending position along the slice normal.

    The normal is taken with its largest component positive: axial slices run from the feet to the head."""

    hu: np.ndarray  # (S, H, W) int16 HU in [-1024, 3071], padding -1024
    affine: np.ndarray  # (4, 4) float64: (column, row, slice, 1) -> DICOM LPS mm; gantry tilt is its shear
    positions_mm: tuple[float, ...]  # per slice, along the normal, ascending
    spacing_mm: tuple[float, float, float]  # (median gap along the normal, row, column)
    gantry_tilt_deg: float  # see gantry_tilt
    source: str
    patient_id: str  # pseudonyms, safe as file names
    study_uid: str
    series_uid: str
    labels: dict[str, int | None]  # scan level, by LABEL_NAMES; None: unknown
    slice_labels: list[dict[str, int | None]]
    repairs: list[list[str]]  # per slice, in plain words: what was repaired or assumed
    intensity: str = "hu"  # or "windowed": 8-bit pictures that never can be HU again
    mask: np.ndarray | None = None  # (S, H, W) uint8 lesion classes
    truth: np.ndarray | None = None  # (S, H, W) int16 HU without noise; phantom only
    low: dict[str, np.ndarray] = field(default_factory=dict)  # dose fraction as text -> (S, H, W) int16 HU
    split: str | None = None  # "train", "val" or "test" where the data set itself says so
    padding_count: int = 0  # pixels set to -1024 because they were padding
    noise_hu: float = field(default=math.nan)  # anatomy.measure_noise_hu; NaN where there is no brain


def shown(path: str | Path) -> str:
    """A path as one printable line, whatever bytes its name is made of."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pseudonym(*parts: str) -> str:
    """16 hex characters that stand for an id: stable, safe as a file name, not readable.

    A hash hides an id from a reader of the output, not from somebody who holds a list of candidates."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def unknown_labels() -> dict[str, int | None]:
    """Labels of a scan or slice of which nothing is known."""
    return dict.fromkeys(LABEL_NAMES)


NOISE_SLICES = 8  # evenly spaced: enough for a median, and a fraction of the time of a thin series


def measured_scan(**fields: Any) -> Scan:
    """A Scan with its noise measured, in NOISE_SLICES of its slices or a few more."""
    some = fields["hu"][:: max(1, len(fields["hu"]) // NOISE_SLICES)]
    return Scan(**fields, noise_hu=measure_noise_hu(some, fields["spacing_mm"]))


def hu_fault(hu: np.ndarray) -> str | None:
    """What shows that values are not HU, or None.

    hu: any shape, padding still below OUTSIDE_FOV_HU or already -1024. A CT picture has air near -1000 and
    soft tissue near 0 to 100."""
    air = np.mean((hu > AIR_RANGE_HU[0]) & (hu < AIR_RANGE_HU[1]))
    tissue = np.mean((hu > TISSUE_RANGE_HU[0]) & (hu < TISSUE_RANGE_HU[1]))
    if air >= MIN_FRACTION and tissue >= MIN_FRACTION:
        return None
    missing = "air near -1000" if air < MIN_FRACTION else "soft tissue near 0 to 100"
    return f"its values are not HU: no {missing} (they range from {hu.min():.0f} to {hu.max():.0f})"


# ---------------------------------------------------------------- geometry


class Stack(NamedTuple):
    """The geometry of a stack of parallel slices."""

    affine: np.ndarray
    positions_mm: tuple[float, ...]
    spacing_mm: tuple[float, float, float]
    gantry_tilt_deg: float
    beside_mm: np.ndarray  # (S,) how far each slice lies in its own plane from where the affine puts it


def slice_normal(orientation: Sequence[float]) -> np.ndarray:
    """Unit normal (3,) of ImageOrientationPatient (6 numbers), its largest component made positive."""
    normal = np.cross(orientation[:3], orientation[3:])
    normal = normal / np.linalg.norm(normal)
    return normal * np.sign(normal[np.argmax(np.abs(normal))])


def gantry_tilt(normal: np.ndarray, direction: np.ndarray) -> float:
    """Signed angle in degrees between the slice normal and the direction from slice to slice, both (3,) LPS.

    Positive where the normal leans to the back of the patient (the front edge of each slice is the higher
    one). The header's GantryDetectorTilt is not used: makers differ in its sign."""
    angle = math.degrees(math.atan2(np.linalg.norm(np.cross(direction, normal)), normal @ direction))
    lean = normal / np.linalg.norm(normal) - direction / np.linalg.norm(direction)
    return math.copysign(angle, lean[np.argmax(np.abs(lean[:2]))]) if angle > 1e-3 else 0.0


def stack_geometry(
    corners_mm: np.ndarray,
    orientation: Sequence[float],
    pixel_spacing_mm: Sequence[float],
    thickness_mm: float,
) -> Stack:
    """Affine, positions and tilt of slices that are already in order.

    corners_mm: (S, 3) ImagePositionPatient. orientation: ImageOrientationPatient. pixel_spacing_mm: (row,
    column). thickness_mm: stands in for the gap where there is one slice. The affine steps by the median gap;
    a slice at position p lies at slice coordinate (p - positions[0]) / spacing[0], which for even gaps is its
    index. With one slice the tilt is the angle to the nearest axis of the patient."""
    normal = slice_normal(orientation)
    positions = corners_mm @ normal
    if len(positions) > 1:
        gap = float(np.median(np.diff(positions)))
        centred = positions - positions.mean()
        per_mm = centred @ (corners_mm - corners_mm.mean(axis=0)) / (centred @ centred)  # least squares line
        origin = corners_mm.mean(axis=0) + per_mm * (positions[0] - positions.mean())
        tilt = gantry_tilt(normal, per_mm)
    else:
        gap, per_mm, origin = thickness_mm, normal, corners_mm[0]
        tilt = gantry_tilt(normal, np.eye(3)[np.argmax(np.abs(normal))])
    affine = np.eye(4)
    affine[:3, 0] = np.asarray(orientation[:3]) * pixel_spacing_mm[1]
    affine[:3, 1] = np.asarray(orientation[3:]) * pixel_spacing_mm[0]
    affine[:3, 2] = per_mm * gap
    affine[:3, 3] = origin
    line = origin + (positions - positions[0])[:, None] * per_mm
    return Stack(
        affine=affine,
        positions_mm=tuple(float(p) for p in positions),
        spacing_mm=(gap, float(pixel_spacing_mm[0]), float(pixel_spacing_mm[1])),
        gantry_tilt_deg=tilt,
        beside_mm=np.linalg.norm(corners_mm - line, axis=1),
    )


# ---------------------------------------------------------------- NIfTI out

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nifti(
    path: str | Path,
    volume: np.ndarray,
    scan_affine_lps: np.ndarray,
    positions_mm: Sequence[float] | None = None,
    axes: str | None = None,
) -> bool:
    """Write (S, H, W) as NIfTI in RAS mm, atomically. Returns whether it was resampled to an even grid.

    scan_affine_lps: (4, 4), (column, row, slice) -> LPS mm, stepping by the median gap. positions_mm: (S,)
    along the normal; where its gaps differ by more than 1 % the volume is resampled between its first and its
    last slice, linearly (uint8 and bool, which are masks: nearest slice), and the header says so. A tilt
    stays in the affine: interpolation runs from slice to slice along the shear, so no pixel moves sideways.
    axes: where the axes of the file lead, e.g. "RAS"; None: as those of the volume, columns first.
    Raises ValueError for a volume that is not three-dimensional, or an affine that is not finite and
    invertible."""
    volume, affine = np.asarray(volume), np.array(scan_affine_lps, np.float64)
    if volume.ndim != 3:
        raise ValueError(f"{shown(path)}: volume has shape {volume.shape}, must be (slices, rows, columns)")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise ValueError(f"{shown(path)}: the affine must be 4 x 4, finite and invertible")
    resampled = False
    if positions_mm is not None and len(volume) > 1:
        gaps = np.diff(positions_mm)
        if len(positions_mm) != len(volume) or gaps.min() <= 0:
            raise ValueError(f"{shown(path)}: positions_mm must ascend, one for each of {len(volume)} slices")
        step = float(np.median(gaps))
        if np.abs(gaps / step - 1).max() > GAP_TOLERANCE:
            volume, even_step = _even_grid(volume, np.asarray(positions_mm, float), step)
            affine[:3, 2] *= even_step / step
            resampled = True
    if volume.dtype == bool:
        volume = volume.astype(np.uint8)
    image = nib.Nifti1Image(volume.transpose(2, 1, 0), LPS_TO_RAS @ affine)
    image.set_sform(LPS_TO_RAS @ affine, code=1)
    image.header.set_xyzt_units("mm")
    if axes is not None:
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
        )
        image = image.as_reoriented(turn)
    if resampled:
        image.header["descrip"] = b"uneven slices, resampled to an even grid"
    data = image.to_bytes()
    with atomic_write(Path(path), "wb") as file:
        # No time stamp, so that the same volume gives the same bytes
        file.write(gzip.compress(data, compresslevel=4, mtime=0) if Path(path).suffix == ".gz" else data)
    return resampled


def _even_grid(volume: np.ndarray, positions_mm: np.ndarray, step_mm: float) -> tuple[np.ndarray, float]:
    """Resample (S, H, W) to even positions near step_mm that keep both ends. Returns (volume, its step)."""
    length = positions_mm[-1] - positions_mm[0]
    count = max(round(length / step_mm), 1) + 1
    wanted = np.linspace(positions_mm[0], positions_mm[-1], count)
    below = np.clip(np.searchsorted(positions_mm, wanted, side="right") - 1, 0, len(positions_mm) - 2)
    weight = (wanted - positions_mm[below]) / (positions_mm[below + 1] - positions_mm[below])
    if volume.dtype in (np.uint8, np.bool_):
        return volume[below + (weight > 0.5)], length / (count - 1)
    even = np.empty((count, *volume.shape[1:]), volume.dtype)
    for index, (low, share) in enumerate(zip(below, weight, strict=True)):
        mixed = (1 - share) * volume[low].astype(np.float64) + share * volume[low + 1]
        even[index] = mixed.round() if np.issubdtype(volume.dtype, np.integer) else mixed
    return even, length / (count - 1)
