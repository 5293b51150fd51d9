"""The prepared data: layout on disk, windows, labels and tasks, the packed cache.

Pixels are HU everywhere: int16 on disk, float32 in memory. A series is a folder

    <data>/{unsplit,train,val,test}/<series_uid>/metadata.json
    <data>/{unsplit,train,val,test}/<series_uid>/<00000>/{image,mask,truth}.npz      key arr_0, (H, W)

that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from isal import isal_zlib

import stage
from anatomy import LESION_CLASSES
from slice_files import PackedSlices, open_slices, read_npz, slices_writer, write_npz
from volumes import AIR_HU, Scan

FORMAT = 1
SPLITS = ("train", "val", "test")
LABELS = (*LESION_CLASSES[:5], "any", "ischemia")

# ---------------------------------------------------------------- windows

BRAIN_WINDOW = (40.0, 80.0)  # centre and width in HU: the window in which head CT is read
THREE_WINDOWS = (
    BRAIN_WINDOW,
    (80.0, 200.0),
    (40.0, 380.0),
)  # brain, subdural, soft tissue


def window_hu(hu, center: float, width: float, *, clip: bool = True):
    """HU -> 0..1 over the window center +- width / 2 (linear beyond it if clip is False).

    Works on arrays and tensors. This and unwindow_hu are the only door between HU and network units."""
    scaled = (hu - (center - width / 2)) / width
    return scaled.clip(0, 1) if clip else scaled


def unwindow_hu(scaled, center: float, width: float):
    """The inverse of window_hu inside the window: 0..1 -> HU."""
    return scaled * width + (center - width / 2)


def soft_window_hu(hu: torch.Tensor, center: float, width: float) -> torch.Tensor:
    """A window without ends: linear inside center +- width / 2, logarithmic beyond, so that bone and air stay
    apart and finite. -1 and 1 of the linear part are the window's ends."""
    return torch.asinh((hu - center) / (width / 2))


# ---------------------------------------------------------------- labels and tasks


def _stroke(labels: dict) -> float:
    values = [labels.get("any"), labels.get("ischemia")]
    if 1 in values:
        return 1.0
    return 0.0 if values == [0, 0] else math.nan


def _known(name: str) -> Callable[[dict], float]:
    return lambda labels: math.nan if labels.get(name) is None else float(labels[name])


def _type(labels: dict) -> str | None:
    """normal, ischemic or hemorrhagic; where both are, the bleed decides, as it does in treatment."""
    if labels.get("any") == 1:
        return "hemorrhagic"
    if labels.get("any") == 0 and labels.get("ischemia") is not None:
        return "ischemic" if labels["ischemia"] else "normal"
    return None


def _is_type(name: str) -> Callable[[dict], float]:
    return lambda labels: math.nan if _type(labels) is None else float(_type(labels) == name)


class Task(NamedTuple):
    """A question put to a classifier: one column of targets per class, NaN where the answer is unknown.

    exclusive: just one of the classes is true. positive: (N, classes) of targets or probabilities -> (N,),
    the one question that all tasks have in common: is there a lesion? weights: of the classes in the loss."""

    classes: tuple[str, ...]
    targets: tuple[Callable[[dict], float], ...]
    positive: Callable[[np.ndarray], np.ndarray] = lambda values: values[:, 0]
    exclusive: bool = False
    weights: tuple[float, ...] | None = None
    finding: str = "stroke"  # what `positive` asks for


TYPES = ("normal", "ischemic", "hemorrhagic")
SUBTYPES = LABELS[:6]  # of RSNA, "any" last
TASKS = {
    "stroke": Task(("stroke",), (_stroke,)),
    "hemorrhage": Task(("any",), (_known("any"),), finding="hemorrhage"),
    "type": Task(TYPES, tuple(_is_type(name) for name in TYPES), lambda values: 1 - values[:, 0], True),
    "subtypes": Task(
        SUBTYPES,
        tuple(_known(name) for name in SUBTYPES),
        lambda values: values[:, -1],
        weights=(1.0, 1.0, 1.0, 1.0, 1.0, 2.0),  # "any" twice, as RSNA's own score has it
        finding="hemorrhage",
    ),
}


def is_exclusive(classes: Sequence[str]) -> bool:
    """Whether just one of a classifier's classes is true: its logits are for softmax, else for sigmoid."""
    return any(task.exclusive and task.classes == tuple(classes) for task in TASKS.values())


def task_targets(task: str, labels: Sequence[dict], assume_absent: Sequence[str] = ()) -> np.ndarray:
    """Targets of a task: (N, classes) float32 with 1, 0 and NaN for unknown.

    labels: N dicts by label name. assume_absent: label names whose unknown values count as 0."""
    rows = []
    for entry in labels:
        filled = dict(entry)
        for name in assume_absent:
            if filled.get(name) is None:
                filled[name] = 0
        rows.append([target(filled) for target in TASKS[task].targets])
    return np.array(rows, np.float32).reshape(len(rows), len(TASKS[task].classes))


# ---------------------------------------------------------------- layout


def write_scan(scan: Scan, folder: Path, more: dict | None = None) -> Path:
    """Write one scan as <folder>/<series_uid>/, complete or not at all.

    more: further metadata, as JSON types. Returns its path."""
    final = Path(folder) / scan.series_uid
    partial = final.with_name(f".{scan.series_uid}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    kinds = {"image": scan.hu, "mask": scan.mask, "truth": scan.truth}
    kinds |= {f"low_{fraction}": volume for fraction, volume in scan.low.items()}
    kinds = {kind: volume for kind, volume in kinds.items() if volume is not None}
    slices = []
    for index in range(len(scan.hu)):
        place = partial / f"{index:05d}"
        place.mkdir(parents=True)
        for kind, volume in kinds.items():
            write_npz(place / f"{kind}.npz", volume[index])
        hashes = {
            kind: hashlib.sha256(np.ascontiguousarray(volume[index])).hexdigest()
            for kind, volume in kinds.items()
        }
        slices.append(
            {
                "index": index,
                "position_mm": scan.positions_mm[index],
                "labels": scan.slice_labels[index],
                "repairs": scan.repairs[index],
                "sha256": hashes,
                "mask_classes": None if scan.mask is None else np.unique(scan.mask[index]).tolist(),
                "constant": bool(scan.hu[index].min() == scan.hu[index].max()),
            }
        )
    metadata = {
        "format": FORMAT,
        "source": scan.source,
        "patient_id": scan.patient_id,
        "study_uid": scan.study_uid,
        "series_uid": scan.series_uid,
        "shape": scan.hu.shape,
        "spacing_mm": scan.spacing_mm,
        "affine": np.asarray(scan.affine).tolist(),
        "intensity": scan.intensity,
        "gantry_tilt_deg": scan.gantry_tilt_deg,
        "noise_hu": scan.noise_hu,
        "padding_count": scan.padding_count,
        "has_mask": scan.mask is not None,
        "has_truth": scan.truth is not None,
        "low_doses": sorted(scan.low, key=float),
        "split": scan.split,
        "labels": scan.labels,
        "slices": slices,
    }
    stage.write_json(partial / "metadata.json", metadata | (more or {}))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    stage.sync_folder(final.parent)
    return final


def series_folders(data: Path, split: str) -> list[Path]:
    """The complete series of one split (or of "unsplit"), sorted by name."""
    folder = Path(data) / split
    if not folder.is_dir():
        return []
    found = (path.parent for path in folder.glob("*/metadata.json"))
    return sorted(path for path in found if not path.name.startswith("."))


def all_series(data: Path) -> dict[Path, str]:
    """Every complete series below data, split or not: folder -> "unsplit", "train", "val" or "test"."""
    return {folder: split for split in ("unsplit", *SPLITS) for folder in series_folders(data, split)}


def read_metadata(folder: Path) -> dict:
    """One series' metadata. Raises InputError if it is missing, damaged or of another format."""
    path = Path(folder) / "metadata.json"
    metadata = stage.read_json(path, "run prepare_dataset.py again")
    if metadata.get("format") != FORMAT:
        raise stage.InputError(
            f"{path}: format {metadata.get('format')}, this version reads {FORMAT} (prepare the data again)"
        )
    return metadata


def read_slices(folder: Path, kind: str, count: int, start: int = 0) -> np.ndarray:
    """(count, H, W) of one kind, "image", "mask" or "truth", from slice start on.

    Raises InputError naming a file that is missing, damaged or unlike the others."""
    slices = None
    for place in range(count):
        path = Path(folder) / f"{start + place:05d}" / f"{kind}.npz"
        image = read_npz(path)
        if slices is None:
            slices = np.empty((count, *image.shape), image.dtype)
        if (image.shape, image.dtype) != (slices.shape[1:], slices.dtype):
            raise stage.InputError(
                f"{path}: {image.shape} {image.dtype}, its series has {slices.shape[1:]} {slices.dtype} "
                "(delete the series and prepare it again)"
            )
        slices[place] = image
    return slices


def read_splits(data: Path) -> dict:
    """splits.json: seed, fractions, patients (id -> split), hash. Raises InputError if there is none."""
    data = Path(data)
    if not data.is_dir():
        raise stage.InputError(f"{data}: no such folder (run prepare_dataset.py --out {data} first)")
    return stage.read_json(data / "splits.json", f"run split_dataset.py --data {data} first")


# ---------------------------------------------------------------- geometry of a training image


def square_pixel_mm(shape: Sequence[int], spacing_mm: Sequence[float], size: int) -> float:
    """Side of a pixel after fit_to_square. shape: (rows, columns)."""
    return max(shape[0] * spacing_mm[1], shape[1] * spacing_mm[2]) / size


def fit_to_square(volume: np.ndarray, spacing_mm: Sequence[float], size: int, fill: float) -> np.ndarray:
    """Resample slices to size x size square pixels over the longer side's field of view, centred.

    volume: (S, H, W), integers of a mask (fill 0, nearest) or HU (fill air, antialiased linear).
    spacing_mm: (slice, row, column). Returns (S, size, size) in volume's type."""
    rows, columns = _place_in_square(volume.shape[1:], spacing_mm, size)
    new = (rows.stop - rows.start, columns.stop - columns.start)
    if new != volume.shape[1:]:
        volume = _halve(volume) if _can_halve(volume, new) else _interpolate(volume, new)
    if new == (size, size):
        return volume
    square = np.full((len(volume), size, size), fill, volume.dtype)
    square[:, rows, columns] = volume
    return square


def from_square(volume: np.ndarray, shape: Sequence[int], spacing_mm: Sequence[float]) -> np.ndarray:
    """The inverse of fit_to_square: slices back on the pixels that they came from.

    volume: (S, size, size) uint8 of a mask (nearest), or (S, ..., size, size) float of probabilities
    (antialiased linear, so that a threshold is best applied afterwards). shape: (rows, columns) of the scan.
    spacing_mm: (slice, row, column) of the scan. Returns (S, ..., rows, columns) in volume's type."""
    rows, columns = _place_in_square(shape, spacing_mm, volume.shape[-1])
    inside = np.ascontiguousarray(volume[..., rows, columns])
    if inside.shape[-2:] == tuple(shape):
        return inside
    how = {"mode": "nearest-exact"} if volume.dtype == np.uint8 else {"mode": "bilinear", "antialias": True}
    flat = torch.from_numpy(inside.reshape(-1, 1, *inside.shape[-2:]))
    return F.interpolate(flat, tuple(shape), **how).numpy().reshape(*volume.shape[:-2], *shape)


def _place_in_square(shape: Sequence[int], spacing_mm: Sequence[float], size: int) -> tuple[slice, slice]:
    """The rows and the columns that slices take up after fit_to_square."""
    pixel_mm = square_pixel_mm(shape, spacing_mm, size)
    new = [max(1, round(side * mm / pixel_mm)) for side, mm in zip(shape, spacing_mm[1:], strict=True)]
    starts = [(size - side) // 2 for side in new]
    return slice(starts[0], starts[0] + new[0]), slice(starts[1], starts[1] + new[1])


def _interpolate(volume: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(volume)).float()[:, None]
    if volume.dtype == np.uint8:
        tensor = F.interpolate(tensor, new, mode="nearest-exact")
    else:
        tensor = F.interpolate(tensor, new, mode="bilinear", antialias=True).round()
    return tensor[:, 0].numpy().astype(volume.dtype)


MAX_HALVED = 2**15 // 8 - 1  # eight times a value must fit into int16


def _can_halve(volume: np.ndarray, new: tuple[int, int]) -> bool:
    return (
        volume.dtype == np.int16
        and volume.shape[1:] == (2 * new[0], 2 * new[1])
        and min(new) >= 2
        and volume.min() >= -MAX_HALVED
        and volume.max() <= MAX_HALVED
    )


def _halve(volume: np.ndarray) -> np.ndarray:
    """_interpolate to half the size, bit by bit the same, in half the time.

    The filter is 1 3 3 1 over 8 along each axis; 64 times its result is a whole number that float32 holds
    exactly. The first and last lines, where the filter is cut off, are left to torch."""
    halves = (volume.shape[1] // 2, volume.shape[2] // 2)
    half = np.empty((len(volume), *halves), np.int16)
    for image, small in zip(volume, half, strict=True):
        rows = image[0::2] + image[1::2]
        rows *= 3
        rows[1:] += image[1:-1:2]
        rows[:-1] += image[2::2]
        rows = rows.astype(np.float32)
        sums = rows[:, 0::2] + rows[:, 1::2]
        sums *= 3
        sums[:, 1:] += rows[:, 1:-1:2]
        sums[:, :-1] += rows[:, 2::2]
        sums *= 1 / 64
        small[:] = np.rint(sums, out=sums)
    for end, line in ((slice(None, 4), 0), (slice(-4, None), -1)):  # 4 lines make 2, of which one is right
        half[:, line] = _interpolate(volume[:, end], (2, halves[1]))[:, line]
        half[:, :, line] = _interpolate(volume[:, :, end], (halves[0], 2))[:, :, line]
    return half


# ---------------------------------------------------------------- packed cache

PACK_FORMAT = 2
PACK_KINDS = {"image": (np.dtype(np.int16), AIR_HU), "truth": (np.dtype(np.int16), AIR_HU)}
PACK_KINDS |= {"mask": (np.dtype(np.uint8), 0)}  # kind -> type, and what lies beside a picture


def _kind(name: str) -> tuple[np.dtype, int]:
    """Type and fill of a kind of slices; low_<fraction> is like an image."""
    return PACK_KINDS["image" if name.startswith("low_") else name]


SLICES_AT_ONCE = 8  # built together: 4 MB of 512 x 512 stay in the processor's cache


class Pack:
    """One split at training size, memory-mapped, series after series, raw or compressed without loss.

    image: (N, size, size) int16 HU. truth: the same without noise, or None. mask: uint8 lesion classes, or
    None. low: dose fraction as text -> real low-dose slices. All are arrays, or PackedSlices where the pack
    is compressed. series: metadata of each series but for its slices. series_of, slice_of: (N,) series number
    and slice index. pixel_mm: (N,) side of a pixel. labels: N dicts by label name, equal ones shared: not to
    be changed. split_hash: of the split it came from. Raises InputError if a file is missing, cut off, or of
    another version."""

    def __init__(self, folder: Path):
        index = _read_index(folder)
        if index.get("format") != PACK_FORMAT:
            raise stage.InputError(f"{folder}: a pack of another version (delete the folder, run again)")
        self.folder = folder
        self.series: list[dict] = index["series"]
        self.key: str = index["key"]  # changes with whatever the pack was made from
        self.split_hash: str = index["split_hash"]
        self.size: int = index["size"]
        self.compressed: bool = index["compressed"]
        self.checksums: dict[str, list[int]] = index["checksums"]  # kind -> CRC-32 of each series' values
        counts = [len(numbers) for numbers in index["labels_of"]]
        shape = (sum(counts), self.size, self.size)
        self.slices: dict[str, np.ndarray | PackedSlices] = {
            kind: open_slices(folder / kind, shape, _kind(kind)[0], compress=self.compressed)
            for kind in self.checksums
        }
        self.image, self.truth, self.mask = (self.slices.get(kind) for kind in ("image", "truth", "mask"))
        self.low = {kind[4:]: slices for kind, slices in self.slices.items() if kind.startswith("low_")}
        self.series_of = np.repeat(np.arange(len(counts)), counts)
        self.slice_of = np.concatenate([np.arange(count) for count in counts])
        self.labels = [index["labels"][number] for numbers in index["labels_of"] for number in numbers]
        self._sides_mm = [square_pixel_mm(m["shape"][1:], m["spacing_mm"], self.size) for m in self.series]
        self.pixel_mm = np.repeat(self._sides_mm, counts)

    def __len__(self) -> int:
        return len(self.image)

    def spacing_mm(self, number: int) -> tuple[float, float, float]:
        """Of the slices, rows and columns of a series as it is here."""
        side = self._sides_mm[number]
        return self.series[number]["spacing_mm"][0], side, side

    def masks(self, make: Callable[[np.ndarray, Sequence[float]], np.ndarray]) -> np.ndarray:
        """(N, size, size) bool from make(volume, spacing_mm), one series after the other.

        Made from the truth where there is one, else from the image: never from a low dose."""
        source = self.image if self.truth is None else self.truth
        parts = []
        for number in range(len(self.series)):
            parts.append(make(source[self.series_of == number], self.spacing_mm(number)))
        return np.concatenate(parts)

    def patient_ids(self) -> np.ndarray:
        """(N,) patient of every slice."""
        return np.array([metadata["patient_id"] for metadata in self.series])[self.series_of]

    def damaged(self) -> list[str]:
        """What has other values than were written, e.g. "image of series <uid>"; reads everything."""
        ends = np.cumsum(np.bincount(self.series_of)).tolist()
        starts = [0, *ends[:-1]]
        found = []
        for kind, checksums in self.checksums.items():
            parts = list(zip(self.series, starts, ends, checksums, strict=True))
            for metadata, start, end, expected in stage.progress(parts, desc=f"check {kind}", unit="series"):
                if _checksum(self.slices[kind], range(start, end)) != expected:
                    found.append(f"{kind} of series {metadata['series_uid']}")
        return found


def _checksum(slices: np.ndarray | PackedSlices, rows: range) -> int | None:
    """CRC-32 of the values of rows; None where they cannot be read, as compressed slices have their own."""
    crc = 0
    with contextlib.suppress(stage.InputError):
        for row in rows:
            crc = isal_zlib.crc32(slices[row], crc)
        return crc
    return None


def native_size(data: Path, split: str = "train") -> int:
    """The matrix that all series of a split share, or 256 where they differ."""
    sizes = {tuple(read_metadata(folder)["shape"][1:]) for folder in series_folders(data, split)}
    longest = {max(shape) for shape in sizes}
    return longest.pop() if len(longest) == 1 else 256


def load_pack(data: Path, split: str, size: int, compress: bool | None = None) -> Pack:
    """The packed cache of a split at size x size; built once under <data>/cache/, rebuilt when data change.

    compress: whether it shall be compressed; None: as it is, and raw where there is none. Raises InputError
    if there is no split, if it holds no series, if a patient is on the wrong side, or if the images are
    windowed 8-bit pictures and not HU."""
    data = Path(data)
    splits = read_splits(data)
    folders = series_folders(data, split)
    if not folders:
        raise stage.InputError(f"{data / split}: no series (run prepare_dataset.py, then split_dataset.py)")
    contents = _Contents(size, splits["hash"])
    for folder in folders:
        metadata = read_metadata(folder)
        home = splits["patients"].get(metadata["patient_id"])
        if home != split:
            raise stage.InputError(
                f"{folder}: patient {metadata['patient_id']} belongs to {home or 'no split'}, not to {split} "
                "(run split_dataset.py again)"
            )
        if metadata["intensity"] != "hu":
            raise stage.InputError(f"{folder}: windowed 8-bit images have no HU (prepare a source with HU)")
        contents.add(metadata)
    waiting = len(series_folders(data, "unsplit"))
    if waiting:
        stage.log.warning("%s: %d series are not used (run split_dataset.py)", data / "unsplit", waiting)
    final = data / "cache" / f"{split}-{size}"
    key = contents.key.hexdigest()
    if not _is_current(final, key, compress):
        with stage.lock(final.with_name(f".{final.name}.lock"), wait=True):
            if not _is_current(final, key, compress):  # another process may have built it meanwhile
                _build_pack(final, folders, contents, compress)
    return Pack(final)


class _Contents:
    """What goes into a pack, without the three quarters of each metadata.json that nobody asks of a pack."""

    def __init__(self, size: int, split_hash: str):
        self.size, self.split_hash = size, split_hash
        self.key = hashlib.sha256(json.dumps([PACK_FORMAT, FORMAT, size, split_hash]).encode())
        self.series: list[dict] = []
        self.labels_of: list[list[int]] = []  # per series and slice: a number of labels
        self._numbers: dict[tuple, int] = {}

    def add(self, metadata: dict) -> None:
        """Take the next series. metadata: of read_metadata."""
        self.key.update(json.dumps(metadata, sort_keys=True).encode())
        self.series.append({name: value for name, value in metadata.items() if name != "slices"})
        labels = [tuple(entry["labels"].items()) for entry in metadata["slices"]]
        self.labels_of.append([self._numbers.setdefault(entry, len(self._numbers)) for entry in labels])

    @property
    def labels(self) -> list[dict]:
        """Each set of labels once: there are few, and a dict takes more memory than all else of a slice."""
        return [dict(entry) for entry in self._numbers]

    def kinds(self) -> list[str]:
        """The kinds that all series have."""
        optional = {"truth": "has_truth", "mask": "has_mask"}
        kinds = ["image", *(kind for kind, flag in optional.items() if all(m[flag] for m in self.series))]
        low = set.intersection(*(set(m["low_doses"]) for m in self.series))
        return kinds + [f"low_{fraction}" for fraction in sorted(low, key=float)]


def _read_index(folder: Path) -> dict:
    return stage.read_json(folder / "index.json", f"delete {folder} and run again")


def _is_current(final: Path, key: str, compress: bool | None) -> bool:
    if not (final / "index.json").exists():
        return False
    index = _read_index(final)
    return index.get("key") == key and compress in (None, index.get("compressed"))


PACKED_SHARE = 0.45  # of the raw size: 0.29 to 0.39 was measured on CT, and 0.37 on phantoms


def _build_pack(final: Path, folders: list[Path], contents: _Contents, compress: bool | None) -> None:
    """Resample every series into one file for each kind, then move them into place together."""
    if compress is None:
        compress = (final / "index.json").exists() and _read_index(final).get("compressed", False)
    size, kinds = contents.size, contents.kinds()
    counts = [len(numbers) for numbers in contents.labels_of]
    shape = (sum(counts), size, size)
    needed = math.prod(shape) * sum(_kind(kind)[0].itemsize for kind in kinds)
    stage.require_space(final, int(needed * (PACKED_SHARE if compress else 1)))
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checksums: dict[str, list[int]] = {kind: [] for kind in kinds}
    with (
        contextlib.ExitStack() as files,
        stage.progress((), desc=f"cache {final.name}", total=shape[0], unit="slice") as bar,
    ):
        write = {
            kind: files.enter_context(slices_writer(partial / kind, shape, _kind(kind)[0], compress=compress))
            for kind in kinds
        }
        for folder, metadata, count in zip(folders, contents.series, counts, strict=True):
            crcs = dict.fromkeys(kinds, 0)
            for start in range(0, count, SLICES_AT_ONCE):
                some = min(SLICES_AT_ONCE, count - start)
                for kind in kinds:
                    dtype, fill = _kind(kind)
                    volume = read_slices(folder, kind, some, start).astype(dtype, copy=False)
                    square = np.ascontiguousarray(fit_to_square(volume, metadata["spacing_mm"], size, fill))
                    write[kind](square)
                    crcs[kind] = isal_zlib.crc32(square, crcs[kind])
                bar.update(some)
            for kind, crc in crcs.items():
                checksums[kind].append(crc)
    index = {
        "format": PACK_FORMAT,
        "key": contents.key.hexdigest(),
        "split_hash": contents.split_hash,
        "size": size,
        "compressed": compress,
        "checksums": checksums,
        "labels": contents.labels,
        "labels_of": contents.labels_of,
        "series": contents.series,
    }
    stage.write_json(partial / "index.json", index)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def describe_labels(series: Sequence[dict]) -> dict[str, Any]:
    """Counts for a summary: {label: [scans positive, slices positive]}."""
    counts = {}
    for name in LABELS:
        scans = sum(metadata["labels"].get(name) == 1 for metadata in series)
        slices = sum(entry["labels"].get(name) == 1 for metadata in series for entry in metadata["slices"])
        counts[name] = [scans, slices]
    return counts
