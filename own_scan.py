"""A new scan from its files to what networks say of it, and back to files; nothing of it stays on disk."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

import anatomy
import checkpoints
import metrics
import stage
from dataset import BRAIN_WINDOW, TASKS, fit_to_square, from_square, square_pixel_mm
from dicom_output import Software, write_derived_series, write_segmentation
from dicom_series import read_pixels
from inference import (
    ROUTINE_NOISE_HU,
    Network,
    Probabilities,
    ScanClassifier,
    denoise,
    generate_gradcam,
    read,
)
from lesion_reading import LesionReading, call_scan, read_lesions
from low_dose import evaluation_seed, noise_level, simulate_scan
from nifti_series import stored_axes
from scans import READERS, discover, read_scan
from sheets import contact_sheet
from volumes import AIR_HU, ASSUMED_WINDOW, Job, Rejected, Scan, ScanError, write_nifti

PICTURES, ARRAYS = (".png", ".jpg", ".jpeg"), (".npz",)
SUFFIXES = (".nii.gz", ".nii", ".zip", ".dcm", ".ima", *PICTURES, *ARRAYS)
SLICES_AT_ONCE = 8  # between two looks at the progress bar
SAMPLES = {"Haemorrhage": 6, "Infarct": 12, "Normal": 2}  # synthetic heads: the patient of phantom.py
SAMPLE_SIZE, SAMPLE_SLICES = 192, 20

Progress = Callable[[float, str], None]


# ---------------------------------------------------------------- from files


class Opened(NamedTuple):
    """A scan and what else is known. series: how many there were. axes: of a NIfTI file. notes: in words."""

    scan: Scan
    series: int = 1
    axes: str | None = None
    dicom: bool = False
    notes: Sequence[str] = ()


@contextlib.contextmanager
def uploaded(files: Sequence[tuple[str, bytes]]) -> Iterator[Path]:
    """A folder that holds files (name, content) for as long as it is needed.

    Names are taken for their order and ending alone. Errors name the files as they came."""
    with tempfile.TemporaryDirectory(prefix="own-scan-") as folder:
        root, names = Path(folder), {}
        for number, (name, content) in enumerate(sorted(files)):
            ending = next((one for one in SUFFIXES if name.lower().endswith(one)), "")
            path = (
                root / f"{number:05d}" / "image.npz" if ending in ARRAYS else root / f"{number:05d}{ending}"
            )
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            names[str(path)] = PurePosixPath(name).name
        try:
            yield root
        except (ScanError, stage.StageError) as error:
            text = str(error)
            for path, name in names.items():
                text = text.replace(path, name)
            raise stage.InputError(text.replace(str(root), "the uploaded files")) from None


def find(path: Path) -> tuple[list[Job], list[Rejected]]:
    """The scans in a file or folder: DICOM, zip, NIfTI, arrays or pictures. Raises ScanError."""
    files = [path] if path.is_file() else [entry for entry in sorted(path.iterdir()) if entry.is_file()]
    if path.is_dir() and len(files) == 1 and files[0].suffix.lower() == ".zip":
        path = files[0]  # a folder of zips is no folder of scans
    found = discover(path)
    for name in ("npz", "png"):
        if not found[0] and path.is_dir():
            other = READERS[name].discover(path)
            found = other if other[0] else found
    return found


def open_scan(path: Path, number: int = 0) -> Opened:
    """One of the scans in a file or folder. Raises InputError if there is none, ScanError for a bad one."""
    jobs, rejected = find(path)
    if not jobs:
        reason = f": {rejected[0].reason}" if rejected else ""
        raise stage.InputError(
            f"{path}: no CT series{reason} (give DICOM, a zip of it, NIfTI, NPZ or PNG of a head)"
        )
    job = jobs[min(number, len(jobs) - 1)]
    scan, notes = read_scan(job._replace(assume_window=BRAIN_WINDOW)), []
    repairs = {text for slice_ in scan.repairs for text in slice_}
    if ASSUMED_WINDOW in repairs:
        center, width = BRAIN_WINDOW
        notes.append(
            f"Grey levels of a picture were taken as the window {center:g} / {width:g} HU: what was darker "
            "or brighter is lost, and the networks have not seen such images."
        )
    if repairs - {ASSUMED_WINDOW}:
        notes.append("Repaired or assumed: " + "; ".join(sorted(repairs - {ASSUMED_WINDOW})))
    axes = stored_axes(job.inputs.image) if job.source == "nifti" else None
    return Opened(scan, len(jobs), axes, job.source == "dicom", notes)


def sample_scan(kind: str) -> Opened:
    """A synthetic head. kind: of SAMPLES."""
    number = SAMPLES[kind]
    jobs, _ = READERS["phantom"].discover(number + 1, size=SAMPLE_SIZE, slices=SAMPLE_SLICES)
    return Opened(read_scan(jobs[number]))


# ---------------------------------------------------------------- what networks say


class Dose(NamedTuple):
    """A dose to simulate, and the seed of its noise."""

    model: str
    value: float
    seed: int


class Request(NamedTuple):
    """What is to be done with a scan. All parts may be left out.

    denoiser: also stands before the classifier where through is set. dose: simulated first.
    of_class: of a Grad-CAM."""

    denoiser: Network | None = None
    classifier: Network | None = None
    through: bool = False
    segmenter: Network | None = None
    always: bool = False
    dose: Dose | None = None
    of_class: str | None = None
    threshold: float | None = None  # of the scan; None: that of the classifier's checkpoint
    tile: int | None = None  # see inference.denoise

    @property
    def networks(self) -> list[Network]:
        return [one for one in (self.denoiser, self.classifier, self.segmenter) if one is not None]


class Outcome(NamedTuple):
    """given, denoised, heat: (S, H, W) on the pixels of the scan. facts: JSON types."""

    given: np.ndarray
    denoised: np.ndarray | None
    found: Probabilities | None
    heat: np.ndarray | None
    lesions: LesionReading | None
    facts: dict[str, Any]


def _told_to_nobody(*_: object) -> None:
    pass


def work(
    scan: Scan,
    request: Request,
    reference: Scan | None = None,
    progress: Progress = _told_to_nobody,
    known: Outcome | None = None,
) -> Outcome:
    """Denoise, classify, explain and segment a scan. reference: of the same shape, for image quality.

    progress: told the share that is done and what comes next. known: of the same scan, dose and denoiser,
    whose images are taken over. Raises InputError for a reference of another shape."""
    if reference is not None and reference.hu.shape != scan.hu.shape:
        raise stage.InputError(
            f"reference: its shape {reference.hu.shape} is not that of the scan, {scan.hu.shape} "
            "(give the same slices at another dose)"
        )
    given, level = scan.hu, scan.noise_hu if math.isfinite(scan.noise_hu) else ROUTINE_NOISE_HU
    if request.dose is not None:
        progress(0.05, "Simulating the dose")
        if known is None:
            given = _simulated(scan, scan.hu, scan.spacing_mm, request.dose)
        level = noise_level(request.dose[0], request.dose[1], scan.noise_hu)
        reference = scan if reference is None else reference
    denoised = None
    if known is not None:
        given, denoised = known.given, known.denoised
    elif request.denoiser is not None:
        denoised = _in_parts(request, given, level, lambda share: progress(0.1 + 0.6 * share, "Denoising"))
        denoised[scan.hu == AIR_HU] = AIR_HU  # what was never measured stays so

    def as_learnt(network: Network, through: bool) -> np.ndarray:
        """(S, size, size) HU as a network is to see the scan, denoised first where through is set."""
        size = network.facts["size"]
        small = fit_to_square(scan.hu, scan.spacing_mm, size, AIR_HU)
        if request.dose is not None:  # at the network's own matrix: resampling would average noise away
            pixel_mm = square_pixel_mm(scan.hu.shape[1:], scan.spacing_mm, size)
            small = _simulated(scan, small, (scan.spacing_mm[0], pixel_mm, pixel_mm), request.dose)
        if through and request.denoiser is not None:
            small = denoise(request.denoiser.network, small, level)
        return small

    found = heat = lesions = None
    facts: dict[str, Any] = {
        "series_uid": scan.series_uid,
        "spacing_mm": scan.spacing_mm,
        "gantry_tilt_deg": scan.gantry_tilt_deg,
        "noise_hu": scan.noise_hu,
        "dose": None if request.dose is None else request.dose._asdict(),
        "models": {one.path.name: one.facts["stage"] for one in request.networks},
        "lesions": None,
        "note": "research use only; not a medical device",
    }
    if request.classifier is not None:
        progress(0.72, "Classifying")
        images = as_learnt(request.classifier, request.through)
        found = read(request.classifier.network, images)
        facts |= _said(scan, request, found)
        if request.of_class is not None:
            progress(0.8, "Explaining")
            model = ScanClassifier(*_parts(request.classifier))
            small = generate_gradcam(model, images, request.of_class)
            heat = from_square(small, scan.hu.shape[1:], scan.spacing_mm)
    if request.segmenter is not None and request.classifier is not None:
        progress(0.9, "Outlining lesions")
        called = call_scan(found, _with_threshold(request))
        behind = request.segmenter.facts["input"] == "denoised"
        lesions = read_lesions(
            scan,
            called,
            request.segmenter,
            lambda: as_learnt(request.segmenter, behind),
            always=request.always,
        )
        facts["lesions"] = lesions.facts
    if reference is not None:
        progress(0.97, "Comparing")
        facts["quality"] = compare(reference, given, denoised)
    progress(1.0, "Done")
    return Outcome(given, denoised, found, heat, lesions, facts)


def _parts(network: Network) -> tuple:
    return network.path, network.network, network.facts


def _with_threshold(request: Request) -> dict:
    """The facts of the classifier with the threshold that was asked for."""
    facts = request.classifier.facts
    if request.threshold is None:
        return facts
    asked = {"value": request.threshold, "origin": "chosen by hand"}
    return facts | {"thresholds": facts["thresholds"] | {"scan": asked}}


def _said(scan: Scan, request: Request, found: Probabilities) -> dict[str, Any]:
    facts = _with_threshold(request)
    task, of_slice = TASKS[facts["task"]], facts["thresholds"]["slice"]
    score = float(task.positive(found.scans)[0])
    return {
        "task": facts["task"],
        "class": task.finding,
        "scan": {
            "probability": score,
            "positive": _call(score, facts["thresholds"]["scan"]),
            "classes": dict(zip(facts["classes"], found.scans[0].tolist(), strict=True)),
        },
        "thresholds": facts["thresholds"],
        "slices": [
            {
                "index": index,
                "position_mm": scan.positions_mm[index],
                "probability": float(value),
                "positive": _call(float(value), of_slice),
                "classes": dict(zip(facts["classes"], found.slices[index].tolist(), strict=True)),
                "repairs": scan.repairs[index],
            }
            for index, value in enumerate(task.positive(found.slices))
        ],
    }


def _call(score: float, threshold: dict) -> bool | None:
    """Positive or not; None where validation held one class only and no threshold could be chosen."""
    return None if threshold["value"] is None else score >= threshold["value"]


def _simulated(scan: Scan, volume: np.ndarray, spacing_mm: Sequence[float], dose: Dose) -> np.ndarray:
    """A scan's slices, resampled or not, at a dose, with the noise of the study. Returns float32 HU."""
    model, value, seed = dose
    seeds = [evaluation_seed(seed, scan.series_uid, index, model, value) for index in range(len(volume))]
    own_mm = math.sqrt(scan.spacing_mm[1] * scan.spacing_mm[2])
    return simulate_scan(
        volume,
        model,
        [value] * len(seeds),
        seeds,
        spacing_mm=spacing_mm,
        noise_hu=scan.noise_hu,
        own_pixel_mm=own_mm,
    )


def _in_parts(
    request: Request, volume: np.ndarray, level: float, progress: Callable[[float], None]
) -> np.ndarray:
    """inference.denoise, some slices at a time, each part with the neighbours that the network looks at."""
    network = request.denoiser.network
    reach, count = network.slices // 2, len(volume)
    out = np.empty(volume.shape, np.float32)
    for start in range(0, count, SLICES_AT_ONCE):
        progress(start / count)
        stop = min(start + SLICES_AT_ONCE, count)
        low, high = max(0, start - reach), min(count, stop + reach)
        part = denoise(network, volume[low:high], level, tile=request.tile)
        out[start:stop] = part[start - low : stop - low]
    return out


def compare(reference: Scan, given: np.ndarray, denoised: np.ndarray | None) -> dict[str, Any]:
    """Image quality of the given and the denoised images inside the brain of the reference, as JSON types."""
    inside = anatomy.MASKS[anatomy.DEFAULT_MASK](reference.hu, reference.spacing_mm)
    one = np.zeros(len(given))
    images = {"given": given} | ({} if denoised is None else {"denoised": denoised})
    found = {
        name: metrics.image_quality(volume, reference.hu, inside, one) for name, volume in images.items()
    }
    return {"mask": anatomy.DEFAULT_MASK, **found}


# ---------------------------------------------------------------- to files


def nifti_bytes(volume: np.ndarray, opened: Opened) -> bytes:
    """A volume (S, H, W) on the pixels of the scan as .nii.gz; HU become int16."""
    if volume.dtype.kind == "f":
        volume = volume.round().clip(-32768, 32767).astype(np.int16)
    scan = opened.scan
    return _written(
        "volume.nii.gz",
        lambda path: write_nifti(path, volume, scan.affine, scan.positions_mm, opened.axes),
    )


def sheet_bytes(opened: Opened, outcome: Outcome) -> bytes:
    """All slices on one PNG, given above denoised, with the probability of each."""
    slices = outcome.facts.get("slices")
    scores = [one["probability"] for one in slices] if slices else [math.nan] * len(outcome.given)
    below = outcome.given if outcome.denoised is None else outcome.denoised
    finding = outcome.facts.get("class", "")
    return _written(
        "sheet.png",
        lambda path: contact_sheet(path, opened.scan, outcome.given, below, finding, scores),
    )


def json_bytes(outcome: Outcome) -> bytes:
    return json.dumps(stage.plain(outcome.facts), indent=1, allow_nan=False).encode()


def dicom_files(path: Path, number: int) -> list[str]:
    """The files of the slices of a DICOM series in a folder or zip, in the order of its scan."""
    jobs, _ = find(path)
    job = jobs[min(number, len(jobs) - 1)]
    return [copies[0] for copies in read_pixels(job.inputs, assume_hu=job.assume_hu).files]


def segmentation_bytes(files: Sequence[str], mask: np.ndarray, segmenter: Network) -> bytes:
    """A mask as DICOM SEG of the slices in files. Raises InputError if their headers allow none."""
    names = dict(enumerate(segmenter.facts["classes"], start=1))
    return _written(
        "lesions.dcm", lambda path: write_segmentation(path, files, mask, names, _software(segmenter))
    )


def derived_bytes(files: Sequence[str], denoised: np.ndarray, denoiser: Network) -> bytes:
    """Denoised slices as a DICOM series of the same study, in a zip. Raises InputError as its writer does."""

    def write(path: Path) -> None:
        made = write_derived_series(path.with_suffix(""), files, denoised, _software(denoiser))
        with zipfile.ZipFile(path, "w") as archive:
            for file in made:
                archive.write(file, file.name)

    return _written("denoised.zip", write)


def _software(network: Network) -> Software:
    return Software(network.path.name, checkpoints.file_sha256(network.path)[:12])


def _written(name: str, write: Callable[[Path], object]) -> bytes:
    """What a writer of files writes."""
    with tempfile.TemporaryDirectory(prefix="own-scan-") as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()
