"""Arrays on disk -> Scans: npz slices and npy dose pairs of earlier systems, HDF5 of LoDoPaB.

Such files tell no geometry: what is assumed stands in the repairs of every slice. A header says how large an
array is before any memory is taken, and nothing that could run code is ever loaded."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from volumes import (
    AIR_HU,
    AIR_RANGE_HU,
    ASSUMED_HU,
    ASSUMED_SLICE_SPACING_MM,
    AXIAL,
    JUNK_NAMES,
    MAX_HU,
    MAX_SIDE_PX,
    MIN_FRACTION,
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

# ---------------------------------------------------------------- files without geometry

ASSUMED_FIELD_MM = 250.0  # the usual reconstruction field of a head scan
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
UNKNOWN_KIND = 255  # mask class of a lesion of which nothing else is known
FINGERPRINT_BYTES = 4096
MAX_JSON_BYTES = 1 << 20  # metadata of a series; more is no metadata
PATIENT_KEYS = ("patient_id", "PatientID")


def list_files(input_dir: str | Path) -> tuple[list[Path], list[Rejected]]:
    """(regular files below a folder, relative to it; links and special files), both in path order.

    An operating system's litter is left out, links are not followed. Raises ScanError if there is no such
    folder."""
    root = Path(input_dir)
    if not root.is_dir():
        raise ScanError(root, "no such folder", "check the path", "missing")
    files, rejected, folders = [], [], [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.name.lower() in JUNK_NAMES or entry.name.startswith("._"):
                continue
            path = Path(entry.path).relative_to(root)
            if entry.is_file(follow_symlinks=False):
                files.append(path)
            elif not entry.is_dir(follow_symlinks=False):
                reason = "a link or a special file (copy the file itself here)"
                rejected.append(rejection(root, path, "not_regular", reason))
        folders += [Path(entry.path) for entry in reversed(listed) if entry.is_dir(follow_symlinks=False)]
    return files, rejected


def rejection(root: Path, file: Path, code: str, reason: str) -> Rejected:
    """A Rejected for a file given relative to root."""
    return Rejected(case_name(root, file.parent), shown(root / file), code, reason)


def case_name(root: Path, folder: Path) -> str:
    """What a person calls a folder below root."""
    return shown(root.absolute().name if folder == Path() else folder)


def nothing_found(root: Path, wanted: str, seen: int) -> Rejected:
    """What to say of a folder without a single job. seen: files in it."""
    reason = f"no {wanted} in {shown(root)} ({seen} files seen) (give the folder above them)"
    return Rejected(shown(root.name), shown(root), "no_ct", reason)


def given_split(folder: Path) -> tuple[str | None, Path]:
    """(the split that a folder's path names, the path without it): the first train, val or test in it."""
    for place, part in enumerate(folder.parts):
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()], Path(*folder.parts[:place], *folder.parts[place + 1 :])
    return None, folder


def fingerprint(path: Path) -> str:
    """Size and a checksum from the middle of a file, where a head is: tells apart sets that number alike."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, (size - FINGERPRINT_BYTES) // 2))
        return f"{size}-{zlib.crc32(file.read(FINGERPRINT_BYTES))}"


def named_patient(folder: Path) -> str | None:
    """The patient id in a folder's metadata.json, or None; everything else in such a file is unknown."""
    path = folder / "metadata.json"
    try:
        if not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_JSON_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    values = [content.get(key) for key in PATIENT_KEYS] if isinstance(content, dict) else []
    return next((str(value) for value in values if isinstance(value, (str, int)) and str(value)), None)


def flat_scan(
    job: Job,
    values: np.ndarray,
    notes: list[str],
    *,
    patient_id: str,
    split: str | None,
    numbers: Sequence[int] = (0,),
    pixel_mm: float | None = None,
    labels: dict[str, int | None] | None = None,
    make: Callable[..., Scan] = measured_scan,
    **fields: Any,
) -> Scan:
    """A Scan of pictures that tell no position; what had to be assumed joins the notes of every slice.

    values: (S, H, W) int16. numbers: S ascending slice numbers; missing ones leave a gap. pixel_mm: None if
    unknown. labels: of the scan and of each slice. make: measured_scan, or Scan where no brain in HU is to be
    expected. fields: others of Scan."""
    if pixel_mm is None:
        pixel_mm = ASSUMED_FIELD_MM / max(values.shape[1:])
        notes = [*notes, f"pixel spacing unknown: {pixel_mm:.3f} mm assumed ({ASSUMED_FIELD_MM:g} mm field)"]
    notes = [*notes, f"slice spacing unknown: {ASSUMED_SLICE_SPACING_MM:g} mm assumed"]
    if len(numbers) > 1:
        notes.append("order from the slice numbers, direction and origin unknown")
    corners = np.zeros((len(numbers), 3))
    corners[:, 2] = (np.array(numbers) - numbers[0]) * ASSUMED_SLICE_SPACING_MM
    stack = stack_geometry(corners, AXIAL, (pixel_mm, pixel_mm), ASSUMED_SLICE_SPACING_MM)
    repairs = [list(notes) for _ in numbers]
    for index, step in enumerate(np.diff(numbers), start=1):
        if step > 1:
            repairs[index].append(f"{step - 1} slices are missing before this one")
    labels = labels or unknown_labels()
    return make(
        hu=values,
        affine=stack.affine,
        positions_mm=stack.positions_mm,
        spacing_mm=stack.spacing_mm,
        gantry_tilt_deg=0.0,
        source=job.source,
        patient_id=patient_id,
        study_uid=pseudonym("study", job.series_uid),
        series_uid=job.series_uid,
        labels=labels,
        slice_labels=[dict(labels) for _ in numbers],
        repairs=repairs,
        split=split,
        **fields,
    )


NO_HU_FIX = "write its values in HU, or prepare it with --assume-hu"


def slices_fault(hu: np.ndarray) -> str | None:
    """hu_fault of (S, H, W), but a slice by itself need only show air: at the vertex there is little else."""
    low, high = AIR_RANGE_HU
    if len(hu) == 1 and np.mean((hu > low) & (hu < high)) >= MIN_FRACTION:
        return None
    return hu_fault(hu)


def to_hu(hu: np.ndarray) -> tuple[np.ndarray, int]:
    """HU of any type -> (int16 HU in [-1024, 3071], how many pixels were padding)."""
    padding = hu <= OUTSIDE_FOV_HU
    return np.where(padding, AIR_HU, np.rint(hu).clip(AIR_HU, MAX_HU)).astype(np.int16), int(padding.sum())


# ---------------------------------------------------------------- one array from an npy or npz file

MAX_ARRAY_BYTES = MAX_SIDE_PX * MAX_SIDE_PX * 8 + 4096  # the largest CT slice in float64, and its header
MAX_MEMBERS = 64  # a slice and what a system keeps beside it
MAX_RATIO = 200  # no CT slice compresses as well
SMALL_BYTES = MAX_SIDE_PX * MAX_SIDE_PX + 4096  # but an empty mask compresses a thousandfold
IMAGE_KEYS, MASK_KEYS = ("arr_0", "image"), ("arr_0", "mask")

ARRAY_ERRORS = (  # what numpy and zipfile raise on damaged files
    zipfile.BadZipFile,
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,  # numpy parses a header that literal_eval refuses a second time
    zlib.error,
)


def load_array(path: str | Path, keys: Sequence[str] = ()) -> np.ndarray:
    """One slice (H, W) from an npy or npz file. Raises ScanError.

    keys: member names of an npz to prefer, else its first. Numbers and bools only; (1, H, W) and (H, W, 1)
    count as (H, W)."""
    with _open_array(Path(path), keys) as (stream, shape, dtype, fortran):
        # One byte more than needed, so that a zip comes to its end and checks its CRC
        size = math.prod(shape) * dtype.itemsize
        values = np.frombuffer(stream.read(size + 1)[:size], dtype)
        if len(values) != math.prod(shape):
            raise ScanError(path, "truncated: its values are incomplete", "copy it again", "truncated")
        values = values.reshape(shape, order="F" if fortran else "C")
        return values.reshape([side for side in shape if side != 1] if len(shape) == 3 else shape)


def check_array(path: str | Path, keys: Sequence[str] = ()) -> None:
    """Raise ScanError unless the headers of a file promise one slice that load_array would read."""
    with _open_array(Path(path), keys):
        pass


@contextlib.contextmanager
def _open_array(path: Path, keys: Sequence[str]) -> Iterator[tuple[IO[bytes], tuple, np.dtype, bool]]:
    """(a stream at the first value, shape, dtype, Fortran order) of a checked header."""
    again = "write or copy it again"
    try:
        if path.stat().st_size > MAX_ARRAY_BYTES + FINGERPRINT_BYTES:
            raise ScanError(path, f"{path.stat().st_size >> 20} MiB are no CT slice", again, "too_large")
        with contextlib.ExitStack() as open_files:
            if path.suffix == ".npy":
                stream, size = open_files.enter_context(path.open("rb")), path.stat().st_size
            else:
                archive = open_files.enter_context(zipfile.ZipFile(path))
                member = _member(path, archive, keys)
                stream, size = open_files.enter_context(archive.open(member)), member.file_size
            yield stream, *_array_header(path, stream, size)
    except ScanError:
        raise
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ScanError(path, reason, "check the disk and the permissions", "unreadable") from None
    except ARRAY_ERRORS as error:
        raise ScanError(
            path, f"damaged {path.suffix[1:]} ({type(error).__name__})", again, "damaged"
        ) from None


def _member(path: Path, archive: zipfile.ZipFile, keys: Sequence[str]) -> zipfile.ZipInfo:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if not 0 < len(members) <= MAX_MEMBERS:
        raise ScanError(path, f"holds {len(members)} arrays, not a slice", "write it again", "damaged")
    info = next((members[key] for key in keys if key in members), next(iter(members.values())))
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ScanError(path, "is encrypted or packed in an unusual way", "write it with numpy", "damaged")
    ratio = info.file_size / max(info.compress_size, 1)
    if info.file_size > MAX_ARRAY_BYTES or (info.file_size > SMALL_BYTES and ratio > MAX_RATIO):
        what = f"unpacks to {info.file_size / 1e6:.0f} MB, {ratio:.0f} times its size"
        raise ScanError(path, what, "write it again; no CT slice is like that", "too_large")
    return info


def _array_header(path: Path, stream: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype, bool]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError("only needed for structured arrays")
    shape, fortran, dtype = read[version](stream)
    if dtype.hasobject:
        raise ScanError(path, "holds Python objects, not numbers", "write an array of numbers", "objects")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ScanError(path, f"holds values of type {dtype}", "write whole numbers or floats", "dtype")
    plane = [side for side in shape if side != 1] if len(shape) == 3 else shape
    if len(plane) != 2 or not all(0 < side <= MAX_SIDE_PX for side in plane):
        raise ScanError(
            path, f"has shape {shape}, must be (rows, columns)", "write one slice a file", "shape"
        )
    if math.prod(shape) * dtype.itemsize > size - stream.tell():
        raise ScanError(path, "truncated: its values are incomplete", "copy it again", "truncated")
    return shape, dtype, fortran


def _stacked(paths: Sequence[str], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(S, H, W) of finite numbers. Raises ScanError naming the first file that does not fit."""
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            what = f"has shape {array.shape}, {shown(Path(paths[0]).name)} has {arrays[0].shape}"
            raise ScanError(path, what, "all slices of a scan must have one shape", "shape")
        if array.dtype == bool:
            raise ScanError(path, "holds True and False, not a picture", "write its values", "dtype")
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise ScanError(path, f"holds {bad} values that are not finite", "write it again", "not_finite")
    return np.stack(arrays)


# ---------------------------------------------------------------- npz: the layout of the earlier system

SLICE_FOLDER = re.compile(r"\d{1,5}")  # longer numbers are names of samples, not of slices


class _Slices(NamedTuple):
    folder: str
    files: tuple[str, ...]
    numbers: tuple[int, ...]
    patient: str
    split: str | None


def discover_npz(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """Jobs for `[<split>/]<series>/<slice>/image.npz` and for `[<split>/]sample_08295/image.npz`.

    A folder named by a number of up to five digits is a slice of the folder above it; any other is a scan of
    one slice. Raises ScanError if input_dir does not exist."""
    root = Path(input_dir)
    files, rejected = list_files(root)
    series: dict[tuple, dict[int, Path]] = {}
    for file in files:
        if file.name != "image.npz":
            if file.name not in ("mask.npz", "metadata.json"):
                rejected.append(rejection(root, file, "other_file", f"not image.npz ({SKIPPED})"))
            continue
        try:
            check_array(root / file, IMAGE_KEYS)
        except ScanError as error:
            rejected.append(rejection(root, file, error.code, f"{error.what} ({error.fix})"))
            continue
        is_slice = SLICE_FOLDER.fullmatch(file.parent.name)
        folder, number = (file.parent.parent, int(file.parent.name)) if is_slice else (file.parent, 0)
        slices = series.setdefault((folder, bool(is_slice)), {})
        if slices.setdefault(number, file) != file:
            reason = f"slice {number} is there twice, the other is {shown(slices[number])} (keep one of them)"
            rejected.append(rejection(root, file, "duplicate", reason))
    jobs = []
    for (folder, is_stack), slices in series.items():
        numbers = sorted(slices)
        paths = tuple(str(root / slices[number]) for number in numbers)
        split, name = given_split(folder)
        uid = pseudonym("npz", os.fspath(folder), fingerprint(Path(paths[len(paths) // 2])))
        # The same series in two splits is the same patient; samples are numbered anew in each split
        patient = name.name if is_stack and name != Path() else uid
        inputs = _Slices(str(root / folder), paths, tuple(numbers), patient, split)
        jobs.append(Job("npz", uid, case_name(root, folder), inputs))
    if not jobs:
        rejected.append(nothing_found(root, "image.npz", len(files)))
    return jobs, rejected


def read_npz(job: Job) -> Scan:
    """Read one series of image.npz, with its mask.npz where every slice has one.

    Values that are plausible HU, or assumed to be, are kept as HU; values in 0..1 or 0..255 are grey levels,
    kept as 0..255 and flagged as windowed. Any lesion in a mask is of unknown kind. Raises ScanError for
    other values."""
    made: _Slices = job.inputs
    values = _stacked(made.files, [load_array(path, IMAGE_KEYS) for path in made.files])
    masks = [Path(path).with_name("mask.npz") for path in made.files]
    missing = sum(path.is_symlink() or not path.is_file() for path in masks)
    notes = []
    if 0 < missing < len(masks):
        notes.append(f"mask.npz of {missing} slices is missing: mask unknown")
    common = {
        "patient_id": pseudonym("patient", named_patient(Path(made.folder)) or made.patient),
        "split": made.split,
        "numbers": made.numbers,
        "mask": None if missing else _lesions(masks, values.shape[1:]),
    }
    fault = slices_fault(values)
    if fault is None or job.assume_hu:
        hu, padding = to_hu(values)
        notes += [ASSUMED_HU] if fault else []
        return flat_scan(job, hu, notes, padding_count=padding, **common)
    low, high = values.min(), values.max()
    if low < 0 or high > 255 or low == high:
        raise ScanError(made.files[0], fault, NO_HU_FIX, "not_hu")
    if high <= 1:
        values = values * 255.0
        notes.append("values from 0 to 1 scaled to grey levels 0 to 255")
    grey = np.rint(values).astype(np.int16)
    return flat_scan(job, grey, notes, make=Scan, intensity="windowed", **common)


def _lesions(paths: Sequence[Path], shape: tuple[int, int]) -> np.ndarray:
    """(S, H, W) uint8 of mask files that hold 0 and one other value, 1 or 255. Raises ScanError."""
    planes = []
    for path in paths:
        plane = load_array(path, MASK_KEYS)
        if plane.shape != shape:
            what = f"has shape {plane.shape}, its image has {shape}"
            raise ScanError(path, what, "write it at the size of the image", "mask")
        found = set(np.unique(plane).tolist())
        if not (found <= {0, 1} or found <= {0, 255}):
            what = f"is no mask of 0 and 1: it holds {len(found)} values from {min(found)} to {max(found)}"
            raise ScanError(path, what, "write 0 and 1, or remove it", "mask")
        planes.append(np.where(plane, UNKNOWN_KIND, 0).astype(np.uint8))
    return np.stack(planes)


# ---------------------------------------------------------------- pairs: full dose and low dose

LOW_DOSE = re.compile(r"LDCT_(\d+)_hu\.npy")  # per cent of the full dose
FULL_DOSE = "NDCT_hu.npy"


class _Pair(NamedTuple):
    full: str
    low: tuple[tuple[str, str], ...]  # dose fraction as text, file
    split: str | None


def discover_pairs(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """Jobs for `[<split>/]sample_00042/{NDCT_hu,LDCT_10_hu,LDCT_25_hu,...}.npy`, one slice each.

    Raises ScanError if input_dir does not exist."""
    root = Path(input_dir)
    files, rejected = list_files(root)
    samples: dict[Path, dict[str, Path]] = {}
    for file in files:
        percent = LOW_DOSE.fullmatch(file.name)
        if file.name == FULL_DOSE:
            key = "1"
        elif percent and 0 < int(percent[1]) < 100:
            key = f"{int(percent[1]) / 100:g}"
        else:
            if file.name != "metadata.json":
                reason = f"neither {FULL_DOSE} nor LDCT_<per cent>_hu.npy ({SKIPPED})"
                rejected.append(rejection(root, file, "other_file", reason))
            continue
        sample = samples.setdefault(file.parent, {})
        if key in sample:
            reason = f"the same dose as {shown(sample[key].name)} (keep one of them)"
            rejected.append(rejection(root, file, "duplicate", reason))
        else:
            sample[key] = file
    jobs = []
    for folder, sample in samples.items():
        file = folder / FULL_DOSE
        try:
            if "1" not in sample:
                raise ScanError(root / file, "is missing", "a low dose needs its partner", "no_full_dose")
            for file in sample.values():
                check_array(root / file)
        except ScanError as error:
            rejected.append(rejection(root, file, error.code, f"{error.what} ({error.fix})"))
            continue
        full = str(root / sample.pop("1"))
        low = tuple((fraction, str(root / sample[fraction])) for fraction in sorted(sample, key=float))
        uid = pseudonym("pairs", os.fspath(folder), fingerprint(Path(full)))
        jobs.append(Job("pairs", uid, case_name(root, folder), _Pair(full, low, given_split(folder)[0])))
    if not jobs:
        rejected.append(nothing_found(root, f"sample with {FULL_DOSE}", len(files)))
    return jobs, rejected


def read_pairs(job: Job) -> Scan:
    """Read one slice at full dose with its low-dose partners in Scan.low.

    Raises ScanError if shapes differ or if values are not HU."""
    pair: _Pair = job.inputs
    paths = [pair.full, *(path for _, path in pair.low)]
    volumes = _stacked(paths, [load_array(path) for path in paths])
    faults = [slices_fault(values[None]) for values in volumes]
    for path, fault in zip(paths, faults, strict=True):
        if fault and not job.assume_hu:
            raise ScanError(path, fault, NO_HU_FIX, "not_hu")
    hu, padding = to_hu(volumes[:1])
    patient = named_patient(Path(pair.full).parent)
    notes = [] if patient else ["patient unknown: the sample counts as its own"]
    notes += [ASSUMED_HU] if any(faults) else []
    return flat_scan(
        job,
        hu,
        notes,
        patient_id=pseudonym("patient", patient or job.series_uid),
        split=pair.split,
        padding_count=padding,
        low={
            fraction: to_hu(volumes[index : index + 1])[0]
            for index, (fraction, _) in enumerate(pair.low, start=1)
        },
    )


# ---------------------------------------------------------------- lodopab

# Leuschner et al. 2021, Scientific Data 8:109, and the script that made the set: attenuation at 0 and -1000
# HU, and at 3071 HU, by which the images are divided: 81.35858 per m
MU_WATER_PER_M, MU_AIR_PER_M = 20.0, 0.02
MU_MAX_PER_M = MU_WATER_PER_M + 3071 * (MU_WATER_PER_M - MU_AIR_PER_M) / 1000
LODOPAB_FIELD_MM = 260.0  # of the simulated geometry; the scans' own pixel size is lost
LODOPAB_ROWS = 128  # slices in every file but the last, whose rest is zeros
# The set adds 0..1 to whole HU, so rounding down finds them again. float32 keeps 81/m to 0.0004 HU: with this
# much more, files made without that addition come out right as well
FLOOR_SLACK_HU = 0.0005
NO_ATTENUATION_HU = -1001  # the lowest whole HU that the set can hold, all below it became this
LODOPAB_FILE = re.compile(r"ground_truth_(train|validation|test)_(\d+)\.hdf5")
LODOPAB_PATIENTS = re.compile(r"patient_ids_rand_(train|validation|test)\.csv")
HDF5_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class _Row(NamedTuple):
    file: str
    row: int
    patient: str | None
    split: str


def discover_lodopab(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """A job for every slice of `ground_truth_{train,validation,test}_000.hdf5`, dataset `data`.

    Neighbours in a file come from different patients, so a slice is a scan of its own. Patients are taken
    from patient_ids_rand_<split>.csv beside the file; without it nothing is known but that the splits share
    none, and a split counts as one patient. Raises ScanError if input_dir does not exist."""
    root = Path(input_dir)
    files, rejected = list_files(root)
    jobs: list[Job] = []
    patients: dict[Path, list[str]] = {}
    for file in files:
        if LODOPAB_PATIENTS.fullmatch(file.name):
            try:
                lines = (root / file).read_text(encoding="utf-8").split()
                patients[file] = [str(int(line)) for line in lines]
            except (OSError, ValueError):
                reason = "not one whole number a line: patients unknown (download it again)"
                rejected.append(rejection(root, file, "patients", reason))
    for file in files:
        match = LODOPAB_FILE.fullmatch(file.name)
        if not match:
            if not LODOPAB_PATIENTS.fullmatch(file.name):
                rejected.append(rejection(root, file, "other_file", f"not a ground truth ({SKIPPED})"))
            continue
        try:
            count, filler = _count_rows(root / file)
        except ScanError as error:
            rejected.append(rejection(root, file, error.code, f"{error.what} ({error.fix})"))
            continue
        if filler:
            reason = f"its last {filler} of {count + filler} slices are zeros, they fill the file ({SKIPPED})"
            rejected.append(rejection(root, file, "filler", reason))
        part, start = match[1], int(match[2]) * LODOPAB_ROWS
        known = patients.get(file.with_name(f"patient_ids_rand_{part}.csv"), [])
        mark = fingerprint(root / file)
        for row in range(count):
            patient = known[start + row] if start + row < len(known) else None
            uid = pseudonym("lodopab", os.fspath(file), mark, str(row))
            inputs = _Row(str(root / file), row, patient, SPLIT_NAMES[part])
            jobs.append(Job("lodopab", uid, f"{case_name(root, file)} {row}", inputs))
    if not jobs:
        rejected.append(nothing_found(root, "ground_truth_<split>_<number>.hdf5", len(files)))
    return jobs, rejected


@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator[Any]:
    """The dataset `data` of a file, checked, nothing of it read yet. Raises ScanError."""
    try:
        import h5py  # here, so that no other source needs it
    except ImportError:
        raise ScanError(path, "HDF5 needs a reader", "pip install h5py", "no_decoder") from None
    try:
        with h5py.File(path, "r", locking=False) as file:
            link = file.get("data", getlink=True)
            if not isinstance(link, h5py.HardLink) or not isinstance(file["data"], h5py.Dataset):
                raise ScanError(path, "holds no dataset `data`", "download it again", "damaged")
            data = file["data"]
            if data.is_virtual or data.external:
                raise ScanError(path, "its values lie in other files", "download it again", "damaged")
            square = data.ndim == 3 and data.shape[1] == data.shape[2] and 0 < data.shape[1] <= MAX_SIDE_PX
            if not square or data.dtype.kind != "f":
                what = f"holds {data.shape} values of type {data.dtype}, must be (N, 362, 362) floats"
                raise ScanError(path, what, "download it again", "shape")
            if math.prod(data.chunks or (1,)) * data.dtype.itemsize > MAX_ARRAY_BYTES:
                raise ScanError(path, f"its chunks are {data.chunks}", "download it again", "too_large")
            yield data
    except ScanError:
        raise
    except HDF5_ERRORS as error:
        what = f"damaged HDF5 ({type(error).__name__})"
        raise ScanError(path, what, "download it again", "damaged") from None


def _count_rows(path: Path) -> tuple[int, int]:
    """(slices, zeros after them) of a file; only its last rows are read."""
    with _open_hdf5(path) as data:
        count = len(data)
        while count and not data[count - 1].any():
            count -= 1
        return count, len(data) - count


def read_lodopab(job: Job) -> Scan:
    """Read one slice into HU, turned back to rows from front to back (the set is transposed).

    Raises ScanError if values leave 0..1 or if they are not HU."""
    place: _Row = job.inputs
    with _open_hdf5(Path(place.file)) as data:
        scaled = data[place.row].T.astype(np.float64)
    if not (scaled.min() >= 0 and scaled.max() <= 1):  # false for NaN, too
        what = f"slice {place.row} has values outside 0 to 1, or not finite"
        raise ScanError(place.file, what, "download it again", "not_hu")
    hu = (scaled * MU_MAX_PER_M - MU_WATER_PER_M) / (MU_WATER_PER_M - MU_AIR_PER_M) * 1000
    fault = slices_fault(hu[None])
    if fault and not job.assume_hu:
        fix = "download it again, or prepare it with --assume-hu"
        raise ScanError(place.file, f"slice {place.row}: {fault}", fix, "not_hu")
    notes = ["pixel spacing is that of the simulation, not of the scan"]
    notes += [ASSUMED_HU] if fault else []
    if place.patient is None:
        notes.append(f"patient unknown: all of {place.split} count as one")
    return flat_scan(
        job,
        np.floor(hu + FLOOR_SLACK_HU).clip(NO_ATTENUATION_HU, MAX_HU).astype(np.int16)[None],
        notes,
        patient_id=pseudonym("patient", "lodopab", place.split, place.patient or ""),
        split=place.split,
        pixel_mm=LODOPAB_FIELD_MM / len(hu),
        make=Scan,  # a chest: there is no brain to measure noise in
    )


ARRAY_READERS = {
    "npz": Reader(discover_npz, read_npz),
    "pairs": Reader(discover_pairs, read_pairs),
    "lodopab": Reader(discover_lodopab, read_lodopab),
}
