"""The headers of DICOM files, in folders and in zip archives: what a file is, and which make up a series.

Names, birth dates and other identifiers stay in the files: only the tags of HEADER_TAGS are read. Zip
archives are read where they lie: a member is the path "<archive>.zip//<member>"; nothing is ever unpacked to
disk."""

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

from volumes import (
    AXIAL,
    JUNK_NAMES,
    MAX_SIDE_PX,
    SAME_ORIENTATION,
    SAME_POSITION_MM,
    SKIPPED,
    Job,
    Rejected,
    ScanError,
    pseudonym,
    shown,
    slice_normal,
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


class Header(NamedTuple):
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
def quiet_pydicom() -> Iterator[None]:
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


def open_dicom(path: str, tags: Sequence[str]) -> pydicom.Dataset:
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


def read_header(path: str) -> Header:
    """The header of one CT slice. Raises ScanError."""
    with contextlib.suppress(ScanError, OSError, *DICOM_ERRORS):  # pydicom has the last word
        head, size = _head(path)
        tags = _plain_tags(head)
        if tags is not None:
            return _parse_header(path, tags, size)
    dataset = open_dicom(path, HEADER_TAGS)
    with _named_errors(path, "damaged DICOM header"):
        tags = {name: dataset.get(name) for name in HEADER_TAGS}
        meta = ("MediaStorageSOPClassUID", "TransferSyntaxUID")
        tags |= {name: dataset.file_meta.get(name) for name in meta}
        return _parse_header(path, tags, _head(path)[1])


HEADERS_AT_A_TIME = 500  # a fraction of a second of work for one process


def _read_headers(paths: Sequence[str]) -> list[Header | ScanError]:
    found: list[Header | ScanError] = []
    with quiet_pydicom():
        for path in paths:
            try:
                found.append(read_header(path))
            except ScanError as error:
                found.append(error)
    return found


def read_headers(paths: Iterable[str], workers: int = 1) -> Iterator[tuple[str, Header | ScanError]]:
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
        what = f"not a CT image (modality {_spoken(modality, MODALITIES)}, {uid_name(sop_class)})"
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


def uid_name(uid: str) -> str:
    """What DICOM calls a UID; never the UID itself, in which a file can say anything."""
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


def _parse_header(path: str, tags: dict[str, Any], size_bytes: int) -> Header:
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
    return Header(
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


class Index(NamedTuple):
    """The headers below a folder."""

    series: dict[tuple[str, str, str], list[Header]]  # by (patient, study, series)
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
    series: dict[tuple[str, str, str], list[Header]] = {}
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
            headers.append(Header(*(b if a == b else a for a, b in zip(found, headers[0], strict=True))))
        elif limit is None or len(series) < limit:
            series[found.ids] = [found]
    return Index(series, sorted(rejected, key=lambda entry: entry.file), seen)


def series_jobs(
    root: Path, series: dict[tuple[str, str, str], list[Header]], source: str
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


def split_stacks(headers: list[Header]) -> list[list[Header]]:
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


def _same_grid(headers: list[Header]) -> list[list[Header]]:
    """Split where shape, pixel size or orientation really differ."""
    stacks: list[list[Header]] = []
    for header in headers:
        for stack in stacks:
            if _fits(header, stack[0]):
                stack.append(header)
                break
        else:
            stacks.append([header])
    return stacks


def _fits(a: Header, b: Header) -> bool:
    spacings = zip(a.spacing, b.spacing, strict=True)
    if a.shape != b.shape or any(abs(x - y) > 1e-3 * y for x, y in spacings):
        return False
    if a.orientation is None or b.orientation is None:
        return a.orientation is b.orientation
    cosines = zip(a.orientation, b.orientation, strict=True)
    return a.orientation is b.orientation or all(abs(x - y) < SAME_ORIENTATION for x, y in cosines)


def _split_acquisitions(stack: list[Header]) -> list[list[Header]]:
    """Split by AcquisitionNumber or by kernel where several cover the same positions, and only there.

    Some scanners number every slice as an acquisition of its own, so a number alone means nothing."""
    if len(position_groups(stack)) == len(stack):
        return [stack]
    for names in (("acquisition",), ("kernel",), ("acquisition", "kernel")):
        parts: dict[tuple, list[Header]] = {}
        for header in stack:
            parts.setdefault(tuple(getattr(header, name) for name in names), []).append(header)
        if all(len(part) > 1 and len(position_groups(part)) == len(part) for part in parts.values()):
            return list(parts.values())
    return [stack]


def positions_mm(stack: list[Header]) -> np.ndarray:
    """(S,) positions along the normal of slices that have one."""
    return np.array([header.corner for header in stack]) @ slice_normal(stack[0].orientation or AXIAL)


def position_groups(stack: list[Header]) -> list[list[Header]]:
    """Slices with a position, grouped by it, in ascending order."""
    placed = [header for header in stack if header.corner is not None]
    if not placed:
        return [[header] for header in stack]
    positions = positions_mm(placed)
    groups: list[list[Header]] = []
    previous = -math.inf
    for index in np.argsort(positions, kind="stable"):
        if positions[index] - previous < SAME_POSITION_MM:
            groups[-1].append(placed[index])
        else:
            groups.append([placed[index]])
        previous = positions[index]
    return groups


def _with_position(stack: list[Header]) -> tuple[list[Header], list[Header]]:
    """(kept, left out): where some slices have a position, those without one cannot be placed."""
    placed = [header for header in stack if header.corner is not None]
    if not placed:
        return stack, []
    return placed, [header for header in stack if header.corner is None]
