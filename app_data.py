"""What the app reads from disk and what networks make of it, cached by the files it was made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import streamlit as st
from torch import nn

import anatomy
import checkpoints
import metrics
import stage
import training
from app_files import LEVELS, Folders, Stamp, load_results, malformed, stamp
from app_words import arm_labels, finding, has_lesion, quoted
from arms import family_name
from batches import to_tensor
from dataset import (
    fit_to_square,
    read_metadata,
    read_slices,
    read_splits,
    series_folders,
    square_pixel_mm,
    task_targets,
)
from detectability import Spectrum, flat_tissue, noise_power_spectrum, noise_sd
from dose import DOSE_MODELS, SIMULATED
from inference import (
    LEGEND,
    PIPELINES,
    ScanClassifier,
    denoise,
    fits_denoiser,
    generate_gradcam,
    load_classifier,
    load_denoiser,
    load_segmenter,
    read,
)
from lesion_reading import outline_lesions
from low_dose import evaluation_seed, noise_level, scan_flux
from volumes import AIR_HU

SPLIT_NOTES = {
    "test": "test patients: kept out of training",
    "val": "validation patients: checkpoints and thresholds were chosen on them",
    "train": "training patients: the networks have seen them, so this says nothing about new ones",
    "unsplit": "not split yet: no network was trained with them here",
}
BRAIN = "brain"  # of anatomy.MASKS: noise is measured where it matters
SLICES_AT_ONCE = 8  # of a simulated scan: they share the places where rays meet pixels
NOISE_SEED = 42  # of run_experiments.py by default; results that are there say their own


@st.cache_data(show_spinner=False, max_entries=8)
def has_series(split_folder: Stamp) -> bool:
    folder = Path(split_folder.path)
    return bool(series_folders(folder.parent, folder.name))


class Case(NamedTuple):
    """One line of the list of cases."""

    uid: str
    folder: str
    split: str
    patient: str
    finding: str
    lesion: bool
    slices: int | None = None
    matrix: str | None = None
    pixel_mm: float | None = None
    gap_mm: float | None = None
    noise_hu: float | None = None
    tilt_deg: float | None = None
    repairs: int | None = None
    source: str | None = None


@st.cache_data(show_spinner="Reading the list of series ...", max_entries=8)
def list_cases(split_folder: Stamp) -> dict[str, Case]:
    """The series of a split by uid. One that cannot be read is listed as such."""
    folder = Path(split_folder.path)
    found = {}
    for path in series_folders(folder.parent, folder.name):
        try:
            metadata = read_metadata(path)
            slices, rows, columns = metadata["shape"]
            gap, row_mm, _ = metadata["spacing_mm"]
            found[path.name] = Case(
                path.name,
                str(path),
                folder.name,
                str(metadata["patient_id"]),
                finding(metadata["labels"]),
                has_lesion(metadata["labels"]),
                slices,
                f"{rows} x {columns}",
                row_mm,
                gap,
                metadata["noise_hu"],
                metadata["gantry_tilt_deg"],
                sum(bool(one["repairs"]) for one in metadata["slices"]),
                str(metadata["source"]),
            )
        except (stage.StageError, OSError, KeyError, TypeError, ValueError, AttributeError):
            found[path.name] = Case(path.name, str(path), folder.name, path.name, "unreadable", False)
    return found


def all_cases(folders: Folders) -> dict[str, Case]:
    """The cases of all splits, those kept out of training first."""
    found = {}
    for split in SPLIT_NOTES:
        path = folders.data / split
        if path.is_dir() and has_series(stamp(path)):
            found |= list_cases(stamp(path))
    return found


class Series(NamedTuple):
    """One series at the matrix of the networks, as run_experiments.py sees it. Nobody may write into it."""

    uid: str
    labels: dict
    slice_labels: list[dict]
    affine: np.ndarray  # (4, 4), (column, row, slice, 1) of image -> LPS mm
    matrix: tuple[int, int]  # rows and columns on disk
    image: np.ndarray  # (S, n, n) int16 HU
    truth: np.ndarray | None  # (S, n, n) int16 HU without noise
    lesions: np.ndarray | None  # (S, n, n) uint8 classes
    spacing_mm: tuple[float, float, float]  # (slice, row, column) of image
    noise_hu: float  # as measured when it was prepared, or NaN
    flux: dict[str, float]  # by dose model, see low_dose.scan_flux

    @property
    def reference(self) -> np.ndarray:
        """What image quality is scored against."""
        return self.image if self.truth is None else self.truth


def read_series(folder: Path, size: int | None) -> Series:
    """Read a prepared series. size: of the square matrix; None for the longer side of its own.

    Raises InputError naming the file that is damaged, or for windowed 8-bit images."""
    metadata = read_metadata(folder)
    try:
        if metadata["intensity"] != "hu":
            raise stage.InputError(f"{folder}: windowed 8-bit images have no HU (prepare a source with HU)")
        count, rows, columns = metadata["shape"]
        spacing = metadata["spacing_mm"]
        size = size or max(rows, columns)
        fills = {"image": AIR_HU}
        fills |= {"truth": AIR_HU} if metadata["has_truth"] else {}
        fills |= {"mask": 0} if metadata["has_mask"] else {}
        volumes = {
            kind: fit_to_square(read_slices(folder, kind, count), spacing, size, fill)
            for kind, fill in fills.items()
        }
        pixel_mm = square_pixel_mm((rows, columns), spacing, size)
        square = (spacing[0], pixel_mm, pixel_mm)
        noise = math.nan if metadata["noise_hu"] is None else metadata["noise_hu"]
        own_mm = math.sqrt(spacing[1] * spacing[2])
        return Series(
            uid=metadata["series_uid"],
            labels=dict(metadata["labels"]),
            slice_labels=[dict(metadata["slices"][index]["labels"]) for index in range(count)],
            affine=_square_affine(metadata["affine"], (rows, columns), size, pixel_mm),
            matrix=(rows, columns),
            image=volumes["image"],
            truth=volumes.get("truth"),
            lesions=volumes.get("mask"),
            spacing_mm=square,
            noise_hu=noise,
            flux={name: scan_flux(volumes["image"], square, noise, name, own_mm) for name in SIMULATED},
        )
    except stage.StageError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise malformed(folder / "metadata.json", error, "prepare the series again") from None


def _square_affine(affine: Sequence, shape: tuple[int, int], size: int, pixel_mm: float) -> np.ndarray:
    """The affine of slices of a shape (rows, columns) after dataset.fit_to_square, whose middle stays."""
    affine = np.asarray(affine, float).reshape(4, 4)
    middle = affine @ [(shape[1] - 1) / 2, (shape[0] - 1) / 2, 0, 1]
    out = affine.copy()
    out[:3, :2] *= pixel_mm / np.linalg.norm(affine[:3, :2], axis=0)
    out[:3, 3] = middle[:3] - out[:3, :2].sum(axis=1) * (size - 1) / 2
    return out


@st.cache_resource(show_spinner="Reading the series ...", max_entries=4)
def load_series(metadata_file: Stamp, size: int | None) -> Series:
    return read_series(Path(metadata_file.path).parent, size)


@st.cache_resource(show_spinner=False, max_entries=4)
def load_inside(metadata_file: Stamp, size: int | None, mask: str) -> np.ndarray:
    """(S, n, n) bool, where image quality is measured. mask: a key of anatomy.MASKS."""
    series = load_series(metadata_file, size)
    return anatomy.MASKS[mask](series.reference, series.spacing_mm)


@st.cache_resource(show_spinner="Loading the networks ...", max_entries=16)
def load_network(kind: str, file: Stamp, device: str) -> tuple[nn.Module, dict]:
    load = {"denoiser": load_denoiser, "classifier": load_classifier, "segmenter": load_segmenter}[kind]
    return load(Path(file.path), device)


@st.cache_resource(show_spinner=False)
def pick_device(name: str) -> str:
    return str(training.pick_device(name))


class Noise(NamedTuple):
    """A simulated dose, and the seed of its noise."""

    dose_model: str
    dose: float
    seed: int


class Source(NamedTuple):
    """A prepared series at the matrix of the networks."""

    file: Stamp  # its metadata.json
    size: int | None

    @property
    def series(self) -> Series:
        return load_series(self.file, self.size)


def simulate(series: Series, noise: Noise) -> np.ndarray:
    """(S, n, n) float32 HU: the very noise that every arm of run_experiments.py sees in these slices."""
    run = DOSE_MODELS[noise.dose_model].simulate
    flux, parts = series.flux[noise.dose_model], []
    for start in range(0, len(series.image), SLICES_AT_ONCE):
        some = range(start, min(start + SLICES_AT_ONCE, len(series.image)))
        seeds = [
            evaluation_seed(noise.seed, series.uid, index, noise.dose_model, noise.dose) for index in some
        ]
        hu = to_tensor(series.image[some.start : some.stop])
        parts.append(run(hu, [noise.dose] * len(some), seeds, series.spacing_mm[1], flux)[:, 0].numpy())
    return np.concatenate(parts)


# Of cache_resource, so that sessions share one copy; nobody may write into it. 40 x 512 x 512: 42 MB each
@st.cache_resource(show_spinner="Simulating the dose ...", max_entries=4)
def low_dose(source: Source, noise: Noise) -> np.ndarray:
    """(S, n, n) float32 HU."""
    return simulate(source.series, noise)


@st.cache_resource(show_spinner="Denoising ...", max_entries=4)
def denoised(source: Source, noise: Noise, denoiser: Stamp, device: str) -> np.ndarray:
    """(S, n, n) float32 HU."""
    level = noise_level(noise.dose_model, noise.dose, source.series.noise_hu)
    return denoise(load_network("denoiser", denoiser, device)[0], low_dose(source, noise), level)


def seen(source: Source, noise: Noise, denoiser: Stamp | None, device: str) -> np.ndarray:
    """(S, n, n) HU as a network sees them: low dose, or denoised where a denoiser stands before it."""
    return low_dose(source, noise) if denoiser is None else denoised(source, noise, denoiser, device)


@st.cache_data(show_spinner="Reading the scan ...", max_entries=500)  # a few numbers a slice
def reading(
    source: Source, noise: Noise, classifier: Stamp, denoiser: Stamp | None, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities of slices (S, classes), of the scan (1, classes)), behind the denoiser if any."""
    network = load_network("classifier", classifier, device)[0]
    return tuple(read(network, seen(source, noise, denoiser, device)))


@st.cache_resource(show_spinner="Explaining ...", max_entries=4)
def heat(
    source: Source, noise: Noise, classifier: Stamp, denoiser: Stamp | None, of_class: str, device: str
) -> np.ndarray:
    """Grad-CAM, (S, n, n) float32 nats."""
    network, facts = load_network("classifier", classifier, device)
    model = ScanClassifier(Path(classifier.path), network, facts)
    return generate_gradcam(model, seen(source, noise, denoiser, device), of_class)


@st.cache_resource(show_spinner="Outlining lesions ...", max_entries=4)
def outlined(
    source: Source, noise: Noise, segmenter: Stamp, denoiser: Stamp | None, device: str
) -> np.ndarray:
    """(S, n, n) uint8 lesion classes of the segmenter, at the threshold of its checkpoint."""
    network, facts = load_network("segmenter", segmenter, device)
    images, spacing_mm = seen(source, noise, denoiser, device), source.series.spacing_mm
    return outline_lesions(network, facts["thresholds"]["lesion"], images, spacing_mm)


@st.cache_data(show_spinner=False, max_entries=100)
def errors_hu(
    source: Source, noise: Noise, denoiser: Stamp | None, mask: str, device: str
) -> tuple[np.ndarray, dict[str, float]]:
    """(RMSE of each slice (S,) in HU, image quality of the scan), inside a mask of anatomy.MASKS."""
    series, inside = source.series, load_inside(source.file, source.size, mask)
    images = seen(source, noise, denoiser, device)
    slices = [metrics.rmse_hu(*triple) for triple in zip(images, series.reference, inside, strict=True)]
    scan = metrics.image_quality(images, series.reference, inside, np.zeros(len(images)))
    return np.array(slices), scan


class Texture(NamedTuple):
    """The noise of a scan inside its brain, against what its image quality is scored against."""

    sd_hu: float
    spectrum: Spectrum


@st.cache_data(show_spinner=False, max_entries=100)
def texture(source: Source, noise: Noise, denoiser: Stamp | None, device: str) -> Texture:
    series, inside = source.series, load_inside(source.file, source.size, BRAIN)
    images, pixel_mm = seen(source, noise, denoiser, device), series.spacing_mm[1]
    flat = flat_tissue(series.reference, inside, pixel_mm)
    sd = noise_sd(images, series.reference, flat, pixel_mm)
    return Texture(sd, noise_power_spectrum(images - series.reference, inside, pixel_mm))


class Checkpoint(NamedTuple):
    """A checkpoint that opened."""

    file: Stamp
    facts: dict

    @property
    def name(self) -> str:
        return Path(self.file.path).name


class Arm(NamedTuple):
    """One pipeline with its checkpoints."""

    name: str  # key of LEGEND
    classifier: Checkpoint
    denoiser: Stamp | None


def families(arms: Sequence[Arm]) -> dict[str, list[int]]:
    """Arms of networks that differ by their training seed alone: label -> their places."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, arm in enumerate(arms):
        found.setdefault((arm.name, family_name(Path(arm.classifier.name))), []).append(place)
    return dict(zip(arm_labels(*zip(*found, strict=True)) if found else [], found.values(), strict=True))


def denoiser_for(reader: Checkpoint, denoiser: Checkpoint | None) -> Stamp | None:
    """The denoiser behind which a segmenter was trained, if that is the one that is there."""
    if reader.facts["input"] != "denoised" or denoiser is None:
        return None
    return denoiser.file if fits_denoiser(reader.facts, denoiser.file.path) else None


def arms_of(denoiser: Checkpoint | None, classifiers: Sequence[Checkpoint]) -> list[Arm]:
    """What run_experiments.py would measure with these checkpoints, in the order of LEGEND."""
    arms = []
    for classifier in classifiers:
        direct, through = PIPELINES[classifier.facts["input"]]
        if direct:
            arms.append(Arm(direct, classifier, None))
        if through and denoiser is not None and fits_denoiser(classifier.facts, denoiser.file.path):
            arms.append(Arm(through, classifier, denoiser.file))
    return sorted(arms, key=lambda arm: list(LEGEND).index(arm.name))


class Study(NamedTuple):
    """What the results were made with, so that the app shows the very same images."""

    noise_seed: int = NOISE_SEED
    mask: str = anatomy.DEFAULT_MASK
    dose_model: str | None = None
    fault: str | None = None  # why the results could not be read


def study_of(folders: Folders) -> Study:
    """Of the results, or the study's defaults where there are none."""
    path = folders.results / "experiments.json"
    if not path.exists():
        return Study()
    try:
        first = load_results(stamp(path))[1].iloc[0]
    except stage.StageError as error:
        return Study(fault=f"{error}; noise seed {NOISE_SEED} is used")
    mask = first.get("mask") if first.get("mask") in anatomy.MASKS else anatomy.DEFAULT_MASK
    return Study(int(first["noise_seed"]), mask, str(first["dose_model"]))


class Checkpoints(NamedTuple):
    """What run_experiments.py would use. missing: commands that train what is not there. faults: lines."""

    denoisers: list[Checkpoint]  # the default one first
    classifiers: list[Checkpoint]
    segmenters: list[Checkpoint]
    missing: list[str]
    faults: list[str]
    warnings: list[str]

    @property
    def found(self) -> list[Checkpoint]:
        return [*self.denoisers, *self.classifiers, *self.segmenters]

    @property
    def size(self) -> int | None:
        return self.found[0].facts["size"] if self.found else None


def find_checkpoints(folders: Folders, device: str) -> Checkpoints:
    """Open them; what is missing, damaged or unfit is said in a line each."""
    missing, faults, usable = [], [], []
    for kind in ("denoiser", "classifier", "segmenter"):
        own = checkpoints.finished(folders.models, kind)
        own.sort(key=lambda path: path.stem != kind)  # the one with the default name is the default
        if not own and kind != "segmenter":
            missing.append(
                f"python train_{kind}.py --data {quoted(folders.data)} --out {quoted(folders.models)}"
            )
        for path in own:
            try:
                file = stamp(path)
                one = Checkpoint(file, fit_facts(path, kind, load_network(kind, file, device)[1]))
            except stage.StageError as error:
                faults.append(str(error))
                continue
            if usable and one.facts["size"] != usable[0].facts["size"]:
                faults.append(
                    f"{path}: size {one.facts['size']}, but {usable[0].name} has {usable[0].facts['size']}; "
                    "left out (train them alike)"
                )
                continue
            usable.append(one)

    def of(kind: str) -> list[Checkpoint]:
        return [one for one in usable if one.facts["stage"] == kind]

    kinds = [of(kind) for kind in ("denoiser", "classifier", "segmenter")]
    return Checkpoints(*kinds, missing, faults, _split_warnings(folders, usable))


def _split_warnings(folders: Folders, found: Sequence[Checkpoint]) -> list[str]:
    """A checkpoint of another split may have been trained on the very patient that is shown."""
    try:
        split_hash = read_splits(folders.data)["hash"]
    except (stage.StageError, KeyError, TypeError):
        return []  # nothing is split yet: there is nothing to compare with
    others = [checkpoint.name for checkpoint in found if checkpoint.facts["split_hash"] != split_hash]
    if not others:
        return []
    return [
        f"{', '.join(others)}: trained on another split than {folders.data}/splits.json; patients shown here "
        "as test may have been in training."
    ]


def fit_facts(path: Path, kind: str, facts: dict) -> dict:
    """The facts of a checkpoint if all that the app needs is there. Raises InputError."""
    needed = {"stage", "size", "dose_model", "doses", "split_hash"}
    try:
        if kind == "segmenter":
            needed |= {"input", "classes", "parents", "thresholds"}
            if "value" not in facts["thresholds"]["lesion"]:
                raise KeyError("threshold of lesions")
        if kind == "classifier":
            needed |= {"input", "task", "classes", "assume_absent", "thresholds", "parents"}
            task_targets(facts["task"], [], facts["assume_absent"])
            if facts["input"] not in PIPELINES:
                raise KeyError(f"input {facts['input']}")
            needed |= {f"threshold per {name}" for name in LEVELS if "value" not in facts["thresholds"][name]}
        if missing := sorted(needed - set(facts)):
            raise KeyError(", ".join(missing))
    except (KeyError, TypeError) as error:
        raise malformed(path, error, "train again") from None
    return facts
