"""A checkpoint applied to HU volumes: what the study, predict.py and the app share.

As a library:

    model = load_model("saved_models/classifier.pt")
    scan = preprocess_scan("/data/one_patient")
    found = model.predict(scan)
    heat = generate_gradcam(model, scan, "stroke")"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import checkpoints
import metrics
import stage
from batches import neighbours
from dataset import TASKS, fit_to_square, is_exclusive
from explain import grad_cam, scan_grad_cam
from scans import READERS, read_scan
from sequences import SequenceModel
from tiling import tiled
from volumes import AIR_HU, Scan

# Pipelines by what a classifier was trained on: (on the low dose itself, after the denoiser)
PIPELINES = {"clean": ("1", "2"), "noisy": ("1n", None), "denoised": (None, "2d"), "joint": ("2j", None)}
LEGEND = {
    "1": "low dose -> classifier trained on clean slices",
    "1n": "low dose -> classifier trained on noisy slices",
    "2": "low dose -> denoiser -> classifier trained on clean slices",
    "2d": "low dose -> denoiser -> classifier trained on denoised slices",
    "2j": "low dose -> denoiser and classifier trained together",
}
# GPU: 16 slices of 256 x 256, a few hundred MB of activations in the U-Net. CPU: activations that stay in its
# caches; a NAFNet denoises three times as fast as with the GPU's
PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**20}


ROUTINE_NOISE_HU = 4.0  # of a scan in which none could be measured


@dataclass(frozen=True, eq=False)
class Network:
    """A denoiser, classifier or segmenter, and what its checkpoint says."""

    path: Path
    network: nn.Module
    facts: dict


def _batches(volume: np.ndarray, device: torch.device, tile: int | None = None) -> range:
    rows, columns = volume.shape[1:]
    pixels = rows * columns if tile is None else min(tile, rows) * min(tile, columns)
    return range(0, len(volume), max(1, PIXELS_AT_ONCE[device.type] // pixels))


@torch.inference_mode()
def denoise(
    model: nn.Module,
    volume: np.ndarray,
    sigma_hu: float | np.ndarray,
    series_of: np.ndarray | None = None,
    tile: int | None = None,
) -> np.ndarray:
    """Denoise slices. volume: (S, H, W) HU. Returns (S, H, W) float32 HU.

    sigma_hu: noise SD, of all or of each, for networks that know the dose. series_of: (S,) ascending, which
    slices belong together, for networks that see neighbours; None: all. tile: side in pixels of the tiles,
    where memory is short, see tiling.tiled; None: whole slices."""
    device = next(model.parameters(), torch.empty(0)).device  # the classical methods have none
    levels = torch.from_numpy(np.broadcast_to(np.asarray(sigma_hu, np.float32), len(volume)).copy()).to(
        device
    )
    around = neighbours(np.zeros(len(volume), int) if series_of is None else series_of, model.slices)
    out = np.empty(volume.shape, np.float32)
    apply = model if tile is None else functools.partial(tiled, model, tile=tile)
    starts = _batches(volume, device, tile)
    for start in starts:
        some = slice(start, start + starts.step)
        batch = torch.from_numpy(volume[around[some]].astype(np.float32)).to(device)
        out[some] = apply(batch, levels[some])[:, 0].cpu().numpy()
    return out


class Probabilities(NamedTuple):
    """What a classifier says of each slice, (N, classes), and of each scan, (scans, classes); float64."""

    slices: np.ndarray
    scans: np.ndarray


@torch.inference_mode()
def read(
    model: nn.Module, volume: np.ndarray, series_of: np.ndarray | None = None, *, mirrored: bool = False
) -> Probabilities:
    """Classify slices and the scans that they make up. volume: (N, H, W) HU at the training size.

    series_of: (N,) ascending, which slices belong together; None: all. mirrored: the mean with that of the
    mirrored slices (test-time augmentation). A network for slices says of a scan what scan_probabilities
    makes of them."""
    if mirrored:
        both = (read(model, images, series_of) for images in (volume, volume[..., ::-1]))
        return Probabilities(*(np.mean(pair, axis=0) for pair in zip(*both, strict=True)))
    series_of = np.zeros(len(volume), int) if series_of is None else np.asarray(series_of)
    device, around = next(model.parameters()).device, neighbours(series_of, model.slices)

    def hu(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(volume[around[rows]], np.float32)).to(device)

    every, starts = np.arange(len(volume)), _batches(volume, device)
    if not isinstance(model, SequenceModel):
        logits = torch.cat([model(hu(every[start : start + starts.step])) for start in starts])
        slices = probabilities(logits, model.classes)
        return Probabilities(slices, scan_probabilities(slices, series_of, model.classes))
    found = []
    for number in np.unique(series_of):
        own = hu(every[series_of == number])
        there = torch.ones(1, len(own), dtype=torch.bool, device=device)
        found.append(model(own[None], there, slices_at_once=starts.step))
    logits = torch.cat([one.slices[0] for one in found]), torch.cat([one.scan for one in found])
    return Probabilities(*(probabilities(one, model.classes) for one in logits))


def probabilities(logits: torch.Tensor, classes: Sequence[str]) -> np.ndarray:
    """(N, classes) logits -> (N, classes) float64."""
    logits = logits.double()
    return (logits.softmax(1) if is_exclusive(classes) else logits.sigmoid()).cpu().numpy()


def logits_of(found: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, str]:
    """Probabilities (N, classes) as logits, finite ones, and their kind, of calibration.OUTPUTS."""
    clipped = found.clip(1e-7, 1 - 1e-7)
    if is_exclusive(classes):
        return np.log(clipped), "softmax"
    return np.log(clipped / (1 - clipped)), "binary"


def scan_probabilities(slices: np.ndarray, series_of: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Of a scan what the most suspicious slice says: (N, classes) -> (scans, classes).

    Of exclusive classes, the first of which is normal: as normal as the least normal slice, and the rest in
    proportion to the largest of each other class."""
    found = np.stack([metrics.scan_scores(column, series_of) for column in slices.T], axis=1)
    if is_exclusive(classes):
        normal = -metrics.scan_scores(-slices[:, 0], series_of)
        others = found[:, 1:]
        share = others / others.sum(1, keepdims=True).clip(1e-12)
        found = np.column_stack([normal, (1 - normal)[:, None] * share])
    return found


def classify(
    model: nn.Module, volume: np.ndarray, series_of: np.ndarray | None = None, *, mirrored: bool = False
) -> np.ndarray:
    """Probabilities of every slice, (N, classes); arguments as for read."""
    return read(model, volume, series_of, mirrored=mirrored).slices


@torch.inference_mode()
def lesion_probabilities(
    model: nn.Module, volume: np.ndarray, series_of: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Where a segmenter sees lesions, some slices at a time: their place, and (B, classes, H, W) float32.

    volume: (S, H, W) HU. series_of: as for denoise."""
    device = next(model.parameters()).device
    around = neighbours(np.zeros(len(volume), int) if series_of is None else series_of, model.slices)
    starts = _batches(volume, device)
    for start in starts:
        some = slice(start, min(start + starts.step, len(volume)))
        logits = model(torch.from_numpy(np.asarray(volume[around[some]], np.float32)).to(device))
        found = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]
        yield some, found.cpu().numpy()


def lesion_mask(found: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Probabilities (S, classes, H, W) -> (S, H, W) uint8: 0, or from the threshold on the likeliest class.

    threshold: of the probability that there is a lesion of any class. With one class a lesion is 1."""
    return np.where(found.sum(1) >= threshold, 1 + found.argmax(1), 0).astype(np.uint8)


def segment(
    model: nn.Module, volume: np.ndarray, series_of: np.ndarray | None = None, threshold: float = 0.5
) -> np.ndarray:
    """Outline lesions. volume: (S, H, W) HU. Returns (S, H, W) uint8, see lesion_mask.

    series_of: as for denoise. threshold: best the one in the checkpoint, facts["thresholds"]["lesion"]."""
    out = np.empty(volume.shape, np.uint8)
    for some, found in lesion_probabilities(model, volume, series_of):
        out[some] = lesion_mask(found, threshold)
    return out


def load_denoiser(path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A denoiser checkpoint as (network, facts). Raises InputError as checkpoints.load does."""
    return checkpoints.load_network(path, "denoiser", device)


def load_classifier(path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A classifier checkpoint as (network, facts). Raises InputError as checkpoints.load does."""
    return checkpoints.load_network(path, "classifier", device)


def load_segmenter(path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A segmenter checkpoint as (network, facts). Raises InputError as checkpoints.load does."""
    return checkpoints.load_network(path, "segmenter", device)


def check_patients(patients: Iterable[str], networks: Sequence[Network]) -> None:
    """Raise InputError if a network, or a parent of it, was trained on one of the test patients."""
    own = set(patients)
    for network in networks:
        known = own & set(network.facts["trained_on"])
        if known:
            raise stage.InputError(
                f"{network.path}: was trained on {len(known)} of the {len(own)} test patients, e.g. "
                f"{min(known)}; it belongs to another split (train again)"
            )


def fits_denoiser(facts: dict, denoiser_path) -> bool:
    """Whether a classifier may follow a denoiser; one trained on denoised slices only behind its own."""
    parent = facts["parents"].get("denoiser")
    return parent is None or parent["sha256"] == checkpoints.file_sha256(denoiser_path)


# ---------------------------------------------------------------- as a library


def preprocess_scan(path: str | Path) -> Scan:
    """The CT series in a folder of DICOM files, a zip of them, or a NIfTI file, in HU and in order.

    Raises InputError if there is none that can be used, or more than one."""
    path = Path(path)
    if not path.exists():
        raise stage.InputError(f"{path}: no such file or folder")
    source = "nifti" if path.name.lower().endswith((".nii", ".nii.gz")) else "dicom"
    jobs, rejected = READERS[source].discover(path)
    if len(jobs) != 1:
        reason = f" ({rejected[0].reason})" if rejected and not jobs else " (give one)" if jobs else ""
        raise stage.InputError(f"{path}: {len(jobs)} CT series{reason}")
    return read_scan(jobs[0])


class Prediction(NamedTuple):
    """What a classifier says of a scan. scan: class -> probability. slices: (S, classes) of each slice.

    positive: whether there is a lesion, at the threshold of the scan that validation chose; None: it chose
    none."""

    scan: dict[str, float]
    slices: np.ndarray
    positive: bool | None


@dataclass(frozen=True, eq=False)
class ScanClassifier(Network):
    """A classifier ready for whole scans, of slices or of sequences. denoiser: what it was trained behind."""

    denoiser: nn.Module | None = None

    def prepare(self, scan: Scan) -> np.ndarray:
        """The slices as the network is to see them: (S, size, size) HU, denoised if it was trained so."""
        images = fit_to_square(scan.hu, scan.spacing_mm, self.facts["size"], AIR_HU)
        if self.denoiser is not None:
            level = scan.noise_hu if np.isfinite(scan.noise_hu) else ROUTINE_NOISE_HU
            images = denoise(self.denoiser, images, level)
        return images

    def predict(self, scan: Scan, *, mirrored: bool = False) -> Prediction:
        """mirrored: with the mean over the mirrored slices, test-time augmentation."""
        found = read(self.network, self.prepare(scan), mirrored=mirrored)
        return _prediction(found, self.facts)


def _prediction(found: Probabilities, facts: dict) -> Prediction:
    threshold = facts["thresholds"]["scan"]["value"]
    score = float(TASKS[facts["task"]].positive(found.scans)[0])
    scan = dict(zip(facts["classes"], found.scans[0].tolist(), strict=True))
    return Prediction(scan, found.slices, None if threshold is None else score >= threshold)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> ScanClassifier:
    """A classifier checkpoint; behind a denoiser, that one from the same folder.

    Raises InputError as checkpoints.load does, or if the denoiser is another one by now."""
    path = Path(path)
    network, facts = load_classifier(path, device)
    denoiser = None
    if facts["input"] == "denoised":
        before = path.parent / facts["parents"]["denoiser"]["path"]
        denoiser, _ = load_denoiser(before, device)
        if not fits_denoiser(facts, before):
            raise stage.InputError(f"{path}: was trained behind another denoiser than {before} (train again)")
    return ScanClassifier(path, network, facts, denoiser)


class ICHEnsemble:
    """Several classifiers of the same classes, whose probabilities are averaged."""

    def __init__(self, models: Sequence[ScanClassifier]):
        self.models = list(models)
        if not self.models:
            raise stage.InputError("an ensemble needs a checkpoint at least")
        for model in self.models[1:]:
            if model.facts["classes"] != self.models[0].facts["classes"]:
                raise stage.InputError(
                    f"{model.path}: its classes are {', '.join(model.facts['classes'])}, those of "
                    f"{self.models[0].path} {', '.join(self.models[0].facts['classes'])}"
                )

    @classmethod
    def load_from_checkpoint(
        cls, paths: Iterable[str | Path], device: torch.device | str = "cpu"
    ) -> ICHEnsemble:
        """Raises InputError as load_model does, or if their classes differ."""
        return cls([load_model(path, device) for path in paths])

    def predict(self, scan: Scan, *, mirrored: bool = False) -> Prediction:
        """positive: as most of them say, None in a tie."""
        found = [model.predict(scan, mirrored=mirrored) for model in self.models]
        votes = sum((one.positive is True) - (one.positive is False) for one in found)
        return Prediction(
            {name: float(np.mean([one.scan[name] for one in found])) for name in found[0].scan},
            np.mean([one.slices for one in found], axis=0),
            None if votes == 0 else votes > 0,
        )


def generate_gradcam(model: ScanClassifier, image: Scan | np.ndarray, target_class: str | int) -> np.ndarray:
    """Where a classifier sees a class, in logits, at its own matrix (size x size).

    image: a scan, or slices (S, H, W) or (H, W) HU that are square already. Returns (S, size, size), or
    (size, size) for one slice. Through a network of scans it is what the whole scan owes to each slice."""
    single = isinstance(image, np.ndarray) and image.ndim == 2
    if isinstance(image, np.ndarray):
        volume = image[None] if single else image
        images = fit_to_square(volume, (1.0, 1.0, 1.0), model.facts["size"], AIR_HU)
        if model.denoiser is not None:
            images = denoise(model.denoiser, images, ROUTINE_NOISE_HU)
    else:
        images = model.prepare(image)
    around = neighbours(np.zeros(len(images), int), model.network.slices)
    hu = torch.from_numpy(np.asarray(images[around], np.float32))
    explain_it = scan_grad_cam if isinstance(model.network, SequenceModel) else grad_cam
    heat = explain_it(model.network, hu, target_class)
    return heat[0] if single else heat
