"""The grid of a study, cell by cell on disk: what one network said of one set of images.

A cell is a JSON file below results/cells/, named by a hash of all that decides its values: the packed data,
the images (dose model, dose, noise seed, artifact, denoiser), the reader and the code's CELL_FORMAT. So a
killed study goes on where it stopped, and one more arm costs its own cells alone."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import anatomy
import checkpoints
import detectability
import lesions
import metrics
import stage
from arms import is_classical
from artifacts import ARTIFACTS, scan_seed
from batches import to_tensor
from dataset import Pack
from inference import Network, denoise, read
from lesion_reading import outline_lesions
from low_dose import LowDose

CELL_FORMAT = 1  # one more whenever the same inputs give other values
OBSERVED_SLICES = 2  # of a scan, in which an observer looks for signals


class Condition(NamedTuple):
    """How the images of a cell were made. artifact, severity: of a stress test, None without one."""

    dose_model: str
    dose: float
    noise_seed: int
    artifact: str | None = None
    severity: float | None = None

    @property
    def title(self) -> str:
        stress = "" if self.artifact is None else f", {self.artifact} {self.severity:.3g}"
        return f"{self.dose_model} {self.dose:g}, noise seed {self.noise_seed}{stress}"


class Cell(NamedTuple):
    """kind: of READINGS. reader: the classifier or segmenter, else None. patients: how many of the test
    patients it is about, None: all."""

    condition: Condition
    denoiser: Network | None
    kind: str
    reader: Network | None = None
    patients: int | None = None


class Seen(NamedTuple):
    """What is shown to a reader: some rows of the pack, (N,), as low dose and behind the denoiser.

    images, noisy: (N, H, W) float32 HU, the same where there is no denoiser. levels: (N,) noise SD in HU."""

    rows: np.ndarray
    images: np.ndarray
    noisy: np.ndarray
    levels: np.ndarray


class Cells:
    """The cells of one pack. mask: of anatomy.MASKS, where metrics.IMAGE_METRICS are measured; what is asked
    of lesions, edges, texture and signals is asked of the brain, whatever the mask."""

    def __init__(self, folder: Path, pack: Pack, mask: str, seed: int):
        self.folder, self.pack, self.mask, self.seed = Path(folder), pack, mask, seed
        self.reference = pack.image if pack.truth is None else pack.truth
        self.identity = functools.cache(_identity)  # files are hashed once

    # ------------------------------------------------------------ what there is

    def path(self, cell: Cell) -> Path:
        condition = cell.condition
        decides = [
            *(CELL_FORMAT, self.pack.key, condition, self.identity(cell.denoiser)),
            *(self.identity(cell.reader), cell.kind, cell.patients, self.seed),
            *([self.mask] if cell.kind == "quality" else []),
        ]
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
        return self.folder / cell.kind / f"{digest}.json"

    def done(self, cell: Cell) -> bool:
        return self.path(cell).exists()

    def load(self, cell: Cell) -> dict[str, Any]:
        """Raises InputError if it is missing or damaged."""
        return stage.read_json(self.path(cell), "delete it and run run_experiments.py again")

    def rows(self, patients: int | None) -> np.ndarray:
        """Rows of the pack of so many test patients, drawn by the seed; None: all."""
        ids = self.pack.patient_ids()
        names = np.unique(ids)
        if patients is None or patients >= len(names):
            return np.arange(len(ids))
        drawn = np.random.default_rng(self.seed).permutation(names)[:patients]
        return np.flatnonzero(np.isin(ids, drawn))

    @functools.cached_property
    def inside(self) -> np.ndarray:
        """(N, H, W) bool, where metrics.IMAGE_METRICS are measured."""
        return self.pack.masks(anatomy.MASKS[self.mask])

    @functools.cached_property
    def brain(self) -> np.ndarray:
        """(N, H, W) bool."""
        return self.inside if self.mask == "brain" else self.pack.masks(anatomy.brain_mask)

    @functools.cached_property
    def tissues(self) -> np.ndarray:
        """(N, H, W) of anatomy.TISSUES."""
        return self.pack.masks(anatomy.tissue_classes)

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where an observer is to find signals in some rows: which of the rows (M,), and (M, 3) places.

        OBSERVED_SLICES of each scan are observed, those with most brain."""
        area = self.brain[rows].sum((1, 2))
        series_of = self.pack.series_of[rows]
        chosen = []
        for number in np.unique(series_of):
            own = np.flatnonzero(series_of == number)
            chosen.extend(own[np.argsort(-area[own], kind="stable")[:OBSERVED_SLICES]])
        chosen = np.sort(chosen)
        some = rows[chosen]
        lesions_there = None if self.pack.mask is None else np.asarray(self.pack.mask[some])
        pixel_mm = float(self.pack.pixel_mm[some].mean())
        found = detectability.signal_places(self.brain[some], self.tissues[some], lesions_there, pixel_mm)
        return chosen, found

    # ------------------------------------------------------------ what is to be done

    def fill(self, cells: Sequence[Cell]) -> None:
        """Work out what is missing. Of several processes each takes the images that no other has taken.

        Some cells may then be another process's, and not yet there."""
        shared: dict[tuple, list[Cell]] = {}  # those that begin with the same low dose
        for cell in cells:
            shared.setdefault((cell.condition, cell.patients), []).append(cell)
        missing = sum(not self.done(cell) for cell in cells)
        with stage.progress([], desc="cells", total=missing, unit="cell") as bar:
            # what takes longest first, so that all end together: all patients, and low doses
            units = sorted(reversed(shared.items()), key=lambda unit: unit[0][1] or 0)
            for (condition, patients), own in units:
                lock = self.folder / "taken" / f"{self.path(own[0]).stem}.lock"
                with contextlib.suppress(stage.LockedError), stage.lock(lock):
                    own = [cell for cell in own if not self.done(cell)]
                    if own:
                        bar.set_postfix_str(condition.title)
                        self._fill(condition, patients, own, bar)

    def _fill(self, condition: Condition, patients: int | None, cells: Sequence[Cell], bar: Any) -> None:
        """The cells of one low dose, denoiser by denoiser."""
        for path in map(self.path, cells):
            for stale in path.parent.glob(f".{path.name}.tmp.*"):  # of a run that was killed
                stale.unlink()
        rows = self.rows(patients)
        low, levels = self.images(condition, rows)
        behind: dict[str | None, list[Cell]] = {}
        for cell in cells:
            behind.setdefault(self.identity(cell.denoiser), []).append(cell)
        for own in behind.values():
            denoiser, images = own[0].denoiser, low
            if denoiser is not None:
                images = denoise(denoiser.network, low, levels, self.pack.series_of[rows])
            for cell in own:
                found = READINGS[cell.kind](self, cell, Seen(rows, images, low, levels))
                stage.write_json(self.path(cell), found)
                bar.update()

    def images(self, condition: Condition, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low dose of some rows, (N, H, W) float32 HU, and the noise SD that networks are told, (N,)."""
        source = LowDose(self.pack, condition.dose_model, [condition.dose])
        same = [condition.dose] * len(rows)
        noisy = source.evaluation(rows, same, condition.noise_seed)
        if condition.artifact is not None:
            noisy += self._artifact(condition, rows)
        return noisy, source.levels(rows, same)

    def _artifact(self, condition: Condition, rows: np.ndarray) -> np.ndarray:
        """What an artifact adds to the slices: a difference image, the same at every dose."""
        change = np.empty((len(rows), self.pack.size, self.pack.size), np.float32)
        spread = ARTIFACTS[condition.artifact]
        for number in np.unique(self.pack.series_of[rows]):
            places = np.flatnonzero(self.pack.series_of[rows] == number)
            seed = scan_seed(condition.noise_seed, self.pack.series[number]["series_uid"])
            own = rows[places]
            hu = to_tensor(self.pack.image[own])
            moved = spread(hu, condition.severity, [seed] * len(own), float(self.pack.pixel_mm[own[0]]))
            change[places] = (moved - hu)[:, 0].numpy()
        return change


def _identity(network: Network | None) -> str | None:
    """What tells a network from all others: the hash of its file, the name of a classical method."""
    if network is None:
        return None
    return str(network.path) if is_classical(network) else checkpoints.file_sha256(network.path)


# ---------------------------------------------------------------- what is read out of images


def _classified(cells: Cells, cell: Cell, seen: Seen) -> dict:
    """Probabilities of each slice and of each scan. Raises InputError for a network that says NaN."""
    found = read(cell.reader.network, seen.images, cells.pack.series_of[seen.rows])
    if np.isnan(found.slices).any() or np.isnan(found.scans).any():
        raise stage.InputError(f"{cell.reader.path}: says NaN of {cell.condition.title} (train it again)")
    return {"slices": found.slices.tolist(), "scans": found.scans.tolist()}


def _outlined(cells: Cells, cell: Cell, seen: Seen) -> dict:
    """lesions.case_report of each scan."""
    pack, rows, series_of = cells.pack, seen.rows, cells.pack.series_of[seen.rows]
    rule = cell.reader.facts["thresholds"]["lesion"]
    reports = []
    for number in np.unique(series_of):
        own = series_of == number
        spacing_mm = pack.spacing_mm(number)
        found = outline_lesions(cell.reader.network, rule, seen.images[own], spacing_mm)
        reports.append(lesions.case_report(np.asarray(pack.mask[rows[own]]), found, spacing_mm))
    return {"reports": reports}


def _measured(cells: Cells, _: Cell, seen: Seen) -> dict:
    """Image quality: the means of metrics.image_quality, the figures of each patient, the noise spectrum."""
    pack, rows, images = cells.pack, seen.rows, seen.images
    patients = pack.patient_ids()[rows]
    reference, brain = np.asarray(cells.reference[rows]), cells.brain[rows]
    masks = None if pack.mask is None else np.asarray(pack.mask[rows])
    tissues, pixel_mm = cells.tissues[rows], pack.pixel_mm[rows]
    spectrum = detectability.noise_power_spectrum(images - reference, brain, float(pixel_mm.mean()))
    return {
        "means": metrics.image_quality(images, reference, cells.inside[rows], patients),
        "patients": {
            name: values.tolist()
            for name, values in detectability.quality_of_patients(
                images, reference, masks, brain, tissues, patients, pixel_mm
            ).items()
        },
        "spectrum": {
            "frequencies": spectrum.frequencies.tolist(),
            "power": spectrum.power.tolist(),
            "cells": spectrum.cells.tolist(),
            "blocks": spectrum.blocks,
        },
    }


def _observed(cells: Cells, cell: Cell, seen: Seen) -> dict:
    """How well the channelised Hotelling observer finds each of detectability.SIGNALS.

    A denoiser sees the signal in the noise, so slices with signals are denoised anew, each alone: a network
    that sees neighbours is shown the slice itself in their place."""
    chosen, places = cells.places(seen.rows)
    some, noisy = seen.rows[chosen], seen.noisy[chosen]
    pixel_mm = float(cells.pack.pixel_mm[some].mean())
    channels = detectability.dog_channels(pixel_mm)
    patients = cells.pack.patient_ids()[some][places[:, 0]]
    truth = np.asarray(cells.reference[some])

    def outputs(low: np.ndarray) -> np.ndarray:
        if cell.denoiser is not None:
            low = denoise(cell.denoiser.network, low, seen.levels[chosen], np.arange(len(chosen)))
        return detectability.channel_outputs(low - truth, places, channels, pixel_mm)

    absent = outputs(noisy)
    return {
        name: detectability.hotelling(
            outputs(detectability.insert_signals(noisy, places, signal, pixel_mm)),
            absent,
            patients,
            seed=cells.seed,
        )._asdict()
        for name, signal in detectability.SIGNALS.items()
    }


READINGS: dict[str, Callable[[Cells, Cell, Seen], dict[str, Any]]] = {
    "classifier": _classified,
    "segmenter": _outlined,
    "quality": _measured,
    "observer": _observed,
}
