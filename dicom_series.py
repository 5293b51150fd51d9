"""A DICOM folder -> its CT series as Scans in HU.

Names, birth dates and other identifiers stay in the files: only the tags of HEADER_TAGS are read, and ids
leave as hashes. Zip archives are read where they lie: a member is the path "<archive>.zip//<member>", and
nothing is ever unpacked to disk."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import math
import multiprocessing
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import data_element_generator
from pydicom.pixels import get_decoder
from scipy import ndimage

from volumes import (
    AIR_HU,
    AIR_RANGE_HU,
    ASSUMED_SLICE_SPACING_MM,
    AXIAL,
    BESIDE_TOLERANCE_MM,
    GAP_TOLERANCE,
    JUNK_NAMES,
    MAX_HU,
    MAX_SIDE_PX,
    MIN_FRACTION,
    OUTSIDE_FOV_HU,
    SAME_ORIENTATION,
    SAME_POSITION_MM,
    SKIPPED,
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

# ---------------------------------------------------------------- DICOM: headers

HEADER_TAGS = (
    *("SOPClassUID", "Modality", "ImageType", "NumberOfFrames", "SamplesPerPixel"),  # what it is
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "AcquisitionNumber"),  # what it belongs to
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"),  # where it lies
    *("InstanceNumber", "SliceLocation", "SliceThickness"),  # where it lies if its position is missing
    "ConvolutionKernel",  # which of several series of a scan
    *("RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "PixelPaddingRangeLimit"),  # what values mean
    *("PhotometricInterpretation", "PlanarConfiguration", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "HighBit"),
)
PIXEL_TAGS = (*HEADER_TAGS, "PixelData")

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
IMPLICIT = "1.2.840.10008.1.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
UNCOMPRESSED = {IMPLICIT, "1.2.840.10008.1.2.1", BIG_ENDIAN}

# Pictures about a scan that are filed as CT images
LOCALIZER_WORDS = {"LOCALIZER", "SCOUT", "SURVIEW", "TOPOGRAM"}
REPORT_WORDS = {"DOSE_INFO", "DOSE INFO", "SCREEN SAVE", "REF_SURVIEW"}

MODALITIES = {
    "CR",
    "DX",
    "MR",
    "OT",
    "PR",
    "PT",
    "RTDOSE",
    "RTPLAN",
    "RTSTRUCT",
    "SC",
    "SEG",
    "SR",
    "US",
    "XA",
}
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
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
    zipfile.BadZipFile,
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
    kernel: str
    slope: float
    intercept: float
    bits_stored: int
    signed: bool
    monochrome1: bool
    padding: tuple[float, float] | None  # stored values, both ends included


@contextlib.contextmanager
def _quiet_pydicom() -> Iterator[None]:
    """No complaints about invalid UIDs and the like: real archives are full of them, they do no harm, and
    they quote what the files say."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def _open_dicom(path: str, tags: Sequence[str]) -> pydicom.Dataset:
    """The allow-listed elements of one DICOM file. Raises ScanError."""
    with _named_errors(path, "damaged DICOM file"), _open(path) as file:
        if file.read(132)[128:] != b"DICM":
            if Path(path).suffix.lower() in DICOM_SUFFIXES:
                raise ScanError(path, "not a DICOM file", "export it again or remove it", "not_dicom")
            raise ScanError(path, "not a DICOM file", SKIPPED, "other_file")
        elements = data_element_generator(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
        syntax = {int(element.tag): element.value for element in elements}.get(0x00020010) or b""
        if syntax.strip(b"\0 ") == DEFLATED.encode():
            return _inflate(path, file.read(MAX_INFLATED_BYTES), tags)
        file.seek(0)
        return pydicom.dcmread(file, specific_tags=list(tags), stop_before_pixels="PixelData" not in tags)


@contextlib.contextmanager
def _named_errors(path: str, what: str) -> Iterator[None]:
    """Whatever a damaged file makes pydicom and zipfile raise becomes a ScanError."""
    try:
        yield
    except ScanError:
        raise
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ScanError(path, reason, "check the disk and the permissions", "unreadable") from None
    except DICOM_ERRORS as error:
        raise ScanError(
            path, f"{what} ({type(error).__name__})", "copy or export it again", "damaged"
        ) from None


def _inflate(path: str, deflated: bytes, tags: Sequence[str]) -> pydicom.Dataset:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(deflated, MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        what = f"inflates to more than {MAX_INFLATED_BYTES >> 20} MiB"
        raise ScanError(path, what, "export it uncompressed", "too_large")
    dataset = pydicom.dcmread(io.BytesIO(plain), force=True, specific_tags=list(tags))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = DEFLATED
    return dataset


# ---------------------------------------------------------------- DICOM: headers by the hundred thousand

HEAD_BYTES = 8192  # most headers end well before; a disk reads no less at a time
TAGS = {pydicom.datadict.tag_for_keyword(name): name for name in HEADER_TAGS} | {
    0x00020002: "MediaStorageSOPClassUID",
    0x00020010: "TransferSyntaxUID",
}
LAST_TAG = max(TAGS)
VRS = {tag: pydicom.datadict.dictionary_VR(tag).encode()[:2] for tag in TAGS}  # "US or SS" counts as US
NUMBER_VRS = {b"US": struct.Struct("<H"), b"SS": struct.Struct("<h")}
TEXT_VRS = frozenset({b"CS", b"DS", b"IS", b"LO", b"SH", b"UI"})
LONG_VRS = frozenset(
    {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
)
SHORT_VRS = TEXT_VRS | {
    b"AE",
    b"AS",
    b"AT",
    b"DA",
    b"DT",
    b"FL",
    b"FD",
    b"LT",
    b"PN",
    b"SL",
    b"ST",
    b"TM",
    b"UL",
}
SHORT_VRS |= NUMBER_VRS.keys()
UNDEFINED_LENGTH = 0xFFFFFFFF
EXPLICIT_ELEMENT, IMPLICIT_ELEMENT = struct.Struct("<HH2sH"), struct.Struct("<HHI")
LONG_LENGTH = struct.Struct("<I")


def _plain_tags(head: bytes) -> dict[str, Any] | None:
    """HEADER_TAGS by name, as numbers, strings and lists of strings, from the first bytes of a file.

    None wherever pydicom is needed: big-endian or deflated, sequences of undefined length, text beyond ASCII,
    a header that is longer than head, anything odd. The point is speed: pydicom takes ten times as long."""
    if head[128:132] != b"DICM":
        return None
    tags: dict[str, Any] = {}
    at, previous, size, implicit = 132, 0, len(head), False
    while at + 12 <= size:
        group, element, vr, length = EXPLICIT_ELEMENT.unpack_from(head, at)
        tag = group << 16 | element
        if tag > LAST_TAG:
            return tags if "TransferSyntaxUID" in tags else None
        if tag <= previous:
            return None
        if group > 2 >= previous >> 16:  # the file's own encoding begins here
            syntax = tags.get("TransferSyntaxUID")
            if syntax in (DEFLATED, BIG_ENDIAN):
                return None
            implicit = syntax == IMPLICIT
        previous = tag
        at += 8
        if implicit:
            length = IMPLICIT_ELEMENT.unpack_from(head, at - 8)[2]
            vr = VRS.get(tag)
        elif vr in LONG_VRS:
            length = LONG_LENGTH.unpack_from(head, at)[0]
            at += 4
        elif vr not in SHORT_VRS:
            return None
        end = at + length
        if length == UNDEFINED_LENGTH or end > size:
            return None
        name = TAGS.get(tag)
        if name is not None:
            value = head[at:end]
            if vr in TEXT_VRS:
                if not value.isascii() or b"\x1b" in value:
                    return None
                text = value.decode("ascii").strip("\0 ")
                tags[name] = [part.strip() for part in text.split("\\")] if "\\" in text else text
            elif vr in NUMBER_VRS and length == 2:
                tags[name] = NUMBER_VRS[vr].unpack(value)[0]
            elif length:
                return None
        at = end
    return None


def _head(path: str) -> tuple[bytes, int]:
    """(the first bytes of a file, its size)."""
    if _in_archive(path):
        archive, member = _archived(path)
        with archive.open(member) as file:
            return file.read(HEAD_BYTES), member.file_size
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(handle, HEAD_BYTES), os.fstat(handle).st_size
    finally:
        os.close(handle)


def _read_header(path: str) -> _Header:
    """The header of one CT slice. Raises ScanError."""
    with contextlib.suppress(ScanError, OSError, *DICOM_ERRORS):  # pydicom has the last word
        head, size = _head(path)
        tags = _plain_tags(head)
        if tags is not None:
            return _parse_header(path, tags, size)
    dataset = _open_dicom(path, HEADER_TAGS)
    with _named_errors(path, "damaged DICOM header"):
        tags = {name: dataset.get(name) for name in HEADER_TAGS}
        meta = ("MediaStorageSOPClassUID", "TransferSyntaxUID")
        tags |= {name: dataset.file_meta.get(name) for name in meta}
        return _parse_header(path, tags, _head(path)[1])


HEADERS_AT_A_TIME = 500  # a fraction of a second of work for one process


def _read_headers(paths: Sequence[str]) -> list[_Header | ScanError]:
    found: list[_Header | ScanError] = []
    with _quiet_pydicom():
        for path in paths:
            try:
                found.append(_read_header(path))
            except ScanError as error:
                found.append(error)
    return found


def read_headers(paths: Iterable[str], workers: int = 1) -> Iterator[tuple[str, _Header | ScanError]]:
    """(path, its header or why there is none) for each path, in order, by several processes if asked for.

    Only a few batches are under way at a time, so that memory does not grow with the number of files."""
    paths = iter(paths)
    batches = iter(lambda: list(itertools.islice(paths, HEADERS_AT_A_TIME)), [])
    if workers == 1:
        for batch in batches:
            yield from zip(batch, _read_headers(batch), strict=True)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_read_headers, batch)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)


# ---------------------------------------------------------------- zip archives

# Between an archive and its member; paths of real files have no double slash inside
IN_ARCHIVE = re.compile(r"(?<=\.zip)//", re.IGNORECASE)
MAX_MEMBERS = 100_000  # several whole studies
MAX_ARCHIVE_BYTES = 1 << 35  # 32 GiB unpacked: the same
MAX_RATIO = 200  # unpacked to packed; CT slices reach 10, bombs 1000
ARCHIVE_SUFFIXES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}


def _in_archive(path: str) -> bool:
    return "//" in path and IN_ARCHIVE.search(path) is not None


def _archived(path: str) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    place, member = IN_ARCHIVE.split(path, maxsplit=1)
    facts = Path(place).stat()
    archive = _open_archive(place, (facts.st_size, facts.st_mtime_ns), os.getpid())
    return archive, archive.getinfo(member)


@functools.lru_cache(maxsize=1)  # a series lies in one archive; its table of contents is read once
def _open_archive(path: str, state: tuple, process: int) -> zipfile.ZipFile:  # noqa: ARG001 parts of the key
    return zipfile.ZipFile(path)


def _open(path: str) -> BinaryIO:
    """A file, or the bytes of a member of an archive, never more than its limit."""
    if not _in_archive(path):
        return Path(path).open("rb")
    archive, member = _archived(path)
    with archive.open(member) as file:
        data = file.read(MAX_INFLATED_BYTES + 1)
    if len(data) > MAX_INFLATED_BYTES:
        raise ScanError(path, "a member of more than 64 MiB", "unpack it yourself", "too_large")
    return io.BytesIO(data)


def _walk_archive(path: str) -> Iterator[tuple[str, ScanError | None]]:
    """(path, what is wrong with it) of every member, or the archive alone where it is refused as a whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        fault = _archive_fault(members, Path(path).stat().st_size)
    except (OSError, *DICOM_ERRORS):
        fault = "not a zip archive, or a damaged one"
    if fault:
        yield path, ScanError(path, fault, "unpack it yourself and give the folder", "archive")
        return
    for member in members:
        name = PurePosixPath(member.filename)
        if member.is_dir() or _is_junk(name.name) or name.parts[:1] == ("__MACOSX",):
            continue
        place = f"{path}//{member.filename}"
        problem = None
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            problem = ("a link or a special file", "pack the file itself", "not_regular")
        elif member.flag_bits & 1:
            problem = ("encrypted", "unpack it yourself and give the folder", "encrypted")
        elif name.suffix.lower() in ARCHIVE_SUFFIXES:
            problem = ("an archive inside an archive", "unpack it yourself", "nested_archive")
        elif member.file_size > MAX_INFLATED_BYTES:
            what = f"a member of more than {MAX_INFLATED_BYTES >> 20} MiB"
            problem = (what, "unpack it yourself and give the folder", "too_large")
        yield place, problem and ScanError(place, *problem)


def _archive_fault(members: list[zipfile.ZipInfo], packed_bytes: int) -> str | None:
    """Why an archive is refused as a whole, or None; from its table of contents alone."""
    unpacked = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or unpacked > MAX_ARCHIVE_BYTES:
        return f"an archive of {len(members)} members and {unpacked >> 20} MiB, more than the limit"
    if unpacked > MAX_RATIO * packed_bytes:
        return f"an archive that unpacks to {unpacked // packed_bytes} times its size"
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        return "an archive with two members of one name"
    if any(".." in PurePosixPath(name).parts or name.startswith(("/", "\\")) for name in names):
        return "an archive whose member names lead out of it"
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        return "an archive of another compression than deflate"
    return None


# ---------------------------------------------------------------- DICOM: what a header says


def _check_kind(path: str, tags: dict[str, Any]) -> None:
    """Raise ScanError, which names what it is, unless the file is one CT slice."""
    sop_class = _text(tags, "SOPClassUID") or _text(tags, "MediaStorageSOPClassUID")
    modality = _text(tags, "Modality")
    words = {str(word).upper() for word in _sequence(tags.get("ImageType"))}
    if sop_class == MEDIA_DIRECTORY:
        raise ScanError(path, "a DICOMDIR, not an image", SKIPPED, "dicomdir")
    if sop_class.startswith(SECONDARY_CAPTURE) or words & REPORT_WORDS:
        raise ScanError(path, "a secondary capture, not a CT slice", SKIPPED, "secondary_capture")
    if (
        modality not in ("", "CT")
        or sop_class not in ("", CT_IMAGE, *ENHANCED_CT)
        or not (modality or sop_class)
    ):
        what = f"not a CT image (modality {_spoken(modality, MODALITIES)}, {_uid_name(sop_class)})"
        raise ScanError(path, what, SKIPPED, "not_ct")
    if sop_class in ENHANCED_CT or _number(tags.get("NumberOfFrames") or 1) > 1:
        what = "an enhanced (multi-frame) CT object"
        raise ScanError(path, what, "export it as classic CT images", "multi_frame")
    if _number(tags.get("SamplesPerPixel") or 1) != 1:
        raise ScanError(path, "a colour picture, not a CT slice", SKIPPED, "colour")
    if words & LOCALIZER_WORDS:
        raise ScanError(path, "a localizer, not a CT slice", SKIPPED, "localizer")


def _spoken(word: str, known: set[str]) -> str:
    """A word of a file as a message may repeat it: a field can hold anything, a name too."""
    return word if word in known else "unknown" if word else "missing"


def _uid_name(uid: str) -> str:
    return pydicom.uid.UID(uid).name if uid in pydicom.uid.UID_dictionary else "of an unknown kind"


def _text(tags: dict[str, Any], name: str) -> str:
    return "\\".join(str(part) for part in _sequence(tags.get(name))).strip()


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


def _parse_header(path: str, tags: dict[str, Any], size_bytes: int) -> _Header:
    """Check and take what is needed. Raises ScanError, or one of DICOM_ERRORS for values of a wrong kind."""
    _check_kind(path, tags)
    rows, columns = int(_number(tags.get("Rows"))), int(_number(tags.get("Columns")))
    if not (0 < rows <= MAX_SIDE_PX and 0 < columns <= MAX_SIDE_PX):
        raise ScanError(path, f"{rows} x {columns} pixels is no CT slice", "export it again", "damaged")
    for name, meaning in (
        ("RescaleSlope", "its HU are unknown"),
        ("RescaleIntercept", "its HU are unknown"),
        ("PixelSpacing", "its size is unknown"),
    ):
        if not _text(tags, name):
            code = "no_rescale" if name.startswith("Rescale") else "no_geometry"
            raise ScanError(path, f"{name} is missing: {meaning}", "export it again with this tag", code)
    bits, bits_stored = int(_number(tags.get("BitsAllocated"))), int(_number(tags.get("BitsStored")))
    syntax = _text(tags, "TransferSyntaxUID")
    if not syntax:
        raise ScanError(path, "the transfer syntax is missing", "export it again", "damaged")
    if syntax in UNCOMPRESSED and size_bytes < rows * columns * bits // 8:
        raise ScanError(path, "truncated: its pixels are incomplete", "copy or export it again", "truncated")
    slope, spacing = _number(tags["RescaleSlope"]), _vector(tags["PixelSpacing"], 2)
    if slope == 0 or min(spacing) <= 0:
        what = f"RescaleSlope {slope:g} or PixelSpacing {spacing} is impossible"
        raise ScanError(path, what, "export it again", "damaged")
    orientation = _vector(tags.get("ImageOrientationPatient"), 6)
    signed = bool(_number(tags.get("PixelRepresentation") or 0))
    folder = str(Path(path).parent)
    study = _text(tags, "StudyInstanceUID") or folder  # blank ids: a folder is the best guess
    return _Header(
        path=path,
        ids=(_text(tags, "PatientID") or study, study, _text(tags, "SeriesInstanceUID") or folder),
        shape=(rows, columns),
        spacing=spacing,
        orientation=None if orientation is None else _axial_unit_vectors(path, orientation),
        corner=_vector(tags.get("ImagePositionPatient"), 3),
        acquisition=_text(tags, "AcquisitionNumber"),
        instance=_optional(tags.get("InstanceNumber")),
        location=_optional(tags.get("SliceLocation")),
        thickness=_optional(tags.get("SliceThickness")),
        kernel=_text(tags, "ConvolutionKernel"),
        slope=slope,
        intercept=_number(tags["RescaleIntercept"]),
        bits_stored=bits_stored,
        signed=signed,
        monochrome1=_text(tags, "PhotometricInterpretation") == "MONOCHROME1",
        padding=_padding_range(tags, bits, signed),
    )


def _axial_unit_vectors(path: str, orientation: tuple[float, ...]) -> tuple[float, ...]:
    """ImageOrientationPatient with both vectors scaled to length 1. Raises ScanError."""
    a, b, c, d, e, f = orientation  # plain numbers: this runs for every header
    row, column = math.hypot(a, b, c), math.hypot(d, e, f)
    if abs(row - 1) > 0.01 or abs(column - 1) > 0.01 or abs(a * d + b * e + c * f) > 0.01:
        what = "ImageOrientationPatient is not a pair of perpendicular unit vectors"
        raise ScanError(path, what, "export it again", "no_geometry")
    if abs(a * e - b * d) < max(abs(b * f - c * e), abs(c * d - a * f)):  # of the normal
        what = "a coronal or sagittal slice; networks here see axial slices"
        raise ScanError(path, what, "use the axial series", "not_axial")
    return a / row, b / row, c / row, d / column, e / column, f / column


def _padding_range(tags: dict[str, Any], bits: int, signed: bool) -> tuple[float, float] | None:
    ends = [_optional(tags.get(name)) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [end for end in ends if end is not None]
    if not ends:
        return None
    # Some writers store a negative padding value as unsigned: 63536 is -2000
    ends = [end - 2**bits if signed and end >= 2 ** (bits - 1) else end for end in ends]
    return min(ends), max(ends)


# ---------------------------------------------------------------- DICOM: which files make a series


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


class Index(NamedTuple):
    """The headers below a folder."""

    series: dict[tuple[str, str, str], list[_Header]]  # by (patient, study, series)
    rejected: list[Rejected]
    seen: int  # files, used or not


def index_series(
    root: Path,
    files: Iterable[tuple[str, ScanError | None]],
    *,
    limit: int | None = None,
    workers: int = 1,
) -> Index:
    """Read the header of each file, as walk lists them, and sort them into series.

    limit: keep only the series that turn up first; all headers are read even so, because a series is
    complete only when every file has been seen."""
    series: dict[tuple[str, str, str], list[_Header]] = {}
    rejected: list[Rejected] = []
    seen = 0

    def reject(path: str, error: ScanError) -> None:
        rejected.append(Rejected(_case(root, path), shown(path), error.code, f"{error.what} ({error.fix})"))

    def regular() -> Iterator[str]:
        nonlocal seen
        for path, problem in files:
            seen += 1
            if problem is None:
                yield path
            else:
                reject(path, problem)

    for path, found in read_headers(regular(), workers):
        if isinstance(found, ScanError):
            reject(path, found)
        elif found.ids in series:
            headers = series[found.ids]
            # Equal fields become one object: the headers of 750,000 slices stay in memory together
            headers.append(_Header(*(b if a == b else a for a, b in zip(found, headers[0], strict=True))))
        elif limit is None or len(series) < limit:
            series[found.ids] = [found]
    return Index(series, sorted(rejected, key=lambda entry: entry.file), seen)


def series_jobs(
    root: Path, series: dict[tuple[str, str, str], list[_Header]], source: str
) -> tuple[list[Job], list[Rejected]]:
    """One job per stack of slices that belong together, its inputs their paths; and what fits nowhere."""
    jobs: list[Job] = []
    rejected: list[Rejected] = []
    used: Counter[str] = Counter()
    for ids, headers in series.items():
        for number, stack in enumerate(split_stacks(headers)):
            kept, without_position = _with_position(stack)
            for header in without_position:
                reason = "ImagePositionPatient is missing, the rest of its series has it (export it again)"
                rejected.append(Rejected(_case(root, header.path), shown(header.path), "no_position", reason))
            parts = ("", *ids) if number == 0 else (str(number), *ids)
            case = _case(root, kept[0].path)
            used[case] += 1
            case += f" #{used[case]}" if used[case] > 1 else ""  # several series may share a folder
            jobs.append(Job(source, pseudonym(*parts), case, tuple(header.path for header in kept)))
    return jobs, rejected


def split_stacks(headers: list[_Header]) -> list[list[_Header]]:
    """The headers of one series, split where its slices cannot lie in one stack."""
    return [part for stack in _same_grid(headers) for part in _split_acquisitions(stack)]


def _is_junk(name: str) -> bool:
    return name.lower() in JUNK_NAMES or name.startswith("._")


def walk(root: Path) -> Iterator[tuple[str, ScanError | None]]:
    """(path, why it must not be opened) of everything under root but folders and an operating system's
    litter, with the members of zip archives in the place of these."""
    for path, is_regular in _walk_files(root):
        if not is_regular:
            fix = "copy the file itself here"
            yield path, ScanError(path, "a link or a special file", fix, "not_regular")
        elif path.lower().endswith(".zip"):
            yield from _walk_archive(path)
        else:
            yield path, None


def _walk_files(root: Path) -> Iterator[tuple[str, bool]]:
    if not root.is_dir():
        yield str(root), stat.S_ISREG(root.stat().st_mode)
        return
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            listed = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False))
                for entry in entries
                if not _is_junk(entry.name)
            )
        for name, is_dir, is_regular in listed:
            if not is_dir:
                yield f"{folder}{os.sep}{name}", is_regular
        folders += [f"{folder}{os.sep}{name}" for name, is_dir, _ in reversed(listed) if is_dir]


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
    spacings = zip(a.spacing, b.spacing, strict=True)
    if a.shape != b.shape or any(abs(x - y) > 1e-3 * y for x, y in spacings):
        return False
    if a.orientation is None or b.orientation is None:
        return a.orientation is b.orientation
    cosines = zip(a.orientation, b.orientation, strict=True)
    return a.orientation is b.orientation or all(abs(x - y) < SAME_ORIENTATION for x, y in cosines)


def _split_acquisitions(stack: list[_Header]) -> list[list[_Header]]:
    """Split by AcquisitionNumber or by kernel where several cover the same positions, and only there.

    Some scanners number every slice as an acquisition of its own, so a number alone means nothing."""
    if len(position_groups(stack)) == len(stack):
        return [stack]
    for names in (("acquisition",), ("kernel",), ("acquisition", "kernel")):
        parts: dict[tuple, list[_Header]] = {}
        for header in stack:
            parts.setdefault(tuple(getattr(header, name) for name in names), []).append(header)
        if all(len(part) > 1 and len(position_groups(part)) == len(part) for part in parts.values()):
            return list(parts.values())
    return [stack]


def positions_mm(stack: list[_Header]) -> np.ndarray:
    """(S,) positions along the normal of slices that have one."""
    return np.array([header.corner for header in stack]) @ slice_normal(stack[0].orientation or AXIAL)


def position_groups(stack: list[_Header]) -> list[list[_Header]]:
    """Slices with a position, grouped by it, in ascending order."""
    placed = [header for header in stack if header.corner is not None]
    if not placed:
        return [[header] for header in stack]
    positions = positions_mm(placed)
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
    name = _uid_name(syntax)
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


def read_pixels(paths: Sequence[str]) -> SeriesPixels:
    """Read the files of one series into HU, in spatial order.

    Rescale slope and intercept are taken per slice; padding becomes -1024 and is counted; copies of a slice
    are dropped; tilt and uneven gaps are kept. Raises ScanError if a file cannot be read or decoded, if two
    different slices lie at one position, or if the values are not HU."""
    with _quiet_pydicom():
        headers, stored = [], {}
        for path in paths:
            dataset = _open_dicom(path, PIXEL_TAGS)
            if "PixelData" not in dataset:
                what = "truncated: its pixels are missing or incomplete"
                raise ScanError(path, what, "copy or export it again", "truncated")
            headers.append(_read_header(path))
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


def read_dicom(job: Job) -> Scan:
    """Read one discovered series into HU. Raises ScanError, see read_pixels."""
    return scan_of(job, read_pixels(job.inputs))


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
