"""A DICOM folder -> its CT series as Scans in HU. Ids leave as hashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.pixels import get_decoder
from scipy import ndimage

from dicom_headers import (
    DICOM_ERRORS,
    PIXEL_TAGS,
    Header,
    index_series,
    open_dicom,
    position_groups,
    quiet_pydicom,
    read_header,
    series_jobs,
    uid_name,
    walk,
)
from volumes import (
    AIR_HU,
    AIR_RANGE_HU,
    ASSUMED_HU,
    ASSUMED_SLICE_SPACING_MM,
    AXIAL,
    BESIDE_TOLERANCE_MM,
    GAP_TOLERANCE,
    MAX_HU,
    MIN_FRACTION,
    OUTSIDE_FOV_HU,
    Job,
    Reader,
    Rejected,
    Scan,
    ScanError,
    Stack,
    hu_fault,
    measured_scan,
    pseudonym,
    shown,
    slice_normal,
    stack_geometry,
    unknown_labels,
)

# ---------------------------------------------------------------- DICOM: pixels to HU

# Twelve bits without a sign: HU + 4096 where HU is negative (RSNA 2019), so that air is found here instead
WRAPPED_AIR = (2996, 3396)
MIN_WRAPPED_FRACTION = 0.05  # air fills far more of a head scan, and metal far less

CODECS = {
    "JPEG 2000": "pylibjpeg-openjpeg",
    "HTJ2K": "pylibjpeg-openjpeg",
    "High-Throughput": "pylibjpeg-openjpeg",
    "JPEG": "pylibjpeg-libjpeg",
}


def _decode(path: str, dataset: pydicom.Dataset) -> np.ndarray:
    """Stored values (H, W). Raises ScanError."""
    syntax = dataset.file_meta.TransferSyntaxUID
    name = uid_name(syntax)
    try:
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            package = next((package for word, package in CODECS.items() if word in name), None)
            if package:
                fix = f"pip install pylibjpeg {package}"
                raise ScanError(path, f"{name} needs a decoder", fix, "no_decoder")
        if syntax == pydicom.uid.RLELossless:
            dataset.pixel_array_options(decoding_plugin="pydicom")  # the others abort on damaged data
        stored = dataset.pixel_array
    except ScanError:
        raise
    except (*DICOM_ERRORS, MemoryError):
        what = f"its pixels cannot be decoded ({name})"
        raise ScanError(path, what, "export it again, uncompressed", "pixels") from None
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise ScanError(path, f"its pixels have shape {stored.shape}", "export it again", "pixels")
    return stored


def _declared_padding(stored: np.ndarray, header: Header) -> np.ndarray:
    """(H, W) bool: where the header's padding value lies.

    A padding value that would be tissue is believed only where it is joined to the border of the picture:
    padding 0 with an intercept of 0 must not punch holes into water."""
    if header.padding is None:
        return np.zeros(stored.shape, bool)
    low, high = header.padding
    mask = (stored >= low) & (stored <= high)
    if max(low * header.slope, high * header.slope) + header.intercept > AIR_RANGE_HU[1]:
        parts, _ = ndimage.label(mask)
        border = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
        mask = np.isin(parts, border[border > 0])
    return mask


def _repair_values(hu: np.ndarray, headers: Sequence[Header], repairs: list[list[str]]) -> None:
    """Undo a 12-bit wrap and an inverted scale, in place, where the values of the series prove it.

    hu: (S, H, W) float32. Evidence is asked of the series as a whole: a slice of metal or of air alone proves
    nothing."""
    no_air = np.mean(hu < AIR_RANGE_HU[1]) < MIN_FRACTION
    wrapped = [
        index
        for index, header in enumerate(headers)
        if header.bits_stored == 12 and not header.signed and header.intercept > -100 and header.slope == 1
    ]
    if wrapped and no_air:
        high = np.mean((hu[wrapped] > WRAPPED_AIR[0]) & (hu[wrapped] < WRAPPED_AIR[1]))
        if high >= MIN_WRAPPED_FRACTION:
            for index in wrapped:
                stored = hu[index] - headers[index].intercept
                hu[index] = (stored + 1000) % 4096 - 1000
                repairs[index].append("negative HU had wrapped around 12 bits: unwrapped")
            return
    inverted = [index for index, header in enumerate(headers) if header.monochrome1]
    if not inverted:
        return
    if hu_fault(hu) is None:  # some writers mark the display as inverted and leave the values alone
        for index in inverted:
            repairs[index].append("MONOCHROME1, but its values are HU as they stand: not inverted")
        return
    for index in inverted:
        header = headers[index]
        ends = -1 if header.signed else 2**header.bits_stored - 1  # lowest + highest stored value
        hu[index] = header.slope * ends + 2 * header.intercept - hu[index]
        repairs[index].append("MONOCHROME1: inverted")


class _Order(NamedTuple):
    groups: list[list[Header]]  # per slice; more than one where files share a position
    corners_mm: np.ndarray  # (S, 3)
    orientation: tuple[float, ...]
    thickness_mm: float
    notes: list[str]  # the same for every slice


def _order(headers: list[Header]) -> _Order:
    """Put slices in spatial order, and say in notes what had to be assumed."""
    first = headers[0]
    notes = []
    orientation = first.orientation
    if orientation is None:
        orientation = AXIAL
        notes.append("ImageOrientationPatient is missing: taken as axial")
    thickness = first.thickness if first.thickness and first.thickness > 0 else None
    if first.corner is not None:
        groups = position_groups(headers)
        if len(groups) == 1 and thickness is None:
            notes.append(f"slice spacing unknown: {ASSUMED_SLICE_SPACING_MM:g} mm assumed")
        corners = np.array([group[0].corner for group in groups])
        return _Order(groups, corners, orientation, thickness or ASSUMED_SLICE_SPACING_MM, notes)
    step = thickness or ASSUMED_SLICE_SPACING_MM
    choices = (
        ("InstanceNumber", [header.instance for header in headers], step),
        ("SliceLocation", [header.location for header in headers], 1.0),
        ("the file name", list(range(len(headers))), step),  # discovery goes through the files by name
    )
    name, keys, scale = next(
        choice for choice in choices if None not in choice[1] and len(set(choice[1])) == len(headers)
    )
    notes.append(f"ImagePositionPatient is missing: order from {name}, direction and origin unknown")
    if name != "SliceLocation":
        notes.append(f"slice spacing {step:g} mm " + ("from SliceThickness" if thickness else "assumed"))
    ranked = sorted(zip(keys, headers, strict=True), key=lambda pair: pair[0])
    offsets = scale * (np.array([key for key, _ in ranked], float) - ranked[0][0])
    corners = offsets[:, None] * slice_normal(orientation)
    return _Order([[header] for _, header in ranked], corners, orientation, step, notes)


class SeriesPixels(NamedTuple):
    """One series in HU, before anybody says whose it is and what it shows."""

    hu: np.ndarray  # (S, H, W) int16 HU, padding -1024
    stack: Stack
    files: list[tuple[str, ...]]  # per slice: its file, then identical copies that were dropped
    repairs: list[list[str]]
    padding_count: int
    ids: tuple[str, str, str]  # the files' own; they must not leave the reader


def read_pixels(paths: Sequence[str], *, assume_hu: bool = False) -> SeriesPixels:
    """Read the files of one series into HU, in spatial order.

    Rescale slope and intercept are taken per slice; padding becomes -1024 and is counted; copies of a slice
    are dropped; tilt and uneven gaps are kept. Raises ScanError if a file cannot be read or decoded, if two
    different slices lie at one position, or if the values are not HU; with assume_hu they are taken as they
    are, and the repairs say so."""
    with quiet_pydicom():
        headers, stored = [], {}
        for path in paths:
            dataset = open_dicom(path, PIXEL_TAGS)
            if "PixelData" not in dataset:
                what = "truncated: its pixels are missing or incomplete"
                raise ScanError(path, what, "copy or export it again", "truncated")
            headers.append(read_header(path))
            stored[path] = _decode(path, dataset)
    order = _order(headers)
    repairs = [list(order.notes) for _ in order.groups]
    for group, notes in zip(order.groups, repairs, strict=True):
        for copy in group[1:]:
            if _hu(stored[copy.path], copy).tobytes() != _hu(stored[group[0].path], group[0]).tobytes():
                what = f"lies at the same position as {Path(group[0].path).name} but differs from it"
                raise ScanError(copy.path, what, "keep one of them", "conflict")
            notes.append("an identical copy of this slice was dropped")
    kept = [group[0] for group in order.groups]
    hu = np.stack([_hu(stored[header.path], header) for header in kept])
    padding = np.stack([_declared_padding(stored[header.path], header) for header in kept])
    _repair_values(hu, kept, repairs)
    fault = hu_fault(hu)
    if fault and not assume_hu:
        what = f"{fault}; RescaleIntercept is {kept[0].intercept:g}"
        fix = "export it with its true rescale values, or prepare it with --assume-hu"
        raise ScanError(kept[0].path, what, fix, "not_hu")
    if fault:
        for notes in repairs:
            notes.append(ASSUMED_HU)
    padding |= hu <= OUTSIDE_FOV_HU
    hu[padding] = AIR_HU
    stack = stack_geometry(order.corners_mm, order.orientation, kept[0].spacing, order.thickness_mm)
    _note_geometry(stack, repairs)
    return SeriesPixels(
        hu=hu.round().clip(AIR_HU, MAX_HU).astype(np.int16),
        stack=stack,
        files=[tuple(header.path for header in group) for group in order.groups],
        repairs=repairs,
        padding_count=int(padding.sum()),
        ids=kept[0].ids,
    )


def scan_of(job: Job, pixels: SeriesPixels, **known: Any) -> Scan:
    """The Scan of a series, its labels unknown and its ids from its headers unless `known` has better."""
    patient, study, _ = pixels.ids
    fields = {
        "hu": pixels.hu,
        "affine": pixels.stack.affine,
        "positions_mm": pixels.stack.positions_mm,
        "spacing_mm": pixels.stack.spacing_mm,
        "gantry_tilt_deg": pixels.stack.gantry_tilt_deg,
        "source": job.source,
        "patient_id": pseudonym("patient", patient),
        "study_uid": pseudonym("study", patient, study),
        "series_uid": job.series_uid,
        "labels": unknown_labels(),
        "slice_labels": [unknown_labels() for _ in pixels.hu],
        "repairs": pixels.repairs,
        "padding_count": pixels.padding_count,
    }
    return measured_scan(**(fields | known))


def discover_dicom(
    input_dir: str | Path, limit: int | None = None, workers: int = 1
) -> tuple[list[Job], list[Rejected]]:
    """Find every axial CT series under a folder, in a zip archive or in one file, from headers alone.

    Files are told apart by patient, study and series; a series that mixes orientations, shapes or pixel
    sizes, or that holds several acquisitions of the same positions, is split. Links are not followed.
    limit: at most so many series. workers: processes.
    Returns (jobs, rejected), both in path order. Raises ScanError if input_dir does not exist."""
    root = Path(input_dir)
    if not root.exists():
        raise ScanError(root, "no such file or folder", "check the path", "missing")
    index = index_series(root, walk(root), limit=limit, workers=workers)
    jobs, unplaced = series_jobs(root, index.series, "dicom")
    rejected = index.rejected + unplaced
    if not jobs:
        reason = (
            f"no CT images in {shown(root)} ({index.seen} files seen) (give the folder of an axial CT series)"
        )
        rejected.append(Rejected(shown(root.name), shown(root), "no_ct", reason))
    return jobs[:limit], rejected


def read_dicom(job: Job) -> Scan:
    """Read one discovered series into HU. Raises ScanError, see read_pixels."""
    return scan_of(job, read_pixels(job.inputs, assume_hu=job.assume_hu))


def _hu(stored: np.ndarray, header: Header) -> np.ndarray:
    return stored.astype(np.float32) * np.float32(header.slope) + np.float32(header.intercept)


def _note_geometry(stack: Stack, repairs: list[list[str]]) -> None:
    """Record gaps that differ from the median, and slices that lie beside the line of the others."""
    gap = stack.spacing_mm[0]
    for index, distance in enumerate(np.diff(stack.positions_mm), start=1):
        if abs(distance / gap - 1) > GAP_TOLERANCE:
            repairs[index].append(
                f"gap of {distance:.2f} mm to the slice before it, the median is {gap:.2f} mm"
            )
    for notes, beside in zip(repairs, stack.beside_mm, strict=True):
        if beside > BESIDE_TOLERANCE_MM:
            notes.append(f"lies {beside:.1f} mm beside the line of the other slices")


DICOM_READERS = {"dicom": Reader(discover_dicom, read_dicom)}
