"""The prepared data: layout on disk, windows, labels and tasks, the packed cache, low dose at load time.

Pixels are HU everywhere: int16 on disk, float32 in memory. A series is a folder

    <data>/{unsplit,train,val,test}/<series_uid>/metadata.json
    <data>/{unsplit,train,val,test}/<series_uid>/<00000>/{image,mask,truth}.npz      key arr_0, (H, W)

that appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import stage
from anatomy import LESION_CLASSES
from dose import DOSE_MODELS
from volumes import AIR_HU, Scan

FORMAT = 1
SPLITS = ("train", "val", "test")
LABELS = (*LESION_CLASSES[:5], "any", "ischemia")

# ---------------------------------------------------------------- windows


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


class Task(NamedTuple):
    """A question put to a classifier: one column of targets per class, NaN where the answer is unknown."""

    classes: tuple[str, ...]
    targets: tuple[Callable[[dict], float], ...]


TASKS = {
    "stroke": Task(("stroke",), (_stroke,)),
    "hemorrhage": Task(("any",), (_known("any"),)),
}


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


def write_scan(scan: Scan, folder: Path) -> Path:
    """Write one scan as <folder>/<series_uid>/, complete or not at all. Returns its path."""
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
            _write_npz(place / f"{kind}.npz", volume[index])
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
    stage.write_json(partial / "metadata.json", metadata)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    stage.sync_folder(final.parent)
    return final


def _write_npz(path: Path, array: np.ndarray) -> None:
    """np.savez_compressed at zlib's fastest level: a sixth of the time for an eighth more space."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w") as file,
    ):
        np.lib.format.write_array(file, array, allow_pickle=False)


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


def read_slices(folder: Path, kind: str, count: int) -> np.ndarray:
    """(S, H, W) of one kind, "image", "mask" or "truth". Raises InputError naming a damaged file."""
    slices = []
    for index in range(count):
        path = Path(folder) / f"{index:05d}" / f"{kind}.npz"
        try:
            with np.load(path, allow_pickle=False) as archive:
                slices.append(archive["arr_0"])
        except FileNotFoundError:
            raise stage.InputError(f"{path}: not found (delete the series and prepare it again)") from None
        except Exception as error:  # noqa: BLE001 a damaged zip raises half a dozen types
            raise stage.InputError(
                f"{path}: unreadable, {type(error).__name__} (delete the series and prepare it again)"
            ) from None
    return np.stack(slices)


def read_splits(data: Path) -> dict:
    """splits.json: seed, fractions, patients (id -> split), hash. Raises InputError if there is none."""
    data = Path(data)
    if not data.is_dir():
        raise stage.InputError(f"{data}: no such folder (run prepare_dataset.py --out {data} first)")
    return stage.read_json(data / "splits.json", f"run split_dataset.py --data {data} first")


# ---------------------------------------------------------------- geometry of a training image


def fit_to_square(volume: np.ndarray, spacing_mm: Sequence[float], size: int, fill: float) -> np.ndarray:
    """Resample slices to size x size square pixels over the longer side's field of view, centred.

    volume: (S, H, W), integers of a mask (fill 0, nearest) or HU (fill air, antialiased linear).
    spacing_mm: (slice, row, column). Returns (S, size, size) in volume's type."""
    count, height, width = volume.shape
    _, row_mm, column_mm = spacing_mm
    pixel_mm = max(height * row_mm, width * column_mm) / size
    new = (max(1, round(height * row_mm / pixel_mm)), max(1, round(width * column_mm / pixel_mm)))
    if new != (height, width):
        tensor = torch.from_numpy(np.ascontiguousarray(volume)).float()[:, None]
        if volume.dtype == np.uint8:
            tensor = F.interpolate(tensor, new, mode="nearest-exact")
        else:
            tensor = F.interpolate(tensor, new, mode="bilinear", antialias=True).round()
        volume = tensor[:, 0].numpy().astype(volume.dtype)
    if new == (size, size):
        return volume
    square = np.full((count, size, size), fill, volume.dtype)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    square[:, top : top + new[0], left : left + new[1]] = volume
    return square


# ---------------------------------------------------------------- packed cache


class Pack:
    """One split at training size, memory-mapped, series after series.

    image: (N, size, size) int16 HU. truth: the same without noise, or None. mask: uint8 lesion classes, or
    None. series: metadata of each series. series_of, slice_of: (N,) series number and slice index.
    pixel_mm: (N,) side of a pixel. labels: N dicts by label name. split_hash: of the split it came from."""

    def __init__(self, folder: Path):
        index = stage.read_json(folder / "index.json", f"delete {folder} and run again")
        self.series: list[dict] = index["series"]
        self.key: str = index["key"]  # changes with whatever the pack was made from
        self.split_hash: str = index["split_hash"]
        self.size: int = index["size"]
        self.image = np.load(folder / "image.npy", mmap_mode="r")
        self.truth = np.load(folder / "truth.npy", mmap_mode="r") if index["has_truth"] else None
        self.mask = np.load(folder / "mask.npy", mmap_mode="r") if index["has_mask"] else None
        counts = [len(metadata["slices"]) for metadata in self.series]
        self.series_of = np.repeat(np.arange(len(counts)), counts)
        self.slice_of = np.concatenate([np.arange(count) for count in counts])
        self.labels = [entry["labels"] for metadata in self.series for entry in metadata["slices"]]
        fields = [
            max(m["shape"][1] * m["spacing_mm"][1], m["shape"][2] * m["spacing_mm"][2]) for m in self.series
        ]
        self.pixel_mm = np.repeat(np.array(fields) / self.size, counts)

    def __len__(self) -> int:
        return len(self.image)

    def masks(self, make: Callable[[np.ndarray, Sequence[float]], np.ndarray]) -> np.ndarray:
        """(N, size, size) bool from make(volume, spacing_mm), one series after the other.

        Made from the truth where there is one, else from the image: never from a low dose."""
        source = self.image if self.truth is None else self.truth
        parts = []
        for number, metadata in enumerate(self.series):
            rows = self.series_of == number
            pixel = float(self.pixel_mm[rows][0])
            parts.append(make(source[rows], (metadata["spacing_mm"][0], pixel, pixel)))
        return np.concatenate(parts)

    def patient_ids(self) -> np.ndarray:
        """(N,) patient of every slice."""
        return np.array([metadata["patient_id"] for metadata in self.series])[self.series_of]


def native_size(data: Path, split: str = "train") -> int:
    """The matrix that all series of a split share, or 256 where they differ."""
    sizes = {tuple(read_metadata(folder)["shape"][1:]) for folder in series_folders(data, split)}
    longest = {max(shape) for shape in sizes}
    return longest.pop() if len(longest) == 1 else 256


def load_pack(data: Path, split: str, size: int) -> Pack:
    """The packed cache of a split at size x size; built once under <data>/cache/, rebuilt when data change.

    Raises InputError if there is no split, if it holds no series, if a patient is on the wrong side, or if
    the images are windowed 8-bit pictures and not HU."""
    data = Path(data)
    splits = read_splits(data)
    folders = series_folders(data, split)
    if not folders:
        raise stage.InputError(f"{data / split}: no series (run prepare_dataset.py, then split_dataset.py)")
    series = [read_metadata(folder) for folder in folders]
    for folder, metadata in zip(folders, series, strict=True):
        home = splits["patients"].get(metadata["patient_id"])
        if home != split:
            raise stage.InputError(
                f"{folder}: patient {metadata['patient_id']} belongs to {home or 'no split'}, not to {split} "
                "(run split_dataset.py again)"
            )
        if metadata["intensity"] != "hu":
            raise stage.InputError(f"{folder}: windowed 8-bit images have no HU (prepare a source with HU)")
    content = json.dumps([FORMAT, size, splits["hash"], series], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()
    waiting = len(series_folders(data, "unsplit"))
    if waiting:
        stage.log.warning("%s: %d series are not used (run split_dataset.py)", data / "unsplit", waiting)
    cache = data / "cache"
    final = cache / f"{split}-{size}"
    if _is_current(final, key):
        return Pack(final)
    with stage.lock(cache / f".{split}-{size}.lock", wait=True):
        if not _is_current(final, key):  # another process may have built it while this one waited
            _build_pack(final, folders, series, size, key, splits["hash"])
        return Pack(final)


def _is_current(final: Path, key: str) -> bool:
    known = final / "index.json"
    return known.exists() and stage.read_json(known, f"delete {final} and run again").get("key") == key


def _build_pack(
    final: Path, folders: list[Path], series: list[dict], size: int, key: str, split_hash: str
) -> None:
    """Resample every series into memory-mapped arrays, then move them into place together."""
    count = sum(len(metadata["slices"]) for metadata in series)
    kinds = {"image": (np.int16, AIR_HU)}
    if all(metadata["has_truth"] for metadata in series):
        kinds["truth"] = (np.int16, AIR_HU)
    if all(metadata["has_mask"] for metadata in series):
        kinds["mask"] = (np.uint8, 0)
    bytes_per_pixel = sum(np.dtype(kind).itemsize for kind, _ in kinds.values())
    stage.require_space(final, count * size * size * bytes_per_pixel)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = {
        name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, (count, size, size))
        for name, (dtype, _) in kinds.items()
    }
    start = 0
    pairs = list(zip(folders, series, strict=True))
    for folder, metadata in stage.progress(pairs, desc=f"cache {final.name}", unit="series"):
        slices = len(metadata["slices"])
        for name, (dtype, fill) in kinds.items():
            volume = read_slices(folder, name, slices).astype(dtype, copy=False)
            arrays[name][start : start + slices] = fit_to_square(volume, metadata["spacing_mm"], size, fill)
        start += slices
    for array in arrays.values():
        array.flush()
    index = {
        "key": key,
        "split_hash": split_hash,
        "size": size,
        "has_truth": "truth" in kinds,
        "has_mask": "mask" in kinds,
        "series": series,
    }
    stage.write_json(partial / "index.json", index)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


# ---------------------------------------------------------------- low dose at load time


def evaluation_seed(noise_seed: int, series_uid: str, slice_index: int, dose_model: str, dose: float) -> int:
    """The seed of a slice's noise in evaluation: the same for every arm, run and machine."""
    return stage.stable_seed("evaluation", noise_seed, series_uid, int(slice_index), dose_model, float(dose))


def low_dose(hu: torch.Tensor, dose_model: str, doses: Sequence[float], seeds: Sequence[int]) -> torch.Tensor:
    """Simulate a dose per slice. hu: (B, 1, H, W) HU. doses, seeds: one for each. Returns (B, 1, H, W) HU."""
    simulate = DOSE_MODELS[dose_model].simulate
    generator = torch.Generator(hu.device)
    return torch.stack(
        [
            simulate(image, dose, generator.manual_seed(seed))
            for image, dose, seed in zip(hu, doses, seeds, strict=True)
        ]
    )


def evaluation_input(
    pack: Pack, rows: Sequence[int], dose_model: str, doses: Sequence[float], noise_seed: int
) -> np.ndarray:
    """Slices of a pack at a dose each, with the noise that every arm sees. Returns (B, H, W) float32 HU.

    rows, doses: one dose for each row. Always made on the CPU, so that a GPU sees the same noise."""
    seeds = [
        evaluation_seed(
            noise_seed, pack.series[pack.series_of[row]]["series_uid"], pack.slice_of[row], dose_model, dose
        )
        for row, dose in zip(rows, doses, strict=True)
    ]
    return low_dose(to_tensor(pack.image[rows]), dose_model, doses, seeds)[:, 0].numpy()


def check_doses(dose_model: str, doses: Sequence[float] | None) -> list[float]:
    """The doses to use: the given ones, or all of the model's. Raises ValueError for one out of range."""
    model = DOSE_MODELS[dose_model]
    chosen = list(doses or model.doses)
    for dose in chosen:
        model.check(dose)
    return chosen


# ---------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Slices on the training device. hu, target: (B, 1, H, W) HU; rows: (B,) places in the pack."""

    rows: np.ndarray
    seeds: list[int]  # one for each slice, fresh in every epoch
    hu: torch.Tensor
    mask: torch.Tensor | None  # (B, 1, H, W) uint8 lesion classes
    targets: torch.Tensor | None  # (B, classes)


class Batches:
    """Shuffled batches of a pack, the same for the same (seed, epoch) however often they are drawn.

    Each of world_size processes takes its share of every batch of batch_size. An incomplete last batch is
    left out. weights: (N,) sampling weights, then rows are drawn with replacement. targets: (N, classes)."""

    def __init__(
        self,
        pack: Pack,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rows: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        targets: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.pack, self.seed, self.device = pack, seed, device
        self.rows = np.arange(len(pack)) if rows is None else np.asarray(rows)
        self.weights = None if weights is None else weights / weights.sum()
        self.targets = targets
        self.batch_size = min(batch_size, len(self.rows))
        if self.batch_size % world_size or self.batch_size == 0:
            raise stage.InputError(
                f"--batch-size {self.batch_size}: must be a multiple of the {world_size} processes, "
                f"with {len(self.rows)} slices to draw from"
            )
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step start on."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            order = rng.permutation(self.rows)
        else:
            order = rng.choice(self.rows, len(self.rows), p=self.weights)
        share = self.batch_size // self.world_size
        for step in range(start, len(self)):
            first = step * self.batch_size + self.rank * share
            rows = order[first : first + share]
            # by place in the epoch, not by row: a row drawn twice must not get the same noise twice
            seeds = [stage.stable_seed(self.seed, epoch, first + place) for place in range(share)]
            yield self._batch(rows, seeds)

    def _batch(self, rows: np.ndarray, seeds: list[int]) -> Batch:
        pack = self.pack
        mask = None if pack.mask is None else torch.from_numpy(pack.mask[rows])[:, None].to(self.device)
        targets = None if self.targets is None else torch.from_numpy(self.targets[rows]).to(self.device)
        return Batch(rows, seeds, to_tensor(pack.image[rows], self.device), mask, targets)


def to_tensor(slices: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, H, W) HU of any type -> (B, 1, H, W) float32 on device."""
    return torch.from_numpy(np.array(slices)).to(device).float()[:, None]


def random_doses(seeds: Sequence[int], doses: Sequence[float]) -> list[float]:
    """One of doses for each seed, uniformly."""
    return [doses[stage.stable_seed("dose", seed) % len(doses)] for seed in seeds]


def mirror(images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Mirror left and right the slices whose seed is odd. images: (B, ...) of any type."""
    odd = torch.tensor([seed % 2 == 1 for seed in seeds], device=images.device)
    return torch.where(odd[:, None, None, None], images.flip(-1), images)


MAX_SHIFT = 0.06  # of the image side: heads are centred to within that
MAX_ROTATION_DEG = 10.0  # as far as a head is tilted in its holder


def augment(hu: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Random mirror, shift and rotation of each slice, before any noise or window, filled with air.

    hu: (B, 1, H, W). Half of the slices are rotated, with interpolation; the others only move by whole
    pixels, so that the texture of their noise stays as it is in test scans."""
    out = torch.empty_like(hu)
    reach = int(MAX_SHIFT * hu.shape[-1])
    for place, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        image = hu[place].flip(-1) if rng.random() < 0.5 else hu[place]
        down, right = rng.integers(-reach, reach + 1, 2).tolist()
        angle = math.radians(rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG))
        rotate = rng.random() < 0.5
        image = _shift(image, down, right)
        out[place] = _rotate(image, angle) if rotate else image
    return out


def _shift(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """(1, H, W) moved by whole pixels; what comes in is air."""
    padded = F.pad(image, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), value=float(AIR_HU))
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, top : top + image.shape[-2], left : left + image.shape[-1]]


def _rotate(image: torch.Tensor, angle: float) -> torch.Tensor:
    """(1, H, W) turned about its centre by angle in radians; what comes in is air."""
    cosine, sine = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], device=image.device)[None]
    with torch.autocast(image.device.type, enabled=False):  # half precision would move pixels by half a pixel
        grid = F.affine_grid(theta, (1, *image.shape), align_corners=False)
        # grid_sample fills with zeros: make air the zero while it works
        return F.grid_sample((image - AIR_HU)[None], grid, align_corners=False)[0] + AIR_HU


def describe_labels(series: Sequence[dict]) -> dict[str, Any]:
    """Counts for a summary: {label: [scans positive, slices positive]}."""
    counts = {}
    for name in LABELS:
        scans = sum(metadata["labels"].get(name) == 1 for metadata in series)
        slices = sum(entry["labels"].get(name) == 1 for metadata in series for entry in metadata["slices"])
        counts[name] = [scans, slices]
    return counts
