"""A DICOM folder -> its CT series as Scans in HU.

Names, birth dates and other identifiers stay in the files: only the tags of HEADER_TAGS are read, and ids
leave as hashes."""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import get_decoder
from scipy import ndimage

from volumes import (
    AIR_HU,
    ASSUMED_SLICE_SPACING_MM,
    BESIDE_TOLERANCE_MM,
    GAP_TOLERANCE,
    MAX_HU,
    OUTSIDE_FOV_HU,
    SAME_ORIENTATION,
    SAME_POSITION_MM,
    Job,
    Reader,
    Rejected,
    Scan,
    ScanError,
    Stack,
    measured_scan,
    pseudonym,
    shown,
    slice_normal,
    stack_geometry,
    unknown_labels,
)

# ---------------------------------------------------------------- DICOM: headers

HEADER_TAGS = (
    *("SOPClassUID", "Modality", "ImageType", "NumberOfFrames", "SamplesPerPixel"),  # what it is
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "AcquisitionNumber"),  # what it belongs to
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"),  # where it lies
    *("InstanceNumber", "SliceLocation", "SliceThickness"),  # where it lies if its position is missing
    *("RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "PixelPaddingRangeLimit"),  # what values mean
    *("PhotometricInterpretation", "PlanarConfiguration", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "HighBit"),
)
PIXEL_TAGS = (*HEADER_TAGS, "PixelData")

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
DEFLATED = "1.2.840.10008.1.2.1.99"

# Pictures about a scan that are filed as CT images
LOCALIZER_WORDS = {"LOCALIZER", "SCOUT", "SURVIEW", "TOPOGRAM"}
REPORT_WORDS = {"DOSE_INFO", "DOSE INFO", "SCREEN SAVE", "REF_SURVIEW"}

SKIPPED = "nothing to do, it is skipped"
JUNK_NAMES = {".ds_store", "thumbs.db", "desktop.ini"}
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
MAX_SIDE_PX = 4096  # no CT matrix is larger; refuses damaged headers before memory is allocated
MAX_INFLATED_BYTES = 1 << 26  # a 4096 x 4096 slice of 16 bit and its header, and no deflate bomb

# What pydicom and its decoders raise on damaged files
DICOM_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RuntimeError,  # RecursionError too
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class _Header(NamedTuple):
    """What the reader needs of one file. Ids are the file's own and stay inside this reader."""

    path: str
    ids: tuple[str, str, str]  # patient, study, series
    shape: tuple[int, int]
    spacing: tuple[float, float]  # row, column
    orientation: tuple[float, ...] | None
    corner: tuple[float, ...] | None
    acquisition: str
    instance: float | None
    location: float | None
    thickness: float | None
    slope: float
    intercept: float
    bits_stored: int
    signed: bool
    monochrome1: bool
    padding: tuple[float, float] | None  # stored values, both ends included


@contextlib.contextmanager
def _quiet_pydicom() -> Iterator[None]:
    """No complaints about invalid UIDs and the like: real archives are full of them, and they do no harm."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _open_dicom(path: str, tags: Sequence[str]) -> pydicom.Dataset:
    """The allow-listed elements of one DICOM file. Raises ScanError."""
    try:
        with Path(path).open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                if Path(path).suffix.lower() in DICOM_SUFFIXES:
                    raise ScanError(path, "not a DICOM file", "export it again or remove it", "not_dicom")
                raise ScanError(path, "not a DICOM file", SKIPPED, "other_file")
            meta = read_file_meta_info(path)
            if meta.get("TransferSyntaxUID") == DEFLATED:
                file.seek(144 + meta.FileMetaInformationGroupLength)
                return _inflate(path, file.read(), meta, tags)
            file.seek(0)
            return pydicom.dcmread(file, specific_tags=list(tags), stop_before_pixels="PixelData" not in tags)
    except ScanError:
        raise
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ScanError(path, reason, "check the disk and the permissions", "unreadable") from None
    except DICOM_ERRORS as error:
        what = f"damaged DICOM file ({type(error).__name__})"
        raise ScanError(path, what, "copy or export it again", "damaged") from None


def _inflate(path: str, deflated: bytes, meta: pydicom.Dataset, tags: Sequence[str]) -> pydicom.Dataset:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(deflated, MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        what = f"inflates to more than {MAX_INFLATED_BYTES >> 20} MiB"
        raise ScanError(path, what, "export it uncompressed", "too_large")
    dataset = pydicom.dcmread(io.BytesIO(plain), force=True, specific_tags=list(tags))
    dataset.file_meta = meta
    return dataset


def _check_kind(path: str, dataset: pydicom.Dataset) -> None:
    """Raise ScanError, which names what it is, unless the file is one CT slice."""
    sop_class = _text(dataset, "SOPClassUID") or _text(dataset.file_meta, "MediaStorageSOPClassUID")
    modality = _text(dataset, "Modality")
    words = {str(word).upper() for word in _sequence(dataset.get("ImageType"))}
    if sop_class == MEDIA_DIRECTORY:
        raise ScanError(path, "a DICOMDIR, not an image", SKIPPED, "dicomdir")
    if sop_class.startswith(SECONDARY_CAPTURE) or words & REPORT_WORDS:
        raise ScanError(path, "a secondary capture, not a CT slice", SKIPPED, "secondary_capture")
    if (
        modality not in ("", "CT")
        or sop_class not in ("", CT_IMAGE, *ENHANCED_CT)
        or not (modality or sop_class)
    ):
        kind = pydicom.uid.UID(sop_class).name if sop_class else "no SOP class"
        raise ScanError(path, f"not a CT image (modality {modality or 'missing'}, {kind})", SKIPPED, "not_ct")
    if sop_class in ENHANCED_CT or _number(dataset.get("NumberOfFrames") or 1) > 1:
        what = "an enhanced (multi-frame) CT object"
        raise ScanError(path, what, "export it as classic CT images", "multi_frame")
    if _number(dataset.get("SamplesPerPixel") or 1) != 1:
        raise ScanError(path, "a colour picture, not a CT slice", SKIPPED, "colour")
    if words & LOCALIZER_WORDS:
        raise ScanError(path, "a localizer, not a CT slice", SKIPPED, "localizer")


def _text(dataset: pydicom.Dataset, tag: str) -> str:
    return str(dataset.get(tag) or "").strip()


def _sequence(value: Any) -> Sequence:
    if value is None or isinstance(value, str):
        return [value] if value else []
    return value if isinstance(value, Sequence | pydicom.multival.MultiValue) else [value]


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _optional(value: Any) -> float | None:
    """A number that only helps: None where it is missing or unreadable."""
    try:
        return None if value is None or value == "" else _number(value)
    except (TypeError, ValueError):
        return None


def _vector(value: Any, length: int) -> tuple[float, ...] | None:
    numbers = tuple(_number(entry) for entry in _sequence(value))
    if numbers and len(numbers) != length:
        raise ValueError(f"{len(numbers)} numbers instead of {length}")
    return numbers or None


def _parse_header(path: str, dataset: pydicom.Dataset) -> _Header:
    """Check and take what is needed. Raises ScanError."""
    try:
        _check_kind(path, dataset)
        return _take_header(path, dataset)
    except ScanError:
        raise
    except DICOM_ERRORS as error:
        what = f"damaged DICOM header ({type(error).__name__})"
        raise ScanError(path, what, "export it again", "damaged") from None


def _take_header(path: str, dataset: pydicom.Dataset) -> _Header:
    rows, columns = int(_number(dataset.get("Rows"))), int(_number(dataset.get("Columns")))
    if not (0 < rows <= MAX_SIDE_PX and 0 < columns <= MAX_SIDE_PX):
        raise ScanError(path, f"{rows} x {columns} pixels is no CT slice", "export it again", "damaged")
    for name, meaning in (
        ("RescaleSlope", "its HU are unknown"),
        ("RescaleIntercept", "its HU are unknown"),
        ("PixelSpacing", "its size is unknown"),
    ):
        if not _sequence(dataset.get(name)):
            code = "no_rescale" if name.startswith("Rescale") else "no_geometry"
            raise ScanError(path, f"{name} is missing: {meaning}", "export it again with this tag", code)
    bits, bits_stored = int(_number(dataset.get("BitsAllocated"))), int(_number(dataset.get("BitsStored")))
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise ScanError(path, "the transfer syntax is missing", "export it again", "damaged")
    stored_as_is = syntax != DEFLATED and not syntax.is_compressed
    if stored_as_is and Path(path).stat().st_size < rows * columns * bits // 8:
        raise ScanError(path, "truncated: its pixels are incomplete", "copy or export it again", "truncated")
    slope, spacing = _number(dataset.RescaleSlope), _vector(dataset.PixelSpacing, 2)
    if slope == 0 or min(spacing) <= 0:
        what = f"RescaleSlope {slope:g} or PixelSpacing {spacing} is impossible"
        raise ScanError(path, what, "export it again", "damaged")
    orientation = _vector(dataset.get("ImageOrientationPatient"), 6)
    corner = _vector(dataset.get("ImagePositionPatient"), 3)
    if orientation is not None:
        row, column = np.array(orientation[:3]), np.array(orientation[3:])
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if np.abs(np.subtract(lengths, 1)).max() > 0.01 or abs(row @ column) > 0.01:
            what = "ImageOrientationPatient is not a pair of perpendicular unit vectors"
            raise ScanError(path, what, "export it again", "no_geometry")
        orientation = (*(row / lengths[0]).tolist(), *(column / lengths[1]).tolist())
        if np.argmax(np.abs(slice_normal(orientation))) != 2:
            what = "a coronal or sagittal slice; networks here see axial slices"
            raise ScanError(path, what, "use the axial series", "not_axial")
    signed = bool(_number(dataset.get("PixelRepresentation") or 0))
    folder = str(Path(path).parent)
    study = _text(dataset, "StudyInstanceUID") or folder  # blank ids: a folder is the best guess
    return _Header(
        path=path,
        ids=(_text(dataset, "PatientID") or study, study, _text(dataset, "SeriesInstanceUID") or folder),
        shape=(rows, columns),
        spacing=spacing,
        orientation=orientation,
        corner=corner,
        acquisition=_text(dataset, "AcquisitionNumber"),
        instance=_optional(dataset.get("InstanceNumber")),
        location=_optional(dataset.get("SliceLocation")),
        thickness=_optional(dataset.get("SliceThickness")),
        slope=slope,
        intercept=_number(dataset.RescaleIntercept),
        bits_stored=bits_stored,
        signed=signed,
        monochrome1=_text(dataset, "PhotometricInterpretation") == "MONOCHROME1",
        padding=_padding_range(dataset, bits, signed),
    )


def _padding_range(dataset: pydicom.Dataset, bits: int, signed: bool) -> tuple[float, float] | None:
    ends = [_optional(dataset.get(name)) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [end for end in ends if end is not None]
    if not ends:
        return None
    # Some writers store a negative padding value as unsigned: 63536 is -2000
    ends = [end - 2**bits if signed and end >= 2 ** (bits - 1) else end for end in ends]
    return min(ends), max(ends)


# ---------------------------------------------------------------- DICOM: which files make a series


def discover_dicom(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """Find every axial CT series under a folder (or in one file), from headers alone.

    Files are told apart by patient, study and series; a series that mixes orientations, shapes or pixel
    sizes, or that holds several acquisitions of the same positions, is split. Links are not followed.
    Returns (jobs, rejected), both in path order. Raises ScanError if input_dir does not exist."""
    root = Path(input_dir)
    if not root.exists():
        raise ScanError(root, "no such file or folder", "check the path", "missing")
    series: dict[tuple, list[_Header]] = {}
    rejected: list[Rejected] = []
    seen = 0
    with _quiet_pydicom():
        for path, is_regular in _walk(root):
            seen += 1
            case = _case(root, path)
            try:
                if not is_regular:
                    fix = "copy the file itself here"
                    raise ScanError(path, "a link or a special file", fix, "not_regular")
                header = _parse_header(path, _open_dicom(path, HEADER_TAGS))
            except ScanError as error:
                rejected.append(Rejected(case, shown(path), error.code, f"{error.what} ({error.fix})"))
            else:
                series.setdefault(header.ids, []).append(header)
    jobs: list[Job] = []
    used: Counter[str] = Counter()
    for ids, headers in series.items():
        stacks = [part for stack in _same_grid(headers) for part in _split_acquisitions(stack)]
        for number, stack in enumerate(stacks):
            kept, without_position = _with_position(stack)
            for header in without_position:
                reason = "ImagePositionPatient is missing, the rest of its series has it (export it again)"
                rejected.append(Rejected(_case(root, header.path), shown(header.path), "no_position", reason))
            parts = ("", *ids) if number == 0 else (str(number), *ids)
            case = _case(root, kept[0].path)
            used[case] += 1
            case += f" #{used[case]}" if used[case] > 1 else ""  # several series may share a folder
            jobs.append(Job("dicom", pseudonym(*parts), case, tuple(header.path for header in kept)))
    if not jobs:
        reason = f"no CT images in {shown(root)} ({seen} files seen) (give the folder of an axial CT series)"
        rejected.append(Rejected(shown(root.name), shown(root), "no_ct", reason))
    return jobs, rejected


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
    """(path, is a regular file) of everything under root but folders and an operating system's litter."""
    if not root.is_dir():
        yield str(root), stat.S_ISREG(root.stat().st_mode)
        return
    folders = [str(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.name.lower() in JUNK_NAMES or entry.name.startswith("._"):
                continue
            if not entry.is_dir(follow_symlinks=False):
                yield entry.path, entry.is_file(follow_symlinks=False)
        folders += [entry.path for entry in reversed(listed) if entry.is_dir(follow_symlinks=False)]


def _case(root: Path, path: str) -> str:
    """The folder of a file as seen from root: what a person calls the series."""
    folder = os.path.relpath(Path(path).parent, root if root.is_dir() else root.parent)
    return shown(root.absolute().name if folder == "." else folder)


def _same_grid(headers: list[_Header]) -> list[list[_Header]]:
    """Split where shape, pixel size or orientation really differ."""
    stacks: list[list[_Header]] = []
    for header in headers:
        for stack in stacks:
            if _fits(header, stack[0]):
                stack.append(header)
                break
        else:
            stacks.append([header])
    return stacks


def _fits(a: _Header, b: _Header) -> bool:
    if a.shape != b.shape or not np.allclose(a.spacing, b.spacing, rtol=1e-3):
        return False
    if a.orientation is None or b.orientation is None:
        return a.orientation is b.orientation
    return np.abs(np.subtract(a.orientation, b.orientation)).max() < SAME_ORIENTATION


def _split_acquisitions(stack: list[_Header]) -> list[list[_Header]]:
    """Split by AcquisitionNumber where several acquisitions cover the same positions, and only there.

    Some scanners number every slice as an acquisition of its own, so a number alone means nothing."""
    if len(_position_groups(stack)) == len(stack):
        return [stack]
    parts: dict[str, list[_Header]] = {}
    for header in stack:
        parts.setdefault(header.acquisition, []).append(header)
    clean = all(len(part) > 1 and len(_position_groups(part)) == len(part) for part in parts.values())
    return list(parts.values()) if clean else [stack]


def _position_groups(stack: list[_Header]) -> list[list[_Header]]:
    """Slices with a position, grouped by it, in ascending order."""
    placed = [header for header in stack if header.corner is not None]
    if not placed:
        return [[header] for header in stack]
    normal = slice_normal(placed[0].orientation or AXIAL)
    positions = np.array([header.corner for header in placed]) @ normal
    groups: list[list[_Header]] = []
    previous = -math.inf
    for index in np.argsort(positions, kind="stable"):
        if positions[index] - previous < SAME_POSITION_MM:
            groups[-1].append(placed[index])
        else:
            groups.append([placed[index]])
        previous = positions[index]
    return groups


def _with_position(stack: list[_Header]) -> tuple[list[_Header], list[_Header]]:
    """(kept, left out): where some slices have a position, those without one cannot be placed."""
    placed = [header for header in stack if header.corner is not None]
    if not placed:
        return stack, []
    return placed, [header for header in stack if header.corner is None]


# ---------------------------------------------------------------- DICOM: pixels to HU

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
AIR_RANGE_HU = (-1100, -700)  # air with noise, or the lungs and cushions of a tightly cropped picture
TISSUE_RANGE_HU = (-20, 100)  # water to fresh blood
MIN_FRACTION = 0.005  # of the picture; real slices, even of hollow phantoms, have several times that
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
    try:
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            package = next((package for word, package in CODECS.items() if word in syntax.name), None)
            if package:
                fix = f"pip install pylibjpeg {package}"
                raise ScanError(path, f"{syntax.name} needs a decoder", fix, "no_decoder")
        if syntax == pydicom.uid.RLELossless:
            dataset.pixel_array_options(decoding_plugin="pydicom")  # the others abort on damaged data
        stored = dataset.pixel_array
    except ScanError:
        raise
    except (*DICOM_ERRORS, MemoryError):
        what = f"its pixels cannot be decoded ({syntax.name})"
        raise ScanError(path, what, "export it again, uncompressed", "pixels") from None
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise ScanError(path, f"its pixels have shape {stored.shape}", "export it again", "pixels")
    return stored


def _declared_padding(stored: np.ndarray, header: _Header) -> np.ndarray:
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


def _repair_values(hu: np.ndarray, headers: Sequence[_Header], repairs: list[list[str]]) -> None:
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
    groups: list[list[_Header]]  # per slice; more than one where files share a position
    corners_mm: np.ndarray  # (S, 3)
    orientation: tuple[float, ...]
    thickness_mm: float
    notes: list[str]  # the same for every slice


def _order(headers: list[_Header]) -> _Order:
    """Put slices in spatial order, and say in notes what had to be assumed."""
    first = headers[0]
    notes = []
    orientation = first.orientation
    if orientation is None:
        orientation = AXIAL
        notes.append("ImageOrientationPatient is missing: taken as axial")
    thickness = first.thickness if first.thickness and first.thickness > 0 else None
    if first.corner is not None:
        groups = _position_groups(headers)
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


def read_dicom(job: Job) -> Scan:
    """Read one discovered series into HU.

    Rescale slope and intercept are taken per slice; padding becomes -1024 and is counted; copies of a slice
    are dropped; tilt and uneven gaps are kept. Raises ScanError if a file cannot be read or decoded, if two
    different slices lie at one position, or if the values are not HU."""
    with _quiet_pydicom():
        headers, stored = [], {}
        for path in job.inputs:
            dataset = _open_dicom(path, PIXEL_TAGS)
            if "PixelData" not in dataset:
                what = "truncated: its pixels are missing or incomplete"
                raise ScanError(path, what, "copy or export it again", "truncated")
            headers.append(_parse_header(path, dataset))
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
    if fault:
        what = f"{fault}; RescaleIntercept is {kept[0].intercept:g}"
        raise ScanError(kept[0].path, what, "export it with its true rescale values", "not_hu")
    padding |= hu <= OUTSIDE_FOV_HU
    hu[padding] = AIR_HU
    stack = stack_geometry(order.corners_mm, order.orientation, kept[0].spacing, order.thickness_mm)
    _note_geometry(stack, repairs)
    patient, study, _ = kept[0].ids
    return measured_scan(
        hu=hu.round().clip(AIR_HU, MAX_HU).astype(np.int16),
        affine=stack.affine,
        positions_mm=stack.positions_mm,
        spacing_mm=stack.spacing_mm,
        gantry_tilt_deg=stack.gantry_tilt_deg,
        source="dicom",
        patient_id=pseudonym("patient", patient),
        study_uid=pseudonym("study", patient, study),
        series_uid=job.series_uid,
        labels=unknown_labels(),
        slice_labels=[unknown_labels() for _ in kept],
        repairs=repairs,
        padding_count=int(padding.sum()),
    )


def _hu(stored: np.ndarray, header: _Header) -> np.ndarray:
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
