"""NIfTI files -> Scans in HU: any folder of them, PhysioNet CT-ICH with its labels, BHSD with its masks.

Only what says where and what the voxels are is taken from a header: its free texts and extensions stay in the
file, and ids leave as hashes."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import math
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import nibabel as nib
import numpy as np

from anatomy import LESION_CLASSES
from volumes import (
    AIR_HU,
    ASSUMED_HU,
    BESIDE_TOLERANCE_MM,
    JUNK_NAMES,
    LABEL_NAMES,
    LPS_TO_RAS,
    MAX_HU,
    MAX_SIDE_PX,
    OUTSIDE_FOV_HU,
    SKIPPED,
    Job,
    Reader,
    Rejected,
    Scan,
    ScanError,
    hu_fault,
    measured_scan,
    pseudonym,
    shown,
    stack_geometry,
    unknown_labels,
)

HEMORRHAGES = LESION_CLASSES[:5]
UNKNOWN_LESION = 255  # mask class of a lesion whose kind nobody has told
MAX_EXPANDED_BYTES = 2 << 30  # eight times a thin-slice head of 512 x 512 x 500; no bomb gets further
MAX_OFFSET_BYTES = 1 << 26  # of header extensions before the voxels
MOST_DEFLATE_SHRINKS = 1032  # the format's limit: a gzip file that promises more lies
SPACING_RANGE_MM = (0.05, 50.0)  # a micro-CT of an ear to the gaps of a planning scan
MOST_PIXEL_STRETCH = 3.0  # longer pixels are thick coronal or sagittal slices, seen from the edge
PERPENDICULAR = 0.01  # cosine between rows and columns
MOST_LEAN = 0.5  # volume of a voxel over that of its upright twin: 60 degrees, and gantries tilt by 30
MOST_FAR_MM = 1e5  # from the origin: beyond it float32 headers no longer place slices to 0.01 mm
SAME_AFFINE = 1e-3  # mm per voxel and mm: float32 headers agree better than that
MOST_LESION = 0.5  # of the volume: more is an inverted mask, or not one of a lesion
HU_OFFSET = 1024  # what writers of unsigned files add
MIN_OFFSET_TISSUE = 0.05  # a head is full of values near that of water; other units have a few in passing

NIFTI_SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
GZIP_MAGIC = b"\x1f\x8b"
HEADERS = {348: (nib.Nifti1Header, b"n+1"), 540: (nib.Nifti2Header, b"n+2")}  # by sizeof_hdr
VOXEL_TYPES = {
    **{2: "u1", 256: "i1", 4: "i2", 512: "u2", 8: "i4", 768: "u4", 1024: "i8", 1280: "u8"},
    **{16: "f4", 64: "f8"},
}
NOT_NUMBERS = {
    128: ("a colour picture", "colour"),
    2304: ("a colour picture", "colour"),
    32: ("complex numbers", "not_ct"),
    1792: ("complex numbers", "not_ct"),
    2048: ("complex numbers", "not_ct"),
}
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, mm, micrometre


# ---------------------------------------------------------------- NIfTI: header


class _Header(NamedTuple):
    shape: tuple[int, int, int]  # as stored
    dtype: np.dtype
    offset: int  # bytes before the voxels
    slope: float
    intercept: float
    affine_lps: np.ndarray  # (4, 4): stored voxel indices -> LPS mm
    notes: list[str]


def _need_regular(path: str) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):  # a pipe would wait for ever
        raise ScanError(path, "a link or a special file", "copy the file itself here", "not_regular")


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """(stream, the most bytes that it can hold) of a file, gzip or not by its content. Raises ScanError."""
    try:
        _need_regular(path)
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            packed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            if packed:
                with gzip.GzipFile(fileobj=file) as stream:
                    yield stream, size * MOST_DEFLATE_SHRINKS
            else:
                yield file, size
    except (EOFError, zlib.error, gzip.BadGzipFile):
        what = "its gzip data are damaged or cut off"
        raise ScanError(path, what, "copy or download it again", "damaged") from None
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ScanError(path, reason, "check the disk and the permissions", "unreadable") from None


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    """count bytes, or fewer where the stream ends."""
    parts = []
    while count > 0 and (part := stream.read(min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _read_header(path: str, stream: IO[bytes], most_bytes: int) -> _Header:
    """Parse and check a header before anything is allocated. Raises ScanError."""
    start = _read_exactly(stream, 4)
    if not start:
        raise ScanError(path, "an empty file", "copy or download it again", "empty")
    for byte_order in ("little", "big"):
        length = int.from_bytes(start, byte_order)
        kind, magic = HEADERS.get(length, (None, None))
        if kind is not None:
            break
    else:
        raise ScanError(path, "not a NIfTI file", "convert it to .nii or .nii.gz, or remove it", "not_nifti")
    block = start + _read_exactly(stream, length - 4)
    if len(block) < length:
        raise ScanError(path, "truncated: its header is incomplete", "copy or download it again", "truncated")
    header = kind(block, endianness=byte_order, check=False)
    if bytes(header["magic"])[:3] != magic:
        what = "a header without its voxels (Analyze, or half of a .hdr/.img pair)"
        raise ScanError(path, what, "convert it to .nii or .nii.gz", "not_nifti")
    shape = _shape(path, header)
    code = int(header["datatype"])
    if code not in VOXEL_TYPES:
        what, reason = NOT_NUMBERS.get(code, (f"voxels of an unsupported type (datatype {code})", "not_ct"))
        raise ScanError(path, f"{what}, not a CT scan", "export it as a volume of HU", reason)
    dtype = np.dtype(VOXEL_TYPES[code]).newbyteorder(byte_order)
    offset = float(header["vox_offset"])
    if not (length + 4 <= offset <= MAX_OFFSET_BYTES and offset == int(offset)):
        raise ScanError(path, f"voxels at byte {offset:g} are impossible", "export it again", "damaged")
    voxels = math.prod(shape)
    if voxels * max(dtype.itemsize, 2) > MAX_EXPANDED_BYTES:  # they become int16 at least
        what = f"{' x '.join(map(str, shape))} voxels are more than {MAX_EXPANDED_BYTES >> 20} MiB"
        raise ScanError(path, what, "its header is damaged, or crop it", "too_large")
    if offset + voxels * dtype.itemsize > most_bytes:
        what = f"truncated: too small for {' x '.join(map(str, shape))} voxels"
        raise ScanError(path, what, "copy or download it again", "truncated")
    if max(shape) > MAX_SIDE_PX:  # a plane is held as floats: this bounds its memory
        what = f"{' x '.join(map(str, shape))} voxels are no CT scan"
        raise ScanError(path, what, "its header is damaged, or crop it", "too_large")
    slope, intercept = _scaling(path, header)
    affine, notes = _affine(path, header, shape)
    return _Header(shape, dtype, int(offset), slope, intercept, LPS_TO_RAS @ affine, notes)


def _shape(path: str, header: nib.Nifti1Header) -> tuple[int, int, int]:
    count, *sizes = (int(n) for n in header["dim"])
    sizes = sizes[: max(count, 0)]
    if not 1 <= count <= 7 or min(sizes) < 1:
        what = f"dimensions {list(map(int, header['dim']))} are impossible"
        raise ScanError(path, what, "export it again", "damaged")
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != 3:
        what = f"{len(sizes)}-D ({' x '.join(map(str, sizes))}), a scan has three dimensions"
        raise ScanError(path, what, "export the volume alone", "not_3d")
    return tuple(sizes)


def _scaling(path: str, header: nib.Nifti1Header) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # the standard's way to say that voxels stand as they are
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        what = f"scl_slope {slope:g}, scl_inter {intercept:g} are impossible"
        raise ScanError(path, what, "export it again", "damaged")
    return slope, intercept


def _affine(path: str, header: nib.Nifti1Header, shape: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """((4, 4) stored voxel indices -> RAS mm, what had to be assumed)."""
    fix = "export it again with its geometry"
    pixdim = header["pixdim"][1:4].astype(float)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        what = f"voxel size {pixdim.tolist()} (pixdim) is impossible"
        raise ScanError(path, what, fix, "no_geometry")
    notes = []
    sform, qform = header.get_sform(), None
    with contextlib.suppress(ValueError, nib.spatialimages.HeaderDataError):  # no unit quaternion
        qform = header.get_qform()
    if header["sform_code"] > 0:
        affine = sform
        if header["qform_code"] > 0 and np.isfinite(affine).all():
            apart = math.inf if qform is None else _most_apart(affine, qform, shape)
            if apart > BESIDE_TOLERANCE_MM:
                notes.append("sform and qform put the voxels at different places: sform taken")
    elif header["qform_code"] > 0:
        affine = qform
    else:
        affine = np.diag([-1.0, 1.0, 1.0, 1.0]) @ np.diag([*pixdim, 1.0])
        notes.append(
            "neither sform nor qform: first axis taken as to the left, second to the front, third to the "
            "head; left and right are unknown"
        )
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(path, "its affine is not finite and invertible", fix, "no_geometry")
    unit = int(header["xyzt_units"]) & 7
    if unit not in MM_PER_UNIT:
        raise ScanError(path, f"unknown unit of length ({unit})", fix, "no_geometry")
    if MM_PER_UNIT[unit] != 1:
        affine = np.diag([MM_PER_UNIT[unit]] * 3 + [1.0]) @ affine
        notes.append("lengths converted to mm")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < SPACING_RANGE_MM[0] or spacing.max() > SPACING_RANGE_MM[1]:
        what = f"voxels of {' x '.join(f'{s:g}' for s in spacing)} mm are impossible in CT"
        raise ScanError(path, what, fix, "no_geometry")
    lean = abs(np.linalg.det(affine[:3, :3])) / spacing.prod()
    if lean < MOST_LEAN or np.abs(affine[:3, 3]).max() > MOST_FAR_MM:
        raise ScanError(path, "its affine is skewed or far away, impossible in CT", fix, "no_geometry")
    if np.abs(spacing / (pixdim * MM_PER_UNIT[unit]) - 1).max() > 0.01:
        notes.append("pixdim and the affine tell different voxel sizes: affine taken")
    return affine, notes


def _most_apart(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """The largest distance in mm between the places that two affines give to a corner of the volume."""
    corners = np.array([(i, j, k, 1) for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    corners[:, :3] *= np.subtract(shape, 1)
    return float(np.linalg.norm(((first - second) @ corners.T)[:3], axis=0).max())


# ---------------------------------------------------------------- NIfTI: voxels


class _Grid(NamedTuple):
    """How stored axes become slices to the head, rows to the back, columns to the left of the patient."""

    affine_lps: np.ndarray  # (4, 4): (column, row, slice, 1) -> LPS mm
    axes: tuple[int, int, int]  # of the file, (k, j, i), that become (slice, row, column)
    backwards: tuple[bool, bool, bool]  # of (slice, row, column)

    def arrange(self, stored: np.ndarray) -> np.ndarray:
        """(k, j, i) as stored -> (S, H, W)."""
        steps = tuple(slice(None, None, -1 if turn else 1) for turn in self.backwards)
        return np.ascontiguousarray(stored.transpose(self.axes)[steps])

    def stored_slices(self, count: int) -> list[int] | None:
        """Per slice its index along the file's third axis, None where that axis is not the slices'."""
        if self.axes[0] != 0:
            return None
        return list(range(count))[:: -1 if self.backwards[0] else 1]


def _grid(header: _Header) -> _Grid:
    orientation = nib.io_orientation(header.affine_lps)  # the nearest axes, whatever tilt there is
    affine = header.affine_lps @ nib.orientations.inv_ornt_aff(orientation, header.shape)
    source = np.argsort(orientation[:, 0])[::-1]  # stored axis of slice, row, column
    axes = tuple(int(2 - axis) for axis in source)
    return _Grid(affine, axes, tuple(bool(orientation[axis, 1] < 0) for axis in source))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[_Header, Iterator[np.ndarray]]]:
    """(header, planes along the third stored axis, (j, i) float, scaled)."""
    with _unpacked(path) as (stream, most_bytes):
        header = _read_header(path, stream, most_bytes)
        yield header, _planes(path, stream, header)


def _planes(path: str, stream: IO[bytes], header: _Header) -> Iterator[np.ndarray]:
    """Read no more than the header promises, and one byte to see that it promised all."""
    columns, rows, slices = header.shape
    _read_exactly(stream, header.offset - stream.tell())  # extensions: nobody reads them
    size = columns * rows * header.dtype.itemsize
    exact = np.result_type(header.dtype, np.float32)  # float64 where float32 would round
    for _ in range(slices):
        block = _read_exactly(stream, size)
        if len(block) < size:
            what = "truncated: its voxels are incomplete"
            raise ScanError(path, what, "copy or download it again", "truncated")
        plane = np.frombuffer(block, header.dtype).reshape(rows, columns).astype(exact)
        with np.errstate(over="ignore", invalid="ignore"):  # not finite: the caller sees it
            plane = plane * header.slope + header.intercept
        yield plane
    if stream.read(1):
        what = "holds more bytes than its header promises"
        raise ScanError(path, what, "its header or the file is damaged, export it again", "damaged")


class _Image(NamedTuple):
    """One scan, its axes in order."""

    hu: np.ndarray  # (S, H, W) int16
    affine_lps: np.ndarray
    stored_slices: list[int] | None
    padding_count: int
    notes: list[str]


def _read_image(path: str, assume_hu: bool) -> _Image:
    """The voxels of a file in HU. Raises ScanError if it cannot be read, placed, or holds no HU.

    assume_hu: take its values as HU even so, and note it."""
    with _opened(path) as (header, planes):
        grid = _grid(header)
        hu = np.empty(header.shape[::-1], np.int16)
        no_numbers = False
        limits = np.iinfo(np.int16)
        for index, plane in enumerate(planes):
            unknown = ~np.isfinite(plane)
            no_numbers |= bool(unknown.any())
            plane[unknown] = OUTSIDE_FOV_HU
            hu[index] = plane.round().clip(limits.min, limits.max)
    hu = grid.arrange(hu)
    _check_pixels(path, grid.affine_lps)
    fault = hu_fault(hu)
    if fault and not assume_hu:
        shifted = hu.clip(limits.min + HU_OFFSET) - np.int16(HU_OFFSET)
        offset = hu_fault(shifted) is None and np.mean((shifted > -20) & (shifted < 100)) > MIN_OFFSET_TISSUE
        if offset:
            fix = f"set scl_inter to -{HU_OFFSET}, or export it in HU"  # no --assume-hu: it would be wrong
            raise ScanError(path, f"{fault}, they look like HU + {HU_OFFSET}", fix, "not_hu")
        raise ScanError(path, fault, "export it in HU, or prepare it with --assume-hu", "not_hu")
    padding_count = np.count_nonzero(hu <= OUTSIDE_FOV_HU)
    np.clip(hu, AIR_HU, MAX_HU, out=hu)  # padding becomes air
    notes = list(header.notes)
    if no_numbers:
        notes.append("voxels that are no numbers: taken as padding")
    if fault:
        notes.append(ASSUMED_HU)
    stored_slices = grid.stored_slices(len(hu))
    if stored_slices is None:
        notes.append("stored in sagittal or coronal order: cut into axial slices")
    return _Image(hu, grid.affine_lps, stored_slices, padding_count, notes)


def _check_pixels(path: str, affine: np.ndarray) -> None:
    lengths = np.linalg.norm(affine[:3, :2], axis=0)
    if abs(affine[:3, 0] @ affine[:3, 1]) > PERPENDICULAR * lengths.prod():
        what = "its rows and columns are not perpendicular"
        raise ScanError(path, what, "restore the geometry of the scanner", "no_geometry")
    if lengths.max() > MOST_PIXEL_STRETCH * lengths.min():
        what = f"axial pixels of {lengths[1]:.2f} x {lengths[0]:.2f} mm: a coronal or sagittal scan"
        raise ScanError(path, what, "use the axial series", "not_axial")


def _read_mask(path: str, image_path: str, image: _Image) -> np.ndarray:
    """(S, H, W) uint8 values of the mask of an image. Raises ScanError unless it covers the same voxels."""
    fix = "use the mask that was drawn on this scan"
    with _opened(path) as (header, planes):
        grid = _grid(header)
        shape = tuple(header.shape[2 - axis] for axis in grid.axes)
        if shape != image.hu.shape:
            what = f"its shape {shape} is not that of {shown(Path(image_path).name)}, {image.hu.shape}"
            raise ScanError(path, what, fix, "mask")
        apart = np.abs(grid.affine_lps - image.affine_lps)
        if apart.max() > SAME_AFFINE:
            mm = _most_apart(grid.affine_lps, image.affine_lps, shape[::-1])
            what = f"its affine is not that of {shown(Path(image_path).name)}: up to {mm:.3f} mm apart"
            raise ScanError(path, what, fix, "mask")
        values = np.empty(header.shape[::-1], np.uint8)
        for index, plane in enumerate(planes):
            if not ((plane >= 0) & (plane <= 255) & (plane == plane.round())).all():  # NaN too
                what = f"its values are not whole numbers from 0 to 255 (plane {index})"
                raise ScanError(path, what, "export the mask as classes", "mask")
            values[index] = plane
    share = np.count_nonzero(values) / values.size
    if share > MOST_LESION:
        what = f"it marks {share:.0%} of the volume: inverted, or no mask of a lesion"
        raise ScanError(path, what, "check the mask", "mask")
    return grid.arrange(values)


# ---------------------------------------------------------------- one file -> a Scan


class _Inputs(NamedTuple):
    """What discovery knows of one scan. Slices are numbered as stored, from 0."""

    image: str
    mask: str | None
    patient_id: str
    study_uid: str
    notes: tuple[str, ...] = ()  # for every slice
    slice_labels: dict[int, dict[str, int | None]] = {}
    slice_notes: dict[int, tuple[str, ...]] = {}
    sha256: tuple[tuple[str, str], ...] = ()  # (path, expected)


class _Annotation(NamedTuple):
    mask: np.ndarray | None  # (S, H, W) uint8 lesion classes
    slice_labels: list[dict[str, int | None]]
    slice_notes: list[list[str]]


def _read(job: Job, annotate: Callable[[_Inputs, np.ndarray | None, _Image], _Annotation]) -> Scan:
    inputs: _Inputs = job.inputs
    for path, expected in inputs.sha256:
        _check_sha256(path, expected)
    image = _read_image(inputs.image, job.assume_hu)
    values = None if inputs.mask is None else _read_mask(inputs.mask, inputs.image, image)
    annotation = annotate(inputs, values, image)
    lengths = np.linalg.norm(image.affine_lps[:3, :3], axis=0)
    right, back, step = image.affine_lps[:3, :3].T / lengths[:, None]
    normal = np.cross(right, back)
    stack = stack_geometry(
        image.affine_lps[:3, 3] + np.arange(len(image.hu))[:, None] * image.affine_lps[:3, 2],
        (*right, *back),
        (float(lengths[1]), float(lengths[0])),
        float(lengths[2] * abs(step @ normal) / np.linalg.norm(normal)),
    )
    notes = [*inputs.notes, *image.notes]
    return measured_scan(
        hu=image.hu,
        affine=stack.affine,
        positions_mm=stack.positions_mm,
        spacing_mm=stack.spacing_mm,
        gantry_tilt_deg=stack.gantry_tilt_deg,
        source=job.source,
        patient_id=inputs.patient_id,
        study_uid=inputs.study_uid,
        series_uid=job.series_uid,
        labels=_over_slices(annotation.slice_labels),
        slice_labels=annotation.slice_labels,
        repairs=[notes + own for own in annotation.slice_notes],
        mask=annotation.mask,
        padding_count=image.padding_count,
    )


def _check_sha256(path: str, expected: str) -> None:
    try:
        _need_regular(path)
        with Path(path).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ScanError(path, reason, "check the disk and the permissions", "unreadable") from None
    if found != expected:
        what = f"its SHA-256 is not that of {SUMS_FILE}"
        raise ScanError(path, what, "download it again", "checksum")


def _over_slices(slice_labels: list[dict[str, int | None]]) -> dict[str, int | None]:
    """Labels of a scan: 1 where a slice has 1, 0 where all have 0, else unknown."""
    labels = {}
    for name in LABEL_NAMES:
        values = [entry[name] for entry in slice_labels]
        labels[name] = 1 if 1 in values else 0 if all(value == 0 for value in values) else None
    return labels


# ---------------------------------------------------------------- files


def _files(root: Path) -> Iterator[str]:
    """Everything under root but folders and an operating system's litter; links are not followed.

    Raises OSError for a folder that cannot be listed."""

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders.sort()
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in sorted(names + links):
            if name.lower() not in JUNK_NAMES and not name.startswith("._"):
                yield str(Path(folder, name))


def _relative(root: Path, path: str) -> str:
    return shown(Path(path).relative_to(root))


def _left_out(root: Path, path: str, code: str, reason: str) -> Rejected:
    return Rejected(_relative(root, path), shown(path), code, reason)


def _rejected(root: Path, path: str, error: ScanError) -> Rejected:
    return _left_out(root, path, error.code, f"{error.what} ({error.fix})")


def _header_of(path: str) -> _Header:
    """The header of a file that can become a scan, as far as a header tells. Raises ScanError."""
    with _opened(path) as (header, _):
        _check_pixels(path, _grid(header).affine_lps)
        return header


def _fingerprint(path: str) -> str:
    """A hash of the size and both ends of a file: apart for two scans of the same name in two folders."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        parts = file.read(1 << 16)
        file.seek(max(size - (1 << 16), 0))
        parts += file.read(1 << 16)
    return hashlib.blake2b(str(size).encode() + parts, digest_size=16).hexdigest()


def _stem(path: str) -> str:
    return NIFTI_SUFFIX.sub("", Path(path).name)


def _need_folder(input_dir: str | Path) -> Path:
    root = Path(input_dir)
    if not root.is_dir():
        raise ScanError(root, "no such folder", "check the path", "missing")
    return root


def _nothing_found(root: Path, what: str, fix: str) -> tuple[list[Job], list[Rejected]]:
    return [], [Rejected(shown(root.name), shown(root), "no_ct", f"{what} ({fix})")]


# ---------------------------------------------------------------- any folder of NIfTI files

BIDS_SUBJECT = re.compile(r"(?:^|[/_])sub-([A-Za-z0-9]+)")


def discover_nifti(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """Every .nii and .nii.gz under a folder, or the one named, is a scan of which nothing is known. A mask of
    lesions may lie beside it, as <stem>_mask or as masks/<stem>, with either ending.

    A file names no patient: a BIDS name sub-<label> does, else each file counts as a patient of its own.
    Returns (jobs, rejected), both in path order. Raises ScanError if input_dir does not exist."""
    single = Path(input_dir).is_file()
    root = Path(input_dir).parent if single else _need_folder(input_dir)
    files = [str(input_dir)] if single else list(_files(root))
    volumes = [path for path in files if NIFTI_SUFFIX.search(path)]
    masks = {path: _mask_beside(path) for path in volumes if not _is_mask(path)}
    used = set(masks.values())
    jobs, rejected = [], []
    for path in files:
        if path in masks:
            try:
                _header_of(path)
                jobs.append(_nifti_job(root, path, masks[path]))
            except ScanError as error:
                rejected.append(_rejected(root, path, error))
        elif Path(path).is_symlink():
            rejected.append(_left_out(root, path, "not_regular", "a link (copy what it points to here)"))
        elif not NIFTI_SUFFIX.search(path):
            rejected.append(_left_out(root, path, "other_file", f"not a NIfTI file ({SKIPPED})"))
        elif path not in used:
            rejected.append(_left_out(root, path, "mask_alone", "a mask without its scan (add the scan)"))
    if not files:
        return _nothing_found(root, "no files", "give a folder with .nii or .nii.gz files")
    return jobs, rejected


def _is_mask(path: str) -> bool:
    return Path(path).parent.name == "masks" or _stem(path).endswith("_mask")


def _mask_beside(path: str) -> str | None:
    folder, stem = Path(path).parent, _stem(path)
    return _first_present(folder / "masks" / stem, folder / f"{stem}_mask")


def _first_present(*stems: Path) -> str | None:
    for stem in stems:
        for suffix in (".nii", ".nii.gz"):
            if os.path.lexists(f"{stem}{suffix}"):  # a link too: it is named when it is read
                return f"{stem}{suffix}"
    return None


def _nifti_job(root: Path, path: str, mask: str | None) -> Job:
    name = os.path.relpath(path, root)
    own = pseudonym("nifti", name, _fingerprint(path))
    subject = BIDS_SUBJECT.search(name)
    if subject:
        inputs = _Inputs(path, mask, pseudonym("patient", "nifti", subject[1]), own)
    else:
        inputs = _Inputs(path, mask, own, own, ("no patient id: this file counts as one patient",))
    return Job("nifti", own, _relative(root, path), inputs)


def _annotate_nifti(_: _Inputs, values: np.ndarray | None, image: _Image) -> _Annotation:
    """What a mask of unknown origin marks is a lesion of unknown kind, blood or not: no label follows."""
    count = len(image.hu)
    mask, notes = None, []
    if values is not None:
        mask = np.where(values > 0, np.uint8(UNKNOWN_LESION), np.uint8(0))
        if len(np.unique(values)) > 2:
            notes = ["mask with classes that nothing explains: kept as lesion of unknown kind"]
    return _Annotation(mask, [unknown_labels() for _ in range(count)], [list(notes) for _ in range(count)])


def stored_axes(path: str | Path) -> str:
    """Where the axes of a file lead, e.g. "RAS", as its reader understands them. Raises ScanError."""
    return "".join(nib.aff2axcodes(LPS_TO_RAS @ _header_of(str(path)).affine_lps))


def read_nifti(job: Job) -> Scan:
    """Read one NIfTI file into HU. Raises ScanError if it or its mask cannot be used."""
    return _read(job, _annotate_nifti)


# ---------------------------------------------------------------- PhysioNet CT-ICH

LABEL_FILE = "hemorrhage_diagnosis_raw_ct.csv"
SUMS_FILE = "SHA256SUMS.txt"
KIND_COLUMNS = {name: name.capitalize() for name in HEMORRHAGES}
NEEDED_COLUMNS = ("PatientNumber", "SliceNumber", "No_Hemorrhage", *KIND_COLUMNS.values())
CT_ICH_NAME = re.compile(r"0*(\d{1,9})\.nii(\.gz)?")
MOST_TEXT_BYTES = 1 << 26  # the label file of the whole set has 0.1 MB
WHOLE_NUMBER = re.compile(r"(\d{1,9})(\.0*)?")
ROW_FAULTS = {  # code -> what the user can do about it
    "label_value": "correct the rows, until then they count as unknown",
    "label_conflict": "correct the rows, until then they count as unknown",
    "label_beyond": "check that label file and scan are of the same release",
    "label_alone": "add the scan",
}


class _Rows(NamedTuple):
    """The label file of CT-ICH: by patient number and slice number (from 1)."""

    labels: dict[int, dict[int, dict[str, int | None]]]
    notes: dict[int, dict[int, tuple[str, ...]]]
    faults: dict[tuple[int, str], list[str]]  # (patient, code) -> one line per row


def discover_ct_ich(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """The scans of PhysioNet CT-ICH 1.3.1 with the labels of their slices, from its root folder.

    Columns are found by name; any = 1 - No_Hemorrhage; ischemia is unknown. Rows that contradict themselves
    or each other count as unknown and are named in rejected, like rows without a slice. Where SHA256SUMS.txt
    is present, files are compared with it: the label file here, a scan and its mask when they are read.
    Returns (jobs, rejected). Raises ScanError if input_dir does not exist. Source: Hssayeni et al. 2020,
    doi 10.13026/4nae-zg36."""
    root = _need_folder(input_dir)
    try:
        sums = _read_sums(root)
        label_file = root / LABEL_FILE
        text = _read_text(label_file)
        if LABEL_FILE in sums:
            _check_sha256(str(label_file), sums[LABEL_FILE])
        rows = _read_rows(label_file, text)
        for folder in ("ct_scans", "masks"):
            _need_folder(root / folder)
    except ScanError as error:
        return [], [Rejected(shown(root.name), error.file, error.code, f"{error.what} ({error.fix})")]
    jobs, rejected, seen = [], [], set()
    for path in _files(root / "ct_scans"):
        name = CT_ICH_NAME.fullmatch(Path(path).name)
        if name is None:
            reason = f"not named like a scan of CT-ICH, <number>.nii ({SKIPPED})"
            rejected.append(_left_out(root, path, "other_file", reason))
            continue
        number = int(name[1])
        if number in seen:
            reason = f"a second scan of patient {number} (keep one of them)"
            rejected.append(_left_out(root, path, "duplicate", reason))
            continue
        seen.add(number)
        try:
            count = _header_of(path).shape[2]
        except ScanError as error:
            rejected.append(_rejected(root, path, error))
        else:
            jobs.append(_ct_ich_job(root, path, number, count, rows, sums))
    for number in sorted(rows.labels.keys() - seen):
        rows.faults[number, "label_alone"] = [f"slice {n}: no scan" for n in sorted(rows.labels[number])]
    for path in _files(root / "masks"):
        name = CT_ICH_NAME.fullmatch(Path(path).name)
        if name is None or int(name[1]) not in seen:
            rejected.append(_left_out(root, path, "mask_alone", "a mask without its scan (add the scan)"))
    for path in sums:
        if path.startswith(("ct_scans/", "masks/")) and not os.path.lexists(root / path):
            reason = f"listed in {SUMS_FILE}, but not there (download it again)"
            rejected.append(Rejected(shown(path), shown(root / path), "missing", reason))
    for (number, code), lines in sorted(rows.faults.items()):
        reason = f"patient {number}: {len(lines)} in the label file, {'; '.join(lines[:3])}"
        reason += f"{'; ...' if len(lines) > 3 else ''} ({ROW_FAULTS[code]})"
        rejected.append(Rejected(f"{number:03d}", shown(label_file), code, reason))
    if not jobs and not rejected:
        return _nothing_found(root, "no scans in ct_scans", "download the set again")
    return jobs, rejected


def _ct_ich_job(root: Path, path: str, number: int, count: int, rows: _Rows, sums: dict[str, str]) -> Job:
    labels, notes = rows.labels.get(number, {}), rows.notes.get(number, {})
    beyond = sorted(n for n in labels if not 1 <= n <= count)
    if beyond:
        rows.faults[number, "label_beyond"] = [f"slice {n}, the scan has {count}" for n in beyond]
    mask = _first_present(*(root / "masks" / stem for stem in (_stem(path), f"{number:03d}", str(number))))
    general = [] if mask else ["no mask file: lesions not outlined"]
    checked = []
    for file in filter(None, (path, mask)):
        expected = sums.get(Path(file).relative_to(root).as_posix())
        if expected:
            checked.append((file, expected))
        elif sums:
            general.append(f"not listed in {SUMS_FILE}: not checked")
    patient = str(number)
    inputs = _Inputs(
        path,
        mask,
        pseudonym("patient", "ct-ich", patient),
        pseudonym("study", "ct-ich", patient),
        tuple(general),
        {n - 1: entry for n, entry in labels.items() if 1 <= n <= count},
        {n - 1: entry for n, entry in notes.items() if 1 <= n <= count},
        tuple(checked),
    )
    return Job("ct-ich", pseudonym("ct-ich", patient), _stem(path), inputs)


def _read_text(path: Path) -> str:
    with _unpacked(str(path)) as (stream, size):
        if size > MOST_TEXT_BYTES:
            raise ScanError(path, "too large for a text file", "download it again", "too_large")
        content = _read_exactly(stream, MOST_TEXT_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ScanError(path, "not a UTF-8 text file", "download it again", "label_file") from None


def _read_sums(root: Path) -> dict[str, str]:
    """Path below root -> SHA-256, empty where the file is absent. Raises ScanError for a damaged one."""
    path = root / SUMS_FILE
    if not os.path.lexists(path):
        return {}
    sums = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        entry = re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(?:\./)?(.+?)\s*", line)
        if entry:
            sums[entry[2]] = entry[1].lower()
        elif line.strip():
            raise ScanError(path, f"line {number} is no SHA-256 sum", "download it again", "checksum")
    return sums


def _read_rows(path: Path, text: str) -> _Rows:
    """Parse the label file. Raises ScanError if it is no such table."""
    rows = _Rows({}, {}, {})
    try:
        table = csv.DictReader(text.splitlines())
        table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        missing = [name for name in NEEDED_COLUMNS if name not in table.fieldnames]
        twice = [name for name, times in Counter(table.fieldnames).items() if name and times > 1]
        if missing or twice:
            what = f"column {missing[0]} is missing" if missing else f"column {twice[0]} appears twice"
            raise ScanError(path, what, "download it again", "label_file")
        for row in table:
            _add_row(path, rows, row, table.line_num)
    except csv.Error as error:
        what = f"not a table ({error})"
        raise ScanError(path, what, "download it again", "label_file") from None
    return rows


def _add_row(path: Path, rows: _Rows, row: dict[str, str | None], line: int) -> None:
    patient, number = (_whole(row[name]) for name in ("PatientNumber", "SliceNumber"))
    if patient is None or number is None:
        what = f"line {line}: PatientNumber or SliceNumber is no number"
        raise ScanError(path, what, "correct the line", "label_file")
    labels, fault = _row_labels(row)
    known = rows.labels.setdefault(patient, {})
    notes = rows.notes.setdefault(patient, {})
    if number in known:
        if labels == known[number]:
            notes[number] = (*notes.get(number, ()), "its row stands twice in the label file")
            return
        labels, fault = unknown_labels(), ("label_conflict", "differs from an earlier row of its slice")
    known[number] = labels
    if fault:
        code, what = fault
        rows.faults.setdefault((patient, code), []).append(f"slice {number} (line {line}): {what}")
        notes[number] = (*notes.get(number, ()), f"labels unknown: {what}")


def _row_labels(row: dict[str, str | None]) -> tuple[dict[str, int | None], tuple[str, str] | None]:
    """(labels by name, None or (code, what is wrong), which makes all of them unknown)."""
    labels = unknown_labels()
    cells = {name: row[column] for name, column in KIND_COLUMNS.items()} | {"any": row["No_Hemorrhage"]}
    for name, cell in cells.items():
        if cell is None or cell.strip().lower() in ("", "nan"):
            continue
        labels[name] = _whole(cell)
        if labels[name] not in (0, 1):
            return unknown_labels(), ("label_value", f"{name} is neither 0 nor 1")
    if labels["any"] is not None:
        labels["any"] = 1 - labels["any"]
    kinds = [labels[name] for name in HEMORRHAGES]
    if labels["any"] == 0 and 1 in kinds:
        return unknown_labels(), ("label_conflict", "No_Hemorrhage beside a haemorrhage")
    if labels["any"] == 1 and all(kind == 0 for kind in kinds):
        return unknown_labels(), ("label_conflict", "a haemorrhage of no kind")
    return labels, None


def _whole(cell: str | None) -> int | None:
    number = WHOLE_NUMBER.fullmatch((cell or "").strip())
    return int(number[1]) if number else None


def _annotate_ct_ich(inputs: _Inputs, values: np.ndarray | None, image: _Image) -> _Annotation:
    """The mask tells no kinds: a slice whose labels name exactly one gives it to what is marked there."""
    if image.stored_slices is None:
        what = "its third axis does not run from slice to slice, so that no row can be told to its slice"
        raise ScanError(inputs.image, what, "use the files as PhysioNet has them", "not_axial")
    if values is not None and not set(np.unique(values)) <= {0, 1} and not set(np.unique(values)) <= {0, 255}:
        what = f"its values {np.unique(values).tolist()[:6]} are not 0 and 1, or 0 and 255"
        raise ScanError(inputs.mask, what, "use the mask as PhysioNet has it", "mask")
    mask = None if values is None else np.zeros(values.shape, np.uint8)
    slice_labels, slice_notes = [], []
    for index, stored in enumerate(image.stored_slices):
        notes = list(inputs.slice_notes.get(stored, ()))
        labels = inputs.slice_labels.get(stored)
        if labels is None:
            labels = unknown_labels()
            notes.append("no row in the label file: labels unknown")
        if mask is not None:
            kinds = [name for name in HEMORRHAGES if labels[name] == 1]
            certain = len(kinds) == 1 and all(labels[name] is not None for name in HEMORRHAGES)
            lesion = 1 + HEMORRHAGES.index(kinds[0]) if certain else UNKNOWN_LESION
            mask[index][values[index] > 0] = lesion
            marked = bool(values[index].any())
            if labels["any"] is not None and marked != bool(labels["any"]):
                notes.append(f"label and mask disagree: the mask is {'not ' if marked else ''}empty")
        slice_labels.append(dict(labels))
        slice_notes.append(notes)
    return _Annotation(mask, slice_labels, slice_notes)


def read_ct_ich(job: Job) -> Scan:
    """Read one scan of CT-ICH. Raises ScanError if it or its mask cannot be used or is not the original."""
    return _read(job, _annotate_ct_ich)


# ---------------------------------------------------------------- BHSD

BHSD_FOLDERS = {  # of images -> of their masks; the set is about in two layouts
    "images": ("ground truths", "labels", "masks"),
    "imagesTr": ("labelsTr",),
    "imagesTs": ("labelsTs",),
}
# From 1 on; the same order as ours, but theirs to choose
BHSD_CLASSES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
BHSD_STEM = re.compile(r"(ID_[0-9a-f]{8})_(ID_[0-9a-f]{10})")


def discover_bhsd(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """The scans of BHSD with masks of five classes: images/ and "ground truths"/ (or labels/, masks/), or
    imagesTr/ and labelsTr/, side by side in input_dir or anywhere below it, with the same names.

    Names are RSNA 2019 ids of patient and study. They are hashed as the DICOM reader hashes the ids of a
    header, so that a patient of both sets has one pseudonym and is found on two sides of a split.
    Returns (jobs, rejected). Raises ScanError if input_dir does not exist. Source: Wu et al. 2023,
    arXiv 2308.11298."""
    root = _need_folder(input_dir)
    jobs, rejected, used, stems = [], [], set(), set()
    mask_folders = {name for names in BHSD_FOLDERS.values() for name in names}
    mask_files = []
    for path in _files(root):
        folder = Path(path).parent
        if folder.name in mask_folders and NIFTI_SUFFIX.search(path):
            mask_files.append(path)
        if folder.name not in BHSD_FOLDERS:
            continue
        if not NIFTI_SUFFIX.search(path):
            rejected.append(_left_out(root, path, "other_file", f"not a NIfTI file ({SKIPPED})"))
            continue
        mask = _first_present(*(folder.parent / name / _stem(path) for name in BHSD_FOLDERS[folder.name]))
        used.add(mask)
        try:
            if mask is None:
                fix = "add its ground truth, or read it with --source nifti"
                raise ScanError(path, "no mask", fix, "no_mask")
            if _stem(path) in stems:
                raise ScanError(path, "a second scan of this name", "keep one of them", "duplicate")
            stems.add(_stem(path))
            _header_of(path)
            jobs.append(_bhsd_job(root, path, mask))
        except ScanError as error:
            rejected.append(_rejected(root, path, error))
    for path in mask_files:
        if path not in used:
            rejected.append(_left_out(root, path, "mask_alone", "a mask without its scan (add the scan)"))
    if not jobs and not rejected:
        return _nothing_found(
            root, "no folder images with scans", 'give the folder of images and "ground truths"'
        )
    return jobs, rejected


def _bhsd_job(root: Path, path: str, mask: str) -> Job:
    stem = _stem(path)
    ids = BHSD_STEM.fullmatch(stem)
    patient, study = (ids[1], ids[2]) if ids else (stem, stem)
    notes = () if ids else ("not named by RSNA ids: this file counts as one patient",)
    inputs = _Inputs(path, mask, pseudonym("patient", patient), pseudonym("study", patient, study), notes)
    return Job("bhsd", pseudonym("bhsd", stem), _relative(root, path), inputs)


def _annotate_bhsd(inputs: _Inputs, values: np.ndarray | None, image: _Image) -> _Annotation:
    """Every class has its own mask, so that its labels follow from it; ischemia was not looked for."""
    if values.max() > len(BHSD_CLASSES):
        what = f"its highest value is {values.max()}, BHSD has classes 0 to {len(BHSD_CLASSES)}"
        raise ScanError(inputs.mask, what, "use the mask as BHSD has it", "mask")
    lesion = np.array([0, *(1 + HEMORRHAGES.index(name) for name in BHSD_CLASSES)], np.uint8)
    slice_labels = []
    for plane in values:
        present = {BHSD_CLASSES[value - 1] for value in np.unique(plane) if value}
        labels = unknown_labels() | {name: int(name in present) for name in HEMORRHAGES}
        slice_labels.append(labels | {"any": int(bool(present))})
    return _Annotation(lesion[values], slice_labels, [[] for _ in image.hu])


def read_bhsd(job: Job) -> Scan:
    """Read one scan of BHSD. Raises ScanError if it or its mask cannot be used."""
    return _read(job, _annotate_bhsd)


NIFTI_READERS = {
    "nifti": Reader(discover_nifti, read_nifti),
    "ct-ich": Reader(discover_ct_ich, read_ct_ich),
    "bhsd": Reader(discover_bhsd, read_bhsd),
}
