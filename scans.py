"""Raw files -> a Scan in HU, and back to NIfTI. READERS holds every format by its command-line name.

A reader has two halves: `discover` looks at headers only and lists the jobs and what it rejects, `read` turns
one job into a Scan. Jobs are small and picklable, so that worker processes can share them. Names, birth dates
and other identifiers stay in the files: only the tags of HEADER_TAGS are read, and ids leave as hashes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import os
import stat
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import get_decoder
from scipy import ndimage

from anatomy import LESION_CLASSES, measure_noise_hu
from stage import atomic_write, stable_seed

AIR_HU = -1024  # what padding becomes; also the lowest HU kept
MAX_HU = 3071  # the 12-bit range of CT: above it there is only metal
OUTSIDE_FOV_HU = -1500  # scanners mark what they did not image by -1500, -2000, -2048, -3024; air is -1000
LABEL_NAMES = (*LESION_CLASSES[:5], "any", "ischemia")
ASSUMED_SLICE_SPACING_MM = 5.0  # routine head protocol, for files that tell no spacing at all


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
    {"localizer", "secondary_capture", "colour", "not_ct", "dicomdir", "other_file", "not_axial"}
)


class Job(NamedTuple):
    """One series to read. series_uid is the pseudonym under which its Scan will be stored."""

    source: str
    series_uid: str
    case: str
    inputs: Any  # whatever the reader's `read` needs; picklable


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
    padding_count: int = 0  # pixels set to -1024 because they were padding
    noise_hu: float = field(default=math.nan)  # anatomy.measure_noise_hu; NaN where there is no brain


def read_scan(job: Job) -> Scan:
    """Read one job with the reader that discovered it. Raises ScanError if the series cannot be used."""
    return READERS[job.source].read(job)


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

SAME_POSITION_MM = 0.01  # headers print positions to 0.01 mm or better
SAME_ORIENTATION = 0.01  # in direction cosines, about half a degree
GAP_TOLERANCE = 0.01  # relative; less is rounding
BESIDE_TOLERANCE_MM = 0.5  # about a pixel


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
    return _measured(
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


def _measured(**fields: Any) -> Scan:
    """A Scan with its noise measured."""
    return Scan(**fields, noise_hu=measure_noise_hu(fields["hu"], fields["spacing_mm"]))


# ---------------------------------------------------------------- phantom


class _PhantomPatient(NamedTuple):
    name: str
    seed: int
    size: int
    slices: int


PHANTOM_NOISE_HU = 4.0  # a routine head scan, the dose that every dose model starts from


def discover_phantom(
    patients: int, size: int = 128, slices: int = 24, seed: int = 42
) -> tuple[list[Job], list[Rejected]]:
    """Jobs for synthetic patients; patient i is the same however many are asked for.

    size: pixels along both sides. Seeds are hashed, so that neighbouring seeds share no patient.
    Raises ValueError if patients, size or slices is below 1."""
    for name, value in (("patients", patients), ("size", size), ("slices", slices)):
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    jobs = []
    for index in range(patients):
        name = f"phantom-{seed}-{index:04d}"
        inputs = _PhantomPatient(name, stable_seed("phantom", seed, index), size, slices)
        jobs.append(Job("phantom", pseudonym("phantom", name, str(size), str(slices)), name, inputs))
    return jobs, []


def read_phantom(job: Job) -> Scan:
    """Generate one synthetic patient, with its mask and its noise-free truth."""
    from phantom import generate_phantom  # here, so that reading real files needs no phantom

    patient = job.inputs
    made = generate_phantom(patient.seed, size=patient.size, slices=patient.slices, noise_hu=PHANTOM_NOISE_HU)
    count = len(made.hu)
    positions = np.asarray(made.affine)[2, 3] + made.spacing_mm[0] * np.arange(count)
    return _measured(
        hu=made.hu.round().clip(AIR_HU, MAX_HU).astype(np.int16),
        affine=np.asarray(made.affine, np.float64),
        positions_mm=tuple(float(p) for p in positions),
        spacing_mm=tuple(float(s) for s in made.spacing_mm),
        gantry_tilt_deg=0.0,
        source="phantom",
        patient_id=pseudonym("patient", patient.name),
        study_uid=pseudonym("study", patient.name),
        series_uid=job.series_uid,
        labels={name: made.labels.get(name) for name in LABEL_NAMES},
        slice_labels=[{name: labels.get(name) for name in LABEL_NAMES} for labels in made.slice_labels],
        repairs=[[] for _ in range(count)],
        mask=made.mask.astype(np.uint8),
        truth=made.truth.round().clip(AIR_HU, MAX_HU).astype(np.int16),
    )


READERS: dict[str, Reader] = {
    "dicom": Reader(discover_dicom, read_dicom),
    "phantom": Reader(discover_phantom, read_phantom),
}


# ---------------------------------------------------------------- NIfTI out

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nifti(
    path: str | Path,
    volume: np.ndarray,
    scan_affine_lps: np.ndarray,
    positions_mm: Sequence[float] | None = None,
) -> bool:
    """Write (S, H, W) as NIfTI in RAS, atomically. Returns whether it was resampled to an even grid.

    scan_affine_lps: (4, 4), (column, row, slice) -> LPS mm, stepping by the median gap. positions_mm: (S,)
    along the normal; where its gaps differ by more than 1 % the volume is resampled between its first and its
    last slice, linearly (uint8 and bool, which are masks: nearest slice), and the header says so. A tilt
    stays in the affine: interpolation runs from slice to slice along the shear, so no pixel moves sideways.
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
