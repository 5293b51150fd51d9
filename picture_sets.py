"""Pictures on disk -> Scans: folders of PNG or JPEG, and Kaggle's Brain Stroke CT set with its lesions.

Pictures of 8 bit were windowed when they were written and never can be HU again: they are kept as grey levels
0..255 and flagged, so that whatever needs HU refuses them. A header says how large a picture is before it is
decoded; orientation tags and transparency are ignored."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from array_sets import (
    UNKNOWN_KIND,
    case_name,
    fingerprint,
    flat_scan,
    given_split,
    list_files,
    nothing_found,
    rejection,
    to_hu,
)
from volumes import (
    ASSUMED_HU,
    LABEL_NAMES,
    MAX_SIDE_PX,
    SKIPPED,
    Job,
    Reader,
    Rejected,
    Scan,
    ScanError,
    hu_fault,
    pseudonym,
    shown,
)

# ---------------------------------------------------------------- one picture

SUFFIXES = {".png", ".jpg", ".jpeg"}
FORMATS = ("PNG", "JPEG")
GREY_MODES = ("L", "LA", "I;16", "I")  # of PIL; all others may be in colour
GREY_TOLERANCE = 2  # between the channels of a grey picture: rounding of YCbCr in JPEG

PICTURE_ERRORS = (  # what PIL raises on damaged files, besides OSError
    ArithmeticError,
    EOFError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class _Header(NamedTuple):
    shape: tuple[int, int]
    mode: str  # of PIL


def _open(path: Path, *, decode: bool) -> tuple[_Header, np.ndarray | None]:
    """(header, values (H, W) or (H, W, C) or None) of a picture. Raises ScanError."""
    again = "save it again as a grey PNG"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                header = _Header((image.height, image.width), image.mode)
                if max(header.shape) > MAX_SIDE_PX:
                    what = f"{image.height} x {image.width} pixels is no CT slice"
                    raise ScanError(path, what, again, "too_large")
                if image.mode == "1" or getattr(image, "n_frames", 1) > 1:
                    raise ScanError(path, "has one bit a pixel, or moves", again, "not_a_slice")
                if image.mode not in (*GREY_MODES, "P", "PA", "RGB", "RGBA"):
                    raise ScanError(path, f"is a picture of kind {image.mode}", again, "colour")
                if not decode:
                    return header, None
                if image.mode in ("P", "PA"):
                    return header, np.asarray(image.convert("RGB"))
                values = np.asarray(image)
                return header, values[..., 0] if image.mode == "LA" else values
    except ScanError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ScanError(path, "has more pixels than any CT slice", again, "too_large") from None
    except PICTURE_ERRORS as error:
        raise ScanError(path, f"damaged picture ({type(error).__name__})", again, "damaged") from None
    except OSError as error:
        if error.strerror:
            raise ScanError(path, error.strerror, "check the disk", "unreadable") from None
        what = "is no picture, or cut off"  # PIL's own errors are OSError without a number
        raise ScanError(path, what, "copy it again", "damaged") from None


def read_picture(path: str | Path) -> np.ndarray:
    """Grey values (H, W), uint8 or uint16, of a PNG or JPEG. Raises ScanError; one in colour is refused."""
    header, values = _open(Path(path), decode=True)
    if values.ndim == 2:
        return values.astype(np.uint8 if header.mode in ("L", "LA") else np.uint16)
    low, high = _extremes(values)
    if (high - low).max() > GREY_TOLERANCE:
        what = "is in colour: a lesion is painted on it, or it is no CT slice"
        raise ScanError(path, what, "use the picture without paint", "painted")
    return values[..., 0]


def _extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest of red, green and blue, both (H, W) int16; alpha is ignored."""
    red, green, blue = (values[..., channel].astype(np.int16) for channel in range(3))
    return np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)


# ---------------------------------------------------------------- png

NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")  # text around the last number of a name
DRAWINGS = {"overlay", "overlays", "mask", "masks"}  # what somebody drew, not what was scanned
WHOLE_16_BIT = 65535
# Ways in which 16-bit pictures hold HU, each proved by air at -1000: DeepLesion's, and the bare bits of
# int16. An offset of 1000 or 1024 is none: they are too close to be told apart
OFFSETS = {"HU + 32768": 32768, "HU as signed 16 bit": 0}


class _Pictures(NamedTuple):
    files: tuple[str, ...]
    numbers: tuple[int, ...]
    split: str | None


def discover_png(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """Jobs for any folder tree of PNG and JPEG files.

    The pictures of a folder are one scan where their names are the same text around numbers that run from 0
    or 1 without a gap, and their sizes are the same; otherwise each is a scan of one slice. A folder named
    train, val or test gives the split. What somebody painted is left out with code "painted": pictures in
    colour, and those in a folder named OVERLAY or mask. Raises ScanError if input_dir does not exist."""
    root = Path(input_dir)
    files, rejected = list_files(root)
    all_drawn = root.absolute().name.lower() in DRAWINGS
    folders: dict[Path, dict[Path, tuple[int, int]]] = {}
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            rejected.append(rejection(root, file, "other_file", f"neither PNG nor JPEG ({SKIPPED})"))
        elif all_drawn or DRAWINGS & {part.lower() for part in file.parent.parts}:
            reason = "in a folder of overlays or masks: lesions may be painted on it (use the others)"
            rejected.append(rejection(root, file, "painted", reason))
        else:
            try:
                header, _ = _open(root / file, decode=False)
                if header.mode not in GREY_MODES:
                    read_picture(root / file)  # one in colour must not spoil the series of its folder
            except ScanError as error:
                rejected.append(rejection(root, file, error.code, f"{error.what} ({error.fix})"))
            else:
                folders.setdefault(file.parent, {})[file] = header.shape
    jobs = []
    for folder, shapes in folders.items():
        order = _order(list(shapes)) if len(set(shapes.values())) == 1 else None
        scans = [order] if order else [{0: file} for file in shapes]
        for scan in scans:
            paths = tuple(str(root / file) for file in scan.values())
            name = folder if len(paths) > 1 else next(iter(scan.values()))
            uid = pseudonym("png", os.fspath(name), fingerprint(Path(paths[len(paths) // 2])))
            inputs = _Pictures(paths, tuple(scan), given_split(folder)[0])
            jobs.append(Job("png", uid, case_name(root, name), inputs))
    if not jobs:
        rejected.append(nothing_found(root, "PNG or JPEG", len(files)))
    return jobs, rejected


def _order(files: Sequence[Path]) -> dict[int, Path] | None:
    """Number -> file, ascending, or None where the names are not those of one series."""
    found = [NUMBERED.fullmatch(file.stem) for file in files]
    if len(files) < 2 or None in found or len({(match[1], match[3]) for match in found}) > 1:
        return None
    order = dict(sorted((int(match[2]), file) for match, file in zip(found, files, strict=True)))
    first = next(iter(order))
    return order if first in (0, 1) and list(order) == list(range(first, first + len(files))) else None


def read_png(job: Job) -> Scan:
    """Read one series of pictures.

    8 bit: grey levels 0..255, flagged as windowed. 16 bit: HU where they are plausible under one of OFFSETS
    (the bare bits of int16 where HU are assumed), grey levels scaled to 0..255 where they use more than 12
    bits. Pictures with the same pixels belong to the same patient. Raises ScanError for colour, and for
    12-bit values whose offset is unknown."""
    made: _Pictures = job.inputs
    pictures = [read_picture(path) for path in made.files]
    if len({(picture.shape, picture.dtype) for picture in pictures}) > 1:
        what = "its series mixes pictures of 8 and of 16 bit"
        raise ScanError(made.files[0], what, "save all of them alike", "shape")
    values = np.stack(pictures)
    notes = []
    if any(Path(path).suffix.lower() != ".png" for path in made.files):
        notes.append("JPEG: fine detail was lost before it came here")
    common = {
        "patient_id": pseudonym("patient", "picture", _pixel_hash(values)),
        "split": made.split,
        "numbers": made.numbers,
    }
    if values.dtype == np.uint16:
        for name, offset in OFFSETS.items():
            stored = values.astype(np.int32) - offset if offset else values.view(np.int16)
            if hu_fault(stored) is None:
                hu, padding = to_hu(stored)
                notes.append(f"16 bit read as {name}, which gives air near -1000")
                return flat_scan(job, hu, notes, padding_count=padding, **common)
        if job.assume_hu:
            hu, padding = to_hu(values.view(np.int16))
            return flat_scan(job, hu, [*notes, ASSUMED_HU], padding_count=padding, **common)
        if values.max() < 1 << 12:
            what = f"12-bit values up to {values.max()} in 16 bit: what they mean in HU is not told"
            fix = "give the DICOM files, or npz in HU; if they are HU as they stand, use --assume-hu"
            raise ScanError(made.files[0], what, fix, "not_hu")
        values = np.rint(values * (255 / WHOLE_16_BIT))
        notes.append("16 bit, not HU: scaled to grey levels 0 to 255")
    return flat_scan(job, values.astype(np.int16), notes, make=Scan, intensity="windowed", **common)


def _pixel_hash(values: np.ndarray) -> str:
    """What pictures share that show the same, whatever their files are called."""
    return hashlib.sha256(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


# ---------------------------------------------------------------- brain-stroke

# Folder of a class -> what its pictures show. Readers gave each picture one class, and blood comes first: a
# bleed into an infarct is Bleeding, so that ischemia is unknown there; Ischemia and Normal are free of blood.
NO_BLOOD = dict.fromkeys(LABEL_NAMES, 0)
CLASSES = {
    "bleeding": dict.fromkeys(LABEL_NAMES) | {"any": 1},
    "ischemia": NO_BLOOD | {"ischemia": 1},
    "normal": NO_BLOOD,
}
MASK_VALUES = {"bleeding": UNKNOWN_KIND, "ischemia": 6}  # the kind of bleeding is not told
EXTERNAL = "external_test"
# Paint is told from grey by its colour, the largest difference between channels. Grey has none, even as JPEG;
# paint that covers a tenth of what lies under it has 25. JPEG lets colour leak into its neighbours: the edge
# lies where half the strength of the paint is reached (Dice 0.97 to 0.99 at quality 75, exact for PNG)
FAINTEST_PAINT = 24
STRENGTH_PERCENTILE = 95  # of painted pixels: the strength of the paint, whatever a few of them are
# Beside the paint an overlay is its picture. JPEG at quality 75 moves no grey level by more than this
SAME_GREY = 48
# and at quality 10 it moves 1 % of them further; from one phantom slice to the next 3 % or more differ
OTHER_PICTURE = 0.02
PAINT_EDGE_PX = 4  # half a block of JPEG: so far paint leaks


class _Annotated(NamedTuple):
    image: str
    overlay: str | None
    kind: str | None  # of CLASSES
    split: str | None


def discover_brain_stroke(input_dir: str | Path) -> tuple[list[Job], list[Rejected]]:
    """Jobs for `[External_Test/]{Bleeding,Ischemia,Normal}/{PNG,OVERLAY,DICOM}/<number>.png`, and for
    `{train,val,test}/{PNG,OVERLAY}/{Bleeding,Ischemia,Normal}/<number>.png`; a scan for every picture in PNG.

    External_Test is test; pictures outside a class folder have unknown labels. Files in DICOM are counted and
    left alone: they repeat the pictures. Raises ScanError if input_dir does not exist."""
    root = Path(input_dir)
    files, rejected = list_files(root)
    images: list[Path] = []
    overlays: dict[tuple, Path] = {}
    copies: Counter[Path] = Counter()
    for file in files:
        folders = [part.lower() for part in file.parent.parts]
        is_picture = file.suffix.lower() in SUFFIXES
        if "dicom" in folders:
            copies[Path(*file.parts[: folders.index("dicom") + 1])] += 1
        elif "overlay" in folders and is_picture:
            overlays[_partner(file, "overlay")] = file
        elif "png" in folders and is_picture:
            images.append(file)
        else:
            reason = f"neither a picture in PNG nor one in OVERLAY ({SKIPPED})"
            rejected.append(rejection(root, file, "other_file", reason))
    for folder, count in copies.items():
        reason = f"{count} files in DICOM repeat the pictures in PNG ({SKIPPED})"
        rejected.append(Rejected(case_name(root, folder.parent), shown(root / folder), "other_file", reason))
    jobs = []
    for file in images:
        overlay = overlays.pop(_partner(file, "png"), None)
        try:
            _open(root / file, decode=False)
        except ScanError as error:
            rejected.append(rejection(root, file, error.code, f"{error.what} ({error.fix})"))
            continue
        folders = [part.lower() for part in file.parent.parts]
        split = "test" if EXTERNAL in folders else given_split(file.parent)[0]
        kind = next((part for part in folders if part in CLASSES), None)
        inputs = _Annotated(str(root / file), overlay and str(root / overlay), kind, split)
        uid = pseudonym("brain-stroke", os.fspath(file), fingerprint(root / file))
        jobs.append(Job("brain-stroke", uid, case_name(root, file), inputs))
    for overlay in overlays.values():
        reason = "an overlay without its picture in PNG (download it again)"
        rejected.append(rejection(root, overlay, "no_image", reason))
    if not jobs:
        rejected.append(nothing_found(root, "picture in a folder PNG", len(files)))
    return jobs, rejected


def _partner(file: Path, kind: str) -> tuple:
    """What a picture and its overlay share: their folders but for PNG or OVERLAY, and the bare name."""
    folders = [part.lower() for part in file.parent.parts]
    folders.remove(kind)
    return (*folders, file.stem)


def read_brain_stroke(job: Job) -> Scan:
    """Read one picture, its labels, and its mask from the difference to its overlay.

    Normal has an empty mask; a stroke without an overlay, or with one that nobody painted, has an unknown
    one. Pictures with the same pixels belong to the same patient. Raises ScanError if picture and overlay do
    not fit, if a Normal picture has a lesion painted, or for more than 8 bit."""
    made: _Annotated = job.inputs
    grey = read_picture(made.image)
    if grey.dtype != np.uint8:
        raise ScanError(made.image, "has 16 bit, this set has 8", "read it with --source png", "not_8_bit")
    painted = None if made.overlay is None else painted_lesion(made.overlay, grey)
    notes = []
    if made.kind == "normal":
        if painted is not None and painted.any():
            what = f"Normal, but {shown(Path(made.overlay).parent.name)} shows {painted.sum()} painted pixels"
            raise ScanError(made.image, what, "find out which is right", "label_mask")
        mask = np.zeros(grey.shape, np.uint8)
    elif painted is None or not painted.any():
        notes.append("no overlay" if painted is None else "nothing painted in its overlay")
        notes[0] += ": mask unknown"
        mask = None
    else:
        mask = np.where(painted, MASK_VALUES.get(made.kind, UNKNOWN_KIND), 0).astype(np.uint8)
    if made.kind is None:
        notes.append("outside the folders of the classes: labels unknown")
    return flat_scan(
        job,
        grey.astype(np.int16)[None],
        notes,
        patient_id=pseudonym("patient", "picture", _pixel_hash(grey[None])),
        split=made.split,
        labels=dict(CLASSES[made.kind]) if made.kind else None,
        mask=None if mask is None else mask[None],
        make=Scan,
        intensity="windowed",
    )


def painted_lesion(path: str | Path, grey: np.ndarray) -> np.ndarray:
    """(H, W) bool: what is painted in colour over a grey picture, holes filled.

    grey: (H, W) uint8, the picture without paint. Raises ScanError if the overlay has another size or shows
    another picture."""
    _, values = _open(Path(path), decode=True)
    if values.shape[:2] != grey.shape:
        what = f"has shape {values.shape[:2]}, its picture has {grey.shape}"
        raise ScanError(path, what, "download both again, or remove it", "overlay")
    low, high = _extremes(values) if values.ndim == 3 else (values.astype(np.int32),) * 2
    chroma = high - low
    painted = chroma > FAINTEST_PAINT
    if painted.any():
        painted = chroma > max(FAINTEST_PAINT, np.percentile(chroma[painted], STRENGTH_PERCENTILE) / 2)
    differs = (np.maximum(high - grey, grey - low) > SAME_GREY) & ~painted
    if differs.mean() > OTHER_PICTURE:  # more than a little: is it more than what leaks from the paint?
        differs &= ~ndimage.binary_dilation(painted, iterations=PAINT_EDGE_PX)
        if differs.mean() > OTHER_PICTURE:
            what = "shows another picture than its partner in PNG"
            raise ScanError(path, what, "download both again", "overlay")
    for box in ndimage.find_objects(painted.astype(np.uint8)):
        painted[box] = ndimage.binary_fill_holes(painted[box])
    return painted


PICTURE_READERS = {
    "png": Reader(discover_png, read_png),
    "brain-stroke": Reader(discover_brain_stroke, read_brain_stroke),
}
